/* attention_run.h - running an attention case: an operator on a guarded workspace, and every byte
 * of the outputs judged. What is not a result must stay NaN. SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_ATTENTION_RUN_H
#define QKV_TESTS_ATTENTION_RUN_H

#include "attention_case.h"

/* ---- an operator ------------------------------------------------------------------------- */

/* An operator on blocks of exactly the reported sizes, with a guard behind each. */
enum { CASE_GUARD_BYTES = 256 };
typedef struct case_op {
    qkv_attention *op;
    qkv_workspace workspace;
} case_op;

static inline void *case_guarded(uint64_t bytes)
{
    const size_t n = (size_t)bytes + CASE_GUARD_BYTES;
    char *p = aligned_alloc(64, (n + 63) / 64 * 64);
    assert_non_null(p);
    memset(p, 0xff, (size_t)bytes); /* nothing need be zeroed */
    memset(p + bytes, 0x5a, CASE_GUARD_BYTES);
    return p;
}

static inline void case_guard_check(const void *block, uint64_t bytes, const char *what)
{
    const unsigned char *guard = (const unsigned char *)block + bytes;
    for (int i = 0; i < CASE_GUARD_BYTES; i++)
        if (guard[i] != 0x5a) fail_msg("written %d bytes behind the %s workspace", i, what);
}

/* Does the operator go to the row that multiplies e4m3 by e4m3? */
static inline bool case_multiplies_e4m3(qkv_context *ctx, const attn_case *a)
{
    const qkv_attention_spec *s = &a->config.spec;
    char reasons[4096];
    if (s->dtype_q.code != TEST_E4M3 || s->dtype_kv.code != TEST_E4M3) return false;
    CASE_OK(a, qkv_attention_can_run(ctx, s, &a->limits, reasons, sizeof reasons));
    return strstr(reasons, "attention.wgmma: runs") != NULL;
}

static inline case_op case_op_new(qkv_context *ctx, attn_case *a)
{
    const qkv_attention_spec *spec = &a->config.spec;
    const qkv_attention_limits *limits = &a->limits;
    qkv_workspace_size size;
    CASE_OK(a, qkv_attention_workspace_size(ctx, spec, limits, &size));
    assert_true((size.pinned_bytes > 0) == test_on_cuda());
    case_op op = {.workspace = {QKV_WORKSPACE_INIT, .plan_bytes = size.plan_bytes,
                                .scratch_bytes = size.scratch_bytes,
                                .pinned_bytes = size.pinned_bytes}};
    op.workspace.plan = case_guarded(size.plan_bytes);
    op.workspace.scratch = case_guarded(size.scratch_bytes);
    op.workspace.pinned = case_guarded(size.pinned_bytes);
    CASE_OK(a, qkv_attention_create(ctx, spec, limits, &op.workspace, &op.op));
    a->fp8_products = case_multiplies_e4m3(ctx, a);
    return op;
}

static inline void case_op_free(case_op *op)
{
    case_guard_check(op->workspace.plan, op->workspace.plan_bytes, "plan");
    case_guard_check(op->workspace.scratch, op->workspace.scratch_bytes, "scratch");
    case_guard_check(op->workspace.pinned, op->workspace.pinned_bytes, "pinned");
    qkv_attention_destroy(op->op);
    free(op->workspace.plan), free(op->workspace.scratch), free(op->workspace.pinned);
}

/* ---- results ------------------------------------------------------------------------------ */

static inline void case_expect_poison(const case_view *view, const char *name)
{
    const unsigned char *p = view->x.owned;
    for (size_t i = 0; i < view->bytes; i++)
        if (p[i] != 0xff) fail_msg("%s: byte %zu is no result and was written", name, i);
}

/* Takes the results out of o and lse, and checks that nothing else of them was written. */
static inline void case_collect(attn_case *a)
{
    const int64_t heads = a->config.spec.num_qo_heads, vo = a->config.spec.head_dim_vo;
    const size_t size = test_bytes(a->config.spec.dtype_o);
    for (int64_t i = 0; i < a->tokens * heads; i++) {
        const int64_t t = i / heads, h = i % heads;
        char *o = (char *)case_data(&a->o) +
                  (size_t)(t * a->o.x.strides[0] + h * a->o.x.strides[1]) * size;
        memcpy((char *)a->got_o + (size_t)(i * vo) * size, o, (size_t)vo * size);
        memset(o, 0xff, (size_t)vo * size);
        if (!a->io.lse) continue;
        float *lse =
            (float *)case_data(&a->lse) + t * a->lse.x.strides[0] + h * a->lse.x.strides[1];
        a->got_lse[i] = *lse;
        memset(lse, 0xff, sizeof *lse);
    }
    case_expect_poison(&a->o, "o");
    case_expect_poison(&a->lse, "lse");
}

/* Outputs are NaN before: case_view_new and case_collect leave them so. */
static inline void case_run(attn_case *a, qkv_attention *op)
{
    CASE_OK(a, qkv_attention_run(op, &a->io, NULL));
    case_collect(a);
}

static inline void case_judge(const attn_case *a, const char *device, const char *what, int64_t i,
                              double got, double want, double allowed)
{
    const double error = fabs(got - want);
    if (error <= allowed || got == want) return; /* a NaN fails; so does a wrong infinity */
    case_print(a->number, &a->config);
    const int64_t heads = a->config.spec.num_qo_heads;
    fail_msg("%s: %s of token %lld, head %lld: got %.9g, expected %.9g +- %.3g", device, what,
             (long long)(i / heads), (long long)(i % heads), got, want, allowed);
}

