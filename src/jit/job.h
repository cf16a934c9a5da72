/* job.h - what a kernel is compiled from, beside the bundled sources.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_JIT_JOB_H
#define QI_JIT_JOB_H

#include <stddef.h>

#include <dlpack/dlpack.h>

typedef struct qi_jit_job {
    const char *what;    /* "variant alibi": for messages */
    DLDeviceType device; /* kDLCPU: the C compiler; kDLCUDA: NVRTC */
    const char *level;   /* ISA level; of a GPU "sm_90a" (machine code) or "compute_90" (PTX) */
    const char *defines; /* #define lines that stand before the main file */
    const char *header;  /* text of "qi_variant.h" */
    const char *main;    /* path of the bundled file to compile */
} qi_jit_job;

/* The first lines of a compiler's words that speak of errors, else the first at all. */
void qi_first_lines(const char *log, char *out, size_t bytes);

#endif
