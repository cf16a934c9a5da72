/* context.c - opening a device: options, allocator, level, threads.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/context.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/env.h"
#include "base/status.h"

static void *default_alloc(void *user, size_t bytes, size_t alignment)
{
    (void)user;
    return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

static void default_free(void *user, void *ptr, size_t bytes)
{
    (void)user;
    (void)bytes;
    free(ptr);
}

/* The level that QKV_DEVICE=cpu:LEVEL asks for, NULL where it leaves the choice open. */
static qkv_status env_level(const char **level)
{
    const char *device = qi_env(QI_ENV_DEVICE);
    *level = NULL;
    if (!device || strcmp(device, "cpu") == 0) return QKV_OK;
    QI_REQUIRE(strncmp(device, "cpu:", 4) == 0, "QKV_DEVICE: expected cpu or cpu:LEVEL, got %s",
               device);
    *level = device + 4;
    return QKV_OK;
}

static qkv_status open_cpu(const qkv_context_options *o, qkv_context *ctx)
{
    const char *level;
    QI_TRY(env_level(&level));
    QI_TRY(qi_cpu_find_level(level ? level : o->isa, &ctx->cpu_level));
    QI_TRY(qi_jit_open(o, 0, &ctx->jit));
    snprintf(ctx->device_name, sizeof ctx->device_name, "cpu:%s",
             qi_cpu_level_name(ctx->cpu_level));
    return QKV_OK;
}

/* No driver and no device: to compile for others. */
static qkv_status open_compiler(const qkv_context_options *o, qkv_context *ctx)
{
    QI_TRY(qi_cuda_describe(o->isa, &ctx->cuda));
    QI_TRY(qi_jit_open(o, 0, &ctx->jit));
    qi_nvrtc_level(NULL, ctx->cuda.major, ctx->cuda.minor, ctx->cuda_level);
    snprintf(ctx->device_name, sizeof ctx->device_name, "cuda:none:%s", ctx->cuda_level);
    return QKV_OK;
}

static qkv_status open_cuda(const qkv_context_options *o, qkv_context *ctx)
{
    if (o->jit_policy == QKV_JIT_FILL) return open_compiler(o, ctx);
    QI_TRY(qi_cuda_open(o->device.device_id, &ctx->cuda));
    QI_TRY(qi_jit_open(o, ctx->cuda.driver, &ctx->jit));
    qi_nvrtc_level(ctx->jit.nvrtc, ctx->cuda.major, ctx->cuda.minor, ctx->cuda_level);
    snprintf(ctx->device_name, sizeof ctx->device_name, "cuda:%d:%s", ctx->cuda.ordinal,
             ctx->cuda_level);
    return QKV_OK;
}

qkv_status qkv_context_create(const qkv_context_options *options, qkv_context **out)
{
    qkv_status status;
    QI_REQUIRE(out, "out: expected a pointer, got NULL");
    *out = NULL;
    qkv_context_options o = {QKV_CONTEXT_OPTIONS_INIT};
    if (options) QI_TRY(qi_read_struct(&o, sizeof o, options, "options"));
    if (o.device.device_type == 0) o.device.device_type = kDLCPU;
    const int cuda = o.device.device_type == kDLCUDA;
    if (!cuda && o.device.device_type != kDLCPU)
        QI_FAIL(QKV_ERR_UNSUPPORTED, "device: expected kDLCPU or kDLCUDA, got device type %d",
                (int)o.device.device_type);
    QI_REQUIRE(cuda || o.device.device_id == 0, "device: expected device_id 0 on the CPU, got %d",
               (int)o.device.device_id);
    QI_REQUIRE(o.num_threads >= 0, "num_threads: expected >= 0, got %d", (int)o.num_threads);
    QI_REQUIRE(o.parallel.reserved == 0, "parallel.reserved: expected 0, got %d",
               (int)o.parallel.reserved);
    QI_REQUIRE(!o.allocator.alloc == !o.allocator.free,
               "allocator: expected alloc and free, or neither; got one");
    if (!o.allocator.alloc)
        o.allocator = (qkv_allocator){.alloc = default_alloc, .free = default_free};
    QI_REQUIRE(o.batch_invariant == 0 || o.batch_invariant == 1,
               "batch_invariant: expected 0 or 1, got %d", (int)o.batch_invariant);

    qkv_context *ctx = o.allocator.alloc(o.allocator.user, sizeof *ctx, 64);
    if (!ctx) QI_FAIL(QKV_ERR_MEMORY, "context: out of memory");
    *ctx = (qkv_context){
        .device = o.device,
        .allocator = o.allocator,
        .logger = {.log = o.log, .user = o.log_user},
        .batch_invariant = o.batch_invariant,
    };
    qi_functions_init(&ctx->functions);
    qi_cublaslt_init(&ctx->cublaslt);
    QI_TRY_OR(cuda ? open_cuda(&o, ctx) : open_cpu(&o, ctx), fail);
    QI_TRY_OR(qi_threads_create(cuda ? 1 : o.num_threads, cuda ? &(qkv_parallel){0} : &o.parallel,
                                &ctx->allocator, &ctx->threads),
              fail);
    *out = ctx;
    return QKV_OK;

fail:
    qi_cublaslt_free(&ctx->cublaslt, NULL); /* not opened yet */
    qi_cuda_close(&ctx->cuda);
    qi_functions_free(&ctx->functions);
    o.allocator.free(o.allocator.user, ctx, sizeof *ctx);
    return status;
}

void qkv_context_destroy(qkv_context *ctx)
{
    if (!ctx) return;
    const int here = qi_threads_are_here(ctx->threads); /* else the driver is the parent's */
    qi_cublaslt_free(&ctx->cublaslt, here ? &ctx->cuda : NULL);
    if (here) qi_cuda_close(&ctx->cuda);
    qi_threads_destroy(ctx->threads);
    qi_functions_free(&ctx->functions);
    const qkv_allocator a = ctx->allocator;
    a.free(a.user, ctx, sizeof *ctx);
}

const char *qkv_context_device_name(const qkv_context *ctx)
{
    return ctx ? ctx->device_name : "";
}

const char *qkv_context_compiler(const qkv_context *ctx)
{
    return ctx ? qi_jit_compiler(&ctx->jit, ctx->device.device_type) : "";
}

int32_t qkv_context_num_threads(const qkv_context *ctx)
{
    if (!ctx) return 0;
    return ctx->device.device_type == kDLCUDA ? 2 * ctx->cuda.num_sms
                                              : qi_threads_count(ctx->threads);
}
