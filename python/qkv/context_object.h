/* context_object.h - qkv.Context, and the default context of each device.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_PYTHON_CONTEXT_OBJECT_H
#define QKV_PYTHON_CONTEXT_OBJECT_H

#include "native.h"

typedef struct context_object {
    PyObject_HEAD qkv_context *ctx;
    DLDevice device;
} context_object;

/* The default context of a device: a borrowed reference that stays. NULL with an exception. */
context_object *default_context(DLDevice device);

/* An argument ctx=: a borrowed reference; NULL with an exception if it is not a Context. */
context_object *as_context(PyObject *value);

/* "cuda:1" or an object that reads so (torch.device). -1 with an exception. */
int read_device(PyObject *value, DLDevice *out);

#endif
