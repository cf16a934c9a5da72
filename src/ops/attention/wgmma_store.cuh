/* wgmma_store.cuh - how rows of the Hopper tile begin and end: a warp's 16 rows, of which a lane has two, from nothing
 * seen to what is stored of them.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_WGMMA_STORE_CUH
#define QI_ATTENTION_WGMMA_STORE_CUH

#include "ops/attention/wgmma_scores.cuh"

/* ---- rows ------------------------------------------------------------------------------------ */

/* The lane's two rows of the warp's, which begin at row_begin of the tile: they have seen nothing. */
QI_INLINE void open_rows(const tile_item *item, int row_begin, two_rows *r, float *o)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        r->m[h] = row_begin + tid_x() % WARP / 4 + 8 * h;
        r->scale[h] =
            GENERAL_SCORES || SOFT_CAP ? 1.f : fabsf(item->rows[r->m[h]].scale) * QI_LOG2E;
        r->max[h] = PREFILL_LOWEST;
        r->sum[h] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < NUM_SUMS; i++) o[i] = 0.f;
}

/* Completes the lane's two rows but for o: norm multiplies their weighted sums of v. The four lanes of a row do the
 * same. */
QI_INLINE void complete_rows_of_lane(const attention_cuda_params *c, const tile_item *item,
                                     two_rows *r, float norm[2])
{
    const qi_work *w = &item->notes->work;
    const int whole = w->slot < 0;
    const float v_scale = whole ? qi_scale_at(&c->v_scale, w->kv_head) : 1.f;
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
        for (int h = 0; h < 2; h++) r->sum[h] += __shfl_xor_sync(ALL_LANES, r->sum[h], step);
    norm[0] = norm[1] = v_scale;
    if (SOFTMAX && whole && (HAS_STATE || c->at.sink))
#pragma unroll
        for (int h = 0; h < 2; h++)
            norm[h] *= add_extra_logits(c, item->rows[r->m[h]].row, prefill_head(w, r->m[h]),
                                        &r->max[h], &r->sum[h]);
#pragma unroll
    for (int h = 0; h < 2; h++) norm[h] *= norm_of(r->sum[h]);
}

/* ---- results -------------------------------------------------------------------------------- */

/* The lse of complete rows or of partial ones, by one lane each. */
QI_INLINE void store_lse_of_lane(const attention_params *p, const tile_item *item,
                                 const two_rows *r)
{
    const qi_work *w = &item->notes->work;
    if (tid_x() % 4 > 0 || (w->slot < 0 && (!SOFTMAX || !p->lse))) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int m = r->m[h];
        if (m >= w->num_rows * GROUP_SIZE) continue;
        if (w->slot < 0)
            store_lse(p, item->rows[m].row, prefill_head(w, m), r->max[h], r->sum[h]);
        else
            p->plan.lse_partial[(i64)w->slot + m] = lse_of(r->max[h], r->sum[h]);
    }
}

/* 16 bytes of a row of 128 in shared memory, where rows of 64 dims stand one beside the other as those of queries: piece
 * i of row `row` of the warp. Exchanged, so that neither rows nor columns meet in a bank. */
QI_INLINE char *staged_piece(char *stage, int row, int i)
{
    return stage + i / 8 * Q_CHUNK_BYTES + row * 128 + ((i % 8) ^ (row % 8)) * 16;
}

#if !defined(VARIANT_OUTPUT) && (DTYPE_O == 1 || DTYPE_O == 2)
enum { PLAIN_OUTPUTS = 1 }; /* 16 bits, and no more to do */
#else
enum { PLAIN_OUTPUTS = 0 };
#endif
_Static_assert(QI_F16 == 1 && QI_BF16 == 2, "as above");

/* Writes the warp's 16 rows of the tile, from row_begin on, by way of shared memory where their queries were: as a box,
 * if all are there. */
