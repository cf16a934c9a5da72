/* gemm.c - host side of qkv_gemm: check, choose, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "qkv/gemm.h"
#include "core/launch.h"
#include "ops/gemm/gemm_params.h"

QI_CPU_DECLARE(gemm);

const qi_kernel qi_gemm_kernels[] = {
    {"gemm.any", kDLCPU, NULL, QI_CPU_ENTRIES(gemm)},
    {0},
};

qkv_status qkv_gemm(qkv_context *ctx, DLTensor *out, const DLTensor *x, const DLTensor *w,
                    void *stream)
{
    (void)stream;
    QI_REQUIRE_CONTEXT(ctx);
    QI_TRY(qi_expect_float(x, "x", QI_SHAPE(QI_ANY, QI_ANY)));
    QI_TRY(qi_expect_float(w, "w", QI_SHAPE(QI_ANY, x->shape[1])));
    QI_TRY(qi_expect_float(out, "out", QI_SHAPE(x->shape[0], w->shape[0])));
    QI_TRY(qi_expect_distinct(out, "out"));
    QI_REQUIRE(!qi_overlap(out, x), "out: expected memory apart from x, got an overlap");
    QI_REQUIRE(!qi_overlap(out, w), "out: expected memory apart from w, got an overlap");
    const gemm_params params = {
        .out = qi_data(out),
        .x = qi_data(x),
        .w = qi_data(w),
        .out_stride = qi_stride(out, 0),
        .x_stride = qi_stride(x, 0),
        .w_stride = qi_stride(w, 0),
        .m = x->shape[0],
        .n = w->shape[0],
        .k = x->shape[1],
        .dtype_out = (qi_dtype)qi_dtype_of(out->dtype),
        .dtype_x = (qi_dtype)qi_dtype_of(x->dtype),
        .dtype_w = (qi_dtype)qi_dtype_of(w->dtype),
    };
    if (params.m == 0 || params.n == 0) return QKV_OK;

    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_gemm_kernels, NULL, &row));
    qi_launch(ctx, row, qi_tasks_for(params.n * params.k * (1 + params.m / 8)), &params);
    return QKV_OK;
}
