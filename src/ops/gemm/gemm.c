/* gemm.c - host side of qkv_gemm: check, choose, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "qkv/gemm.h"
#include "core/launch.h"
#include "ops/gemm/gemm_params.h"

QI_CPU_DECLARE(gemm);

enum { THIN_ROWS = 8 };

static const char *reject_thin(const void *desc)
{
    const gemm_params *p = desc;
    return p->m > THIN_ROWS ? "x has more than 8 rows" : NULL;
}

const qi_kernel qi_gemm_kernels[] = {
    QI_CPU_ROW("gemm.any", NULL, gemm),
    QI_CUDA_ROW("gemm.thin", reject_thin, "ops/gemm/gemm.cu", "gemm_thin",
                "DTYPE_OUT DTYPE_X DTYPE_W VEC ROWS THREADS"),
    QI_CUDA_ROW("gemm.tile", NULL, "ops/gemm/gemm.cu", "gemm",
                "DTYPE_OUT DTYPE_X DTYPE_W VEC ROWS THREADS"),
    {0},
};

static qkv_status launch_cuda(const qkv_context *ctx, const qi_kernel *row, const gemm_params *p,
                              void *stream)
{
    enum { THREADS = 256, WARP = 32, TILE = 64 };
    const int thin = p->m <= THIN_ROWS;
    i32 rows = 1;
    while (rows < THIN_ROWS && rows < p->m) rows *= 2;
    const i32 vec = QI_VECTOR(8, p->k, p->x_stride, p->w_stride, QI_ADDRESS(p->x, p->dtype_x),
                              QI_ADDRESS(p->w, p->dtype_w));
    const i32 constants[] = {(i32)p->dtype_out, (i32)p->dtype_x, (i32)p->dtype_w,
                             thin ? vec : 1,    thin ? rows : 1, THREADS};
    const qi_grid grid = {
        .x = qi_blocks(p->n, thin ? THREADS / WARP : TILE),
        .y = thin ? 1 : qi_blocks(p->m, TILE),
        .threads = THREADS,
    };
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

qkv_status qkv_gemm(qkv_context *ctx, DLTensor *out, const DLTensor *x, const DLTensor *w,
                    void *stream)
{
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
    QI_TRY(qi_select(ctx, qi_gemm_kernels, &params, &row));
    if (row->device == kDLCUDA) return launch_cuda(ctx, row, &params, stream);
    qi_launch(ctx, row, qi_tasks_for(params.n * params.k * (1 + params.m / 8)), &params);
    return QKV_OK;
}
