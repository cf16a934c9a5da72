/* tensor_map.h - what the copy engine of sm_90 and later knows of a tensor: encoded by the driver, opaque.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_TENSOR_MAP_H
#define QI_KERN_TENSOR_MAP_H

#include "kern/abi.h"

typedef struct __attribute__((aligned(64))) qi_tensor_map {
    u64 words[16];
} qi_tensor_map;

#endif
