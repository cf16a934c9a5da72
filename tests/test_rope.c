/* test_rope.c - RoPE against long double angles, over dtypes, forms, strides, levels and threads.
 * SPDX-License-Identifier: Apache-2.0 */
#include "view.h"

typedef struct rope_case {
    const char *why;
    int64_t nnz, num_qo_heads, num_kv_heads, head_dim; /* num_kv_heads 0: no k */
    qkv_rope_spec spec;
    int32_t furthest; /* positions within +-this */
} rope_case;

static const rope_case cases[] = {
    {"no tokens", 0, 4, 2, 64, {.rotary_dim = 0}, 100},
    {"one pair", 3, 2, 1, 2, {.rotary_dim = 0}, 100},
    {"one pair, interleaved", 3, 2, 1, 2, {.interleaved = 1}, 100},
    {"no heads of k", 5, 3, 0, 16, {.rotary_dim = 0}, 1000},
    {"no heads of q", 5, 0, 2, 16, {.rotary_dim = 0}, 1000},
    {"a small model", 90, 9, 3, 64, {.rotary_dim = 0}, 8192},
    {"a small model from GGUF", 90, 9, 3, 64, {.interleaved = 1}, 8192},
    {"Llama 3.1",
     20,
     8,
     2,
     128,
     {.theta = 500000, .scale = 8, .low_freq = 1, .high_freq = 4, .old_context = 8192},
     131072},
    {"Llama 3.1, interleaved",
     20,
     8,
     2,
     128,
     {.theta = 500000,
      .scale = 8,
      .low_freq = 1,
      .high_freq = 4,
      .old_context = 8192,
      .interleaved = 1},
     131072},
    {"linear scaling", 9, 4, 4, 32, {.theta = 1000, .scale = 3.5f}, 100000},
    {"partial", 7, 3, 2, 80, {.rotary_dim = 20}, 2048},
    {"partial, interleaved, odd rest", 7, 3, 2, 77, {.rotary_dim = 38, .interleaved = 1}, 2048},
    {"partial, odd pairs, odd rest", 7, 3, 2, 77, {.rotary_dim = 46}, 2048},
    {"wide", 3, 2, 1, 512, {.theta = 1000000}, 1000000},
    {"the widest", 2, 1, 1, 4096, {.theta = 1000000}, 4000},
    {"theta 1: one frequency", 4, 1, 1, 64, {.theta = 1}, 100},
    {"far positions, before and after 0", 60, 2, 1, 64, {.rotary_dim = 0}, 10000000},
};

/* By the formula of qkv/rope.h. */
static long double reference_frequency(const qkv_rope_spec *s, int64_t head_dim, int64_t pair)
{
    const int64_t rotary = s->rotary_dim ? s->rotary_dim : head_dim;
    const long double theta = s->theta != 0 ? s->theta : 10000,
                      scale = s->scale != 0 ? s->scale : 1;
    const long double freq = powl(theta, -2.0L * (long double)pair / (long double)rotary);
    if (s->low_freq == 0) return freq / scale;
    const long double w = 2 * 3.14159265358979323846264338327950288L / freq;
    const long double low = s->low_freq, high = s->high_freq, old = s->old_context;
    if (w < old / high) return freq;
    if (w > old / low) return freq / scale;
    const long double smooth = (old / w - low) / (high - low);
    return (1 - smooth) * freq / scale + smooth * freq;
}

