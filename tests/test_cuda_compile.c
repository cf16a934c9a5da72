/* test_cuda_compile.c - NVRTC takes every GPU kernel for each generation of GPUs, without registers
 * spilled to memory; no GPU is needed. Kernels of each row stand here with constants that its host side
 * chooses; a row that is not here fails. QKV_TEST_LOG=1 prints a table of registers, memory and sizes, =2
 * all that ptxas says.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/launch.h"
#include "cuda_compile.h"
#include "support.h"

#include <limits.h>
#include <unistd.h>

/* Types, as qi_dtype has them. */
enum { F32, F16, BF16, E4M3, E5M2, I8 };

static const struct {
    const char *row;
    i32 constants[22];
} kernels[] = {
    {"rmsnorm.cuda", {BF16, BF16, 8, 256, 2, 256, 0}},
    {"rmsnorm.cuda", {BF16, F32, 8, 256, 2, 256, 1}},
    {"rmsnorm.cuda", {F16, F16, 8, 32, 1, 128, 0}},
    {"rmsnorm.cuda", {F32, F32, 1, 1024, 4, 1024, 1}},
    {"gated.cuda", {BF16, 8, 0, 2, 224}},
    {"gated.cuda", {F16, 8, 1, 2, 256}},
    {"gated.cuda", {F32, 1, 2, 1, 32}},
    {"rope.cuda", {BF16, 8, 1, 160}},
    {"rope.cuda", {F32, 1, 2, 256}},
    {"append.cuda", {BF16, BF16, BF16, BF16, F32, F32, 8, 0, 0, 32, 128}},
    {"append.cuda", {BF16, E4M3, BF16, I8, BF16, E5M2, 8, 1, 1, 256, 256}},
    {"append.cuda", {F32, F16, F16, E4M3, F32, F32, 1, 2, 0, 256, 256}},
    {"copy_pages.cuda", {16, 256}},
    {"copy_pages.cuda", {1, 256}},
    {"merge.cuda", {BF16, BF16, 8, 16, 128}},
    {"merge.cuda", {F32, F16, 1, 32, 128}},
    {"attention.cuda", {128}},
    {"attention.plan", {512}},
    {"attention.mma",
     {128, 128, 4, 16, BF16, BF16, BF16, 1, 0, 0, 0, 0, 0, 0, 8, 3, 0, 0, 2, 128}}, /* decode */
    {"attention.mma", {128, 128, 4, 1, BF16, E4M3, BF16, 1, 0, 0, 0, 0, 0, 0, 8, 3, 0, 0, 2, 128}},
    {"attention.mma", {64, 64, 1, 0, F16, F16, F16, 1, 1, 1, 1, 1, 1, 1, 16, 5, 0, 0, 2, 128}},
    {"attention.mma",
     {128, 128, 4, 16, BF16, BF16, BF16, 1, 0, 0, 0, 0, 0, 0, 16, 3, 0, 1, 2, 128}}, /* prefill */
    {"attention.mma", {64, 64, 4, 0, BF16, BF16, BF16, 0, 0, 0, 0, 0, 0, 0, 16, 5, 0, 1, 2, 128}},
    {"attention.mma", /* the same by Hopper's copy engine */
     {128, 128, 4, 16, BF16, BF16, BF16, 1, 0, 0, 0, 0, 0, 0, 8, 3, 16, 0, 2, 128}},
    {"attention.mma", /* and of eight warps */
     {128, 128, 4, 16, BF16, BF16, BF16, 1, 0, 0, 0, 0, 0, 0, 8, 2, 16, 0, 1, 256}},
    {"attention.mma",
     {128, 128, 8, 16, BF16, E4M3, BF16, 1, 0, 0, 0, 0, 0, 0, 8, 3, 16, 0, 2, 128}},
    {"attention.mma", {64, 64, 4, 0, F16, F16, F16, 1, 1, 1, 1, 1, 0, 1, 8, 5, 16, 0, 2, 128}},
    {"attention.mma", {192, 128, 8, 0, BF16, BF16, BF16, 0, 0, 0, 0, 0, 0, 0, 8, 2, 16, 0, 2, 128}},
    {"attention.mma", {256, 256, 8, 8, BF16, I8, BF16, 1, 0, 0, 0, 0, 0, 0, 8, 3, 8, 0, 1, 128}},
    {"attention.wgmma",
     {128, 128, 4, 16, BF16, BF16, BF16, 1, 0, 0, 0, 0, 0, 0, 128, 128, 16, 2, 2, 2, 384, 0}},
    {"attention.wgmma",
     {128, 128, 4, 0, BF16, BF16, BF16, 0, 0, 0, 0, 0, 0, 0, 128, 128, 128, 2, 2, 2, 384, 0}},
    {"attention.wgmma",
     {128, 128, 4, 1, F16, F16, F16, 1, 1, 1, 0, 0, 0, 1, 128, 128, 0, 2, 2, 2, 512, 0}},
    {"attention.wgmma",
     {128, 128, 4, 16, BF16, E4M3, BF16, 1, 0, 0, 0, 0, 0, 0, 128, 128, 0, 2, 2, 2, 512, 0}},
    {"attention.wgmma",
     {64, 64, 4, 0, E5M2, E4M3, BF16, 0, 1, 0, 0, 0, 0, 1, 128, 64, 0, 2, 4, 2, 512, 0}},
    {"attention.wgmma",
     {256, 256, 4, 1, BF16, I8, BF16, 1, 0, 0, 0, 0, 0, 0, 64, 256, 0, 2, 2, 1, 384, 0}},
    {"attention.wgmma",
     {64, 64, 4, 16, BF16, BF16, BF16, 1, 0, 0, 0, 0, 0, 0, 96, 64, 16, 3, 4, 2, 512, 0}},
    {"attention.wgmma",
     {192, 128, 1, 0, BF16, BF16, BF16, 1, 0, 0, 0, 0, 0, 0, 128, 128, 128, 2, 2, 1, 384, 0}},
    {"attention.wgmma", /* e4m3 by e4m3 */
     {128, 128, 4, 16, E4M3, E4M3, BF16, 1, 0, 0, 0, 0, 0, 0, 128, 128, 16, 2, 3, 2, 512, 1}},
    {"attention.wgmma",
     {128, 128, 4, 1, E4M3, E4M3, BF16, 1, 1, 1, 0, 0, 0, 1, 128, 128, 0, 2, 3, 2, 512, 1}},
    {"attention.wgmma",
     {64, 64, 4, 0, E4M3, E4M3, F16, 0, 0, 0, 0, 0, 0, 0, 128, 64, 128, 2, 4, 2, 512, 1}},
    {"attention.wgmma",
     {192, 128, 1, 0, E4M3, E4M3, E4M3, 1, 0, 0, 0, 0, 0, 0, 128, 128, 128, 2, 2, 2, 512, 1}},
    {"attention.wgmma",
     {256, 256, 4, 16, E4M3, E4M3, BF16, 1, 0, 0, 0, 0, 0, 0, 64, 256, 16, 2, 2, 2, 512, 1}},
    {"attention.wgmma",
     {256, 256, 4, 16, BF16, BF16, BF16, 1, 0, 0, 1, 1, 0, 1, 64, 256, 16, 2, 2, 1, 384, 0}},
    {"gemm.thin", {BF16, BF16, BF16, 8, 8, 4, 256}},
    {"gemm.thin", {BF16, BF16, BF16, 8, 1, 1, 256}},
    {"gemm.thin", {F32, F32, F16, 1, 4, 8, 256}},
    {"gemm.mma", {BF16, BF16, 8, 2, 2, 4, 4, 4, 4, 256}},
    {"gemm.mma", {F32, F16, 8, 1, 1, 4, 2, 2, 6, 128}},
    {"gemm.mma", {F16, F16, 1, 1, 2, 4, 4, 4, 4, 256}},
    {"gemm.tile", {BF16, F16, BF16, 4, 8, 256}},
    {"gemm.tile", {F32, F32, F32, 4, 8, 256}},
    {"gemm.tile", {F32, F32, F32, 1, 4, 256}},
    {"argmax.cuda", {F32, 4, 1024, 1}},
    {"argmax.cuda", {F32, 4, 1024, 8}},
    {"argmax.cuda", {BF16, 8, 1024, 1}},
    {"top_k.cuda", {F32, 4, 512, 8, 1}},
    {"top_k.cuda", {F32, 4, 512, 8, 0}},
    {"top_k.cuda", {BF16, 8, 512, 4, 0}},
    {"top_k.cuda", {F32, 1, 512, 1, 0}},
    {"log_probs.cuda", {F32, 4, 512, 8, 1}},
    {"log_probs.cuda", {BF16, 8, 512, 8, 1}},
    {"log_probs.cuda", {F16, 1, 512, 1, 0}},
    {"verify.cuda", {F32, 0, 4, 512, 8}},
    {"verify.cuda", {BF16, 0, 8, 512, 8}},
    {"verify.cuda", {F32, 1, 4, 512, 8}},
    {"verify.cuda", {F16, 0, 1, 512, 1}},
    {"verify.cuda", {F16, 1, 8, 512, 1}},
    {"sampling.cuda", {F32, QI_I32, 0, 3, 4, 512, 1, 0, 0, 0, 0, 0}},
    {"sampling.cuda", {F32, QI_I32, 0, 3, 4, 512, 8, 8, 0, 0xeb9a7, 0, 0}}, /* top_k, top_p */
    {"sampling.cuda", {F32, QI_I32, 0, 3, 4, 512, 8, 0, 0, 0xeb9a7, 0, 0}}, /* streamed */
    {"sampling.cuda", {BF16, QI_I32, 0, 3, 8, 512, 8, 4, 0, 0xeb9, 0, 0}},  /* top_p */
    {"sampling.cuda", {F32, QI_I32, 0, 3, 4, 512, 8, 8, 1, 0xeb97, 0, 0}},  /* of many rows */
    {"sampling.cuda", {BF16, QI_I32, 0, 3, 8, 512, 8, 4, 1, 0xeb9, 0, 0}},
    {"sampling.cuda", {F32, QI_I32, 1, 3, 1, 512, 8, 32, 1, 0xeb, 0, 0}},
    {"sampling.cuda", {F32, F32, 0, 1, 4, 512, 8, 10, 0, 0xb9, 0, 0}}, /* top_p to rows */
    {"sampling.cuda", {F32, QI_I32, 0, 3, 4, 512, 16, 16, 0, 0xecb97, 0, 0}},
    {"sampling.cuda", {BF16, QI_I32, 0, 3, 8, 512, 1, 0, 0, 0xeb9, 0, 0}},
    {"sampling.cuda", {F32, QI_I32, 0, 3, 4, 512, 8, 8, 0, 0xec97, 0, 0}}, /* min_p */
    {"sampling.cuda", {F16, F16, 0, 1, 8, 512, 1, 0, 0, 0xdcba987, 0, 0}},
};

