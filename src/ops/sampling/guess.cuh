/* guess.cuh - between which values of a row the prefix of top_p will end, by a sample of the row, before its weights are
 * made. All blocks guess the same.
 *
 * The sample is counted in bins of logits. Of a row's mass most lies with its few largest tokens, which a sample may have
 * or not: each thread's largest value, which is known anyway, is counted as it is, and the sample stands for the others.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_GUESS_CUH
#define QI_SAMPLING_GUESS_CUH

#include "ops/sampling/list.cuh"

enum {
    /* pieces of a thread in the sample: where the row has no room in shared memory, as many as have */
    SAMPLES = EACH > 7   ? 3
              : EACH > 3 ? 2
              : EACH > 0 ? 1
                         : MOST_SAMPLED / VEC,
    BINS_OF = BINS / WARP, /* a lane's */
    HEADS = CLUSTER * WORDS_OF,
    /* tokens that a block's list has room for */
    LISTED = LEAN ? 304 : sizeof(token_list) / sizeof(u64) / CLUSTER,
    TOP = 64,                        /* tokens that are listed where few hold the mass, about */
    WIDE = CLUSTER * LISTED * 3 / 4, /* and at most in all lists, where the sample has its say */
    SEARCHING = WARPS > 8 ? 8 : WARPS / 2, /* warps that look for the end among those listed */
};

/* What is known of the end of the prefix. */
enum { NOT_LISTED, LISTED_END, FEW_LISTED, NO_END /* all is kept */ };

/* What a block has for it in shared memory, beside the lists: they are where a finder has its own. */
typedef struct listing {
    union {
        struct {
            /* Bins of this block's sample, behind them what is in none, and of all blocks' samples. */
            __align__(16) u32 mine[BINS + WARP];
            __align__(16) u32 bins[BINS];
        };
        u64 own[LEAN ? LISTED : 1]; /* then this block's list, ranks */
    };
    u64 few[WARP];       /* ranks, at the end of the search */
    u64 room[SEARCHING]; /* sums of warps there */
    u32 edges[2][WARPS]; /* keys of warps' largest and lowest values */
    u32 listed;          /* tokens, which may be more than there is room for */
    u32 counts[CLUSTER]; /* tokens in lists */
    u32 ends[CLUSTER];   /* and in those up to each */
    u32 num_few;
    float low, high; /* logits: the guess */
    u64 within;      /* the mass of this block's list, where LEAN */
    /* The mass of the row, of what is above those listed, of a prefix at least, and of the prefix; its last rank. */
    u64 total, above, wish, kept, end;
    bracket b;       /* of the tokens that are listed */
    int found, fits; /* all lists have their tokens */
    u64 random;      /* of the draw */
} listing;

/* Lists of blocks, ranks, [CLUSTER][LISTED]: where the finder's is, or, in the first block of a LEAN row, where its part of
 * that was. What is summed up to find an end among them. */
QI_INLINE u64 *lists_of(const row_view *r, finder *f)
{
    return LEAN ? (u64 *)(r->x - threadIdx.x * VEC) : (u64 *)&f->list;
}

QI_INLINE void *sums_of(const row_view *r, finder *f)
{
    return LEAN ? lists_of(r, f) + CLUSTER * LISTED : (void *)f->count;
}
_Static_assert(HEADS + CLUSTER <= MOST_SENT, "samples go by the mailbox");
_Static_assert(!LEAN || (CLUSTER * LISTED + SEARCHING * WARP) * (int)sizeof(u64) <=
                            EACH * VEC * THREADS * (int)sizeof(float),
               "lists and sums are where a part of the row was");
_Static_assert(THREADS >= BINS, "a thread or more for each");

/* No weight is that large: +inf. */
#define ABOVE_ALL value_of(0xff800000u)

/* Pieces of a thread in the sample, how far they are apart, and where: warps have them at different places. */
QI_INLINE int num_samples(const row_view *r)
{
    return r->pieces < SAMPLES ? r->pieces : SAMPLES;
}

QI_INLINE int sample_at(const row_view *r, int n)
{
    const int step = r->pieces / num_samples(r);
    return n * step + (int)(r->at.warp % (u32)step);
}

