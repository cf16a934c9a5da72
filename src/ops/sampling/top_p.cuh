/* top_p.cuh - top_p, right after softmax or first on a row of weights, by one pass over the row once its largest
 * value is known.
 *
 * A sample says beforehand between which weights the prefix ends, or, where few tokens hold the mass, above which
 * weight they are. The pass that makes the weights also adds up what is above that range, and lists the tokens in
 * it. Every block gets all lists, and finds the end among them by itself; so it has each warp's share of the mass
 * that is kept, too, and a draw needs no pass. Where the guess was wrong, find() looks at the row.
 *
 * Blocks meet twice, both times by messages: samples with the largest values, then sums with lists. Lists go to a place
 * and an mbarrier that nobody has used before.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_TOP_P_CUH
#define QI_SAMPLING_TOP_P_CUH

#include "ops/sampling/list.cuh"

/* The stage whose pass lists tokens; MAX_STAGES: none. */
QI_INLINE constexpr int find_front()
{
    int s = 0;
    while (kind_of(s) >= 0 && kind_of(s) < STAGE_SOFTMAX) s++;
    const int softmax = kind_of(s) == STAGE_SOFTMAX;
    if (kind_of(s + softmax) != STAGE_TOP_P || (!softmax && IN == ROW_LOGITS)) return MAX_STAGES;
    return EACH == 0 || s == NUM_EARLY ? s : MAX_STAGES; /* filters before it wait for softmax */
}

enum {
    FRONT_AT = find_front(),
    FRONT = (FRONT_AT < MAX_STAGES),
    TOP_P_AT = FRONT_AT + (kind_of(FRONT_AT) == STAGE_SOFTMAX),
    TOP_P_IS_LAST = FRONT && TOP_P_AT == NUM_STAGES - 1,
    /* pieces of a thread in the sample: where the row has no room in shared memory, as many as have */
    SAMPLES = EACH > 3   ? 2
              : EACH > 0 ? 1
                         : MOST_SAMPLED / VEC,
    BINS = 256,            /* of the sample */
    BINS_OF = BINS / WARP, /* a lane's */
    IN_WORD = 4,           /* counts of them, 16 bits each, as they are sent */
    WORDS_OF = BINS / IN_WORD,
    HEADS = CLUSTER * WORDS_OF,
    LISTED =
        sizeof(token_list) / sizeof(u64) / CLUSTER, /* tokens that a block's list has room for */
    TOP = 256,                       /* tokens that are listed where few hold the mass, about */
    WIDE = CLUSTER * LISTED * 3 / 4, /* and at most in all lists, where the sample has its say */
    GROUP = 32 / VEC,                /* pieces of a thread whose hits are in one word */
    SEARCHING = 8,                   /* warps that look for the end among those listed */
};

/* What is known of the end of the prefix. */
enum { NOT_LISTED, LISTED_END, NO_END /* all is kept */ };

/* What a block has for it in shared memory, beside the lists: they are where a finder has its own. */
typedef struct listing {
    /* This block's sample; that of all; then masses and counts as f32. */
    __align__(16) u32 bins[2][BINS];
    u64 few[WARP];       /* ranks, at the end of the search */
    u64 room[SEARCHING]; /* sums of warps there */
    u32 edges[2][WARPS]; /* keys of warps' largest and lowest values */
    u32 listed;          /* tokens, which may be more than there is room for */
    u32 counts[CLUSTER]; /* tokens in lists */
    u32 num_few;
    float low, high; /* logits: the guess */
    /* What the search found: the mass of the row, of what is above those listed, and of the prefix; its last rank. */
    u64 total, above, kept, end;
    bracket b;       /* of the tokens that are listed */
    int found, fits; /* all lists have their tokens */
    u64 random;      /* of the draw */
} listing;

#define LISTS_OF(f) ((u64 *)&(f)->list) /* of blocks, [CLUSTER][LISTED], ranks */
_Static_assert(HEADS + CLUSTER <= MOST_SENT, "samples go by the mailbox");
_Static_assert(THREADS >= BINS, "a thread or more for each");

/* No weight is that large: +inf. */
#define ABOVE_ALL value_of(0xff800000u)