/* Where a row's constants say how many blocks a cluster has; -1: it has none. */
static int cluster_at(const char *row)
{
    static const struct {
        const char *row;
        int at;
    } places[] = {{"sampling.cuda", 6},
                  {"argmax.cuda", 3},
                  {"top_k.cuda", 3},
                  {"log_probs.cuda", 3},
                  {"verify.cuda", 4}};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++)
        if (strcmp(row, places[i].row) == 0) return places[i].at;
    return -1;
}

/* Rows, or constants of theirs, for some generations only. */
static bool is_for(const char *row, const i32 *constants, const char *level)
{
    enum { DECODE_PIECE = 16 };
    const int cluster = cluster_at(row);
    if (cluster >= 0 && constants[cluster] > 1) return strcmp(level, "sm_80") != 0;
    /* top_p over rows that one block reads again: what GPUs with clusters have is shared by several, or stays */
    enum { SAMPLING_EACH = 7, SAMPLING_STAGES = 9, SOFTMAX_FIRST = QKV_STAGE_SOFTMAX + 1 };
    if (strcmp(row, "sampling.cuda") == 0 && constants[SAMPLING_EACH] == 0 &&
        constants[cluster] == 1 && constants[SAMPLING_STAGES] % 16 == SOFTMAX_FIRST)
        return strcmp(level, "sm_80") == 0;
    const bool hopper = strcmp(row, "attention.wgmma") == 0 ||
                        (strcmp(row, "attention.mma") == 0 && constants[DECODE_PIECE] > 0);
    return !hopper || strcmp(level, "sm_90a") == 0;
}

