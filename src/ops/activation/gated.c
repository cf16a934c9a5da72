/* gated.c - host side of qkv_gated_activation: check, choose, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/launch.h"
#include "ops/activation/gated_params.h"
#include "qkv/activation.h"

QI_CPU_DECLARE(gated);

_Static_assert((int)GATED_SILU == QKV_SILU && (int)GATED_GELU == QKV_GELU &&
                   (int)GATED_GELU_TANH == QKV_GELU_TANH,
               "the kernel's kinds are those of qkv/activation.h");

const qi_kernel qi_gated_kernels[] = {
    QI_CPU_ROW("gated.any", NULL, gated),
    QI_CUDA_ROW("gated.cuda", NULL, "ops/activation/gated.cu", "gated",
                "DTYPE VEC KIND TIMES THREADS"),
    {0},
};

/* A row is cut into equal pieces of up to 256 threads with 2 accesses of either input each. */
static qkv_status launch_cuda(const qkv_context *ctx, const qi_kernel *row, const gated_params *p,
                              void *stream)
{
    enum { WARP = 32, MOST = 256, MAX_Y = 65535 };
    const i32 vec = QI_VECTOR(16 / (i32)qi_dtype_bytes(p->dtype), p->size, p->gate_stride,
                              p->up_stride, p->out_stride, QI_ADDRESS(p->gate, p->dtype),
                              QI_ADDRESS(p->up, p->dtype), QI_ADDRESS(p->out, p->dtype));
    const i64 accesses = p->size / vec, pieces = (accesses + 2 * MOST - 1) / (2 * MOST);
    const i32 times = accesses > WARP ? 2 : 1;
    const i64 lanes = (accesses + pieces * times - 1) / (pieces * times);
    const i32 threads = (i32)(lanes + WARP - 1) / WARP * WARP;
    const i32 constants[] = {(i32)p->dtype, vec, p->kind, times, threads};
    const qi_grid grid = {.x = (u32)pieces,
                          .y = (u32)(p->num_tokens < MAX_Y ? p->num_tokens : MAX_Y),
                          .threads = (u32)threads,
                          .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

qkv_status qkv_gated_activation(qkv_context *ctx, DLTensor *out, const DLTensor *gate,
                                const DLTensor *up, int32_t kind, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    QI_TRY(qi_expect_float(gate, "gate", QI_SHAPE(QI_ANY, QI_ANY)));
    const int64_t num_tokens = gate->shape[0], size = gate->shape[1];
    QI_TRY(qi_expect(up, "up", gate->dtype, QI_SHAPE(num_tokens, size)));
    QI_TRY(qi_expect(out, "out", gate->dtype, QI_SHAPE(num_tokens, size)));
    QI_REQUIRE(kind == QKV_SILU || kind == QKV_GELU || kind == QKV_GELU_TANH,
               "kind: expected QKV_SILU, QKV_GELU or QKV_GELU_TANH, got %d", (int)kind);
    QI_TRY(qi_expect_distinct(out, "out"));
    QI_REQUIRE((qi_same(out, gate) || !qi_overlap(out, gate)) &&
                   (qi_same(out, up) || !qi_overlap(out, up)),
               "out: expected gate or up itself, or memory apart from them, got an overlap");
    if (num_tokens == 0 || size == 0) return QKV_OK;

    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_gated_kernels, NULL, &row));
    const int64_t bytes =
        num_tokens * size * (int64_t)qi_dtype_bytes((qi_dtype)qi_dtype_of(gate->dtype));
    const gated_params params = {
        .out = qi_data(out),
        .gate = qi_data(gate),
        .up = qi_data(up),
        .out_stride = qi_stride(out, 0),
        .gate_stride = qi_stride(gate, 0),
        .up_stride = qi_stride(up, 0),
        .num_tokens = num_tokens,
        .size = size,
        .dtype = (qi_dtype)qi_dtype_of(gate->dtype),
        .kind = kind,
        .streams = !qi_same(out, gate) && !qi_same(out, up) && qi_streams(bytes),
    };
    if (row->device == kDLCUDA) return launch_cuda(ctx, row, &params, stream);
    qi_launch(ctx, row, qi_tasks_for(3 * bytes), &params);
    return QKV_OK;
}
