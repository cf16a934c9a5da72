/* test_cublaslt.c - what the library asks of cuBLASLt, and when: a stand-in with the same functions multiplies
 * on the CPU and counts. No GPU is needed; test_gemm.c runs the real one.
 * SPDX-License-Identifier: Apache-2.0 */
#include "device/cublaslt.h"

#include "support.h"

/* ---- the stand-in ------------------------------------------------------------------------- */

struct lt_layout {
    uint32_t type;
    uint64_t rows, columns;
    int64_t pitch;
};

struct lt_operation {
    int32_t transpose_a;
};

struct lt_preference {
    uint64_t max_workspace;
    uint32_t reductions, alignments[4]; /* a, b, c, d */
};

static struct {
    struct lt_layout layouts[3];
    struct lt_operation operation;
    struct lt_preference preference;
    int num_layouts, chosen, multiplied, allocated, freed, destroyed;
    int mode; /* of this thread's captures */
    int offers, refuses_alloc, fails;
    size_t wants_workspace; /* of the algorithms that may have one */
    void *workspace;        /* of the last product */
    size_t workspace_bytes;
} fake;

static int a_handle;

static size_t version(void)
{
    return 130000;
}

static int create(lt_handle *handle)
{
    assert_int_equal(fake.mode, CU_CAPTURE_RELAXED);
    *handle = (lt_handle)(void *)&a_handle;
    return LT_SUCCESS;
}

static int destroy(lt_handle handle)
{
    assert_ptr_equal(handle, &a_handle);
    fake.destroyed++;
    return LT_SUCCESS;
}

static int operation_create(lt_operation *operation, int compute_type, int scale_type)
{
    assert_int_equal(compute_type, LT_COMPUTE_F32);
    assert_int_equal(scale_type, LT_F32);
    *operation = &fake.operation;
    return LT_SUCCESS;
}

static int operation_set(lt_operation operation, int attribute, const void *value, size_t bytes)
{
    assert_int_equal(attribute, LT_OPERATION_TRANSPOSE_A);
    assert_int_equal(bytes, 4);
    memcpy(&operation->transpose_a, value, bytes);
    return LT_SUCCESS;
}

static int operation_destroy(lt_operation operation)
{
    (void)operation;
    return LT_SUCCESS;
}

static int layout_create(lt_layout *layout, int type, u64 rows, u64 columns, i64 pitch)
{
    *layout = &fake.layouts[fake.num_layouts++];
    **layout = (struct lt_layout){(uint32_t)type, rows, columns, pitch};
    return LT_SUCCESS;
}

static int layout_set(lt_layout layout, int attribute, const void *value, size_t bytes)
{
    void *const to[] = {&layout->type, NULL, &layout->rows, &layout->columns, &layout->pitch};
    assert_int_equal(bytes, attribute == LT_TYPE ? 4 : 8);
    memcpy(to[attribute], value, bytes);
    return LT_SUCCESS;
}

static int layout_destroy(lt_layout layout)
{
    (void)layout;
    fake.num_layouts--;
    return LT_SUCCESS;
}

static int preference_create(lt_preference *preference)
{
    *preference = &fake.preference;
    return LT_SUCCESS;
}

static int preference_set(lt_preference preference, int attribute, const void *value, size_t bytes)
{
    assert_int_equal(bytes, attribute == LT_MAX_WORKSPACE ? 8 : 4);
    memcpy(attribute == LT_MAX_WORKSPACE ? (void *)&preference->max_workspace
           : attribute == LT_REDUCTIONS  ? &preference->reductions
                                         : &preference->alignments[attribute - LT_ALIGNMENT_A],
           value, bytes);
    return LT_SUCCESS;
}

static int preference_destroy(lt_preference preference)
{
    (void)preference;
    return LT_SUCCESS;
}

static int choose(lt_handle handle, lt_operation operation, lt_layout a, lt_layout b, lt_layout c,
                  lt_layout d, lt_preference preference, int wanted, lt_choice *choices, int *count)
{
    (void)handle, (void)a, (void)b;
    assert_int_equal(fake.mode, CU_CAPTURE_RELAXED);
    assert_int_equal(operation->transpose_a, LT_TRANSPOSED);
    assert_int_equal(preference->reductions, LT_REDUCTION_COMPUTE_TYPE);
    assert_ptr_equal(c, d);
    assert_int_equal(wanted, 1);
    fake.chosen++;
    *count = fake.offers;
    const size_t bytes =
        preference->max_workspace < fake.wants_workspace ? 0 : fake.wants_workspace;
    *choices =
        (lt_choice){.algorithm.data = {d->rows, d->columns, bytes}, .workspace_bytes = bytes};
    return LT_SUCCESS;
}

static DLDataType type_of(uint32_t type)
{
    return type == LT_F32 ? QKV_F32 : type == LT_F16 ? QKV_F16 : QKV_BF16;
}

