/* verify.c - host side of qkv_verify: check, choose, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/stages.h"
#include "ops/sampling/verify_params.h"

QI_CPU_DECLARE(verify);

const qi_kernel qi_verify_kernels[] = {
    QI_CPU_ROW("verify.any", NULL, verify),
    QI_CUDA_ROW("verify.cuda", NULL, "ops/sampling/verify.cu", "verify",
                "DTYPE ONE_HOT VEC THREADS CLUSTER"),
    {0},
};

_Static_assert(MAX_NODES == QKV_MAX_NODES, "public numbers");

/* What is written shares no memory with anything else of the call. */
static qkv_status check_apart(const qkv_verify_io *io)
{
    const struct {
        const DLTensor *tensor;
        const char *name;
    } all[] = {
        {io->accepted, "accepted"},
        {io->num_accepted, "num_accepted"},
        {io->tokens, "tokens"},
        {io->target, "target"},
        {io->draft_tokens, "draft_tokens"},
        {io->draft, "draft"},
        {io->parents, "parents"},
        {io->seed, "seed"},
        {io->offset, "offset"},
    };
    enum { NUM_OUTPUTS = 3 };
    for (size_t out = 0; out < NUM_OUTPUTS; out++)
        for (size_t i = out + 1; i < sizeof all / sizeof all[0]; i++)
            QI_REQUIRE(!all[i].tensor || !qi_overlap(all[out].tensor, all[i].tensor),
                       "%s: expected memory apart from %s, got an overlap", all[i].name,
                       all[out].name);
    return QKV_OK;
}

static qkv_status read_output(DLTensor *t, const char *name, const verify_params *p, i32 **data,
                              i64 *stride)
{
    QI_TRY(qi_expect(t, name, QKV_I32, QI_SHAPE(p->batch, p->nodes + 1)));
    QI_TRY(qi_expect_distinct(t, name));
    *data = qi_data(t);
    *stride = qi_stride(t, 0);
    return QKV_OK;
}

static qkv_status read_draft(verify_params *p, const qkv_verify_io *io)
{
    const DLTensor *tokens = io->draft_tokens, *draft = io->draft, *parents = io->parents;
    QI_TRY(qi_expect(tokens, "draft_tokens", QKV_I32, QI_SHAPE(p->batch, p->nodes)));
    p->draft_tokens = qi_data(tokens);
    p->draft_tokens_stride = qi_stride(tokens, 0);
    if (draft) {
        QI_TRY(
            qi_expect(draft, "draft", io->target->dtype, QI_SHAPE(p->batch, p->nodes, p->vocab)));
        p->draft = qi_data(draft);
        for (int axis = 0; axis < 2; axis++) p->draft_stride[axis] = qi_stride(draft, axis);
    }
    if (parents) {
        const int one = parents->ndim == 2 && parents->shape && parents->shape[0] == 1;
        QI_TRY(qi_expect(parents, "parents", QKV_I32, QI_SHAPE(one ? 1 : p->batch, p->nodes)));
        p->parents = qi_data(parents);
        p->parents_stride = one ? 0 : qi_stride(parents, 0);
    }
    return QKV_OK;
}

static qkv_status check_verify(const qkv_verify_io *io, verify_params *p)
{
    const DLTensor *target = io->target;
    QI_REQUIRE(io->reserved == 0, "io.reserved: expected 0, got %u", (unsigned)io->reserved);
    QI_TRY(qi_expect_float(target, "target", QI_SHAPE(QI_ANY, QI_ANY, QI_ANY)));
    const i64 rows = target->shape[1], vocab = target->shape[2];
    QI_REQUIRE(rows >= 1 && rows <= MAX_NODES + 1, "target: expected 1 to %d rows, got %lld",
               MAX_NODES + 1, (long long)rows);
    QI_REQUIRE(vocab >= 1 && vocab <= MAX_VOCAB, "target: expected a vocab of 1 to %d, got %lld",
               MAX_VOCAB, (long long)vocab);
    *p = (verify_params){
        .target = qi_data(target),
        .target_stride = {qi_stride(target, 0), qi_stride(target, 1)},
        .batch = target->shape[0],
        .vocab = vocab,
        .nodes = (i32)rows - 1,
        .dtype = (qi_dtype)qi_dtype_of(target->dtype),
    };
    QI_TRY(read_output(io->accepted, "accepted", p, &p->accepted, &p->accepted_stride));
    QI_TRY(qi_expect(io->num_accepted, "num_accepted", QKV_I32, QI_SHAPE(p->batch)));
    QI_TRY(qi_expect_distinct(io->num_accepted, "num_accepted"));
    p->num_accepted = qi_data(io->num_accepted);
    QI_TRY(read_output(io->tokens, "tokens", p, &p->tokens, &p->tokens_stride));
    QI_TRY(read_draft(p, io));
    QI_REQUIRE(io->seed, "seed: expected a tensor, got NULL");
    QI_TRY(qi_request_values(&p->seed, io->seed, "seed", QKV_U64, p->batch));
    QI_TRY(qi_request_values(&p->offset, io->offset, "offset", QKV_U64, p->batch));
    return check_apart(io);
}

/* From sm_90 on a request has so many blocks that a row is a few accesses of each thread. */
static qkv_status launch_cuda(const qkv_context *ctx, const qi_kernel *row, const verify_params *p,
                              void *stream)
{
    enum { THREADS = 512, TOKENS_EACH = 16, MAX_CLUSTER = 8 };
    const i32 most = 16 / (i32)qi_dtype_bytes(p->dtype);
    i32 vec = QI_VECTOR(most, p->vocab, p->target_stride[0], p->target_stride[1],
                        QI_ADDRESS(p->target, p->dtype));
    if (p->draft)
        vec =
            QI_VECTOR(vec, p->draft_stride[0], p->draft_stride[1], QI_ADDRESS(p->draft, p->dtype));
    i32 cluster = 1;
    while (ctx->cuda.major >= 9 && cluster < MAX_CLUSTER &&
           cluster * THREADS * TOKENS_EACH < p->vocab)
        cluster *= 2;
    const i32 constants[] = {(i32)p->dtype, !p->draft, vec, THREADS, cluster};
    const qi_grid grid = {.x = (u32)(p->batch * cluster),
                          .threads = THREADS,
                          .cluster = (u32)cluster,
                          .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

qkv_status qkv_verify(qkv_context *ctx, const qkv_verify_io *io, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    qkv_verify_io given;
    verify_params params;
    QI_TRY(qi_read_struct(&given, sizeof given, io, "io"));
    QI_TRY(check_verify(&given, &params));
    if (params.batch == 0) return QKV_OK;
    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_verify_kernels, NULL, &row));
    if (row->device == kDLCUDA) return launch_cuda(ctx, row, &params, stream);
    qi_launch(ctx, row, qi_tasks_for(params.batch * (params.nodes + 1) * params.vocab), &params);
    return QKV_OK;
}
