/* info.c - SPDX-License-Identifier: Apache-2.0 */
#include "info.h"

#include <stdio.h>
#include <string.h>

#include "attention_problem.h"
#include "ceilings_gpu.h"
#include "tool.h"

static void print_levels(void)
{
    const char *level;
    int32_t usable;
    for (int32_t i = 0; (level = qkv_cpu_level(i, &usable)); i++)
        printf("level    %s: %s\n", level, usable ? "usable" : "not on this machine");
}

static void print_kernel(void *user, const qkv_kernel_info *info)
{
    (void)user;
    printf("kernel   %s: %s%s\n", info->op, info->row,
           info->device_type == kDLCPU ? "" : " (CUDA)");
}

static void print_ceiling(int i, ceiling_value v)
{
    const bool memory = i == CEILING_READ || i == CEILING_COPY || i == CEILING_WRITE;
    if (v.rate > 0) printf("ceiling  %s: %.4g %s\n", v.name, v.rate, memory ? "GB/s" : "GFLOP/s");
}

static void print_ceilings(const qkv_context *ctx, cuda *gpu)
{
    ceilings_gpu *of_gpu = gpu ? ceilings_gpu_create(gpu) : NULL;
    ceilings *of_cpu = gpu ? NULL : ceilings_create(ctx, 1);
    for (int i = 0; i < NUM_CEILINGS; i++)
        print_ceiling(i, gpu ? ceilings_gpu_measure(of_gpu, (ceiling)i, 0)
                             : ceilings_measure(of_cpu, (ceiling)i, 0));
    ceilings_destroy(of_cpu);
    ceilings_gpu_destroy(of_gpu);
}

static void print_problem(qkv_context *ctx, const problem *p)
{
    char text[PROBLEM_TEXT], reasons[4096];
    problem_print(p, text);
    attention_problem a = attention_problem_create(p);
    const qkv_status status =
        qkv_attention_can_run(ctx, &a.spec, &a.limits, reasons, sizeof reasons);
    if (status != QKV_ERR_UNSUPPORTED) tool_check(status, "qkv_attention_can_run");
    printf("problem  %s %s\n", p->op, text);
    for (const char *line = reasons; *line;) {
        const size_t len = strcspn(line, "\n");
        printf("row      %.*s\n", (int)len, line);
        line += len + (line[len] == '\n');
    }
    if (status == QKV_OK) {
        qkv_workspace_size size;
        tool_check(qkv_attention_workspace_size(ctx, &a.spec, &a.limits, &size),
                   "qkv_attention_workspace_size");
        printf("memory   plan %llu bytes, scratch %llu bytes\n",
               (unsigned long long)size.plan_bytes, (unsigned long long)size.scratch_bytes);
    }
    attention_problem_destroy(&a);
}

void info_print(const info_options *options)
{
    qkv_context *ctx;
    const qkv_context_options o = {QKV_CONTEXT_OPTIONS_INIT, .num_threads = options->num_threads,
                                   .device = options->device};
    tool_check(qkv_context_create(&o, &ctx), "qkv_context_create");
    cuda *gpu = o.device.device_type == kDLCUDA ? cuda_open(o.device.device_id) : NULL;
    const int32_t version = qkv_version();
    printf("qkv      %d.%d.%d\n", version / 10000, version / 100 % 100, version % 100);
    printf("device   %s, %d threads\n", qkv_context_device_name(ctx),
           (int)qkv_context_num_threads(ctx));
    if (gpu)
        printf("gpu      %s, %d multiprocessors, driver of CUDA %d.%d\n", cuda_name(gpu),
               cuda_num_sms(gpu), cuda_driver(gpu) / 1000, cuda_driver(gpu) % 1000 / 10);
    printf("compiler %.60s\n", *qkv_context_compiler(ctx) ? qkv_context_compiler(ctx) : "none");
    print_levels();
    qkv_enumerate_kernels(print_kernel, NULL);
    if (options->ceilings) print_ceilings(ctx, gpu);
    if (options->p) print_problem(ctx, options->p);
    qkv_context_destroy(ctx);
    cuda_close(gpu);
}
