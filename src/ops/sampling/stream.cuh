/* stream.cuh - a row's largest tokens by reading it once and keeping nothing else: candidates that reach a bound
 * below the k-th largest token seen so far, in a list in shared memory. When the list grows the bound is raised, and
 * the list cut down to it. The blocks of a row, that take turns in reading it, meet once: the first fetches the lists
 * of the others.
 *
 * Of a thread's pieces of VEC tokens only the largest values are compared with the bound; few pieces have candidates
 * for the list, and are read again from the cache. So the next loads are under way while a tile, a piece of each
 * TIMES a thread, is looked at.
 *
 * The includer says what a row is: STREAM_ROOM, ranks that a list has room for, at least THREADS * GROUPS; a type
 * `source`; and for piece i of the row, of VEC tokens a lane, of which this lane's first is below vocab,
 *     load_words(row, i, words)            its words as they are, where its first token is below vocab
 *     largest_value(row, i, words, &bad)   its largest value, -inf or 0 from vocab on; bad: sets it if it is invalid
 *     load_values(row, i, x)               its values, loaded again
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_STREAM_CUH
#define QI_SAMPLING_STREAM_CUH

enum {
    TIMES = VEC > 1 ? 4 : 8,
    TILE = TIMES * ALL_WARPS, /* pieces that all blocks look at together */
    MOST_K = STREAM_ROOM / 2,
    GROUPS = 4, /* of pieces of a thread, whose largest values are told apart */
    SHARE =
        STREAM_ROOM / (CLUSTER > 2 ? CLUSTER : 2) /* of a block in the first one's list, often */
};

typedef struct candidates {
    u64 ranks[STREAM_ROOM]; /* rank_of() tokens, in any order */
    u64 most[WARPS], least[WARPS];
    u32 count;           /* may exceed the room: then the last are missing */
    u32 counts[CLUSTER]; /* in the first block: of all blocks */
} candidates;

/* The order of sampling.h: larger is earlier. */
QI_INLINE u64 rank_of(float x, u32 token)
{
    return (u64)key_of(x) << 32 | ~token;
}

QI_INLINE u32 token_of(u64 rank)
{
    return ~(u32)rank;
}

QI_INLINE u32 key_in(u64 rank)
{
    return (u32)(rank >> 32);
}

/* The numbers of a block's list: what is enough once it is cut, and when it is. */
QI_INLINE u32 enough_for(u32 k)
{
    return min(k + k / 8, (u32)MOST_K);
}

QI_INLINE u32 limit_for(u32 k)
{
    return min(4 * k + 128, (u32)(MOST_K + MOST_K / 2));
}

/* What at least k of n > k different ranks reach, and, unless it takes too few of them away, at most `enough`. */
QI_INLINE u64 find_bound(candidates *c, u32 n, u32 k, u32 enough)
{
    const u32 t = threadIdx.x, lane = t % WARP;
    u64 most = 0, least = 0; /* the least as its complement */
#pragma unroll 1
    for (u32 i = t; i < n; i += THREADS) {
        const u64 rank = c->ranks[i];
        most = max(most, rank), least = max(least, ~rank);
    }
    most = warp_max_u64(most), least = warp_max_u64(least);
    if (lane == 0) c->most[t / WARP] = most, c->least[t / WARP] = least;
    __syncthreads();
    u64 high = warp_max_u64(lane < WARPS ? c->most[lane] : 0) + 1; /* fewer than k reach it */
    u64 low = ~warp_max_u64(lane < WARPS ? c->least[lane] : 0);
    for (u32 count = n; count > enough && high - low > 1;) {
        const u64 middle = low + (high - low) / 2;
        u32 reach = 0;
#pragma unroll 1
        for (u32 first = 0; first < n; first += THREADS)
            reach += (u32)__syncthreads_count(first + t < n && c->ranks[first + t] >= middle);
        if (reach >= k)
            low = middle, count = reach;
        else
            high = middle;
    }
    return low;
}

/* Cuts a list of n down to tokens below `end` that reach a bound. All have read its count, and met. */
QI_INLINE void cut_list(candidates *c, u32 n, u64 bound, u32 end)
{
    if (threadIdx.x == 0) c->count = 0;
#pragma unroll 1
    for (u32 first = 0; first < n; first += THREADS) {
        const u32 i = first + threadIdx.x;
        const u64 rank = i < n ? c->ranks[i] : 0;
        __syncthreads();
        if (rank >= bound && token_of(rank) < end) c->ranks[atomicAdd(&c->count, 1u)] = rank;
    }
    __syncthreads();
}

/* The list cut to what is enough for k; how many are left. Called once or twice a row: its text is there once. */
static __device__ __noinline__ u32 cut_to(candidates *c, u32 n, u32 k)
{
    cut_list(c, n, find_bound(c, n, k, enough_for(k)), ~0u);
    return c->count;
}

