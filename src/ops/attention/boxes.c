/* boxes.c - see boxes.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/boxes.h"

#include "base/dtype.h"

enum { ROW_BYTES = 128, MAX_TOKENS = INT32_MAX };

i32 qi_box_keys(i32 page_size, i32 tile)
{
    i32 a = page_size, b = tile;
    if (page_size == 0) return tile;
    while (b > 0) {
        const i32 rest = a % b;
        a = b;
        b = rest;
    }
    return a % 8 == 0 ? a : 0;
}

int qi_box_fits(const void *base, const i64 *strides, int n, i32 bytes)
{
    u64 bits = (u64)(uintptr_t)base;
    for (int i = 0; i < n; i++) {
        if (strides[i] <= 0 || strides[i] >= (i64)1 << 38) return 0;
        bits |= (u64)strides[i] * (u64)bytes;
    }
    return (bits & 15) == 0;
}

int qi_box_keys_fit(const attention_params *p)
{
    const int ragged = p->page_size == 0; /* there is no stride of pages then */
    const i32 bytes = (i32)qi_dtype_bytes((qi_dtype)p->dtype_kv);
    return p->kv_extent > 0 && p->kv_extent <= MAX_TOKENS &&
           qi_box_fits(p->k, p->k_stride + ragged, 3 - ragged, bytes) &&
           qi_box_fits(p->v, p->v_stride + ragged, 3 - ragged, bytes);
}

static qi_box_tensor box_of(const attention_params *p, const void *base, const i64 *stride, i32 dim,
                            i32 piece, qi_tensor_map *map)
{
    const int paged = p->page_size > 0;
    const u32 bytes = (u32)qi_dtype_bytes((qi_dtype)p->dtype_kv);
    const u64 token = (u64)stride[1] * bytes, page = paged ? (u64)stride[0] * bytes : token;
    return (qi_box_tensor){
        .base = (void *)(uintptr_t)base,
        .sizes = {(u64)dim, (u64)(paged ? p->page_size : p->kv_extent), (u64)p->num_kv_heads,
                  (u64)(paged ? p->kv_extent : 1)},
        .strides = {token, (u64)stride[2] * bytes, page},
        .box = {ROW_BYTES / bytes, (u32)piece, 1, 1},
        .axes = 4,
        .element_bytes = bytes,
        .map = map,
    };
}

qi_box_tensor qi_box_of_keys(const attention_params *p, i32 piece, qi_tensor_map *map)
{
    return box_of(p, p->k, p->k_stride, p->head_dim_qk, piece, map);
}

qi_box_tensor qi_box_of_values(const attention_params *p, i32 piece, qi_tensor_map *map)
{
    return box_of(p, p->v, p->v_stride, p->head_dim_vo, piece, map);
}

qi_box_tensor qi_box_of_whole_rows(qi_box_tensor keys)
{
    const u64 width = keys.box[0], chunks = keys.sizes[0] / width;
    return (qi_box_tensor){
        .base = keys.base,
        .sizes = {width, keys.sizes[1], chunks, keys.sizes[2], keys.sizes[3]},
        .strides = {keys.strides[0], ROW_BYTES, keys.strides[1], keys.strides[2]},
        .box = {keys.box[0], keys.box[1], (u32)chunks, 1, 1},
        .axes = 5,
        .element_bytes = keys.element_bytes,
        .map = keys.map,
    };
}
