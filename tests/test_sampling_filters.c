/* test_sampling_filters.c - the kept set and the values of qkv_renormalize and qkv_mask_logits, and what qkv_sample
 * draws from it: each filter alone, all of them together, both orders, ties where a set ends.
 * SPDX-License-Identifier: Apache-2.0 */
#include "sampling_check.h"

static const unsigned filters[] = {
    0,
    STAGE(TOP_K),
    STAGE(TOP_P),
    STAGE(MIN_P),
    STAGE(TOP_K) | STAGE(TOP_P),
    STAGE(TOP_P) | STAGE(MIN_P),
    STAGE(TOP_K) | STAGE(TOP_P) | STAGE(MIN_P),
    STAGE(TYPICAL_P),
    STAGE(TOP_K) | STAGE(TYPICAL_P),
    STAGE(TOP_K) | AFTER_SOFTMAX,
};
enum { NUM_FILTERS = sizeof filters / sizeof *filters };

static DLDataType any_dtype(void)
{
    return float_dtypes[test_below(3)];
}

enum { RENORMALIZE = 1, SAMPLE = 2, MASK = 4, ALL = 7 };

/* Operators where they take the stages, to rows of a dtype; in place where `same`, of the rows' then. */
static void check_operators(unsigned which, sampling_spec s, DLDataType dtype, bool same)
{
    sampling_case *c = case_new(&s);
    if (s.indexed) same = false;
    if (which & RENORMALIZE) check_renormalize(c, same ? s.dtype : dtype, same);
    if (which & SAMPLE) check_sample(c);
    case_free(c);
    if (s.kind != QKV_LOGITS || !(which & MASK)) return;
    s.given &= ON_LOGITS | STAGE(TOP_K);
    c = case_new(&s);
    check_mask(c, same ? s.dtype : dtype, same);
    case_free(c);
}

static void filters_keep_what_a_sort_keeps(void **state)
{
    (void)state;
    static const int64_t some[] = {1, 2, 3, 64, 127, 513, 2048, 5003};
    enum { PAIRS = 2 * NUM_FILTERS }; /* of a filter and a kind of rows: all, or on a GPU some */
    for (int n = sampling_cases(15) * (sampling_compiles() ? 1 : PAIRS); n > 0; n--) {
        const uint64_t few = sampling_few();
        const int pair = sampling_compiles() ? (int)test_below(PAIRS) : n % PAIRS, kind = pair % 2;
        const sampling_spec spec = {
            .batch = 1 + test_below(6),
            .vocab = some[test_below(8)],
            .dtype = any_dtype(),
            .kind = kind,
            .order = (int32_t)test_below(2),
            .given =
                filters[pair / 2] | (kind == QKV_LOGITS && test_below(2) ? STAGE(TEMPERATURE) : 0),
            .shared = (unsigned)test_u64(),
            .shape = -1,
            .strided = test_below(2),
            .indexed = test_below(3) == 0,
        };
        const DLDataType dtype = any_dtype();
        const bool same = test_below(2);
        sampling_go_on(few);
        check_operators(ALL, spec, dtype, same);
    }
}

/* Each size with each kind of filter in turn, and every shape with some size. */
static void rows_of_every_size(void **state)
{
    (void)state;
    static const int64_t vocabs[] = {1, 2, 127, 32000, 128256, 151936, 256000, 500000};
    int turn = (int)test_below(NUM_FILTERS);
    for (int v = 0; v < 8; v++)
        for (int n = 0; n < (sampling_compiles() ? 1 : 3); n++, turn++) {
            const sampling_spec spec = {
                .batch = 1,
                .vocab = sampling_vocab(vocabs[v]),
                .dtype = any_dtype(),
                .kind = (v + n) % 3 == 2 ? QKV_PROBS : QKV_LOGITS,
                .order = turn / NUM_FILTERS % 2,
                .given = filters[turn % NUM_FILTERS],
                .shape = turn % (ROW_DIRTY + 1),
                .strided = test_below(2),
            };
            const unsigned some = v % 2 ? SAMPLE : RENORMALIZE | MASK;
            check_operators(sampling_compiles() ? some : ALL, spec, any_dtype(), test_below(2));
        }
}

/* Rows that 2 to 16 blocks of a GPU share: top_k, and top_p by itself and before other filters, of each shape in turn. The
 * longest, which take an emulator seconds, are few. */
