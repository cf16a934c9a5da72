/* info.h - qkv info: what this build and this machine have, and which kernels take a problem.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_INFO_H
#define QKV_TOOLS_INFO_H

#include <stdbool.h>

#include "problem.h"

typedef struct info_options {
    int32_t num_threads; /* 0 = all */
    DLDevice device;
    bool ceilings;    /* measure them, some seconds */
    const problem *p; /* attention, or NULL */
} info_options;

void info_print(const info_options *options);

#endif
