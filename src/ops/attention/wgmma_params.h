/* wgmma_params.h - what run hands to attention_wgmma.cu, and that kernel's shared memory, which host and device
 * must agree on.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_WGMMA_PARAMS_H
#define QI_ATTENTION_WGMMA_PARAMS_H

#include "kern/tensor_map.h"
#include "ops/attention/attention_params.h"

/* Tensors as the copy engine sees them, in boxes 128 bytes wide. */
typedef struct wgmma_params {
    qi_tensor_map q; /* [tokens, kv heads, group, head_dim_qk]: a tile's rows */
    qi_tensor_map o; /* [tokens, kv heads, group, head_dim_vo]: 16 rows, a warp's */
    qi_tensor_map k; /* [pages, heads, tokens of a page, head_dim_qk]: PIECE tokens */
    qi_tensor_map v; /* the same, head_dim_vo */
    i32 q_by_tma, kv_by_tma, o_by_tma; /* 0: not as the copy engine takes it */
    attention_cuda_params c;
} wgmma_params;
_Static_assert(sizeof(wgmma_params) <= 4096, "a kernel's parameters");

/* Shared memory: queries, the rings of keys and of values, all in rows of 128 bytes, 64 dims or of 8 bits 128; of 8 bits
 * also values as rows of keys; then notes. bytes: of an element. */
#define WGMMA_CHUNKS(dim, bytes)                                                                   \
    (((dim) * (bytes) + 127) / 128) /* such rows that a head's row has */
#define WGMMA_TILE_BYTES(rows, dim, bytes) ((rows)*128 * WGMMA_CHUNKS(dim, bytes))
#define WGMMA_COLUMNS(vo)                  (((vo) + 63) / 64 * 64)
#define WGMMA_TURNED_BYTES(vo, keys, bytes)                                                        \
    ((bytes) == 1 ? WGMMA_TILE_BYTES(WGMMA_COLUMNS(vo), keys, 1) : 0)
#define WGMMA_NOTES                  4 /* items that are noted at a time */
#define WGMMA_ROWS_BYTES(warpgroups) (64 * (warpgroups)*PREFILL_ROW_BYTES)
#define WGMMA_BARRIERS_BYTES         384
#define WGMMA_RINGS_AT(qk, bytes, warpgroups, buffers)                                             \
    ((buffers)*WGMMA_TILE_BYTES(64 * (warpgroups), qk, bytes))
#define WGMMA_NOTES_AT(qk, vo, bytes, keys, warpgroups, stages, buffers)                           \
    (WGMMA_RINGS_AT(qk, bytes, warpgroups, buffers) +                                              \
     (stages) * (WGMMA_TILE_BYTES(keys, qk, bytes) + WGMMA_TILE_BYTES(keys, vo, bytes) +           \
                 WGMMA_TURNED_BYTES(vo, keys, bytes)))
#define WGMMA_SHARED_BYTES(qk, vo, bytes, keys, warpgroups, stages, buffers)                       \
    (WGMMA_NOTES_AT(qk, vo, bytes, keys, warpgroups, stages, buffers) +                            \
     WGMMA_NOTES * PREFILL_ITEM_BYTES + (buffers)*WGMMA_ROWS_BYTES(warpgroups) +                   \
     WGMMA_BARRIERS_BYTES)

#endif
