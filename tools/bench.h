/* bench.h - one benchmark: inputs, a check against a reference in double, a timing, a share.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_BENCH_H
#define QKV_TOOLS_BENCH_H

#include <stdbool.h>

#include "ceilings.h"
#include "cuda.h"
#include "data.h"
#include "problem.h"
#include "tool.h"

typedef struct bench bench;

/* An operator's driver. Every function dies on failure. */
typedef struct bench_op {
    const char *name;
    void (*setup)(bench *b);            /* makes b->state, b->num_sets, the work and the row */
    void (*run)(bench *b, int64_t set); /* one call of the library */
    void (*verify)(bench *b);           /* one run on poisoned outputs, held against a reference */
    void (*teardown)(bench *b);         /* NULL if all that the state holds is of bench_alloc */
    void (*compile)(bench *b);          /* the kernels of the problem; NULL: setup and run do */
    /* Plans what setup has planned again, from arrays of the host or of the device; NULL: no plan */
    qkv_status (*plan)(bench *b, bool on_device);
} bench_op;

struct bench {
    const problem *p;
    qkv_context *ctx;
    cuda *gpu;          /* NULL: the CPU */
    bool only_compiles; /* for GPUs, of which there is none: addresses on it are made up */
    DLDevice device;    /* of tensors */
    void *stream;       /* for calls */
    data_random random;
    void *state;
    int64_t num_sets;    /* sets of inputs that calls rotate over */
    double cached_bytes; /* memory that calls stay within; 0: they rotate through DRAM */
    double bytes;        /* that a call must move */
    double flops;        /* that a call must do; 0: nothing that a multiply-add ceiling binds */
    bool copies;         /* bytes are read and written: CEILING_COPY binds, else CEILING_READ */
    bool bf16;           /* flops are products of bf16 by bf16: CEILING_DOT counts too */
    char row[64];        /* of the kernel table */
    void *blocks[32];    /* of bench_alloc */
    int num_blocks;
    void *device_blocks[32]; /* of bench_memory, on a GPU */
    int num_device_blocks;
    char *fetched; /* of bench_fetch, on a GPU */
    size_t fetched_bytes;
};

/* Seconds of a call. */
typedef struct bench_timing {
    double median, best;
    double host; /* that the host takes to make a call on a GPU; else 0 */
    double
        alone; /* on a GPU, of a call that no other overlaps and that finds nothing in the L2; else 0 */
    int64_t num_runs;
} bench_timing;

/* Options of the command line. */
typedef struct bench_options {
    double seconds; /* to time each problem for; negative: 1 on the CPU, 0.2 on a GPU */
    bool json;
    int32_t num_threads; /* 0 = all */
    DLDevice device;
} bench_options;

/* What --file's problems share. */
typedef struct bench_session bench_session;
bench_session *bench_open(const bench_options *options);
void bench_close(bench_session *s);
const qkv_context *bench_context(const bench_session *s);

/* Verifies, times, prints one line. */
void bench_problem(bench_session *s, const problem *p);

/* Seconds of the host for a call on a GPU; for a launch by the driver alone; and for a plan, on either
 * device. */
double bench_host_run(bench_session *s, const problem *p);
double bench_host_launch(bench_session *s);
double bench_host_plan(bench_session *s, const problem *p);

/* Seconds of the GPU for a plan of arrays that it has; 0: the library takes none. */
double bench_device_plan(bench_session *s, const problem *p);

/* Lets a context of QKV_JIT_FILL compile what the problem needs. */
void bench_compile(qkv_context *ctx, const problem *p);

/* ---- for drivers --------------------------------------------------------------------------- */

/* Zeroed memory of the host, freed after teardown. */
void *bench_alloc(bench *b, double count, size_t size);

/* Memory of the device, freed after teardown; on the CPU that of bench_alloc. */
void *bench_memory(bench *b, double count, size_t size);

/* A small array of the host as the device reads it; on the CPU itself. */
void *bench_upload(bench *b, void *host, size_t bytes);

/* What is on the device, as the host reads it; on a GPU a copy, until the next fetch. */
const void *bench_fetch(bench *b, const void *p, size_t bytes);

/* Random inputs. On a GPU they repeat after `period`, so that gigabytes are there at once, and the host
 * keeps one period to compute with. */
typedef struct bench_array {
    char *data; /* on the device */
    DLDataType dtype;
    float *known; /* [period], on a GPU */
    int64_t period;
} bench_array;

/* n elements, uniform in [-scale, scale). */
bench_array bench_random(bench *b, DLDataType dtype, double n, double scale);

/* The same of a normal distribution of mean 0. */
bench_array bench_normal(bench *b, DLDataType dtype, double n, double spread);
static inline char *bench_at(const bench_array *a, int64_t i)
{
    return a->data + data_bytes(a->dtype, i);
}
/* Elements first .. first + n - 1; on a GPU as they were made, whatever was written there since. */
void bench_read(const bench_array *a, int64_t first, int64_t n, double *out);

/* The same bytes of the host, so many times one after another on the device. */
void bench_repeat(bench *b, void *to, const void *host, size_t bytes, int64_t times);

/* What is on the device, poisoned and as doubles. */
void bench_poison(bench *b, void *p, DLDataType dtype, int64_t n);
void bench_results(bench *b, const void *p, DLDataType dtype, int64_t first, int64_t n,
                   double *out);

/* Like DATA_TENSOR, on the bench's device. */
#define BENCH_TENSOR(b, x, ...)                                                                    \
    do {                                                                                           \
        DATA_TENSOR((x), __VA_ARGS__);                                                             \
        (x)->t.device = (b)->device;                                                               \
    } while (0)

/* Sets num_sets and cached_bytes as the problem's data key asks. touched: bytes of a set that a
 * call reads or writes; held: bytes that it takes in memory, which limits the sets to 4 GB
 * together, 16 GB on a GPU. */
void bench_rotate(bench *b, double touched, double held);

/* The rows of an operator's table for the device, joined by '|'. */
void bench_rows_of(const bench *b, const char *op, char *rows, size_t bytes);

/* Dies unless |got - want| <= tolerance (NaN fails); where: "row 3, head 1". */
__attribute__((format(printf, 5, 6))) void bench_expect(const bench *b, double got, double want,
                                                        double tolerance, const char *where, ...);

static inline int64_t bench_int(const bench *b, problem_key key)
{
    return b->p->value[key].first;
}

/* Dies unless n elements are finite: a poisoned output that was not written all over. Looks at some
 * megabytes, here and there, of a larger one on a GPU. */
void bench_expect_finite(bench *b, const void *p, DLDataType dtype, int64_t n);

extern const bench_op bench_decode, bench_prefill, bench_mixed, bench_append, bench_gemm,
    bench_rmsnorm, bench_rope, bench_gated, bench_argmax, bench_sample, bench_renormalize,
    bench_top_k, bench_log_probs, bench_mask_logits, bench_verify;

#endif
