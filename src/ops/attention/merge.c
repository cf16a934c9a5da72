/* merge.c - host side of qkv_attention_merge: check, choose, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>

#include "core/launch.h"
#include "ops/attention/merge_params.h"
#include "qkv/attention.h"

QI_CPU_DECLARE(merge);

const qi_kernel qi_merge_kernels[] = {
    QI_CPU_ROW("merge.any", NULL, merge),
    QI_CUDA_ROW("merge.cuda", NULL, "ops/attention/merge.cu", "merge",
                "DTYPE_O DTYPE_STATE VEC LANES THREADS"),
    {0},
};

#define LOG2E   1.44269504088896340736f
#define MAX_DIM (QI_TASK_SCRATCH_BYTES / 4) /* a row in f32 fits a task's scratch */

static qkv_status read_lse(const DLTensor *lse, const char *name, const DLTensor *o, i64 stride[2])
{
    QI_TRY(qi_expect_strided(lse, name, QKV_F32, QI_SHAPE(o->shape[0], o->shape[1])));
    stride[0] = qi_stride(lse, 0);
    stride[1] = qi_stride(lse, 1);
    return QKV_OK;
}

/* What is written stands in a state's place or apart from all that is read. */
static qkv_status check_apart(const DLTensor *out, const char *name, const DLTensor *in, int32_t s)
{
    QI_REQUIRE(qi_same(out, in) || !qi_overlap(out, in),
               "%s: expected state %d's own memory, or memory apart from it", name, (int)s);
    return QKV_OK;
}

static qkv_status read_state(const DLTensor *o, const DLTensor *lse, int32_t s,
                             const DLTensor *out_o, const DLTensor *out_lse, const DLTensor *first,
                             merge_state *state)
{
    char o_name[32], lse_name[32];
    snprintf(o_name, sizeof o_name, "o_states[%d]", (int)s);
    snprintf(lse_name, sizeof lse_name, "lse_states[%d]", (int)s);
    QI_TRY(qi_expect_float(o, o_name, QI_SHAPE(out_o->shape[0], out_o->shape[1], out_o->shape[2])));
    QI_TRY(qi_expect(o, o_name, first->dtype,
                     QI_SHAPE(out_o->shape[0], out_o->shape[1], out_o->shape[2])));
    QI_TRY(read_lse(lse, lse_name, out_o, state->lse_stride));
    QI_TRY(check_apart(out_o, "o", o, s));
    QI_REQUIRE(!qi_overlap(out_o, lse), "o: expected memory apart from lse_states[%d]", (int)s);
    if (out_lse) {
        QI_TRY(check_apart(out_lse, "lse", lse, s));
        QI_REQUIRE(!qi_overlap(out_lse, o), "lse: expected memory apart from o_states[%d]", (int)s);
    }
    state->o = qi_data(o);
    state->lse = qi_data(lse);
    state->o_stride[0] = qi_stride(o, 0);
    state->o_stride[1] = qi_stride(o, 1);
    return QKV_OK;
}

static qkv_status launch_cuda(const qkv_context *ctx, const qi_kernel *row, const merge_params *p,
                              void *stream)
{
    enum { THREADS = 128, WARP = 32 };
    i32 vec = QI_VECTOR(8, p->dim, p->o_stride[0], p->o_stride[1], QI_ADDRESS(p->o, p->dtype_o));
    for (i32 s = 0; s < p->num_states; s++)
        vec = QI_VECTOR(vec, p->states[s].o_stride[0], p->states[s].o_stride[1],
                        QI_ADDRESS(p->states[s].o, p->dtype_state));
    i32 lanes = 4; /* of a row: an access each, as far as a warp goes */
    while (lanes < WARP && lanes * vec < p->dim) lanes *= 2;
    const i32 constants[] = {(i32)p->dtype_o, (i32)p->dtype_state, vec, lanes, THREADS};
    const qi_grid grid = {.x = qi_blocks(p->tokens * p->heads, THREADS / lanes),
                          .threads = THREADS,
                          .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

qkv_status qkv_attention_merge(qkv_context *ctx, DLTensor *o, DLTensor *lse,
                               const DLTensor *const *o_states, const DLTensor *const *lse_states,
                               int32_t num_states, uint32_t flags, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    QI_TRY(qi_expect_float(o, "o", QI_SHAPE(QI_ANY, QI_ANY, QI_ANY)));
    QI_REQUIRE(o->shape[2] <= MAX_DIM, "o: expected a dim of at most %d, got %lld", MAX_DIM,
               (long long)o->shape[2]);
    QI_TRY(qi_expect_distinct(o, "o"));
    QI_REQUIRE(num_states >= 1 && num_states <= QI_MAX_STATES,
               "num_states: expected 1 to %d, got %d", QI_MAX_STATES, (int)num_states);
    QI_REQUIRE(o_states, "o_states: expected an array of tensors, got NULL");
    QI_REQUIRE(lse_states, "lse_states: expected an array of tensors, got NULL");
    QI_REQUIRE((flags & ~(uint32_t)QKV_ATTENTION_LSE_BASE_2) == 0,
               "flags: expected 0 or QKV_ATTENTION_LSE_BASE_2, got %u", (unsigned)flags);
    merge_params params = {
        .o = qi_data(o),
        .o_stride = {qi_stride(o, 0), qi_stride(o, 1)},
        .tokens = o->shape[0],
        .heads = o->shape[1],
        .dim = o->shape[2],
        .dtype_o = (qi_dtype)qi_dtype_of(o->dtype),
        .log2_scale = flags & QKV_ATTENTION_LSE_BASE_2 ? 1.f : LOG2E,
        .num_states = num_states,
    };
    if (lse) {
        QI_TRY(read_lse(lse, "lse", o, params.lse_stride));
        QI_TRY(qi_expect_distinct(lse, "lse"));
        QI_REQUIRE(!qi_overlap(o, lse), "lse: expected memory apart from o");
        params.lse = qi_data(lse);
    }
    for (int32_t s = 0; s < num_states; s++)
        QI_TRY(read_state(o_states[s], lse_states[s], s, o, lse, o_states[0], &params.states[s]));
    params.dtype_state = (qi_dtype)qi_dtype_of(o_states[0]->dtype);
    const int64_t rows = params.tokens * params.heads;
    if (rows == 0) return QKV_OK;

    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_merge_kernels, NULL, &row));
    if (row->device == kDLCUDA) return launch_cuda(ctx, row, &params, stream);
    qi_launch(ctx, row, qi_tasks_for(rows * (params.dim + 1) * 4 * (num_states + 1)), &params);
    return QKV_OK;
}
