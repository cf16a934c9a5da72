/* ceilings_gpu.h - what a GPU can do at most, measured here and now; see ceilings.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_CEILINGS_GPU_H
#define QKV_TOOLS_CEILINGS_GPU_H

#include "ceilings.h"
#include "cuda.h"

typedef struct ceilings_gpu ceilings_gpu;

ceilings_gpu *ceilings_gpu_create(cuda *c);
void ceilings_gpu_destroy(ceilings_gpu *c);

/* Measured once, some milliseconds: CEILING_READ, CEILING_COPY and CEILING_WRITE of more memory than the
 * L2 holds; CEILING_DOT by the best of cuBLASLt's products or, without cuBLASLt, by mma.sync on registers.
 * cached_bytes: memory that reads and copies stay within, measured each time; 0: more than the L2 holds.
 * Rate 0: cannot be measured. */
ceiling_value ceilings_gpu_measure(ceilings_gpu *c, ceiling which, double cached_bytes);

#endif