/* A bound for the first tile: k of its pieces' largest values reach it, so k tokens do. */
QI_INLINE u64 first_bound(candidates *c, const float *most, u32 k, u64 low)
{
    const int few = k <= THREADS / 2; /* then a value of each thread is enough */
    const u32 n = few ? THREADS : GROUPS * THREADS;
    float groups[GROUPS];
    for (int i = 0; i < GROUPS; i++) groups[i] = NO_LOGIT;
    for (int u = 0; u < TIMES; u++) groups[u % GROUPS] = fmaxf(groups[u % GROUPS], most[u]);
    for (int i = 1; i < GROUPS && few; i++) groups[0] = fmaxf(groups[0], groups[i]);
    for (int i = 0; i < GROUPS; i++) {
        const u32 place = (u32)i * THREADS + threadIdx.x;
        if (place < n) c->ranks[place] = rank_of(groups[i], place);
    }
    __syncthreads();
    const u64 bound = k < n ? find_bound(c, n, k, enough_for(k)) >> 32 << 32 : low;
    __syncthreads();
    return bound > low ? bound : low;
}

/* Appends the tokens of a piece that reach the bound. Returns where the last of them is put, from 1 on; 0 without any. */
QI_INLINE u32 append(candidates *c, const source *row, u32 i, u32 token, u64 bound)
{
    float x[VEC];
    u32 end = 0;
    load_values(row, i, x);
    for (int e = 0; e < VEC; e++) {
        const u64 rank = rank_of(x[e], token + (u32)e);
        if (rank < bound) continue;
        const u32 to = atomicAdd(&c->count, 1u);
        if (to < STREAM_ROOM) c->ranks[to] = rank;
        end = to + 1;
    }
    return end;
}

/* This block's list: of its part of the row the k first tokens that reach `low`, k <= MOST_K, and some more. Returns
 * how many. */
QI_INLINE u32 stream(const source *row, const place *at, candidates *c, u32 vocab, u32 k, u64 low,
                     int *bad)
{
    const u32 pieces = (vocab + WARP * VEC - 1) / (WARP * VEC), limit = limit_for(k);
    u32 words[TIMES][qi_words(DTYPE, VEC)];
    u64 bound = low;
    if (threadIdx.x == 0) c->count = 0; /* before first_bound()'s barriers */
#pragma unroll
    for (int u = 0; u < TIMES; u++) load_words(row, at->warp + u * ALL_WARPS, words[u]);
#pragma unroll 1
    for (u32 begin = 0; begin < pieces; begin += TILE) {
        const u32 first = begin + at->warp, token = (first * WARP + at->lane) * VEC;
        float most[TIMES];
#pragma unroll
        for (int u = 0; u < TIMES; u++)
            most[u] = largest_value(row, first + u * ALL_WARPS, words[u], bad);
#pragma unroll
        for (int u = 0; u < TIMES; u++) load_words(row, first + TILE + u * ALL_WARPS, words[u]);
        if (begin == 0) bound = first_bound(c, most, k, low);
        /* Behind a tile, a token equal to one whose rank is the bound is not as early. */
        u32 key = key_in(bound) + (begin > 0 && bound > low);
        for (;;) {
            const float least = value_of(key);
            u32 hits = 0, end = 0;
#pragma unroll
            for (int u = 0; u < TIMES; u++) {
                const int there = token + u * (ALL_WARPS * WARP * VEC) < vocab;
                hits |= (u32)(there && most[u] >= least) << u;
            }
            for (; hits; hits &= hits - 1) {
                const u32 u = (u32)__ffs((int)hits) - 1;
                end = max(end, append(c, row, first + u * ALL_WARPS,
                                      token + u * (ALL_WARPS * WARP * VEC), bound));
            }
            if (!__syncthreads_or(end > limit)) break;
            const u32 n = c->count;
            const int missing = n > STREAM_ROOM; /* then this tile again, with a better bound */
            bound = find_bound(c, min(n, (u32)STREAM_ROOM), k, enough_for(k));
            cut_list(c, min(n, (u32)STREAM_ROOM), bound, missing ? begin * (WARP * VEC) : ~0u);
            if (!missing) break;
            key = key_in(bound);
        }
    }
    return c->count;
}

/* Brings the lists of all blocks, which arrived at a barrier when they began, into the first one's. Returns there how many
 * it has, up to MOST_K, the k first of the row among them. Then the other blocks wait for the first one, and it for
 * them, before the lists go: wait_for_lists(). */
QI_INLINE u32 collect(const place *at, candidates *c, u32 n, u32 k)
{
    if (n > k && n > SHARE) n = cut_to(c, n, k);
#if CLUSTER > 1
    cluster_wait();
    if (threadIdx.x == 0) *(u32 *)at_block(&c->counts[at->rank], 0) = n;
    sync_row();
    for (u32 first = 1; at->rank == 0 && first < CLUSTER;) {
        u32 end = first, all = n;
        while (end < CLUSTER && all + c->counts[end] <= STREAM_ROOM) all += c->counts[end++];
        for (u32 i = n + threadIdx.x; i < all; i += THREADS) {
            u32 rank = first, place = i - n;
            while (place >= c->counts[rank]) place -= c->counts[rank++];
            c->ranks[i] = ((const u64 *)at_block(c->ranks, rank))[place];
        }
        __syncthreads();
        n = all, first = end;
        if (first < CLUSTER) n = cut_to(c, n, k);
    }
    cluster_arrive();
    if (at->rank != 0) return 0;
#endif
    return n > enough_for(k) ? cut_to(c, n, k) : n;
}

QI_INLINE void wait_for_lists()
{
#if CLUSTER > 1
    cluster_wait();
#endif
}

#endif
