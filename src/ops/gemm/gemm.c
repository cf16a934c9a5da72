/* gemm.c - host side of qkv_gemm: check, choose, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "qkv/gemm.h"
#include "core/launch.h"
#include "ops/gemm/gemm_params.h"

QI_CPU_DECLARE(gemm);

enum { THIN_ROWS = 8, WARP = 32 };

/* What rows are chosen by. */
typedef struct gemm_desc {
    gemm_params p;
    qkv_context *ctx;
} gemm_desc;

/* ---- cuBLASLt ----------------------------------------------------------------------------- */

static u32 alignment_of(const void *data)
{
    enum { MOST = 256 };
    const uintptr_t bits = (uintptr_t)data | MOST;
    return (u32)(bits & -bits);
}

static i64 at_least(i64 stride, i64 length)
{
    return stride > length ? stride : length;
}

/* A single row has any stride. */
static qi_matmul matmul_of(const gemm_params *p)
{
    return (qi_matmul){.m = p->m,
                       .n = p->n,
                       .k = p->k,
                       .out_stride = at_least(p->out_stride, p->n),
                       .x_stride = at_least(p->x_stride, p->k),
                       .w_stride = at_least(p->w_stride, p->k),
                       .dtype_out = p->dtype_out,
                       .dtype = p->dtype_x,
                       .out_alignment = alignment_of(p->out),
                       .x_alignment = alignment_of(p->x),
                       .w_alignment = alignment_of(p->w)};
}

static const char *reject_cublaslt(const void *desc)
{
    const gemm_desc *d = desc;
    const gemm_params *p = &d->p;
    if (d->ctx->batch_invariant) return "its sums depend on the number of rows";
    if (p->dtype_x != p->dtype_w) return "x and w have different dtypes";
    if (p->dtype_out != p->dtype_x && p->dtype_out != QI_F32)
        return "out has neither f32 nor the dtype of x";
    if (p->k == 0) return "k is 0";
    if ((p->m > 1 && p->x_stride < p->k) || (p->n > 1 && p->w_stride < p->k))
        return "rows of x or of w overlap";
    if (p->m > INT32_MAX || p->n > INT32_MAX || p->k > INT32_MAX) return "a size is above 2^31";
    const qi_matmul problem = matmul_of(p);
    return qi_cublaslt_declines(&d->ctx->cublaslt, &d->ctx->cuda, &problem);
}

/* ---- own kernels -------------------------------------------------------------------------- */

static const char *reject_thin(const void *desc)
{
    const gemm_desc *d = desc;
    if (d->ctx->batch_invariant) return "more rows are summed in another order";
    return d->p.m > THIN_ROWS ? "x has more than 8 rows" : NULL;
}

static const char *reject_mma(const void *desc)
{
    const gemm_params *p = &((const gemm_desc *)desc)->p;
    if (p->dtype_x != p->dtype_w) return "x and w have different dtypes";
    return p->dtype_x == QI_F32 ? "f32 is no type of the tensor cores" : NULL;
}

const qi_kernel qi_gemm_kernels[] = {
    QI_CPU_ROW("gemm.any", NULL, gemm),
    QI_LIBRARY_ROW("gemm.cublaslt", reject_cublaslt),
    QI_CUDA_ROW("gemm.thin", reject_thin, "ops/gemm/gemm_thin.cu", "gemm_thin",
                "DTYPE_OUT DTYPE_X DTYPE_W VEC ROWS PARTS THREADS"),
    QI_CUDA_ROW("gemm.mma", reject_mma, "ops/gemm/gemm_mma.cu", "gemm_mma",
                "DTYPE_OUT DTYPE VEC VEC_OUT WARPS_M WARPS_N TILES_M TILES_N STAGES THREADS"),
    QI_CUDA_ROW("gemm.tile", NULL, "ops/gemm/gemm_tile.cu", "gemm_tile",
                "DTYPE_OUT DTYPE_X DTYPE_W VEC SIDE THREADS"),
    {0},
};

/* Elements of an access to x and w. */
static i32 vector_of(const gemm_params *p)
{
    return QI_VECTOR(8, p->k, p->x_stride, p->w_stride, QI_ADDRESS(p->x, p->dtype_x),
                     QI_ADDRESS(p->w, p->dtype_w));
}

