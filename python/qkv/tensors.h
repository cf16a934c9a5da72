/* tensors.h - arrays of any framework as DLTensors, for the length of one call.
 *
 *   call c;
 *   tensor slots[3];
 *   begin_call(&c, slots, 3, ctx, stream);
 *   tensor *x = array(&c, values[X], "x"), *weight = array(&c, values[WEIGHT], "weight");
 *   tensor *out = output_like(&c, values[OUT], "out", x);
 *   if (ready(&c)) RUN(&c, qkv_rmsnorm(c.ctx, dl(out), dl(x), dl(weight), eps, bias, c.stream));
 *   return end_call(&c, out);
 *
 * A failure is remembered in the call: functions after it do nothing, so that one check is enough.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_PYTHON_TENSORS_H
#define QKV_PYTHON_TENSORS_H

#include "dlpack_abi.h"
#include "native.h"

#define MAX_DIMS 8 /* of arrays made here */

typedef struct tensor {
    DLTensor dl;
    PyObject *object; /* borrowed from the caller; made here: owned by owner */
    PyObject *owner;  /* what else must live as long as dl: a capsule, a list's elements, or NULL */
    managed_tensor *lent;    /* the same, from an exchange table */
    int adopted;             /* owner becomes an array only when it has been filled */
    int64_t shape[MAX_DIMS]; /* of a list, or of an array made here */
} tensor;

typedef struct call {
    int failed; /* a Python exception is set */
    int num_tensors, capacity;
    tensor *tensors;
    PyObject *like;          /* the first array that was read: its framework makes outputs */
    const exchange_api *api; /* of like, or NULL */
    DLDevice device;         /* of like */
    PyObject *ctx_object, *stream_object; /* as given */
    qkv_context *ctx;                     /* set by ready() */
    void *stream;                         /* set with the first array on a GPU, or by ready() */
    int has_stream;
} call;

void begin_call(call *c, tensor *tensors, int capacity, PyObject *ctx, PyObject *stream);

/* An array that must be given. */
tensor *array(call *c, PyObject *value, const char *name);

/* One that need not be: NULL if absent. */
tensor *optional_array(call *c, PyObject *value, const char *name);

/* The same, where nested sequences of Python numbers are welcome too: they become an array of this dtype
 * on the host. An array is taken as it is. */
tensor *array_or_list(call *c, PyObject *value, const char *name, DLDataType dtype);
tensor *optional_array_or_list(call *c, PyObject *value, const char *name, DLDataType dtype);

/* Values, one or some: array_or_list, and an array without axes is one of [1]. */
tensor *value_array(call *c, PyObject *value, const char *name, DLDataType dtype);

/* The same where a number serves too, as [1] on the host, and i64 for u64, bit by bit, since frameworks know
 * few operations on u64. NULL if absent. */
tensor *number_or_array(call *c, PyObject *value, const char *name, DLDataType dtype);

/* The same of arrays that are written to: read-only ones are refused. */
tensor *written_array(call *c, PyObject *value, const char *name);
tensor *optional_written_array(call *c, PyObject *value, const char *name);

/* An output: value if given, else a new array of the call's framework and device. */
tensor *output(call *c, PyObject *value, const char *name, DLDataType dtype, int ndim,
               const int64_t *shape);
tensor *output_like(call *c, PyObject *value, const char *name, const tensor *like);

/* An output that is made only if wanted: NULL if absent or False, made if True, else the array given. */
tensor *wanted_output(call *c, PyObject *value, const char *name, DLDataType dtype, int ndim,
                      const int64_t *shape);

/* The tensor as the library takes it. */
static inline DLTensor *dl(tensor *t)
{
    return t ? &t->dl : NULL;
}

/* Finds context and stream. 1 if the library can be called; 0 if something failed. */
int ready(call *c);

/* The same with the context of an object. */
int ready_on(call *c, qkv_context *ctx, DLDevice device);

/* Calls the library without the interpreter's lock. */
#define RUN(c, expression)                                                                         \
    do {                                                                                           \
        qkv_status status_;                                                                        \
        UNLOCKED(status_ = (expression));                                                          \
        if (status_) (c)->failed = 1, raise_status(status_);                                       \
    } while (0)

/* Releases what was read. Returns the array behind result (NULL: None) as a new reference, or NULL if the
 * call failed. */
PyObject *end_call(call *c, tensor *result);

/* The same with a tuple of results. */
PyObject *end_call_tuple(call *c, int num, tensor *const *results);

/* The first, or both if the second was wanted. */
PyObject *end_call_wanted(call *c, tensor *result, tensor *wanted);

/* Adds what must live as long as the memory of t to a list; nothing if t is NULL. */
int keep_alive(PyObject *list, tensor *t);

/* Does the object look like an array (has it __dlpack__)? */
int is_array(PyObject *value);

#endif