/* Compares out with in [nnz, heads, head_dim], rotated by the first `rows` positions. */
static void check_rotated(const rope_case *c, const double *in, const view *out,
                          const int32_t *positions, int64_t rows)
{
    const int64_t heads = out->shape[1], dim = c->head_dim;
    const int64_t rotary = c->spec.rotary_dim ? c->spec.rotary_dim : dim, pairs = rotary / 2;
    long double *freq = malloc((size_t)pairs * sizeof *freq);
    assert_non_null(freq);
    for (int64_t p = 0; p < pairs; p++) freq[p] = reference_frequency(&c->spec, dim, p);
    /* sine and cosine rounded to f32, two products, one sum; and the angle in double */
    const double eps = test_eps(out->t.dtype), slack = 0x1p-24 * 3 + c->furthest * 0x1p-50;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t p = 0; p < pairs; p++) {
            const long double angle = (long double)positions[t] * freq[p];
            const double cosine = (double)cosl(angle), sine = (double)sinl(angle);
            for (int64_t h = 0; h < heads; h++) {
                const int64_t row = (t * heads + h) * dim;
                const int64_t i = row + (c->spec.interleaved ? 2 * p : p);
                const int64_t j = row + (c->spec.interleaved ? 2 * p + 1 : p + pairs);
                const double x = in[i] * cosine - in[j] * sine, y = in[i] * sine + in[j] * cosine;
                const double bound =
                    slack * (fabs(in[i]) + fabs(in[j])) + (out->t.dtype.bits == 16 ? 3e-8 : 0);
                if (!(fabs(view_get(out, i) - x) <= eps * fabs(x) + bound &&
                      fabs(view_get(out, j) - y) <= eps * fabs(y) + bound))
                    fail_msg(
                        "%s: [%lld, %lld] pair %lld at %d: expected %.9g, %.9g, got %.9g, %.9g",
                        c->why, (long long)t, (long long)h, (long long)p, (int)positions[t], x, y,
                        view_get(out, i), view_get(out, j));
            }
        }
    for (int64_t t = 0; t < rows * heads; t++)
        for (int64_t d = rotary; d < dim; d++)
            assert_true(view_get(out, t * dim + d) == in[t * dim + d]); /* copied */
    free(freq);
}

/* Requests of random length, some empty, over the first rows; returns how many rows they cover. */
static int64_t random_requests(const rope_case *c, int32_t *indptr, int32_t *offsets,
                               int32_t *positions, int requests)
{
    indptr[0] = 0;
    for (int r = 0; r < requests; r++) {
        const int64_t left = c->nnz - indptr[r];
        indptr[r + 1] = indptr[r] + (int32_t)(test_below(3) ? test_below(left / 2 + 1) : 0);
        offsets[r] = (int32_t)test_uniform(c->furthest - 100);
        for (int32_t t = indptr[r]; t < indptr[r + 1]; t++)
            positions[t] = offsets[r] + t - indptr[r];
    }
    return indptr[requests];
}

static void check_case(qkv_context *ctx, const rope_case *c, DLDataType dtype, int form)
{
    enum { REQUESTS = 6 };
    const int in_place = form & 1, by_request = form >> 1 & 1;
    const int64_t pad = form >> 2 & 1 ? 3 : 0;
    view q[2], k[2]; /* in, out */
    for (int i = 0; i < 2; i++) {
        view_new(&q[i], dtype, pad, TEST_SHAPE(c->nnz, c->num_qo_heads, c->head_dim));
        view_new(&k[i], dtype, pad, TEST_SHAPE(c->nnz, c->num_kv_heads, c->head_dim));
        view_fill(&q[i], 4);
        view_fill(&k[i], 4);
    }
    const int with_k = c->num_kv_heads > 0, to = in_place ? 0 : 1;
    double *const q0 = view_values(&q[0]), *const k0 = view_values(&k[0]);
    double *const q1 = view_values(&q[to]), *const k1 = view_values(&k[to]);
    int32_t positions[128], indptr[REQUESTS + 1], offsets[REQUESTS];
    for (int64_t t = 0; t < c->nnz; t++) positions[t] = (int32_t)test_uniform(c->furthest);
    const int64_t rows =
        by_request ? random_requests(c, indptr, offsets, positions, REQUESTS) : c->nnz;
    qkv_rope_spec spec = c->spec;
    spec.struct_size = sizeof spec;
    EXPECT_OK(qkv_rope(ctx, &spec, &q[to].t, &q[0].t, with_k ? &k[to].t : NULL,
                       with_k ? &k[0].t : NULL,
                       by_request ? NULL : TENSOR(positions, QKV_I32, c->nnz),
                       by_request ? TENSOR(indptr, QKV_I32, REQUESTS + 1) : NULL,
                       by_request ? TENSOR(offsets, QKV_I32, REQUESTS) : NULL, NULL));
    check_rotated(c, q0, &q[to], positions, rows);
    if (with_k) check_rotated(c, k0, &k[to], positions, rows);
    for (int64_t i = rows * c->num_qo_heads * c->head_dim; i < view_numel(&q[to]); i++)
        assert_true(view_get(&q[to], i) == q1[i]); /* rows of no request */
    for (int64_t i = rows * c->num_kv_heads * c->head_dim; i < view_numel(&k[to]); i++)
        assert_true(view_get(&k[to], i) == k1[i]);
    free(q0);
    free(k0);
    free(q1);
    free(k1);
    for (int i = 0; i < 2; i++) {
        view_check_guards(&q[i]);
        view_check_guards(&k[i]);
        view_free(&q[i]);
        view_free(&k[i]);
    }
}

