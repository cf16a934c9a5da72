/* sample.cu - one token a row by exact selection: the twin of sample.cpu.c, whose text says how; a block
 * a row, histograms in shared memory, searched by all threads at once.
 *
 * JIT constants: DTYPE; THREADS.
 * Bound: L2, up to 7 readings of the row, and f64 exp.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "kern/philox.h"
#include "ops/sampling/sampling_params.h"

enum { NUM_BINS = 2048, WARPS = THREADS / WARP, BINS_EACH = NUM_BINS / THREADS };
#define NO_LIMIT (~(u64)0)
#define KEY_NONE 0xffffffffu /* of -inf and NaN; small keys are large logits */

typedef struct sampler {
    u64 count[NUM_BINS], mass[NUM_BINS];
    u64 room[2][WARPS];
    u64 sum[3]; /* tokens, mass, and mass that min_p keeps */
    u64 before_count, before_mass;
    u32 largest; /* complement of the smallest key */
    u32 bin;
    i32 token;
} sampler;

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

QI_INLINE u32 key_at(const row_view *v, i64 i)
{
    return key_of(qi_load1(qi_at(v->logits, DTYPE, i), DTYPE));
}

QI_INLINE u64 mass_of(const row_view *v, u32 key)
{
    const float logit = logit_of(key);
    if (logit == v->max) return (u64)v->unit; /* also where both are +inf */
    return (u64)(v->unit * exp(((double)logit - (double)v->max) * v->inverse_temperature));
}

/* ---- selection ---------------------------------------------------------------------------- */

/* Histogram by the bits [shift, shift + width) of the keys whose upper bits equal prefix. */
QI_INLINE void count_keys(const row_view *v, u32 prefix, int shift, int width, sampler *s)
{
    __syncthreads();
    for (int i = (int)threadIdx.x; i < NUM_BINS; i += THREADS) s->count[i] = s->mass[i] = 0;
    __syncthreads();
    for (i64 i = threadIdx.x; i < v->vocab; i += THREADS) {
        const u32 key = key_at(v, i);
        if (key == KEY_NONE || (u64)key >> (shift + width) != prefix) continue;
        const u32 bin = key >> shift & ((1u << width) - 1);
        atomicAdd(&s->count[bin], (u64)1);
        atomicAdd(&s->mass[bin], mass_of(v, key));
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
QI_INLINE u32 walk(prefix *found, u64 count, u64 mass, sampler *s)
{
    const int first = (int)threadIdx.x * BINS_EACH;
    u64 counts = 0, masses = 0;
    for (int i = first; i < first + BINS_EACH; i++) counts += s->count[i], masses += s->mass[i];
    counts = found->count + scan(counts, s->room[0]);
    masses = found->mass + scan(masses, s->room[1]);
    for (int i = first; i < first + BINS_EACH; i++) {
        const u64 next_count = counts + s->count[i], next_mass = masses + s->mass[i];
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
    count_keys(v, 0, 21, 11, s);
    found.key = walk(&found, count, mass, s);
    count_keys(v, found.key, 10, 11, s);
    found.key = found.key << 11 | walk(&found, count, mass, s);
    count_keys(v, found.key, 0, 10, s);
    found.key = found.key << 10 | walk(&found, count, mass, s);

    const u64 each = mass_of(v, found.key);
    found.rank = count != NO_LIMIT ? count - found.count : (mass - found.mass + each - 1) / each;
    found.count += found.rank;
    found.mass += found.rank * each;
    return found;
}

/* The index of the rank-th token with this key: threads take runs of neighbours. */
QI_INLINE i32 index_of(const row_view *v, u32 key, u64 rank, sampler *s)
{
    const i64 each = (v->vocab + THREADS - 1) / THREADS, begin = threadIdx.x * each;
    const i64 end = begin + each < v->vocab ? begin + each : v->vocab;
    u64 here = 0;
    for (i64 i = begin; i < end; i++) here += key_at(v, i) == key;
    __syncthreads();
    u64 before = scan(here, s->room[0]);
    if (before < rank && rank <= before + here)
        for (i64 i = begin; i < end; i++)
            if (key_at(v, i) == key && ++before == rank) s->token = (i32)i;
    __syncthreads();
    return s->token;
}

/* ---- one row ------------------------------------------------------------------------------ */

/* The row's largest logit: its key, and the first index that has it. */
QI_INLINE u32 smallest_key(const row_view *v, sampler *s)
{
    u32 largest = 0;
    for (i64 i = threadIdx.x; i < v->vocab; i += THREADS) largest = max(largest, ~key_at(v, i));
    if (threadIdx.x == 0) s->largest = 0;
    __syncthreads();
    atomicMax(&s->largest, largest);
    __syncthreads();
    return ~s->largest;
}

/* Tokens, their mass, and the mass of those that min_p keeps. */
QI_INLINE void sum_row(const row_view *v, float min_p, sampler *s)
{
    const double least = v->unit * (double)min_p;
    u64 tokens = 0, total = 0, kept = 0;
    for (i64 i = threadIdx.x; i < v->vocab; i += THREADS) {
        const u32 key = key_at(v, i);
        if (key == KEY_NONE) continue;
        const u64 mass = mass_of(v, key);
        tokens++;
        total += mass;
        if ((double)mass >= least) kept += mass;
    }
    if (threadIdx.x < 3) s->sum[threadIdx.x] = 0;
    __syncthreads();
    atomicAdd(&s->sum[0], tokens);
    atomicAdd(&s->sum[1], total);
    atomicAdd(&s->sum[2], kept);
    __syncthreads();
}

QI_KERNEL(sample, sample_params)
{
    __shared__ sampler s;
    const i64 r = blockIdx.x;
    row_view v;
    v.logits = qi_at(p.rows.logits, DTYPE, r * p.rows.logits_stride);
    v.vocab = p.rows.vocab;
    const float temperature = p.temperature ? p.temperature[r] : 1.f;
    const float top_p = p.top_p ? p.top_p[r] : 1.f, min_p = p.min_p ? p.min_p[r] : 0.f;
    const u32 first = smallest_key(&v, &s);
    if (temperature == 0.f || first == KEY_NONE) {
        const i32 token = first == KEY_NONE ? 0 : index_of(&v, first, 1, &s);
        if (threadIdx.x == 0) p.rows.tokens[r] = token;
        return;
    }
    v.max = logit_of(first);
    v.inverse_temperature = 1. / (double)temperature;
    int vocab_bits = 0;
    while (v.vocab >> vocab_bits) vocab_bits++;
    v.unit = ldexp(1., 62 - vocab_bits);
    sum_row(&v, min_p, &s);

    const u64 num_tokens = s.sum[0], min_p_mass = s.sum[2];
    u64 kept = s.sum[1];
    const u64 top_k = p.top_k && p.top_k[r] > 0 ? (u64)p.top_k[r] : NO_LIMIT;
    if (top_k < num_tokens) kept = find(&v, top_k, NO_LIMIT, &s).mass;
    if (top_p < 1.f) {
        const double wish = ceil((double)kept * (double)top_p);
        kept = find(&v, NO_LIMIT, wish < 1. ? 1 : (u64)wish, &s).mass;
    }
    if (min_p_mass < kept) kept = min_p_mass;

    const u64 random = qi_philox_u64(p.seed[r], p.offset ? p.offset[r] : 0);
    const prefix drawn = find(&v, NO_LIMIT, __umul64hi(random, kept) + 1, &s);
    const i32 token = index_of(&v, drawn.key, drawn.rank, &s);
    if (threadIdx.x == 0) p.rows.tokens[r] = token;
}
