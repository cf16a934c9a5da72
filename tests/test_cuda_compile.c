/* test_cuda_compile.c - NVRTC takes every GPU kernel for each generation of GPUs, without registers
 * spilled to memory; no GPU is needed. Kernels of each row stand here with constants that its host side
 * chooses; a row that is not here fails.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/launch.h"
#include "support.h"

/* Types, as qi_dtype has them. */
enum { F32, F16, BF16, E4M3, E5M2, I8 };

static const struct {
    const char *row;
    i32 constants[QI_MAX_CONSTANTS];
} kernels[] = {
    {"rmsnorm.cuda", {BF16, F32, 8, 128, 4, 128, 1}},
    {"rmsnorm.cuda", {F16, F16, 8, 32, 1, 128, 0}},
    {"rmsnorm.cuda", {F32, F32, 1, 1024, 4, 1024, 1}},
    {"gated.cuda", {BF16, 8, 0, 256}},
    {"gated.cuda", {F16, 8, 1, 256}},
    {"gated.cuda", {F32, 1, 2, 256}},
    {"rope.cuda", {BF16, 8, 1, 256}},
    {"rope.cuda", {F32, 2, 2, 256}},
    {"append.cuda", {BF16, BF16, BF16, BF16, F32, F32, 8, 0, 256}},
    {"append.cuda", {BF16, E4M3, BF16, I8, BF16, E5M2, 8, 1, 256}},
    {"append.cuda", {F32, F16, F16, E4M3, F32, F32, 1, 2, 256}},
    {"copy_pages.cuda", {16, 256}},
    {"copy_pages.cuda", {1, 256}},
    {"merge.cuda", {BF16, BF16, 8, 128}},
    {"merge.cuda", {F32, F16, 1, 128}},
    {"attention.cuda", {128}},
    {"attention.plan", {512}},
    {"gemm.thin", {BF16, BF16, BF16, 8, 8, 256}},
    {"gemm.thin", {F32, F32, F16, 1, 4, 256}},
    {"gemm.tile", {BF16, F16, BF16, 1, 1, 256}},
    {"argmax.cuda", {F32, 4, 1024}},
    {"argmax.cuda", {BF16, 1, 1024}},
    {"sample.cuda", {F32, 512}},
    {"sample.cuda", {BF16, 512}},
};

static const qi_kernel *find_row(const char *name)
{
    const char *op;
    const qi_kernel *k;
    for (int i = 0; (k = qi_kernel_row(i, &op)); i++)
        if (strcmp(k->name, name) == 0) return k;
    fail_msg("no row %s", name);
    return NULL;
}

static void every_row_is_here(void **state)
{
    (void)state;
    const char *op;
    const qi_kernel *k;
    for (int i = 0; (k = qi_kernel_row(i, &op)); i++) {
        if (k->device != kDLCUDA) continue;
        bool here = false;
        for (size_t n = 0; n < sizeof kernels / sizeof kernels[0]; n++)
            here |= strcmp(kernels[n].row, k->name) == 0;
        if (!here) fail_msg("row %s has no constants in this test", k->name);
    }
}

/* ptxas says "N bytes spill stores, N bytes spill loads" of each kernel. */
static void expect_no_spills(const char *row, const char *level, const char *log)
{
    if (!log) fail_msg("%s: no log of ptxas", row);
    for (const char *at = log; at && (at = strstr(at, " bytes spill")); at++) {
        const char *number = at;
        while (number > log && number[-1] >= '0' && number[-1] <= '9') number--;
        if (atoi(number) != 0) fail_msg("%s for %s spills registers:\n%s", row, level, log);
    }
}

static void kernels_compile_for_every_generation(void **state)
{
    (void)state;
    static const char *const levels[] = {"sm_80", "sm_90a", "sm_100a"};
    const qi_nvrtc *nvrtc = qi_nvrtc_find(0);
    if (!nvrtc) {
        printf("skipped: no NVRTC on this machine\n");
        skip();
    }
    for (size_t n = 0; n < sizeof kernels / sizeof kernels[0]; n++)
        for (size_t l = 0; l < sizeof levels / sizeof levels[0]; l++) {
            const qi_kernel *row = find_row(kernels[n].row);
            char defines[1024];
            qi_write_defines(&row->cuda, kernels[n].constants, defines, sizeof defines);
            const qi_jit_job job = {.what = row->name,
                                    .device = kDLCUDA,
                                    .level = levels[l],
                                    .defines = defines,
                                    .header = "",
                                    .main = row->cuda.file};
            void *image = NULL;
            size_t bytes = 0;
            char *log = NULL;
            EXPECT_OK(qi_nvrtc_compile(nvrtc, &job, &image, &bytes, &log));
            assert_true(bytes > 1000);
            if (strcmp(row->name, "attention.cuda") != 0) /* the reference promises nothing */
                expect_no_spills(row->name, levels[l], log);
            if (getenv("QKV_TEST_LOG")) printf("%s %s\n%s\n", row->name, levels[l], log);
            free(image);
            free(log);
        }
}

/* What a compiler says of a broken kernel reaches the caller. */
static void errors_name_the_line(void **state)
{
    (void)state;
    const qi_nvrtc *nvrtc = qi_nvrtc_find(0);
    if (!nvrtc) skip();
    const qi_jit_job job = {.what = "variant broken",
                            .device = kDLCUDA,
                            .level = "sm_90a",
                            .defines = "#include \"qi_variant.h\"\n",
                            .header =
                                "#line 1 \"broken\"\n\n__device__ int f() { return nothing; }\n",
                            .main = "kern/abi.h"};
    void *image;
    size_t bytes;
    EXPECT_FAIL(QKV_ERR_COMPILE, "broken(2): error: identifier \"nothing\" is undefined",
                qi_nvrtc_compile(nvrtc, &job, &image, &bytes, NULL));
    EXPECT_FAIL(QKV_ERR_COMPILE, "expected NVRTC 12.8 or newer",
                qi_nvrtc_compile(NULL, &job, &image, &bytes, NULL));
}

static void levels_follow_the_device(void **state)
{
    (void)state;
    const qi_nvrtc *nvrtc = qi_nvrtc_find(0);
    char level[QI_ARCH_BYTES];
    qi_nvrtc_level(NULL, 9, 0, level);
    assert_string_equal(level, "sm_90a");
    if (!nvrtc) skip();
    qi_nvrtc_level(nvrtc, 8, 0, level);
    assert_string_equal(level, "sm_80");
    qi_nvrtc_level(nvrtc, 10, 0, level);
    assert_string_equal(level, "sm_100a");
    qi_nvrtc_level(nvrtc, 99, 0, level); /* of the future: PTX of the newest known */
    assert_int_equal(strncmp(level, "compute_1", 9), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_row_is_here),
        cmocka_unit_test(kernels_compile_for_every_generation),
        cmocka_unit_test(errors_name_the_line),
        cmocka_unit_test(levels_follow_the_device),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
