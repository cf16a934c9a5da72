/* bench_host.c - see bench_host.h. Kernels stay loaded as long as a process lives, and a driver stays
 * initialised: each group of figures is measured in a child of its own.
 * SPDX-License-Identifier: Apache-2.0 */
#include "bench_host.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attention_problem.h"

typedef enum figure_id {
    DRIVER_START,
    OPEN,
    COLD_DECODE,
    COLD_PREFILL,
    CACHED_DECODE,
    CACHED_PREFILL,
    LAUNCH,
    RUN_DECODE,
    RUN_RMSNORM,
    PLAN,
    PLAN_ZIPF,
    DEVICE_PLAN,
    NUM_FIGURES
} figure_id;

static const struct {
    const char *name, *unit, *about;
    double unit_seconds, target; /* in units; 0: none */
} figures[NUM_FIGURES] = {
    [DRIVER_START] = {"driver_start_ms", "ms", "the driver's own start", 1e-3, 0},
    [OPEN] = {"open_ms", "ms", "opening a context", 1e-3, 50},
    [COLD_DECODE] = {"cold_decode_ms", "ms", "compiling a decode operator's kernels", 1e-3, 1000},
    [COLD_PREFILL] = {"cold_prefill_ms", "ms", "compiling a prefill operator's kernels", 1e-3,
                      3000},
    [CACHED_DECODE] = {"cached_decode_ms", "ms", "loading a decode operator's kernels", 1e-3, 5},
    [CACHED_PREFILL] = {"cached_prefill_ms", "ms", "loading a prefill operator's kernels", 1e-3, 5},
    [LAUNCH] = {"launch_us", "us", "the driver's part of a launch", 1e-6, 0},
    [RUN_DECODE] = {"run_decode_us", "us", "the host's part of an attention run", 1e-6, 3},
    [RUN_RMSNORM] = {"run_rmsnorm_us", "us", "the host's part of an RMSNorm call", 1e-6, 0},
    [PLAN] = {"plan_us", "us", "host plan of 256 requests", 1e-6, 20},
    [PLAN_ZIPF] = {"plan_zipf_us", "us", "host plan of 256 requests, Zipf lengths", 1e-6, 20},
    [DEVICE_PLAN] = {"device_plan_us", "us", "device plan of 256 requests, on the GPU", 1e-6, 6},
};

/* What children share with their parent. */
typedef struct measured {
    double seconds[NUM_FIGURES]; /* 0: not measured */
    char device[64], compiler[64];
} measured;

typedef struct setting {
    const bench_options *options;
    const char *arch;
    bool gpu;
    char cache_dir[64];
} setting;

static problem parse(const char *op, const char *text)
{
    problem p;
    char error[PROBLEM_ERROR];
    if (!problem_parse(op, text, &p, error)) tool_die(EXIT_WRONG, "%s: %s", op, error);
    return p;
}

/* ---- compiling and loading ---------------------------------------------------------------------- */

static double time_warm_up(qkv_context *ctx, const char *op, const char *text)
{
    const problem p = parse(op, text);
    attention_problem a = attention_problem_create(&p);
    const double start = tool_seconds();
    tool_check(qkv_attention_warm_up(ctx, &a.spec, &a.limits), "qkv_attention_warm_up");
    const double seconds = tool_seconds() - start;
    attention_problem_destroy(&a);
    return seconds;
}

/* The first child finds an empty cache, the second what the first one left. */
static void measure_kernels(const setting *s, measured *m, figure_id decode, figure_id prefill)
{
    qkv_context *ctx;
    const qkv_context_options o = {
        QKV_CONTEXT_OPTIONS_INIT,
        .device = {kDLCUDA, s->gpu ? s->options->device.device_id : 0},
        .isa = s->gpu ? NULL : s->arch,
        .jit_policy = s->gpu ? QKV_JIT_ALLOW : QKV_JIT_FILL,
        .cache_dir = s->cache_dir,
    };
    cuda *gpu = NULL;
    if (s->gpu) {
        const double start = tool_seconds();
        gpu = cuda_open(s->options->device.device_id);
        m->seconds[DRIVER_START] = tool_seconds() - start;
    }
    const double start = tool_seconds();
    tool_check(qkv_context_create(&o, &ctx), "qkv_context_create");
    if (s->gpu) m->seconds[OPEN] = tool_seconds() - start;
    snprintf(m->compiler, sizeof m->compiler, "%s", qkv_context_compiler(ctx));
    if (s->gpu || *m->compiler) {
        m->seconds[decode] = time_warm_up(ctx, "decode", "batch=64,kv_len=4096");
        m->seconds[prefill] = time_warm_up(ctx, "prefill", "batch=4,qo_len=4096");
    }
    qkv_context_destroy(ctx);
    cuda_close(gpu);
}

static void measure_cold(const setting *s, measured *m)
{
    measure_kernels(s, m, COLD_DECODE, COLD_PREFILL);
}

