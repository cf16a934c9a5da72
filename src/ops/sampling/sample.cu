/* sample.cu - one token a row by exact selection: the twin of sample.cpu.c, whose text says how; a block
 * a row, histograms in shared memory, searched by all threads at once.
 *
 * JIT constants: DTYPE; VEC, elements of an access; THREADS.
 * Bound: one f64 exp a token, a third of a row's time, and atomics of shared memory: masses are added in two
 * halves, since those of 64 bits would be loops. The row is read once for its largest logit, once for the
 * first histogram, which all finds share, twice more a find, where few tokens are looked at, and once for
 * the token: at most 9 times, from L2 after the first.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "kern/philox.h"
#include "ops/sampling/sampling_params.h"

enum {
    NUM_BINS = 2048,
    WARPS = THREADS / WARP,
    BINS_EACH = NUM_BINS / THREADS,
    WORDS = qi_words(DTYPE, VEC)
};
#define NO_LIMIT (~(u64)0)
#define KEY_NONE 0xffffffffu /* of -inf and NaN; small keys are large logits */

/* Tokens and their masses by bin; a mass in two halves. */
typedef struct histogram {
    u32 count[NUM_BINS], low[NUM_BINS], high[NUM_BINS];
} histogram;

typedef struct sampler {
    histogram top;  /* by the key's 11 upper bits */
    histogram part; /* inside one bin */
    u64 room[2][WARPS];
    u64 sum[3]; /* tokens, mass, and mass that min_p keeps */
    u64 before_count, before_mass;
    u32 largest; /* complement of the smallest key */
    u32 bin;
    i32 token;
} sampler;
static_assert(sizeof(sampler) == SAMPLER_BYTES(THREADS), "the host asks for as much");

/* What every thread knows of its row. */
typedef struct row_view {
    const char *logits;
    i64 vocab;
    float max;
    double inverse_temperature, unit;
} row_view;

QI_INLINE u32 key_of(float logit)
{
    const u32 bits = (u32)__float_as_int(logit + 0.f); /* -0 becomes +0: they are equal */
    const u32 key = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
    return logit > -QI_INFINITY ? key : KEY_NONE;
}

QI_INLINE float logit_of(u32 key)
{
    return __int_as_float((int)(key & 0x80000000u ? key : ~key & 0x7fffffffu));
}

/* An access as it is; i is a multiple of VEC, below vocab. */
QI_INLINE void load_at(const row_view *v, i64 i, u32 *words)
{
    qi_load_words(words, qi_at(v->logits, DTYPE, i), DTYPE, VEC);
}

QI_INLINE u32 key_in(const u32 *words, int e)
{
    return key_of(qi_unpack(words, DTYPE, e));
}

/* Every access of a row, by all threads: in it a thread has words[WORDS]. */
#define FOR_EACH_ACCESS(v, words)                                                                  \
    for (i64 i_ = threadIdx.x * VEC; i_ < (v)->vocab; i_ += THREADS * VEC)                         \
        if (load_at((v), i_, (words)), 1)

QI_INLINE u64 mass_of(const row_view *v, u32 key)
{
    const float logit = logit_of(key);
    if (logit == v->max) return (u64)v->unit; /* also where both are +inf */
    const double power = ((double)logit - (double)v->max) * v->inverse_temperature;
    return power < -43 ? 0 : (u64)(v->unit * exp(power)); /* unit is below 2^62 */
}

/* ---- selection ---------------------------------------------------------------------------- */

QI_INLINE void clear(histogram *h)
{
    __syncthreads();
    for (int i = (int)threadIdx.x; i < NUM_BINS; i += THREADS)
        h->count[i] = h->low[i] = h->high[i] = 0;
    __syncthreads();
}

QI_INLINE void add(histogram *h, u32 bin, u64 mass)
{
    const u32 low = (u32)mass;
    atomicAdd(&h->count[bin], 1u);
    if (mass == 0) return;
    const u32 before = atomicAdd(&h->low[bin], low);
    const u32 high = (u32)(mass >> 32) + (before + low < low); /* the lower half's carry */
    if (high != 0) atomicAdd(&h->high[bin], high);
}

QI_INLINE u64 mass_in(const histogram *h, int bin)
{
    return (u64)h->high[bin] << 32 | h->low[bin];
}

