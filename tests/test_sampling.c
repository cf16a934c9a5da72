/* test_sampling.c - qkv_argmax, and the draw of qkv_sample without a filter: from logits and from probabilities,
 * of every size of row and batch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "sampling_check.h"

#include "kern/philox.h"

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
    {"vectors of several blocks", 2, 140000},
};

static void argmax_at_level(qkv_context *ctx, void *user)
{
    (void)user;
    for (size_t c = 0; c < sizeof shapes / sizeof shapes[0]; c++) {
        for (int d = 0; d < 3; d++) {
            const int64_t batch = shapes[c].batch, vocab = shapes[c].vocab;
            const int64_t pitch = vocab + (vocab % 8 ? 3 : 8);
            void *logits = malloc((size_t)(batch * pitch + 1) * test_bytes(float_dtypes[d]));
            int32_t tokens[16], expected[16];
            for (int64_t i = 0; i < batch * pitch; i++)
                test_put(logits, float_dtypes[d], i,
                         i % pitch < vocab ? test_uniform(20) : INFINITY);
            for (int64_t r = 0; r < batch; r++) {
                /* some NaN, some -inf, sometimes an equal pair of maxima */
                for (int n = 0; n < 3; n++) {
                    test_put(logits, float_dtypes[d], r * pitch + test_below(vocab), NAN);
                    test_put(logits, float_dtypes[d], r * pitch + test_below(vocab), -INFINITY);
                }
                if (test_below(2))
                    for (int n = 0; n < 2; n++)
                        test_put(logits, float_dtypes[d], r * pitch + test_below(vocab), 21);
                expected[r] = 0;
                double best = -INFINITY;
                for (int64_t i = 0; i < vocab; i++) {
                    const double x = test_get(logits, float_dtypes[d], r * pitch + i);
                    if (x > best) {
                        best = x;
                        expected[r] = (int32_t)i;
                    }
                }
                tokens[r] = -1;
            }
            test_tensor x;
            test_tensor_init(&x, logits, float_dtypes[d], TEST_SHAPE(batch, vocab));
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

/* ---- the draw ------------------------------------------------------------------------------------ */

static const int64_t vocabs[] = {1, 2, 127, 32000, 128256, 151936, 256000, 500000, QKV_MAX_VOCAB};

static void rows_of_every_size(void **state)
{
    (void)state;
    for (size_t v = 0; v < sizeof vocabs / sizeof *vocabs; v++)
        for (int kind = 0; kind < 2; kind++) {
            const sampling_spec spec = {
                .batch = 2,
                .vocab = sampling_vocab(vocabs[v]),
                .dtype = float_dtypes[test_below(3)],
                .kind = kind,
                .shape = (int)test_below(ROW_DIRTY + 1),
                .strided = test_below(2),
                .indexed = test_below(2),
            };
            sampling_case *c = case_new(&spec);
            check_sample(c);
            case_free(c);
        }
}

static void random_rows(void **state)
{
    (void)state;
    static const int64_t some[] = {1, 2, 3, 31, 127, 1024, 1025, 4099, 33000};
    for (int n = sampling_cases(120); n > 0; n--) {
        const uint64_t few = sampling_few();
        sampling_spec spec = {
            .batch = 1 + test_below(9),
            .vocab = sampling_vocab(some[test_below(n % 10 ? 8 : 9)]),
            .dtype = float_dtypes[test_below(3)],
            .kind = (int32_t)test_below(2),
            .given = test_below(2) ? STAGE(TEMPERATURE) : 0,
            .shared = test_below(2) ? STAGE(TEMPERATURE) : 0,
            .shape = -1,
            .strided = test_below(2),
            .indexed = test_below(2),
        };
        sampling_go_on(few);
        if (spec.kind == QKV_PROBS) spec.given = 0;
        sampling_case *c = case_new(&spec);
        check_sample(c);
        case_free(c);
    }
}

/* Few tokens hold the mass: on a GPU one block finds the prefix among those listed, and draws. */
static void steep_rows_with_top_p(void **state)
{
    (void)state;
    static const int64_t some[] = {40, 2000, 9000, 30000};
    for (int v = 0; v < 4; v++)
        for (int kind = 0; kind < 2; kind++) {
            const sampling_spec spec = {
                .batch = test_is_emulated() ? 6 : 40,
                .vocab = some[v],
                .dtype = test_below(3) ? QKV_F32 : float_dtypes[test_below(3)],
                .kind = kind,
                .given = STAGE(TOP_P),
                .shape = ROW_STEEP,
            };
            sampling_case *c = case_new(&spec);
            check_sample(c);
            case_free(c);
        }
}

