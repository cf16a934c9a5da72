/* arguments.h - how calls from Python are read: names, scalars, dtypes.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_PYTHON_ARGUMENTS_H
#define QKV_PYTHON_ARGUMENTS_H

#include "native.h"

#define MAX_ARGUMENTS 48

/* The parameters of a function, read at import from the text that help() shows:
 *   "rmsnorm(x, weight, eps=1e-6, *, out=None)\n--\n\n..."
 * Their order there is the order of the values that read_call hands out. */
typedef struct signature {
    const char *text;
    const char *function; /* for messages; filled in, as the rest */
    int num_names, num_positional;
    PyObject *names[MAX_ARGUMENTS]; /* interned */
    char required[MAX_ARGUMENTS];
} signature;

int read_signature(signature *s);

/* The parameters in C of a function that METHOD lists, and what the texts of most say. */
#define ARGUMENTS PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames
#define COMMON                                                                                     \
    "ctx: a qkv.Context, None = the default one of the arrays' device. stream: the handle of a "   \
    "CUDA "                                                                                        \
    "stream,\n"                                                                                    \
    "None = the current one of the arrays' framework. "

/* Sorts the arguments of a METH_FASTCALL | METH_KEYWORDS call into values[num_names]; those not given are
 * NULL. References are borrowed. -1 with TypeError. */
int read_call(const signature *s, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames,
              PyObject **values);

/* The same for a tuple and a dict, which may be NULL. */
int read_call_dict(const signature *s, PyObject *args, PyObject *kwargs, PyObject **values);

/* Is an argument absent, or None? */
static inline int absent(const PyObject *value)
{
    return !value || value == Py_None;
}

/* Scalars. An absent one leaves *out as it is. -1 with an exception that names the argument. */
int read_i32(PyObject *value, const char *name, int32_t *out);
int read_i64(PyObject *value, const char *name, int64_t *out);
int read_u64(PyObject *value, const char *name, uint64_t *out); /* of any integer, modulo 2^64 */
int read_f32(PyObject *value, const char *name, float *out);
int read_flag(PyObject *value, const char *name, int32_t *out);

/* One of some words, as its index: read_word(v, "mask", &i, "none", "causal", NULL). */
int read_word(PyObject *value, const char *name, int32_t *out, ...);

/* A UTF-8 text, NULL if absent. Lives as long as *keep, a new reference that the caller drops. */
int read_text(PyObject *value, const char *name, const char **out, PyObject **keep);

/* A dtype: "bf16", or a framework's own (torch.bfloat16, numpy.float32, numpy.dtype("float32")). */
int read_dtype(PyObject *value, const char *name, DLDataType *out);

/* "bfloat16": what frameworks call a dtype; NULL for one that the library does not have. */
const char *dtype_name(DLDataType dtype);

/* rotary_dim to old_context of qkv.Rope, in its order; "rope." comes before their names in messages, or not. */
int read_rope_fields(PyObject *const *values, int of_rope, qkv_rope_spec *out);

/* A qkv.Rope. An absent one leaves *out as it is and *given 0. */
int read_rope(PyObject *value, const char *name, qkv_rope_spec *out, int *given);

#endif
