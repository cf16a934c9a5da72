/* top_k.cu - a row's k largest values, by the blocks of a cluster or by one.
 *
 * For k up to MOST_K rows are streamed (stream.cuh), and the first block sorts what is left. Few rows stay in shared
 * memory for a k that maxima of lanes bound (maxima.cuh): what reaches the bound is sent to the first block. Where k is
 * larger, or too much does, a histogram of keys is narrowed to the k-th's key, at most 4 times; the tokens kept are written
 * by index, and sorted where they are written.
 *
 * JIT constants: DTYPE; VEC, elements of an access; THREADS; CLUSTER, blocks of a row; RESIDENT (pieces.cuh).
 * Bound: for few rows latency, of the barriers of the cluster; for many HBM, the row read once.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/maxima.cuh"
#include "ops/sampling/pieces.cuh"
#include "ops/sampling/top_k_params.h"

/* Rows as stream.cuh has them. */
typedef struct source {
    const char *row;
    u32 vocab, lane;
} source;

QI_INLINE u32 token_at(const source *r, u32 i)
{
    return (i * WARP + r->lane) * VEC;
}

QI_INLINE void load_words(const source *r, u32 i, u32 *words)
{
    const u32 token = token_at(r, i);
    if (token < r->vocab) qi_load_words(words, qi_at(r->row, DTYPE, token), DTYPE, VEC);
}

QI_INLINE float largest_value(const source *r, u32 i, const u32 *words, int *bad)
{
    float x[VEC], largest = NO_LOGIT; /* NaN is less */
    if (token_at(r, i) >= r->vocab) return NO_LOGIT;
    qi_unpack_all(x, words, DTYPE, VEC);
    for (int e = 0; e < VEC; e++) largest = fmaxf(largest, x[e]);
    return clean_logit(largest);
}

QI_INLINE void load_values(const source *r, u32 i, float *x)
{
    load_clean(x, qi_at(r->row, DTYPE, token_at(r, i)), VEC);
}

enum { STREAM_ROOM = 2 * MOST_STREAMED };
#include "ops/sampling/stream.cuh"

enum {
    ROOM = STREAM_ROOM, /* tokens that a block sorts in its memory */
    NUM_BINS = CLUSTER * THREADS < 2048 ? CLUSTER * THREADS : 2048,
    SLICE = NUM_BINS / CLUSTER, /* bins that a block adds up, one a thread */
};

typedef struct workplace {
    mailbox box;
    maxima most;
    u32 gathered; /* in the first block: tokens that it was sent */
    union {
        candidates streamed;
        u64 list[ROOM]; /* tokens by rank_of(), as streamed has them */
        u32 bins[NUM_BINS];
    };
} workplace;

/* ---- sorting ------------------------------------------------------------------------------------ */

/* Pairs of a bitonic sort, largest first: number n of those that lie half a block apart, or mirror each other in a
 * block of 2 * half. What would lie behind the end counts as smallest, and stays there. */
typedef struct pair {
    u32 first, second;
} pair;

QI_INLINE pair pair_of(u32 n, u32 half, int mirrored)
{
    const u32 at = n & (half - 1), begin = (n - at) * 2;
    return {begin + at, begin + (mirrored ? 2 * half - 1 - at : at + half)};
}

/* From pairs `half` apart on down. Up to 2 * WARP elements are one warp's. */
QI_INLINE void merge_list(u64 *list, u32 n, u32 half, int mirrored)
{
    for (; half > 0; half /= 2, mirrored = 0) {
        if (half > WARP || (half == WARP && !mirrored))
            __syncthreads();
        else
            __syncwarp();
        for (u32 i = threadIdx.x; i < n; i += THREADS) {
            const pair q = pair_of(i, half, mirrored);
            if (q.second >= n) continue;
            const u64 a = list[q.first], b = list[q.second];
            if (a < b) list[q.first] = b, list[q.second] = a;
        }
    }
}

QI_INLINE void sort_list(u64 *list, u32 n)
{
    __syncthreads();
    for (u32 half = 1; half < n; half *= 2) merge_list(list, n, half, 1);
    __syncthreads();
}

