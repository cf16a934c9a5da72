/* ceilings.h - what this machine can do at most, measured here and now on as many threads as the
 * context has: the numbers that every bench result is a share of.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_CEILINGS_H
#define QKV_TOOLS_CEILINGS_H

#include "qkv/context.h"

typedef enum ceiling {
    CEILING_READ,  /* GB/s: linear reads */
    CEILING_COPY,  /* GB/s, read + written: the faster of plain and streaming stores */
    CEILING_WRITE, /* GB/s: linear writes; of GPUs only */
    CEILING_FMA,   /* GFLOP/s: f32 fused multiply-adds on registers */
    CEILING_DOT,   /* GFLOP/s: bf16 products with f32 sums (AVX-512-BF16, AMX, tensor cores) */
    NUM_CEILINGS
} ceiling;

typedef struct ceiling_value {
    double rate;   /* 0: the level has no such instruction (CEILING_DOT) */
    char name[24]; /* "dram_read", "cache_copy", "fma_avx512", ... */
} ceiling_value;

typedef struct ceilings ceilings;

/* On ctx's threads, with the instructions of its level. seconds: how long calls are timed for;
 * short ones get few passes. Takes memory of the size that bench inputs rotate over (see
 * data.h). */
ceilings *ceilings_create(const qkv_context *ctx, double seconds);
void ceilings_destroy(ceilings *c);

/* At most some tenths of a second. cached_bytes: memory that reads and copies stay within; 0: they
 * walk through more than the last-level cache holds. */
ceiling_value ceilings_measure(ceilings *c, ceiling which, double cached_bytes);

#endif
