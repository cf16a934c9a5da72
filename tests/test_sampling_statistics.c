/* test_sampling_statistics.c - tokens are distributed as the header says: chi-square for each sampler and combination on
 * rows of each shape, over many seeds, and the p-values of all of these against each other. Rows, parameters and
 * seeds are the same on every run, and tokens follow from them: a test here cannot fail by chance.
 * SPDX-License-Identifier: Apache-2.0 */
#include "chi_square.h"
#include "sampling_check.h"

/* The largest p-value that is a failure. */
#define SIGNIFICANCE 1e-5

static const struct {
    const char *name;
    int32_t kind, order;
    unsigned given;
} samplers[] = {
    {"categorical", QKV_LOGITS, 0, 0},
    {"temperature", QKV_LOGITS, 0, STAGE(TEMPERATURE)},
    {"top_k", QKV_LOGITS, 0, STAGE(TOP_K)},
    {"top_p", QKV_LOGITS, 0, STAGE(TOP_P)},
    {"min_p", QKV_LOGITS, 0, STAGE(MIN_P)},
    {"typical_p", QKV_LOGITS, 0, STAGE(TYPICAL_P)},
    {"top_n_sigma", QKV_LOGITS, 0, STAGE(TOP_N_SIGMA)},
    {"top_k, then top_p", QKV_LOGITS, QKV_TOP_K_FIRST, STAGE(TOP_K) | STAGE(TOP_P)},
    {"top_k and top_p", QKV_LOGITS, QKV_TOP_K_JOINT, STAGE(TOP_K) | STAGE(TOP_P)},
    {"top_p and min_p", QKV_LOGITS, 0, STAGE(TOP_P) | STAGE(MIN_P)},
    {"filters", QKV_LOGITS, 0, STAGE(TEMPERATURE) | STAGE(TOP_K) | AFTER_SOFTMAX},
    {"penalties", QKV_LOGITS, 0, STAGE(REPETITION) | STAGE(FREQUENCY) | STAGE(PRESENCE)},
    {"bias and bitmask", QKV_LOGITS, 0, STAGE(BIAS) | STAGE(BITMASK)},
    {"everything", QKV_LOGITS, QKV_TOP_K_JOINT, ALL_STAGES},
    {"of probabilities", QKV_PROBS, 0, 0},
    {"top_k of probabilities", QKV_PROBS, 0, STAGE(TOP_K)},
    {"top_p of probabilities", QKV_PROBS, 0, STAGE(TOP_P)},
    {"min_p of probabilities", QKV_PROBS, 0, STAGE(MIN_P)},
    {"typical_p of probabilities", QKV_PROBS, 0, STAGE(TYPICAL_P)},
    {"both of probabilities", QKV_PROBS, QKV_TOP_K_JOINT, STAGE(TOP_K) | STAGE(TOP_P)},
    {"filters of probabilities", QKV_PROBS, 0, STAGE(TOP_K) | AFTER_SOFTMAX},
};
enum { NUM_SAMPLERS = sizeof samplers / sizeof *samplers };

static const row_shape shapes[] = {ROW_SMOOTH,    ROW_FLAT,    ROW_TIES,
                                   ROW_NEAR_TIES, ROW_ONE_HOT, ROW_HEAVY_TAIL};
enum { NUM_SHAPES = sizeof shapes / sizeof *shapes };

/* Values at which something is left to draw from. */
static void set_values(sampling_case *c)
{
    static const float values[][3] = {
        [QKV_STAGE_REPETITION] = {1.3f, 0.8f, 2}, [QKV_STAGE_FREQUENCY] = {0.25f, -0.1f, 0.5f},
        [QKV_STAGE_PRESENCE] = {0.5f, -0.3f, 1},  [QKV_STAGE_TEMPERATURE] = {0.7f, 1.5f, 3},
        [QKV_STAGE_TOP_N_SIGMA] = {1, 1.5f, 2},   [QKV_STAGE_TOP_P] = {0.9f, 0.6f, 0.97f},
        [QKV_STAGE_MIN_P] = {0.02f, 0.1f, 0.2f},  [QKV_STAGE_TYPICAL_P] = {0.9f, 0.7f, 0.95f},
    };
    const int64_t ks[] = {3 * c->spec.vocab / 4, 12, 25};
    for (int32_t s = 0; s < QKV_STAGE_SAMPLE; s++)
        if (c->spec.given >> s & 1 && s != QKV_STAGE_TOP_K && s != QKV_STAGE_BIAS &&
            s != QKV_STAGE_BITMASK) {
            c->value[s][0] = values[s][test_below(3)];
            for (int64_t i = 1; i < c->spec.batch; i++) c->value[s][i] = c->value[s][0];
        }
    for (int64_t i = 0; i < c->spec.batch; i++)
        c->top_k[i] = i ? c->top_k[0] : (int32_t)ks[test_below(3)];
    free(c->request);
    case_fill_requests(c);
}

