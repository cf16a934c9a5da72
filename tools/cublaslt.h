/* cublaslt.h - a dense product by NVIDIA's cuBLASLt, opened at run time, to measure a GPU with.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_CUBLASLT_H
#define QKV_TOOLS_CUBLASLT_H

#include <stdint.h>

#include "cuda.h"

typedef struct cublaslt cublaslt;

/* An n x n x n product of bf16 with f32 sums. NULL: there is no cuBLASLt ($QKV_CUBLASLT, the loader's or
 * a toolkit's), or it has no such product. */
cublaslt *cublaslt_open(cuda *c, int64_t n);
void cublaslt_close(cublaslt *l);

int cublaslt_num_ways(const cublaslt *l); /* that the library proposes, best first */

/* Enqueues out = a b^T one of those ways; all are [n, n]. 0: it does not work. */
int cublaslt_multiply(cublaslt *l, int way, void *out, const void *a, const void *b);

#endif
