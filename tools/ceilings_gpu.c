/* ceilings_gpu.c - see ceilings_gpu.h. SPDX-License-Identifier: Apache-2.0 */
#include "ceilings_gpu.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "ceilings_ptx.h"
#include "cublaslt.h"
#include "data.h"
#include "tool.h"

enum {
    TIMES = 10,              /* measurements; the best counts: neighbours only ever slow down */
    EACH = 4,                /* launches of one */
    CACHED_WORK = 256 << 20, /* bytes that a launch moves within a cache */
    SIDE = 8192,             /* of the matrices */
    STEPS = 4096             /* of products on registers */
};

struct ceilings_gpu {
    cuda *gpu;
    char *memory;        /* that is walked through */
    size_t memory_bytes; /* so many that the share of it that the L2 still has counts little */
    ceiling_value known[NUM_CEILINGS];
    bool measured[NUM_CEILINGS], warned;
    cuda_kernel *kernels[NUM_CEILINGS];
};

/* The kernels, in the order of the ceilings. */
static const struct {
    const char *ptx, *entry, *name;
    int moved; /* bytes for a byte of a block */
} kinds[NUM_CEILINGS] = {[CEILING_READ] = {ceiling_read, "read_memory", "read", 1},
                         [CEILING_COPY] = {ceiling_copy, "copy_memory", "copy", 2},
                         [CEILING_WRITE] = {ceiling_write, "write_memory", "write", 1},
                         [CEILING_DOT] = {ceiling_multiply, "multiply", "mma_sync", 0}};

/* NULL: the driver does not take it. */
static cuda_kernel *kernel_of(ceilings_gpu *c, ceiling which)
{
    if (!c->kernels[which] && !c->warned)
        c->kernels[which] = cuda_load(c->gpu, kinds[which].ptx, kinds[which].entry);
    if (!c->kernels[which] && !c->warned)
        fprintf(stderr, "qkv: the driver does not take the kernels that measure the GPU: "
                        "no ceilings\n");
    c->warned |= !c->kernels[which];
    return c->kernels[which];
}

/* The least seconds of a launch; 0: the kernel does not run. */
static double time_kernel(ceilings_gpu *c, ceiling which, void *from, void *to, unsigned grid,
                          unsigned repeats)
{
    cuda_kernel *kernel = kernel_of(c, which);
    if (!kernel) return 0;
    void *arguments[] = {&from, &to, &repeats};
    double best = INFINITY;
    cuda_launch(c->gpu, kernel, grid, CEILING_BLOCK, arguments);
    for (int i = 0; i < TIMES; i++) {
        cuda_mark(c->gpu, 0);
        for (int j = 0; j < EACH; j++) cuda_launch(c->gpu, kernel, grid, CEILING_BLOCK, arguments);
        cuda_mark(c->gpu, 1);
        best = fmin(best, cuda_between(c->gpu, 0, 1) / EACH);
    }
    return best;
}

/* false: the driver does not take the kernel. */
static bool make_memory(ceilings_gpu *c, ceiling which)
{
    enum { UNIT = 2 * CEILING_BLOCK_BYTES };
    if (!kernel_of(c, which)) return false;
    if (c->memory) return true;
    c->memory_bytes = (size_t)fmin(0x1p32, 0.25 * (double)cuda_free_bytes(c->gpu)) / UNIT * UNIT;
    c->memory = cuda_alloc(c->gpu, (double)c->memory_bytes);
    cuda_set(c->gpu, c->memory, 1, c->memory_bytes);
    return true;
}