/* d = a^T b, column-major. */
static int multiply(lt_handle handle, lt_operation operation, const void *alpha, const void *a,
                    lt_layout of_a, const void *b, lt_layout of_b, const void *beta, const void *c,
                    lt_layout of_c, void *d, lt_layout of_d, const lt_algorithm *algorithm,
                    void *workspace, size_t workspace_bytes, cu_stream stream)
{
    (void)handle, (void)operation, (void)stream;
    assert_true(*(const float *)alpha == 1.f && *(const float *)beta == 0.f);
    assert_ptr_equal(c, d);
    assert_ptr_equal(of_c, of_d);
    assert_int_equal(algorithm->data[0], of_d->rows);
    assert_int_equal(algorithm->data[1], of_d->columns);
    assert_true(algorithm->data[2] <= workspace_bytes);
    assert_int_equal(of_a->rows, of_b->rows);
    assert_int_equal(of_a->columns, of_d->rows);
    assert_int_equal(of_b->columns, of_d->columns);
    fake.multiplied++;
    fake.workspace = workspace;
    fake.workspace_bytes = workspace_bytes;
    if (fake.fails) return 13;
    for (int64_t j = 0; j < (int64_t)of_d->columns; j++)
        for (int64_t i = 0; i < (int64_t)of_d->rows; i++) {
            double sum = 0;
            for (int64_t l = 0; l < (int64_t)of_a->rows; l++)
                sum += test_get(a, type_of(of_a->type), i * of_a->pitch + l) *
                       test_get(b, type_of(of_b->type), j * of_b->pitch + l);
            test_put(d, type_of(of_d->type), j * of_d->pitch + i, sum);
        }
    return LT_SUCCESS;
}

static const qi_cublaslt_api api = {
#define X(name, symbol, result, args) name,
    QI_CUBLASLT_API(X)
#undef X
};

/* ---- and of the driver -------------------------------------------------------------------- */

static cu_context the_context;

static int context_current(cu_context *context)
{
    *context = the_context;
    return CU_SUCCESS;
}

static int context_set(cu_context context)
{
    the_context = context;
    return CU_SUCCESS;
}

static int capture_mode(int *mode)
{
    const int before = fake.mode;
    fake.mode = *mode;
    *mode = before;
    return CU_SUCCESS;
}

static int memory_alloc(cu_ptr *ptr, size_t bytes)
{
    static char blocks[64];
    assert_int_equal(bytes, 32 << 20);
    assert_int_equal(fake.mode, CU_CAPTURE_RELAXED);
    if (fake.refuses_alloc) return CU_OUT_OF_MEMORY;
    *ptr = (cu_ptr)(uintptr_t)&blocks[fake.allocated++];
    return CU_SUCCESS;
}

static int memory_free(cu_ptr ptr)
{
    (void)ptr;
    fake.freed++;
    return CU_SUCCESS;
}

static int error_string(int result, const char **text)
{
    (void)result;
    *text = "refused";
    return CU_SUCCESS;
}

static qi_cuda_device device;

static int begin(void **state)
{
    static qi_cublaslt lt;
    memset(&fake, 0, sizeof fake);
    fake.offers = 1;
    qi_cuda = (qi_cuda_api){.context_current = context_current,
                            .context_set = context_set,
                            .capture_mode = capture_mode,
                            .memory_alloc = memory_alloc,
                            .memory_free = memory_free,
                            .error_string = error_string};
    device.context = (cu_context)(void *)&device;
    qi_cublaslt_init(&lt);
    lt.api = &api;
    *state = &lt;
    return 0;
}

/* Nothing stays, and the thread is as it was. */
static int end(void **state)
{
    qi_cublaslt_free(*state, &device);
    assert_int_equal(fake.destroyed, 1);
    assert_int_equal(fake.num_layouts, 0);
    assert_int_equal(fake.freed, fake.allocated);
    assert_int_equal(fake.mode, 0);
    assert_null(the_context);
    return 0;
}

/* ---- tests -------------------------------------------------------------------------------- */

enum { M = 3, N = 5, K = 4, PITCH = 8 };

static qi_matmul problem_of(qi_dtype dtype, qi_dtype dtype_out)
{
    return (qi_matmul){.m = M,
                       .n = N,
                       .k = K,
                       .out_stride = PITCH,
                       .x_stride = PITCH,
                       .w_stride = K,
                       .dtype = dtype,
                       .dtype_out = dtype_out,
                       .out_alignment = 64,
                       .x_alignment = 16,
                       .w_alignment = 256};
}

static qkv_status multiply_on(qi_cublaslt *lt, const qi_matmul *p, void *stream)
{
    static float out[M * PITCH], x[M * PITCH], w[N * PITCH];
    assert_null(qi_cublaslt_declines(lt, &device, p));
    return qi_cublaslt_multiply(lt, &device, p, out, x, w, stream);
}

