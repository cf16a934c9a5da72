/* tables.c - the list of kernel tables, for qkv_enumerate_kernels and for tests that walk every
 * row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/launch.h"

/* op, its table */
#define TABLES(X)                                                                                  \
    X(attention)                                                                                   \
    X(merge)                                                                                       \
    X(gemm)                                                                                        \
    X(gemm_quantized) X(rmsnorm) X(rope) X(gated) X(append) X(copy_pages) X(argmax) X(sample)

#define X(op) extern const qi_kernel qi_##op##_kernels[];
TABLES(X)
#undef X

void qkv_enumerate_kernels(void (*visit)(void *user, const qkv_kernel_info *info), void *user)
{
    static const struct {
        const char *op;
        const qi_kernel *table;
    } tables[] = {
#define X(op) {#op, qi_##op##_kernels},
        TABLES(X)
#undef X
    };
    if (!visit) return;
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++)
        for (const qi_kernel *k = tables[i].table; k->name; k++)
            visit(user, &(qkv_kernel_info){.struct_size = sizeof(qkv_kernel_info),
                                           .device_type = k->device,
                                           .op = tables[i].op,
                                           .row = k->name});
}