/* Bytes of registers that a kernel may spill; most promise none. */
static int may_spill(const char *row, const i32 *constants)
{
    enum { COLUMNS = 15, WARPGROUPS = 17, FP8 = 21, CROWDED = 8 };
    if (strcmp(row, "attention.cuda") == 0) return INT_MAX; /* the reference */
    /* 40 registers a thread: around the loops */
    if (strcmp(row, "sampling.cuda") == 0 && constants[CROWDED]) return 256;
    /* decode over 8-bit keys of 256 dims, at 255 registers: a few words before its loop */
    if (strcmp(row, "attention.mma") == 0 && constants[0] == 256) return 12;
    if (strcmp(row, "attention.wgmma") != 0) return 0;
    /* between tiles where a thread has 160 registers; sums of e4m3 beside a wide o */
    if (constants[WARPGROUPS] == 3) return 32;
    return constants[FP8] && constants[COLUMNS] > 128 ? 112 : 0;
}

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
        if (k->device != kDLCUDA || !k->cuda.file) continue; /* the CPU's; a library's */
        bool here = false;
        for (size_t n = 0; n < sizeof kernels / sizeof kernels[0]; n++)
            here |= strcmp(kernels[n].row, k->name) == 0;
        if (!here) fail_msg("row %s has no constants in this test", k->name);
    }
}