/* ---- the guess --------------------------------------------------------------------------------- */

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

QI_INLINE u32 bin_of(float below)
{
    return (u32)fminf(fmaxf(below, 0.f), (float)(BINS - 1));
}

/* Counts a value so many times that is `there`: one that is not, no times anywhere, which is no branch. */
QI_INLINE void count_in(u32 *bins, float below, int there, u32 times)
{
    atomicAdd(&bins[there ? bin_of(below) : threadIdx.x % WARP], there ? times : 0u);
}

/* Counts this block's sample and sends it to all. Each thread's largest value is known, so it counts once, and others of the
 * sample for as many as they stand for: in units of 1 / num_samples(). Returns all blocks' counts, [CLUSTER][WORDS_OF],
 * and from HEADS on the key of each one's largest value << 32 | the width of its bins | whether it saw equal values. */
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
    if (t < BINS) l->bins[0][t] = l->bins[1][t] = 0;
    if (t == 0) l->listed = 0;
    __syncthreads();
    most = __reduce_max_sync(ALL_LANES, lane < WARPS ? l->edges[0][lane] : 0);
    /* the highest of the warps' lowest: no outlier */
    least = __reduce_max_sync(ALL_LANES, lane < WARPS ? l->edges[1][lane] : 0);
    if (value_of(most) > none) {
        const float largest = logit_at(r, s, value_of(most));
        width = width_of(largest, least > 0 ? logit_at(r, s, value_of(least)) : NO_LOGIT);
        const float per_nat = inverse_of(width), top = top_of(largest, width) * per_nat;
        count_in(l->bins[0], top - logit_at(r, s, mine) * per_nat, mine > none, (u32)samples);
#pragma unroll 2
        for (int n = 0; n < samples; n++) {
            sample(r, s, n, x);
            for (int e = 0; e < VEC; e++) {
                const int another = x[e] > none && x[e] != mine;
                if (e > 0) equals |= x[e] > none && x[e] == x[e - 1];
                count_in(l->bins[0], top - logit_at(r, s, x[e]) * per_nat, another, (u32)r->pieces);
            }
        }
    }
    equals = __syncthreads_or(equals);
    expect(m.arrived, CLUSTER * (WORDS_OF + 1));
    for (u32 i = t; i < CLUSTER * WORDS_OF; i += THREADS) {
        const u32 *const four = l->bins[0] + i % WORDS_OF * IN_WORD;
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
            const float bin = (float)(i % WORDS_OF * IN_WORD + j) + .5f;
            if (count) atomicAdd(&l->bins[1][bin_of(below + bin * ratio)], count);
        }
    }
    __syncthreads();
}

QI_INLINE float warp_sum_f32(float x)
{
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

QI_INLINE float warp_scan_f32(float x, u32 lane)
{
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) {
        const float below = __shfl_up_sync(ALL_LANES, x, step);
        if (lane >= step) x += below;
    }
    return x;
}

/* This lane's part of bins that have amounts, as bits of f32. */
QI_INLINE float amount_in(const u32 *bins, u32 lane, u32 j)
{
    return float_of(bins[lane * BINS_OF + j]);
}

/* Where the sum of all bins' amounts comes to `sum`, in bins from the first edge, BINS if nowhere: in a bin at its share
 * of it, or, `whole`, at its edge. */
QI_INLINE float reach(const u32 *bins, float before, float sum, const u32 lane, int whole)
{
    float bin = BINS, rest = 0.f, its = 1.f;
#pragma unroll
    for (u32 j = 0; j < BINS_OF; j++) {
        const float here = amount_in(bins, lane, j), up_to = before + here;
        if (bin == BINS && up_to >= sum)
            bin = (float)(lane * BINS_OF + j), rest = sum - before, its = here;
        before = up_to;
    }
    const float share = whole ? 0.f : rest / fmaxf(its, LEAST_NORMAL);
    bin = fminf(bin + fmaxf(fminf(share, 1.f), 0.f), BINS);
    return float_of(__reduce_min_sync(ALL_LANES, bits_of(bin)));
}

