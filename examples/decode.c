/* decode.c - one decode step over a paged KV cache: the README's example, complete.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <qkv/qkv.h>

#define CHECK(call)                                                                                \
    if ((call) != QKV_OK) {                                                                        \
        fprintf(stderr, "%s\n", qkv_last_error());                                                 \
        return 1;                                                                                  \
    }
/* A contiguous CPU tensor over data. */
#define TENSOR(data_, dtype_, ...)                                                                 \
    (&(DLTensor){.data = (data_),                                                                  \
                 .device = {kDLCPU, 0},                                                            \
                 .dtype = (dtype_),                                                                \
                 .ndim = (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),                \
                 .shape = (int64_t[]){__VA_ARGS__}})

static float q[2 * 4 * 64], k[8 * 16 * 2 * 64], v[8 * 16 * 2 * 64], o[2 * 4 * 64];

int main(void)
{
    for (size_t i = 0; i < sizeof q / sizeof q[0]; i++) q[i] = (float)rand() / (float)RAND_MAX;
    for (size_t i = 0; i < sizeof k / sizeof k[0]; i++) k[i] = (float)rand() / (float)RAND_MAX;
    for (size_t i = 0; i < sizeof v / sizeof v[0]; i++) v[i] = 1.f;

    /* The README shows these lines, a field beside the other. */
    /* clang-format off */
    qkv_context *ctx;
    CHECK(qkv_context_create(NULL, &ctx)); /* the CPU, its best instruction set, all its cores */

    const qkv_attention_spec spec = {QKV_ATTENTION_SPEC_INIT,
        .num_qo_heads = 4, .num_kv_heads = 2, .head_dim_qk = 64, .head_dim_vo = 64,
        .page_size = 16, .kv_layout = QKV_NHD, .mask = QKV_MASK_CAUSAL,
        .dtype_q = QKV_F32, .dtype_kv = QKV_F32, .dtype_o = QKV_F32};
    const qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT,
        .max_requests = 8, .max_tokens = 64, .max_kv_len = 128, .max_pages = 64};
    qkv_attention *attention;
    CHECK(qkv_attention_create(ctx, &spec, &limits, NULL, &attention));

    /* Two requests with one new token each: 40 keys in pages 3, 0, 5; 17 keys in pages 1, 7. */
    int32_t qo_indptr[] = {0, 1, 2}, block_table[] = {3, 0, 5, 1, 7, -1}, kv_lens[] = {40, 17};
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(qo_indptr, QKV_I32, 3),
        .block_table = TENSOR(block_table, QKV_I32, 2, 3), .kv_lens = TENSOR(kv_lens, QKV_I32, 2)};
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &index};
    CHECK(qkv_attention_plan(attention, &batch, NULL)); /* once per step */

    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT,
        .q = TENSOR(q, QKV_F32, 2, 4, 64), .k = TENSOR(k, QKV_F32, 8, 16, 2, 64),
        .v = TENSOR(v, QKV_F32, 8, 16, 2, 64), .o = TENSOR(o, QKV_F32, 2, 4, 64)};
    CHECK(qkv_attention_run(attention, &io, NULL)); /* once per layer */
    /* clang-format on */

    printf("%s: o[0] = %.6f, o[last] = %.6f\n", qkv_context_device_name(ctx), (double)o[0],
           (double)o[2 * 4 * 64 - 1]);
    qkv_attention_destroy(attention);
    qkv_context_destroy(ctx);
    return 0;
}
