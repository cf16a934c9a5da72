/* sampling_arguments.h - what the operators over rows of logits and the pipe read alike.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_PYTHON_SAMPLING_ARGUMENTS_H
#define QKV_PYTHON_SAMPLING_ARGUMENTS_H

#include "arguments.h"
#include "tensors.h"

/* The size of an axis, 0 of one that a tensor has not: the library says what it expected. */
static inline int64_t size_of(const tensor *t, int axis)
{
    return t && axis < t->dl.ndim ? t->dl.shape[axis] : 0;
}

/* valid=: True or an array of bool or u8 [batch], which the library takes as u8; NULL if not wanted. */
tensor *valid_output(call *c, PyObject *value, int64_t batch);

#endif