static void rows_of_several_blocks(void **state)
{
    (void)state;
    static const struct {
        int64_t vocab;
        int cases;
    } rows[] = {{9000, 8}, {30000, 8}, {70000, 4}, {131071, 4}, {400000, 2}};
    static const unsigned some[] = {STAGE(TOP_P), STAGE(TOP_P) | STAGE(MIN_P),
                                    STAGE(TOP_P) | STAGE(TOP_K), STAGE(TOP_K)};
    int turn = (int)test_below(ROW_NUM_SHAPES);
    for (int v = 0; v < 5; v++)
        for (int n = sampling_compiles() ? 1 : sampling_cases(1) * rows[v].cases; n > 0;
             n--, turn++) {
            const sampling_spec spec = {
                .batch = v < 2 ? 3 : 1,
                .vocab = rows[v].vocab,
                .dtype = test_below(4) ? QKV_F32 : any_dtype(),
                .kind = n % 3 == 2 ? QKV_PROBS : QKV_LOGITS,
                .order = QKV_TOP_K_JOINT,
                .given = some[turn % 4],
                .shape = turn % ROW_NUM_SHAPES,
            };
            check_operators(n % 2 ? SAMPLE : RENORMALIZE, spec, QKV_F32, false);
        }
}

static void batches_of_every_size(void **state)
{
    (void)state;
    static const int64_t batches[] = {0, 1, 64, 1000, 4096};
    for (int b = 0; b < 5; b++) {
        const uint64_t few = sampling_few();
        const sampling_spec spec = {
            .batch = test_is_emulated() && batches[b] > 64 ? 65 : batches[b],
            .vocab = 1 + test_below(100),
            .dtype = any_dtype(),
            .kind = (int32_t)test_below(2),
            .given = STAGE(TOP_K) | STAGE(TOP_P),
            .shape = -1,
        };
        const DLDataType dtype = any_dtype();
        const bool same = test_below(2);
        sampling_go_on(few);
        check_operators(ALL, spec, dtype, same);
    }
}

/* ---- by hand ------------------------------------------------------------------------------------- */

/* What is kept of rows whose sums are exact; kept: a bit for each token. */
enum { TOKENS = 6 };
static const struct {
    const char *why;
    int kind, order, top_k;
    float top_p, min_p, typical_p;
    float row[TOKENS];
    unsigned kept;
} sets[] = {
    {"all of them", QKV_PROBS, 0, 0, 1, 0, 1, {1, 2, 3, 4, 5, 0}, 0x1f},
    {"the two largest", QKV_PROBS, 0, 2, 1, 0, 1, {1, 5, 3, 4, 0, 0}, 0x0a},
    {"of equals the lowest", QKV_PROBS, 0, 2, 1, 0, 1, {0, 3, 1, 3, 3, 3}, 0x0a},
    {"of equal logits too", QKV_LOGITS, 0, 3, 1, 0, 1, {-1, 3, 1, 1, 1, 3}, 0x26},
    {"-0 equals 0", QKV_LOGITS, 0, 2, 1, 0, 1, {-0.f, 0, -0.f, 0, -1, -1}, 0x03},
    {"k above those with mass", QKV_PROBS, 0, 5, 1, 0, 1, {0, 1, 0, 0, 2, 0}, 0x12},
    {"k of all", QKV_LOGITS, 0, TOKENS, 1, 0, 1, {1, 1, 1, 1, 1, 1}, 0x3f},
    {"half is enough", QKV_PROBS, 0, 0, 0.5f, 0, 1, {1, 4, 1, 1, 1, 0}, 0x02},
    {"half is not quite there", QKV_PROBS, 0, 0, 0.5f, 0, 1, {1, 3, 1, 1, 1, 1}, 0x03},
    {"a quarter of equals", QKV_PROBS, 0, 0, 0.25f, 0, 1, {0, 1, 1, 1, 1, 0}, 0x02},
    {"three quarters of equals", QKV_PROBS, 0, 0, 0.75f, 0, 1, {1, 1, 0, 0, 1, 1}, 0x13},
    {"equal logits have equal masses", QKV_LOGITS, 0, 0, 0.5f, 0, 1, {2, 2, 2, 2, 2, 2}, 0x07},
    {"the first has it all", QKV_PROBS, 0, 0, 1e-6f, 0, 1, {1, 1, 1, 1, 1, 1}, 0x01},
    {"top_p of what top_k leaves",
     QKV_PROBS,
     QKV_TOP_K_FIRST,
     2,
     0.75f,
     0,
     1,
     {3, 1, 1, 1, 1, 1},
     0x01},
    {"top_p of all", QKV_PROBS, QKV_TOP_K_JOINT, 2, 0.5f, 0, 1, {3, 1, 1, 1, 1, 1}, 0x03},
    {"the first: with top_k", QKV_PROBS, QKV_TOP_K_FIRST, 2, 0.5f, 0, 1, {3, 1, 1, 1, 1, 1}, 0x01},
    {"half of the largest", QKV_PROBS, 0, 0, 1, 0.5f, 1, {1, 2, 4, 1.9999999f, 2, 0}, 0x16},
    {"all of the largest", QKV_PROBS, 0, 0, 1, 1, 1, {4, 2, 4, 3.9999998f, 4, 0}, 0x15},
    {"the largest logits", QKV_LOGITS, 0, 0, 1, 1, 1, {4, 2, 4, 3, 4, 0}, 0x15},
    {"min_p after top_p", QKV_PROBS, 0, 0, 0.75f, 0.25f, 1, {8, 4, 2, 1, 1, 0}, 0x03},
    {"equals are all typical", QKV_PROBS, 0, 0, 1, 0, 0.5f, {1, 1, 1, 1, 1, 1}, 0x07},
    /* entropy of 1/2 1/8 1/8 1/8 1/8 is 2 bits: from it 1, then four times 1 and the larger first */
    {"the larger of equally typical", QKV_PROBS, 0, 0, 1, 0, 0.5f, {1, 4, 1, 1, 1, 0}, 0x02},
    {"then the lower index", QKV_PROBS, 0, 0, 1, 0, 0.75f, {1, 4, 1, 1, 1, 0}, 0x07},
    /* entropy of 9/16 3/16 and four times 1/16 is 1.92 bits: 0.5 from 3/16, 1.1 from 9/16 */
    {"the most typical", QKV_PROBS, 0, 0, 1, 0, 0.5f, {9, 1, 1, 1, 1, 3}, 0x20 | 0x01},
};

