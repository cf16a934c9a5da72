/* test_tensor.c - when do two tensors share memory? Against a list of every byte.
 * SPDX-License-Identifier: Apache-2.0 */
#include "support.h"

#include "base/tensor.h"

#define ARENA 4096

static char arena[ARENA];

/* A random view of up to 3 axes that fits the arena. */
static void random_view(test_tensor *x)
{
    static const DLDataType dtypes[] = {{2, 32, 1}, {2, 16, 1}};
    const int64_t shape[] = {1 + test_below(4), 1 + test_below(4), 1 + test_below(6)};
    const int first = (int)test_below(3);
    test_tensor_init(x, arena, dtypes[test_below(2)], 3 - first, shape + first);
    for (int i = 0; i + 1 < x->t.ndim; i++) x->strides[i] = 2 * test_below(40);
    x->t.byte_offset = 4 * (uint64_t)test_below(64);
}

static void mark(const DLTensor *t, char *bytes, char with, int *shared)
{
    int64_t index[3] = {0};
    for (int64_t n = qi_numel(t); n > 0; n--) {
        int64_t at = 0;
        for (int i = 0; i < t->ndim; i++) at += index[i] * qi_stride(t, i);
        const int size = t->dtype.bits / 8;
        for (int b = 0; b < size; b++) {
            char *byte = &bytes[(int64_t)t->byte_offset + at * size + b];
            if (*byte && *byte != with) *shared = 1;
            *byte = with;
        }
        for (int i = t->ndim - 1; i >= 0 && ++index[i] == t->shape[i]; i--) index[i] = 0;
    }
}

static void overlap_is_never_missed(void **state)
{
    (void)state;
    int apart = 0;
    for (int trial = 0; trial < 100000; trial++) {
        char bytes[ARENA] = {0};
        int shared = 0;
        test_tensor a, b;
        random_view(&a);
        random_view(&b);
        mark(&a.t, bytes, 1, &shared);
        mark(&b.t, bytes, 2, &shared);
        if (shared) assert_true(qi_overlap(&a.t, &b.t));
        assert_int_equal(qi_overlap(&a.t, &b.t) != 0, qi_overlap(&b.t, &a.t) != 0);
        apart += !qi_overlap(&a.t, &b.t);
    }
    assert_true(apart > 1000); /* or the test would prove nothing */
}

static void overlap_sees_parts_of_one_tensor_apart(void **state)
{
    (void)state;
    enum { T = 5, H = 3, D = 4 };
    static float x[T * H * 3 * D];
    static const struct {
        const char *why;
        int64_t shape_a[3], strides_a[3], offset_b, shape_b[3], strides_b[3];
        int apart;
    } cases[] = {
        {"rows after rows", {T, H, D}, {H * D, D, 1}, T * H * D, {T, H, D}, {H * D, D, 1}, 1},
        {"halves of rows", {T, H, D}, {2 * H * D, D, 1}, H * D, {T, H, D}, {2 * H * D, D, 1}, 1},
        {"q and k head by head", {T, H, D}, {9 * D, 3 * D, 1}, D, {T, H, D}, {9 * D, 3 * D, 1}, 1},
        {"one column too many",
         {T, H, D + 1},
         {9 * D, 3 * D, 1},
         D,
         {T, H, D},
         {9 * D, 3 * D, 1},
         0},
        {"the same", {T, H, D}, {H * D, D, 1}, 0, {T, H, D}, {H * D, D, 1}, 0},
        {"a head of the other", {T, H, D}, {H * D, D, 1}, D, {T, 1, D}, {H * D, D, 1}, 0},
        {"nothing", {0, H, D}, {H * D, D, 1}, 0, {T, H, D}, {H * D, D, 1}, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        test_tensor a, b;
        test_tensor_init(&a, x, QKV_F32, 3, cases[i].shape_a);
        test_tensor_init(&b, x + cases[i].offset_b, QKV_F32, 3, cases[i].shape_b);
        memcpy(a.strides, cases[i].strides_a, sizeof cases[i].strides_a);
        memcpy(b.strides, cases[i].strides_b, sizeof cases[i].strides_b);
        if (qi_overlap(&a.t, &b.t) == cases[i].apart || qi_overlap(&b.t, &a.t) == cases[i].apart)
            fail_msg("%s", cases[i].why);
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(overlap_is_never_missed),
        cmocka_unit_test(overlap_sees_parts_of_one_tensor_apart),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
