/* bench_gpu.h - how long calls take on a GPU, and on the host that makes them.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_BENCH_GPU_H
#define QKV_TOOLS_BENCH_GPU_H

#include "bench.h"

/* A call by itself, and a chain of them, of which one may begin before the one before has ended: many calls, which rotate over the sets of inputs so that each finds its own out of the L2, are captured
 * into a graph, and the graph is replayed for about so many seconds. */
bench_timing bench_time_gpu(const bench_op *op, bench *b, double seconds);

/* Seconds that the host takes for a call, with many of them in a row. */
double bench_time_host(const bench_op *op, bench *b);

/* Seconds on the device for a plan of arrays there, of a replayed graph; 0: there are no such plans. */
double bench_time_device_plan(const bench_op *op, bench *b);

/* The seconds of the host for a launch of an empty kernel by the driver alone: what a call cannot be faster
 * than. 0: the driver does not take it. */
double bench_time_launch(cuda *gpu);

#endif
