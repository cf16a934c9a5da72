/* test_streams.c - outputs so large that they are stored past the caches: the same bits as in small
 * calls, wherever rows begin, and nothing beside them.
 * SPDX-License-Identifier: Apache-2.0 */
#include "view.h"

enum { LARGE = 9 << 20 /* bytes of an output, more than the operators keep in caches */ };

/* How the rows of the output lie. */
static const struct {
    const char *why;
    int64_t size, stride, offset; /* elements */
} forms[] = {
    {"adjoining rows of whole lines", 1024, 1024, 0},
    {"rows of no whole number of vectors", 1003, 1024, 0},
    {"rows apart", 1024, 1056, 32},
    {"rows that begin anywhere", 1003, 1037, 5},
};

typedef struct large {
    char *block; /* poisoned, aligned to 64 bytes */
    size_t bytes;
    int64_t shape[2], strides[2];
    DLTensor t;
} large;

static void large_new(large *x, DLDataType dtype, int64_t rows, int form)
{
    const size_t element = test_bytes(dtype);
    const int64_t stride = forms[form].stride, offset = forms[form].offset;
    x->bytes = ((size_t)(offset + rows * stride) * element + 127) / 64 * 64;
    x->block = aligned_alloc(64, x->bytes);
    assert_non_null(x->block);
    memset(x->block, VIEW_POISON, x->bytes);
    x->shape[0] = rows, x->shape[1] = forms[form].size;
    x->strides[0] = stride, x->strides[1] = 1;
    x->t = (DLTensor){.data = x->block,
                      .device = {kDLCPU, 0},
                      .ndim = 2,
                      .dtype = dtype,
                      .shape = x->shape,
                      .strides = x->strides,
                      .byte_offset = (uint64_t)offset * element};
}

/* Rows [from, from + n) of a tensor. */
static DLTensor rows_of(const large *x, int64_t from, int64_t shape[2], int64_t n)
{
    DLTensor part = x->t;
    shape[0] = n, shape[1] = x->shape[1];
    part.shape = shape;
    part.byte_offset += (uint64_t)(from * x->strides[0]) * test_bytes(x->t.dtype);
    return part;
}

typedef qkv_status (*operator)(qkv_context *ctx, DLTensor *out, DLTensor *a, const DLTensor *b);

static qkv_status run_gated(qkv_context *ctx, DLTensor *out, DLTensor *a, const DLTensor *b)
{
    return qkv_gated_activation(ctx, out, a, b, QKV_SILU, NULL);
}

static float weight[1024];

static qkv_status run_rmsnorm(qkv_context *ctx, DLTensor *out, DLTensor *a, const DLTensor *b)
{
    (void)b;
    return qkv_rmsnorm(ctx, out, a, TENSOR(weight, QKV_F32, a->shape[1]), 1e-6f, 0, NULL);
}

static qkv_status run_add_rmsnorm(qkv_context *ctx, DLTensor *out, DLTensor *a, const DLTensor *b)
{
    return qkv_add_rmsnorm(ctx, out, a, b, TENSOR(weight, QKV_F32, a->shape[1]), 1e-6f, 0, NULL);
}

static void check_operator(qkv_context *ctx, operator run, const char *name, DLDataType dtype,
                           int form)
{
    const int64_t rows = LARGE / (forms[form].size * (int64_t)test_bytes(dtype));
    large out[2], a[2], b;
    for (int i = 0; i < 2; i++) {
        large_new(&out[i], dtype, rows, form);
        large_new(&a[i], dtype, rows, form);
    }
    large_new(&b, dtype, rows, form);
    for (size_t i = 0; i < b.bytes / test_bytes(dtype); i++) {
        test_put(a[0].block, dtype, (int64_t)i, test_uniform(4));
        test_put(b.block, dtype, (int64_t)i, test_uniform(4));
    }
    memcpy(a[1].block, a[0].block, a[0].bytes); /* which an operator may change */
    EXPECT_OK(run(ctx, &out[0].t, &a[0].t, &b.t));
    for (int64_t row = 0, n; row < rows; row += n) {
        int64_t shapes[3][2];
        n = rows - row < 500 ? rows - row : 500;
        DLTensor out_part = rows_of(&out[1], row, shapes[0], n);
        DLTensor a_part = rows_of(&a[1], row, shapes[1], n),
                 b_part = rows_of(&b, row, shapes[2], n);
        EXPECT_OK(run(ctx, &out_part, &a_part, &b_part));
    }
    if (memcmp(out[0].block, out[1].block, out[0].bytes) != 0 ||
        memcmp(a[0].block, a[1].block, a[0].bytes) != 0)
        fail_msg("%s: %s of %d bits: a large call differs from small ones", name, forms[form].why,
                 dtype.bits);
    for (int i = 0; i < 2; i++) {
        free(out[i].block);
        free(a[i].block);
    }
    free(b.block);
}

