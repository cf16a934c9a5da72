/* ceilings.h - what this machine can do at most, measured here and now on as many threads as the
 * context has: the numbers that every bench result is a share of.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_CEILINGS_H
#define QKV_TOOLS_CEILINGS_H

#include "qkv/base.h"

typedef enum ceiling {
    CEILING_READ, /* GB/s: linear reads of more memory than the last-level cache holds            */
    CEILING_COPY, /* GB/s, read + written: the faster of plain and streaming stores               */
    CEILING_FMA,  /* GFLOP/s: f32 fused multiply-adds on registers                                */
    CEILING_DOT,  /* GFLOP/s: bf16 dot products with f32 sums (AVX-512-BF16)                      */
    NUM_CEILINGS
} ceiling;

typedef struct ceiling_value {
    double median, best; /* over the passes; 0 = this machine cannot (CEILING_DOT), or not measured */
    const char *name;    /* "dram_read", "fma_avx512", ... */
} ceiling_value;

typedef struct ceilings ceilings;

/* isa: the level whose instructions count; NULL = all that this machine can run. Takes memory of the
 * size that bench inputs rotate over (see data.h). */
ceilings *ceilings_create(int32_t num_threads, const char *isa);
void ceilings_destroy(ceilings *c);

/* Some tenths of a second. */
ceiling_value ceilings_measure(ceilings *c, ceiling which);

#endif
