/* bench_gpu.c - see bench_gpu.h. SPDX-License-Identifier: Apache-2.0 */
#include "bench_gpu.h"

#include <math.h>

/* Of a replay, at least: what lies between two of them then counts little. */
#define GRAPH_SECONDS 2e-3
/* That ten replays may take. */
#define LONG_SECONDS 2.0
/* Of a call that is made as few times as possible. */
#define LONG_CALL 0.02
enum { MIN_CALLS = 10, MIN_REPLAYS = 10, MAX_HOST_CALLS = 200 };

/* Seconds of the n calls that follow, each. */
static double time_calls(const bench_op *op, bench *b, int n)
{
    cuda_mark(b->gpu, 0);
    for (int i = 0; i < n; i++) op->run(b, i % b->num_sets);
    cuda_mark(b->gpu, 1);
    return fmax(1e-6, cuda_between(b->gpu, 0, 1) / n);
}

/* Seconds of a call on the device, roughly: of later ones where they are short. */
static double estimate(const bench_op *op, bench *b)
{
    const double first = time_calls(op, b, 1);
    return first > LONG_CALL ? first : time_calls(op, b, 3);
}

/* The median seconds that the host takes to make a call; fewer than the driver's queue holds. */
static double time_host(const bench_op *op, bench *b, double each)
{
    double took[MAX_HOST_CALLS];
    const int n = (int)fmax(1, fmin(MAX_HOST_CALLS, 0.05 / each));
    cuda_wait(b->gpu);
    double now = tool_seconds();
    for (int i = 0; i < n; i++) {
        op->run(b, i % b->num_sets);
        const double then = tool_seconds();
        took[i] = then - now;
        now = then;
    }
    cuda_wait(b->gpu);
    tool_sort(took, (size_t)n);
    return took[n / 2];
}

double bench_time_host(const bench_op *op, bench *b)
{
    enum { ROUNDS = 50 };
    double took[ROUNDS];
    const double each = estimate(op, b);
    const int n = (int)fmax(3, fmin(MAX_HOST_CALLS, 0.02 / each));
    for (int round = 0; round < ROUNDS; round++) {
        cuda_wait(b->gpu);
        const double start = tool_seconds();
        for (int i = 0; i < n; i++) op->run(b, i % b->num_sets);
        took[round] = (tool_seconds() - start) / n;
    }
    cuda_wait(b->gpu);
    tool_sort(took, ROUNDS);
    return took[ROUNDS / 2];
}

/* The median seconds of some replays that follow each other. */
static bench_timing time_replays(cuda *gpu, cuda_graph *graph, int n)
{
    double took[CUDA_MARKS];
    cuda_replay(gpu, graph); /* the device is busy while the host enqueues the others */
    cuda_mark(gpu, 0);
    for (int i = 0; i < n; i++) {
        cuda_replay(gpu, graph);
        cuda_mark(gpu, i + 1);
    }
    for (int i = 0; i < n; i++) took[i] = cuda_between(gpu, i, i + 1);
    tool_sort(took, (size_t)n);
    return (bench_timing){.median = took[n / 2], .best = took[0]};
}

double bench_time_device_plan(const bench_op *op, bench *b)
{
    enum { PLANS = 50, REPLAYS = 20 };
    if (!op->plan || op->plan(b, true) != QKV_OK) return 0;
    cuda_capture(b->gpu);
    for (int i = 0; i < PLANS; i++) tool_check(op->plan(b, true), "qkv_attention_plan");
    cuda_graph *graph = cuda_captured(b->gpu);
    const bench_timing t = time_replays(b->gpu, graph, REPLAYS);
    cuda_graph_free(b->gpu, graph);
    return t.median / PLANS;
}

/* The median seconds of a call between two marks, less those of nothing between them. What the device does first, sweeping
 * its L2, lets the host enqueue the call meanwhile, and ends before the mark. */
static double time_alone(const bench_op *op, bench *b, double each)
{
    enum { CALLS = 31 };
    double took[CALLS], nothing[CALLS];
    const int n = each < LONG_CALL ? CALLS : 3;
    const double swept = 4 * (double)cuda_l2_bytes(b->gpu);
    void *memory = cuda_alloc(b->gpu, swept);
    for (int i = 0; i < n; i++) {
        cuda_set(b->gpu, memory, 0, (size_t)swept);
        cuda_mark(b->gpu, 0);
        op->run(b, i % b->num_sets);
        cuda_mark(b->gpu, 1);
        cuda_set(b->gpu, memory, 0, (size_t)swept);
        cuda_mark(b->gpu, 2);
        cuda_mark(b->gpu, 3);
        took[i] = cuda_between(b->gpu, 0, 1);
        nothing[i] = cuda_between(b->gpu, 2, 3);
    }
    cuda_free(b->gpu, memory);
    tool_sort(took, (size_t)n);
    tool_sort(nothing, (size_t)n);
    return took[n / 2] - nothing[n / 2];
}

/* Each set as often as any other. */
static int64_t calls_of_graph(const bench *b, double each, double seconds)
{
    double wanted = seconds > 0 ? fmax(GRAPH_SECONDS / each, each < LONG_CALL ? MIN_CALLS : 1) : 1;
    return (int64_t)ceil(wanted / (double)b->num_sets) * b->num_sets;
}

bench_timing bench_time_gpu(const bench_op *op, bench *b, double seconds)
{
    const double each = estimate(op, b), host = time_host(op, b, each);
    const double alone = time_alone(op, b, each);
    const int64_t calls = calls_of_graph(b, each, seconds);
    cuda_capture(b->gpu);
    for (int64_t i = 0; i < calls; i++) op->run(b, i % b->num_sets);
    cuda_graph *graph = cuda_captured(b->gpu);

    const double replay = each * (double)calls;
    const double few = seconds > 0 && replay * MIN_REPLAYS < LONG_SECONDS ? MIN_REPLAYS : 3;
    const int n = (int)fmax(few, fmin(CUDA_MARKS - 1, seconds / replay));
    const bench_timing t = time_replays(b->gpu, graph, n);
    cuda_graph_free(b->gpu, graph);
    return (bench_timing){.median = t.median / (double)calls,
                          .best = t.best / (double)calls,
                          .host = host,
                          .alone = alone,
                          .num_runs = n * calls};
}

double bench_time_launch(cuda *gpu)
{
    enum { ROUNDS = 50, LAUNCHES = 200 };
    static const char ptx[] = ".version 7.0\n.target sm_80\n.address_size 64\n"
                              ".visible .entry empty(.param .u64 a) { ret; }\n";
    double took[ROUNDS];
    void *nothing = NULL, *arguments[] = {&nothing};
    cuda_kernel *kernel = cuda_load(gpu, ptx, "empty");
    if (!kernel) return 0;
    for (int round = 0; round < ROUNDS; round++) {
        cuda_wait(gpu);
        const double start = tool_seconds();
        for (int i = 0; i < LAUNCHES; i++) cuda_launch(gpu, kernel, 1, 32, arguments);
        took[round] = (tool_seconds() - start) / LAUNCHES;
    }
    cuda_wait(gpu);
    tool_sort(took, ROUNDS);
    return took[ROUNDS / 2];
}
