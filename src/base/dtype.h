/* dtype.h - lookups and scalar conversions over the table in dtype.def.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_BASE_DTYPE_H
#define QI_BASE_DTYPE_H

#include "kern/abi.h"
#include "qkv/base.h"

/* The enum of a DLPack dtype, or -1 for one that is not in the table (lanes must be 1). */
int qi_dtype_of(DLDataType dtype);

/* "bf16"; "?" for one that is not in the table. */
const char *qi_dtype_name(DLDataType dtype);

size_t qi_dtype_bytes(qi_dtype dtype);

/* Is it one of the three that activations, weights and caches come in today? */
static inline int qi_is_float(DLDataType dtype)
{
    const int t = qi_dtype_of(dtype);
    return t == QI_F32 || t == QI_F16 || t == QI_BF16;
}

#endif
