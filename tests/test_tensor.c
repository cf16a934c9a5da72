/* test_tensor.c - sizes in bounds, and who shares memory with whom: against a list of every byte.
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

/* A tensor whose elements share memory with each other is never taken for an output, and one that a
 * framework would make always is. */
static void distinct_elements_are_told_from_shared_ones(void **state)
{
    (void)state;
    int distinct = 0;
    for (int trial = 0; trial < 100000; trial++) {
        unsigned char times[ARENA] = {0};
        int shared = 0;
        test_tensor x;
        random_view(&x);
        for (int64_t n = 0; n < qi_numel(&x.t); n++) {
            int64_t at = 0, rest = n;
            for (int i = x.t.ndim - 1; i >= 0; i--) {
                at += rest % x.shape[i] * x.strides[i];
                rest /= x.shape[i];
            }
            shared |= times[at]++ > 0;
        }
        const qkv_status status = qi_expect_distinct(&x.t, "x");
        if (shared) assert_int_equal(status, QKV_ERR_INVALID);
        distinct += status == QKV_OK;
    }
    assert_true(distinct > 1000); /* or the test would prove nothing */

    enum { T = 5, H = 3, D = 4 };
    static const struct {
        const char *why;
        int64_t shape[3], strides[3];
        const char *message; /* NULL: taken */
    } cases[] = {
        {"contiguous", {T, H, D}, {H * D, D, 1}, NULL},
        {"a part of a wider tensor", {T, H, D}, {9 * D, 3 * D, 1}, NULL},
        {"heads before tokens", {T, H, D}, {D, T * D, 1}, NULL},
        {"any stride where there is one index", {1, H, D}, {0, D, 1}, NULL},
        {"no elements", {T, 0, D}, {0, 0, 1}, NULL},
        {"every row in one place", {T, H, D}, {0, D, 1}, "got stride 0 on axis 0"},
        {"rows one element too near", {T, H, D}, {H * D - 1, D, 1}, "got stride 11 on axis 0"},
        {"heads in one another", {T, H, D}, {H * D, D - 1, 1}, "x: expected elements apart"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        test_tensor x;
        test_tensor_init(&x, arena, QKV_F32, 3, cases[i].shape);
        memcpy(x.strides, cases[i].strides, sizeof cases[i].strides);
        const qkv_status status = qi_expect_distinct(&x.t, "x");
        if ((status == QKV_OK) != !cases[i].message ||
            (cases[i].message && !strstr(qkv_last_error(), cases[i].message)))
            fail_msg("%s: got %s", cases[i].why, status ? qkv_last_error() : "no error");
    }
}

/* Whatever passes leaves room for every product and sum of sizes, strides and bytes. */
static void tensors_beyond_59_bits_are_refused(void **state)
{
    (void)state;
    const int64_t most = INT64_MAX / 16;
    const struct {
        const char *why;
        int64_t shape[3], strides[3];
        int contiguous; /* strides NULL */
        int taken;
    } cases[] = {
        {"as many as there may be", {1, 1, most}, {0}, 1, 1},
        {"one more", {1, 1, most + 1}, {0}, 1, 0},
        {"its elements can be counted, its bytes not", {2, 1, INT64_MAX / 2}, {0}, 1, 0},
        {"the same with strides", {2, 1, INT64_MAX / 2}, {INT64_MAX / 2, 1, 1}, 0, 0},
        {"not even its elements", {INT64_C(1) << 40, 1, INT64_C(1) << 40}, {0}, 1, 0},
        {"a product that wraps to something small", {INT64_C(1) << 62, 4, 3}, {0}, 1, 0},
        {"no elements, but strides that overflow",
         {0, INT64_C(1) << 40, INT64_C(1) << 40},
         {0},
         1,
         0},
        {"no elements, sizes in bounds", {0, INT64_C(1) << 20, INT64_C(1) << 20}, {0}, 1, 1},
        {"more elements than memory, all in one row", {INT64_C(1) << 58, 2, 4}, {0, 0, 1}, 0, 0},
        {"a far row", {2, 1, 4}, {most, 4, 1}, 0, 0},
        {"a stride that nobody takes", {1, 1, 4}, {INT64_MAX, 4, 1}, 0, 1},
        {"backwards", {2, 1, 4}, {-4, 4, 1}, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        DLTensor x = *TENSOR(arena, QKV_F32, 1, 1, 1);
        x.shape = (int64_t *)(uintptr_t)cases[i].shape;
        x.strides = cases[i].contiguous ? NULL : (int64_t *)(uintptr_t)cases[i].strides;
        const qkv_status status = qi_expect(&x, "x", QKV_F32, QI_SHAPE(QI_ANY, QI_ANY, QI_ANY));
        if (status != (cases[i].taken ? QKV_OK : QKV_ERR_INVALID) ||
            (status && !strstr(qkv_last_error(), "x: expected sizes and strides within 59 bits")))
            fail_msg("%s: got %s", cases[i].why, status ? qkv_last_error() : "no error");
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(overlap_is_never_missed),
        cmocka_unit_test(overlap_sees_parts_of_one_tensor_apart),
        cmocka_unit_test(distinct_elements_are_told_from_shared_ones),
        cmocka_unit_test(tensors_beyond_59_bits_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
