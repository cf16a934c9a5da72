/* rope.cu - rotary embedding of q and k: a block a token. Its threads fetch their first pieces, compute the
 * angles between them while those are on their way, then rotate.
 *
 * JIT constants: DTYPE; VEC, elements of an access (2 at least where pairs are interleaved); LAYOUT of
 * pairs; THREADS.
 * Bound: HBM, 2 x head_dim x size bytes a head. A thread has TIMES pieces of up to 32 bytes under way.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/rope.cuh"
#include "ops/rope/rope_params.h"

enum { TIMES = 2, WORDS = 2 * qi_words(DTYPE, VEC) };

typedef struct piece {
    u32 words[WORDS];
    char *out; /* of its head; null: there is no such piece */
    rope_place at;
} piece;

/* Piece i of a token, if it has so many: q's heads stand before k's. */
QI_INLINE void fetch(const rope_params *p, i64 token, int i, int total, int pieces, piece *x)
{
    x->out = nullptr;
    if (i >= total) return;
    const int head = i / pieces, of_k = head >= p->q.heads;
    const rope_tensor *t = of_k ? &p->k : &p->q;
    const i64 h = of_k ? head - p->q.heads : head;
    x->at = rope_place_of(i - head * pieces, (int)p->head_dim, p->rope.num_pairs, LAYOUT, VEC);
    x->out = qi_to(t->out, DTYPE, token * t->out_stride[0] + h * t->out_stride[1]);
    rope_fetch(x->words, qi_at(t->in, DTYPE, token * t->in_stride[0] + h * t->in_stride[1]), DTYPE,
               x->at, VEC);
}

/* The token's position; 0 where it is past the last request's rows. */
QI_INLINE int find_position(const rope_params *p, i64 token, i64 *position)
{
    if (p->positions) {
        *position = p->positions[token];
        return 1;
    }
    const int request = find_request(p->indptr, (int)p->num_requests, token);
    if (request < 0) return 0;
    *position = p->offsets[request] + token - p->indptr[request];
    return 1;
}

QI_KERNEL(rope, rope_params)
{
    extern __shared__ float2 angles[]; /* [num_pairs] */
    const i64 token = blockIdx.x;
    const int pieces = rope_pieces((int)p.head_dim, p.rope.num_pairs, LAYOUT, VEC);
    const int total = (int)(p.q.heads + p.k.heads) * pieces;
    piece x[TIMES];
    i64 position;
    griddepcontrol_wait();
#pragma unroll
    for (int n = 0; n < TIMES; n++)
        fetch(&p, token, n * THREADS + (int)threadIdx.x, total, pieces, &x[n]);
    if (!find_position(&p, token, &position)) return;
    rope_angles(&p.rope, position, angles);
    __syncthreads();
    for (int i = (int)threadIdx.x; i < total; i += TIMES * THREADS)
#pragma unroll
        for (int n = 0; n < TIMES; n++) {
            if (x[n].out)
                rope_put(x[n].out, DTYPE, x[n].words, DTYPE, x[n].at, p.rope.num_pairs, angles, 1.f,
                         LAYOUT, VEC);
            fetch(&p, token, i + (TIMES + n) * THREADS, total, pieces, &x[n]);
        }
}
