/* launch.c - walk a kernel table, run the chosen row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/launch.h"

#include <stdio.h>
#include <string.h>

qkv_status qi_check_context(const qkv_context *ctx)
{
    QI_REQUIRE(ctx, "ctx: expected a context, got NULL");
    QI_REQUIRE(qi_threads_are_here(ctx->threads),
               "ctx: expected a context that this process created, got one from before fork(): its "
               "threads and locks are the parent's");
    return QKV_OK;
}

qkv_status qi_select(const qkv_context *ctx, const qi_kernel *table, const void *desc,
                     const qi_kernel **row)
{
    char reasons[640] = "";
    size_t at = 0;
    const int verbose = qi_verbose(&ctx->logger, QI_VERBOSE_DISPATCH);
    for (const qi_kernel *k = table; k->name; k++) {
        if (k->device != ctx->device.device_type) continue;
        const char *reason = k->reject ? k->reject(desc) : NULL;
        if (!reason) {
            if (verbose) qi_log(&ctx->logger, "dispatch,%s,%s", k->name, ctx->device_name);
            *row = k;
            return QKV_OK;
        }
        if (verbose) qi_log(&ctx->logger, "dispatch,skip,%s,%s", k->name, reason);
        if (at < sizeof reasons)
            at += (size_t)snprintf(reasons + at, sizeof reasons - at, "%s%s: %s", at ? "; " : "",
                                   k->name, reason);
    }
    QI_FAIL(QKV_ERR_UNSUPPORTED, "no kernel for %s: %s", ctx->device_name,
            at ? reasons : "none in this build");
}

void qi_launch(const qkv_context *ctx, const qi_kernel *row, int64_t max_tasks, const void *params)
{
    const int32_t threads = qi_threads_count(ctx->threads);
    const int32_t count = max_tasks < threads ? (int32_t)max_tasks : threads;
    qi_parallel(ctx->threads, count, row->cpu[ctx->cpu_level], params);
}

qkv_status qi_compile(const qkv_context *ctx, const qi_source *source, const char *const *names,
                      int num_names, qi_cpu_kernel *out)
{
    enum { MAX_NAMES = 4 };
    char symbols[MAX_NAMES][64];
    const char *pointers[MAX_NAMES];
    void *functions[MAX_NAMES];
    const char *level = qi_cpu_level_name(ctx->cpu_level);
    for (int i = 0; i < num_names; i++) {
        snprintf(symbols[i], sizeof symbols[i], "qi_%s_%s", names[i], level);
        pointers[i] = symbols[i];
    }
    const qi_cc_job job = {.what = source->what,
                           .level = level,
                           .defines = source->defines,
                           .header = source->header,
                           .main = source->main};
    QI_TRY(qi_jit_get(&ctx->jit, &ctx->logger, &job, pointers, num_names, functions));
    memcpy(out, functions, (size_t)num_names * sizeof *out); /* C has no cast for this */
    return QKV_OK;
}
