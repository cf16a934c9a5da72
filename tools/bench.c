/* bench.c - the benchmark loop and its report. SPDX-License-Identifier: Apache-2.0 */
#include "bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench_gpu.h"
#include "ceilings_gpu.h"

static const bench_op *const ops[] = {
    &bench_decode,      &bench_prefill,     &bench_mixed, &bench_append,    &bench_gemm,
    &bench_rmsnorm,     &bench_rope,        &bench_gated, &bench_argmax,    &bench_sample,
    &bench_renormalize, &bench_mask_logits, &bench_top_k, &bench_log_probs, &bench_verify,
};

struct bench_session {
    bench_options options;
    qkv_context *ctx;
    cuda *gpu; /* NULL: the CPU */
    ceilings *ceilings;
    ceilings_gpu *gpu_ceilings;
    bool printed; /* the table has its head */
};

/* What a problem's timing is held against. */
typedef struct limits {
    ceiling_value memory, compute; /* GB/s; GFLOP/s */
} limits;

/* ---- rows ---------------------------------------------------------------------------------- */

typedef struct row_search {
    const char *op;
    DLDeviceType device;
    char *row;
    size_t size;
} row_search;

static void add_row(void *user, const qkv_kernel_info *info)
{
    const row_search *s = user;
    const size_t used = strlen(s->row);
    if (strcmp(info->op, s->op) == 0 && info->device_type == s->device)
        snprintf(s->row + used, s->size - used, "%s%s", used ? "|" : "", info->row);
}

void bench_rows_of(const bench *b, const char *op, char *rows, size_t bytes)
{
    rows[0] = '\0';
    qkv_enumerate_kernels(add_row, &(row_search){op, b->device.device_type, rows, bytes});
}

/* ---- measuring ----------------------------------------------------------------------------- */

/* Calls, one timed at a time, for about so many seconds; at least 5. */
static bench_timing time_op(const bench_op *op, bench *b, double seconds)
{
    enum { MAX_RUNS = 1 << 18 };
    double *took = data_alloc(MAX_RUNS, sizeof *took);
    memset(took, 0, MAX_RUNS * sizeof *took); /* page faults now, not while timing */
    for (int i = 0; i < 2; i++) op->run(b, i % b->num_sets);
    const double end = tool_seconds() + seconds;
    int64_t n = 0, set = 2 % b->num_sets;
    for (double now = tool_seconds(); n < 5 || (now < end && n < MAX_RUNS); n++) {
        op->run(b, set);
        const double then = tool_seconds();
        took[n] = then - now;
        now = then;
        if (++set == b->num_sets) set = 0;
    }
    tool_sort(took, (size_t)n);
    const bench_timing t = {.median = took[n / 2], .best = took[0], .num_runs = n};
    data_free(took);
    return t;
}

static void raise_to(ceiling_value *v, ceiling_value other)
{
    if (other.rate > v->rate) *v = other;
}

static ceiling_value measure(const bench_session *s, ceiling which, double cached_bytes)
{
    return s->gpu ? ceilings_gpu_measure(s->gpu_ceilings, which, cached_bytes)
                  : ceilings_measure(s->ceilings, which, cached_bytes);
}

/* Raises limits to what is measured now: before and after the timing, so that a neighbour who
 * was busy at one of the two does not make a result look better than it is. */
static void measure_limits(const bench_session *s, const bench *b, limits *l)
{
    const ceiling memory = b->copies ? CEILING_COPY : CEILING_READ;
    raise_to(&l->memory, measure(s, memory, b->cached_bytes));
    if (b->flops > 0) raise_to(&l->compute, measure(s, CEILING_FMA, 0));
    if (b->flops > 0 && b->bf16) raise_to(&l->compute, measure(s, CEILING_DOT, 0));
}

/* ---- reporting ----------------------------------------------------------------------------- */

static void print_line(bench_session *s, const bench *b, const limits *l, const bench_timing *t)
{
    char text[PROBLEM_TEXT];
    problem_print(b->p, text);
    const double gbps = b->bytes / t->median * 1e-9, gflops = b->flops / t->median * 1e-9;
    const double memory_share = l->memory.rate > 0 ? gbps / l->memory.rate : 0;
    const double compute_share = l->compute.rate > 0 ? gflops / l->compute.rate : 0;
    const bool memory = memory_share >= compute_share; /* takes longer at its ceiling */
    const ceiling_value *of = memory ? &l->memory : &l->compute;
    const double share = memory ? memory_share : compute_share;
    const char *device = qkv_context_device_name(s->ctx);
    double load = 0; /* neighbours: they slow calls down, and hardly the ceilings */
    getloadavg(&load, 1);
    char gpu[96] = "", gpu_us[32] = ""; /* what there is on a GPU alone */
    if (s->gpu) {
        snprintf(gpu, sizeof gpu, "\"alone_us\": %.3f, \"host_us\": %.3f, ", t->alone * 1e6,
                 t->host * 1e6);
        snprintf(gpu_us, sizeof gpu_us, "%8.1f %7.2f ", t->alone * 1e6, t->host * 1e6);
    }
    if (s->options.json) {
        printf("{\"op\": \"%s\", \"problem\": \"%s\", \"row\": \"%s\", "
               "\"us\": %.3f, \"us_best\": %.3f, %s\"runs\": %lld, \"gbps\": %.4g, "
               "\"gflops\": %.4g, \"ceiling\": %.4g, "
               "\"ceiling_name\": \"%s\", \"ceiling_unit\": \"%s\", \"share\": %.4g, "
               "\"device\": \"%s\", \"threads\": %d, \"load\": %.2f}\n",
               b->p->op, text, b->row, t->median * 1e6, t->best * 1e6, gpu, (long long)t->num_runs,
               gbps, gflops, of->rate, of->name, memory ? "GB/s" : "GFLOP/s", share, device,
               (int)qkv_context_num_threads(s->ctx), load);
    } else {
        if (!s->printed)
            printf("# qkv %d.%d.%d, %s, %d threads, load %.2f\n"
                   "%-8s %-14s %11s %s%8s %9s %6s  %-24s %s\n",
                   QKV_VERSION_MAJOR, QKV_VERSION_MINOR, QKV_VERSION_PATCH,
                   s->gpu ? cuda_name(s->gpu) : device, (int)qkv_context_num_threads(s->ctx), load,
                   "op", "row", "us", s->gpu ? "   alone host us " : "", "GB/s", "GFLOP/s", "share",
                   "of ceiling", "problem");
        char limit[64];
        snprintf(limit, sizeof limit, "%s %.4g", of->name, of->rate);
        printf("%-8s %-14s %11.1f %s%8.2f %9.2f %5.1f%%  %-24s %s\n", b->p->op, b->row,
               t->median * 1e6, gpu_us, gbps, gflops, share * 100, limit, text);
    }
    s->printed = true;
    fflush(stdout);
}

