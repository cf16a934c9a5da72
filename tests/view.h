/* view.h - strided tensors in a block whose every other byte is a guard.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_VIEW_H
#define QKV_TESTS_VIEW_H

#include "support.h"

enum { VIEW_POISON = 0xff }; /* NaN in each float type */

typedef struct view {
    DLTensor t;
    int64_t shape[5], strides[5];
    unsigned char *block;
    size_t bytes;
} view;

static const DLDataType float_dtypes[] = {{2, 32, 1}, {2, 16, 1}, {4, 16, 1}};

/* A poisoned tensor. pad > 0: up to that many elements between the indices of each outer axis, and
 * before and after it all. */
static inline void view_new(view *v, DLDataType dtype, int64_t pad, int ndim, const int64_t *shape)
{
    memset(v, 0, sizeof *v);
    int64_t span = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        v->shape[i] = shape[i];
        v->strides[i] = span;
        span *= shape[i] > 0 ? shape[i] : 1;
        if (pad) span += test_below(pad + 1);
    }
    const int64_t offset = pad ? 1 + test_below(16) : 0;
    v->bytes = (size_t)(offset + span + 16) * test_bytes(dtype);
    v->block = aligned_alloc(64, (v->bytes + 63) / 64 * 64); /* without a pad the same everywhere */
    assert_non_null(v->block);
    memset(v->block, VIEW_POISON, v->bytes);
    v->t = (DLTensor){.data = v->block,
                      .device = test_device(),
                      .ndim = ndim,
                      .dtype = dtype,
                      .shape = v->shape,
                      .strides = v->strides,
                      .byte_offset = (uint64_t)offset * test_bytes(dtype)};
}

static inline void view_free(view *v)
{
    free(v->block);
}

static inline int64_t view_numel(const view *v)
{
    int64_t n = 1;
    for (int i = 0; i < v->t.ndim; i++) n *= v->shape[i];
    return n;
}

/* Element i in row-major order, as an index into the block. */
static inline int64_t view_index(const view *v, int64_t i)
{
    uint64_t rest = (uint64_t)i, at = v->t.byte_offset / test_bytes(v->t.dtype);
    for (int axis = v->t.ndim - 1; axis > 0; axis--) {
        const uint64_t n = (uint64_t)v->shape[axis], outer = rest / n;
        at += (rest - outer * n) * (uint64_t)v->strides[axis];
        rest = outer;
    }
    return (int64_t)(at + rest * (uint64_t)v->strides[0]);
}

static inline double view_get(const view *v, int64_t i)
{
    return test_get(v->block, v->t.dtype, view_index(v, i));
}

static inline void view_put(view *v, int64_t i, double value)
{
    test_put(v->block, v->t.dtype, view_index(v, i), value);
}

/* Random values in [-scale, scale). */
static inline void view_fill(view *v, double scale)
{
    for (int64_t i = 0, n = view_numel(v); i < n; i++) view_put(v, i, test_uniform(scale));
}

/* A copy of every element as doubles. */
static inline double *view_values(const view *v)
{
    const int64_t n = view_numel(v);
    double *values = malloc((size_t)(n + 1) * sizeof *values);
    assert_non_null(values);
    for (int64_t i = 0; i < n; i++) values[i] = view_get(v, i);
    return values;
}

/* What is left of a value stored as this dtype. */
static inline double view_rounded(DLDataType dtype, double value)
{
    float storage;
    test_put(&storage, dtype, 0, value);
    return test_get(&storage, dtype, 0);
}

/* Nothing but the tensor's elements has been written. Poisons them too. */
static inline void view_check_guards(view *v)
{
    const int last = v->t.ndim - 1;
    const int64_t row = last >= 0 && v->strides[last] == 1 ? v->shape[last] : 1; /* neighbours */
    const size_t size = test_bytes(v->t.dtype);
    for (int64_t i = 0, n = view_numel(v); i < n; i += row)
        memset(v->block + (size_t)view_index(v, i) * size, VIEW_POISON, (size_t)row * size);
    if (v->block[0] == VIEW_POISON && memcmp(v->block, v->block + 1, v->bytes - 1) == 0) return;
    for (size_t i = 0; i < v->bytes; i++)
        if (v->block[i] != VIEW_POISON) fail_msg("byte %zu outside of the tensor was written", i);
}

#endif