static void check_grid(qkv_context *ctx, void *user)
{
    (void)user;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int d = 0; d < 3; d++)
            for (int form = 0; form < 8; form++) check_case(ctx, &cases[i], float_dtypes[d], form);
}

static void rope_rotates_by_exact_angles(void **state)
{
    (void)state;
    test_every_level(1, check_grid, NULL);
}

static void rope_rotates_by_exact_angles_on_three_threads(void **state)
{
    (void)state;
    test_every_level(3, check_grid, NULL);
}

/* At the ends of i32 the double angle is still good to half a microradian. */
static void check_extremes(qkv_context *ctx, void *user)
{
    (void)user;
    float x[4][2];
    for (int i = 0; i < 4; i++) x[i][0] = 1, x[i][1] = 0;
    int32_t positions[] = {INT32_MAX, INT32_MIN, INT32_MAX - 1, 0};
    DLTensor *t = TENSOR(x, QKV_F32, 4, 1, 2);
    EXPECT_OK(qkv_rope(ctx, &(qkv_rope_spec){QKV_ROPE_SPEC_INIT}, t, t, NULL, NULL,
                       TENSOR(positions, QKV_I32, 4), NULL, NULL, NULL));
    for (int i = 0; i < 4; i++) {
        assert_true(fabsl((long double)x[i][0] - cosl(positions[i])) < 5e-7L);
        assert_true(fabsl((long double)x[i][1] - sinl(positions[i])) < 5e-7L);
    }
}

static void rope_takes_every_position(void **state)
{
    (void)state;
    test_every_level(1, check_extremes, NULL);
}

/* q and k side by side in one tensor, in place. */
static void check_fused(qkv_context *ctx, void *user)
{
    (void)user;
    enum { TOKENS = 5, HEADS = 3, DIM = 16, WIDTH = HEADS * DIM };
    int32_t positions[TOKENS];
    for (int t = 0; t < TOKENS; t++) positions[t] = 17 * t + 3;
    DLTensor *at = TENSOR(positions, QKV_I32, TOKENS);
    float fused[TOKENS][3][WIDTH], apart[2][TOKENS][WIDTH];
    for (size_t i = 0; i < sizeof fused / sizeof(float); i++)
        (&fused[0][0][0])[i] = (float)test_uniform(1);
    int64_t shape[] = {TOKENS, HEADS, DIM}, strides[] = {3 * WIDTH, DIM, 1};
    DLTensor part[2];
    for (int i = 0; i < 2; i++) {
        part[i] = (DLTensor){.data = fused[0][i],
                             .device = test_device(),
                             .ndim = 3,
                             .dtype = {2, 32, 1},
                             .shape = shape,
                             .strides = strides};
        for (int t = 0; t < TOKENS; t++) memcpy(apart[i][t], fused[t][i], sizeof apart[i][t]);
    }
    DLTensor *const q = TENSOR(apart[0], QKV_F32, TOKENS, HEADS, DIM);
    DLTensor *const k = TENSOR(apart[1], QKV_F32, TOKENS, HEADS, DIM);
    const qkv_rope_spec spec = {QKV_ROPE_SPEC_INIT};
    EXPECT_OK(qkv_rope(ctx, &spec, q, q, k, k, at, NULL, NULL, NULL));
    EXPECT_OK(qkv_rope(ctx, &spec, &part[0], &part[0], &part[1], &part[1], at, NULL, NULL, NULL));
    for (int i = 0; i < 2; i++)
        for (int t = 0; t < TOKENS; t++)
            assert_memory_equal(apart[i][t], fused[t][i], sizeof apart[i][t]);
    part[0].byte_offset = 4; /* now q's last head ends in k's first */
    EXPECT_FAIL(QKV_ERR_INVALID, "k_out: expected q and q_out apart from k and k_out",
                qkv_rope(ctx, &spec, &part[0], &part[0], &part[1], &part[1], at, NULL, NULL, NULL));
}

static void rope_takes_parts_of_a_fused_tensor(void **state)
{
    (void)state;
    test_every_level(1, check_fused, NULL);
}

