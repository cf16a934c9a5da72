/* test_append_options.c - what an append does on the way: 8-bit caches, scales, RoPE of keys and
 * queries; each stored element against the formula in double.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdbool.h>

#include "support.h"

enum { MAX_ROWS = 24, MAX_HEADS = 4, MAX_DIM = 80, PAGES = 12, MAX_PAGE = 8 };

typedef struct append_case {
    int64_t nnz, kv_heads, qo_heads, dim, page;
    int32_t layout;
    DLDataType dtype, cache, q_out;
    bool slots, rope;
    qkv_rope_spec spec;
    float k_scale[MAX_HEADS], v_scale, q_scale;
    float k[MAX_ROWS * MAX_HEADS * MAX_DIM], v[MAX_ROWS * MAX_HEADS * MAX_DIM];
    float q[MAX_ROWS * MAX_HEADS * MAX_DIM], out[MAX_ROWS * MAX_HEADS * MAX_DIM];
    float caches[2][PAGES * MAX_PAGE * MAX_HEADS * MAX_DIM];
    int32_t position[MAX_ROWS], slot[MAX_ROWS];
} append_case;

static DLDataType any_float(void)
{
    const DLDataType types[] = {QKV_F32, QKV_F16, QKV_BF16};
    return types[test_below(3)];
}

static DLDataType any_stored(bool allow_i8)
{
    const DLDataType types[] = {QKV_E4M3, QKV_E5M2, QKV_I8};
    return test_below(4) ? types[test_below(allow_i8 ? 3 : 2)] : any_float();
}

/* Rotated by qkv/rope.h's formula (no scaling), into x; *norm: of the pair of each element. */
static void rotate(const append_case *c, const void *row, int64_t at, double position, double *x,
                   double *norm)
{
    for (int64_t d = 0; d < c->dim; d++) {
        x[d] = test_get(row, c->dtype, at + d);
        norm[d] = fabs(x[d]);
    }
    if (!c->rope) return;
    const int64_t dim = c->spec.rotary_dim ? c->spec.rotary_dim : c->dim;
    for (int64_t i = 0; i < dim / 2; i++) {
        const int64_t a = c->spec.interleaved ? 2 * i : i;
        const int64_t b = c->spec.interleaved ? a + 1 : i + dim / 2;
        const double angle = position * pow(10000, -2.0 * (double)i / (double)dim);
        const double u = x[a], v = x[b];
        x[a] = u * cos(angle) - v * sin(angle);
        x[b] = u * sin(angle) + v * cos(angle);
        norm[a] = norm[b] = hypot(u, v);
    }
}

static void expect_element(const void *stored, DLDataType t, int64_t at, double value, double size,
                           const char *what, int64_t row)
{
    const double largest = t.code == 0 && t.bits == 8 ? 127
                           : t.bits != 8              ? INFINITY
                           : t.code == 10             ? 448
                                                      : 57344;
    const double want = fmax(-largest, fmin(largest, value)), got = test_get(stored, t, at);
    const double smallest = t.bits == 8                   ? (t.code == 0    ? 0.5
                                                             : t.code == 10 ? 0x1p-10
                                                                            : 0x1p-17)
                            : t.code == 2 && t.bits == 16 ? 0x1p-25
                                                          : 0;
    const double eps = t.bits == 8 && t.code == 0 ? 0 : test_eps(t);
    const double allowed = eps * fabs(want) + smallest + 8 * 0x1p-24 * size * (1 + eps);
    if (!(fabs(got - want) <= allowed))
        fail_msg("%s of row %lld: got %.9g, expected %.9g +- %.3g (code %d, %d bits)", what,
                 (long long)row, got, want, allowed, t.code, t.bits);
}

