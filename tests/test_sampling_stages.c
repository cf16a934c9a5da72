/* test_sampling_stages.c - stages on logits: penalties, bias, bitmask, temperature, top-n-sigma; alone, in every
 * combination, in front of filters; the flag `valid`.
 * SPDX-License-Identifier: Apache-2.0 */
#include "sampling_check.h"

static DLDataType any_dtype(void)
{
    return float_dtypes[test_below(3)];
}

static const unsigned each[] = {STAGE(REPETITION),  STAGE(FREQUENCY),
                                STAGE(PRESENCE),    STAGE(BIAS),
                                STAGE(BITMASK),     STAGE(TEMPERATURE),
                                STAGE(TOP_N_SIGMA), STAGE(TOP_N_SIGMA) | STAGE(TEMPERATURE)};
enum { NUM_EACH = sizeof each / sizeof *each };

static sampling_spec spec_of(unsigned given)
{
    static const int64_t some[] = {1, 2, 31, 32, 33, 127, 1000, 4099};
    return (sampling_spec){
        .batch = 1 + test_below(5),
        .vocab = some[test_below(8)],
        .dtype = any_dtype(),
        .order = (int32_t)test_below(2),
        .given = given,
        .shared = (unsigned)test_u64(),
        .shape = -1,
        .strided = test_below(2),
        .indexed = test_below(3) == 0,
    };
}

static void each_stage_alone(void **state)
{
    (void)state;
    for (int n = sampling_cases(12); n > 0; n--)
        for (int i = 0; i < (sampling_compiles() ? 1 : NUM_EACH); i++) {
            const uint64_t few = sampling_few();
            const sampling_spec spec =
                spec_of(each[sampling_compiles() ? test_below(NUM_EACH) : i]);
            const bool in_place = !spec.indexed && test_below(2);
            const DLDataType masked = in_place ? spec.dtype : any_dtype(), probs = any_dtype();
            sampling_go_on(few);
            sampling_case *c = case_new(&spec);
            check_mask(c, masked, in_place);
            check_renormalize(c, probs, false);
            check_sample(c);
            case_free(c);
        }
}

static void any_stages_together(void **state)
{
    (void)state;
    for (int n = sampling_cases(100); n > 0; n--) {
        const uint64_t few = sampling_few();
        sampling_spec spec = spec_of((unsigned)test_u64() & ALL_STAGES);
        const DLDataType probs = any_dtype(), masked = any_dtype();
        sampling_go_on(few);
        sampling_case *c = case_new(&spec);
        check_renormalize(c, probs, false);
        check_sample(c);
        case_free(c);
        spec.given &= ON_LOGITS | STAGE(TOP_K);
        c = case_new(&spec);
        check_mask(c, masked, false);
        case_free(c);
    }
}

static void all_stages_on_long_rows(void **state)
{
    (void)state;
    static const int64_t vocabs[] = {32000, 128256, 151936, 500000};
    for (int v = 0; v < 4; v++) {
        sampling_spec spec = {
            .batch = 1,
            .vocab = sampling_vocab(vocabs[v]),
            .dtype = any_dtype(),
            .given = ALL_STAGES,
            .shape = (int)test_below(ROW_HEAVY_TAIL + 1),
        };
        const bool every = !sampling_compiles();
        sampling_case *c = case_new(&spec);
        if (every || v % 2 == 0) check_renormalize(c, QKV_F32, false);
        if (every || v % 2 == 1) check_sample(c);
        case_free(c);
        if (!every && v % 2 == 0) continue;
        spec.given = ON_LOGITS;
        c = case_new(&spec);
        check_mask(c, spec.dtype, true);
        case_free(c);
    }
}

/* ---- by hand --------------------------------------------------------------------------------------- */

enum { TOKENS = 4 };

static void run_mask(qkv_context *ctx, const float *row, qkv_sampling_params params, float *out)
{
    float given[TOKENS];
    memcpy(given, row, sizeof given);
    EXPECT_OK(qkv_mask_logits(ctx, TENSOR(out, QKV_F32, 1, TOKENS),
                              TENSOR(given, QKV_F32, 1, TOKENS), &params, NULL));
}

static void expect_row(const char *why, const float *got, const float *expected)
{
    for (int t = 0; t < TOKENS; t++)
        if (got[t] != expected[t])
            fail_msg("%s: token %d: %.9g, not %.9g", why, t, (double)got[t], (double)expected[t]);
}