/* Adding up n terms in f32, in whatever order, errs by no more than this times the sum of their
 * magnitudes. The worst case is n e; the roundings being independent, more than 7 sqrt(n) e happens
 * less than once in 10^10 sums (Higham and Mary 2019, a probabilistic error analysis). */
static inline double case_sum_error(int64_t n)
{
    return 0x1p-24 * fmin((double)n, 7 * sqrt((double)n));
}

/*
 * Against the reference. What f32 rounding can do, with e = 2^-24:
 *   logit   adding up head_dim terms, then a rounding each of the scales' product (3), of log2(e), of
 *           their product with the sum and of x - max (twice as large); tanh, as wrong as four units
 *           of the cap; ALiBi's bias likewise; rotation, 4 e of a pair's length for q and for k
 *   weight  that of its logit, four units of the exponential, and as many of one rescaling; through
 *           the denominator also that of the sink's share; one below 2^-125 may become 0
 *   o       its weights' errors; adding up num_keys terms above and below the fraction; division,
 *           v_scale and o_scale
 * and store, which saturates 8-bit types. Where products take 16-bit types, each weight is rounded to one
 * (test_weight_eps), which the sum below does not see: independent errors, again by 7 standard deviations. Where it is
 * e4m3 (fp8_products) that is 2^-4 of the weight, or, of one that is small, 2^-16 of a sum of all (multiples of 2^-9
 * beside a weight of 2^6). And tensor cores cut off what is 2^13 times smaller than the sum: on an H100 6e-4 of the
 * terms' magnitudes for 128 of them that have the same sign, 2.1e-3 for 256, which is below 2^-16 a term.
 *   lse     a logit's error, the sum's, and two roundings of the logarithm's parts
 */
static inline void case_check(attn_case *a, const char *device)
{
    const qkv_attention_spec *s = &a->config.spec;
    const double weight_eps =
        a->fp8_products ? test_eps(QKV_E4M3) : test_weight_eps(device, s->dtype_q, s->dtype_kv);
    const double e = 0x1p-24, o_eps = test_eps(s->dtype_o);
    const double soft_cap = !(s->features & QKV_FEATURE_SOFT_CAP) ? 0
                            : a->config.io_soft_cap > 0           ? (double)a->config.io_soft_cap
                                                                  : (double)s->logits_soft_cap;
    const double log_base = s->flags & QKV_ATTENTION_LSE_BASE_2 ? log(2) : 1;
    const double cut = a->fp8_products && !test_is_emulated() ? 0x1p-16 : 0; /* of a term */
    const double dot_error = case_sum_error(s->head_dim_qk) + cut * s->head_dim_qk +
                             (s->features & QKV_FEATURE_ROPE ? 8 * e : 0);
    const double largest = test_largest(s->dtype_o);
    for (int64_t i = 0; i < a->tokens * s->num_qo_heads; i++) {
        const attention_ref_row *row = &a->ref_rows[i];
        const double logit =
            dot_error * row->max_dot + e * (9 * row->max_logit + 6 * row->max_bias + 4 * soft_cap);
        const double sum = case_sum_error(row->num_keys) + 8 * e + 4 * e * row->sink;
        const double rounded = weight_eps * fmin(row->mean_v, 7 * row->rms_v);
        const double underflow =
            (a->fp8_products ? 0x1p-16 : 0x1p-125) * (double)row->num_keys * row->max_v;
        const double o_error = (2 * logit + 2 * sum + 4 * e + cut * 128) * row->mean_v + rounded +
                               underflow + test_tiny(s->dtype_o);
        for (int64_t d = 0; d < s->head_dim_vo; d++) {
            const double want = fmax(-largest, fmin(largest, a->ref_o[i * s->head_dim_vo + d]));
            case_judge(a, device, "o", i, test_get(a->got_o, s->dtype_o, i * s->head_dim_vo + d),
                       want, o_error + o_eps * (fabs(want) + o_error));
        }
        if (!a->io.lse) continue;
        const double lse_error = (row->num_keys ? logit + sum : 4 * e * row->sink) / log_base;
        case_judge(a, device, "lse", i, (double)a->got_lse[i], row->lse,
                   isinf(row->lse) ? 0 : lse_error + 2 * e * fabs(row->lse));
    }
}

static inline size_t case_o_bytes(const attn_case *a)
{
    return (size_t)(a->tokens * a->config.spec.num_qo_heads * a->config.spec.head_dim_vo) *
           test_bytes(a->config.spec.dtype_o);
}

static inline size_t case_lse_bytes(const attn_case *a)
{
    return (size_t)(a->tokens * a->config.spec.num_qo_heads) * sizeof(float);
}

/* Plan, run and check on a fresh operator. */
static inline void case_try(attn_case *a, qkv_context *ctx)
{
    case_op op = case_op_new(ctx, a);
    CASE_OK(a, qkv_attention_plan(op.op, &a->batch, NULL));
    case_run(a, op.op);
    case_check(a, qkv_context_device_name(ctx));
    case_op_free(&op);
}

/* ---- how much to do ----------------------------------------------------------------------- */

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define CASE_SANITIZED 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CASE_SANITIZED 1
#endif
#ifndef CASE_SANITIZED
#define CASE_SANITIZED 0
#endif

/* QKV_TEST_CASES sets the number of random cases; sanitizers make each some ten times slower. */
static inline int64_t case_count(int64_t n)
{
    const char *text = getenv("QKV_TEST_CASES");
    return text ? strtoll(text, NULL, 0) : CASE_SANITIZED ? n / 10 : n;
}

#endif