static void sets_are_those_by_hand(void **state)
{
    (void)state;
    for (int k = 0; k < contexts.n; k++)
        for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
            int32_t top_k = sets[i].top_k;
            float top_p = sets[i].top_p, min_p = sets[i].min_p, typical_p = sets[i].typical_p;
            float row[TOKENS], out[TOKENS];
            memcpy(row, sets[i].row, sizeof row);
            const qkv_sampling_params params = {
                QKV_SAMPLING_PARAMS_INIT,
                .kind = sets[i].kind,
                .order = sets[i].order,
                .top_k = top_k ? TENSOR(&top_k, QKV_I32, 1) : NULL,
                .top_p = top_p < 1 ? TENSOR(&top_p, QKV_F32, 1) : NULL,
                .min_p = min_p > 0 ? TENSOR(&min_p, QKV_F32, 1) : NULL,
                .typical_p = typical_p < 1 ? TENSOR(&typical_p, QKV_F32, 1) : NULL,
            };
            memset(out, VIEW_POISON, sizeof out);
            EXPECT_OK(qkv_renormalize(contexts.ctx[k], TENSOR(out, QKV_F32, 1, TOKENS),
                                      TENSOR(row, QKV_F32, 1, TOKENS), &params, NULL));
            unsigned kept = 0;
            for (int t = 0; t < TOKENS; t++) kept |= (unsigned)(out[t] != 0) << t;
            if (kept != sets[i].kept)
                fail_msg("%s, %s: kept %#x, not %#x", contexts.name[k], sets[i].why, kept,
                         sets[i].kept);
        }
}

/* A value that is as large as the k-th is kept as long as its index is lower; whichever way they stand. */
static void ties_end_at_the_lowest_indices(void **state)
{
    (void)state;
    enum { MOST = 5000 };
    static float row[MOST], out[MOST];
    for (int n = sampling_cases(60); n > 0; n--) {
        const uint64_t few = sampling_few();
        const int64_t vocab = 2 + test_below(MOST - 1);
        sampling_go_on(few);
        const int64_t larger = test_below(vocab / 2 + 1), equal = 1 + test_below(vocab - larger);
        int32_t k = (int32_t)(larger + 1 + test_below(equal)), kept = 0, below = k;
        const int kind = (int)test_below(2);
        int64_t left_larger = larger, left_equal = equal, left = vocab;
        for (int64_t i = 0; i < vocab; i++, left--) { /* as many of each as there are, anywhere */
            const int64_t which = test_below(left);
            if (which < left_larger) {
                row[i] = 3 + (float)fabs(test_uniform(2));
                left_larger--;
            } else if (which < left_larger + left_equal) {
                row[i] = 2;
                left_equal--;
            } else {
                row[i] = 1;
            }
        }
        const qkv_sampling_params params = {QKV_SAMPLING_PARAMS_INIT, .kind = kind,
                                            .top_k = TENSOR(&k, QKV_I32, 1)};
        below -= (int32_t)larger; /* of the equals, so many are kept */
        for (int c = 0; c < contexts.n; c++) {
            EXPECT_OK(qkv_renormalize(contexts.ctx[c], TENSOR(out, QKV_F32, 1, vocab),
                                      TENSOR(row, QKV_F32, 1, vocab), &params, NULL));
            kept = 0;
            for (int64_t i = 0; i < vocab; i++) {
                const bool expected = row[i] > 2 || (row[i] == 2 && kept < below);
                kept += row[i] == 2;
                if ((out[i] > 0) != expected)
                    fail_msg("%s: vocab %d, top_k %d: token %d of value %g is %s", contexts.name[c],
                             (int)vocab, k, (int)i, (double)row[i], expected ? "lost" : "kept");
            }
        }
    }
}

