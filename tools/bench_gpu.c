/* bench_gpu.c - see bench_gpu.h. SPDX-License-Identifier: Apache-2.0 */
#include "bench_gpu.h"

#include <math.h>

#define GRAPH_SECONDS                                                                              \
    2e-3 /* of a replay at least: what lies between two of them then counts little */
#define LONG_SECONDS 2.0 /* that ten replays may take */
enum { MIN_CALLS = 10, MIN_REPLAYS = 10, MAX_HOST_CALLS = 200 };

/* Seconds of a call on the device, roughly. */
static double estimate(const bench_op *op, bench *b)
{
    const int warm = 2;
    for (int i = 0; i < warm; i++) op->run(b, i % b->num_sets);
    cuda_mark(b->gpu, 0);
    for (int i = 0; i < warm; i++) op->run(b, i % b->num_sets);
    cuda_mark(b->gpu, 1);
    return fmax(1e-6, cuda_between(b->gpu, 0, 1) / warm);
}

/* The median seconds that the host takes to make a call; fewer than the driver's queue holds. */
static double time_host(const bench_op *op, bench *b, double each)
{
    double took[MAX_HOST_CALLS];
    const int n = (int)fmax(3, fmin(MAX_HOST_CALLS, 0.05 / each));
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

/* Each set as often as any other. */
static int64_t calls_of_graph(const bench *b, double each, double seconds)
{
    double wanted = seconds > 0 ? fmax(GRAPH_SECONDS / each, each < 1e-2 ? MIN_CALLS : 1) : 1;
    return (int64_t)ceil(wanted / (double)b->num_sets) * b->num_sets;
}

bench_timing bench_time_gpu(const bench_op *op, bench *b, double seconds)
{
    double took[CUDA_MARKS];
    const double each = estimate(op, b);
    bench_timing t = {.host = time_host(op, b, each)};
    const int64_t calls = calls_of_graph(b, each, seconds);
    cuda_capture(b->gpu);
    for (int64_t i = 0; i < calls; i++) op->run(b, i % b->num_sets);
    cuda_graph *graph = cuda_captured(b->gpu);

    const double replay = each * (double)calls;
    const double few = seconds > 0 && replay * MIN_REPLAYS < LONG_SECONDS ? MIN_REPLAYS : 3;
    const int n = (int)fmax(few, fmin(CUDA_MARKS - 1, seconds / replay));
    cuda_replay(b->gpu, graph); /* the device is busy while the host enqueues the others */
    cuda_mark(b->gpu, 0);
    for (int i = 0; i < n; i++) {
        cuda_replay(b->gpu, graph);
        cuda_mark(b->gpu, i + 1);
    }
    for (int i = 0; i < n; i++) took[i] = cuda_between(b->gpu, i, i + 1) / (double)calls;
    cuda_graph_free(b->gpu, graph);
    tool_sort(took, (size_t)n);
    t.median = took[n / 2];
    t.best = took[0];
    t.num_runs = n * calls;
    return t;
}