/* So many rows that a GPU has no room for their blocks at once: the first of a row ends it alone, while others make room, and
 * where nobody asks for `valid` they are gone by then. */
static void crowds_of_rows_with_top_p(void **state)
{
    (void)state;
    enum { MOST = 48 };
    static const int64_t some[] = {40000, 70001, 131072};
    for (int n = 0; n < (test_is_emulated() ? 2 : 3) * ROW_NUM_SHAPES; n++) {
        const int v = n / ROW_NUM_SHAPES, kind = v == 1 ? QKV_PROBS : QKV_LOGITS;
        const sampling_spec spec = {
            .batch = test_is_emulated() || !sampling_compiles() ? 3 : MOST,
            .vocab = some[v],
            .dtype = v == 1 ? QKV_BF16 : QKV_F32,
            .kind = kind,
            .given = STAGE(TOP_P) | (kind == QKV_LOGITS ? STAGE(TEMPERATURE) : 0),
            .shape = n % ROW_NUM_SHAPES,
        };
        sampling_case *c = case_new(&spec);
        check_sample(c);
        static int32_t tokens[MOST];
        int32_t *const expected = check_draw(c);
        c->params.valid = NULL;
        for (int k = 0; k < contexts.n; k++) {
            EXPECT_OK(qkv_sample(contexts.ctx[k], TENSOR(tokens, QKV_I32, spec.batch), &c->rows.t,
                                 &c->params, NULL));
            check_same(c, 1, tokens, expected, (size_t)spec.batch * sizeof *tokens);
        }
        free(expected);
        case_free(c);
    }
}

static void batches_of_every_size(void **state)
{
    (void)state;
    static const int64_t batches[] = {0, 1, 2, 3, 64, 257, 1000, 4096};
    for (size_t b = 0; b < sizeof batches / sizeof *batches; b++) {
        const sampling_spec spec = {
            .batch = test_is_emulated() && batches[b] > 64 ? 65 : batches[b],
            .vocab = 1 + test_below(200),
            .dtype = float_dtypes[test_below(3)],
            .kind = (int32_t)test_below(2),
            .shape = -1,
        };
        sampling_case *c = case_new(&spec);
        check_sample(c);
        case_free(c);
    }
}

/* The token where masses, added up in order of index, first exceed u * their sum: by hand. */
static void masses_add_up_in_order_of_index(void **state)
{
    (void)state;
    enum { TOKENS = 8, DRAWS = 256 };
    /* of 16: whole numbers and their halves, so that sums and products are exact */
    static const float row[TOKENS] = {0, 3, 0.5f, 0, 8, 1, 3.5f, 0};
    static float rows[DRAWS][TOKENS];
    static uint64_t seed[DRAWS];
    static int32_t tokens[DRAWS];
    for (int d = 0; d < DRAWS; d++) {
        memcpy(rows[d], row, sizeof row);
        seed[d] = test_u64();
    }
    const qkv_sampling_params params = {QKV_SAMPLING_PARAMS_INIT, .kind = QKV_PROBS,
                                        .seed = TENSOR(seed, QKV_U64, DRAWS)};
    for (int k = 0; k < contexts.n; k++) {
        memset(tokens, 0xff, sizeof tokens);
        EXPECT_OK(qkv_sample(contexts.ctx[k], TENSOR(tokens, QKV_I32, DRAWS),
                             TENSOR(rows, QKV_F32, DRAWS, TOKENS), &params, NULL));
        for (int d = 0; d < DRAWS; d++) {
            const uint64_t random = qi_philox_u64(seed[d], 0);
            uint64_t sum = 0; /* in halves of 16ths: u * 32 is random >> 59 and a fraction */
            int32_t token = 0;
            while (token < TOKENS - 1 && (sum += (uint64_t)(2 * row[token])) <= random >> 59)
                token++;
            assert_int_equal(tokens[d], token);
        }
    }
}

