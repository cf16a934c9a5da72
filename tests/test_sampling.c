/* test_sampling.c - qkv_argmax and qkv_sample against a sort in double, at every level.
 * SPDX-License-Identifier: Apache-2.0 */
#include <float.h>

#include "support.h"

#include "kern/philox.h"

#define MAX_VOCAB 70000

static const DLDataType dtypes[] = {{2, 32, 1}, {2, 16, 1}, {4, 16, 1}}; /* f32, f16, bf16 */

/* ---- random numbers --------------------------------------------------------------------------- */

/* The known answers that the generator's authors publish with it. */
static void philox_gives_the_published_numbers(void **state)
{
    (void)state;
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } cases[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        qi_philox4 counter;
        memcpy(counter.v, cases[i].counter, sizeof counter.v);
        const qi_philox4 out = qi_philox(counter, cases[i].key[0], cases[i].key[1]);
        assert_memory_equal(out.v, cases[i].out, sizeof out.v);
    }
}

/* ---- argmax ----------------------------------------------------------------------------------- */

static const struct {
    const char *why;
    int64_t batch, vocab;
} shapes[] = {
    {"no rows", 0, 5},
    {"one of each", 1, 1},
    {"a short row", 3, 7},
    {"vectors and a rest", 2, 131},
    {"more rows than threads", 9, 1000},
    {"a real vocab", 2, 49152},
    {"odd and large", 1, 65537},
};

static void argmax_at_level(qkv_context *ctx, void *user)
{
    (void)user;
    for (size_t c = 0; c < sizeof shapes / sizeof shapes[0]; c++) {
        for (int d = 0; d < 3; d++) {
            const int64_t batch = shapes[c].batch, vocab = shapes[c].vocab, pitch = vocab + 3;
            void *logits = malloc((size_t)(batch * pitch + 1) * test_bytes(dtypes[d]));
            int32_t tokens[16], expected[16];
            for (int64_t i = 0; i < batch * pitch; i++)
                test_put(logits, dtypes[d], i, i % pitch < vocab ? test_uniform(20) : INFINITY);
            for (int64_t r = 0; r < batch; r++) {
                /* some NaN, some -inf, sometimes an equal pair of maxima */
                for (int n = 0; n < 3; n++) {
                    test_put(logits, dtypes[d], r * pitch + test_below(vocab), NAN);
                    test_put(logits, dtypes[d], r * pitch + test_below(vocab), -INFINITY);
                }
                if (test_below(2))
                    for (int n = 0; n < 2; n++)
                        test_put(logits, dtypes[d], r * pitch + test_below(vocab), 21);
                expected[r] = 0;
                double best = -INFINITY;
                for (int64_t i = 0; i < vocab; i++) {
                    const double x = test_get(logits, dtypes[d], r * pitch + i);
                    if (x > best) {
                        best = x;
                        expected[r] = (int32_t)i;
                    }
                }
                tokens[r] = -1;
            }
            test_tensor x;
            test_tensor_init(&x, logits, dtypes[d], TEST_SHAPE(batch, vocab));
            x.strides[0] = pitch;
            EXPECT_OK(qkv_argmax(ctx, TENSOR(tokens, QKV_I32, batch), &x.t, NULL));
            for (int64_t r = 0; r < batch; r++)
                if (tokens[r] != expected[r])
                    fail_msg("%s: row %d: got %d, expected %d", shapes[c].why, (int)r, tokens[r],
                             expected[r]);
            free(logits);
        }
    }
}

static void argmax_equals_a_scan_at_every_level(void **state)
{
    (void)state;
    test_every_level(2, argmax_at_level, NULL);
}

