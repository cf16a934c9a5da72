/* test_log_probs.c - qkv_log_probs: log softmax in double, and ranks by counting.
 * SPDX-License-Identifier: Apache-2.0 */
#include "sampling_case.h"

/* A mass is 2^-42 of the largest or more: whether a token of less has one is open. */
#define LEAST_LOG (-42 * 0.6931471805599453)

/* log p is l - max, an f32 number, less the log of a sum whose error is that of exp in f32, see sampling_ref.c. */
#define LOG_ERROR(x) (0x1p-19 + 0x1p-22 * fabs(x))

static double logit(const view *rows, int64_t row, int64_t token)
{
    const double x = view_get(rows, row * rows->shape[1] + token);
    return isnan(x) ? (double)-INFINITY : fmin(x, (double)FLT_MAX);
}

static void check(int64_t batch, int64_t vocab, int64_t n, int shape)
{
    const DLDataType dtype = float_dtypes[test_below(3)];
    view rows, tokens, logs, ranks;
    void *first = NULL;
    view_new(&rows, dtype, test_below(2) ? 9 : 0, TEST_SHAPE(batch, vocab));
    view_new(&tokens, QKV_I32, test_below(2) ? 3 : 0, TEST_SHAPE(batch, n));
    for (int64_t r = 0; r < batch; r++) {
        const row_shape s = shape < 0 ? (row_shape)test_below(ROW_NUM_SHAPES) : (row_shape)shape;
        row_fill(rows.block, dtype, view_index(&rows, r * vocab), vocab, QKV_LOGITS, s);
        for (int64_t i = 0; i < n; i++) {
            const int32_t beyond[] = {-1, INT32_MIN, (int32_t)vocab, INT32_MAX};
            ((int32_t *)case_row(&tokens, r))[i] =
                test_below(12) ? (int32_t)test_below(vocab) : beyond[test_below(4)];
        }
    }
    for (int c = 0; c < contexts.n; c++) {
        const bool ranked = c == 0 || test_below(2);
        view_new(&logs, QKV_F32, 0, TEST_SHAPE(batch, n));
        view_new(&ranks, QKV_I32, 3, TEST_SHAPE(batch, n));
        EXPECT_OK(qkv_log_probs(contexts.ctx[c], &logs.t, ranked ? &ranks.t : NULL, &rows.t,
                                &tokens.t, NULL));
        for (int64_t r = 0; r < batch; r++) {
            double max = -INFINITY, sum = 0;
            for (int64_t t = 0; t < vocab; t++) max = fmax(max, logit(&rows, r, t));
            for (int64_t t = 0; t < vocab && max > (double)-INFINITY; t++)
                sum += exp(logit(&rows, r, t) - max);
            for (int64_t i = 0; i < n; i++) {
                const int32_t token = ((int32_t *)case_row(&tokens, r))[i];
                const bool there = token >= 0 && token < vocab;
                const double l = there ? logit(&rows, r, token) : (double)-INFINITY;
                const double got = view_get(&logs, r * n + i), log_p = l - max - log(sum);
                const bool none = l == (double)-INFINITY;
                if (!(got == (double)-INFINITY && (none || l - max < LEAST_LOG)) &&
                    !(!none && fabs(got - log_p) <= LOG_ERROR(log_p)))
                    fail_msg("%s: vocab %d, row %d, token %d of logit %.9g: %.9g, not %.9g",
                             contexts.name[c], (int)vocab, (int)r, token, l, got, log_p);
                if (!there || !ranked) continue;
                int32_t before = 0;
                for (int64_t t = 0; t < vocab; t++) {
                    const double x = logit(&rows, r, t);
                    before += x > l || (x == l && t < token);
                }
                if (((int32_t *)case_row(&ranks, r))[i] != before)
                    fail_msg("%s: vocab %d, row %d, token %d of logit %.9g: rank %d, not %d",
                             contexts.name[c], (int)vocab, (int)r, token, l,
                             ((int32_t *)case_row(&ranks, r))[i], before);
            }
        }
        if (c == 0) {
            first = malloc(logs.bytes);
            memcpy(first, logs.block, logs.bytes);
        }
        assert_memory_equal(first, logs.block, logs.bytes);
        view_check_guards(&logs), view_check_guards(&ranks);
        view_free(&logs), view_free(&ranks);
    }
    free(first);
    view_free(&rows), view_free(&tokens);
}

static void random_rows(void **state)
{
    (void)state;
    static const int64_t vocabs[] = {1, 2, 127, 1000, 5003};
    for (int n = sampling_cases(100); n > 0; n--)
        check(test_below(6), vocabs[test_below(5)], test_below(9), -1);
}

static void rows_of_every_size(void **state)
{
    (void)state;
    static const int64_t vocabs[] = {32000, 128256, 151936, 256000, 500000};
    for (int v = 0; v < 5; v++)
        for (int i = 0; i < 2; i++)
            check(1, sampling_vocab(vocabs[v]), 4, (int)test_below(ROW_DIRTY + 1));
    check(test_is_emulated() ? 17 : 4096, 33, 1, ROW_SMOOTH);
    check(3, 200, 150, ROW_SMOOTH); /* more tokens than threads look at together */
}

/* The top n with their log-probabilities, as engines ask for them: ranks are 0, 1, 2 ... */
static void the_top_n_have_their_ranks(void **state)
{
    (void)state;
    enum { VOCAB = 3000, N = 20 };
    static float row[2][VOCAB];
    static int32_t top[2][N], ranks[2][N];
    static float logs[2][N];
    for (int i = 0; i < 2 * VOCAB; i++) row[i / VOCAB][i % VOCAB] = (float)test_uniform(5);
    for (int i = 0; i < VOCAB; i++) row[1][i] = (float)test_below(3);
    for (int c = 0; c < contexts.n; c++) {
        DLTensor *x = TENSOR(row, QKV_F32, 2, VOCAB), *t = TENSOR(top, QKV_I32, 2, N);
        memset(ranks, 0xff, sizeof ranks);
        EXPECT_OK(qkv_top_k(contexts.ctx[c], NULL, t, x, 1, NULL));
        EXPECT_OK(qkv_log_probs(contexts.ctx[c], TENSOR(logs, QKV_F32, 2, N),
                                TENSOR(ranks, QKV_I32, 2, N), x, t, NULL));
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < N; i++) {
                assert_int_equal(ranks[r][i], i);
                assert_true(i == 0 || logs[r][i] <= logs[r][i - 1]);
            }
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_rows),
        cmocka_unit_test(rows_of_every_size),
        cmocka_unit_test(the_top_n_have_their_ranks),
    };
    return cmocka_run_group_tests_name("log_probs", tests, contexts_open, contexts_close);
}