static void draw(append_case *c)
{
    c->nnz = 1 + test_below(MAX_ROWS);
    c->kv_heads = 1 + test_below(MAX_HEADS);
    c->qo_heads = 1 + test_below(MAX_HEADS);
    c->dim = 2 * (1 + test_below(MAX_DIM / 2));
    c->page = 1 + test_below(MAX_PAGE);
    c->layout = test_below(2) ? QKV_NHD : QKV_HND;
    c->dtype = any_float();
    c->cache = any_stored(true);
    c->q_out = any_stored(false);
    c->slots = test_below(2);
    c->rope = test_below(3) > 0;
    c->spec = (qkv_rope_spec){QKV_ROPE_SPEC_INIT, .interleaved = (int32_t)test_below(2)};
    if (test_below(2)) c->spec.rotary_dim = (int32_t)(2 * (1 + test_below(c->dim / 2)));
    for (int h = 0; h < MAX_HEADS; h++) c->k_scale[h] = (float)(0.5 + test_uniform(0.49));
    c->v_scale = (float)(test_below(2) ? 0.02 : 1);
    c->q_scale = 0.25f;
    for (int64_t i = 0; i < c->nnz * c->kv_heads * c->dim; i++) {
        test_put(c->k, c->dtype, i, test_uniform(40));
        test_put(c->v, c->dtype, i, test_uniform(40));
    }
    for (int64_t i = 0; i < c->nnz * c->qo_heads * c->dim; i++)
        test_put(c->q, c->dtype, i, test_uniform(40));
    memset(c->caches, 0x7f, sizeof c->caches);
    memset(c->out, 0x7f, sizeof c->out);
    /* One request whose keys lie in all pages: a row's slot is where its position is. */
    for (int64_t r = 0; r < c->nnz; r++) {
        c->position[r] = (int32_t)(PAGES * c->page - 1 - (r < PAGES * c->page ? r : 0));
        c->slot[r] = test_below(6) ? c->position[r] : -1;
    }
    if (c->nnz > PAGES * c->page) c->nnz = PAGES * c->page;
}

static qkv_status append(qkv_context *ctx, append_case *c, const qkv_kv_append_options *options)
{
    const bool nhd = c->layout == QKV_NHD;
    DLTensor *caches[2];
    test_tensor storage[2];
    for (int i = 0; i < 2; i++)
        caches[i] = &test_tensor_init(&storage[i], c->caches[i], c->cache,
                                      TEST_SHAPE(PAGES, nhd ? c->page : c->kv_heads,
                                                 nhd ? c->kv_heads : c->page, c->dim))
                         ->t;
    DLTensor *k = TENSOR(c->k, c->dtype, c->nnz, c->kv_heads, c->dim);
    DLTensor *v = TENSOR(c->v, c->dtype, c->nnz, c->kv_heads, c->dim);
    if (c->slots)
        return qkv_kv_append_slots(ctx, caches[0], caches[1], c->layout, k, v,
                                   TENSOR(c->slot, QKV_I32, c->nnz), options, NULL);
    int32_t qo_indptr[] = {0, (int32_t)c->nnz}, pages[PAGES], len = (int32_t)(PAGES * c->page);
    for (int i = 0; i < PAGES; i++) pages[i] = i;
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(qo_indptr, QKV_I32, 2),
                                .block_table = TENSOR(pages, QKV_I32, 1, PAGES),
                                .kv_lens = TENSOR(&len, QKV_I32, 1)};
    return qkv_kv_append(ctx, caches[0], caches[1], c->layout, k, v, &index,
                         TENSOR(c->position, QKV_I32, c->nnz), options, NULL);
}

static void check(const append_case *c)
{
    double x[MAX_DIM], norm[MAX_DIM];
    const int64_t slot_stride = c->layout == QKV_NHD ? c->kv_heads * c->dim : c->dim;
    const int64_t head_stride = c->layout == QKV_NHD ? c->dim : c->page * c->dim;
    for (int64_t r = 0; r < c->nnz; r++) {
        for (int64_t h = 0; h < c->kv_heads; h++) {
            const int64_t in = (r * c->kv_heads + h) * c->dim;
            const int64_t out = c->position[r] / c->page * c->page * c->kv_heads * c->dim +
                                c->position[r] % c->page * slot_stride + h * head_stride;
            rotate(c, c->k, in, c->position[r], x, norm);
            for (int64_t d = 0; d < c->dim && !(c->slots && c->slot[r] < 0); d++) {
                const double k_scale = c->k_scale[h], v_scale = c->v_scale;
                expect_element(c->caches[0], c->cache, out + d, x[d] / k_scale, norm[d] / k_scale,
                               "k", r);
                const double v = test_get(c->v, c->dtype, in + d);
                expect_element(c->caches[1], c->cache, out + d, v / v_scale, fabs(v) / v_scale, "v",
                               r);
            }
        }
        for (int64_t h = 0; h < c->qo_heads && c->rope; h++) {
            const int64_t at = (r * c->qo_heads + h) * c->dim;
            rotate(c, c->q, at, c->position[r], x, norm);
            for (int64_t d = 0; d < c->dim; d++)
                expect_element(c->out, c->q_out, at + d, x[d] / (double)c->q_scale,
                               norm[d] / (double)c->q_scale, "q", r);
        }
    }
}

