/* sample.cpu.c - one token a row by exact selection, without sorting or memory of the vocabulary's
 * size. Tasks share the rows.
 *
 * Tokens are ordered by logit, descending, then by index. Top-k, top-p and min-p each keep a prefix
 * of that order, and the draw is the token at which the running sum of masses passes a random
 * number: all are questions for find(), "the shortest prefix with so many tokens, or so much mass".
 *
 * Masses are exp((logit - max) / temperature) as 64-bit fixed point, so sums are exact in any order
 * and nothing below depends on rounding. find() is a radix select over the logit's 32-bit key, 11 +
 * 11 + 10 bits: a histogram of counts and masses, a walk to the bin where the wish is met, then the
 * same inside that bin. Only the first histogram needs every token's mass, and all finds of a row
 * share it.
 *
 * Bound: one exp a token (about 5 ns), then up to 3 x 3 passes over the row in cache.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/philox.h"
#include "ops/sampling/argmax.cpu.h"
#include "ops/sampling/sampling_params.h"

#define NUM_BINS 2048
#define BLOCK    1024 /* logits widened and keyed at a time */
#define NO_LIMIT UINT64_MAX

typedef struct histogram {
    u64 count[NUM_BINS], mass[NUM_BINS];
} histogram;

/* Everything about one row; lives in the task's scratch. */
typedef struct sampler {
    const void *logits;
    i64 vocab;
    qi_dtype dtype;
    float max; /* the largest logit, > -inf */
    double inverse_temperature;
    double unit;    /* mass of the largest logit: vocab of them fit u64 */
    u64 total;      /* mass of all tokens */
    u64 num_tokens; /* whose logit is above -inf */
    histogram top;  /* by the key's 11 upper bits */
    histogram part; /* inside one bin */
    u32 keys[BLOCK];
} sampler;

_Static_assert(sizeof(sampler) <= QI_TASK_SCRATCH_BYTES, "a sampler fits a task's scratch");

/* ---- keys and masses: small keys are large logits; the key of -inf and NaN is above all others
 * ---- */

#define KEY_NONE UINT32_MAX

static u32 key_of(float logit)
{
    u32 bits;
    const float x = logit + 0.f; /* -0 becomes +0: they are equal */
    memcpy(&bits, &x, sizeof bits);
    const u32 key = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
    return logit > -INFINITY ? key : KEY_NONE;
}

static float logit_of(u32 key)
{
    const u32 bits = key & 0x80000000u ? key : ~key & 0x7fffffffu;
    float logit;
    memcpy(&logit, &bits, sizeof logit);
    return logit;
}

static u64 mass_of(const sampler *s, u32 key)
{
    const float logit = logit_of(key);
    if (logit == s->max) return (u64)s->unit; /* also where both are +inf */
    return (u64)(s->unit * exp(((double)logit - (double)s->max) * s->inverse_temperature));
}

/* Fills s->keys with the keys of tokens [begin, end), at most BLOCK. */
static void load_keys(sampler *s, i64 begin, i64 end)
{
    float logits[BLOCK];
    const void *from = qi_at(s->logits, s->dtype, begin);
    switch (s->dtype) {
    case QI_F32: qi_widen(logits, from, QI_F32, end - begin); break;
    case QI_F16: qi_widen(logits, from, QI_F16, end - begin); break;
    default: qi_widen(logits, from, QI_BF16, end - begin); break;
    }
    for (i64 i = 0; i < end - begin; i++) s->keys[i] = key_of(logits[i]);
}

/* ---- selection -------------------------------------------------------------------------------- */

/* The whole row's histogram. Returns the mass of the tokens that min_p keeps: those with a mass of
 * at least min_p times the largest. */
static u64 count_row(sampler *s, float min_p)
{
    const double least = s->unit * (double)min_p;
    u64 kept = 0;
    memset(&s->top, 0, sizeof s->top);
    s->total = s->num_tokens = 0;
    for (i64 begin = 0; begin < s->vocab; begin += BLOCK) {
        const i64 n = s->vocab - begin < BLOCK ? s->vocab - begin : BLOCK;
        load_keys(s, begin, begin + n);
        for (i64 i = 0; i < n; i++) {
            const u32 key = s->keys[i];
            if (key == KEY_NONE) continue;
            const u64 mass = mass_of(s, key);
            s->top.count[key >> 21]++;
            s->top.mass[key >> 21] += mass;
            s->total += mass;
            s->num_tokens++;
            if ((double)mass >= least) kept += mass;
        }
    }
    return kept;
}

/* Histogram by the bits [shift, shift + width) of the keys whose upper bits equal prefix. */
static void count_part(sampler *s, u32 prefix, int shift, int width)
{
    const u32 digits = (1u << width) - 1;
    memset(&s->part, 0, sizeof s->part);
    for (i64 begin = 0; begin < s->vocab; begin += BLOCK) {
        const i64 n = s->vocab - begin < BLOCK ? s->vocab - begin : BLOCK;
        load_keys(s, begin, begin + n);
        for (i64 i = 0; i < n; i++) {
            const u32 key = s->keys[i];
            if (key >> (shift + width) != prefix || key == KEY_NONE) continue;
            s->part.count[key >> shift & digits]++;
            s->part.mass[key >> shift & digits] += mass_of(s, key);
        }
    }
}

