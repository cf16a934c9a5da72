/* test_bad_input.c - every fault that a tensor can have, in every place of the stateless operators: a
 * status and a message about it, and nothing written.
 * SPDX-License-Identifier: Apache-2.0 */
#include "bad_input.h"

/* ---- activation and norm ------------------------------------------------------------------- */

static qkv_status run_gated(DLTensor *const *t)
{
    return qkv_gated_activation(ctx, t[0], t[1], t[2], QKV_SILU, NULL);
}

static qkv_status run_rmsnorm(DLTensor *const *t)
{
    return qkv_rmsnorm(ctx, t[0], t[1], t[2], 1e-6f, 0, NULL);
}

static qkv_status run_add_rmsnorm(DLTensor *const *t)
{
    return qkv_add_rmsnorm(ctx, t[0], t[1], t[2], t[3], 1e-6f, 0, NULL);
}

/* ---- matrix product ------------------------------------------------------------------------ */

static qkv_status run_gemm(DLTensor *const *t)
{
    return qkv_gemm(ctx, t[0], t[1], t[2], NULL);
}

static qkv_status run_gemm_quantized(DLTensor *const *t)
{
    return qkv_gemm_quantized(ctx, t[0], t[1], t[2], QKV_WEIGHT_Q4_0, NULL);
}

/* ---- rope ---------------------------------------------------------------------------------- */

static const qkv_rope_spec rope = {QKV_ROPE_SPEC_INIT};

static qkv_status run_rope(DLTensor *const *t)
{
    return qkv_rope(ctx, &rope, t[0], t[1], t[2], t[3], t[4], NULL, NULL, NULL);
}

static qkv_status run_rope_by_request(DLTensor *const *t)
{
    return qkv_rope(ctx, &rope, t[0], t[1], NULL, NULL, NULL, t[2], t[3], NULL);
}

/* ---- sampling ------------------------------------------------------------------------------ */

static qkv_status run_argmax(DLTensor *const *t)
{
    return qkv_argmax(ctx, t[0], t[1], NULL);
}

static qkv_status run_sample(DLTensor *const *t)
{
    const qkv_sampling_params params = {QKV_SAMPLING_PARAMS_INIT,
                                        .temperature = t[2],
                                        .top_k = t[3],
                                        .top_p = t[4],
                                        .min_p = t[5],
                                        .seed = t[6],
                                        .offset = t[7]};
    return qkv_sample(ctx, t[0], t[1], &params, NULL);
}

static qkv_status run_top_k(DLTensor *const *t)
{
    return qkv_top_k(ctx, t[0], t[1], t[2], 1, NULL);
}

static qkv_status run_log_probs(DLTensor *const *t)
{
    return qkv_log_probs(ctx, t[0], t[1], t[2], t[3], NULL);
}

static qkv_status run_renormalize(DLTensor *const *t)
{
    const qkv_sampling_params params = {
        QKV_SAMPLING_PARAMS_INIT, .kind = QKV_PROBS, .top_k = t[2], .top_p = t[3],
        .typical_p = t[4],        .indices = t[5],   .valid = t[6]};
    return qkv_renormalize(ctx, t[0], t[1], &params, NULL);
}

static qkv_status run_mask_logits(DLTensor *const *t)
{
    const qkv_sampling_params params = {
        QKV_SAMPLING_PARAMS_INIT, .repetition = t[2],   .frequency = t[3], .presence = t[4],
        .counts = t[5],           .prompt = t[6],       .bias = t[7],      .bitmask = t[8],
        .temperature = t[9],      .top_n_sigma = t[10], .top_k = t[11]};
    return qkv_mask_logits(ctx, t[0], t[1], &params, NULL);
}

static qkv_status run_verify(DLTensor *const *t)
{
    const qkv_verify_io io = {QKV_VERIFY_IO_INIT, .accepted = t[0], .num_accepted = t[1],
                              .tokens = t[2],     .target = t[3],   .draft_tokens = t[4],
                              .draft = t[5],      .parents = t[6],  .seed = t[7],
                              .offset = t[8]};
    return qkv_verify(ctx, &io, NULL);
}

/* ---- merge --------------------------------------------------------------------------------- */

static qkv_status run_merge(DLTensor *const *t)
{
    const DLTensor *const o[] = {t[2], t[3]}, *const lse[] = {t[4], t[5]};
    return qkv_attention_merge(ctx, t[0], t[1], o, lse, 2, 0, NULL);
}

/* ---- the calls ----------------------------------------------------------------------------- */

static const int32_t positions[] = {0, 7, -3, 1 << 20}, indptr[] = {0, 1, 4}, offsets[] = {5, -5};
static const float zeros[28], ones[] = {1, 1, 1, 1, 1, 1, 1, 1};
static const int32_t top_k[] = {0, 1, 5, INT32_MAX};
static const int32_t picked[] = {0, 1, 2, 3, 4, 5, 6, -1, 7, INT32_MIN, INT32_MAX, 0};
static const int32_t row_of[] = {0, 1, 2, 0, 1, 2, 0, 1};
static const uint64_t seeds[4];

