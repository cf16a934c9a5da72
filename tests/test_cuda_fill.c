/* test_cuda_fill.c - QKV_JIT_FILL: a cache filled without a GPU for machines without NVRTC. No GPU is
 * needed, and where there is no NVRTC, nothing is compiled.
 * SPDX-License-Identifier: Apache-2.0 */
#include "device/cuda.h"
#include "jit/jit.h"
#include "variant_case.h"

static char cache_dir[256];
static progress counts;

static int new_cache(void **state)
{
    (void)state;
    folder_new(cache_dir);
    counts = (progress){0};
    return 0;
}

static int free_cache(void **state)
{
    (void)state;
    folder_free(cache_dir);
    return 0;
}

static qkv_context_options fill(const char *isa)
{
    return (qkv_context_options){
        QKV_CONTEXT_OPTIONS_INIT,   .device = {kDLCUDA, 0}, .isa = isa,
        .jit_policy = QKV_JIT_FILL, .cache_dir = cache_dir, .jit_progress = count_progress,
        .jit_user = &counts};
}

static qkv_context *context_for(const char *isa)
{
    const qkv_context_options o = fill(isa);
    qkv_context *ctx;
    EXPECT_OK(qkv_context_create(&o, &ctx));
    return ctx;
}

static void skip_without_compiler(void)
{
    if (qi_nvrtc_find(0)) return;
    printf("skipped: no NVRTC on this machine\n");
    skip();
}

/* Tensors [2, 64] at addresses that no memory is at: nothing is read or written. */
static qkv_status try_normalise(qkv_context *ctx)
{
    int64_t shape[] = {2, 64};
    DLTensor out = {.data = (void *)((uintptr_t)1 << 44),
                    .device = {kDLCUDA, 0},
                    .ndim = 2,
                    .dtype = QKV_BF16,
                    .shape = shape};
    DLTensor x = out, weight = out;
    x.data = (void *)((uintptr_t)2 << 44);
    weight.data = (void *)((uintptr_t)3 << 44);
    weight.ndim = 1;
    weight.shape = shape + 1;
    return qkv_rmsnorm(ctx, &out, &x, &weight, 1e-5f, 0, NULL);
}

static void normalise(qkv_context *ctx)
{
    if (try_normalise(ctx) != QKV_OK) fail_msg("qkv_rmsnorm: %s", qkv_last_error());
}

static qkv_attention_spec small_spec(void)
{
    return (qkv_attention_spec){QKV_ATTENTION_SPEC_INIT, .num_qo_heads = 8,   .num_kv_heads = 2,
                                .head_dim_qk = 64,       .head_dim_vo = 64,   .dtype_q = QKV_BF16,
                                .dtype_kv = QKV_BF16,    .dtype_o = QKV_BF16, .page_size = 16,
                                .mask = QKV_MASK_CAUSAL};
}

static const qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 4,
                                            .max_tokens = 4,           .max_qo_len = 1,
                                            .max_kv_len = 1024,        .max_pages = 256};

/* ---- filling -------------------------------------------------------------------------------- */

static void each_kernel_is_compiled_once_for_an_architecture(void **state)
{
    (void)state;
    skip_without_compiler();
    static const char *const levels[] = {"sm_80", "sm_90a"};
    for (int i = 0; i < 2; i++) {
        qkv_context *ctx = context_for(levels[i]);
        normalise(ctx);
        normalise(ctx);
        assert_int_equal(counts.ended, i + 1);
        qkv_context_destroy(ctx);
    }
    assert_int_equal(counts.begun, 2);
    const qkv_attention_spec spec = small_spec();
    qkv_context *ctx = context_for("sm_90a");
    normalise(ctx); /* of another context, later */
    assert_int_equal(counts.begun, 2);
    EXPECT_OK(qkv_attention_warm_up(ctx, &spec, &limits));
    const int all = counts.ended;
    assert_true(all > 2);
    EXPECT_OK(qkv_attention_warm_up(ctx, &spec, &limits));
    qkv_attention *op = NULL;
    EXPECT_FAIL(QKV_ERR_UNSUPPORTED, "got one of QKV_JIT_FILL",
                qkv_attention_create(ctx, &spec, &limits, NULL, &op));
    assert_null(op);
    assert_int_equal(counts.ended, all);
    qkv_context_destroy(ctx);
}