static void argmax_special_at_level(qkv_context *ctx, void *user)
{
    (void)user;
    const float nan = NAN, inf = INFINITY;
    const float rows[][4] = {
        {nan, nan, nan, nan}, {-inf, -inf, -inf, -inf}, {nan, -inf, nan, -3e38f},
        {1, inf, inf, nan},   {-0.f, 0, 0, -0.f},       {-1, -2, -0.5f, -0.5f},
    };
    const int32_t expected[] = {0, 0, 3, 1, 0, 2};
    float logits[6][4];
    int32_t tokens[6] = {-1, -1, -1, -1, -1, -1};
    memcpy(logits, rows, sizeof rows);
    EXPECT_OK(qkv_argmax(ctx, TENSOR(tokens, QKV_I32, 6), TENSOR(logits, QKV_F32, 6, 4), NULL));
    assert_memory_equal(tokens, expected, sizeof tokens);
}

static void argmax_defines_nan_infinities_and_ties(void **state)
{
    (void)state;
    test_every_level(1, argmax_special_at_level, NULL);
}

/* ---- sampling: the reference ------------------------------------------------------------------ */

typedef struct item {
    double logit;
    int32_t index;
} item;

static int by_logit(const void *a, const void *b)
{
    const item *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return (x->index > y->index) - (x->index < y->index);
}

typedef struct options {
    float temperature, top_p, min_p;
    int32_t top_k;
    uint64_t seed, offset;
} options;

/*
 * Is token what the definition in qkv/sampling.h gives? The library's masses are fixed-point
 * numbers of at least 2^-44 of the largest, so where the definition's sums come within `slack` of a
 * boundary either side is right.
 */
static int is_right(const void *logits, DLDataType dtype, int64_t row, int64_t vocab, options o,
                    int32_t token)
{
    static item items[MAX_VOCAB];
    const double slack = 1e-9;
    int64_t n = 0;
    for (int64_t i = 0; i < vocab; i++) {
        const double x = test_get(logits, dtype, row + i);
        if (x > -INFINITY) items[n++] = (item){x, (int32_t)i};
    }
    qsort(items, (size_t)n, sizeof items[0], by_logit);
    if (n == 0) return token == 0;
    if (o.temperature == 0) return token == items[0].index;
#define MASS(i) exp((items[i].logit - items[0].logit) / (double)o.temperature)
    if (o.top_k > 0 && o.top_k < n) n = o.top_k;
    double sum = 0, total = 0;
    for (int64_t i = 0; i < n; i++) total += MASS(i);
    int64_t kept = 0;
    while (kept < n && (kept == 0 || sum < total * ((double)o.top_p - slack))) sum += MASS(kept++);
    /* every count of kept tokens that rounding allows: nearly always one */
    for (int64_t end = kept; end <= n; end++) {
        double mass = 0;
        for (int64_t i = 0; i < end && MASS(i) >= (double)o.min_p * (1 - slack); i++)
            mass += MASS(i);
        const double u = (double)qi_philox_u64(o.seed, o.offset) / 0x1p64 * mass;
        double below = 0;
        for (int64_t i = 0; i < end; i++) {
            if (u < below - slack * mass) break;
            if (items[i].index == token && u <= below + MASS(i) + slack * mass) return 1;
            below += MASS(i);
        }
        if (end < n && sum > total * ((double)o.top_p + slack)) break;
        if (end < n) sum += MASS(end);
    }
#undef MASS
    return 0;
}

static options random_options(void)
{
    static const float temperatures[] = {0, 0.01f, 0.7f, 1, 3, 1e30f};
    static const float top_ps[] = {1e-6f, 0.1f, 0.9f, 0.999f, 1};
    static const float min_ps[] = {0, 0.01f, 0.3f, 1};
    static const int32_t top_ks[] = {0, 1, 2, 40, 1000, 1000000};
    return (options){
        .temperature = temperatures[test_below(6)],
        .top_p = top_ps[test_below(5)],
        .min_p = min_ps[test_below(4)],
        .top_k = top_ks[test_below(6)],
        .seed = test_u64(),
        .offset = test_below(2) ? test_u64() : (uint64_t)test_below(100),
    };
}