static void measure_cached(const setting *s, measured *m)
{
    measure_kernels(s, m, CACHED_DECODE, CACHED_PREFILL);
}

/* ---- calls and plans ---------------------------------------------------------------------------- */

static double time_open(void)
{
    qkv_context *ctx;
    const double start = tool_seconds();
    tool_check(qkv_context_create(NULL, &ctx), "qkv_context_create");
    const double seconds = tool_seconds() - start;
    qkv_context_destroy(ctx);
    return seconds;
}

static void measure_calls(const setting *s, measured *m)
{
    const problem decode = parse("decode", "batch=1,kv_len=64,data=cache");
    const problem rmsnorm = parse("rmsnorm", "tokens=1,data=cache");
    const char *const lengths[] = {"batch=256,kv_len=256,data=cache",
                                   "batch=256,kv_len=256,dist=zipf,data=cache"};
    const problem even = parse("decode", lengths[0]), zipf = parse("decode", lengths[1]);
    if (!s->gpu) m->seconds[OPEN] = time_open();
    bench_session *session = bench_open(s->options);
    snprintf(m->device, sizeof m->device, "%s", qkv_context_device_name(bench_context(session)));
    m->seconds[PLAN] = bench_host_plan(session, &even);
    m->seconds[PLAN_ZIPF] = bench_host_plan(session, &zipf);
    if (s->gpu) {
        m->seconds[LAUNCH] = bench_host_launch(session);
        m->seconds[RUN_DECODE] = bench_host_run(session, &decode);
        m->seconds[RUN_RMSNORM] = bench_host_run(session, &rmsnorm);
        m->seconds[DEVICE_PLAN] = bench_device_plan(session, &even);
    }
    bench_close(session);
}

/* ---- children ----------------------------------------------------------------------------------- */

static void remove_folder(const char *path)
{
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        char file[512];
        snprintf(file, sizeof file, "%s/%.255s", path, entry->d_name);
        if (entry->d_name[0] != '.') unlink(file);
    }
    if (folder) closedir(folder);
    rmdir(path);
}

static void in_child(void (*measure)(const setting *s, measured *m), const setting *s, measured *m)
{
    int ends[2], status;
    fflush(NULL);
    if (pipe(ends) != 0) tool_die(EXIT_WRONG, "pipe failed");
    const pid_t child = fork();
    if (child < 0) tool_die(EXIT_WRONG, "fork failed");
    if (child == 0) {
        measure(s, m);
        _exit(write(ends[1], m, sizeof *m) == (ssize_t)sizeof *m ? 0 : EXIT_WRONG);
    }
    close(ends[1]);
    const bool whole = read(ends[0], m, sizeof *m) == (ssize_t)sizeof *m;
    close(ends[0]);
    waitpid(child, &status, 0);
    if (whole) return;
    remove_folder(s->cache_dir);
    exit(WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_WRONG); /* it said why */
}

static void print_figures(const setting *s, const measured *m)
{
    const bool json = s->options->json;
    if (json)
        printf(
            "{\"op\": \"host\", \"device\": \"%s\", \"kernels_for\": \"%s\", \"compiler\": \"%s\"",
            m->device, s->gpu ? m->device : s->arch, m->compiler);
    else
        printf("# qkv %d.%d.%d, %s, kernels for %s by %s\n%-46s %12s    %s\n", QKV_VERSION_MAJOR,
               QKV_VERSION_MINOR, QKV_VERSION_PATCH, m->device, s->gpu ? "it" : s->arch,
               *m->compiler ? m->compiler : "no compiler", "what", "takes", "target");
    for (int i = 0; i < NUM_FIGURES; i++) {
        const double value = m->seconds[i] / figures[i].unit_seconds;
        char target[32] = "";
        if (value <= 0) continue;
        if (figures[i].target > 0)
            snprintf(target, sizeof target, "%g %s", figures[i].target, figures[i].unit);
        if (json)
            printf(", \"%s\": %.4g", figures[i].name, value);
        else
            printf("%-46s %12.2f %s %s\n", figures[i].about, value, figures[i].unit, target);
    }
    if (json) printf("}\n");
}

void bench_host(const bench_options *options, const char *arch)
{
    measured m = {0};
    setting s = {.options = options,
                 .arch = arch ? arch : "sm_90a",
                 .gpu = options->device.device_type == kDLCUDA};
    snprintf(s.cache_dir, sizeof s.cache_dir, "/tmp/qkv-bench-XXXXXX");
    if (!mkdtemp(s.cache_dir)) tool_die(EXIT_WRONG, "%s: cannot be made", s.cache_dir);
    unsetenv("QKV_CACHE_DIR"); /* which would stand in the folder's place, and may be full */
    setenv("CUDA_CACHE_DISABLE", "1", 1); /* NVRTC and the driver have a cache of their own */
    in_child(measure_cold, &s, &m);
    if (s.gpu) in_child(measure_cached, &s, &m);
    in_child(measure_calls, &s, &m);
    remove_folder(s.cache_dir);
    print_figures(&s, &m);
}
