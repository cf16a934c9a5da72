/* native.h - what the files of the extension share: errors, and the parts of a module.
 *
 * Everything is on the limited API of CPython 3.10. State is global, not per module: contexts own threads
 * and memory of the process, so the module refuses a second interpreter (_native.c). Objects made once at
 * import are never freed.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_PYTHON_NATIVE_H
#define QKV_PYTHON_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "qkv/qkv.h"

/* Runs statements without the interpreter's lock. */
#define UNLOCKED(...)                                                                              \
    do {                                                                                           \
        PyThreadState *state_ = PyEval_SaveThread();                                               \
        __VA_ARGS__;                                                                               \
        PyEval_RestoreThread(state_);                                                              \
    } while (0)

/* Sets the exception of a failed call, with the library's message of this thread. Returns NULL. */
PyObject *raise_status(qkv_status status);

/* The same exceptions for what is found wrong here: the text is "<argument>: expected ...". */
PyObject *raise_error(qkv_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Is the exception at hand a qkv.Error, which names its argument already? */
int is_own_error(void);

/* Each adds its part to the module; -1 with an exception on failure. */
int add_errors(PyObject *module);
int add_tensors(PyObject *module);
int add_context(PyObject *module);
int add_functions(PyObject *module);
int add_sampling(PyObject *module);
int add_logits_pipe(PyObject *module);
int add_attention(PyObject *module);

/* The release of an object of a heap type: its memory, then its type. */
void free_object(PyObject *object);

/* Functions whose arguments are read by their text signatures (arguments.h), one for each: reads these, and
 * adds the functions to the module. */
#define METHOD(name, function)                                                                     \
    {                                                                                              \
        name, (PyCFunction)(void (*)(void))function, METH_FASTCALL | METH_KEYWORDS, NULL           \
    }
struct signature;
int read_methods(PyMethodDef *methods, struct signature *const *signatures);
int add_methods(PyObject *module, PyMethodDef *methods, struct signature *const *signatures);

#endif