static void cublaslt_multiplies_row_major_matrices(void **state)
{
    static const struct {
        qi_dtype dtype, dtype_out;
        DLDataType in, out;
    } types[] = {{QI_F32, QI_F32, {2, 32, 1}, {2, 32, 1}},
                 {QI_BF16, QI_BF16, {4, 16, 1}, {4, 16, 1}},
                 {QI_F16, QI_F32, {2, 16, 1}, {2, 32, 1}}};
    qi_cublaslt *lt = *state;
    for (size_t t = 0; t < sizeof types / sizeof types[0]; t++) {
        float out[M * PITCH] = {0}, x[M * PITCH] = {0}, w[N * K] = {0};
        const qi_matmul p = problem_of(types[t].dtype, types[t].dtype_out);
        for (int i = 0; i < M * PITCH; i++) test_put(x, types[t].in, i, (double)test_below(9) - 4);
        for (int i = 0; i < N * K; i++) test_put(w, types[t].in, i, (double)test_below(9) - 4);
        assert_null(qi_cublaslt_declines(lt, &device, &p));
        assert_true(qi_cublaslt_multiply(lt, &device, &p, out, x, w, NULL) == QKV_OK);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < PITCH; j++) {
                double want = 0;
                for (int l = 0; l < K && j < N; l++)
                    want += test_get(x, types[t].in, i * PITCH + l) *
                            test_get(w, types[t].in, j * K + l);
                assert_true(test_get(out, types[t].out, i * PITCH + j) == want);
            }
        const uint32_t alignments[] = {256, 16, 64, 64};
        assert_memory_equal(fake.preference.alignments, alignments, sizeof alignments);
    }
}

static void cublaslt_is_asked_once_a_problem(void **state)
{
    qi_cublaslt *lt = *state;
    qi_matmul p = problem_of(QI_BF16, QI_BF16);
    for (int i = 0; i < 10; i++) {
        assert_true(multiply_on(lt, &p, NULL) == QKV_OK);
    }
    assert_int_equal(fake.chosen, 1);
    p.x_alignment = 2;
    assert_null(qi_cublaslt_declines(lt, &device, &p));
    assert_int_equal(fake.chosen, 2);
    for (p.m = 1; p.m <= 5000; p.m++) assert_null(qi_cublaslt_declines(lt, &device, &p));
    p = problem_of(QI_BF16, QI_BF16); /* forgotten, or not */
    assert_true(multiply_on(lt, &p, NULL) == QKV_OK);
    assert_int_equal(fake.allocated, 0); /* no algorithm wanted any */
}

static void cublaslt_declines_what_has_no_algorithm(void **state)
{
    qi_cublaslt *lt = *state;
    const qi_matmul p = problem_of(QI_F32, QI_F32);
    fake.offers = 0;
    for (int i = 0; i < 2; i++)
        assert_string_equal(qi_cublaslt_declines(lt, &device, &p),
                            "cuBLASLt has no algorithm for it");
    assert_int_equal(fake.chosen, 1);
}

static void cublaslt_has_a_workspace_for_each_stream(void **state)
{
    qi_cublaslt *lt = *state;
    const qi_matmul p = problem_of(QI_BF16, QI_BF16);
    char streams[20];
    void *of_first = NULL;
    fake.wants_workspace = 1 << 20;
    for (int i = 0; i < 20; i++) {
        assert_true(multiply_on(lt, &p, &streams[i]) == QKV_OK);
        if (i == 0) of_first = fake.workspace;
        assert_int_equal(fake.allocated, i < 16 ? i + 1 : 16);
        assert_int_equal(fake.workspace != NULL, i < 16); /* later ones do without */
        assert_int_equal(fake.workspace == of_first, i == 0);
    }
    assert_true(multiply_on(lt, &p, &streams[0]) == QKV_OK);
    assert_ptr_equal(fake.workspace, of_first);
    assert_int_equal(fake.allocated, 16);
}

static void cublaslt_does_without_a_workspace(void **state)
{
    qi_cublaslt *lt = *state;
    const qi_matmul p = problem_of(QI_BF16, QI_BF16);
    fake.wants_workspace = 1 << 20;
    assert_true(multiply_on(lt, &p, (void *)2) == QKV_OK); /* a stream of each thread */
    assert_null(fake.workspace);
    fake.refuses_alloc = 1;
    assert_true(multiply_on(lt, &p, NULL) == QKV_OK);
    assert_null(fake.workspace);
    assert_int_equal(fake.chosen, 2); /* with, and without */
}

static void cublaslt_failures_are_statuses(void **state)
{
    const qi_matmul p = problem_of(QI_BF16, QI_BF16);
    fake.fails = 1;
    EXPECT_FAIL(QKV_ERR_DEVICE, "cublasLtMatmul: status 13", multiply_on(*state, &p, NULL));
}

int main(void)
{
    if (test_on_cuda()) return 0; /* the driver's table is the stand-in's here */
    test_seed();
#define TEST(name) cmocka_unit_test_setup_teardown(name, begin, end)
    const struct CMUnitTest tests[] = {
        TEST(cublaslt_multiplies_row_major_matrices),
        TEST(cublaslt_is_asked_once_a_problem),
        TEST(cublaslt_declines_what_has_no_algorithm),
        TEST(cublaslt_has_a_workspace_for_each_stream),
        TEST(cublaslt_does_without_a_workspace),
        TEST(cublaslt_failures_are_statuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
