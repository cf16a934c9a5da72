/* view.h - tensors over memory that is there already.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_VIEW_H
#define GENERATE_VIEW_H

#include <string.h>

#include "qkv/base.h"

/* A DLTensor with its shape and strides. `tensor` points into the struct itself: fill it in place
 * and do not copy it. */
typedef struct view {
    DLTensor tensor;
    int64_t shape[4], strides[4];
} view;

static inline DLTensor *view_of(view *v, DLDevice where, const void *data, DLDataType dtype,
                                int32_t ndim, const int64_t *shape, const int64_t *strides)
{
    *v = (view){.tensor = {.data = (void *)(uintptr_t)data,
                           .device = where,
                           .ndim = ndim,
                           .dtype = dtype,
                           .shape = v->shape,
                           .strides = v->strides}};
    memcpy(v->shape, shape, (size_t)ndim * sizeof *shape);
    memcpy(v->strides, strides, (size_t)ndim * sizeof *strides);
    return &v->tensor;
}

static inline DLTensor *vector(view *v, DLDevice where, const void *data, DLDataType dtype,
                               int64_t n)
{
    return view_of(v, where, data, dtype, 1, (int64_t[]){n}, (int64_t[]){1});
}

/* [rows, cols], rows stride elements apart. */
static inline DLTensor *matrix(view *v, DLDevice where, const void *data, DLDataType dtype,
                               int64_t rows, int64_t cols, int64_t stride)
{
    return view_of(v, where, data, dtype, 2, (int64_t[]){rows, cols}, (int64_t[]){stride, 1});
}

/* [rows, heads, head_dim], rows stride elements apart. */
static inline DLTensor *heads_of(view *v, DLDevice where, const void *data, DLDataType dtype,
                                 int64_t rows, int64_t heads, int64_t head_dim, int64_t stride)
{
    return view_of(v, where, data, dtype, 3, (int64_t[]){rows, heads, head_dim},
                   (int64_t[]){stride, head_dim, 1});
}

#endif
