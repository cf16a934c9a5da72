/* _native.c - the module qkv._native: versions, exceptions, and the parts of the other files.
 * SPDX-License-Identifier: Apache-2.0 */
#include "native.h"

#include "arguments.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

/* ---- errors --------------------------------------------------------------------------------------- */

enum { NUM_STATUS = QKV_ERR_INTERNAL + 1 };
static PyObject *errors[NUM_STATUS]; /* by status; [0] is qkv.Error itself */

static PyObject *exception_of(qkv_status status)
{
    return errors[(int)status > 0 && (int)status < NUM_STATUS ? (int)status : 0];
}

PyObject *raise_status(qkv_status status)
{
    PyErr_Format(exception_of(status), "%s", qkv_last_error()); /* may be cut within a character */
    return NULL;
}

PyObject *raise_error(qkv_status status, const char *format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    PyErr_Format(exception_of(status), "%s", text);
    return NULL;
}

int is_own_error(void)
{
    return PyErr_ExceptionMatches(errors[0]);
}

int add_errors(PyObject *module)
{
    const struct {
        const char *name, *doc;
        PyObject *also;
    } kinds[NUM_STATUS] = {
        {"qkv.Error", "A call of the library failed; status says how, the text which argument.",
         PyExc_Exception},
        {"qkv.InvalidError", "An argument breaks the documented contract.", PyExc_ValueError},
        {"qkv.UnsupportedError", "A valid request that no kernel here accepts.",
         PyExc_NotImplementedError},
        {"qkv.OutOfMemoryError", "An allocation failed, or a workspace is too small.",
         PyExc_MemoryError},
        {"qkv.CompileError", "A kernel compiler is absent or rejected the source.", NULL},
        {"qkv.DeviceError", "A driver or the operating system reported an error.", NULL},
        {"qkv.CommError", "A peer failed, timed out, or disagreed.", NULL},
        {"qkv.InternalError", "A bug in qkv: please report the message.", NULL},
    };
    for (int i = 0; i < NUM_STATUS; i++) {
        if (!errors[i]) {
            PyObject *bases = i == 0          ? PyTuple_Pack(1, kinds[i].also)
                              : kinds[i].also ? PyTuple_Pack(2, errors[0], kinds[i].also)
                                              : PyTuple_Pack(1, errors[0]);
            PyObject *fields = Py_BuildValue("{si}", "status", i);
            if (bases && fields) {
                errors[i] = PyErr_NewExceptionWithDoc(kinds[i].name, kinds[i].doc, bases, fields);
            }
            Py_XDECREF(bases);
            Py_XDECREF(fields);
        }
        if (!errors[i] || PyModule_AddObjectRef(module, kinds[i].name + sizeof "qkv", errors[i])) {
            return -1;
        }
    }
    return 0;
}

/* ---- shared by types and functions ---------------------------------------------------------------- */

void free_object(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF((PyObject *)type);
}

int read_methods(PyMethodDef *methods, signature *const *signatures)
{
    for (int i = 0; methods[i].ml_name; i++) {
        if (read_signature(signatures[i])) return -1;
        methods[i].ml_doc = signatures[i]->text;
    }
    return 0;
}

int add_methods(PyObject *module, PyMethodDef *methods, signature *const *signatures)
{
    return read_methods(methods, signatures) || PyModule_AddFunctions(module, methods) ? -1 : 0;
}

/* ---- module --------------------------------------------------------------------------------------- */

enum { HEADER_VERSION = QKV_VERSION_MAJOR * 10000 + QKV_VERSION_MINOR * 100 + QKV_VERSION_PATCH };

static PyObject *version(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    const int number = qkv_version();
    return Py_BuildValue("(iii)", number / 10000, number / 100 % 100, number % 100);
}

static PyMethodDef version_functions[] = {
    {"version", version, METH_NOARGS,
     "version()\n--\n\nThe version (major, minor, patch) of the C library in use."},
    {NULL, NULL, 0, NULL},
};

static int fill_module(PyObject *module)
{
    static int64_t interpreter = -1; /* types and contexts belong to the first one */
    const int64_t here = PyInterpreterState_GetID(PyInterpreterState_Get());
    if (interpreter >= 0 && interpreter != here) {
        PyErr_SetString(PyExc_ImportError, "qkv can be imported in one interpreter of a process");
        return -1;
    }
    interpreter = here;
    if (qkv_version() != HEADER_VERSION) {
        PyErr_Format(PyExc_ImportError,
                     "qkv._native was built for libqkv %d.%d.%d but finds %d.%d.%d: reinstall qkv",
                     HEADER_VERSION / 10000, HEADER_VERSION / 100 % 100, HEADER_VERSION % 100,
                     qkv_version() / 10000, qkv_version() / 100 % 100, qkv_version() % 100);
        return -1;
    }
    return add_errors(module) || PyModule_AddFunctions(module, version_functions) ||
                   add_tensors(module) || add_context(module) || add_functions(module) ||
                   add_sampling(module) || add_logits_pipe(module) || add_attention(module)
               ? -1
               : 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, fill_module},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "qkv._native",
    .m_doc = "The C library, one to one; import it as qkv.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void);
PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