/* ---- public calls -------------------------------------------------------------------------- */

bench_session *bench_open(const bench_options *options)
{
    bench_session *s = data_alloc(1, sizeof *s);
    const bool on_gpu = options->device.device_type == kDLCUDA;
    s->options = *options;
    if (s->options.seconds < 0) s->options.seconds = on_gpu ? 0.2 : 1;
    const qkv_context_options o = {QKV_CONTEXT_OPTIONS_INIT, .device = options->device,
                                   .num_threads = options->num_threads};
    tool_check(qkv_context_create(&o, &s->ctx), "qkv_context_create");
    if (on_gpu) {
        s->gpu = cuda_open(options->device.device_id);
        s->gpu_ceilings = ceilings_gpu_create(s->gpu);
    } else {
        s->ceilings = ceilings_create(s->ctx, s->options.seconds);
    }
    return s;
}

void bench_close(bench_session *s)
{
    ceilings_destroy(s->ceilings);
    ceilings_gpu_destroy(s->gpu_ceilings);
    qkv_context_destroy(s->ctx);
    cuda_close(s->gpu);
    data_free(s);
}

static void free_memory(bench *b)
{
    for (int i = 0; i < b->num_blocks; i++) data_free(b->blocks[i]);
    for (int i = 0; i < b->num_device_blocks; i++) cuda_free(b->gpu, b->device_blocks[i]);
    data_free(b->fetched);
}

static const bench_op *find_op(const problem *p)
{
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++)
        if (strcmp(ops[i]->name, p->op) == 0) return ops[i];
    tool_die(EXIT_WRONG, "%s: no driver", p->op);
}

static bench begin(bench_session *s, const problem *p)
{
    bench b = {.p = p,
               .ctx = s->ctx,
               .gpu = s->gpu,
               .device = s->options.device,
               .stream = s->gpu ? cuda_stream(s->gpu) : NULL,
               .random = data_seed(),
               .num_sets = 1};
    find_op(p)->setup(&b);
    return b;
}

static void end(bench *b)
{
    const bench_op *op = find_op(b->p);
    if (b->gpu) cuda_wait(b->gpu);
    if (op->teardown) op->teardown(b);
    free_memory(b);
}

void bench_problem(bench_session *s, const problem *p)
{
    const bench_op *op = find_op(p);
    bench b = begin(s, p);
    op->verify(&b);
    limits l = {0};
    measure_limits(s, &b, &l);
    const bench_timing t =
        s->gpu ? bench_time_gpu(op, &b, s->options.seconds) : time_op(op, &b, s->options.seconds);
    measure_limits(s, &b, &l);
    print_line(s, &b, &l, &t);
    end(&b);
}

const qkv_context *bench_context(const bench_session *s)
{
    return s->ctx;
}

double bench_host_run(bench_session *s, const problem *p)
{
    bench b = begin(s, p);
    const double seconds = bench_time_host(find_op(p), &b);
    end(&b);
    return seconds;
}

double bench_host_launch(bench_session *s)
{
    return s->gpu ? bench_time_launch(s->gpu) : 0;
}

double bench_host_plan(bench_session *s, const problem *p)
{
    enum { PLANS = 201 };
    double took[PLANS];
    const bench_op *op = find_op(p);
    bench b = begin(s, p);
    for (int i = 0; i < PLANS; i++) {
        if (s->gpu) cuda_wait(s->gpu);
        const double start = tool_seconds();
        tool_check(op->plan(&b, false), "qkv_attention_plan");
        took[i] = tool_seconds() - start;
    }
    end(&b);
    tool_sort(took, PLANS);
    return took[PLANS / 2];
}

double bench_device_plan(bench_session *s, const problem *p)
{
    bench b = begin(s, p);
    const double seconds = bench_time_device_plan(find_op(p), &b);
    end(&b);
    return seconds;
}

void bench_compile(qkv_context *ctx, const problem *p)
{
    const bench_op *op = find_op(p);
    bench b = {.p = p,
               .ctx = ctx,
               .only_compiles = true,
               .device = {kDLCUDA, 0},
               .random = data_seed(),
               .num_sets = 1};
    if (op->compile) {
        op->compile(&b);
    } else {
        op->setup(&b);
        op->run(&b, 0);
    }
    free_memory(&b);
}
