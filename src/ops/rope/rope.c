/* rope.c - host side of qkv_rope: check, choose, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "qkv/rope.h"
#include "base/rope_spec.h"
#include "core/launch.h"
#include "ops/rope/rope_params.h"

QI_CPU_DECLARE(rope);

const qi_kernel qi_rope_kernels[] = {
    QI_CPU_ROW("rope.any", NULL, rope),
    QI_CUDA_ROW("rope.cuda", NULL, "ops/rope/rope.cu", "rope", "DTYPE VEC LAYOUT THREADS"),
    {0},
};

/* One of q and k with its output, [nnz, any heads, head_dim]. */
static qkv_status read_pair(const DLTensor *in, const char *in_name, const DLTensor *out,
                            const char *out_name, const DLTensor *q, rope_tensor *x)
{
    QI_TRY(qi_expect(in, in_name, q->dtype, QI_SHAPE(q->shape[0], QI_ANY, q->shape[2])));
    QI_TRY(qi_expect(out, out_name, q->dtype, QI_SHAPE(q->shape[0], in->shape[1], q->shape[2])));
    QI_REQUIRE(qi_same(out, in) || !qi_overlap(out, in),
               "%s: expected %s itself or memory apart from it, got an overlap", out_name, in_name);
    QI_TRY(qi_expect_distinct(out, out_name));
    *x = (rope_tensor){.in = qi_data(in),
                       .out = qi_data(out),
                       .heads = in->shape[1],
                       .in_stride = {qi_stride(in, 0), qi_stride(in, 1)},
                       .out_stride = {qi_stride(out, 0), qi_stride(out, 1)}};
    return QKV_OK;
}

/* What says the positions is read while rows are written. */
static qkv_status expect_unwritten(const DLTensor *t, const char *name, const DLTensor *q_out,
                                   const DLTensor *k_out)
{
    QI_REQUIRE(!t || !qi_overlap(t, q_out), "%s: expected memory apart from q_out, got an overlap",
               name);
    QI_REQUIRE(!t || !k_out || !qi_overlap(t, k_out),
               "%s: expected memory apart from k_out, got an overlap", name);
    return QKV_OK;
}

/* positions, or indptr and offsets: sets them and how many rows are rotated. */
static qkv_status read_positions(const DLTensor *positions, const DLTensor *indptr,
                                 const DLTensor *offsets, int64_t rows, rope_params *p)
{
    p->nnz = rows;
    if (positions) {
        QI_REQUIRE(!indptr && !offsets,
                   "positions: expected NULL with indptr and offsets, got both forms");
        QI_TRY(qi_expect(positions, "positions", QKV_I32, QI_SHAPE(rows)));
        p->positions = qi_data(positions);
        return QKV_OK;
    }
    QI_REQUIRE(indptr && offsets,
               "positions: expected positions, or indptr and offsets, got neither");
    QI_TRY(qi_expect(indptr, "indptr", QKV_I32, QI_SHAPE(QI_ANY)));
    QI_REQUIRE(indptr->shape[0] >= 1, "indptr: expected at least 1 entry, got 0");
    p->num_requests = indptr->shape[0] - 1;
    QI_TRY(qi_expect(offsets, "offsets", QKV_I32, QI_SHAPE(p->num_requests)));
    p->indptr = qi_data(indptr);
    p->offsets = qi_data(offsets);
    if (!qi_host_reads()) return QKV_OK;
    QI_REQUIRE(p->indptr[0] == 0, "indptr: expected a first entry of 0, got %d (entry 0)",
               (int)p->indptr[0]);
    for (i64 r = 0; r < p->num_requests; r++)
        QI_REQUIRE(p->indptr[r + 1] >= p->indptr[r],
                   "indptr: expected entries that do not fall, got %d after %d (request %lld)",
                   (int)p->indptr[r + 1], (int)p->indptr[r], (long long)r);
    p->nnz = p->indptr[p->num_requests];
    QI_REQUIRE(p->nnz <= rows, "indptr: expected at most %lld rows, got %lld", (long long)rows,
               (long long)p->nnz);
    return QKV_OK;
}

