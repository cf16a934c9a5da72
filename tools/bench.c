/* bench.c - the benchmark loop and its report. SPDX-License-Identifier: Apache-2.0 */
#include "bench.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const bench_op *const ops[] = {
    &bench_decode,  &bench_prefill, &bench_mixed, &bench_append, &bench_gemm,
    &bench_rmsnorm, &bench_rope,    &bench_gated, &bench_argmax, &bench_sample,
};

struct bench_session {
    bench_options options;
    qkv_context *ctx;
    ceilings *ceilings;
    bool printed; /* the table has its head */
};

/* What a problem's timing is held against. */
typedef struct limits {
    ceiling_value memory, compute; /* GB/s; GFLOP/s */
} limits;

typedef struct timing {
    double median, best; /* seconds */
    int64_t num_runs;
} timing;

/* ---- for drivers --------------------------------------------------------------------------- */

void *bench_alloc(bench *b, double count, size_t size)
{
    const int room = sizeof b->blocks / sizeof b->blocks[0];
    if (b->num_blocks == room) tool_die(EXIT_WRONG, "%s: more than %d blocks", b->p->op, room);
    return b->blocks[b->num_blocks++] = data_alloc(count, size);
}

void bench_rotate(bench *b, double touched, double held)
{
    b->num_sets = 1;
    if (bench_int(b, KEY_DATA) == DATA_CACHE)
        b->cached_bytes = touched;
    else
        b->num_sets = (int64_t)fmax(1, fmin((double)data_rotation_bytes() / touched, 4e9 / held));
}

typedef struct row_search {
    const char *op;
    char *row;
    size_t size;
} row_search;

static void add_row(void *user, const qkv_kernel_info *info)
{
    const row_search *s = user;
    const size_t used = strlen(s->row);
    if (strcmp(info->op, s->op) == 0 && info->device_type == kDLCPU)
        snprintf(s->row + used, s->size - used, "%s%s", used ? "|" : "", info->row);
}

void bench_rows_of(bench *b, const char *op)
{
    b->row[0] = '\0';
    qkv_enumerate_kernels(add_row, &(row_search){op, b->row, sizeof b->row});
}

void bench_expect(const bench *b, double got, double want, double tolerance, const char *where, ...)
{
    if (fabs(got - want) <= tolerance) return;
    char place[128];
    va_list args;
    va_start(args, where);
    vsnprintf(place, sizeof place, where, args);
    va_end(args);
    char text[PROBLEM_TEXT];
    problem_print(b->p, text);
    tool_die(EXIT_WRONG, "WRONG RESULT: %s %s: %s: expected %.9g within %.3g, got %.9g", b->p->op,
             text, place, want, tolerance, got);
}

void bench_expect_finite(const bench *b, const void *p, DLDataType dtype, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(data_get(p, dtype, i)))
            bench_expect(b, data_get(p, dtype, i), 0, 0, "output, element %lld", (long long)i);
}

/* ---- measuring ----------------------------------------------------------------------------- */

/* Calls, one timed at a time, for about so many seconds; at least 5. */
static timing time_op(const bench_op *op, bench *b, double seconds)
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
    const timing t = {.median = took[n / 2], .best = took[0], .num_runs = n};
    data_free(took);
    return t;
}

static void raise_to(ceiling_value *v, ceiling_value other)
{
    if (other.rate > v->rate) *v = other;
}

/* Raises limits to what is measured now: before and after the timing, so that a neighbour who
 * was busy at one of the two does not make a result look better than it is. */
static void measure_limits(const bench_session *s, const bench *b, limits *l)
{
    const ceiling memory = b->copies ? CEILING_COPY : CEILING_READ;
    raise_to(&l->memory, ceilings_measure(s->ceilings, memory, b->cached_bytes));
    if (b->flops > 0) raise_to(&l->compute, ceilings_measure(s->ceilings, CEILING_FMA, 0));
    if (b->flops > 0 && b->bf16)
        raise_to(&l->compute, ceilings_measure(s->ceilings, CEILING_DOT, 0));
}

