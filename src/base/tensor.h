/* tensor.h - checks and address arithmetic over DLTensor.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_BASE_TENSOR_H
#define QI_BASE_TENSOR_H

#include "base/dtype.h"
#include "base/status.h"

#define QI_ANY ((int64_t)-1) /* matches every size, in a QI_SHAPE */
#define QI_SHAPE(...)                                                                              \
    (int)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (const int64_t[])             \
    {                                                                                              \
        __VA_ARGS__                                                                                \
    }

/* The device that tensors of this thread are expected on from here on. */
void qi_tensors_on(DLDevice device);

/* May the host read the elements of tensors there? On a GPU, whose work is only enqueued, values are not
 * checked; its kernels leave out what would fall outside of a tensor. */
int qi_host_reads(void);

/*
 * Requires a tensor of this dtype and shape on the device at hand, with data unless it is empty, a sane size and
 * strides (not negative, within 59 bits) and a contiguous last axis. The message names it.
 *   qi_expect(out, "out", QKV_BF16, QI_SHAPE(num_tokens, QI_ANY))
 */
qkv_status qi_expect(const DLTensor *t, const char *name, DLDataType dtype, int ndim,
                     const int64_t *shape);

/* The same for a tensor whose last axis may have any stride too. */
qkv_status qi_expect_strided(const DLTensor *t, const char *name, DLDataType dtype, int ndim,
                             const int64_t *shape);

/* The same as qi_expect for a tensor of f32, f16 or bf16. */
qkv_status qi_expect_float(const DLTensor *t, const char *name, int ndim, const int64_t *shape);

/* For an output that passed one of the above: requires that no two of its elements share memory.
 * Refuses strides that interleave axes without a clash, which no framework makes. */
qkv_status qi_expect_distinct(const DLTensor *t, const char *name);

/* The address of element 0. */
static inline void *qi_data(const DLTensor *t)
{
    return t->data ? (char *)t->data + t->byte_offset : NULL;
}

/* The same of a tensor that need not be given. */
static inline void *qi_optional_data(const DLTensor *t)
{
    return t ? qi_data(t) : NULL;
}

/* Elements from one index of the axis to the next. */
int64_t qi_stride(const DLTensor *t, int axis);

int64_t qi_numel(const DLTensor *t);

/* May two tensors share an element? Exact for parts of one wider tensor (column slices, heads of a
 * fused q, k, v); where neither order nor a common pitch keeps them apart, the answer is yes. */
int qi_overlap(const DLTensor *a, const DLTensor *b);

/* The same memory in the same places: same data, dtype, shape and strides. */
int qi_same(const DLTensor *a, const DLTensor *b);

#endif