static void what_cannot_be_filled_is_refused(void **state)
{
    (void)state;
    static const char *const unknown[] = {NULL, "", "sm_90", "sm_75", "avx2"};
    qkv_context *ctx;
    for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
        const qkv_context_options o = fill(unknown[i]);
        EXPECT_FAIL(QKV_ERR_INVALID, "isa: expected one of sm_80", qkv_context_create(&o, &ctx));
    }
    qkv_context_options o = fill("sm_80");
    o.cache_dir = "";
    EXPECT_FAIL(QKV_ERR_INVALID, "cache_dir: expected", qkv_context_create(&o, &ctx));
    o = fill("sm_80");
    o.device.device_type = kDLCPU;
    o.isa = NULL;
    EXPECT_FAIL(QKV_ERR_INVALID, "jit_policy: expected", qkv_context_create(&o, &ctx));
    skip_without_compiler();
    o = fill("sm_80");
    o.cache_dir = "/proc/no/such/folder";
    EXPECT_OK(qkv_context_create(&o, &ctx));
    EXPECT_FAIL(QKV_ERR_COMPILE, "cannot be written", try_normalise(ctx));
    qkv_context_destroy(ctx);
}

/* ---- using it --------------------------------------------------------------------------------- */

static int num_loaded;

/* A driver that takes every image that looks like one. */
static int load_library(cu_library *library, const void *image, void *jit_options,
                        void **jit_values, unsigned num_jit, void *options, void **values,
                        unsigned num_options)
{
    static int loaded;
    (void)jit_options, (void)jit_values, (void)num_jit, (void)options, (void)values,
        (void)num_options;
    assert_memory_equal(image, "\177ELF", 4);
    num_loaded++;
    *library = (cu_library)(void *)&loaded;
    return CU_SUCCESS;
}

static int find_kernel(cu_kernel *kernel, cu_library library, const char *name)
{
    assert_string_equal(name, "nothing");
    *kernel = (cu_kernel)(void *)library;
    return CU_SUCCESS;
}

static qkv_status get(int policy, const qi_nvrtc *nvrtc, const char *level, void **kernel)
{
    static const char *const name = "nothing";
    qi_jit jit = {.policy = policy, .nvrtc = nvrtc};
    snprintf(jit.cache_dir, sizeof jit.cache_dir, "%s", cache_dir);
    const qi_jit_job job = {.what = "nothing",
                            .device = kDLCUDA,
                            .level = level,
                            .defines = "#include \"qi_variant.h\"\n",
                            .header = "extern \"C\" __global__ void nothing() {}\n",
                            .main = "kern/abi.h"};
    return qi_jit_get(&jit, NULL, &job, &name, 1, kernel);
}

/* Without NVRTC, and whether it may be compiled or not, the kernel of the filled cache is loaded; of
 * another architecture there is none. */
static void filled_caches_serve_where_there_is_no_compiler(void **state)
{
    (void)state;
    skip_without_compiler();
    const qi_cuda_api before = qi_cuda;
    void *kernel = cache_dir;
    if (get(QKV_JIT_FILL, qi_nvrtc_find(0), "sm_80", &kernel) != QKV_OK)
        fail_msg("%s", qkv_last_error());
    assert_null(kernel);
    qi_cuda.library_load = load_library;
    qi_cuda.library_kernel = find_kernel;
    static const int policies[] = {QKV_JIT_CACHED, QKV_JIT_ALLOW};
    for (int i = 0; i < 2; i++) {
        if (get(policies[i], NULL, "sm_80", &kernel) != QKV_OK) fail_msg("%s", qkv_last_error());
        assert_non_null(kernel);
        EXPECT_FAIL(QKV_ERR_COMPILE, i ? "expected NVRTC 12.8 or newer" : "has no entry",
                    get(policies[i], NULL, "sm_90a", &kernel));
    }
    assert_int_equal(num_loaded, 1); /* and kept */
    qi_cuda = before;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(each_kernel_is_compiled_once_for_an_architecture, new_cache,
                                        free_cache),
        cmocka_unit_test_setup_teardown(what_cannot_be_filled_is_refused, new_cache, free_cache),
        cmocka_unit_test_setup_teardown(filled_caches_serve_where_there_is_no_compiler, new_cache,
                                        free_cache),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
