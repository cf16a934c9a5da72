/* compile.c - see compile.h. SPDX-License-Identifier: Apache-2.0 */
#include "compile.h"

#include <stdio.h>
#include <string.h>

#include "bench.h"

typedef struct work {
    int num_kernels;
    double seconds;
} work;

static void count(void *user, const char *kernel, double seconds)
{
    (void)kernel;
    work *w = user;
    if (seconds < 0) return;
    w->num_kernels++;
    w->seconds += seconds;
}

static void compile_for(const char *arch, const problem *problems, int n, const char *cache)
{
    work w = {0};
    qkv_context *ctx;
    const qkv_context_options o = {
        QKV_CONTEXT_OPTIONS_INIT, .device = {kDLCUDA, 0}, .isa = arch,   .jit_policy = QKV_JIT_FILL,
        .cache_dir = cache,       .jit_progress = count,  .jit_user = &w};
    tool_check(qkv_context_create(&o, &ctx), "qkv_context_create");
    for (int i = 0; i < n; i++) bench_compile(ctx, &problems[i]);
    printf("%-8s %d problems, %d kernels compiled by %s in %.1f s\n", arch, n, w.num_kernels,
           qkv_context_compiler(ctx), w.seconds);
    fflush(stdout);
    qkv_context_destroy(ctx);
}

void compile_problems(const problem *problems, int n, const char *archs, const char *cache)
{
    for (const char *at = archs; *at;) {
        char arch[32];
        const size_t bytes = strcspn(at, ",");
        if (bytes == 0 || bytes >= sizeof arch || (at[bytes] && !at[bytes + 1]))
            tool_die(EXIT_USAGE, "--arch: expected names by commas, got \"%s\"", archs);
        memcpy(arch, at, bytes);
        arch[bytes] = '\0';
        compile_for(arch, problems, n, cache);
        at += bytes + (at[bytes] == ',');
    }
}