/* A part of the tokens in memory through the list: sorted, or the last steps of a merge that went on outside. */
QI_INLINE void sort_part(i32 *tokens, u32 n, int merge, const char *row, u64 *list)
{
    for (u32 i = threadIdx.x; i < n; i += THREADS)
        list[i] = rank_of(clean_element(row, tokens[i]), (u32)tokens[i]);
    if (merge) {
        __syncthreads();
        merge_list(list, n, ROOM / 2, 0);
        __syncthreads();
    } else {
        sort_list(list, n);
    }
    for (u32 i = threadIdx.x; i < n; i += THREADS) tokens[i] = (i32)token_of(list[i]);
    __syncthreads();
}

QI_INLINE void sort_parts(i32 *tokens, u32 n, int merge, const char *row, const place *at,
                          u64 *list)
{
    for (u32 begin = at->rank * ROOM; begin < n; begin += CLUSTER * ROOM)
        sort_part(tokens + begin, min(n - begin, (u32)ROOM), merge, row, list);
    sync_row();
}

/* n tokens in memory, by all blocks of the row. */
QI_INLINE void sort_tokens(i32 *tokens, u32 n, const char *row, const place *at, u64 *list)
{
    sort_parts(tokens, n, 0, row, at, list);
    for (u32 size = 2 * ROOM; size / 2 < n; size *= 2) {
        for (u32 half = size / 2; half >= ROOM; half /= 2) {
            const int mirrored = half == size / 2;
            for (u32 i = at->warp * WARP + at->lane; i < n; i += CLUSTER * THREADS) {
                const pair q = pair_of(i, half, mirrored);
                if (q.second >= n) continue;
                const i32 a = tokens[q.first], b = tokens[q.second];
                if (rank_of(clean_element(row, a), (u32)a) < rank_of(clean_element(row, b), (u32)b))
                    tokens[q.first] = b, tokens[q.second] = a;
            }
            sync_row();
        }
        sort_parts(tokens, n, 1, row, at, list);
    }
}

/* Place i of a request's results. */
QI_INLINE void write_value(const top_k_params *p, i64 request, const char *row, u32 i, u32 token)
{
    const u32 minus_infinity = DTYPE == QI_F32 ? 0xff800000u : DTYPE == QI_F16 ? 0xfc00u : 0xff80u;
    u32 word;
    qi_load_words(&word, qi_at(row, DTYPE, token), DTYPE, 1);
    const float x = qi_unpack(&word, DTYPE, 0);
    if (!(x == x)) word = minus_infinity;
    qi_store_words(qi_to(p->values, DTYPE, request * p->values_stride + i), &word, DTYPE, 1);
}

/* ---- few tokens --------------------------------------------------------------------------------- */

/* Writes the k first of n tokens, by the threads of one block. */
QI_INLINE void write_list(const top_k_params *p, i64 request, const char *row, u64 *list, u32 n)
{
    const u32 k = (u32)p->k;
    i32 *const indices = p->indices + request * p->indices_stride;
    sort_list(list, n);
    if (!p->sorted) {
        for (u32 i = threadIdx.x; i < k; i += THREADS) list[i] = (u32)list[i];
        sort_list(list, k);
    }
    for (u32 i = threadIdx.x; i < k; i += THREADS) {
        const u32 token = token_of(list[i]);
        indices[i] = (i32)token;
        if (p->values) write_value(p, request, row, i, token);
    }
}

/* Brings the tokens whose values are at least that of a key into the first block's list. Returns how many there are; of more
 * than ROOM some are missing. */
QI_INLINE u32 gather_from(const pieces *r, place *at, workplace *w, u32 key)
{
    const float least = value_of(key);
    u64 *const arrived = &at->box->listed;
    u32 to = 0, claimed = 0, here = 0;
    FOR_EACH_PIECE(r, token)
    {
        float x[VEC];
        u32 count = 0;
        piece(r, token, x);
        for (int e = 0; e < VEC; e++) count += x[e] >= least;
        here += count;
        if (count == 0 || to >= ROOM) continue; /* no more room, and none is asked for */
        to = atomicAdd((u32 *)at_block(&w->gathered, 0), count);
        claimed += count;
        for (int e = 0; e < VEC; e++)
            if (x[e] >= least && to < ROOM)
                send(&w->list[to++], rank_of(x[e], token + (u32)e), arrived, 0);
    }
    u64 all = (u64)__reduce_add_sync(ALL_LANES, claimed) << 32;
    all |= __reduce_add_sync(ALL_LANES, here);
    all = sum_sent(at, swap(at, &all, 1));
    if (at->rank == 0) {
        expect(arrived, min((u32)(all >> 32), (u32)ROOM));
        await(arrived, 0);
    }
    return (u32)all;
}