enum { NUM_KERNELS = sizeof kernels / sizeof kernels[0] };
static const char *const levels[] = {"sm_80", "sm_90a", "sm_100a"};
enum { NUM_LEVELS = sizeof levels / sizeof levels[0], NUM_JOBS = NUM_KERNELS * NUM_LEVELS };

static void print_result(const compiled *c, const i32 *constants, const qi_kernel *row)
{
    char text[128] = "";
    int at = 0;
    for (const char *name = row->cuda.constants; name && *name; constants++) {
        at += snprintf(text + at, sizeof text - (size_t)at, " %d", (int)*constants);
        name += strcspn(name, " ");
        name += *name == ' ';
    }
    printf("%-20s %-30s %-8s %5d %7d %7d %8d %8zu %6.2f\n", row->name, text, c->job.level,
           ptxas_says(c->log, " registers"), ptxas_says(c->log, " bytes stack frame"),
           ptxas_says(c->log, " bytes spill"), ptxas_says(c->log, " bytes smem"), c->bytes,
           c->seconds);
    if (atoi(getenv("QKV_TEST_LOG")) > 1) printf("%s\n", c->log);
}

static void kernels_compile_for_every_generation(void **state)
{
    (void)state;
    static compiled jobs[NUM_JOBS];
    static int of_job[NUM_JOBS];
    const qi_nvrtc *nvrtc = qi_nvrtc_find(0);
    if (!nvrtc) {
        printf("skipped: no NVRTC on this machine\n");
        skip();
    }
    int num_jobs = 0;
    for (int i = 0; i < NUM_JOBS; i++) {
        const qi_kernel *row = find_row(kernels[i / NUM_LEVELS].row);
        const char *level = levels[i % NUM_LEVELS];
        compiled *c = &jobs[num_jobs];
        if (!is_for(row->name, kernels[i / NUM_LEVELS].constants, level)) continue;
        of_job[num_jobs++] = i / NUM_LEVELS;
        qi_write_defines(&row->cuda, kernels[i / NUM_LEVELS].constants, c->defines,
                         sizeof c->defines);
        c->job = (qi_jit_job){.what = row->name,
                              .device = kDLCUDA,
                              .level = level,
                              .defines = c->defines,
                              .header = "",
                              .main = row->cuda.file};
    }
    compile_all(nvrtc, jobs, num_jobs);
    const bool log = getenv("QKV_TEST_LOG") != NULL;
    if (log)
        printf("%-20s %-30s %-8s %5s %7s %7s %8s %8s %6s\n", "row", " constants", "level", "regs",
               "stack", "spills", "shared", "image", "s");
    for (int i = 0; i < num_jobs; i++) {
        const compiled *c = &jobs[i];
        if (c->failed) fail_msg("%s for %s: %s", c->job.what, c->job.level, c->error);
        if (ptxas_says(c->log, " registers") <= 0)
            fail_msg("%s for %s: no log of ptxas", c->job.what, c->job.level);
        if (log) print_result(c, kernels[of_job[i]].constants, find_row(c->job.what));
        assert_true(c->bytes > 1000);
        if (ptxas_says(c->log, " bytes spill") >
            may_spill(c->job.what, kernels[of_job[i]].constants))
            fail_msg("%s for %s spills registers:\n%s%s", c->job.what, c->job.level, c->defines,
                     c->log);
        if (strstr(c->log, "serialized"))
            fail_msg("%s for %s waits after each product:\n%s%s", c->job.what, c->job.level,
                     c->defines, c->log);
        free(jobs[i].log);
    }
}

