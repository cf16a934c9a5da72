/* context.h - what a qkv_context holds; operators see it through core/launch.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_CORE_CONTEXT_H
#define QI_CORE_CONTEXT_H

#include "base/log.h"
#include "core/functions.h"
#include "device/cpu.h"
#include "device/cublaslt.h"
#include "device/cuda.h"
#include "jit/jit.h"

struct qkv_context {
    DLDevice device;
    int cpu_level;       /* index into QI_CPU_LEVELS */
    qi_threads *threads; /* with CUDA none but the caller's */
    qi_cuda_device cuda; /* with kDLCUDA */
    char cuda_level[QI_ARCH_BYTES];
    qi_functions functions; /* loaded onto the GPU */
    qi_cublaslt cublaslt;
    int batch_invariant; /* as the options say */
    qkv_allocator allocator;
    qi_logger logger;
    qi_jit jit;
    char device_name[64];
};

#endif