/* write_list() of few tokens: several threads count how many are before one of them. */
QI_INLINE void write_few(const top_k_params *p, i64 request, const char *row, const u64 *list,
                         u32 n, u64 *last)
{
    const u32 t = threadIdx.x, k = (u32)p->k, each = threads_of_few(n), i = t / each;
    u32 before = 0;
    const u64 rank = i < n ? list[i] : 0;
    for (u32 other = t % each; other < n; other += each) before += list[other] > rank;
    for (u32 step = 1; step < each; step *= 2) before += __shfl_xor_sync(ALL_LANES, before, step);
    const int kept = i < n && before < k;
    if (!p->sorted) { /* by index: that of a lower index is the larger lower half */
        if (before == k - 1 && i < n) *last = rank;
        __syncthreads();
        const u64 least = *last;
        before = 0;
        for (u32 other = t % each; other < n; other += each)
            before += list[other] >= least && (u32)list[other] > (u32)rank;
        for (u32 step = 1; step < each; step *= 2)
            before += __shfl_xor_sync(ALL_LANES, before, step);
    }
    if (!kept || t % each != 0) return;
    p->indices[request * p->indices_stride + before] = (i32)token_of(rank);
    if (p->values) write_value(p, request, row, before, token_of(rank));
}

/* Whether that was all. */
QI_INLINE int write_bounded(const top_k_params *p, i64 request, const pieces *r, place *at,
                            workplace *w)
{
    share_maxima(at, &w->most, key_of(largest_of(r)));
    const u32 n = gather_from(r, at, w, bound_of_maxima(&w->most, (u32)p->k));
    if (n > ROOM) return 0;
    if (at->rank != 0) return 1;
    if (n <= FEW)
        write_few(p, request, r->row, w->list, n, &w->most.keys[0]);
    else
        write_list(p, request, r->row, w->list, n);
    return 1;
}

/* ---- many ----------------------------------------------------------------------------------------- */

typedef struct last_kept {
    u32 key, ties; /* so many of this key are kept */
} last_kept;

/* The key of the row's k-th token. */
QI_INLINE last_kept find_last(const pieces *r, place *at, u32 *bins, u32 k)
{
    u32 low = key_of(NO_LOGIT), high = key_of(LARGEST), above = 0;
    while (low < high) {
        int shift = 0;
        while ((high - low) >> shift >= NUM_BINS) shift++;
        for (u32 i = threadIdx.x; i < NUM_BINS; i += THREADS) bins[i] = 0;
        __syncthreads();
        FOR_EACH_PIECE(r, token)
        {
            float x[VEC];
            piece(r, token, x);
            for (int e = 0; e < VEC; e++) {
                const u32 key = key_of(x[e]);
                if (key >= low && key <= high) atomicAdd(&bins[(high - key) >> shift], 1u);
            }
        }
        sync_row();

        const u32 bin = at->rank * SLICE + threadIdx.x;
        u32 here = 0;
        for (u32 rank = 0; rank < CLUSTER && threadIdx.x < SLICE; rank++)
            here += *(const u32 *)at_block(&bins[bin], rank);
        const u32 sum = warp_scan(here, at->lane);
        const u64 all = __shfl_sync(ALL_LANES, sum, WARP - 1);
        const u32 before = above + (u32)sum_before(at, exchange(at, &all, 1)) + sum - here;
        const notice mine = {.amount = before, .index = bin};
        const notice n = announce(at, before < k && before + here >= k, mine);
        above = (u32)n.amount;
        high -= n.index << shift;
        const u32 width = (1u << shift) - 1;
        if (high - low > width) low = high - width;
    }
    return {low, k - above};
}