/* ---- reporting ----------------------------------------------------------------------------- */

static void print_line(bench_session *s, const bench *b, const limits *l, const timing *t)
{
    char text[PROBLEM_TEXT];
    problem_print(b->p, text);
    const double gbps = b->bytes / t->median * 1e-9, gflops = b->flops / t->median * 1e-9;
    const double memory_share = gbps / l->memory.rate;
    const double compute_share = b->flops > 0 ? gflops / l->compute.rate : 0;
    const bool memory = memory_share >= compute_share; /* takes longer at its ceiling */
    const ceiling_value *of = memory ? &l->memory : &l->compute;
    const double share = memory ? memory_share : compute_share;
    const char *device = qkv_context_device_name(s->ctx);
    double load = 0; /* neighbours: they slow calls down, and hardly the ceilings */
    getloadavg(&load, 1);
    if (s->options.json) {
        printf("{\"op\": \"%s\", \"problem\": \"%s\", \"row\": \"%s\", "
               "\"us\": %.3f, \"us_best\": %.3f, \"runs\": %lld, \"gbps\": %.4g, \"gflops\": %.4g, "
               "\"ceiling\": %.4g, "
               "\"ceiling_name\": \"%s\", \"ceiling_unit\": \"%s\", \"share\": %.4g, "
               "\"device\": \"%s\", \"threads\": %d, \"load\": %.2f}\n",
               b->p->op, text, b->row, t->median * 1e6, t->best * 1e6, (long long)t->num_runs, gbps,
               gflops, of->rate, of->name, memory ? "GB/s" : "GFLOP/s", share, device,
               (int)qkv_context_num_threads(s->ctx), load);
    } else {
        if (!s->printed)
            printf("# qkv %d.%d.%d, %s, %d threads, load %.2f\n"
                   "%-8s %-14s %11s %8s %9s %6s  %-24s %s\n",
                   QKV_VERSION_MAJOR, QKV_VERSION_MINOR, QKV_VERSION_PATCH, device,
                   (int)qkv_context_num_threads(s->ctx), load, "op", "row", "us", "GB/s", "GFLOP/s",
                   "share", "of ceiling", "problem");
        char limit[64];
        snprintf(limit, sizeof limit, "%s %.4g", of->name, of->rate);
        printf("%-8s %-14s %11.1f %8.2f %9.2f %5.1f%%  %-24s %s\n", b->p->op, b->row,
               t->median * 1e6, gbps, gflops, share * 100, limit, text);
    }
    s->printed = true;
    fflush(stdout);
}

/* ---- public calls -------------------------------------------------------------------------- */

bench_session *bench_open(const bench_options *options)
{
    bench_session *s = data_alloc(1, sizeof *s);
    s->options = *options;
    const qkv_context_options o = {QKV_CONTEXT_OPTIONS_INIT, .num_threads = options->num_threads};
    tool_check(qkv_context_create(&o, &s->ctx), "qkv_context_create");
    s->ceilings = ceilings_create(s->ctx, options->seconds);
    return s;
}

void bench_close(bench_session *s)
{
    ceilings_destroy(s->ceilings);
    qkv_context_destroy(s->ctx);
    data_free(s);
}

void bench_problem(bench_session *s, const problem *p)
{
    const bench_op *op = NULL;
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++)
        if (strcmp(ops[i]->name, p->op) == 0) op = ops[i];
    if (!op) tool_die(EXIT_WRONG, "%s: no driver", p->op);
    bench b = {.p = p, .ctx = s->ctx, .random = data_seed(), .num_sets = 1};
    op->setup(&b);
    op->verify(&b);
    limits l = {0};
    measure_limits(s, &b, &l);
    const timing t = time_op(op, &b, s->options.seconds);
    measure_limits(s, &b, &l);
    print_line(s, &b, &l, &t);
    if (op->teardown) op->teardown(&b);
    for (int i = 0; i < b.num_blocks; i++) data_free(b.blocks[i]);
}