static void penalties_are_the_formulas(void **state)
{
    (void)state;
    const float inf = INFINITY, row[TOKENS] = {2, -2, 1, -1};
    float two = 2, half = 0.5f, out[TOKENS];
    int32_t counts[TOKENS] = {3, 1, 0, 0}, prompt[1] = {0x4}, mask[1] = {0xd};
    float bias[TOKENS] = {1, -inf, 0.25f, NAN};
    const DLTensor *r = TENSOR(&two, QKV_F32, 1), *f = TENSOR(&half, QKV_F32, 1);
    const DLTensor *n = TENSOR(counts, QKV_I32, 1, TOKENS), *p = TENSOR(prompt, QKV_I32, 1, 1);
    for (int k = 0; k < contexts.n; k++) {
        qkv_context *const ctx = contexts.ctx[k];
#define MASK(...)                                                                                  \
    run_mask(ctx, row, (qkv_sampling_params){QKV_SAMPLING_PARAMS_INIT, __VA_ARGS__}, out)
        MASK(.repetition = r, .counts = n);
        expect_row("what the output has", out, (float[]){1, -4, 1, -1});
        MASK(.repetition = r, .prompt = p);
        expect_row("what the prompt has", out, (float[]){2, -2, 0.5f, -1});
        MASK(.repetition = r, .prompt = p, .counts = n);
        expect_row("what either has", out, (float[]){1, -4, 0.5f, -1});
        MASK(.frequency = f, .counts = n);
        expect_row("for each time", out, (float[]){0.5f, -2.5f, 1, -1});
        MASK(.presence = f, .counts = n);
        expect_row("once", out, (float[]){1.5f, -2.5f, 1, -1});
        MASK(.repetition = r, .prompt = p, .frequency = f, .presence = f, .counts = n);
        expect_row("frequency does not know the prompt", out, (float[]){-1, -5, 0.5f, -1});
        MASK(.bias = TENSOR(bias, QKV_F32, 1, TOKENS));
        expect_row("NaN is -inf", out, (float[]){3, -inf, 1.25f, -inf});
        MASK(.bitmask = TENSOR(mask, QKV_I32, 1, 1));
        expect_row("bits that are 0", out, (float[]){2, -inf, 1, -1});
        MASK(.temperature = f, .bitmask = TENSOR(mask, QKV_I32, 1, 1));
        expect_row("sharper", out, (float[]){4, -inf, 2, -2});
#undef MASK
    }
}

/* The largest logit alone, the lowest index of equals; what filters follow does not matter. */
static void no_temperature_is_argmax(void **state)
{
    (void)state;
    for (int n = sampling_cases(40); n > 0; n--) {
        const uint64_t few = sampling_few();
        sampling_spec spec =
            spec_of(STAGE(TEMPERATURE) | ((unsigned)test_u64() & ALL_STAGES & ~ON_LOGITS));
        sampling_go_on(few);
        spec.indexed = false;
        spec.shared &= ~STAGE(TEMPERATURE);
        sampling_case *c = case_new(&spec);
        for (int64_t i = 0; i < spec.batch; i++) c->value[QKV_STAGE_TEMPERATURE][i] = 0;
        int32_t *drawn = check_draw(c), *largest = malloc((size_t)spec.batch * sizeof *largest);
        EXPECT_OK(
            qkv_argmax(contexts.ctx[0], TENSOR(largest, QKV_I32, spec.batch), &c->rows.t, NULL));
        assert_memory_equal(drawn, largest, (size_t)spec.batch * sizeof *drawn);
        free(drawn), free(largest);
        case_free(c);
    }
}