static void try_cases(qkv_context *ctx, void *user)
{
    (void)user;
    static append_case c;
    for (int i = 0; i < 300; i++) {
        draw(&c);
        const qkv_kv_append_options options = {
            QKV_KV_APPEND_OPTIONS_INIT,
            .k_scale = {.tensor = TENSOR(c.k_scale, QKV_F32, c.kv_heads)},
            .v_scale = {.value = c.v_scale},
            .q_scale = {.value = c.q_scale},
            .rope = c.rope ? &c.spec : NULL,
            .q = c.rope ? TENSOR(c.q, c.dtype, c.nnz, c.qo_heads, c.dim) : NULL,
            .q_out = c.rope ? TENSOR(c.out, c.q_out, c.nnz, c.qo_heads, c.dim) : NULL,
            .positions = c.rope && c.slots ? TENSOR(c.position, QKV_I32, c.nnz) : NULL};
        EXPECT_OK(append(ctx, &c, &options));
        check(&c);
    }
}

static void append_rotates_scales_and_rounds(void **state)
{
    (void)state;
    test_every_level(2, try_cases, NULL);
}

/* Each code of an 8-bit type survives the way to f32 and back. */
static void try_codes(qkv_context *ctx, void *user)
{
    (void)user;
    const DLDataType types[] = {QKV_E4M3, QKV_E5M2, QKV_I8};
    for (int t = 0; t < 3; t++) {
        float rows[256], more[256];
        uint8_t stored[2][256];
        for (int i = 0; i < 256; i++)
            rows[i] = more[i] = (float)test_8bit_value(types[t], (uint8_t)i);
        int32_t slot = 0;
        EXPECT_OK(qkv_kv_append_slots(
            ctx, TENSOR(stored[0], types[t], 1, 1, 1, 256),
            TENSOR(stored[1], types[t], 1, 1, 1, 256), QKV_NHD, TENSOR(rows, QKV_F32, 1, 1, 256),
            TENSOR(more, QKV_F32, 1, 1, 256), TENSOR(&slot, QKV_I32, 1), NULL, NULL));
        for (int i = 0; i < 256; i++) {
            const double value = test_8bit_value(types[t], (uint8_t)i);
            const double got = test_8bit_value(types[t], stored[0][i]);
            const double want = isinf(value)             ? copysign(57344, value)
                                : value < -127 && t == 2 ? -127
                                                         : value;
            if (value == value ? got != want : got == got)
                fail_msg("type %d, code %d: %g", t, i, got);
        }
    }
}

static void append_keeps_every_8_bit_code(void **state)
{
    (void)state;
    test_every_level(1, try_codes, NULL);
}

static void append_names_the_bad_option(void **state)
{
    (void)state;
    static append_case c;
    qkv_context *ctx;
    EXPECT_OK(test_context_create(&ctx));
    draw(&c);
    c.slots = true;
    float one = 1, bad[] = {1, 0, 1, 1};
    const qkv_rope_spec rope = {QKV_ROPE_SPEC_INIT};
    DLTensor *q = TENSOR(c.q, c.dtype, c.nnz, c.qo_heads, c.dim);
    DLTensor *out = TENSOR(c.out, QKV_F32, c.nnz, c.qo_heads, c.dim);
    DLTensor *positions = TENSOR(c.position, QKV_I32, c.nnz);
    c.kv_heads = 2;
    const struct {
        const char *why;
        qkv_kv_append_options options;
    } cases[] = {
#define OPTIONS QKV_KV_APPEND_OPTIONS_INIT
        {"options.reserved", {OPTIONS, .reserved = 1}},
        {"k_scale", {OPTIONS, .k_scale = {.value = -1}}},
        {"v_scale", {OPTIONS, .v_scale = {.value = NAN}}},
        {"k_scale: expected > 0, got 0 (head 1)",
         {OPTIONS, .k_scale = {.tensor = TENSOR(bad, QKV_F32, 2)}}},
        {"k_scale: expected [1] or [2], got [3]",
         {OPTIONS, .k_scale = {.tensor = TENSOR(bad, QKV_F32, 3)}}},
        {"v_scale: expected dtype f32", {OPTIONS, .v_scale = {.tensor = TENSOR(&one, QKV_I32, 1)}}},
        {"q, q_out", {OPTIONS, .rope = &rope, .q = q, .positions = positions}},
        {"q: expected NULL without rope", {OPTIONS, .q = q, .q_out = out}},
        {"q_out: expected dtype",
         {OPTIONS, .rope = &rope, .q = q, .positions = positions,
          .q_out = TENSOR(c.out, QKV_I8, c.nnz, c.qo_heads, c.dim)}},
        {"options.positions", {OPTIONS, .rope = &rope}},
        {"options.positions", {OPTIONS, .positions = positions}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        if (!test_unchecked(cases[i].why))
            EXPECT_FAIL(QKV_ERR_INVALID, cases[i].why, append(ctx, &c, &cases[i].options));
    qkv_context_destroy(ctx);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(append_rotates_scales_and_rounds),
        cmocka_unit_test(append_keeps_every_8_bit_code),
        cmocka_unit_test(append_names_the_bad_option),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