/* Logits of several kinds: smooth, all equal, few values (many ties), masked, steep. */
static double random_logit(int64_t kind)
{
    switch (kind) {
    case 0: return test_uniform(8);
    case 1: return 1.5;
    case 2: return (double)test_below(4);
    case 3: return test_below(10) ? -INFINITY : test_uniform(5);
    case 4: return -1000 * fabs(test_uniform(1));
    default: return test_below(50) ? test_uniform(1) : NAN;
    }
}

#define ROWS 4

static void sample_at_level(qkv_context *ctx, void *user)
{
    (void)user;
    static const int64_t vocabs[] = {1, 2, 17, 300, 1024, 1025, 5000, 50257};
    for (int trial = 0; trial < 200; trial++) {
        const int64_t vocab = vocabs[trial % (trial < 180 ? 7 : 8)], pitch = vocab + test_below(9);
        const DLDataType dtype = dtypes[test_below(3)];
        const int64_t kind = test_below(6);
        void *logits = malloc((size_t)(ROWS * pitch) * test_bytes(dtype));
        for (int64_t i = 0; i < ROWS * pitch; i++)
            test_put(logits, dtype, i, i % pitch < vocab ? random_logit(kind) : INFINITY);
        options o[ROWS];
        float temperature[ROWS], top_p[ROWS], min_p[ROWS];
        int32_t top_k[ROWS], tokens[ROWS];
        uint64_t seed[ROWS], offset[ROWS];
        for (int r = 0; r < ROWS; r++) {
            o[r] = random_options();
            temperature[r] = o[r].temperature;
            top_p[r] = o[r].top_p;
            min_p[r] = o[r].min_p;
            top_k[r] = o[r].top_k;
            seed[r] = o[r].seed;
            offset[r] = o[r].offset;
            tokens[r] = -1;
        }
        test_tensor x;
        test_tensor_init(&x, logits, dtype, TEST_SHAPE(ROWS, vocab));
        x.strides[0] = pitch;
        const qkv_sampling_params params = {
            QKV_SAMPLING_PARAMS_INIT,
            .temperature = TENSOR(temperature, QKV_F32, ROWS),
            .top_k = TENSOR(top_k, QKV_I32, ROWS),
            .top_p = TENSOR(top_p, QKV_F32, ROWS),
            .min_p = TENSOR(min_p, QKV_F32, ROWS),
            .seed = TENSOR(seed, QKV_U64, ROWS),
            .offset = TENSOR(offset, QKV_U64, ROWS),
        };
        EXPECT_OK(qkv_sample(ctx, TENSOR(tokens, QKV_I32, ROWS), &x.t, &params, NULL));
        for (int r = 0; r < ROWS; r++) {
            if (!is_right(logits, dtype, r * pitch, vocab, o[r], tokens[r]))
                fail_msg("trial %d: vocab %d, kind %d, row %d: temperature %g, top_k %d, top_p %g, "
                         "min_p %g, seed %llu, offset %llu: token %d is not the one",
                         trial, (int)vocab, (int)kind, r, (double)o[r].temperature, o[r].top_k,
                         (double)o[r].top_p, (double)o[r].min_p, (unsigned long long)o[r].seed,
                         (unsigned long long)o[r].offset, tokens[r]);
            /* alone, the same row draws the same token */
            int32_t alone = -1;
            x.t.shape[0] = 1;
            x.t.byte_offset = (uint64_t)(r * pitch) * test_bytes(dtype);
            const qkv_sampling_params one = {
                QKV_SAMPLING_PARAMS_INIT,
                .temperature = TENSOR(&temperature[r], QKV_F32, 1),
                .top_k = TENSOR(&top_k[r], QKV_I32, 1),
                .top_p = TENSOR(&top_p[r], QKV_F32, 1),
                .min_p = TENSOR(&min_p[r], QKV_F32, 1),
                .seed = TENSOR(&seed[r], QKV_U64, 1),
                .offset = TENSOR(&offset[r], QKV_U64, 1),
            };
            EXPECT_OK(qkv_sample(ctx, TENSOR(&alone, QKV_I32, 1), &x.t, &one, NULL));
            assert_int_equal(alone, tokens[r]);
        }
        free(logits);
    }
}