static void check_operators(qkv_context *ctx, void *user)
{
    (void)user;
    for (int i = 0; i < 1024; i++) weight[i] = (float)test_uniform(2);
    for (int form = 0; form < 4; form++)
        for (int dtype = 0; dtype < 3; dtype++) {
            check_operator(ctx, run_gated, "gated_activation", float_dtypes[dtype], form);
            check_operator(ctx, run_rmsnorm, "rmsnorm", float_dtypes[dtype], form);
            check_operator(ctx, run_add_rmsnorm, "add_rmsnorm", float_dtypes[dtype], form);
        }
}

static void large_outputs_have_the_bits_of_small_ones(void **state)
{
    (void)state;
    test_every_level(2, check_operators, NULL);
}

/* Rows of k and v scattered to pages in random order are found there. */
static void check_append(qkv_context *ctx, void *user)
{
    (void)user;
    enum { TOKENS = 3000, HEADS = 4, PAGE = 16, PAGES = TOKENS / PAGE + 1 };
    for (int64_t dim = 250; dim <= 256; dim += 6) {
        const int64_t row = HEADS * dim, count = PAGES * PAGE * row;
        float *k = malloc((size_t)(TOKENS * row) * 4), *v = malloc((size_t)(TOKENS * row) * 4);
        float *caches = aligned_alloc(64, (size_t)((2 * count * 4 + 63) / 64 * 64));
        int32_t *slots = malloc(TOKENS * sizeof *slots);
        assert_true(k && v && caches && slots);
        memset(caches, VIEW_POISON, (size_t)(2 * count) * 4);
        for (int64_t i = 0; i < TOKENS * row; i++) {
            k[i] = (float)test_uniform(1);
            v[i] = (float)test_uniform(1);
        }
        for (int32_t i = 0; i < TOKENS; i++) {
            const int64_t j = test_below(i + 1);
            slots[i] = slots[j];
            slots[j] = i;
        }
        EXPECT_OK(qkv_kv_append_slots(ctx, TENSOR(caches, QKV_F32, PAGES, PAGE, HEADS, dim),
                                      TENSOR(caches + count, QKV_F32, PAGES, PAGE, HEADS, dim),
                                      QKV_NHD, TENSOR(k, QKV_F32, TOKENS, HEADS, dim),
                                      TENSOR(v, QKV_F32, TOKENS, HEADS, dim),
                                      TENSOR(slots, QKV_I32, TOKENS), NULL, NULL));
        for (int64_t i = 0; i < TOKENS; i++) {
            assert_memory_equal(caches + slots[i] * row, k + i * row, (size_t)row * 4);
            assert_memory_equal(caches + count + slots[i] * row, v + i * row, (size_t)row * 4);
        }
        for (int64_t i = TOKENS * row; i < count; i++)
            assert_true(isnan(caches[i]) && isnan(caches[count + i])); /* slots of no row */
        free(k);
        free(v);
        free(caches);
        free(slots);
    }
}

static void large_appends_reach_their_slots(void **state)
{
    (void)state;
    test_every_level(2, check_append, NULL);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(large_outputs_have_the_bits_of_small_ones),
        cmocka_unit_test(large_appends_reach_their_slots),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