QI_INLINE void sample(const row_view *r, const int s, int n, float *x)
{
    if (RESIDENT)
        piece(r, s, sample_at(r, n), x);
    else
        qi_load(x, r->x + n * (THREADS * VEC), QI_F32, VEC);
}

/* The largest value of this thread before stage s. Of a row that does not stay the sample does. */
QI_INLINE float sampled_largest(const row_view *r, const int s)
{
    if (RESIDENT) return thread_largest(r, s);
    float largest = absent(row_kind(s));
    int n = 0;
    FOR_EACH_PIECE(r, i)
    {
        float x[VEC];
        piece(r, s, i, x);
        for (int e = 0; e < VEC; e++) largest = fmaxf(largest, x[e]);
        if (n < num_samples(r) && i == sample_at(r, n))
            qi_store(r->x + n++ * (THREADS * VEC), x, QI_F32, VEC);
    }
    return largest;
}

/* A token's logit, or, up to a constant, that of a weight. */
QI_INLINE float logit_at(const row_view *r, const int s, float x)
{
    if (kind_of(s) == STAGE_SOFTMAX) return x;
    return (float)-information_of(x, r->unit) * (1.f / (16384.f * QI_LOG2E));
}

/* The width of bins, in nats: a power of 2, so that those of one block are whole parts of another's wider ones, and large
 * enough to tell them apart next to `largest`. */
QI_INLINE float width_of(float largest, float lowest)
{
    const float nats = fminf(1.125f * (largest - lowest), 24.f);
    const float width = fmaxf(fmaxf(nats * (1.f / BINS), fabsf(largest) * 0x1p-22f), 0x1p-96f);
    return float_of((bits_of(width) + 0x7fffffu) & 0xff800000u);
}

QI_INLINE float inverse_of(float power_of_2)
{
    return float_of((2u * EXPONENT_BIAS << 23) - bits_of(power_of_2));
}

/* The edge of the first bin: bin i has the logits from `width` times i below it on. */
QI_INLINE float top_of(float largest, float width)
{
    return ceilf(largest * inverse_of(width)) * width;
}

/* Counts a value, which is `below` bins from the first edge, so many times if it `counts` and is in one. */
QI_INLINE void count_in(u32 *bins, float below, int counts, u32 times)
{
    const int there = counts && below < BINS;
    atomicAdd(&bins[there ? (u32)below : BINS + threadIdx.x % WARP], times);
}

/* Counts this block's sample and sends it to all. Each thread's largest value is known, so it counts once, and others of the
 * sample for as many as they stand for: in units of 1 / num_samples(). What is behind the last bin has no mass to speak of.
 * Returns all blocks' counts, [CLUSTER][WORDS_OF], and from HEADS on the key of each one's largest value << 32 | the width
 * of its bins | whether it saw equal values. */
QI_INLINE const u64 *send_sample(row_view *r, const int s, listing *l)
{
    const message m = next_message(&r->at);
    const u32 t = threadIdx.x, lane = r->at.lane, warp = t / WARP;
    const float mine = sampled_largest(r, s), none = absent(row_kind(s));
    const int samples = num_samples(r);
    float x[VEC], width = 0.f, lowest = LARGEST;
    int equals = VEC == 1;
    u32 most = __reduce_max_sync(ALL_LANES, key_of(mine));
    sample(r, s, 0, x);
    for (int e = 0; e < VEC; e++) lowest = fminf(lowest, x[e] > none ? x[e] : LARGEST);
    u32 least = __reduce_min_sync(ALL_LANES, key_of(lowest));
    if (lane == 0)
        l->edges[0][warp] = most, l->edges[1][warp] = least < key_of(LARGEST) ? least : 0;
    if (t < BINS) l->mine[t] = l->bins[t] = 0;
    if (t == 0) l->listed = 0, l->within = 0;
    __syncthreads();
    most = __reduce_max_sync(ALL_LANES, lane < WARPS ? l->edges[0][lane] : 0);
    /* the highest of the warps' lowest: no outlier */
    least = __reduce_max_sync(ALL_LANES, lane < WARPS ? l->edges[1][lane] : 0);
    if (value_of(most) > none) {
        const float largest = logit_at(r, s, value_of(most));
        width = width_of(largest, least > 0 ? logit_at(r, s, value_of(least)) : NO_LOGIT);
        const float per_nat = inverse_of(width), top = top_of(largest, width) * per_nat;
        count_in(l->mine, top - logit_at(r, s, mine) * per_nat, mine > none, (u32)samples);
#pragma unroll 2
        for (int n = 0; n < samples; n++) {
            sample(r, s, n, x);
            equals |= x[0] > none && x[0] == x[VEC - 1];
            for (int e = 0; e < VEC; e++) {
                const int another = x[e] > none && x[e] != mine;
                count_in(l->mine, top - logit_at(r, s, x[e]) * per_nat, another, (u32)r->pieces);
            }
        }
    }
    equals = __syncthreads_or(equals);
    expect(m.arrived, CLUSTER * (WORDS_OF + 1));
    for (u32 i = t; i < CLUSTER * WORDS_OF; i += THREADS) {
        const u32 *const four = l->mine + i % WORDS_OF * IN_WORD;
        u64 word = 0;
#pragma unroll
        for (u32 j = 0; j < IN_WORD; j++) word |= (u64)min(four[j], 0xffffu) << 16 * j;
        send(m.to + r->at.rank * WORDS_OF + i % WORDS_OF, word, m.arrived, i / WORDS_OF);
    }
    const u64 head = (u64)most << 32 | bits_of(width) | (equals != 0);
    if (t < CLUSTER) send(m.to + HEADS + r->at.rank, head, m.arrived, t);
    await(m.arrived, m.parity);
    return m.to;
}