/* The last token of a prefix of the order, and what the prefix holds. */
typedef struct prefix {
    u32 key;
    u64 rank; /* of the last token among those with the same key, from 1 */
    u64 count, mass;
} prefix;

/* Adds whole bins to found while they stay below both wishes, which lie within h. Returns the bin
 * that meets one. */
static u32 walk(const histogram *h, prefix *found, u64 count, u64 mass)
{
    u32 bin = 0;
    while (found->count + h->count[bin] < count && found->mass + h->mass[bin] < mass) {
        found->count += h->count[bin];
        found->mass += h->mass[bin];
        bin++;
    }
    return bin;
}

/* The shortest prefix with `count` tokens or with `mass`; one of them is NO_LIMIT, the other is at
 * least 1 and at most what the row holds. */
static prefix find(sampler *s, u64 count, u64 mass)
{
    prefix found = {0};
    found.key = walk(&s->top, &found, count, mass);
    count_part(s, found.key, 10, 11);
    found.key = found.key << 11 | walk(&s->part, &found, count, mass);
    count_part(s, found.key, 0, 10);
    found.key = found.key << 10 | walk(&s->part, &found, count, mass);

    const u64 each =
        mass_of(s, found.key); /* above 0 where a mass is wished for: the bin meets it */
    found.rank = count != NO_LIMIT ? count - found.count : (mass - found.mass + each - 1) / each;
    found.count += found.rank;
    found.mass += found.rank * each;
    return found;
}

/* The index of the rank-th token with this key. */
static i64 index_of(sampler *s, u32 key, u64 rank)
{
    for (i64 begin = 0; begin < s->vocab; begin += BLOCK) {
        const i64 n = s->vocab - begin < BLOCK ? s->vocab - begin : BLOCK;
        load_keys(s, begin, begin + n);
        for (i64 i = 0; i < n; i++)
            if (s->keys[i] == key && --rank == 0) return begin + i;
    }
    return 0; /* not reached: the key occurs rank times */
}

/* ---- one row ---------------------------------------------------------------------------------- */

static u64 high_product(u64 a, u64 b)
{
    const u64 a_lo = (u32)a, a_hi = a >> 32, b_lo = (u32)b, b_hi = b >> 32;
    const u64 mid = a_hi * b_lo + (a_lo * b_lo >> 32), carry = a_lo * b_hi + (u32)mid;
    return a_hi * b_hi + (mid >> 32) + (carry >> 32);
}

/* s->logits, vocab and dtype are set. */
static i32 sample_row(sampler *s, const sample_params *p, i64 r)
{
    const qi_dtype t = s->dtype;
    const float temperature = p->temperature ? p->temperature[r] : 1.f;
    const float top_p = p->top_p ? p->top_p[r] : 1.f, min_p = p->min_p ? p->min_p[r] : 0.f;
    s->max = argmax_value(s->logits, s->vocab, t);
    if (temperature == 0.f || s->max == -INFINITY)
        return (i32)argmax_find(s->logits, s->vocab, t, s->max);

    s->inverse_temperature = 1. / (double)temperature;
    int vocab_bits = 0;
    while (s->vocab >> vocab_bits) vocab_bits++;
    s->unit = ldexp(1., 62 - vocab_bits);
    const u64 min_p_mass = count_row(s, min_p);

    u64 kept = s->total;
    const u64 top_k = p->top_k && p->top_k[r] > 0 ? (u64)p->top_k[r] : NO_LIMIT;
    if (top_k < s->num_tokens) kept = find(s, top_k, NO_LIMIT).mass;
    if (top_p < 1.f) {
        const double wish = ceil((double)kept * (double)top_p);
        kept = find(s, NO_LIMIT, wish < 1. ? 1 : (u64)wish).mass;
    }
    if (min_p_mass < kept) kept = min_p_mass;

    const u64 random = qi_philox_u64(p->seed[r], p->offset ? p->offset[r] : 0);
    const prefix drawn = find(s, NO_LIMIT, high_product(random, kept) + 1);
    return (i32)index_of(s, drawn.key, drawn.rank);
}

QI_CPU_KERNEL(sample)
{
    const sample_params *p = params;
    sampler *s = task.scratch;
    i64 begin, end;
    qi_task_share(task, p->rows.batch, 1, &begin, &end);
    for (i64 r = begin; r < end; r++) {
        s->logits = qi_at(p->rows.logits, p->rows.dtype, r * p->rows.logits_stride);
        s->vocab = p->rows.vocab;
        s->dtype = p->rows.dtype;
        p->rows.tokens[r] = sample_row(s, p, r);
    }
}