static void sample_equals_a_sort_at_every_level(void **state)
{
    (void)state;
    test_every_level(2, sample_at_level, NULL);
}

/* ---- sampling: the distribution --------------------------------------------------------------- */

enum { MAX_DRAWS = 20000, FEW_DRAWS = 2000 };
#define KINDS 12

static void sample_draws_the_distribution(void **state)
{
    (void)state;
    static int32_t tokens[MAX_DRAWS];
    static uint64_t seed[MAX_DRAWS], offset[MAX_DRAWS];
    static float logits[MAX_DRAWS][KINDS];
    const int draws = test_is_emulated() ? FEW_DRAWS : MAX_DRAWS;
    double p[KINDS], total = 0;
    float row[KINDS];
    for (int i = 0; i < KINDS; i++) {
        row[i] = (float)test_uniform(1.5);
        p[i] = exp((double)row[i]);
        total += p[i];
    }
    const uint64_t one_seed = test_u64();
    for (int d = 0; d < draws; d++) {
        memcpy(logits[d], row, sizeof row);
        seed[d] = one_seed;
        offset[d] = (uint64_t)d;
    }
    qkv_context *ctx;
    EXPECT_OK(test_context_create(&ctx));
    const qkv_sampling_params params = {QKV_SAMPLING_PARAMS_INIT,
                                        .seed = TENSOR(seed, QKV_U64, draws),
                                        .offset = TENSOR(offset, QKV_U64, draws)};
    EXPECT_OK(qkv_sample(ctx, TENSOR(tokens, QKV_I32, draws), TENSOR(logits, QKV_F32, draws, KINDS),
                         &params, NULL));
    qkv_context_destroy(ctx);
    double seen[KINDS] = {0}, chi_square = 0;
    for (int d = 0; d < draws; d++) seen[tokens[d]]++;
    for (int i = 0; i < KINDS; i++) {
        const double expected = draws * p[i] / total;
        chi_square += (seen[i] - expected) * (seen[i] - expected) / expected;
    }
    /* 11 degrees of freedom: above 45 once in 2e5 runs */
    if (chi_square > 45) fail_msg("chi-square %.1f", chi_square);
}

/* ---- errors ------------------------------------------------------------------------------------ */