static ceiling_value measure_memory(ceilings_gpu *c, ceiling which, double cached_bytes)
{
    if (!make_memory(c, which)) return (ceiling_value){0};
    const double room = (double)c->memory_bytes / kinds[which].moved;
    const double part = cached_bytes > 0 ? fmin(room, cached_bytes / kinds[which].moved) : room;
    const unsigned grid = (unsigned)fmax(1, part / CEILING_BLOCK_BYTES);
    const double launch = (double)grid * CEILING_BLOCK_BYTES;
    const unsigned repeats = cached_bytes > 0 ? (unsigned)fmax(1, CACHED_WORK / launch) : 1;
    ceiling_value v = {0};
    snprintf(v.name, sizeof v.name, "%s_%s", cached_bytes > 0 ? "l2" : "dram", kinds[which].name);
    const double seconds =
        time_kernel(c, which, c->memory, c->memory + c->memory_bytes / 2, grid, repeats);
    if (seconds > 0) v.rate = launch * repeats * kinds[which].moved / seconds * 1e-9;
    return v;
}

/* Products on registers: four blocks a multiprocessor. */
static ceiling_value measure_mma(ceilings_gpu *c)
{
    ceiling_value v = {0};
    snprintf(v.name, sizeof v.name, "%s", kinds[CEILING_DOT].name);
    const unsigned grid = 4 * (unsigned)cuda_num_sms(c->gpu);
    void *nothing = cuda_alloc(c->gpu, 4);
    const double seconds = time_kernel(c, CEILING_DOT, nothing, nothing, grid, STEPS);
    cuda_free(c->gpu, nothing);
    if (seconds > 0) v.rate = (double)grid * STEPS * CEILING_MMA_FLOPS / seconds * 1e-9;
    return v;
}

static void *random_matrix(cuda *gpu, data_random *r)
{
    enum { PERIOD = 1 << 20 };
    const double n = (double)SIDE * SIDE;
    const size_t bytes = data_bytes(QKV_BF16, PERIOD);
    void *host = data_alloc(PERIOD, data_bytes(QKV_BF16, 1));
    void *matrix = cuda_alloc(gpu, n * (double)data_bytes(QKV_BF16, 1));
    data_fill(r, host, QKV_BF16, PERIOD, 1);
    cuda_copy(gpu, matrix, host, bytes);
    cuda_repeat(gpu, matrix, bytes, data_bytes(QKV_BF16, (int64_t)n));
    data_free(host);
    return matrix;
}

static ceiling_value measure_matmul(ceilings_gpu *c)
{
    cublaslt *l = cublaslt_open(c->gpu, SIDE);
    ceiling_value v = {.name = "matmul_cublaslt"};
    if (!l) return measure_mma(c);
    data_random random = data_seed();
    void *m[3];
    for (int i = 0; i < 3; i++) m[i] = random_matrix(c->gpu, &random);
    for (int way = 0; way < cublaslt_num_ways(l); way++) {
        if (!cublaslt_multiply(l, way, m[0], m[1], m[2])) continue;
        for (int i = 0; i < TIMES; i++) {
            cuda_mark(c->gpu, 0);
            for (int j = 0; j < EACH; j++) cublaslt_multiply(l, way, m[0], m[1], m[2]);
            cuda_mark(c->gpu, 1);
            const double seconds = cuda_between(c->gpu, 0, 1) / EACH;
            v.rate = fmax(v.rate, 2.0 * SIDE * SIDE * SIDE / seconds * 1e-9);
        }
    }
    for (int i = 0; i < 3; i++) cuda_free(c->gpu, m[i]);
    cublaslt_close(l);
    return v;
}

ceilings_gpu *ceilings_gpu_create(cuda *c)
{
    ceilings_gpu *out = data_alloc(1, sizeof *out);
    out->gpu = c;
    return out;
}

void ceilings_gpu_destroy(ceilings_gpu *c)
{
    if (!c) return;
    cuda_free(c->gpu, c->memory);
    data_free(c);
}

ceiling_value ceilings_gpu_measure(ceilings_gpu *c, ceiling which, double cached_bytes)
{
    if (which == CEILING_FMA) return (ceiling_value){0};
    if (which != CEILING_DOT && cached_bytes > 0) return measure_memory(c, which, cached_bytes);
    if (!c->measured[which])
        c->known[which] = which == CEILING_DOT ? measure_matmul(c) : measure_memory(c, which, 0);
    c->measured[which] = true;
    return c->known[which];
}
