/* frameworks.c - see frameworks.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "frameworks.h"

#include "arguments.h"

#include <stdatomic.h>
#include <string.h>

static PyObject *str_exchange_api;

/* ---- exchange tables ------------------------------------------------------------------------------ */

/* Tables by type, NULL for a type without one. Entries are only added, types never let go: a reader needs
 * no lock, and an address is never that of another type. Types beyond the table are looked up each time. */
static struct {
    _Atomic(PyTypeObject *) type;
    const exchange_api *api;
} known_types[32];
static _Atomic int num_known, adding;

static const exchange_api *look_up_exchange(PyTypeObject *type)
{
    PyObject *capsule = PyObject_GetAttr((PyObject *)type, str_exchange_api);
    const exchange_api *api = NULL;
    if (capsule) api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_XDECREF(capsule);
    if (!api) PyErr_Clear();
    while (api && api->version.major != 1) api = api->older;
    return api;
}

const exchange_api *exchange_of(PyTypeObject *type)
{
    const int num = atomic_load_explicit(&num_known, memory_order_acquire);
    for (int i = 0; i < num; i++) {
        if (atomic_load_explicit(&known_types[i].type, memory_order_relaxed) == type) {
            return known_types[i].api;
        }
    }
    const exchange_api *api = look_up_exchange(type);
    if (atomic_exchange(&adding, 1)) return api; /* another thread adds one: next time */
    const int at = atomic_load_explicit(&num_known, memory_order_relaxed);
    if (at < (int)(sizeof known_types / sizeof known_types[0])) {
        Py_INCREF((PyObject *)type);
        known_types[at].api = api;
        atomic_store_explicit(&known_types[at].type, type, memory_order_relaxed);
        atomic_store_explicit(&num_known, at + 1, memory_order_release);
    }
    atomic_store(&adding, 0);
    return api;
}

/* ---- streams -------------------------------------------------------------------------------------- */

PyObject *imported(const char *name)
{
    PyObject *key = PyUnicode_FromString(name);
    PyObject *module = key ? PyImport_GetModule(key) : NULL;
    Py_XDECREF(key);
    if (!module) PyErr_Clear();
    return module;
}

/* The handle of module.cuda.<method>(...).<field>. -1 with an exception. */
static int module_stream(PyObject *module, const char *method, const char *field, void **out)
{
    PyObject *cuda = PyObject_GetAttrString(module, "cuda");
    PyObject *stream = cuda ? PyObject_CallMethod(cuda, method, NULL) : NULL;
    PyObject *handle = stream ? PyObject_GetAttrString(stream, field) : NULL;
    *out = handle ? PyLong_AsVoidPtr(handle) : NULL;
    Py_XDECREF(cuda);
    Py_XDECREF(stream);
    Py_XDECREF(handle);
    return PyErr_Occurred() ? -1 : 0;
}

/* The current stream of torch: by its exchange table, which older ones lack. */
static int torch_stream(PyObject *torch, int32_t device_id, void **out)
{
    PyObject *type = PyObject_GetAttrString(torch, "Tensor");
    if (!type) return -1;
    const exchange_api *api = PyType_Check(type) ? exchange_of((PyTypeObject *)type) : NULL;
    Py_DECREF(type);
    if (api) return api->current_stream(kDLCUDA, device_id, out);
    return module_stream(torch, "current_stream", "cuda_stream", out);
}

/* Has torch used a GPU? Before, and in its builds for the CPU, it must not be asked for a stream. */
static int torch_uses_cuda(PyObject *torch)
{
    PyObject *cuda = PyObject_GetAttrString(torch, "cuda");
    PyObject *answer = cuda ? PyObject_CallMethod(cuda, "is_initialized", NULL) : NULL;
    Py_XDECREF(cuda);
    Py_XDECREF(answer);
    if (!answer) PyErr_Clear();
    return answer == Py_True;
}

int comes_from(PyObject *object, const char *package)
{
    PyObject *module = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__module__");
    const char *text =
        module && PyUnicode_Check(module) ? PyUnicode_AsUTF8AndSize(module, NULL) : NULL;
    if (!text) PyErr_Clear();
    const size_t len = strlen(package);
    const int same = text && !strncmp(text, package, len) && (text[len] == '.' || !text[len]);
    Py_XDECREF(module);
    return same;
}

int framework_stream(const call *c, int32_t device_id, void **out)
{
    const int on_gpu = c->like && c->device.device_type == kDLCUDA;
    if (on_gpu && c->api) return c->api->current_stream(kDLCUDA, device_id, out);
    PyObject *torch = imported("torch"), *cupy = imported("cupy");
    int bad = 0;
    if (torch && (on_gpu ? comes_from(c->like, "torch") : torch_uses_cuda(torch))) {
        bad = torch_stream(torch, device_id, out);
    } else if (cupy && (!on_gpu || comes_from(c->like, "cupy"))) {
        bad = module_stream(cupy, "get_current_stream", "ptr", out);
    }
    Py_XDECREF(torch);
    Py_XDECREF(cupy);
    return bad;
}

int find_stream(call *c, int32_t device_id)
{
    if (c->has_stream) return 0;
    c->has_stream = 1;
    if (absent(c->stream_object)) return framework_stream(c, device_id, &c->stream);
    PyObject *index = PyNumber_Index(c->stream_object);
    if (!index) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "stream: expected the handle of a CUDA stream, got %R",
                     c->stream_object);
        return -1;
    }
    c->stream = PyLong_AsVoidPtr(index);
    Py_DECREF(index);
    return c->stream || !PyErr_Occurred() ? 0 : -1;
}

/* ---- module --------------------------------------------------------------------------------------- */

int add_frameworks(void)
{
    if (!str_exchange_api)
        str_exchange_api = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
    return str_exchange_api ? 0 : -1;
}
