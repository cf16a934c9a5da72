/* rmsnorm.c - host side of qkv_rmsnorm and qkv_add_rmsnorm: check, choose, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "core/launch.h"
#include "ops/norm/rmsnorm_params.h"
#include "qkv/norm.h"

QI_CPU_DECLARE(rmsnorm);

const qi_kernel qi_rmsnorm_kernels[] = {
    {"rmsnorm.any", kDLCPU, NULL, QI_CPU_ENTRIES(rmsnorm)},
    {0},
};

enum { MAX_HIDDEN_SIZE = 131072 };
_Static_assert(MAX_HIDDEN_SIZE * sizeof(float) <= QI_TASK_SCRATCH_BYTES,
               "a row in f32 is task scratch");

static qkv_status normalise(qkv_context *ctx, DLTensor *out, DLTensor *residual, const DLTensor *x,
                            const DLTensor *weight, float eps, float weight_bias)
{
    QI_REQUIRE_CONTEXT(ctx);
    QI_TRY(qi_expect_float(x, "x", QI_SHAPE(QI_ANY, QI_ANY)));
    const int64_t num_tokens = x->shape[0], hidden_size = x->shape[1];
    QI_REQUIRE(hidden_size <= MAX_HIDDEN_SIZE, "x: expected hidden_size of at most %d, got %lld",
               MAX_HIDDEN_SIZE, (long long)hidden_size);
    QI_TRY(qi_expect(out, "out", x->dtype, QI_SHAPE(num_tokens, hidden_size)));
    QI_TRY(qi_expect_float(weight, "weight", QI_SHAPE(hidden_size)));
    if (qi_dtype_of(weight->dtype) != QI_F32)
        QI_TRY(qi_expect(weight, "weight", x->dtype, QI_SHAPE(hidden_size)));
    QI_REQUIRE(eps >= 0.f && isfinite(eps), "eps: expected >= 0 and finite, got %g", (double)eps);
    QI_REQUIRE(isfinite(weight_bias), "weight_bias: expected a finite number, got %g",
               (double)weight_bias);
    QI_REQUIRE(qi_same(out, x) || !qi_overlap(out, x),
               "out: expected x itself or memory apart from it, got an overlap");
    QI_REQUIRE(!qi_overlap(weight, out), "weight: expected memory apart from out, got an overlap");
    QI_TRY(qi_expect_distinct(out, "out"));
    if (residual) {
        QI_TRY(qi_expect(residual, "residual", x->dtype, QI_SHAPE(num_tokens, hidden_size)));
        QI_TRY(qi_expect_distinct(residual, "residual"));
        QI_REQUIRE(!qi_overlap(residual, x),
                   "residual: expected memory apart from x, got an overlap");
        QI_REQUIRE(!qi_overlap(residual, out),
                   "residual: expected memory apart from out, got an overlap");
        QI_REQUIRE(!qi_overlap(residual, weight),
                   "residual: expected memory apart from weight, got an overlap");
    }
    if (num_tokens == 0 || hidden_size == 0) return QKV_OK;

    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_rmsnorm_kernels, NULL, &row));
    const int64_t row_bytes =
        hidden_size * (int64_t)qi_dtype_bytes((qi_dtype)qi_dtype_of(x->dtype));
    const rmsnorm_params params = {
        .out = qi_data(out),
        .residual = qi_optional_data(residual),
        .x = qi_data(x),
        .weight = qi_data(weight),
        .out_stride = qi_stride(out, 0),
        .residual_stride = residual ? qi_stride(residual, 0) : 0,
        .x_stride = qi_stride(x, 0),
        .num_tokens = num_tokens,
        .hidden_size = hidden_size,
        .dtype = (qi_dtype)qi_dtype_of(x->dtype),
        .weight_dtype = (qi_dtype)qi_dtype_of(weight->dtype),
        .eps = eps,
        .weight_bias = weight_bias,
        .streams = !qi_same(out, x) && qi_streams(num_tokens * row_bytes),
    };
    const int64_t tasks = qi_tasks_for(num_tokens * row_bytes * (residual ? 4 : 2));
    qi_launch(ctx, row, tasks < num_tokens ? tasks : num_tokens, &params);
    return QKV_OK;
}

qkv_status qkv_rmsnorm(qkv_context *ctx, DLTensor *out, const DLTensor *x, const DLTensor *weight,
                       float eps, float weight_bias, void *stream)
{
    (void)stream;
    return normalise(ctx, out, NULL, x, weight, eps, weight_bias);
}

qkv_status qkv_add_rmsnorm(qkv_context *ctx, DLTensor *out, DLTensor *residual, const DLTensor *x,
                           const DLTensor *weight, float eps, float weight_bias, void *stream)
{
    (void)stream;
    QI_REQUIRE_CONTEXT(ctx);
    QI_REQUIRE(residual, "residual: expected a tensor, got NULL");
    return normalise(ctx, out, residual, x, weight, eps, weight_bias);
}