/* Has the row's kernel, with the last of its constants above, all of these instructions? By a disassembler. */
static void expect_instructions(const qi_nvrtc *nvrtc, const char *name, const char *const wanted[])
{
    enum { MOST = 4 };
    const qi_kernel *row = find_row(name);
    char defines[1024], path[] = "/tmp/qkv-hopper-XXXXXX", command[64], line[512];
    for (int i = 0; i < NUM_KERNELS; i++)
        if (strcmp(kernels[i].row, row->name) == 0)
            qi_write_defines(&row->cuda, kernels[i].constants, defines, sizeof defines);
    const qi_jit_job job = {.what = row->name,
                            .device = kDLCUDA,
                            .level = "sm_90a",
                            .defines = defines,
                            .header = "",
                            .main = row->cuda.file};
    void *image;
    size_t bytes;
    EXPECT_OK(qi_nvrtc_compile(nvrtc, &job, &image, &bytes, NULL));
    const int file = mkstemp(path);
    assert_true(file >= 0 && write(file, image, bytes) == (ssize_t)bytes);
    close(file);
    free(image);
    snprintf(command, sizeof command, "nvdisasm -c %s", path);
    FILE *text = popen(command, "r");
    bool found[MOST] = {false};
    while (text && fgets(line, sizeof line, text))
        for (int i = 0; wanted[i]; i++) found[i] |= strstr(line, wanted[i]) != NULL;
    assert_int_equal(text ? pclose(text) : -1, 0);
    unlink(path);
    for (int i = 0; wanted[i]; i++)
        if (!found[i]) fail_msg("no %s in %s", wanted[i], name);
}

/* Where a disassembler is at hand: Hopper's kernel multiplies by warpgroups, copies by TMA, and gives registers from
 * warpgroup to warpgroup; decode copies by TMA, too. */
static void hopper_uses_its_own_instructions(void **state)
{
    (void)state;
    const qi_nvrtc *nvrtc = qi_nvrtc_find(0);
    if (!nvrtc || system("nvdisasm --version >/dev/null 2>&1") != 0) skip();
    expect_instructions(nvrtc, "attention.wgmma",
                        (const char *const[]){"HGMMA", "UTMALDG", "USETMAXREG", NULL});
    expect_instructions(nvrtc, "attention.mma", (const char *const[]){"UTMALDG.5D", NULL});
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

/* What a kernel includes decides whether a result is known; another file does not. */
static void results_are_kept_by_content(void **state)
{
    (void)state;
    const qi_jit_job job = {.what = "a",
                            .device = kDLCUDA,
                            .level = "sm_80",
                            .defines = "#define A 1\n",
                            .header = "",
                            .main = "ops/norm/rmsnorm.cu"};
    char key[65], other[65];
    compile_key(NULL, &job, key);
    qi_jit_job changed = job;
    changed.what = "b"; /* a name for messages */
    compile_key(NULL, &changed, other);
    assert_string_equal(key, other);
    changed.main = "ops/rope/rope.cu";
    compile_key(NULL, &changed, other);
    assert_string_not_equal(key, other);
    changed = job;
    changed.defines = "#define A 2\n";
    compile_key(NULL, &changed, other);
    assert_string_not_equal(key, other);
    changed = job;
    changed.level = "sm_90a";
    compile_key(NULL, &changed, other);
    assert_string_not_equal(key, other);
    bool seen[MAX_FILES] = {false};
    int index;
    qi_bundle_file file;
    qi_sha256 hash;
    qi_sha256_init(&hash);
    add_text(&hash, "#include \"ops/norm/rmsnorm.cu\"", 31, seen);
    static const struct {
        const char *path;
        bool read;
    } files[] = {{"ops/norm/rmsnorm.cu", true},
                 {"ops/norm/rmsnorm_params.h", true},
                 {"kern/abi.h", true},
                 {"kern/cuda/ptx.cuh", true}, /* through the prelude */
                 {"ops/rope/rope.cu", false}};
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        assert_true(bundled_file(files[i].path, strlen(files[i].path), &index, &file));
        assert_int_equal(seen[index], files[i].read);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_row_is_here),
        cmocka_unit_test(results_are_kept_by_content),
        cmocka_unit_test(kernels_compile_for_every_generation),
        cmocka_unit_test(hopper_uses_its_own_instructions),
        cmocka_unit_test(errors_name_the_line),
        cmocka_unit_test(levels_follow_the_device),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