/* Requests that have one row and one set of parameters; of counts and prompt, the first request's. */
static sampling_case *new_draws(int sampler, row_shape shape, int64_t draws, int64_t vocab)
{
    const bool near = shape == ROW_NEAR_TIES; /* of logits that near the order of weights is open */
    const unsigned given = samplers[sampler].given;
    const sampling_spec spec = {
        .batch = draws,
        .vocab = vocab,
        .dtype = float_dtypes[near ? 0 : test_below(3)],
        .kind = near ? QKV_PROBS : samplers[sampler].kind,
        .order = samplers[sampler].order,
        .given = near ? given & (AFTER_SOFTMAX | STAGE(TOP_K)) : given,
        .shared = ~0u,
        .shape = (int)shape,
        .indexed = true,
        .num_rows = 1,
    };
    sampling_case *c = case_new(&spec);
    for (int64_t i = 0; i < draws; i++) {
        c->indices[i] = 0;
        if (c->counts.block && i)
            memcpy(case_row(&c->counts, i), case_row(&c->counts, 0), (size_t)vocab * 4);
        if (c->prompt.block && i)
            memcpy(case_row(&c->prompt, i), case_row(&c->prompt, 0), (size_t)case_words(&spec) * 4);
    }
    set_values(c);
    return c;
}

/* The distribution of a case's tokens; false if it is open. */
static bool distribution(const sampling_case *c, double *p)
{
    ref_row r = ref_row_new(c->spec.vocab);
    case_reference(c, 0, case_stages(c), &r);
    const bool known = ref_distribution(&r, p);
    ref_row_free(&r);
    return known;
}

static double p_of_draws(sampling_case *c, const double *p)
{
    int64_t *seen = calloc((size_t)c->spec.vocab, sizeof *seen);
    int32_t *tokens = check_draw(c);
    for (int64_t i = 0; i < c->spec.batch; i++) {
        if (tokens[i] < 0 || tokens[i] >= c->spec.vocab)
            fail_msg("%s: token %d", case_text(c, i), tokens[i]);
        seen[tokens[i]]++;
    }
    const double result = chi_square_p(seen, p, c->spec.vocab, c->spec.batch);
    free(tokens), free(seen);
    return result;
}

/* Many requests of a seed each, or of consecutive offsets of one. */
static void set_draws(sampling_case *c, bool by_seed)
{
    const uint64_t seed = test_u64();
    for (int64_t i = 0; i < c->spec.batch; i++) {
        c->seed[i] = by_seed ? seed + (uint64_t)i : seed; /* near seeds are as good as far ones */
        c->offset[i] = by_seed ? 0 : (uint64_t)i;
    }
}

