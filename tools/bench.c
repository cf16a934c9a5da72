/* bench.c - the benchmark loop and its report. SPDX-License-Identifier: Apache-2.0 */
#include "bench.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const bench_op *const ops[] = {
    &bench_decode,  &bench_prefill, &bench_mixed, &bench_append, &bench_gemm,
    &bench_rmsnorm, &bench_rope,    &bench_silu,  &bench_argmax, &bench_sample,
};

struct bench_session {
    bench_options options;
    qkv_context *ctx;
    ceilings *ceilings;
    bool printed; /* the table has its head */
};

/* What a problem's timing is held against. */
typedef struct limits {
    double memory, compute; /* GB/s; GFLOP/s */
    const char *memory_name, *compute_name;
} limits;

typedef struct timing {
    double median, best; /* seconds */
    int64_t num_runs;
} timing;

/* ---- for drivers ------------------------------------------------------------------------------ */

int64_t bench_num_sets(const bench *b, double touched, double held)
{
    if (bench_int(b, KEY_DATA) == DATA_CACHE) return 1;
    const double sets = fmin(ceil((double)data_rotation_bytes() / fmax(touched, 64)), 4e9 / held);
    return sets < 1 ? 1 : (int64_t)sets;
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
    tool_die(EXIT_WRONG, "WRONG RESULT: %s %s: %s: expected %.9g within %.3g, got %.9g", b->p->op, text,
             place, want, tolerance, got);
}

/* ---- measuring -------------------------------------------------------------------------------- */

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

/* Raises limits to what is measured now: before and after the timing, so that a neighbour who was busy
 * at one of the two does not make a result look better than it is. */
static void measure_limits(const bench_session *s, const bench *b, limits *l)
{
    const ceiling_value memory = ceilings_measure(s->ceilings, b->copies ? CEILING_COPY : CEILING_READ);
    l->memory = fmax(l->memory, memory.median);
    l->memory_name = memory.name;
    if (b->flops <= 0) return;
    const ceiling compute[] = {CEILING_FMA, CEILING_DOT};
    for (int i = 0; i < (b->bf16 ? 2 : 1); i++) {
        const ceiling_value v = ceilings_measure(s->ceilings, compute[i]);
        if (v.median <= l->compute) continue;
        l->compute = v.median;
        l->compute_name = v.name;
    }
}

/* ---- reporting -------------------------------------------------------------------------------- */

static void print_line(bench_session *s, const bench *b, const limits *l, const timing *t)
{
    char text[PROBLEM_TEXT];
    problem_print(b->p, text);
    const double gbps = b->bytes / t->median * 1e-9, gflops = b->flops / t->median * 1e-9;
    const double memory_share = gbps / l->memory;
    const double compute_share = b->flops > 0 ? gflops / l->compute : 0;
    const bool memory = memory_share >= compute_share; /* takes longer at its ceiling */
    const char *name = memory ? l->memory_name : l->compute_name;
    const double value = memory ? l->memory : l->compute;
    const double share = memory ? memory_share : compute_share;
    const char *device = qkv_context_device_name(s->ctx), *colon = strchr(device, ':');
    if (s->options.json) {
        printf("{\"op\": \"%s\", \"problem\": \"%s\", \"row\": \"%s\", \"us\": %.3f, \"us_best\": %.3f, "
               "\"runs\": %lld, \"gbps\": %.4g, \"gflops\": %.4g, \"ceiling\": %.4g, "
               "\"ceiling_name\": \"%s\", \"ceiling_unit\": \"%s\", \"share\": %.4g, "
               "\"device\": \"%s\", \"isa\": \"%s\", \"threads\": %d}\n",
               b->p->op, text, b->row, t->median * 1e6, t->best * 1e6, (long long)t->num_runs, gbps,
               gflops, value, name, memory ? "GB/s" : "GFLOP/s", share, device,
               colon ? colon + 1 : device, (int)qkv_context_num_threads(s->ctx));
    } else {
        if (!s->printed)
            printf("# qkv %d.%d.%d, %s, %d threads\n%-8s %-14s %11s %8s %9s %6s  %-24s %s\n",
                   QKV_VERSION_MAJOR, QKV_VERSION_MINOR, QKV_VERSION_PATCH, device,
                   (int)qkv_context_num_threads(s->ctx), "op", "row", "us", "GB/s", "GFLOP/s", "share",
                   "of ceiling", "problem");
        char of[64];
        snprintf(of, sizeof of, "%s %.4g", name, value);
        printf("%-8s %-14s %11.1f %8.2f %9.2f %5.1f%%  %-24s %s\n", b->p->op, b->row, t->median * 1e6,
               gbps, gflops, share * 100, of, text);
    }
    s->printed = true;
    fflush(stdout);
}

/* ---- public calls ----------------------------------------------------------------------------- */

bench_session *bench_open(const bench_options *options)
{
    bench_session *s = calloc(1, sizeof *s);
    if (!s) tool_die(EXIT_WRONG, "out of memory");
    s->options = *options;
    const qkv_context_options o = {QKV_CONTEXT_OPTIONS_INIT, .num_threads = options->num_threads,
                                   .isa = options->isa};
    tool_check(qkv_context_create(&o, &s->ctx), "qkv_context_create");
    s->ceilings = ceilings_create(qkv_context_num_threads(s->ctx), options->isa);
    return s;
}

void bench_close(bench_session *s)
{
    ceilings_destroy(s->ceilings);
    qkv_context_destroy(s->ctx);
    free(s);
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
    op->teardown(&b);
}
