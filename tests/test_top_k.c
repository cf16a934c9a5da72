/* test_top_k.c - qkv_top_k against a sort: values, indices, ties, both orders, k from 1 to the whole row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "sampling_case.h"

typedef struct item {
    double value;
    int32_t index;
} item;

static int by_value(const void *a, const void *b)
{
    const item *x = a, *y = b;
    if (x->value != y->value) return x->value > y->value ? -1 : 1;
    return (x->index > y->index) - (x->index < y->index);
}

static int by_index(const void *a, const void *b)
{
    const item *x = a, *y = b;
    return (x->index > y->index) - (x->index < y->index);
}

/* The row's k, in the order that is asked for. */
static void expect(const view *rows, int64_t row, int64_t k, bool sorted, item *items)
{
    const int64_t vocab = rows->shape[1];
    for (int64_t i = 0; i < vocab; i++) {
        const double x = view_get(rows, row * vocab + i);
        items[i] = (item){isnan(x) ? (double)-INFINITY : x, (int32_t)i};
    }
    qsort(items, (size_t)vocab, sizeof *items, by_value);
    if (!sorted) qsort(items, (size_t)k, sizeof *items, by_index);
}

/* What counts as -inf or as the largest finite number may be given as it stands. */
static bool is_value(DLDataType dtype, double got, double expected)
{
    const double largest = dtype.code == 4    ? 0x1.fep127
                           : dtype.bits == 32 ? (double)FLT_MAX
                                              : 65504;
    if (expected == (double)INFINITY) return got == expected || got == largest;
    return got == expected || (expected == (double)-INFINITY && isnan(got));
}

static void check_of(DLDataType dtype, int64_t batch, int64_t vocab, int64_t k, row_shape shape,
                     bool with_values)
{
    if (k > vocab) k = vocab; /* emulated rows are shorter */
    view rows, values, indices;
    item *items = malloc((size_t)vocab * sizeof *items);
    view_new(&rows, dtype, test_below(2) ? 9 : 0, TEST_SHAPE(batch, vocab));
    for (int64_t r = 0; r < batch; r++)
        row_fill(rows.block, dtype, view_index(&rows, r * vocab), vocab, QKV_LOGITS, shape);
    for (int sorted = 0; sorted < 2; sorted++) {
        for (int c = 0; c < contexts.n; c++) { /* what is exact is the same on all */
            const int64_t pad = test_below(2) ? 3 : 0;
            view_new(&values, dtype, pad, TEST_SHAPE(batch, k));
            view_new(&indices, QKV_I32, pad, TEST_SHAPE(batch, k));
            EXPECT_OK(qkv_top_k(contexts.ctx[c], with_values ? &values.t : NULL, &indices.t,
                                &rows.t, sorted, NULL));
            for (int64_t r = 0; r < batch; r++) {
                const int32_t *got = case_row(&indices, r);
                expect(&rows, r, k, sorted, items);
                for (int64_t i = 0; i < k; i++) {
                    const double value = view_get(&values, r * k + i);
                    if (got[i] != items[i].index ||
                        (with_values && !is_value(dtype, value, items[i].value)))
                        fail_msg(
                            "%s: vocab %d, %s, k %d, %s, row %d: place %d has token %d of value "
                            "%.9g, not %d of %.9g",
                            contexts.name[c], (int)vocab, row_shape_names[shape], (int)k,
                            sorted ? "sorted" : "by index", (int)r, (int)i, got[i], value,
                            items[i].index, items[i].value);
                }
            }
            view_check_guards(&indices);
            view_check_guards(&values); /* all of it, without values */
            view_free(&values), view_free(&indices);
        }
    }
    view_free(&rows);
    free(items);
}

static void check(int64_t batch, int64_t vocab, int64_t k, row_shape shape, bool with_values)
{
    check_of(float_dtypes[test_below(3)], batch, vocab, k, shape, with_values);
}

static void random_rows(void **state)
{
    (void)state;
    static const int64_t vocabs[] = {1, 2, 5, 127, 1000, 2048, 5003};
    for (int n = sampling_cases(80); n > 0; n--) {
        const int64_t vocab = vocabs[test_below(7)];
        const int64_t ks[] = {1, vocab, vocab - !!(vocab - 1), 1 + test_below(vocab),
                              1 + test_below(vocab < 100 ? vocab : 100)};
        check(test_below(6), vocab, ks[test_below(5)], (row_shape)test_below(ROW_NUM_SHAPES),
              test_below(3));
    }
}

static void rows_of_every_size(void **state)
{
    (void)state;
    static const int64_t vocabs[] = {32000, 128256, 151936, 256000, 500000};
    static const int64_t ks[] = {1, 8, 50, 256, 2048};
    for (int v = 0; v < 5; v++) {
        const int64_t vocab = sampling_vocab(vocabs[v]);
        for (int i = 0; i < 2; i++)
            check(1, vocab, ks[test_below(5)], i ? ROW_TIES : ROW_SMOOTH, true);
    }
    check(1, sampling_vocab(128256), 2048, ROW_SMOOTH, true);
    check_of(QKV_F32, 1, 20000, 50, ROW_SMOOTH, true); /* a small GPU's block has no room for it */
    check(1, 9000, 8500, ROW_SMOOTH, true);            /* more than a block of a GPU sorts */
    check(2, 9001, 60, ROW_TIES, true);                /* so many reach the bound */
    check(2, 9001, 60, ROW_ONE_HOT, true);             /* all do */
    check(1, sampling_vocab(32000), sampling_vocab(32000), ROW_HEAVY_TAIL, true);
    check(1, sampling_vocab(128256), sampling_vocab(128256), ROW_NEAR_TIES, false);
    check(test_is_emulated() ? 17 : 4096, 33, 4, ROW_SMOOTH, true);
}

/* The order of the header by hand: ties, -0, NaN as -inf. */
static void ties_are_by_index(void **state)
{
    (void)state;
    enum { TOKENS = 9 };
    const float nan = NAN, inf = INFINITY;
    float row[TOKENS] = {1, nan, -0.f, 5, 0, 5, -inf, nan, 1}, values[TOKENS];
    const int32_t sorted[TOKENS] = {3, 5, 0, 8, 2, 4, 1, 6, 7};
    int32_t indices[TOKENS];
    for (int c = 0; c < contexts.n; c++)
        for (int64_t k = 1; k <= TOKENS; k++) {
            EXPECT_OK(qkv_top_k(contexts.ctx[c], TENSOR(values, QKV_F32, 1, k),
                                TENSOR(indices, QKV_I32, 1, k), TENSOR(row, QKV_F32, 1, TOKENS), 1,
                                NULL));
            assert_memory_equal(indices, sorted, (size_t)k * sizeof *indices);
            for (int64_t i = 0; i < k; i++)
                assert_true(isnan(row[sorted[i]]) || values[i] == row[sorted[i]]);
        }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_rows),
        cmocka_unit_test(rows_of_every_size),
        cmocka_unit_test(ties_are_by_index),
    };
    return cmocka_run_group_tests_name("top_k", tests, contexts_open, contexts_close);
}
