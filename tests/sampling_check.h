/* sampling_check.h - runs a call of sampling_case.h on every context, and compares with the reference.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_SAMPLING_CHECK_H
#define QKV_TESTS_SAMPLING_CHECK_H

#include "sampling_case.h"

enum { CHECK_POISON = -7 };

/* EXPECT_OK that says of what call. */
#define CHECK_OK(c, expr)                                                                          \
    do {                                                                                           \
        const qkv_status check_ = (expr);                                                          \
        if (check_ != QKV_OK) fail_msg("%s: %s", case_text(c, 0), qkv_last_error());               \
        const int on_gpu_ = test_synchronize();                                                    \
        if (on_gpu_ != 0) fail_msg("%s: the GPU ended with error %d", case_text(c, 0), on_gpu_);   \
    } while (0)

/* Of a call's seeds and the flag that it writes. */
static inline void check_set_draws(sampling_case *c, bool draws)
{
    c->params.seed = draws ? &c->tensors[10].t : NULL;
    c->params.offset = draws ? &c->tensors[11].t : NULL;
    c->params.valid = &c->tensors[12].t;
    memset(c->valid, 99, (size_t)c->spec.batch);
}

static inline void check_valid(const sampling_case *c, int64_t i, const ref_row *r)
{
    if (!ref_valid_is_right(r, c->valid[i]))
        fail_msg("%s: valid is %d", case_text(c, i), c->valid[i]);
}

/* Contexts one and later give what context 0 gave. */
static inline void check_same(const sampling_case *c, int context, const void *got,
                              const void *expected, size_t bytes)
{
    if (context > 0 && memcmp(got, expected, bytes) != 0)
        fail_msg("%s: %s and %s give different bits", case_text(c, 0), contexts.name[0],
                 contexts.name[context]);
}

/* Returns the tokens; the caller frees them. */
static inline int32_t *check_draw(sampling_case *c)
{
    const int64_t batch = c->spec.batch;
    const size_t bytes = (size_t)batch * sizeof(int32_t);
    int32_t *tokens = malloc(bytes + 1), *others = malloc(bytes + 1);
    uint8_t *valid = malloc((size_t)batch + 1);
    for (int k = 0; k < contexts.n; k++) {
        int32_t *const out = k ? others : tokens;
        for (int64_t i = 0; i < batch; i++) out[i] = CHECK_POISON;
        check_set_draws(c, true);
        EXPECT_OK(
            qkv_sample(contexts.ctx[k], TENSOR(out, QKV_I32, batch), &c->rows.t, &c->params, NULL));
        check_same(c, k, out, tokens, bytes);
        check_same(c, k, c->valid, valid, (size_t)batch);
        memcpy(valid, c->valid, (size_t)batch);
    }
    free(others), free(valid);
    return tokens;
}

static inline void check_sample(sampling_case *c)
{
    int32_t *tokens = check_draw(c);
    ref_row r = ref_row_new(c->spec.vocab);
    for (int64_t i = 0; i < c->spec.batch; i++) {
        case_reference(c, i, case_stages(c), &r);
        if (!ref_token_is_right(&r, &c->request[i], tokens[i]))
            fail_msg("%s: token %d is not the one", case_text(c, i), tokens[i]);
        check_valid(c, i, &r);
    }
    ref_row_free(&r);
    free(tokens);
}

typedef qkv_status filter_op(qkv_context *ctx, DLTensor *out, const DLTensor *rows,
                             const qkv_sampling_params *params, void *stream);

