/* stream.h - how many blocks share a row in kernels that stream rows.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_STREAM_H
#define QI_SAMPLING_STREAM_H

#include "core/launch.h"

/* Blocks of `step` elements at a time that share a streamed row: as many as find something to do, and as the GPU runs at
 * once, so many an SM. */
static inline i32 qi_stream_cluster(const qkv_context *ctx, i64 batch, i64 vocab, i64 step,
                                    i32 blocks)
{
    enum { MAX_CLUSTER = 8, TILE = 4 };
    i32 cluster = 1;
    while (ctx->cuda.major >= 9 && cluster < MAX_CLUSTER && vocab > cluster * TILE * step &&
           2 * cluster * batch <= blocks * ctx->cuda.num_sms)
        cluster *= 2;
    return cluster;
}

#endif
