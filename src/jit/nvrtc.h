/* nvrtc.h - NVIDIA's run-time compiler: finding the library, and running it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_JIT_NVRTC_H
#define QI_JIT_NVRTC_H

#include <stddef.h>

#include "base/status.h"
#include "jit/job.h"

typedef struct qi_nvrtc qi_nvrtc;

/* The NVRTC to use with a driver (1000 major + 10 minor, 0 = none at hand), NULL if there is none of
 * 12.8 or newer: $QKV_NVRTC, or of the driver's major version before others, where the loader, a toolkit
 * or a Python environment has it. Opened once a process; the caller does not free it. */
const qi_nvrtc *qi_nvrtc_find(int driver);

/* "nvrtc 13.0", "" for NULL: another compiler, another string. */
const char *qi_nvrtc_identity(const qi_nvrtc *nvrtc);

/* What to compile for a device of this compute capability: "sm_90a", or where NVRTC does not know it (or
 * is newer than the driver) "compute_90", the newest virtual architecture below it. */
enum { QI_ARCH_BYTES = 24 };
void qi_nvrtc_level(const qi_nvrtc *nvrtc, int major, int minor, char level[QI_ARCH_BYTES]);

/* Compiles into *image, malloc'ed: a cubin, or PTX with a zero at its end. *log, if wanted, is what
 * ptxas says of registers and spills, malloc'ed. COMPILE: no NVRTC, or its first lines. */
qkv_status qi_nvrtc_compile(const qi_nvrtc *nvrtc, const qi_jit_job *job, void **image,
                            size_t *bytes, char **log);

/* The options that every kernel is compiled with. */
#define QI_NVRTC_FLAGS                                                                             \
    "--std=c++20 --device-as-default-execution-space --extra-device-vectorization"

#endif