static void sampling_names_the_bad_argument(void **state)
{
    (void)state;
    qkv_context *ctx;
    EXPECT_OK(test_context_create(&ctx));
    float logits[2][8] = {{0}}, temperature[2] = {1, -1}, top_p[2] = {0.5f, 0}, min_p[2] = {0, 2};
    float good[2] = {1, 1};
    int32_t tokens[2] = {-7, -7}, top_k[2] = {-3, 4};
    uint64_t seed[2] = {0};
    DLTensor *t = TENSOR(tokens, QKV_I32, 2), *x = TENSOR(logits, QKV_F32, 2, 8);
    DLTensor *s = TENSOR(seed, QKV_U64, 2);
#define SAMPLE(...)                                                                                \
    qkv_sample(ctx, t, x, &(qkv_sampling_params){QKV_SAMPLING_PARAMS_INIT, __VA_ARGS__}, NULL)
    const qkv_status invalid = QKV_ERR_INVALID;
    EXPECT_FAIL(invalid, "ctx", qkv_argmax(NULL, t, x, NULL));
    EXPECT_FAIL(invalid, "tokens", qkv_argmax(ctx, NULL, x, NULL));
    EXPECT_FAIL(invalid, "logits", qkv_argmax(ctx, t, NULL, NULL));
    EXPECT_FAIL(invalid, "tokens", qkv_argmax(ctx, TENSOR(tokens, QKV_I32, 1), x, NULL));
    EXPECT_FAIL(invalid, "tokens", qkv_argmax(ctx, TENSOR(tokens, QKV_F32, 2), x, NULL));
    EXPECT_FAIL(invalid, "vocab", qkv_argmax(ctx, t, TENSOR(logits, QKV_F32, 2, 0), NULL));
    EXPECT_FAIL(invalid, "tokens: expected memory apart from logits, got an overlap",
                qkv_argmax(ctx, TENSOR(logits, QKV_I32, 2), x, NULL));
    EXPECT_FAIL(
        invalid, "ctx",
        qkv_sample(NULL, t, x, &(qkv_sampling_params){QKV_SAMPLING_PARAMS_INIT, .seed = s}, NULL));
    EXPECT_FAIL(invalid, "params", qkv_sample(ctx, t, x, NULL, NULL));
    EXPECT_FAIL(invalid, "params", qkv_sample(ctx, t, x, &(qkv_sampling_params){.seed = s}, NULL));
    EXPECT_FAIL(invalid, "seed", SAMPLE(.seed = NULL));
    EXPECT_FAIL(invalid, "params.reserved: expected 0, got 1", SAMPLE(.seed = s, .reserved = 1));
    EXPECT_FAIL(invalid, "seed", SAMPLE(.seed = TENSOR(seed, QKV_U64, 1)));
    EXPECT_FAIL(invalid, "offset", SAMPLE(.seed = s, .offset = TENSOR(top_k, QKV_I32, 2)));
    EXPECT_FAIL(invalid, "top_k: expected memory apart from tokens, got an overlap",
                SAMPLE(.seed = s, .top_k = t));
    if (!test_on_cuda()) { /* where values are not looked at */
        EXPECT_FAIL(invalid, "temperature[1]",
                    SAMPLE(.seed = s, .temperature = TENSOR(temperature, QKV_F32, 2)));
        EXPECT_FAIL(invalid, "top_k[0]", SAMPLE(.seed = s, .top_k = TENSOR(top_k, QKV_I32, 2)));
        EXPECT_FAIL(invalid, "top_p[1]", SAMPLE(.seed = s, .top_p = TENSOR(top_p, QKV_F32, 2)));
        EXPECT_FAIL(invalid, "min_p[1]", SAMPLE(.seed = s, .min_p = TENSOR(min_p, QKV_F32, 2)));
        good[1] = NAN;
        EXPECT_FAIL(invalid, "temperature[1]: expected >= 0 and finite, got nan",
                    SAMPLE(.seed = s, .temperature = TENSOR(good, QKV_F32, 2)));
        EXPECT_FAIL(invalid, "top_p[1]: expected in (0, 1], got nan",
                    SAMPLE(.seed = s, .top_p = TENSOR(good, QKV_F32, 2)));
        EXPECT_FAIL(invalid, "min_p[1]: expected in [0, 1], got nan",
                    SAMPLE(.seed = s, .min_p = TENSOR(good, QKV_F32, 2)));
        good[1] = INFINITY;
        EXPECT_FAIL(invalid, "temperature[1]: expected >= 0 and finite, got inf",
                    SAMPLE(.seed = s, .temperature = TENSOR(good, QKV_F32, 2)));
    }
#undef SAMPLE
    assert_int_equal(tokens[0], -7);
    assert_int_equal(tokens[1], -7);
    good[1] = FLT_MAX; /* finite, and good */
    EXPECT_OK(qkv_sample(ctx, t, x,
                         &(qkv_sampling_params){QKV_SAMPLING_PARAMS_INIT, .seed = s,
                                                .temperature = TENSOR(good, QKV_F32, 2)},
                         NULL));
    qkv_context_destroy(ctx);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(philox_gives_the_published_numbers),
        cmocka_unit_test(argmax_equals_a_scan_at_every_level),
        cmocka_unit_test(argmax_defines_nan_infinities_and_ties),
        cmocka_unit_test(sample_equals_a_sort_at_every_level),
        cmocka_unit_test(sample_draws_the_distribution),
        cmocka_unit_test(sampling_names_the_bad_argument),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