/* Columns are shared by so many warps as make 16 warps an SM. */
static qkv_status launch_thin(const qkv_context *ctx, const qi_kernel *row, const gemm_params *p,
                              void *stream)
{
    enum { THREADS = 256, COLUMNS = 4, WARPS_AN_SM = 16 };
    i32 rows = 1, parts = 1;
    while (rows < p->m) rows *= 2;
    while (parts < THREADS / WARP && p->n / COLUMNS * parts < (i64)ctx->cuda.num_sms * WARPS_AN_SM)
        parts *= 2;
    const i32 constants[] = {
        (i32)p->dtype_out, (i32)p->dtype_x, (i32)p->dtype_w, vector_of(p), rows, parts, THREADS};
    const qi_grid grid = {.x = qi_blocks(p->n, COLUMNS * (THREADS / WARP / parts)),
                          .threads = THREADS,
                          .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

/* Blocks of 128 x 128, or for few rows of 32 x 64, which are more. An element is summed in the same order in
 * either. */
static qkv_status launch_mma(const qkv_context *ctx, const qi_kernel *row, const gemm_params *p,
                             void *stream)
{
    static const struct {
        i32 warps_m, warps_n, tiles_m, tiles_n, stages;
    } shapes[] = {{2, 4, 4, 4, 4}, {1, 4, 2, 2, 6}};
    enum { DEPTH_BYTES = 64 };
    const i32 vec_out = QI_VECTOR(2, p->n, p->out_stride, QI_ADDRESS(p->out, p->dtype_out));
    const int few = p->m <= 32;
    const i32 block_m = shapes[few].warps_m * shapes[few].tiles_m * 16,
              block_n = shapes[few].warps_n * shapes[few].tiles_n * 8,
              threads = shapes[few].warps_m * shapes[few].warps_n * WARP;
    const i32 constants[] = {(i32)p->dtype_out,   (i32)p->dtype_x,
                             vector_of(p),        vec_out,
                             shapes[few].warps_m, shapes[few].warps_n,
                             shapes[few].tiles_m, shapes[few].tiles_n,
                             shapes[few].stages,  threads};
    const qi_grid grid = {.x = qi_blocks(p->m, block_m) * qi_blocks(p->n, block_n),
                          .threads = (u32)threads,
                          .shared_bytes =
                              (u32)(shapes[few].stages * (block_m + block_n) * DEPTH_BYTES),
                          .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

/* Blocks of 128 x 128, or 64 x 64 where those would leave SMs without one. */
static qkv_status launch_tile(const qkv_context *ctx, const qi_kernel *row, const gemm_params *p,
                              void *stream)
{
    enum { THREADS = 256, EDGE = 16 };
    const i64 large = (i64)qi_blocks(p->m, 8 * EDGE) * qi_blocks(p->n, 8 * EDGE);
    const i32 side = large >= ctx->cuda.num_sms ? 8 : 4, vec = vector_of(p);
    const i32 constants[] = {
        (i32)p->dtype_out, (i32)p->dtype_x, (i32)p->dtype_w, vec < 4 ? vec : 4, side, THREADS};
    const qi_grid grid = {.x = qi_blocks(p->m, side * EDGE) * qi_blocks(p->n, side * EDGE),
                          .threads = THREADS,
                          .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

static qkv_status launch_cuda(qkv_context *ctx, const qi_kernel *row, const gemm_params *p,
                              void *stream)
{
    if (row->reject == reject_thin) return launch_thin(ctx, row, p, stream);
    if (row->reject == reject_mma) return launch_mma(ctx, row, p, stream);
    if (row->reject != reject_cublaslt) return launch_tile(ctx, row, p, stream);
    const qi_matmul problem = matmul_of(p);
    return qi_cublaslt_multiply(&ctx->cublaslt, &ctx->cuda, &problem, p->out, p->x, p->w, stream);
}

/* ---- the operator ------------------------------------------------------------------------- */

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
    const gemm_desc desc = {.ctx = ctx,
                            .p = {
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
                            }};
    const gemm_params *p = &desc.p;
    if (p->m == 0 || p->n == 0) return QKV_OK;

    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_gemm_kernels, &desc, &row));
    if (row->device == kDLCUDA) return launch_cuda(ctx, row, p, stream);
    qi_launch(ctx, row, qi_tasks_for(p->n * p->k * (1 + p->m / 8)), p);
    return QKV_OK;
}