/* Adds up the samples of all blocks. */
QI_INLINE void add_samples(const row_view *r, const int s, const u64 *samples, listing *l,
                           float top, float width)
{
    for (u32 i = threadIdx.x; i < CLUSTER * WORDS_OF; i += THREADS) {
        const u64 word = samples[i], head = samples[HEADS + i / WORDS_OF];
        if (word == 0) continue;
        const float its = float_of((u32)head & ~1u),
                    most = logit_at(r, s, value_of((u32)(head >> 32)));
        const float per_nat = inverse_of(width), ratio = its * per_nat;
        const float below = (top - top_of(most, its)) * per_nat;
#pragma unroll
        for (u32 j = 0; j < IN_WORD; j++) {
            const u32 count = (u32)(word >> 16 * j) & 0xffff;
            const float bin = below + ((float)(i % WORDS_OF * IN_WORD + j) + .5f) * ratio;
            if (count && bin < BINS) atomicAdd(&l->bins[(u32)bin], count);
        }
    }
    __syncthreads();
}

/* A place among the bins, from the first edge on, and how many tokens are before it. */
typedef struct bin_place {
    float at, tokens;
} bin_place;

enum { AT_SHARE, FIRST_EDGE, LAST_EDGE };

/* Where a sum over bins comes to `sum`, behind the last one if nowhere: in a bin at its share of it, or at an edge. Before the
 * first of this lane's BINS_OF bins it is `before`, of so many tokens. */
QI_INLINE bin_place reach(const float *amounts, const float *tokens, float before,
                          float tokens_before, float sum, const u32 lane, int edge)
{
    bin_place p = {BINS, tokens_before};
    float rest = 0.f, its = 1.f, its_tokens = 0.f;
#pragma unroll
    for (u32 j = 0; j < BINS_OF; j++) {
        const float up_to = before + amounts[j];
        const int here = p.at == BINS && up_to >= sum;
        if (here) p.at = (float)(lane * BINS_OF + j), rest = sum - before;
        if (here) its = amounts[j], its_tokens = tokens[j];
        if (p.at == BINS) p.tokens += tokens[j];
        before = up_to;
    }
    const float part = fmaxf(fminf(rest * rcp(fmaxf(its, LEAST_NORMAL)), 1.f), 0.f);
    const float share = edge == AT_SHARE ? part : (float)(edge == LAST_EDGE);
    const u32 found = __ballot_sync(ALL_LANES, p.at < BINS);
    const int source = found ? __ffs((int)found) - 1 : WARP - 1;
    p = {fminf(p.at + share, BINS), p.tokens + share * its_tokens};
    return {__shfl_sync(ALL_LANES, p.at, source), __shfl_sync(ALL_LANES, p.tokens, source)};
}

/* By one warp: the logits between which the prefix ends, or that and nothing above. Bins are taken whole where many tokens
 * may have one value. All blocks find the same. */