/* A block's threads take 2 pieces each, more where it would have more than 256. */
static qkv_status launch_cuda(const qkv_context *ctx, const qi_kernel *row, const rope_params *p,
                              void *stream)
{
    enum { HALVES = 1, INTERLEAVED = 2, WARP = 32 };
    const rope_tensor *q = &p->q, *k = &p->k;
    const i32 pairs = p->rope.num_pairs;
    const i32 vec = QI_VECTOR(
        16 / (i32)qi_dtype_bytes(p->dtype), p->head_dim, p->rope.interleaved ? 2 * pairs : pairs,
        q->in_stride[0], q->in_stride[1], q->out_stride[0], q->out_stride[1], k->in_stride[0],
        k->in_stride[1], k->out_stride[0], k->out_stride[1], QI_ADDRESS(q->in, p->dtype),
        QI_ADDRESS(q->out, p->dtype), QI_ADDRESS(k->in, p->dtype), QI_ADDRESS(k->out, p->dtype));
    const i64 pieces = (p->rope.interleaved ? p->head_dim : p->head_dim - pairs) / vec;
    const i64 warps = ((q->heads + k->heads) * pieces + 2 * WARP - 1) / (2 * WARP);
    const i32 threads = WARP * (i32)(warps < 2 ? 2 : warps > 8 ? 8 : warps);
    const i32 constants[] = {(i32)p->dtype, vec, p->rope.interleaved ? INTERLEAVED : HALVES,
                             threads};
    const qi_grid grid = {.x = (u32)p->nnz,
                          .threads = (u32)threads,
                          .shared_bytes = (u32)pairs * 2 * (u32)sizeof(float),
                          .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

qkv_status qkv_rope(qkv_context *ctx, const qkv_rope_spec *spec, DLTensor *q_out, const DLTensor *q,
                    DLTensor *k_out, const DLTensor *k, const DLTensor *positions,
                    const DLTensor *indptr, const DLTensor *offsets, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    QI_TRY(qi_expect_float(q, "q", QI_SHAPE(QI_ANY, QI_ANY, QI_ANY)));
    rope_params params = {.head_dim = q->shape[2], .dtype = (qi_dtype)qi_dtype_of(q->dtype)};
    QI_TRY(qi_rope_read(spec, "spec", q->shape[2], &params.rope));
    QI_TRY(read_pair(q, "q", q_out, "q_out", q, &params.q));
    QI_REQUIRE(!k == !k_out, "k, k_out: expected both or neither, got one");
    if (k) {
        QI_TRY(read_pair(k, "k", k_out, "k_out", q, &params.k));
        QI_REQUIRE(!qi_overlap(k_out, q) && !qi_overlap(q_out, k_out),
                   "k_out: expected q and q_out apart from k and k_out, got an overlap");
        QI_REQUIRE(!qi_overlap(q_out, k), "q_out: expected memory apart from k, got an overlap");
    }
    QI_TRY(read_positions(positions, indptr, offsets, q->shape[0], &params));
    QI_TRY(expect_unwritten(positions, "positions", q_out, k_out));
    QI_TRY(expect_unwritten(indptr, "indptr", q_out, k_out));
    QI_TRY(expect_unwritten(offsets, "offsets", q_out, k_out));
    if (params.nnz == 0) return QKV_OK;

    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_rope_kernels, NULL, &row));
    if (row->device == kDLCUDA) return launch_cuda(ctx, row, &params, stream);
    const int64_t row_bytes = (params.q.heads + params.k.heads) * params.head_dim *
                              (int64_t)qi_dtype_bytes(params.dtype) * 2;
    const int64_t tasks = qi_tasks_for(params.nnz * row_bytes);
    qi_launch(ctx, row, tasks < params.nnz ? tasks : params.nnz, &params);
    return QKV_OK;
}
