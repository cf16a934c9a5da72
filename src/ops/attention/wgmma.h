/* wgmma.h - the host side of attention_wgmma.cu: attention on Hopper.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_WGMMA_H
#define QI_ATTENTION_WGMMA_H

#include "ops/attention/attention.h"

/* Why the kernel does not take what a was asked for; NULL: it does. a->wgmma says how it is compiled then. */
const char *qi_attention_reject_wgmma(const qkv_attention *a);

/* Shapes of the kernel's tiles for a's spec and limits. */
void qi_attention_wgmma_configure(qkv_attention *a);

enum { QI_WGMMA_CONSTANTS = QI_SPEC_CONSTANTS + 8 };
#define QI_WGMMA_CONSTANT_NAMES                                                                    \
    QI_SPEC_CONSTANT_NAMES "KEYS COLUMNS PIECE WARPGROUPS STAGES BUFFERS THREADS FP8"
void qi_attention_wgmma_constants(const qkv_attention *a, i32 out[QI_WGMMA_CONSTANTS]);

/* Enqueues the launch. */
qkv_status qi_attention_wgmma_run(const qkv_attention *a, const attention_cuda_params *c,
                                  void *stream);

#endif
