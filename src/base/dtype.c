/* dtype.c - the table of dtypes, generated from dtype.def.
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/dtype.h"

static const struct {
    const char *name;
    DLDataType dl;
} dtypes[QI_NUM_DTYPES] = {
#define QI_DTYPE(name, id, bits, code) [id] = {#name, {code, bits, 1}},
#include "base/dtype.def"
#undef QI_DTYPE
};

int qi_dtype_of(DLDataType dtype)
{
    for (int i = 0; i < QI_NUM_DTYPES; i++)
        if (dtypes[i].dl.code == dtype.code && dtypes[i].dl.bits == dtype.bits && dtype.lanes == 1)
            return i;
    return -1;
}

const char *qi_dtype_name(DLDataType dtype)
{
    const int t = qi_dtype_of(dtype);
    return t < 0 ? "?" : dtypes[t].name;
}

size_t qi_dtype_bytes(qi_dtype dtype)
{
    return dtypes[dtype].dl.bits / 8u;
}