/* A request's number is that of its seed and offset; without offset it is draw 0. */
static void draws_follow_seed_and_offset(void **state)
{
    (void)state;
    enum { TOKENS = 64, DRAWS = 64 };
    static float rows[DRAWS][TOKENS]; /* flat: the token is the random number's six highest bits */
    uint64_t seed[DRAWS], offset[DRAWS], one_seed = test_u64(), one_offset = test_u64();
    int32_t tokens[DRAWS];
    for (int d = 0; d < DRAWS; d++) {
        seed[d] = test_u64();
        offset[d] = test_u64();
        for (int t = 0; t < TOKENS; t++) rows[d][t] = 0.25f;
    }
    const DLTensor *const seeds[] = {TENSOR(seed, QKV_U64, DRAWS), TENSOR(&one_seed, QKV_U64, 1)};
    const DLTensor *const offsets[] = {NULL, TENSOR(offset, QKV_U64, DRAWS),
                                       TENSOR(&one_offset, QKV_U64, 1)};
    for (int k = 0; k < contexts.n; k++)
        for (int form = 0; form < 6; form++) {
            const qkv_sampling_params params = {
                QKV_SAMPLING_PARAMS_INIT, .kind = form % 2 ? QKV_PROBS : QKV_LOGITS,
                .seed = seeds[form % 2], .offset = offsets[form / 2]};
            memset(tokens, 0xff, sizeof tokens);
            EXPECT_OK(qkv_sample(contexts.ctx[k], TENSOR(tokens, QKV_I32, DRAWS),
                                 TENSOR(rows, QKV_F32, DRAWS, TOKENS), &params, NULL));
            for (int d = 0; d < DRAWS; d++) {
                const uint64_t at = form / 2 == 0 ? 0 : form / 2 == 1 ? offset[d] : one_offset;
                const uint64_t random = qi_philox_u64(form % 2 ? one_seed : seed[d], at);
                assert_int_equal(tokens[d], random >> 58);
            }
        }
}

/* ---- rows without mass, and what is no number ------------------------------------------------------ */

static void degenerate_rows_give_what_the_header_says(void **state)
{
    (void)state;
    enum { ROWS = 11, TOKENS = 5 };
    const float nan = NAN, inf = INFINITY, tiny = 0x1p-126f, denormal = 0x1p-127f;
    static const struct {
        const char *why;
        int kind, token, valid;
    } expected[ROWS] = {
        {"no logit but -inf", QKV_LOGITS, 0, 0},
        {"no logit but NaN", QKV_LOGITS, 0, 0},
        {"NaN counts as -inf", QKV_LOGITS, 2, 0},
        {"+inf is one finite number", QKV_LOGITS, 3, 0},
        {"one logit, however small", QKV_LOGITS, 4, 1},
        {"no probability", QKV_PROBS, 0, 0},
        {"NaN and negative count as 0", QKV_PROBS, 3, 0},
        {"+inf is one finite number", QKV_PROBS, 2, 0},
        {"below 2^-126 is 0", QKV_PROBS, 0, 0},
        {"2^-126 is not", QKV_PROBS, 4, 1},
        {"-0 is not negative", QKV_PROBS, 1, 1},
    };
    float rows[ROWS][TOKENS] = {
        {-inf, -inf, -inf, -inf, -inf},
        {nan, nan, nan, nan, nan},
        {nan, -inf, 1, nan, nan},
        {1, nan, 3e38f, inf, 7},
        {-inf, -inf, -inf, -inf, -FLT_MAX},
        {0, 0, 0, 0, 0},
        {nan, -1, -inf, 1e-3f, nan},
        {1, 2, inf, 3, nan},
        {denormal, denormal, 0, denormal, 0},
        {0, denormal, 0, denormal, tiny},
        {-0.f, 0.5f, -0.f, 0, 0},
    };
    for (int k = 0; k < contexts.n; k++)
        for (int i = 0; i < ROWS; i++) {
            uint64_t seed = test_u64();
            int32_t token = -1;
            uint8_t valid = 9;
            const qkv_sampling_params params = {QKV_SAMPLING_PARAMS_INIT, .kind = expected[i].kind,
                                                .seed = TENSOR(&seed, QKV_U64, 1),
                                                .valid = TENSOR(&valid, QKV_U8, 1)};
            EXPECT_OK(qkv_sample(contexts.ctx[k], TENSOR(&token, QKV_I32, 1),
                                 TENSOR(rows[i], QKV_F32, 1, TOKENS), &params, NULL));
            if (token != expected[i].token || valid != expected[i].valid)
                fail_msg("%s, %s: token %d, valid %d", contexts.name[k], expected[i].why, token,
                         valid);
        }
}

