/* top_k.c - host side of qkv_top_k.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/pieces.h"
#include "ops/sampling/stream.h"
#include "ops/sampling/top_k_params.h"
#include "qkv/sampling.h"

QI_CPU_DECLARE(top_k);

const qi_kernel qi_top_k_kernels[] = {
    QI_CPU_ROW("top_k.any", NULL, top_k),
    QI_CUDA_ROW("top_k.cuda", NULL, "ops/sampling/top_k.cu", "top_k",
                "DTYPE VEC THREADS CLUSTER RESIDENT"),
    {0},
};

static qkv_status check(DLTensor *values, DLTensor *indices, const DLTensor *rows, int32_t sorted,
                        top_k_params *p)
{
    QI_TRY(qi_expect_float(rows, "rows", QI_SHAPE(QI_ANY, QI_ANY)));
    const int64_t batch = rows->shape[0], vocab = rows->shape[1];
    QI_REQUIRE(vocab >= 1 && vocab <= QKV_MAX_VOCAB, "rows: expected a vocab of 1 to %d, got %lld",
               QKV_MAX_VOCAB, (long long)vocab);
    QI_TRY(qi_expect(indices, "indices", QKV_I32, QI_SHAPE(batch, QI_ANY)));
    const int64_t k = indices->shape[1];
    QI_REQUIRE(k >= 1 && k <= vocab, "indices: expected a k of 1 to vocab = %lld, got %lld",
               (long long)vocab, (long long)k);
    QI_TRY(qi_expect_distinct(indices, "indices"));
    QI_REQUIRE(!qi_overlap(indices, rows),
               "indices: expected memory apart from rows, got an overlap");
    if (values) {
        QI_TRY(qi_expect(values, "values", rows->dtype, QI_SHAPE(batch, k)));
        QI_TRY(qi_expect_distinct(values, "values"));
        QI_REQUIRE(!qi_overlap(values, rows),
                   "values: expected memory apart from rows, got an overlap");
        QI_REQUIRE(!qi_overlap(values, indices),
                   "values: expected memory apart from indices, got an overlap");
    }
    QI_REQUIRE(sorted == 0 || sorted == 1, "sorted: expected 0 or 1, got %d", (int)sorted);
    *p = (top_k_params){
        .values = qi_optional_data(values),
        .indices = qi_data(indices),
        .rows = qi_data(rows),
        .values_stride = values ? qi_stride(values, 0) : 0,
        .indices_stride = qi_stride(indices, 0),
        .rows_stride = qi_stride(rows, 0),
        .batch = batch,
        .vocab = vocab,
        .k = k,
        .dtype = (qi_dtype)qi_dtype_of(rows->dtype),
        .sorted = sorted,
    };
    return QKV_OK;
}

/* Few tokens are found by streaming rows; where each block has an SM, in rows that stay. */
static qkv_status launch_on_cuda(const qkv_context *ctx, const qi_kernel *row,
                                 const top_k_params *p, void *stream)
{
    enum { THREADS = 512, MOST_BOUNDED = QI_PIECES_THREADS / 2 };
    const i32 vec = QI_VECTOR(16 / (i32)qi_dtype_bytes(p->dtype), p->vocab, p->rows_stride,
                              QI_ADDRESS(p->rows, p->dtype));
    const i64 blocks = p->batch * qi_pieces_cluster(ctx, p->vocab, vec);
    if (p->k > MOST_STREAMED || (p->k <= MOST_BOUNDED && blocks <= ctx->cuda.num_sms))
        return qi_launch_pieces(ctx, row, p->rows, p->batch, p->vocab, p->rows_stride, p->dtype, p,
                                stream);
    const i32 cluster = qi_stream_cluster(ctx, p->batch, p->vocab, THREADS * vec, 2);
    const i32 constants[] = {(i32)p->dtype, vec, THREADS, cluster, 0};
    const qi_grid grid = {.x = (u32)(p->batch * cluster),
                          .threads = THREADS,
                          .cluster = (u32)cluster,
                          .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

qkv_status qkv_top_k(qkv_context *ctx, DLTensor *values, DLTensor *indices, const DLTensor *rows,
                     int32_t sorted, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    top_k_params params;
    QI_TRY(check(values, indices, rows, sorted, &params));
    if (params.batch == 0) return QKV_OK;
    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_top_k_kernels, NULL, &row));
    if (row->device == kDLCUDA) return launch_on_cuda(ctx, row, &params, stream);
    qi_launch(ctx, row, qi_tasks_for(params.batch * params.vocab), &params);
    return QKV_OK;
}