static const bad_entry request_entries[] = {
    {"indptr", 0, 1, NULL},
    {"indptr", 0, -1, NULL},
    {"indptr", 1, INT32_MIN, NULL},
    {"indptr", 1, 5, NULL},
    {"indptr", 2, 0, NULL},
    {"indptr", 2, INT32_MAX, NULL},
    {0},
};

static const bad_entry sample_entries[] = {
    {"temperature", 3, -1, NULL},
    {"temperature", 0, NAN, NULL},
    {"temperature", 1, INFINITY, NULL},
    {"top_k", 2, -1, NULL},
    {"top_k", 0, INT32_MIN, NULL},
    {"top_p", 0, 0, NULL},
    {"top_p", 1, 1.5, NULL},
    {"top_p", 2, -0.5, NULL},
    {"top_p", 3, NAN, NULL},
    {"min_p", 0, -0.5, NULL},
    {"min_p", 1, 1.5, NULL},
    {"min_p", 3, NAN, NULL},
    {0},
};

static const bad_entry mask_entries[] = {
    {"repetition", 1, 0, NULL}, {"repetition", 0, NAN, NULL}, {"frequency", 2, INFINITY, NULL},
    {"presence", 0, NAN, NULL}, {"top_n_sigma", 3, 0, NULL},  {0},
};

static const bad_entry renormalize_entries[] = {
    {"typical_p", 1, 0, NULL},
    {"typical_p", 0, 1.5, NULL},
    {0},
};