/* Entropy has a part of every token, however small: of 1, 1/2 and 200000 times 0.9 * 2^-22 the mean of -log2 is 0.94,
 * next to 1/2, whose share is 0.32. Without the small ones it would be 0.33, next to 1. */
static void entropy_counts_the_tail(void **state)
{
    (void)state;
    enum { VOCAB = 200002 };
    float *row = malloc(2 * VOCAB * sizeof *row), *out = row + VOCAB, typical_p = 0.3f;
    assert_non_null(row);
    for (int i = 0; i < VOCAB; i++) row[i] = 0.9f * 0x1p-22f;
    row[7] = 1;
    row[150000] = 0.5f;
    const qkv_sampling_params params = {QKV_SAMPLING_PARAMS_INIT, .kind = QKV_PROBS,
                                        .typical_p = TENSOR(&typical_p, QKV_F32, 1)};
    for (int k = 0; k < contexts.n; k++) {
        EXPECT_OK(qkv_renormalize(contexts.ctx[k], TENSOR(out, QKV_F32, 1, VOCAB),
                                  TENSOR(row, QKV_F32, 1, VOCAB), &params, NULL));
        for (int i = 0; i < VOCAB; i++)
            if (out[i] != (i == 150000))
                fail_msg("%s: token %d has %g", contexts.name[k], i, (double)out[i]);
    }
    free(row);
}

/* ---- values -------------------------------------------------------------------------------------- */

static void probabilities_add_up_to_one(void **state)
{
    (void)state;
    for (int n = sampling_cases(20); n > 0; n--) {
        const uint64_t few = sampling_few();
        sampling_spec spec = {
            .batch = 3,
            .vocab = 1 + test_below(4000),
            .dtype = any_dtype(),
            .kind = (int32_t)test_below(2),
            .given = filters[test_below(NUM_FILTERS)],
        };
        sampling_go_on(few);
        spec.shape = (int)test_below(ROW_DIRTY);
        sampling_case *c = case_new(&spec);
        view out = check_filter(c, qkv_renormalize, QKV_F32, false);
        for (int64_t i = 0; i < spec.batch; i++) {
            double sum = 0;
            for (int64_t t = 0; t < spec.vocab; t++) sum += view_get(&out, i * spec.vocab + t);
            /* each is rounded by 2^-23 of itself, and has lost less than 2^-42 of the largest */
            if (c->valid[i] && fabs(sum - 1) > 0x1p-22 + (double)spec.vocab * 0x1p-42)
                fail_msg("%s: sum %.9g", case_text(c, i), sum);
        }
        view_free(&out);
        case_free(c);
    }
}

/* What is masked is as it was but for what is dropped: the bits of logits that no stage changes. */
static void masked_logits_keep_their_bits(void **state)
{
    (void)state;
    for (int n = sampling_cases(20); n > 0; n--) {
        const uint64_t few = sampling_few();
        sampling_spec spec = {
            .batch = 3,
            .vocab = 1 + test_below(4000),
            .dtype = any_dtype(),
            .given = STAGE(TOP_K),
        };
        sampling_go_on(few);
        spec.shape = (int)test_below(ROW_HEAVY_TAIL + 1);
        sampling_case *c = case_new(&spec);
        view out = check_filter(c, qkv_mask_logits, spec.dtype, n % 2);
        for (int64_t i = 0; i < spec.batch * spec.vocab; i++) {
            const double l = view_get(&out, i);
            if (l != (double)-INFINITY && l != view_get(&c->rows, i))
                fail_msg("%s: entry %d: %g became %g", case_text(c, 0), (int)i,
                         view_get(&c->rows, i), l);
        }
        view_free(&out);
        case_free(c);
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(filters_keep_what_a_sort_keeps),
        cmocka_unit_test(rows_of_every_size),
        cmocka_unit_test(rows_of_several_blocks),
        cmocka_unit_test(batches_of_every_size),
        cmocka_unit_test(sets_are_those_by_hand),
        cmocka_unit_test(ties_end_at_the_lowest_indices),
        cmocka_unit_test(entropy_counts_the_tail),
        cmocka_unit_test(probabilities_add_up_to_one),
        cmocka_unit_test(masked_logits_keep_their_bits),
    };
    return cmocka_run_group_tests_name("sampling_filters", tests, contexts_open, contexts_close);
}
