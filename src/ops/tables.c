/* tables.c - the list of kernel tables, for qkv_enumerate_kernels and for tests that walk every
 * row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/launch.h"

/* op, its table */
#define TABLES(X)                                                                                  \
    X(attention)                                                                                   \
    X(attention_plan)                                                                              \
    X(merge)                                                                                       \
    X(gemm)                                                                                        \
    X(gemm_quantized)                                                                              \
    X(rmsnorm)                                                                                     \
    X(rope) X(gated) X(append) X(copy_pages) X(argmax) X(sampling) X(top_k) X(log_probs) X(verify)

#define X(op) extern const qi_kernel qi_##op##_kernels[];
TABLES(X)
#undef X

static const struct {
    const char *op;
    const qi_kernel *table;
} tables[] = {
#define X(op) {#op, qi_##op##_kernels},
    TABLES(X)
#undef X
};

const qi_kernel *qi_kernel_row(int i, const char **op)
{
    for (size_t t = 0; t < sizeof tables / sizeof tables[0]; t++)
        for (const qi_kernel *k = tables[t].table; k->name; k++)
            if (i-- == 0) {
                *op = tables[t].op;
                return k;
            }
    return NULL;
}

void qkv_enumerate_kernels(void (*visit)(void *user, const qkv_kernel_info *info), void *user)
{
    const char *op;
    const qi_kernel *k;
    for (int i = 0; visit && (k = qi_kernel_row(i, &op)); i++)
        visit(user, &(qkv_kernel_info){.struct_size = sizeof(qkv_kernel_info),
                                       .device_type = k->device,
                                       .op = op,
                                       .row = k->name});
}