/* The amount between two such places. */
QI_INLINE float amount_between(const u32 *bins, float from, float to, const u32 lane)
{
    float sum = 0.f;
#pragma unroll
    for (u32 j = 0; j < BINS_OF; j++) {
        const float bin = (float)(lane * BINS_OF + j);
        sum += amount_in(bins, lane, j) *
               (fmaxf(fminf(to - bin, 1.f), 0.f) - fmaxf(fminf(from - bin, 1.f), 0.f));
    }
    return warp_sum_f32(sum);
}

/* By one warp: the logits between which the prefix ends, or that and nothing above. Bins are taken whole where many tokens
 * may have one value. All blocks find the same. */
QI_INLINE void guess_range(const row_view *r, listing *l, float top, float width, float p,
                           int equals)
{
    enum { SURE = 2 }; /* times the error that is likely */
    const u32 lane = r->at.lane;
    const float samples = (float)num_samples(r), pieces = (float)r->pieces;
    const float unit = 1.f / samples, ratio = ex2(width * -QI_LOG2E);
    const int whole = equals || 4.f * samples > pieces;
    float w = ex2(((float)(lane * BINS_OF) + .5f) * width * -QI_LOG2E);
    u32 *const mass = l->bins[0], *const count = l->bins[1];
    float counts = 0.f, masses = 0.f, squares = 0.f;
#pragma unroll
    for (u32 j = 0; j < BINS_OF; j++, w *= ratio) {
        u32 *const here = &count[lane * BINS_OF + j];
        const float tokens = (float)*here * unit;
        *here = bits_of(tokens), mass[lane * BINS_OF + j] = bits_of(tokens * w);
        counts += tokens, masses += tokens * w, squares += tokens * w * w;
    }
    const float counts_to = warp_scan_f32(counts, lane), masses_to = warp_scan_f32(masses, lane);
    const float all = __shfl_sync(ALL_LANES, counts_to, WARP - 1);
    const float wish = __shfl_sync(ALL_LANES, masses_to, WARP - 1) * p;
    /* An error is of tokens that are no thread's largest: few of those at the top. */
    const float unsure = fminf(pieces * VEC * counts_to, all) / all;
    const float weight = masses_to <= wish            ? 1.f - p
                         : masses_to - masses >= wish ? p
                                                      : fmaxf(p, 1.f - p);
    const float variance = warp_sum_f32(squares * weight * weight * unsure) * (pieces * unit - 1.f);
    const float most = reach(count, counts_to - counts, TOP, lane, 1);
    float far = SURE * sqrtf(variance), first, last;
#pragma unroll 1
    for (int again = 0; again < 3; again++) { /* what the lists have no room for is of no use */
        first = reach(mass, masses_to - masses, wish - far, lane, whole);
        last = reach(mass, masses_to - masses, wish + far, lane, whole) + (float)whole;
        const float within = amount_between(count, first > most ? first : 0.f, last, lane);
        if (within <= WIDE) break;
        if (first <= most) last = 0.f;
        far *= WIDE / within;
    }
    if (first <= most) last = fmaxf(last, most);
    if (lane == 0) { /* what is on an edge of a bin belongs to it, rounded or not */
        l->high = first > most ? top - (first - (whole ? .0625f : 0.f)) * width : LARGEST;
        l->low = last <= BINS - 1 ? top - last * width : NO_LOGIT;
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

/* ---- the pass ---------------------------------------------------------------------------------- */

/* Lists this thread's hits: a bit for each token from piece `first` on. Returns their mass. */
QI_INLINE u64 list_hits(const row_view *r, finder *f, listing *l, int first, u32 hits)
{
    u64 *const list = LISTS_OF(f) + r->at.rank * LISTED;
    u64 mass = 0;
    for (; hits; hits &= hits - 1) {
        const u32 at = (u32)__ffs((int)hits) - 1;
        const int i = first + (int)at / VEC, e = (int)at % VEC;
        float x[VEC];
        if (!RESIDENT) reread_piece(r, TOP_P_AT, i, x);
        const float w = RESIDENT ? r->x[i * (THREADS * VEC) + e] : x[e];
        const u32 to = atomicAdd(&l->listed, 1u);
        if (to < LISTED) list[to] = rank_at(key_of(w), token_at(r, i) + (u32)e);
        mass += mass_of(w, r->unit);
    }
    return mass;
}

/* ---- the search --------------------------------------------------------------------------------- */

/* Sends to all blocks this warp's mass above the range and its mass, then how many tokens its block lists, and the list. */
QI_INLINE void send_sums(const row_view *r, finder *f, listing *l, message m, u64 above, u64 total)
{
    const u32 t = threadIdx.x, lane = r->at.lane, rank = r->at.rank;
    u64 *const list = LISTS_OF(f) + rank * LISTED;
    expect(m.arrived, 2 * ALL_WARPS + CLUSTER);
    if (lane < CLUSTER) {
        send(m.to + r->at.warp, above, m.arrived, lane);
        send(m.to + ALL_WARPS + r->at.warp, total, m.arrived, lane);
    }
    __syncthreads();
    const u32 n = l->listed;
    if (t < CLUSTER) send(m.to + 2 * ALL_WARPS + rank, n, m.arrived, t);
    for (u32 other = 1; other < CLUSTER; other++)
#pragma unroll 1
        for (u32 i = t; i < min(n, (u32)LISTED); i += THREADS)
            send(list + i, list[i], &r->at.box->listed, (rank + other) % CLUSTER);
    if (CLUSTER == 1) __syncthreads();
}

/* Warps take lists in turn; several of them one, where there are fewer lists. */
enum {
    OF_LIST = SEARCHING > CLUSTER ? SEARCHING / CLUSTER : 1,
    SEARCHERS = SEARCHING * WARP /* threads */
};
#define FOR_EACH_LISTED(l, of, i)                                                                  \
    for (u32 of = threadIdx.x / WARP % CLUSTER; of < CLUSTER; of += SEARCHING)                     \
    _Pragma("unroll 1") for (u32 i = threadIdx.x / WARP / CLUSTER * WARP + threadIdx.x % WARP;     \
                             i < (l)->counts[of]; i += OF_LIST * WARP)

QI_INLINE u64 rank_listed(finder *f, u32 of, u32 i)
{
    return LISTS_OF(f)[of * LISTED + i];
}

QI_INLINE u64 mass_of_rank(const row_view *r, u64 rank)
{
    return mass_of(value_of((u32)(rank >> 32)), r->unit);
}

QI_INLINE void sync_searchers()
{
    bar_sync(1, SEARCHERS);
}

/* The last rank of the prefix, if it is among those listed, and the mass up to it: sums by ranges of ranks say in which of
 * them it is, which is then divided, until few tokens are there. Whether it is. */
QI_INLINE int find_listed(const row_view *r, finder *f, listing *l, bracket b, u64 above, u64 wish,
                          u64 *end, u64 *mass)
{
    const u32 t = threadIdx.x, lane = r->at.lane, warp = t / WARP;
    u64 *const sums = (u64 *)f->count;
    u64 high = (u64)b.high << 32 | ~0u, width = high - ((u64)b.low << 32);
    u32 n;
    do {
        const int shift = max(64 - __clzll((long long)width) - (31 - __clz(SEARCHERS)), 0);
        sums[t] = 0;
        sync_searchers();
        FOR_EACH_LISTED(l, of, i)
        {
            const u64 rank = rank_listed(f, of, i), below = high - rank;
            if (below <= width) add_shared(&sums[below >> shift], mass_of_rank(r, rank));
        }
        sync_searchers();
        if (t == 0) l->num_few = 0;
        const u64 here = sums[t], up_to = warp_scan_u64(here, lane);
        if (lane == WARP - 1) l->room[warp] = up_to;
        sync_searchers();
        u64 before = above + up_to - here, all = above;
        for (u32 i = 0; i < SEARCHING; i++) {
            all += l->room[i];
            if (i < warp) before += l->room[i];
        }
        if (all < wish) return 0;
        if (before < wish && before + here >= wish) f->end = t, f->end_amount = before;
        sync_searchers();
        const u64 skipped = (u64)f->end << shift;
        above = f->end_amount;
        high -= skipped;
        width = min(width - skipped, ((u64)1 << shift) - 1);
        FOR_EACH_LISTED(l, of, i)
        {
            const u64 rank = rank_listed(f, of, i);
            if (high - rank > width) continue;
            const u32 to = atomicAdd(&l->num_few, 1u);
            if (to < WARP) l->few[to] = rank;
        }
        sync_searchers();
        n = l->num_few;
    } while (n > WARP);
    const u64 rank = lane < n ? l->few[lane] : 0, its = lane < n ? mass_of_rank(r, rank) : 0;
    u64 sum = above;
#pragma unroll 1
    for (u32 i = 0; i < n; i++) {
        const u64 other = __shfl_sync(ALL_LANES, its, (int)i);
        if (l->few[i] >= rank) sum += other;
    }
    const u32 is_end = __ballot_sync(ALL_LANES, lane < n && sum >= wish && sum - its < wish);
    const int source = __ffs((int)is_end) - 1;
    *end = __shfl_sync(ALL_LANES, rank, source);
    *mass = __shfl_sync(ALL_LANES, sum, source);
    return 1;
}

/* By the first warps of each block: all find the same. Where what is kept is drawn from, sums of warps have it added. */
QI_INLINE void search(row_view *r, finder *f, listing *l, message m, bracket b, float p)
{
    const u32 lane = r->at.lane;
    if (CLUSTER > 1) await(m.arrived, m.parity);
    const u64 above = sum_sent(&r->at, m.to), total = sum_sent(&r->at, m.to + ALL_WARPS);
    const u32 count = lane < CLUSTER ? (u32)m.to[2 * ALL_WARPS + lane] : 0;
    const u32 there = min(count, (u32)LISTED);
    const int fits = __reduce_max_sync(ALL_LANES, count) <= LISTED;
    expect(&r->at.box->listed, __reduce_add_sync(ALL_LANES, lane == r->at.rank ? 0 : there));
    if (threadIdx.x < CLUSTER) l->counts[lane] = there;
    if (CLUSTER > 1) await(&r->at.box->listed, r->at.parities >> 2 & 1);
    const u64 wish = wish_of(total, p);
    u64 end = 0, mass = total;
    int found = NOT_LISTED;
    sync_searchers();
    if (p >= 1.f || total == 0)
        found = NO_END;
    else if (fits && above < wish && find_listed(r, f, l, b, above, wish, &end, &mass))
        found = LISTED_END;
    if (threadIdx.x == 0) {
        l->total = total, l->above = above, l->kept = mass, l->end = end;
        l->found = found, l->fits = fits, l->b = b;
    }
    if (!TOP_P_IS_LAST || OUT != ROW_TOKENS || found != LISTED_END) return;
    const u32 run = (u32)r->pieces * PIECE; /* tokens of a warp */
    FOR_EACH_LISTED(l, of, i)
    {
        const u64 rank = rank_listed(f, of, i);
        if (rank >= end) add_shared(&m.to[~(u32)rank / run], mass_of_rank(r, rank));
    }
}

/* Makes stage s of the row, if that is softmax, and lists the tokens in the range. *above: the mass of those above it, of
 * which there are some, or 0. */
QI_INLINE void look_through(const row_view *r, const int s, finder *f, listing *l, range in,
                            float largest, const int some_above, u64 *total, u64 *above)
{
    const int makes = kind_of(s) == STAGE_SOFTMAX;
    *total = *above = 0;
#pragma unroll 1
    for (int first = 0; first < r->pieces; first += GROUP) {
        const int group = min((int)GROUP, r->pieces - first);
        mass_sum all = {}, kept = {};
        u32 hits = 0;
#pragma unroll UNROLL
        for (int n = 0; n < group; n++) {
            float x[VEC];
            u32 bits = 0;
            piece(r, s, first + n, x);
            for (int e = 0; e < VEC; e++) {
                if (makes) x[e] = weight_of(x[e], largest);
                const mass_sum mass = split_mass(in_unit(r, row_kind(TOP_P_AT), x[e]));
                const int reaches = x[e] >= in.low;
                add_mass_if(&all, 1, mass);
                if (some_above) add_mass_if(&kept, reaches, mass);
                bits |= reaches && (!some_above || x[e] < in.high) ? 1u << e : 0;
            }
            hits |= bits << n * VEC;
            if (makes && RESIDENT) keep_piece(r, first + n, x);
        }
        *total += whole_mass(all, (u32)(group * VEC));
        const u64 listed = list_hits(r, f, l, first, hits);
        if (some_above) *above += whole_mass(kept, (u32)(group * VEC)) - listed;
    }
}

/* The pass, and the search: stage s is a softmax before top_p, or top_p itself, which this goes before. */
QI_INLINE void list_tokens(row_view *r, const int s, finder *f, listing *l)
{
    const int makes = kind_of(s) == STAGE_SOFTMAX;
    const float p = request_f32(&r->p->stages[TOP_P_AT].value, r->request);
    float largest;
    u64 total, above;
    const range in = guess(r, s, l, p, &largest);
    if (makes) r->stages[s].value = largest;
    if (in.high < ABOVE_ALL)
        look_through(r, s, f, l, in, largest, 1, &total, &above);
    else
        look_through(r, s, f, l, in, largest, 0, &total, &above);
    const message m = next_message(&r->at);
    send_sums(r, f, l, m, warp_sum_u64(above), warp_sum_u64(total));
    const bracket b = {key_of(in.low), min(key_of(in.high) - 1, key_of(makes ? 1.f : largest))};
    r->sent = m.to;
    if (threadIdx.x < SEARCHERS) search(r, f, l, m, b, p);
    r->at.parities ^= 1u << 2;                                /* of box->listed */
    if (OUT == ROW_TOKENS && threadIdx.x / WARP == SEARCHING) /* which has nothing to do */
        l->random = random_of(r);
    __syncthreads();
}

/* All stages after s on the tokens listed down to the end, the only ones left, if they are few enough: *left as of
 * finish(), in the first block. Returns whether they are. */
QI_INLINE int finish_listed(row_view *r, const int s, finder *f, listing *l, int *left)
{
    enum { MINE = CLUSTER * LISTED / THREADS };
    const u32 t = threadIdx.x;
    u64 mine[MINE];
#pragma unroll
    for (u32 n = 0; n < MINE; n++) {
        const u32 i = t + n * THREADS;
        const u64 rank = i % LISTED < l->counts[i / LISTED] ? LISTS_OF(f)[i] : 0;
        mine[n] = rank >= l->end ? rank : 0;
    }
    if (t == 0) l->listed = 0;
    __syncthreads();
#pragma unroll
    for (u32 n = 0; n < MINE; n++) {
        const u32 to = mine[n] ? atomicAdd(&l->listed, 1u) : ROOM;
        if (to >= ROOM) continue;
        f->list.ranks[to] = mine[n];
        f->list.values[to] = value_of((u32)(mine[n] >> 32));
    }
    __syncthreads();
    const u32 n = l->listed;
    if (n > ROOM) return 0;
    if (r->at.rank == 0) {
        sort_list(f, n);
        *left = finish_list(r, s, f, n);
    }
    return 1;
}

/* Stage s, top_p, after the pass. Returns whether all that follows is done too: *left as of finish(). */
QI_INLINE int end_listing(row_view *r, const int s, finder *f, listing *l, float p, int *left)
{
    r->kept = l->kept;
    if (l->found == NO_END) {
        r->sent += ALL_WARPS;
        return 0;
    }
    if (l->found == LISTED_END) {
        r->stages[s].last = {value_of((u32)(l->end >> 32)), ~(u32)l->end};
        if (TOP_P_IS_LAST) return 0;
        if (ends_in_list(s) && l->above == 0 && finish_listed(r, s, f, l, left)) return 1;
    }
    sync_row(); /* nobody looks at lists any more */
    if (l->found == LISTED_END) return 0;
    const u64 wish = wish_of(l->total, p);
    const bracket b = !l->fits && l->above < wish ? l->b : guess_mass(r, s, f, l->total, wish);
    r->stages[s].last = find(r, s, f, b, wish);
    r->sent = 0;
    return 0;
}

#endif
