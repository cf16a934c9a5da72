/* frameworks.h - what of the frameworks must be known beside their arrays: exchange tables of types, and the streams
 * that they work on.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_PYTHON_FRAMEWORKS_H
#define QKV_PYTHON_FRAMEWORKS_H

#include "tensors.h"

/* The table of an array's type, NULL for a type without one. */
const exchange_api *exchange_of(PyTypeObject *type);

/* sys.modules[name], a new reference; NULL without an exception where it is not imported. */
PyObject *imported(const char *name);

/* Is an object's type of this package: "torch", "numpy", "cupy", "jaxlib"? */
int comes_from(PyObject *object, const char *package);

/* The stream that a framework works on: that of the arrays where they are on the GPU, else (plans of
 * arrays on the host) of one that has used it; the legacy default stream for others. -1 with an exception. */
int framework_stream(const call *c, int32_t device_id, void **out);

/* Sets the stream of a call on a GPU. -1 with an exception. */
int find_stream(call *c, int32_t device_id);

/* 0: ready, -1 with an exception. */
int add_frameworks(void);

#endif