QI_INLINE void store_plain_rows(const wgmma_params *params, const tile_item *item, const float *o,
                                const float norm[2], char *stage, int row_begin)
{
    enum { PASS = 64 * QK_CHUNKS < COLUMNS ? 64 * QK_CHUNKS : COLUMNS, PIECES = PASS / 8 };
    const attention_params *p = &params->c.at;
    const qi_work *w = &item->notes->work;
    const int lane = tid_x() % WARP, all = w->num_rows * GROUP_SIZE;
    const int boxed = params->o_by_tma && row_begin + 16 <= all;
    /* in registers of the warp, as the engine takes them */
    const int token = (int)uniform((u32)item->rows[row_begin].row.token);
    const int kv_head = (int)uniform((u32)w->kv_head);
#pragma unroll
    for (int pass = 0; pass < COLUMNS; pass += PASS) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < PIECES && pass / 8 + i < COLUMNS / 8; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float *x = &o[4 * (pass / 8 + i) + 2 * h];
                const float even = x[0] * norm[h], odd = x[1] * norm[h];
                *(u32 *)(staged_piece(stage, lane / 4 + 8 * h, i) + lane % 4 * 4) =
                    DTYPE_O == QI_BF16 ? f32_to_bf16x2(even, odd) : f32_to_f16x2(even, odd);
            }
        if (boxed) fence_proxy_async();
        __syncwarp();
        if (boxed && lane == 0) {
            for (int i = 0; i < PASS / 64 && pass + 64 * i < COLUMNS; i++)
                tma_store_4d(&params->o, stage + i * Q_CHUNK_BYTES, pass + 64 * i, 0, kv_head,
                             token);
            if (PASS < COLUMNS) tma_await_reads();
        }
        if (boxed) continue;
#pragma unroll 4
        for (int i = lane; i < 16 * PIECES; i += WARP) {
            const int row = i / PIECES, piece = i % PIECES, d = pass + piece * 8;
            const int m = row_begin + row;
            if (m >= all || d >= HEAD_DIM_VO) continue;
            const i64 at =
                item->rows[m].row.token * p->o_stride[0] + prefill_head(w, m) * p->o_stride[1] + d;
            *(uint4 *)qi_to(p->o, DTYPE_O, at) = *(const uint4 *)staged_piece(stage, row, piece);
        }
    }
}

/* The same of rows of any type: as f32. */
QI_INLINE void store_rows(const attention_cuda_params *c, const tile_item *item, const float *o,
                          const float norm[2], char *stage, int row_begin, int aligned)
{
    enum { PASS = 32 * QK_CHUNKS, EIGHTS = PASS / 8 };
    const qi_work *w = &item->notes->work;
    const int lane = tid_x() % WARP, all = w->num_rows * GROUP_SIZE;
#pragma unroll
    for (int pass = 0; pass < COLUMNS; pass += PASS) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < EIGHTS && pass / 8 + j < COLUMNS / 8; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float *x = &o[4 * (pass / 8 + j) + 2 * h];
                *(float2 *)(staged_piece(stage, lane / 4 + 8 * h, 2 * j + lane % 4 / 2) +
                            lane % 2 * 8) = make_float2(x[0] * norm[h], x[1] * norm[h]);
            }
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < 16 * EIGHTS; i += WARP) {
            const int row = i / EIGHTS, j = i % EIGHTS, d = pass + j * 8, m = row_begin + row;
            float x[8];
            if (m >= all || d >= HEAD_DIM_VO) continue;
            *(float4 *)&x[0] = *(const float4 *)staged_piece(stage, row, 2 * j);
            *(float4 *)&x[4] = *(const float4 *)staged_piece(stage, row, 2 * j + 1);
            store_piece(c, &item->rows[m], prefill_head(w, m), d, x, aligned);
        }
    }
}

/* The lane's part of partial rows: four lanes write a sector of 32 bytes, which is as good as longer stores. */
QI_INLINE void store_partial_rows(const attention_cuda_params *c, const qi_work *w, const float *o,
                                  const float norm[2], int row_begin)
{
    const int lane = tid_x() % WARP;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int m = row_begin + lane / 4 + 8 * h;
        float *to = c->at.plan.o_partial + ((i64)w->slot + m) * HEAD_DIM_VO + lane % 4 * 2;
        if (m >= w->num_rows * GROUP_SIZE) continue;
#pragma unroll
        for (int i = 0; i < HEAD_DIM_VO / 8; i++)
            *(float2 *)(to + 8 * i) =
                make_float2(o[4 * i + 2 * h] * norm[h], o[4 * i + 2 * h + 1] * norm[h]);
    }
}

#endif