/* Writes the indices of the tokens kept, by index: warps take runs of the row. */
QI_INLINE void write_kept(const char *row, u32 vocab, place *at, last_kept last, i32 *indices)
{
    enum { PIECE = WARP * VEC };
    const u32 run = (vocab + ALL_WARPS * PIECE - 1) / (ALL_WARPS * PIECE);
    const u32 begin = (at->warp * run * WARP + at->lane) * VEC;
    u32 counts[2] = {};
    float x[VEC];
    for (u32 i = 0; i < run && begin + i * PIECE < vocab; i++) {
        load_clean(x, qi_at(row, DTYPE, begin + i * PIECE), VEC);
        for (int e = 0; e < VEC; e++) {
            counts[0] += key_of(x[e]) > last.key;
            counts[1] += key_of(x[e]) == last.key;
        }
    }
    const u64 sums[2] = {__reduce_add_sync(ALL_LANES, counts[0]),
                         __reduce_add_sync(ALL_LANES, counts[1])};
    const u64 *const sent = exchange(at, sums, 2);
    u32 above = (u32)sum_before(at, sent), equal = (u32)sum_before(at, sent + ALL_WARPS);
    for (u32 i = 0; i < run; i++) {
        const u32 token = begin + i * PIECE;
        u32 keys[VEC] = {}, here = 0; /* above << 16 | equal: a piece's fit */
        if (token < vocab) load_clean(x, qi_at(row, DTYPE, token), VEC);
        for (int e = 0; e < VEC; e++) {
            if (token < vocab) keys[e] = key_of(x[e]);
            here += (u32)(keys[e] > last.key) << 16 | (u32)(keys[e] == last.key);
        }
        const u32 sum = warp_scan(here, at->lane);
        u32 before = above + ((sum - here) >> 16), ties = equal + ((sum - here) & 0xffff);
        for (int e = 0; e < VEC; e++) {
            const int tie = keys[e] == last.key;
            if (keys[e] > last.key || (tie && ties < last.ties))
                indices[before + min(ties, last.ties)] = (i32)(token + e);
            before += keys[e] > last.key;
            ties += (u32)tie;
        }
        const u32 all = __shfl_sync(ALL_LANES, sum, WARP - 1);
        above += all >> 16;
        equal += all & 0xffff;
    }
    sync_row();
}

QI_INLINE void write_many(const top_k_params *p, i64 request, const pieces *r, place *at,
                          workplace *w)
{
    const u32 k = (u32)p->k;
    i32 *const indices = p->indices + request * p->indices_stride;
    const last_kept last = find_last(r, at, w->bins, k);
    write_kept(r->row, r->vocab, at, last, indices);
    if (p->sorted) sort_tokens(indices, k, r->row, at, w->list);
    if (!p->values) return;
    for (u32 i = at->warp * WARP + at->lane; i < k; i += CLUSTER * THREADS)
        write_value(p, request, r->row, i, (u32)indices[i]);
}

/* Of a streamed row so few registers that an SM has room for 1024 threads. */
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT ? 1 : 1024 / THREADS)
    top_k(const __grid_constant__ top_k_params p)
{
    __shared__ workplace w;
    place at;
    const i64 request = blockIdx.x / CLUSTER;
    const char *const row = qi_at(p.rows, DTYPE, request * p.rows_stride);
    if (threadIdx.x == 0)
        w.gathered = 0; /* others look at it when they have a message of this thread */
    open_place(&at, &w.box);
    griddepcontrol_wait();
    if (!RESIDENT && p.k <= MOST_STREAMED) {
        const source r = {row, (u32)p.vocab, at.lane};
        const u64 low = (u64)key_of(NO_LOGIT) << 32;
        int bad = 0; /* not asked for */
        u32 n = stream(&r, &at, &w.streamed, r.vocab, (u32)p.k, low, &bad);
        n = collect(&at, &w.streamed, n, (u32)p.k);
        if (at.rank == 0) write_list(&p, request, row, w.list, n);
        wait_for_lists();
    } else {
        pieces r;
        open_pieces(&r, &at, row, p.vocab);
        wait_for_row();
        if (RESIDENT && p.k <= MOST_BOUNDED && write_bounded(&p, request, &r, &at, &w)) return;
        write_many(&p, request, &r, &at, &w);
    }
}