/* Histogram by the bits [shift, shift + width) of the keys whose upper bits equal prefix. */
QI_INLINE void count_part(const row_view *v, u32 prefix, int shift, int width, sampler *s)
{
    u32 words[WORDS];
    clear(&s->part);
    FOR_EACH_ACCESS(v, words)
    for (int e = 0; e < VEC; e++) {
        const u32 key = key_in(words, e);
        if (key != KEY_NONE && key >> (shift + width) == prefix)
            add(&s->part, key >> shift & ((1u << width) - 1), mass_of(v, key));
    }
    __syncthreads();
}

/* The sum of lower threads' values. */
QI_INLINE u64 scan(u64 value, u64 *room)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u64 sum = value;
    for (int step = 1; step < WARP; step *= 2) {
        const u64 below = __shfl_up_sync(ALL_LANES, sum, step);
        if (lane >= step) sum += below;
    }
    if (lane == WARP - 1) room[warp] = sum;
    __syncthreads();
    for (int i = 0; i < warp; i++) sum += room[i];
    return sum - value;
}

/* The last token of a prefix of the order, and what the prefix holds. */
typedef struct prefix {
    u32 key;
    u64 rank; /* of the last token among those with the same key, from 1 */
    u64 count, mass;
} prefix;

/* Adds whole bins to found while they stay below both wishes, which the histogram meets. Returns the
 * bin that meets one. */
QI_INLINE u32 walk(prefix *found, u64 count, u64 mass, const histogram *h, sampler *s)
{
    const int first = (int)threadIdx.x * BINS_EACH;
    u64 counts = 0, masses = 0;
    for (int i = first; i < first + BINS_EACH; i++) counts += h->count[i], masses += mass_in(h, i);
    counts = found->count + scan(counts, s->room[0]);
    masses = found->mass + scan(masses, s->room[1]);
    for (int i = first; i < first + BINS_EACH; i++) {
        const u64 next_count = counts + h->count[i], next_mass = masses + mass_in(h, i);
        if (counts < count && masses < mass && (next_count >= count || next_mass >= mass)) {
            s->bin = (u32)i;
            s->before_count = counts;
            s->before_mass = masses;
        }
        counts = next_count;
        masses = next_mass;
    }
    __syncthreads();
    found->count = s->before_count;
    found->mass = s->before_mass;
    return s->bin;
}

/* The shortest prefix with `count` tokens or with `mass`; one of them is NO_LIMIT, the other is at
 * least 1 and at most what the row holds. */
QI_INLINE prefix find(const row_view *v, u64 count, u64 mass, sampler *s)
{
    prefix found = {};
    found.key = walk(&found, count, mass, &s->top, s);
#pragma unroll 1
    for (int level = 0; level < 2; level++) { /* one copy of the code: exp is long */
        const int width = level == 0 ? 11 : 10;
        count_part(v, found.key, level == 0 ? 10 : 0, width, s);
        found.key = found.key << width | walk(&found, count, mass, &s->part, s);
    }

    const u64 each = mass_of(v, found.key);
    found.rank = count != NO_LIMIT ? count - found.count : (mass - found.mass + each - 1) / each;
    found.count += found.rank;
    found.mass += found.rank * each;
    return found;
}

/* How many tokens of an access have the key. */
QI_INLINE int count_in(const row_view *v, i64 i, u32 key)
{
    u32 words[WORDS];
    int here = 0;
    load_at(v, i, words);
    for (int e = 0; e < VEC; e++) here += key_in(words, e) == key;
    return here;
}

/* The index of the rank-th token with this key: threads take runs of neighbouring accesses. */
QI_INLINE i32 index_of(const row_view *v, u32 key, u64 rank, sampler *s)
{
    const i64 each = (v->vocab / VEC + THREADS - 1) / THREADS * VEC, begin = threadIdx.x * each;
    const i64 end = begin + each < v->vocab ? begin + each : v->vocab;
    u64 here = 0;
#pragma unroll 4
    for (i64 i = begin; i < end; i += VEC) here += count_in(v, i, key);
    __syncthreads();
    u64 before = scan(here, s->room[0]);
    if (before < rank && rank <= before + here)
        for (i64 i = begin; i < end; i += VEC) {
            u32 words[WORDS];
            load_at(v, i, words);
            for (int e = 0; e < VEC; e++)
                if (key_in(words, e) == key && ++before == rank) s->token = (i32)(i + e);
        }
    __syncthreads();
    return s->token;
}

