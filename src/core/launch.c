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
    qi_tensors_on(ctx->device);
    return QKV_OK;
}

/* What every row of the device says of desc, for a call that none takes. */
static qkv_status fail_with_reasons(const qkv_context *ctx, const qi_kernel *table,
                                    const void *desc)
{
    char reasons[640] = "";
    size_t at = 0;
    for (const qi_kernel *k = table; k->name && at < sizeof reasons; k++)
        if (k->device == ctx->device.device_type)
            at += (size_t)snprintf(reasons + at, sizeof reasons - at, "%s%s: %s", at ? "; " : "",
                                   k->name, k->reject(desc));
    QI_FAIL(QKV_ERR_UNSUPPORTED, "no kernel for %s: %s", ctx->device_name,
            at ? reasons : "none in this build");
}

qkv_status qi_select(const qkv_context *ctx, const qi_kernel *table, const void *desc,
                     const qi_kernel **row)
{
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
    }
    return fail_with_reasons(ctx, table, desc);
}

void qi_launch(const qkv_context *ctx, const qi_kernel *row, int64_t max_tasks, const void *params)
{
    const int32_t threads = qi_threads_count(ctx->threads);
    const int32_t count = max_tasks < threads ? (int32_t)max_tasks : threads;
    qi_parallel(ctx->threads, count, row->cpu[ctx->cpu_level], params);
}

void qi_write_defines(const qi_cuda_kernel *k, const i32 *constants, char *text, size_t bytes)
{
    size_t at = 0;
    text[0] = '\0';
    for (const char *name = k->constants; name && *name && at < bytes; constants++) {
        const int length = (int)strcspn(name, " ");
        at += (size_t)snprintf(text + at, bytes - at, "#define %.*s %d\n", length, name,
                               (int)*constants);
        name += length + (name[length] == ' ');
    }
}

static int num_constants(const qi_cuda_kernel *k)
{
    int n = k->constants && *k->constants;
    for (const char *c = k->constants; c && *c; c++) n += *c == ' ';
    return n;
}

enum { MAX_NAMES = 4 };

qkv_status qi_compile_cuda(const qkv_context *ctx, const qi_source *source,
                           const char *const *names, int num_names, cu_function *out)
{
    const qi_jit_job job = {.what = source->what,
                            .device = kDLCUDA,
                            .level = ctx->cuda_level,
                            .defines = source->defines,
                            .header = source->header,
                            .main = source->main};
    void *kernels[MAX_NAMES];
    QI_TRY(qi_jit_get(&ctx->jit, &ctx->logger, &job, names, num_names, kernels));
    for (int i = 0; i < num_names; i++) {
        out[i] = NULL;
        if (kernels[i]) QI_TRY(qi_cuda_function(&ctx->cuda, kernels[i], &out[i]));
    }
    return QKV_OK;
}

/* Compiles or loads a kernel that is not among the functions yet. */
static qkv_status make_function(const qkv_context *ctx, qi_functions *functions, const char *header,
                                const qi_kernel *row, const qi_function_key *key, cu_function *out)
{
    char defines[1024];
    qi_write_defines(&row->cuda, key->constants, defines, sizeof defines);
    const qi_source source = {
        .what = row->name, .main = row->cuda.file, .defines = defines, .header = header};
    QI_TRY(qi_compile_cuda(ctx, &source, &row->cuda.entry, 1, out));
    return *out ? qi_functions_add(functions, key, *out) : QKV_OK;
}

qkv_status qi_find_cuda_text(const qkv_context *ctx, qi_functions *functions, const char *header,
                             const qi_kernel *row, const i32 *constants, cu_function *out)
{
    qi_function_key key = {.row = row};
    memcpy(key.constants, constants, (size_t)num_constants(&row->cuda) * sizeof *constants);
    *out = qi_functions_find(functions, &key);
    return *out ? QKV_OK : make_function(ctx, functions, header, row, &key, out);
}

qkv_status qi_launch_cuda(const qkv_context *ctx, const qi_kernel *row, const i32 *constants,
                          const qi_grid *grid, const void *params, void *stream)
{
    cu_function function;
    QI_TRY(qi_find_cuda_text(ctx, (qi_functions *)&ctx->functions, "", row, constants, &function));
    if (!function) return QKV_OK; /* QKV_JIT_FILL */
    return qi_cuda_launch(&ctx->cuda, function, grid, params, stream);
}

qkv_status qi_compile(const qkv_context *ctx, const qi_source *source, const char *const *names,
                      int num_names, qi_cpu_kernel *out)
{
    char symbols[MAX_NAMES][64];
    const char *pointers[MAX_NAMES];
    void *functions[MAX_NAMES];
    const char *level = qi_cpu_level_name(ctx->cpu_level);
    for (int i = 0; i < num_names; i++) {
        snprintf(symbols[i], sizeof symbols[i], "qi_%s_%s", names[i], level);
        pointers[i] = symbols[i];
    }
    const qi_jit_job job = {.what = source->what,
                            .device = kDLCPU,
                            .level = level,
                            .defines = source->defines,
                            .header = source->header,
                            .main = source->main};
    QI_TRY(qi_jit_get(&ctx->jit, &ctx->logger, &job, pointers, num_names, functions));
    memcpy(out, functions, (size_t)num_names * sizeof *out); /* C has no cast for this */
    return QKV_OK;
}
