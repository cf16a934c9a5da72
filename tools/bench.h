/* bench.h - one benchmark: inputs, a check against a reference in double, a timing, a share.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_BENCH_H
#define QKV_TOOLS_BENCH_H

#include <stdbool.h>

#include "ceilings.h"
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
} bench_op;

struct bench {
    const problem *p;
    qkv_context *ctx;
    data_random random;
    void *state;
    int64_t num_sets;    /* sets of inputs that calls rotate over */
    double cached_bytes; /* memory that calls stay within; 0: they rotate through DRAM */
    double bytes;        /* that a call must move */
    double flops;        /* that a call must do; 0: nothing that a multiply-add ceiling binds */
    bool copies;         /* bytes are read and written: CEILING_COPY binds, else CEILING_READ */
    bool bf16;           /* flops are products of bf16 by bf16: CEILING_DOT counts too */
    char row[64];        /* of the kernel table */
    void *blocks[16];    /* of bench_alloc */
    int num_blocks;
};

/* Options of the command line. */
typedef struct bench_options {
    double seconds;
    bool json;
    int32_t num_threads; /* 0 = all */
} bench_options;

/* What --file's problems share. */
typedef struct bench_session bench_session;
bench_session *bench_open(const bench_options *options);
void bench_close(bench_session *s);

/* Verifies, times, prints one line. */
void bench_problem(bench_session *s, const problem *p);

/* ---- for drivers --------------------------------------------------------------------------- */

/* Zeroed memory, freed after teardown. */
void *bench_alloc(bench *b, double count, size_t size);

/* Sets num_sets and cached_bytes as the problem's data key asks. touched: bytes of a set that a
 * call reads or writes; held: bytes that it takes in memory, which limits the sets to 4 GB
 * together. */
void bench_rotate(bench *b, double touched, double held);

/* row = the rows of an operator's table, joined by '|'. */
void bench_rows_of(bench *b, const char *op);

/* Dies unless |got - want| <= tolerance (NaN fails); where: "row 3, head 1". */
__attribute__((format(printf, 5, 6))) void bench_expect(const bench *b, double got, double want,
                                                        double tolerance, const char *where, ...);

static inline int64_t bench_int(const bench *b, problem_key key)
{
    return b->p->value[key].first;
}

/* Dies unless n elements are finite: a poisoned output that was not written all over. */
void bench_expect_finite(const bench *b, const void *p, DLDataType dtype, int64_t n);

extern const bench_op bench_decode, bench_prefill, bench_mixed, bench_append, bench_gemm,
    bench_rmsnorm, bench_rope, bench_gated, bench_argmax, bench_sample;

#endif
