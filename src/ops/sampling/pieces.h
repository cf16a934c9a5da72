/* pieces.h - the launch of a kernel over pieces.cuh: how many blocks share a row, and whether their shared memory
 * holds it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_PIECES_H
#define QI_SAMPLING_PIECES_H

#include "core/launch.h"

enum { QI_PIECES_THREADS = 512 };

/* Blocks that share a row of vocab elements, of which an access has vec. */
static inline i32 qi_pieces_cluster(const qkv_context *ctx, i64 vocab, i32 vec)
{
    enum { MAX_CLUSTER = 8 };
    const i32 most = ctx->cuda.major >= 9 ? MAX_CLUSTER : 1;
    i32 cluster = 1;
    while (cluster < most && vocab > 2 * cluster * QI_PIECES_THREADS * vec) cluster *= 2;
    return cluster;
}

/* Rows are row_stride apart. The row's constants are DTYPE VEC THREADS CLUSTER RESIDENT. */
static inline qkv_status qi_launch_pieces(const qkv_context *ctx, const qi_kernel *row,
                                          const void *rows, i64 batch, i64 vocab, i64 row_stride,
                                          qi_dtype dtype, const void *params, void *stream)
{
    enum { MOST_BYTES = 96 * 1024, OTHER_BYTES = 40 * 1024 };
    const i32 bytes = (i32)qi_dtype_bytes(dtype);
    const i32 vec = QI_VECTOR(16 / bytes, vocab, row_stride, QI_ADDRESS(rows, dtype));
    const i32 cluster = qi_pieces_cluster(ctx, vocab, vec);
    const i64 step = cluster * QI_PIECES_THREADS * vec;
    const i64 room = (vocab + step - 1) / step * QI_PIECES_THREADS * vec * bytes;
    const i32 resident = room <= MOST_BYTES && room <= ctx->cuda.shared_bytes - OTHER_BYTES;
    const i32 constants[] = {(i32)dtype, vec, QI_PIECES_THREADS, cluster, resident};
    const qi_grid grid = {.x = (u32)(batch * cluster),
                          .threads = QI_PIECES_THREADS,
                          .shared_bytes = resident ? (u32)room : 0,
                          .cluster = (u32)cluster,
                          .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, params, stream);
}

#endif
