/* compile.h - qkv compile: fills a cache with the GPU kernels that problems need, without a GPU.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_COMPILE_H
#define QKV_TOOLS_COMPILE_H

#include "problem.h"

/* archs: "sm_80,sm_90a"; cache: a folder, NULL: the library's own. A line an architecture. */
void compile_problems(const problem *problems, int n, const char *archs, const char *cache);

#endif