static const bad_call calls[] = {
    {.what = "gated_activation",
     .run = run_gated,
     .args = {ARG("out", F32, SHAPE(3, 16), .output = true),
              ARG("gate", F32, SHAPE(3, 16), .also = "up"), ARG("up", F32, SHAPE(3, 16))}},
    {.what = "rmsnorm",
     .run = run_rmsnorm,
     .args = {ARG("out", BF16, SHAPE(3, 16), .output = true),
              ARG("x", BF16, SHAPE(3, 16), .also = "out"), ARG("weight", F32, SHAPE(16))}},
    {.what = "add_rmsnorm",
     .run = run_add_rmsnorm,
     .args = {ARG("out", F32, SHAPE(3, 16), .output = true),
              ARG("residual", F32, SHAPE(3, 16), .output = true),
              ARG("x", F32, SHAPE(3, 16), .also = "out"), ARG("weight", F32, SHAPE(16))}},
    {.what = "gemm",
     .run = run_gemm,
     .args = {ARG("out", F32, SHAPE(3, 5), .output = true),
              ARG("x", F16, SHAPE(3, 16), .also = "w out"),
              ARG("w", BF16, SHAPE(5, 16), .also = "out")}},
    {.what = "gemm_quantized",
     .run = run_gemm_quantized,
     .args = {ARG("out", BF16, SHAPE(3, 5), .output = true),
              ARG("x", F32, SHAPE(3, 64), .also = "w out"),
              ARG("w", U8, SHAPE(5, 36), .also = "out")}},
    {.what = "rope",
     .run = run_rope,
     .args = {ARG("q_out", F32, SHAPE(4, 2, 8), .output = true),
              ARG("q", F32, SHAPE(4, 2, 8), .also = "q_out rotary_dim"),
              ARG("k_out", F32, SHAPE(4, 3, 8), .output = true),
              ARG("k", F32, SHAPE(4, 3, 8), .also = "k_out"),
              ARG("positions", I32, SHAPE(4), .init = positions)}},
    {.what = "rope by request",
     .run = run_rope_by_request,
     .entries = request_entries,
     .args = {ARG("q_out", F16, SHAPE(4, 2, 8), .output = true),
              ARG("q", F16, SHAPE(4, 2, 8), .also = "q_out rotary_dim"),
              ARG("indptr", I32, SHAPE(3), .init = indptr, .also = "offsets positions"),
              ARG("offsets", I32, SHAPE(2), .init = offsets, .also = "positions")}},
    {.what = "argmax",
     .run = run_argmax,
     .args = {ARG("tokens", I32, SHAPE(4), .output = true),
              ARG("logits", F16, SHAPE(4, 7), .also = "tokens", .longer = 2, .shorter = 2)}},
    {.what = "sample",
     .run = run_sample,
     .entries = sample_entries,
     .args = {ARG("tokens", I32, SHAPE(4), .output = true),
              ARG("rows", F32, SHAPE(4, 7), .also = "tokens temperature", .longer = 2,
                  .shorter = 2),
              ARG("temperature", F32, SHAPE(4), .init = ones, .optional = true),
              ARG("top_k", I32, SHAPE(4), .init = top_k, .optional = true),
              ARG("top_p", F32, SHAPE(4), .init = ones, .optional = true),
              ARG("min_p", F32, SHAPE(4), .init = zeros, .optional = true),
              ARG("seed", U64, SHAPE(4), .init = seeds),
              ARG("offset", U64, SHAPE(4), .init = seeds, .optional = true)}},
    {.what = "renormalize",
     .run = run_renormalize,
     .entries = renormalize_entries,
     .args = {ARG("probs", BF16, SHAPE(8, 7), .output = true),
              ARG("rows", F32, SHAPE(3, 7), .also = "probs", .longer = 1, .shorter = 1),
              ARG("top_k", I32, SHAPE(8), .init = row_of, .optional = true),
              ARG("top_p", F32, SHAPE(8), .init = ones, .optional = true),
              ARG("typical_p", F32, SHAPE(8), .init = ones, .optional = true),
              ARG("indices", I32, SHAPE(8), .init = row_of, .also = "valid top_p"),
              ARG("valid", U8, SHAPE(8), .output = true, .optional = true)}},
    {.what = "mask_logits",
     .run = run_mask_logits,
     .entries = mask_entries,
     .args = {ARG("out", F32, SHAPE(4, 7), .output = true),
              ARG("rows", F16, SHAPE(4, 7), .also = "out repetition counts"),
              ARG("repetition", F32, SHAPE(4), .init = ones, .also = "prompt"),
              ARG("frequency", F32, SHAPE(4), .init = ones, .optional = true),
              ARG("presence", F32, SHAPE(4), .init = ones, .optional = true),
              ARG("counts", I32, SHAPE(4, 7), .init = zeros),
              ARG("prompt", I32, SHAPE(4, 1), .init = zeros, .optional = true),
              ARG("bias", BF16, SHAPE(4, 7), .init = zeros, .optional = true),
              ARG("bitmask", I32, SHAPE(4, 1), .init = seeds, .optional = true),
              ARG("temperature", F32, SHAPE(4), .init = ones, .optional = true),
              ARG("top_n_sigma", F32, SHAPE(4), .init = ones, .optional = true),
              ARG("top_k", I32, SHAPE(4), .init = top_k, .optional = true)}},
    {.what = "top_k",
     .run = run_top_k,
     .args = {ARG("values", BF16, SHAPE(4, 5), .output = true, .optional = true),
              ARG("indices", I32, SHAPE(4, 5), .output = true, .also = "values"),
              ARG("rows", BF16, SHAPE(4, 7), .also = "indices values", .longer = 2, .shorter = 2)}},
    {.what = "log_probs",
     .run = run_log_probs,
     .args = {ARG("log_probs", F32, SHAPE(4, 3), .output = true),
              ARG("ranks", I32, SHAPE(4, 3), .output = true, .optional = true),
              ARG("logits", F16, SHAPE(4, 7), .also = "tokens log_probs", .longer = 2,
                  .shorter = 2),
              ARG("tokens", I32, SHAPE(4, 3), .init = picked, .also = "log_probs ranks")}},
    {.what = "verify",
     .run = run_verify,
     .args = {ARG("accepted", I32, SHAPE(4, 3), .output = true),
              ARG("num_accepted", I32, SHAPE(4), .output = true),
              ARG("tokens", I32, SHAPE(4, 3), .output = true),
              ARG("target", F32, SHAPE(4, 3, 7), .also = "accepted draft"),
              ARG("draft_tokens", I32, SHAPE(4, 2), .init = row_of),
              ARG("draft", F32, SHAPE(4, 2, 7), .optional = true),
              ARG("parents", I32, SHAPE(4, 2), .init = zeros, .optional = true),
              ARG("seed", U64, SHAPE(4), .init = seeds),
              ARG("offset", U64, SHAPE(4), .init = seeds, .optional = true)}},
    {.what = "attention_merge",
     .run = run_merge,
     .args = {ARG("o", F16, SHAPE(3, 2, 8), .output = true, .also = "lse o_states[0]"),
              ARG("lse", F32, SHAPE(3, 2), .output = true, .optional = true, .strided = true),
              ARG("o_states[0]", F32, SHAPE(3, 2, 8)), ARG("o_states[1]", F32, SHAPE(3, 2, 8)),
              ARG("lse_states[0]", F32, SHAPE(3, 2), .init = zeros, .strided = true),
              ARG("lse_states[1]", F32, SHAPE(3, 2), .init = zeros, .strided = true)}},
};

static void operators_name_the_faulty_tensor(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(calls); i++) bad_check(&calls[i]);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(operators_name_the_faulty_tensor),
    };
    return cmocka_run_group_tests_name("bad_input", tests, bad_open, bad_close);
}
