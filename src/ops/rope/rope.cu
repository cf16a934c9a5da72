/* rope.cu - rotary embedding of q and k: a block a token computes the angles once, then its threads rotate
 * the pieces of all heads.
 *
 * JIT constants: DTYPE; VEC, elements of an access (2 at least where pairs are interleaved); LAYOUT of
 * pairs; THREADS.
 * Bound: HBM, 2 x head_dim x size bytes a head.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/rope.cuh"
#include "ops/rope/rope_params.h"

QI_INLINE void rotate_heads(const rope_params *p, const rope_tensor *x, const float2 *angles,
                            i64 token)
{
    const int pieces = rope_pieces((int)p->head_dim, p->rope.num_pairs, LAYOUT, VEC);
    for (int i = (int)threadIdx.x; i < x->heads * pieces; i += THREADS) {
        const int head = i / pieces, piece = i % pieces;
        rope_piece(qi_to(x->out, DTYPE, token * x->out_stride[0] + head * x->out_stride[1]), DTYPE,
                   qi_at(x->in, DTYPE, token * x->in_stride[0] + head * x->in_stride[1]), DTYPE,
                   (int)p->head_dim, piece, p->rope.num_pairs, angles, 1.f, LAYOUT, VEC);
    }
}

QI_KERNEL(rope, rope_params)
{
    extern __shared__ float2 angles[]; /* [num_pairs] */
    const i64 token = blockIdx.x;
    i64 position;
    if (p.positions) {
        position = p.positions[token];
    } else {
        const int request = find_request(p.indptr, (int)p.num_requests, token);
        if (request < 0) return; /* past the last one's rows */
        position = p.offsets[request] + token - p.indptr[request];
    }
    rope_angles(&p.rope, position, angles);
    __syncthreads();
    rotate_heads(&p, &p.q, angles, token);
    if (p.k.in) rotate_heads(&p, &p.k, angles, token);
}
