/* variant.c - an attention variant of one's own, checked by a plain loop: the program of
 * docs/variants.md.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <qkv/qkv.h>

#define CHECK(call)                                                                                \
    if ((call) != QKV_OK) {                                                                        \
        fprintf(stderr, "%s\n", qkv_last_error());                                                 \
        exit(1);                                                                                   \
    }
#define TENSOR(data_, dtype_, ...)                                                                 \
    (&(DLTensor){.data = (data_),                                                                  \
                 .device = {kDLCPU, 0},                                                            \
                 .dtype = (dtype_),                                                                \
                 .ndim = (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),                \
                 .shape = (int64_t[]){__VA_ARGS__}})

static const char text[] =
    "#define VARIANT_LOGIT 1\n"
    "QI_FN float variant_logit(const variant_params *v, qi_pos pos, float logit)\n"
    "{\n"
    "    const float distance = qi_abs((float)(pos.qo_pos - pos.kv_pos));\n"
    "    const float r1 = v->r1.data[pos.qo_head * v->r1.stride[0]];\n"
    "    return logit - r1 * qi_log(1.f + v->r2 * distance);\n"
    "}\n";

enum { QO_HEADS = 4, KV_HEADS = 2, DIM = 64, TOKENS = 50 };

static float q[TOKENS * QO_HEADS][DIM], k[TOKENS * KV_HEADS][DIM], v[TOKENS * KV_HEADS][DIM];
static float o[TOKENS * QO_HEADS][DIM];
static float r1[QO_HEADS] = {0.5f, 1.f, 2.f, 4.f}, r2 = 0.3f;

static void run(qkv_context *ctx)
{
    const qkv_param params[] = {
        {.name = "r1", .type = QKV_PARAM_TENSOR, .ndim = 1, .dtype = QKV_F32},
        {.name = "r2", .type = QKV_PARAM_F32},
    };
    const qkv_variant variant = {QKV_VARIANT_INIT, .name = "kerple", .source = text,
                                 .params = params, .num_params = 2};
    const qkv_attention_spec spec = {QKV_ATTENTION_SPEC_INIT,  .num_qo_heads = QO_HEADS,
                                     .num_kv_heads = KV_HEADS, .head_dim_qk = DIM,
                                     .head_dim_vo = DIM,       .mask = QKV_MASK_CAUSAL,
                                     .dtype_q = QKV_F32,       .dtype_kv = QKV_F32,
                                     .dtype_o = QKV_F32,       .variant = &variant};
    const qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 1,
                                         .max_tokens = TOKENS, .max_kv_len = TOKENS};
    qkv_attention *attention;
    CHECK(qkv_attention_create(ctx, &spec, &limits, NULL, &attention)); /* compiles, once */

    int32_t qo_indptr[] = {0, TOKENS}, kv_indptr[] = {0, TOKENS}; /* one prompt, no pages */
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(qo_indptr, QKV_I32, 2),
                                .kv_indptr = TENSOR(kv_indptr, QKV_I32, 2)};
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &index};
    CHECK(qkv_attention_plan(attention, &batch, NULL));

    const qkv_arg args[] = {{.tensor = TENSOR(r1, QKV_F32, QO_HEADS)}, {.f32 = r2}};
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT,
                                 .q = TENSOR(q, QKV_F32, TOKENS, QO_HEADS, DIM),
                                 .k = TENSOR(k, QKV_F32, TOKENS, KV_HEADS, DIM),
                                 .v = TENSOR(v, QKV_F32, TOKENS, KV_HEADS, DIM),
                                 .o = TENSOR(o, QKV_F32, TOKENS, QO_HEADS, DIM),
                                 .args = args,
                                 .num_args = 2};
    CHECK(qkv_attention_run(attention, &io, NULL));
    qkv_attention_destroy(attention);
}

/* The formula, one row and key at a time. */
static double worst_error(void)
{
    double worst = 0;
    for (int row = 0; row < TOKENS * QO_HEADS; row++) {
        const int i = row / QO_HEADS, head = row % QO_HEADS, kv_head = head / 2;
        double want[DIM] = {0}, sum = 0;
        for (int j = 0; j <= i; j++) {
            const float *key = k[j * KV_HEADS + kv_head], *value = v[j * KV_HEADS + kv_head];
            double x = 0;
            for (int d = 0; d < DIM; d++) x += (double)q[row][d] * key[d];
            const double penalty = r1[head] * log(1 + (double)r2 * (i - j));
            const double weight = exp(x / sqrt(DIM) - penalty);
            sum += weight;
            for (int d = 0; d < DIM; d++) want[d] += weight * value[d];
        }
        for (int d = 0; d < DIM; d++) worst = fmax(worst, fabs(o[row][d] - want[d] / sum));
    }
    return worst;
}

static void fill(float (*x)[DIM], int rows)
{
    for (int i = 0; i < rows; i++)
        for (int d = 0; d < DIM; d++) x[i][d] = 2.f * (float)rand() / (float)RAND_MAX - 1.f;
}

int main(void)
{
    fill(q, TOKENS * QO_HEADS);
    fill(k, TOKENS * KV_HEADS);
    fill(v, TOKENS * KV_HEADS);
    qkv_context *ctx;
    CHECK(qkv_context_create(NULL, &ctx));
    run(ctx);
    qkv_context_destroy(ctx);
    const double worst = worst_error();
    printf("largest difference %.1e: %s\n", worst, worst < 1e-5 ? "OK" : "WRONG");
    return worst < 1e-5 ? 0 : 1;
}
