/* page.h - writing into a paged KV cache.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_PAGE_H
#define QKV_PAGE_H

#include "qkv/attention.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What an append does besides, in the same pass; NULL or zeros: nothing. */
typedef struct qkv_kv_append_options {
    uint32_t struct_size, reserved;
    qkv_scale k_scale, v_scale; /* what is stored is the value divided by its scale */
    const qkv_rope_spec *rope;  /* rotate k, and q, by the row's position before storing it */
    const DLTensor
        *q;          /* with rope: [nnz, num_qo_heads, head_dim] f32|f16|bf16; NULL = no queries */
    DLTensor *q_out; /* the same shape, f32|f16|bf16|e4m3|e5m2; may be q itself */
    qkv_scale q_scale;         /* of q_out */
    const DLTensor *positions; /* qkv_kv_append_slots with rope: i32 [nnz] position of each row */
} qkv_kv_append_options;
#define QKV_KV_APPEND_OPTIONS_INIT .struct_size = sizeof(qkv_kv_append_options)

/*
 * qkv_kv_append - scatter new keys and values into the pages of their requests.
 *
 *   k_cache, v_cache  [pages, page_size, num_kv_heads, head_dim] by kv_layout, f32|f16|bf16|e4m3|
 *                     e5m2|i8, any outer strides that give each element its own place; v_cache
 *                     NULL: k_cache is [pages, 2, ...] and holds both. page_size is at most 2^24.
 *                     Nothing that is read may lie in what is written
 *   kv_layout         QKV_NHD or QKV_HND
 *   k, v              [nnz, num_kv_heads, head_dim] f32|f16|bf16, rounded to nearest in the cache's
 *                     dtype (8-bit types saturate: 448, 57344, 127); head_dim of k and v may differ
 *                     as those of the caches do
 *   index             qo_indptr says which rows belong to which request, and a paged CSR or a block
 *                     table (which already counts the new tokens) where its pages are
 *   positions         i32 [nnz] position in its request of each row; NULL = the last qo_len
 *                     positions of each request
 *   options           NULL, or scales, and RoPE of k and q on the way
 *
 * Rows from qo_indptr[last] on are ignored. Two rows for one slot: which one stays is not defined.
 * Errors: INVALID (shapes, dtypes, an index out of range: names array, request and entry).
 */
QKV_API qkv_status qkv_kv_append(qkv_context *ctx, DLTensor *k_cache, DLTensor *v_cache,
                                 int32_t kv_layout, const DLTensor *k, const DLTensor *v,
                                 const qkv_kv_index *index, const DLTensor *positions,
                                 const qkv_kv_append_options *options, void *stream);

/*
 * qkv_kv_append_slots - the same by slot numbers.
 *
 *   slot_mapping  i32|i64 [nnz]: page * page_size + slot of each row; negative = skip the row (but
 *                 its query is still rotated)
 *
 * Errors: INVALID (shapes, dtypes, a slot beyond the pool: names the row).
 */
QKV_API qkv_status qkv_kv_append_slots(qkv_context *ctx, DLTensor *k_cache, DLTensor *v_cache,
                                       int32_t kv_layout, const DLTensor *k, const DLTensor *v,
                                       const DLTensor *slot_mapping,
                                       const qkv_kv_append_options *options, void *stream);

/*
 * qkv_kv_copy_pages - copy whole pages within the pool: k_cache[dst[i]] = k_cache[src[i]], v too.
 *
 *   k_cache, v_cache  [pages, ...] 4-D, or combined 5-D, of any dtype; v_cache may be NULL
 *   src, dst          i32 [n] page numbers; no page is both, and none twice in dst (INVALID)
 *
 * Errors: INVALID.
 */
QKV_API qkv_status qkv_kv_copy_pages(qkv_context *ctx, DLTensor *k_cache, DLTensor *v_cache,
                                     const DLTensor *src, const DLTensor *dst, void *stream);

#ifdef __cplusplus
}
#endif
#endif
