/* wgmma.c - see wgmma.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/wgmma.h"

#include <string.h>

#include "ops/attention/boxes.h"
#include "ops/attention/wgmma_params.h"

static i32 shared_bytes(const qkv_attention_spec *s, const attention_wgmma *w)
{
    return WGMMA_SHARED_BYTES(s->head_dim_qk, s->head_dim_vo, w->fp8 ? 1 : 2, w->keys,
                              w->warpgroups, w->stages, w->buffers);
}

/* Is the kernel, too, to be the same whatever the limits? */
static int is_invariant(const qkv_attention *a)
{
    return (a->spec.flags & QKV_ATTENTION_BATCH_INVARIANT) != 0;
}

/* Can the products take q, k and v as they are, all of e4m3, and weights as e4m3, too? Those of a softmax are from 0 to
 * 1; what a variant makes of q or of weights may need more bits. */
static int multiplies_e4m3(const qkv_attention *a)
{
    const qkv_attention_spec *s = &a->spec;
    return qi_dtype_of(s->dtype_q) == QI_E4M3 && qi_dtype_of(s->dtype_kv) == QI_E4M3 &&
           !a->variant.changes_queries && !a->variant.no_softmax;
}

/* Tiles of 64 rows a warpgroup, and as many keys as registers hold beside o; three warpgroups where head dims are small,
 * so that others compute while one is at its softmax. Two warps for each ring where rows come one by one, 32 a lane at a
 * time, or are widened, unless o takes the registers of a fourth warpgroup. Products of e4m3 have a second loading
 * warpgroup, most of which transposes values; their keys come in whole 32. Then as many stages as fit, after room to
 * load the next tile's queries. Measured in docs/performance.md. */
void qi_attention_wgmma_configure(qkv_attention *a)
{
    enum { MAX_STAGES = 4 };
    const qkv_attention_spec *s = &a->spec;
    attention_wgmma *w = &a->wgmma;
    const int fp8 = multiplies_e4m3(a), is_wide = s->head_dim_vo > 128;
    const i32 room = a->ctx->cuda.shared_bytes, most = is_wide ? 64 : 128;
    const u64 bytes = qi_dtype_bytes((qi_dtype)qi_dtype_of(s->dtype_kv));
    const int general =
        s->variant || s->mask == QKV_MASK_CUSTOM || (s->features & QKV_FEATURE_ALIBI) != 0;
    *w = (attention_wgmma){.warpgroups = 2,
                           .keys = most,
                           .buffers = 2,
                           .stages = 2,
                           .loading = fp8 ? 2 : 1,
                           .fp8 = fp8,
                           .piece = bytes == 2 || fp8 ? qi_box_keys(s->page_size, most) : 0};
    if (w->piece == 0) w->loading = is_wide && !fp8 ? 1 : 2;
    if (s->head_dim_qk <= 64 && s->head_dim_vo <= 64 && !general && w->piece > 0 && !fp8) {
        w->warpgroups = 3; /* others take more registers */
        w->keys = 96;
        w->piece = qi_box_keys(s->page_size, w->keys);
    }
    if (shared_bytes(s, w) > room) w->buffers = 1;
    while (w->stages < MAX_STAGES) {
        w->stages++;
        if (shared_bytes(s, w) <= room) continue;
        w->stages--;
        break;
    }
    w->shared_bytes = shared_bytes(s, w);
}

const char *qi_attention_reject_wgmma(const qkv_attention *a)
{
    const qkv_attention_spec *s = &a->spec;
    const qi_dtype q = (qi_dtype)qi_dtype_of(s->dtype_q), kv = (qi_dtype)qi_dtype_of(s->dtype_kv);
    if (a->ctx->cuda.major != 9) return "the device is not of the Hopper generation";
    if (qi_dtype_bytes(kv) == 1 && is_invariant(a))
        return "it is batch-invariant, and attention.mma decodes 8-bit keys faster";
    if (!a->cuda.prefill && a->cuda.decode_rows <= (qi_dtype_bytes(kv) == 1 ? 16 : 8) &&
        !is_invariant(a))
        return "no tile has more than 8 rows, or 16 of 8-bit keys, which attention.mma decodes "
               "faster";
    if (q == QI_F32 || kv == QI_F32) return "f32 is not multiplied by tensor cores";
    if (qi_dtype_bytes(q) == 2 && qi_dtype_bytes(kv) == 2 && q != kv)
        return "q and k are of different 16-bit types";
    if (s->head_dim_qk > 256 || s->head_dim_vo > 256) return "a head dim is more than 256";
    if (s->num_qo_heads / s->num_kv_heads > 64 * a->wgmma.warpgroups)
        return "a token's query heads of a KV head are more than a tile's rows";
    if (s->features & QKV_FEATURE_ROPE) return "keys are rotated in the kernel";
    if (a->variant.changes_keys) return "the variant changes keys";
    if (a->limits.max_row_blocks > 0) return "keys are listed in blocks";
    if (a->wgmma.shared_bytes > a->ctx->cuda.shared_bytes)
        return "a block has too little shared memory on this device";
    return NULL;
}

