/* rmsnorm.c - host side of qkv_rmsnorm and qkv_add_rmsnorm: check, choose, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "core/launch.h"
#include "ops/norm/rmsnorm_params.h"
#include "qkv/norm.h"

QI_CPU_DECLARE(rmsnorm);

const qi_kernel qi_rmsnorm_kernels[] = {
    QI_CPU_ROW("rmsnorm.any", NULL, rmsnorm),
    QI_CUDA_ROW("rmsnorm.cuda", NULL, "ops/norm/rmsnorm.cu", "rmsnorm",
                "DTYPE WEIGHT_DTYPE VEC GROUP TIMES THREADS RESIDUAL"),
    {0},
};

enum { MAX_HIDDEN_SIZE = 131072 };
_Static_assert(MAX_HIDDEN_SIZE * sizeof(float) <= QI_TASK_SCRATCH_BYTES,
               "a row in f32 is task scratch");

/* A row's threads take 2 accesses each, more where there would be more threads than a block has. */
static qkv_status launch_cuda(const qkv_context *ctx, const qi_kernel *row, const rmsnorm_params *p,
                              void *stream)
{
    enum { WARP = 32, LEAST = 128, MOST = 1024 };
    const i32 vec =
        QI_VECTOR(16 / (i32)qi_dtype_bytes(p->dtype), p->hidden_size, p->x_stride, p->out_stride,
                  p->residual_stride, QI_ADDRESS(p->x, p->dtype), QI_ADDRESS(p->out, p->dtype),
                  QI_ADDRESS(p->residual, p->dtype), QI_ADDRESS(p->weight, p->weight_dtype));
    const i32 accesses = (i32)p->hidden_size / vec;
    const i32 wanted = (accesses + 2 * WARP - 1) / (2 * WARP) * WARP;
    const i32 group = wanted < MOST ? wanted : MOST;
    const i32 times = (accesses + group - 1) / group;
    const i32 threads = group < LEAST ? group * (LEAST / group) : group;
    const i32 constants[] = {(i32)p->dtype, (i32)p->weight_dtype, vec, group, times,
                             threads,       p->residual != NULL};
    const qi_grid grid = {.x = qi_blocks(p->num_tokens, threads / group),
                          .threads = (u32)threads,
                          .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

static qkv_status normalise(qkv_context *ctx, DLTensor *out, DLTensor *residual, const DLTensor *x,
                            const DLTensor *weight, float eps, float weight_bias, void *stream)
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
    if (row->device == kDLCUDA) return launch_cuda(ctx, row, &params, stream);
    const int64_t tasks = qi_tasks_for(num_tokens * row_bytes * (residual ? 4 : 2));
    qi_launch(ctx, row, tasks < num_tokens ? tasks : num_tokens, &params);
    return QKV_OK;
}

qkv_status qkv_rmsnorm(qkv_context *ctx, DLTensor *out, const DLTensor *x, const DLTensor *weight,
                       float eps, float weight_bias, void *stream)
{
    return normalise(ctx, out, NULL, x, weight, eps, weight_bias, stream);
}

qkv_status qkv_add_rmsnorm(qkv_context *ctx, DLTensor *out, DLTensor *residual, const DLTensor *x,
                           const DLTensor *weight, float eps, float weight_bias, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    QI_REQUIRE(residual, "residual: expected a tensor, got NULL");
    return normalise(ctx, out, residual, x, weight, eps, weight_bias, stream);
}