static void indices_past_the_rows_have_no_mass(void **state)
{
    (void)state;
    enum { ROWS = 3, TOKENS = 4, BATCH = 8 };
    static float rows[ROWS][TOKENS] = {{0, 0, 1, 0}, {0, 0, 0, 1}, {0, 1, 0, 0}};
    int32_t indices[BATCH] = {2, 0, -1, 1, 3, INT32_MAX, INT32_MIN, 2}, tokens[BATCH];
    const int32_t expected[BATCH] = {1, 2, 0, 3, 0, 0, 0, 1};
    const uint8_t expected_valid[BATCH] = {1, 1, 0, 1, 0, 0, 0, 1};
    uint64_t seed[BATCH] = {0};
    uint8_t valid[BATCH];
    const qkv_sampling_params params = {
        QKV_SAMPLING_PARAMS_INIT, .kind = QKV_PROBS, .seed = TENSOR(seed, QKV_U64, BATCH),
        .indices = TENSOR(indices, QKV_I32, BATCH), .valid = TENSOR(valid, QKV_U8, BATCH)};
    for (int k = 0; k < contexts.n; k++) {
        memset(tokens, 0xff, sizeof tokens);
        memset(valid, 9, sizeof valid);
        EXPECT_OK(qkv_sample(contexts.ctx[k], TENSOR(tokens, QKV_I32, BATCH),
                             TENSOR(rows, QKV_F32, ROWS, TOKENS), &params, NULL));
        assert_memory_equal(tokens, expected, sizeof tokens);
        assert_memory_equal(valid, expected_valid, sizeof valid);
    }
}

/* ---- errors ---------------------------------------------------------------------------------------- */

static void rows_have_a_longest(void **state)
{
    (void)state;
    uint64_t seed = 1;
    int32_t token = CHECK_POISON;
    float *row = calloc(QKV_MAX_VOCAB + 1, sizeof *row);
    assert_non_null(row);
    row[QKV_MAX_VOCAB - 1] = 100;
    const qkv_sampling_params params = {QKV_SAMPLING_PARAMS_INIT,
                                        .seed = TENSOR(&seed, QKV_U64, 1)};
    EXPECT_FAIL(QKV_ERR_INVALID, "rows: expected",
                qkv_sample(contexts.ctx[0], TENSOR(&token, QKV_I32, 1),
                           TENSOR(row, QKV_F32, 1, QKV_MAX_VOCAB + 1), &params, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "rows: expected",
                qkv_sample(contexts.ctx[0], TENSOR(&token, QKV_I32, 1), TENSOR(row, QKV_F32, 1, 0),
                           &params, NULL));
    assert_int_equal(token, CHECK_POISON);
    EXPECT_OK(qkv_sample(contexts.ctx[0], TENSOR(&token, QKV_I32, 1),
                         TENSOR(row, QKV_F32, 1, QKV_MAX_VOCAB), &params, NULL));
    assert_int_equal(token, QKV_MAX_VOCAB - 1);
    free(row);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(philox_gives_the_published_numbers),
        cmocka_unit_test(argmax_equals_a_scan_at_every_level),
        cmocka_unit_test(argmax_defines_nan_infinities_and_ties),
        cmocka_unit_test(rows_of_every_size),
        cmocka_unit_test(random_rows),
        cmocka_unit_test(steep_rows_with_top_p),
        cmocka_unit_test(crowds_of_rows_with_top_p),
        cmocka_unit_test(batches_of_every_size),
        cmocka_unit_test(masses_add_up_in_order_of_index),
        cmocka_unit_test(draws_follow_seed_and_offset),
        cmocka_unit_test(degenerate_rows_give_what_the_header_says),
        cmocka_unit_test(indices_past_the_rows_have_no_mass),
        cmocka_unit_test(rows_have_a_longest),
    };
    return cmocka_run_group_tests_name("sampling", tests, contexts_open, contexts_close);
}