void qi_attention_wgmma_constants(const qkv_attention *a, i32 out[QI_WGMMA_CONSTANTS])
{
    const attention_wgmma *w = &a->wgmma;
    const i32 own[] = {
        w->keys,    WGMMA_COLUMNS(a->spec.head_dim_vo), w->piece, w->warpgroups, w->stages,
        w->buffers, qi_attention_wgmma_threads(w),      w->fp8,
    };
    _Static_assert(QI_SPEC_CONSTANTS + sizeof own / sizeof *own == QI_WGMMA_CONSTANTS,
                   "the row's names");
    qi_attention_spec_constants(a, out);
    memcpy(out + QI_SPEC_CONSTANTS, own, sizeof own);
}

/* ---- run ---------------------------------------------------------------------------------- */

/* Rows of queries or outputs, `rows` of a tile in a box: tokens times a KV head's query heads. */
static qi_box_tensor map_rows(const attention_params *p, const void *base, const i64 *stride,
                              i32 dim, u32 bytes, i32 rows, qi_tensor_map *map)
{
    const i64 group = p->num_qo_heads / p->num_kv_heads, head = stride[1] * bytes;
    return (qi_box_tensor){
        .base = (void *)(uintptr_t)base,
        .sizes = {(u64)dim, (u64)group, (u64)p->num_kv_heads, (u64)p->q_rows},
        .strides = {(u64)head, (u64)(head * group), (u64)stride[0] * bytes},
        .box = {128 / bytes, (u32)group, 1, (u32)(rows / group)},
        .axes = 4,
        .element_bytes = bytes,
        .map = map,
    };
}

qkv_status qi_attention_wgmma_run(const qkv_attention *a, const attention_cuda_params *c,
                                  void *stream)
{
    const attention_params *p = &c->at;
    enum { ROWS_OF_WARP = 16 };
    const i32 group = p->num_qo_heads / p->num_kv_heads;
    wgmma_params w = {.c = *c};
    const qi_dtype product = a->wgmma.fp8 ? QI_E4M3 : p->dtype_kv == QI_BF16 ? QI_BF16 : QI_F16;
    const u32 bytes = (u32)qi_dtype_bytes(product);
    w.q_by_tma = p->dtype_q == product && qi_box_fits(p->q, p->q_stride, 2, (i32)bytes);
    w.kv_by_tma = a->wgmma.piece > 0 && qi_box_keys_fit(p);
    w.o_by_tma = qi_dtype_bytes((qi_dtype)p->dtype_o) == 2 && ROWS_OF_WARP % group == 0 &&
                 qi_box_fits(p->o, p->o_stride, 2, 2);
    qi_box_tensor boxes[4];
    i32 count = 0;
    if (w.q_by_tma)
        boxes[count++] =
            map_rows(p, p->q, p->q_stride, p->head_dim_qk, bytes, 64 * a->wgmma.warpgroups, &w.q);
    if (w.o_by_tma)
        boxes[count++] = map_rows(p, p->o, p->o_stride, p->head_dim_vo, 2, ROWS_OF_WARP, &w.o);
    if (w.kv_by_tma) {
        boxes[count++] = qi_box_of_keys(p, a->wgmma.piece, &w.k);
        boxes[count++] = qi_box_of_values(p, a->wgmma.piece, &w.v);
    }
    if (count > 0) QI_TRY(qi_cuda_tensor_maps(&a->ctx->cuda, boxes, count));
    const qi_grid grid = {.x = (u32)a->limits.max_workers,
                          .threads = (u32)qi_attention_wgmma_threads(&a->wgmma),
                          .shared_bytes = (u32)a->wgmma.shared_bytes,
                          .overlaps_before = 1};
    return qi_cuda_launch(&a->ctx->cuda, a->cuda.functions[0], &grid, &w, stream);
}
