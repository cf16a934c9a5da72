/* bench_host.h - qkv bench host: what the library costs beside its kernels.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_BENCH_HOST_H
#define QKV_TOOLS_BENCH_HOST_H

#include "bench.h"

/* Opening, compiling, loading, planning and calling, as a table or an object. Without a GPU, kernels are
 * compiled for arch, which may be NULL, and what a GPU is needed for is left out. */
void bench_host(const bench_options *options, const char *arch);

#endif