static void rope_names_the_bad_argument(void **state)
{
    (void)state;
    qkv_context *ctx;
    EXPECT_OK(test_context_create(&ctx));
    float data[4][64];
    memset(data, VIEW_POISON, sizeof data);
    int32_t numbers[] = {0, 2, 4}, rising[] = {1, 2, 4}, falling[] = {0, 2, 1},
            beyond[] = {0, 2, 5};
    const struct {
        const char *why;
        int no_ctx, no_spec;
        qkv_rope_spec spec;
    } specs[] = {
        {"ctx: expected a context", .no_ctx = 1},
        {"spec: expected", .no_spec = 1},
        {"rotary_dim: expected an even number up to head_dim = 8 and 4096, got 3",
         .spec.rotary_dim = 3},
        {"rotary_dim: expected an even number up to head_dim = 8 and 4096, got 10",
         .spec.rotary_dim = 10},
        {"rotary_dim: expected an even number up to head_dim = 8 and 4096, got -2",
         .spec.rotary_dim = -2},
        {"interleaved: expected 0 or 1, got 2", .spec.interleaved = 2},
        {"theta: expected >= 1, or 0 for 10000, got -1", .spec.theta = -1},
        {"theta: expected >= 1, or 0 for 10000, got nan", .spec.theta = NAN},
        {"theta: expected >= 1, or 0 for 10000, got inf", .spec.theta = INFINITY},
        {"scale: expected >= 1, or 0 for none, got 0.5", .spec.scale = 0.5f},
        {"scale: expected >= 1, or 0 for none, got inf", .spec.scale = INFINITY},
        {"low_freq, high_freq: expected 0 < low_freq < high_freq, got 0, 4", .spec.high_freq = 4},
        {"low_freq, high_freq: expected 0 < low_freq < high_freq, got 4, 4",
         .spec = {.low_freq = 4, .high_freq = 4, .old_context = 8192}},
        {"old_context: expected > 0 with low_freq, got 0", .spec = {.low_freq = 1, .high_freq = 4}},
    };
    DLTensor *q = TENSOR(data[0], QKV_F32, 4, 2, 8), *k = TENSOR(data[1], QKV_F32, 4, 1, 8);
    DLTensor *qo = TENSOR(data[2], QKV_F32, 4, 2, 8), *ko = TENSOR(data[3], QKV_F32, 4, 1, 8);
    DLTensor *pos = TENSOR(numbers, QKV_I32, 3), one_head = *qo;
    one_head.strides = (int64_t[]){8, 0, 1};
    int32_t *in_q = (int32_t *)(void *)&data[2][60], *in_k = (int32_t *)(void *)&data[3][28];
    memset(in_q, 0, 16), memset(in_k, 0, 16); /* good ones, but for where they are */
    DLTensor *ptr = TENSOR(numbers, QKV_I32, 3), *off = TENSOR(numbers, QKV_I32, 2);
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        qkv_rope_spec spec = specs[i].spec;
        spec.struct_size = sizeof spec;
        EXPECT_FAIL(QKV_ERR_INVALID, specs[i].why,
                    qkv_rope(specs[i].no_ctx ? NULL : ctx, specs[i].no_spec ? NULL : &spec, qo, q,
                             ko, k, NULL, ptr, off, NULL));
    }
    const struct {
        const char *why;
        DLTensor *q_out;
        const DLTensor *q;
        DLTensor *k_out;
        const DLTensor *k, *positions, *indptr, *offsets;
    } args[] = {
        {"q: expected a tensor, got NULL", qo, NULL, ko, k, NULL, ptr, off},
        {"q: expected dtype f32, f16 or bf16, got i8", qo, TENSOR(data[0], QKV_I8, 4, 2, 8), ko, k,
         NULL, ptr, off},
        {"q: expected shape [*, *, *], got [4, 16]", qo, TENSOR(data[0], QKV_F32, 4, 16), ko, k,
         NULL, ptr, off},
        {"q_out: expected a tensor, got NULL", NULL, q, ko, k, NULL, ptr, off},
        {"q_out: expected shape [4, 2, 8], got [4, 1, 8]", ko, q, ko, k, NULL, ptr, off},
        {"q_out: expected q itself or memory apart from it", TENSOR(data[0] + 1, QKV_F32, 4, 2, 8),
         q, ko, k, NULL, ptr, off},
        {"k, k_out: expected both or neither, got one", qo, q, NULL, k, NULL, ptr, off},
        {"k, k_out: expected both or neither, got one", qo, q, ko, NULL, NULL, ptr, off},
        {"k: expected dtype f32, got bf16", qo, q, ko, TENSOR(data[1], QKV_BF16, 4, 1, 8), NULL,
         ptr, off},
        {"k: expected shape [4, *, 8], got [3, 1, 8]", qo, q, ko, TENSOR(data[1], QKV_F32, 3, 1, 8),
         NULL, ptr, off},
        {"k_out: expected shape [4, 1, 8], got [4, 2, 8]", qo, q, qo, k, NULL, ptr, off},
        {"k_out: expected q and q_out apart from k and k_out", qo, q,
         TENSOR(data[2], QKV_F32, 4, 1, 8), k, NULL, ptr, off},
        {"positions: expected positions, or indptr and offsets, got neither", qo, q, ko, k, NULL,
         NULL, NULL},
        {"positions: expected positions, or indptr and offsets, got neither", qo, q, ko, k, NULL,
         ptr, NULL},
        {"positions: expected NULL with indptr and offsets, got both forms", qo, q, ko, k, pos, ptr,
         NULL},
        {"positions: expected shape [4], got [3]", qo, q, ko, k, pos, NULL, NULL},
        {"positions: expected dtype i32, got i64", qo, q, ko, k, TENSOR(data[0], QKV_I64, 4), NULL,
         NULL},
        {"indptr: expected at least 1 entry, got 0", qo, q, ko, k, NULL,
         TENSOR(numbers, QKV_I32, 0), off},
        {"indptr: expected a first entry of 0, got 1 (entry 0)", qo, q, ko, k, NULL,
         TENSOR(rising, QKV_I32, 3), off},
        {"indptr: expected entries that do not fall, got 1 after 2 (request 1", qo, q, ko, k, NULL,
         TENSOR(falling, QKV_I32, 3), off},
        {"indptr: expected at most 4 rows, got 5", qo, q, ko, k, NULL, TENSOR(beyond, QKV_I32, 3),
         off},
        {"offsets: expected shape [2], got [3]", qo, q, ko, k, NULL, ptr, pos},
        {"q_out: expected elements apart from each other, got stride 0 on axis 1", &one_head, q, ko,
         k, NULL, ptr, off},
        {"positions: expected memory apart from q_out, got an overlap", qo, q, ko, k,
         TENSOR(in_q, QKV_I32, 4), NULL, NULL},
        {"positions: expected memory apart from k_out, got an overlap", qo, q, ko, k,
         TENSOR(in_k, QKV_I32, 4), NULL, NULL},
        {"indptr: expected memory apart from q_out, got an overlap", qo, q, ko, k, NULL,
         TENSOR(in_q, QKV_I32, 3), off},
        {"indptr: expected memory apart from k_out, got an overlap", qo, q, ko, k, NULL,
         TENSOR(in_k, QKV_I32, 3), off},
        {"offsets: expected memory apart from q_out, got an overlap", qo, q, ko, k, NULL, ptr,
         TENSOR(in_q, QKV_I32, 2)},
        {"offsets: expected memory apart from k_out, got an overlap", qo, q, ko, k, NULL, ptr,
         TENSOR(in_k, QKV_I32, 2)},
    };
    for (size_t i = 0; i < sizeof args / sizeof *args; i++)
        if (!test_unchecked(args[i].why))
            EXPECT_FAIL(QKV_ERR_INVALID, args[i].why,
                        qkv_rope(ctx, &(qkv_rope_spec){QKV_ROPE_SPEC_INIT}, args[i].q_out,
                                 args[i].q, args[i].k_out, args[i].k, args[i].positions,
                                 args[i].indptr, args[i].offsets, NULL));
    memset(in_q, VIEW_POISON, 16), memset(in_k, VIEW_POISON, 16);
    for (size_t i = 0; i < sizeof data; i++)
        assert_int_equal(((unsigned char *)data)[i], VIEW_POISON); /* untouched */
    qkv_context_destroy(ctx);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rope_rotates_by_exact_angles),
        cmocka_unit_test(rope_rotates_by_exact_angles_on_three_threads),
        cmocka_unit_test(rope_takes_every_position),
        cmocka_unit_test(rope_takes_parts_of_a_fused_tensor),
        cmocka_unit_test(rope_names_the_bad_argument),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
