/* jit.h - compiled kernels: loaded ones, those of the disk cache, and new ones.
 *
 * A kernel's key is a hash of everything that goes into it: sources, text, defines, level, flags,
 * and the compiler. Loaded kernels are kept for the life of the process and shared by all contexts;
 * a key is compiled by one thread, others wait for it, and where they share a cache so do other processes.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_JIT_JIT_H
#define QI_JIT_JIT_H

#include "base/log.h"
#include "jit/cc.h"
#include "jit/nvrtc.h"
#include "qkv/context.h"

/* What a context's options say. Paths are resolved once. */
typedef struct qi_jit {
    int32_t policy;
    char cache_dir[QI_PATH_MAX]; /* empty: none */
    qi_cc cc;                    /* for the CPU */
    const qi_nvrtc *nvrtc;       /* for CUDA; NULL: none */
    qkv_jit_progress_fn progress;
    void *user;
} qi_jit;

/* cuda_driver: the version that a GPU's driver is for, 0 for the CPU and where there is none. */
qkv_status qi_jit_open(const qkv_context_options *options, int cuda_driver, qi_jit *out);

/* "nvrtc 13.0"; "" for none. */
const char *qi_jit_compiler(const qi_jit *jit, DLDeviceType device);

/* The function `symbol` of the kernel that the job describes. COMPILE: the policy forbids it, there is
 * no compiler, it failed, or its output cannot be loaded. With QKV_JIT_FILL the kernel is in the cache, and
 * functions are NULL. */
qkv_status qi_jit_get(const qi_jit *jit, const qi_logger *logger, const qi_jit_job *job,
                      const char *const *symbols, int num_symbols, void **functions);

#endif