static void tokens_are_distributed_as_the_row_says(void **state)
{
    (void)state;
    enum { TIMES = 12, MAX_VALUES = NUM_SAMPLERS * NUM_SHAPES * TIMES };
    const int64_t draws = test_is_emulated() ? 20 : 800, vocab = 40;
    const int times = test_is_emulated() ? 1 : TIMES;
    static double values[MAX_VALUES];
    double p[64];
    int64_t n = 0;
    for (int s = 0; s < NUM_SAMPLERS; s++)
        for (int shape = test_is_emulated() ? s % NUM_SHAPES : 0; shape < NUM_SHAPES;
             shape += test_is_emulated() ? NUM_SHAPES : 1) {
            const int64_t first = n;
            for (int t = 0; t < times; t++) {
                sampling_case *c = new_draws(s, shapes[shape], draws, vocab);
                set_draws(c, t % 2);
                const double value = distribution(c, p) ? p_of_draws(c, p) : -1;
                case_free(c);
                if (value == -2 || (value >= 0 && value < SIGNIFICANCE))
                    fail_msg("%s, %s: p-value %g", samplers[s].name, row_shape_names[shapes[shape]],
                             value);
                if (value >= 0) values[n++] = value;
            }
            const double even = n - first < 5 ? 1 : uniform_p(values + first, n - first);
            if (even < SIGNIFICANCE)
                fail_msg("%s, %s: %d p-values are not even: %g", samplers[s].name,
                         row_shape_names[shapes[shape]], (int)(n - first), even);
        }
    if (test_is_emulated())
        return; /* too few draws for more than a look at which tokens are drawn */
    assert_true(n > (int64_t)NUM_SAMPLERS * times);
    const double even = uniform_p(values, n);
    if (even < SIGNIFICANCE) fail_msg("%d p-values are not even: %g", (int)n, even);
}

/* Long rows, 50 runs of tokens an outcome each: what a draw of many pieces of a row adds up. */
static void tokens_of_long_rows_are_too(void **state)
{
    (void)state;
    enum { RUNS = 50 };
    const int64_t draws = test_is_emulated() ? 10 : 1000, vocab = sampling_vocab(20011);
    const int64_t run = vocab / RUNS + 1;
    double *p = malloc((size_t)vocab * sizeof *p), values[NUM_SAMPLERS];
    int64_t n = 0;
    for (int s = 0; s < NUM_SAMPLERS; s++) {
        if (samplers[s].given & (STAGE(REPETITION) | STAGE(FREQUENCY)))
            continue; /* counts of each request would fill the memory */
        sampling_case *c = new_draws(s, s % 3 ? ROW_HEAVY_TAIL : ROW_SMOOTH, draws, vocab);
        double of_run[RUNS] = {0};
        int64_t seen[RUNS] = {0};
        distribution(c, p);
        for (int64_t t = 0; t < vocab; t++) of_run[t / run] += p[t];
        set_draws(c, s % 2);
        int32_t *tokens = check_draw(c);
        for (int64_t i = 0; i < draws; i++) {
            assert_in_range(tokens[i], 0, vocab - 1);
            seen[tokens[i] / run]++;
        }
        const double value = chi_square_p(seen, of_run, RUNS, draws);
        if (value == -2 || (value >= 0 && value < SIGNIFICANCE))
            fail_msg("%s, %s: p-value %g", samplers[s].name, case_text(c, 0), value);
        if (value >= 0) values[n++] = value;
        free(tokens);
        case_free(c);
    }
    if (n >= 5 && uniform_p(values, n) < SIGNIFICANCE) fail_msg("%d p-values are not even", (int)n);
    free(p);
}

/* The check sees what it is for: a distribution one part in five off, and p-values that crowd. */
static void the_check_finds_what_is_off(void **state)
{
    (void)state;
    enum { N = 40, DRAWS = 20000 };
    double p[N], off[N], values[N];
    int64_t seen[N] = {0};
    for (int i = 0; i < N; i++) {
        p[i] = 1.0 / N;
        off[i] = (i % 2 ? 1.2 : 0.8) / N;
        values[i] = 0.4 + 0.2 * i / N;
    }
    for (int d = 0; d < DRAWS; d++) seen[test_below(N)]++;
    assert_true(chi_square_p(seen, p, N, DRAWS) > 1e-3);
    assert_true(chi_square_p(seen, off, N, DRAWS) < 1e-9);
    assert_true(uniform_p(values, N) < 1e-5);
    assert_true(fabs(upper_gamma(0.5, 1.920729) - 0.05) < 1e-6); /* tables: 3.841459, one degree */
    assert_true(fabs(upper_gamma(15, 21.88649) - 0.05) < 1e-6);  /* 43.77297, thirty */
}

int main(void)
{
    test_seed();
    test_state = 20251130; /* the same on every run */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_check_finds_what_is_off),
        cmocka_unit_test(tokens_are_distributed_as_the_row_says),
        cmocka_unit_test(tokens_of_long_rows_are_too),
    };
    return cmocka_run_group_tests_name("sampling_statistics", tests, contexts_open, contexts_close);
}
