/* gemm_quantized.c - host side of qkv_gemm_quantized: check, choose, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/launch.h"
#include "ops/gemm/gemm_quantized_params.h"
#include "qkv/gemm.h"

QI_CPU_DECLARE(gemm_quantized);

const qi_kernel qi_gemm_quantized_kernels[] = {
    QI_CPU_ROW("gemm_quantized.any", NULL, gemm_quantized),
    {0},
};

static qkv_status read_format(qkv_weight_format format, gemm_format *out)
{
    switch (format) {
    case QKV_WEIGHT_Q8_0: *out = GEMM_Q8_0; return QKV_OK;
    case QKV_WEIGHT_Q4_0: *out = GEMM_Q4_0; return QKV_OK;
    case QKV_WEIGHT_Q4_1: *out = GEMM_Q4_1; return QKV_OK;
    }
    QI_FAIL(QKV_ERR_INVALID, "format: expected QKV_WEIGHT_Q8_0, Q4_0 or Q4_1, got %d", (int)format);
}

qkv_status qkv_gemm_quantized(qkv_context *ctx, DLTensor *out, const DLTensor *x, const DLTensor *w,
                              qkv_weight_format format, void *stream)
{
    (void)stream;
    QI_REQUIRE_CONTEXT(ctx);
    gemm_quantized_params params = {0};
    QI_TRY(read_format(format, &params.format));
    QI_TRY(qi_expect_float(x, "x", QI_SHAPE(QI_ANY, QI_ANY)));
    params.m = x->shape[0];
    params.k = x->shape[1];
    QI_REQUIRE(params.k % GEMM_BLOCK_SIZE == 0, "x: expected rows of whole blocks of %d, got %lld",
               GEMM_BLOCK_SIZE, (long long)params.k);
    const i64 row_bytes = params.k / GEMM_BLOCK_SIZE * gemm_block_bytes(params.format);
    QI_TRY(qi_expect(w, "w", QKV_U8, QI_SHAPE(QI_ANY, row_bytes)));
    params.n = w->shape[0];
    QI_TRY(qi_expect_float(out, "out", QI_SHAPE(params.m, params.n)));
    QI_TRY(qi_expect_distinct(out, "out"));
    QI_REQUIRE(!qi_overlap(out, x), "out: expected memory apart from x, got an overlap");
    QI_REQUIRE(!qi_overlap(out, w), "out: expected memory apart from w, got an overlap");
    if (params.m == 0 || params.n == 0) return QKV_OK;

    params.out = qi_data(out);
    params.x = qi_data(x);
    params.w = qi_data(w);
    params.out_stride = qi_stride(out, 0);
    params.x_stride = qi_stride(x, 0);
    params.w_stride = qi_stride(w, 0);
    params.dtype_out = (qi_dtype)qi_dtype_of(out->dtype);
    params.dtype_x = (qi_dtype)qi_dtype_of(x->dtype);
    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_gemm_quantized_kernels, NULL, &row));
    qi_launch(ctx, row, qi_tasks_for(params.n * params.k * (1 + params.m / 8)), &params);
    return QKV_OK;
}