static void sigma_is_the_rows_own(void **state)
{
    (void)state;
    const float inf = INFINITY;
    static const struct {
        const char *why;
        float n, row[TOKENS];
        unsigned kept;
    } cases[] = {
        {"sigma 2, from 4 up", 0.5f, {1, 5, 5, 1}, 0x6},
        {"exactly so far", 2, {1, 5, 5, 1}, 0xf}, /* sums of such numbers are exact */
        {"no difference", 0.001f, {3, 3, 3, 3}, 0xf},
        {"one token", 0.001f, {-INFINITY, 3, -INFINITY, NAN}, 0x2},
        {"of finite logits: 1, 5, sigma 2", 1.9f, {1, 5, -INFINITY, NAN}, 0x2},
        {"of finite logits: down to 0.8", 2.1f, {1, 5, -INFINITY, NAN}, 0x3},
        {"no token", 1, {-INFINITY, -INFINITY, NAN, NAN}, 0},
        {"far apart", 1, {-3e38f, 3e38f, 3e38f, -3e38f}, 0x6},
    };
    for (int k = 0; k < contexts.n; k++)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            float n = cases[i].n, out[TOKENS];
            run_mask(contexts.ctx[k], cases[i].row,
                     (qkv_sampling_params){QKV_SAMPLING_PARAMS_INIT,
                                           .top_n_sigma = TENSOR(&n, QKV_F32, 1)},
                     out);
            for (int t = 0; t < TOKENS; t++)
                if ((out[t] > -inf) != (cases[i].kept >> t & 1))
                    fail_msg("%s, %s: token %d is %g", contexts.name[k], cases[i].why, t,
                             (double)out[t]);
        }
}

/* A batch of which every row is bad in its own way, before or after the stages. */
static void valid_tells_of_each_row(void **state)
{
    (void)state;
    enum { ROWS = 7 };
    const float inf = INFINITY, nan = NAN;
    float rows[ROWS][TOKENS] = {
        {1, 2, 3, 4},          {1, nan, 3, 4}, {1, inf, 3, 4},        {-inf, -inf, -inf, -inf},
        {-inf, 1, -inf, -inf}, {1, 2, 3, 4},   {-inf, 5, -inf, -inf},
    };
    /* by bitmask row 5 has nothing left, row 6 one token */
    int32_t mask[ROWS] = {0xf, 0xf, 0xf, 0xf, 0xf, 0, 2}, tokens[ROWS];
    const uint8_t expected[ROWS] = {1, 0, 0, 0, 1, 0, 1};
    uint64_t seed[ROWS] = {1, 2, 3, 4, 5, 6, 7};
    float out[ROWS][TOKENS];
    uint8_t valid[ROWS];
    const DLTensor *s = TENSOR(seed, QKV_U64, ROWS), *x = TENSOR(rows, QKV_F32, ROWS, TOKENS);
    DLTensor *o = TENSOR(out, QKV_F32, ROWS, TOKENS);
    for (int k = 0; k < contexts.n; k++)
        for (int op = 0; op < 3; op++) {
            qkv_context *const ctx = contexts.ctx[k];
            const qkv_sampling_params params = {
                QKV_SAMPLING_PARAMS_INIT, .seed = op == 0 ? s : NULL,
                .bitmask = TENSOR(mask, QKV_I32, ROWS, 1), .valid = TENSOR(valid, QKV_U8, ROWS)};
            memset(valid, 9, sizeof valid);
            memset(out, VIEW_POISON, sizeof out);
            if (op == 0)
                EXPECT_OK(qkv_sample(ctx, TENSOR(tokens, QKV_I32, ROWS), x, &params, NULL));
            if (op == 1) EXPECT_OK(qkv_renormalize(ctx, o, x, &params, NULL));
            if (op == 2) EXPECT_OK(qkv_mask_logits(ctx, o, x, &params, NULL));
            assert_memory_equal(valid, expected, sizeof valid);
            for (int t = 0; t < TOKENS && op > 0; t++) {
                assert_true(out[3][t] == (op == 1 ? 0 : -inf));
                assert_true(out[5][t] == (op == 1 ? 0 : -inf));
                assert_true(op == 2 || out[6][t] == (t == 1 ? 1 : 0));
                assert_true(op == 1 || out[6][t] == (t == 1 ? 5 : -inf));
            }
            if (op == 0) {
                assert_int_equal(tokens[3], 0);
                assert_int_equal(tokens[5], 0);
                assert_int_equal(tokens[6], 1);
            }
        }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_stage_alone),         cmocka_unit_test(any_stages_together),
        cmocka_unit_test(all_stages_on_long_rows),  cmocka_unit_test(penalties_are_the_formulas),
        cmocka_unit_test(no_temperature_is_argmax), cmocka_unit_test(sigma_is_the_rows_own),
        cmocka_unit_test(valid_tells_of_each_row),
    };
    return cmocka_run_group_tests_name("sampling_stages", tests, contexts_open, contexts_close);
}