/* A filter's output, of a dtype or (in_place) over a copy of the rows. The caller frees the view. */
static inline view check_filter(sampling_case *c, filter_op *op, DLDataType dtype, bool in_place)
{
    const sampling_spec *s = &c->spec;
    view out;
    view_new(&out, dtype, s->strided ? 7 : 0, TEST_SHAPE(s->batch, s->vocab));
    if (in_place) { /* the same tensor in a block of its own */
        view_free(&out);
        out = c->rows;
        out.t.shape = out.shape;
        out.t.strides = out.strides;
        out.block = malloc(out.bytes);
        assert_non_null(out.block);
        out.t.data = out.block;
    }
    unsigned char *first = malloc(out.bytes);
    uint8_t *valid = malloc((size_t)s->batch + 1);
    assert_non_null(first);
    for (int k = 0; k < contexts.n; k++) {
        if (in_place)
            memcpy(out.block, c->rows.block, out.bytes);
        else
            memset(out.block, VIEW_POISON, out.bytes);
        check_set_draws(c, false);
        CHECK_OK(c, op(contexts.ctx[k], &out.t, in_place ? &out.t : &c->rows.t, &c->params, NULL));
        check_same(c, k, out.block, first, out.bytes);
        check_same(c, k, c->valid, valid, (size_t)s->batch);
        memcpy(first, out.block, out.bytes);
        memcpy(valid, c->valid, (size_t)s->batch);
    }
    free(first), free(valid);
    return out;
}

/* Is x what a number from low to high gives, stored as this dtype? */
static inline bool check_between(DLDataType dtype, double x, double low, double high)
{
    const double tiny = fmax(test_tiny(dtype), 0x1p-148); /* of f32, which may be rounded before */
    return x >= view_rounded(dtype, low) - tiny && x <= view_rounded(dtype, high) + tiny;
}

static inline void check_renormalize(sampling_case *c, DLDataType dtype, bool in_place)
{
    const int64_t batch = c->spec.batch, vocab = c->spec.vocab;
    view out = check_filter(c, qkv_renormalize, dtype, in_place);
    ref_row r = ref_row_new(vocab);
    double *low = malloc((size_t)vocab * 2 * sizeof *low), *high = low + vocab;
    for (int64_t i = 0; i < batch; i++) {
        case_reference(c, i, case_stages(c), &r);
        ref_probabilities(&r, low, high);
        for (int64_t t = 0; t < vocab; t++) {
            const double p = view_get(&out, i * vocab + t);
            if (!(p == 0 && r.fate[t] != REF_KEPT) &&
                !(r.fate[t] != REF_DROPPED && check_between(out.t.dtype, p, low[t], high[t])))
                fail_msg("%s: token %d of value %.9g, %s, has probability %.9g, not %.9g to %.9g",
                         case_text(c, i), (int)t, r.value[t],
                         r.fate[t] == REF_KEPT      ? "kept"
                         : r.fate[t] == REF_DROPPED ? "dropped"
                                                    : "open",
                         p, low[t], high[t]);
        }
        check_valid(c, i, &r);
    }
    ref_row_free(&r);
    free(low);
    view_check_guards(&out);
    view_free(&out);
}

static inline void check_mask(sampling_case *c, DLDataType dtype, bool in_place)
{
    const int64_t batch = c->spec.batch, vocab = c->spec.vocab;
    view out = check_filter(c, qkv_mask_logits, dtype, in_place);
    ref_row r = ref_row_new(vocab);
    for (int64_t i = 0; i < batch; i++) {
        case_reference(c, i, c->spec.given, &r);
        for (int64_t t = 0; t < vocab; t++) {
            const double l = view_get(&out, i * vocab + t);
            const double kept = view_rounded(out.t.dtype, r.value[t]);
            if (!(l == (double)-INFINITY && r.fate[t] != REF_KEPT) &&
                !(l == kept && r.fate[t] != REF_DROPPED))
                fail_msg("%s: token %d, %s with %.9g, is %.9g", case_text(c, i), (int)t,
                         r.fate[t] == REF_KEPT      ? "kept"
                         : r.fate[t] == REF_DROPPED ? "dropped"
                                                    : "open",
                         kept, l);
        }
        check_valid(c, i, &r);
    }
    ref_row_free(&r);
    view_check_guards(&out);
    view_free(&out);
}

#endif