/* ---- one row ------------------------------------------------------------------------------ */

/* The key of the row's largest logit. */
QI_INLINE u32 smallest_key(const row_view *v, sampler *s)
{
    u32 largest = 0, words[WORDS];
    if (threadIdx.x == 0) s->largest = 0;
    __syncthreads();
    FOR_EACH_ACCESS(v, words)
    for (int e = 0; e < VEC; e++) largest = max(largest, ~key_in(words, e));
    largest = __reduce_max_sync(ALL_LANES, largest);
    if (threadIdx.x % WARP == 0) atomicMax(&s->largest, largest);
    __syncthreads();
    return ~s->largest;
}

QI_INLINE u64 warp_sum_u64(u64 x)
{
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

/* The first histogram; tokens, their mass, and the mass of those that min_p keeps. */
QI_INLINE void sum_row(const row_view *v, float min_p, sampler *s)
{
    const double least = v->unit * (double)min_p;
    u64 sums[3] = {};
    u32 words[WORDS];
    if (threadIdx.x < 3) s->sum[threadIdx.x] = 0;
    clear(&s->top);
    FOR_EACH_ACCESS(v, words)
    for (int e = 0; e < VEC; e++) {
        const u32 key = key_in(words, e);
        if (key == KEY_NONE) continue;
        const u64 mass = mass_of(v, key);
        add(&s->top, key >> 21, mass);
        sums[0]++;
        sums[1] += mass;
        if ((double)mass >= least) sums[2] += mass;
    }
    for (int i = 0; i < 3; i++) {
        const u64 sum = warp_sum_u64(sums[i]);
        if (threadIdx.x % WARP == 0) atomicAdd(&s->sum[i], sum);
    }
    __syncthreads();
}

/* What is left of a row of so much mass is cut thrice: by top_k, by top_p, and at the token drawn. */
QI_INLINE prefix draw(const sample_params *p, const row_view *v, i64 r, sampler *s)
{
    enum { TOP_K, TOP_P, DRAW };
    const float top_p = p->top_p ? p->top_p[r] : 1.f;
    const u64 top_k = p->top_k && p->top_k[r] > 0 ? (u64)p->top_k[r] : NO_LIMIT;
    const u64 random = qi_philox_u64(p->seed[r], p->offset ? p->offset[r] : 0);
    const u64 num_tokens = s->sum[0], min_p_mass = s->sum[2];
    prefix found = {};
    u64 kept = s->sum[1];
#pragma unroll 1
    for (int cut = TOP_K; cut <= DRAW; cut++) {
        u64 count = NO_LIMIT, mass = NO_LIMIT;
        if (cut == TOP_K) {
            if (top_k >= num_tokens) continue;
            count = top_k;
        } else if (cut == TOP_P) {
            if (!(top_p < 1.f)) continue;
            const double wish = ceil((double)kept * (double)top_p);
            mass = wish < 1. ? 1 : (u64)wish;
        } else {
            if (min_p_mass < kept) kept = min_p_mass;
            mass = __umul64hi(random, kept) + 1;
        }
        found = find(v, count, mass, s);
        kept = found.mass;
    }
    return found;
}

QI_KERNEL(sample, sample_params)
{
    extern __shared__ sampler samplers[]; /* [1]: more than what a kernel has without asking */
    sampler *const s = samplers;
    const i64 r = blockIdx.x;
    row_view v;
    griddepcontrol_wait();
    v.logits = qi_at(p.rows.logits, DTYPE, r * p.rows.logits_stride);
    v.vocab = p.rows.vocab;
    const float temperature = p.temperature ? p.temperature[r] : 1.f;
    prefix token = {smallest_key(&v, s), 1}; /* the first of the largest */
    if (token.key == KEY_NONE) {
        if (threadIdx.x == 0) p.rows.tokens[r] = 0;
        return;
    }
    if (temperature != 0.f) {
        v.max = logit_of(token.key);
        v.inverse_temperature = 1. / (double)temperature;
        int vocab_bits = 0;
        while (v.vocab >> vocab_bits) vocab_bits++;
        v.unit = ldexp(1., 62 - vocab_bits);
        sum_row(&v, p.min_p ? p.min_p[r] : 0.f, s);
        token = draw(&p, &v, r, s);
    }
    const i32 index = index_of(&v, token.key, token.rank, s);
    if (threadIdx.x == 0) p.rows.tokens[r] = index;
}
