/* mma_types.cuh - what the tensor core kernels of attention share: the type that they multiply, rows of q in
 * it, and rows that cp.async cannot load.
 *
 * Keys of bf16 are multiplied as bf16, keys of f16 and of 8 bits as f16, in which these are exact.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_MMA_TYPES_CUH
#define QI_ATTENTION_MMA_TYPES_CUH

#include "ops/attention/rows.cuh"

enum {
    KV_BYTES = DTYPE_KV == QI_F16 || DTYPE_KV == QI_BF16 ? 2 : 1,
    MMA_TYPE = DTYPE_KV == QI_BF16 ? QI_BF16 : QI_F16,
};

/* Do scores need more than a scale, a soft cap, causal and window? */
#if CUSTOM_MASK || SPARSE || ALIBI || defined(VARIANT_LOGIT) || defined(VARIANT_MASK) ||           \
    defined(VARIANT_NO_SOFTMAX)
enum { GENERAL_SCORES = 1 };
#else
enum { GENERAL_SCORES = 0 };
#endif

QI_INLINE void mma(float d[4], const u32 a[4], u32 b0, u32 b1)
{
    if (MMA_TYPE == QI_BF16)
        mma_m16n8k16_bf16(d, a, b0, b1);
    else
        mma_m16n8k16_f16(d, a, b0, b1);
}

QI_INLINE u32 pack_pair(float x, float y)
{
    return MMA_TYPE == QI_BF16 ? f32_to_bf16x2(x, y) : f32_to_f16x2(x, y);
}

/* The two 8-bit keys in the lower half of `bits` as f16. */
QI_INLINE u32 widen(u32 bits)
{
    if (DTYPE_KV == QI_E4M3) return e4m3x2_to_f16x2(bits);
    if (DTYPE_KV == QI_E5M2) return e5m2x2_to_f16x2(bits);
    return i8x2_to_f16x2(bits);
}

/* ---- before the launch's turn --------------------------------------------------------------- */

enum { LINE = 128 }; /* bytes that a prefetch brings */

/* Where key `key` of a list is, and its value, by a plan that may be about to change; left as they are if that is not
 * known to be in k and v. Page tables that a device plan left with the caller are not looked at. */
QI_INLINE void find_ahead(const attention_params *p, i64 list, int key, int kv_head, const char **k,
                          const char **v)
{
    i64 page = 0, slot = list + key;
    if (PAGE_SIZE > 0) {
        const i64 entry = list + key / (PAGE_SIZE | !PAGE_SIZE);
        if (entry < 0 || entry >= p->max_pages) return;
        page = __ldcg(&p->plan.pages[entry]);
        slot = key % (PAGE_SIZE | !PAGE_SIZE);
    }
    const i64 at = PAGE_SIZE > 0 ? page : slot;
    if (at < 0 || at >= p->kv_extent) return;
    *k = (const char *)p->k +
         (page * p->k_stride[0] + slot * p->k_stride[1] + kv_head * p->k_stride[2]) * KV_BYTES;
    *v = (const char *)p->v +
         (page * p->v_stride[0] + slot * p->v_stride[1] + kv_head * p->v_stride[2]) * KV_BYTES;
}

/* ---- loads -------------------------------------------------------------------------------- */

/* Do all rows of keys and values begin at multiples of 16 bytes? */
QI_INLINE int keys_aligned(const attention_params *p)
{
    i64 all = (i64)p->k | (i64)p->v;
    for (int i = 0; i < 3; i++) all |= (p->k_stride[i] | p->v_stride[i]) * KV_BYTES;
    return (all & 15) == 0;
}

/* 16 bytes to shared memory from any address: the first `bytes`, an element at a time, then zeros. */
QI_INLINE void copy_elements(char *to, const char *from, int bytes)
{
    u32 words[4] = {};
#pragma unroll
    for (int i = 0; i < 16 / KV_BYTES; i++) {
        if (i * KV_BYTES >= bytes) continue;
        const u32 bits = KV_BYTES == 2 ? ((const u16 *)from)[i] : ((const u8 *)from)[i];
        words[i * KV_BYTES / 4] |= bits << i * KV_BYTES % 4 * 8;
    }
    *(uint4 *)to = make_uint4(words[0], words[1], words[2], words[3]);
}

/* Element d of a row of q, as the variant changes it. */
QI_INLINE float load_query(const attention_cuda_params *c, tile_row row, int qo_head, int d)
{
    const attention_params *p = &c->at;
    const i64 at = row.token * p->q_stride[0] + qo_head * p->q_stride[1];
    if (!CHANGES_QUERIES) return qi_load1(qi_at(p->q, DTYPE_Q, at + d), DTYPE_Q);
    qi_pair pair;
    int i = d / 2, second = d % 2;
#ifdef VARIANT_PAIR_HALF
    i = d % (HEAD_DIM_QK / 2), second = d >= HEAD_DIM_QK / 2;
#endif
    pair.x = qi_load1(qi_at(p->q, DTYPE_Q, at + PAIR_FIRST(i, HEAD_DIM_QK)), DTYPE_Q);
    pair.y = qi_load1(qi_at(p->q, DTYPE_Q, at + PAIR_SECOND(i, HEAD_DIM_QK)), DTYPE_Q);
    pair = hook_query(c, hook_pos(p, row, qo_head), PAIR_FIRST(i, HEAD_DIM_QK), pair);
    return second ? pair.y : pair.x;
}

/* Elements d to d + 7 of a row of q in the type of the products; d is a multiple of 8. */
QI_INLINE uint4 load_query_unit(const attention_cuda_params *c, tile_row row, int qo_head, int d)
{
    const attention_params *p = &c->at;
    const char *from =
        qi_at(p->q, DTYPE_Q, row.token * p->q_stride[0] + qo_head * p->q_stride[1] + d);
    if (DTYPE_Q == MMA_TYPE && !CHANGES_QUERIES && ((u64)from & 15) == 0)
        return *(const uint4 *)from;
    u32 pairs[4];
#pragma unroll 1
    for (int i = 0; i < 4; i++)
        pairs[i] = pack_pair(load_query(c, row, qo_head, d + 2 * i),
                             load_query(c, row, qo_head, d + 2 * i + 1));
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

/* What multiplies q.k of a head. */
QI_INLINE float query_scale(const attention_cuda_params *c, int qo_head)
{
    return c->sm_scale * qi_scale_at(&c->q_scale, qo_head) *
           qi_scale_at(&c->k_scale, qo_head / GROUP_SIZE);
}

#endif