QI_INLINE void guess_range(const row_view *r, listing *l, float top, float width, float p,
                           int equals)
{
    const float sure = 4.f; /* times the error that is likely */
    const u32 lane = r->at.lane;
    const float samples = (float)num_samples(r), pieces = (float)r->pieces;
    const float unit = 1.f / samples, ratio = ex2(width * -QI_LOG2E);
    const int whole = equals || 2.f * samples >= pieces;
    float w = ex2(((float)(lane * BINS_OF) + .5f) * width * -QI_LOG2E);
    float tokens[BINS_OF], masses[BINS_OF]; /* of bins */
    float count = 0.f, mass = 0.f, squares = 0.f;
#pragma unroll
    for (u32 j = 0; j < BINS_OF; j++, w *= ratio) {
        tokens[j] = (float)l->bins[lane * BINS_OF + j] * unit;
        masses[j] = tokens[j] * w;
        count += tokens[j];
        mass += masses[j];
        squares += masses[j] * w;
    }
    float count_to = count, mass_to = mass; /* up to this lane's */
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) {
        const float c = __shfl_up_sync(ALL_LANES, count_to, step);
        const float m = __shfl_up_sync(ALL_LANES, mass_to, step);
        if (lane >= step) count_to += c, mass_to += m;
    }
    const float before = mass_to - mass, count_before = count_to - count;
    const float all = (float)r->vocab;
    const float wish = __shfl_sync(ALL_LANES, mass_to, WARP - 1) * p;
    const float most = reach(tokens, tokens, count_before, count_before, TOP, lane, FIRST_EDGE).at;
    /* An error is of tokens that are no thread's largest: few of those at the top. */
    const float unsure = fminf(pieces * VEC * count_to, all);
    const float weight = mass_to <= wish ? 1.f - p : before >= wish ? p : fmaxf(p, 1.f - p);
    const float variance = warp_sum(squares * weight * weight * unsure) * (pieces * unit - 1.f);
    float far = sure * ex2(.5f * (lg2(variance) - lg2(all)));
    bin_place first, last;
    int above = 0;
#pragma unroll 1
    for (int again = 0; again < 3; again++) { /* what the lists have no room for is of no use */
        first = reach(masses, tokens, before, count_before, wish - far, lane,
                      whole ? FIRST_EDGE : AT_SHARE);
        last = reach(masses, tokens, before, count_before, wish + far, lane,
                     whole ? LAST_EDGE : AT_SHARE);
        above = first.at > most;
        const float within = last.tokens - (above ? first.tokens : 0.f);
        if (within <= WIDE) break;
        if (!above) last.at = 0.f;
        far *= WIDE * rcp(within);
    }
    const float end = above ? last.at : fmaxf(last.at, most);
    if (lane == 0) { /* what is on an edge of a bin belongs to it, rounded or not */
        l->high = above ? top - (first.at - (whole ? .0625f : 0.f)) * width : LARGEST;
        l->low = end <= BINS - 1 ? top - end * width : NO_LOGIT;
    }
}

/* The weights between which tokens are listed. *largest: the row's, before stage s. */
QI_INLINE range guess(row_view *r, const int s, listing *l, float p, float *largest)
{
    const u32 lane = r->at.lane;
    const u64 *const samples = send_sample(r, s, l);
    const u64 head = lane < CLUSTER ? samples[HEADS + lane] : 0;
    *largest = value_of(__reduce_max_sync(ALL_LANES, (u32)(head >> 32)));
    const float width = float_of(__reduce_max_sync(ALL_LANES, (u32)head & ~1u));
    const int equals = __any_sync(ALL_LANES, (u32)head & 1);
    if (p >= 1.f || !(*largest > absent(row_kind(s)))) return {ABOVE_ALL, ABOVE_ALL};
    const float most = logit_at(r, s, *largest), top = top_of(most, width);
    add_samples(r, s, samples, l, top, width);
    if (threadIdx.x < WARP) guess_range(r, l, top, width, p, equals);
    __syncthreads();
    const float unit = kind_of(s) == STAGE_SOFTMAX ? 1.f : *largest;
    return {fmaxf(weight_of(l->low, most) * unit, LEAST_NORMAL),
            l->high < LARGEST ? weight_of(l->high, most) * unit : ABOVE_ALL};
}

#endif
