/* pieces.cuh - a row of logits as the threads of its blocks have it, for kernels that look at a row and do not
 * change it. Pieces of VEC elements go round all threads of the row: what is special about a part of the
 * vocabulary is every thread's alike.
 *
 * A RESIDENT row is read once, and stays in shared memory as it is; one too long for that is read again for each
 * pass.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_PIECES_CUH
#define QI_SAMPLING_PIECES_CUH

#include "ops/sampling/exchange.cuh"

enum {
    STEP = CLUSTER * THREADS * VEC, /* elements from a thread's piece to its next */
    UNROLL = VEC > 4 ? 2 : 4
};

typedef struct pieces {
    const char *row;
    char *room; /* this thread's first piece in shared memory; the next is THREADS pieces on */
    u32 vocab, first; /* elements; this thread's first one */
    int clean; /* this thread's elements are clean as they are, and this is the largest of them: */
    float largest;
} pieces;

/* The first token of each piece that this thread has. */
#define FOR_EACH_PIECE(r, token)                                                                   \
    _Pragma("unroll UNROLL") for (u32 token = (r)->first; token < (r)->vocab; token += STEP)

/* n elements, as clean_logit() makes them. */
QI_INLINE void load_clean(float *x, const char *from, const int n)
{
    qi_load(x, from, DTYPE, n);
    for (int e = 0; e < n; e++) x[e] = clean_logit(x[e]);
}

QI_INLINE char *room_at(const pieces *r, u32 token)
{
    return qi_to(r->room, DTYPE, (token - r->first) / CLUSTER);
}

/* A piece's elements, clean. */
QI_INLINE void piece(const pieces *r, u32 token, float *x)
{
    qi_load(x, RESIDENT ? room_at(r, token) : qi_at(r->row, DTYPE, token), DTYPE, VEC);
    if (!r->clean)
        for (int e = 0; e < VEC; e++) x[e] = clean_logit(x[e]);
}

/* Where this thread stands. Other blocks have begun once it has waited for them, which is after the row's loads
 * are under way: then they may be sent something. */
QI_INLINE void open_place(place *at, mailbox *box)
{
#if CLUSTER > 1
    const u32 rank = cluster_rank();
    if (threadIdx.x == 0) open_mailbox(box);
    cluster_arrive_relaxed();
#else
    const u32 rank = 0;
#endif
    *at = {box, rank, rank * WARPS + threadIdx.x / WARP, threadIdx.x % WARP, 0};
}

QI_INLINE void wait_for_row()
{
#if CLUSTER > 1
    cluster_wait();
#endif
}

/* The block's dynamic shared memory has room for its pieces. */
QI_INLINE void open_pieces(pieces *r, const place *at, const char *row, i64 vocab)
{
    extern __shared__ uint4 room[];
    r->row = row;
    r->room = qi_to(room, DTYPE, threadIdx.x * VEC);
    r->vocab = (u32)vocab;
    r->first = (at->warp * WARP + at->lane) * VEC;
    float largest = NO_LOGIT; /* NaN or +inf: there is one */
#pragma unroll 8
    for (u32 token = RESIDENT ? r->first : r->vocab; token < r->vocab; token += STEP) {
        u32 words[qi_words(DTYPE, VEC)];
        qi_load_words(words, qi_at(row, DTYPE, token), DTYPE, VEC);
        qi_store_words(room_at(r, token), words, DTYPE, VEC);
        for (int e = 0; e < VEC; e++) largest = max_nan(largest, qi_unpack(words, DTYPE, e));
    }
    r->clean = RESIDENT && largest <= LARGEST;
    r->largest = largest;
}

/* The largest of a thread's elements, -inf where it has none. */
QI_INLINE float largest_of(const pieces *r)
{
    float most = NO_LOGIT;
    if (r->clean) return r->largest;
    FOR_EACH_PIECE(r, token)
    {
        float x[VEC];
        piece(r, token, x);
        for (int e = 0; e < VEC; e++) most = fmaxf(most, x[e]);
    }
    return most;
}

QI_INLINE float clean_element(const char *row, i32 token)
{
    float x;
    load_clean(&x, qi_at(row, DTYPE, token), 1);
    return x;
}

#endif
