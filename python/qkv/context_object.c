/* context_object.c - qkv.Context.
 * SPDX-License-Identifier: Apache-2.0 */
#include "context_object.h"

#include "arguments.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static PyTypeObject *context_type;

int read_device(PyObject *value, DLDevice *out)
{
    *out = (DLDevice){kDLCPU, 0};
    if (absent(value)) return 0;
    PyObject *owner = PyObject_Str(value);
    const char *text = owner ? PyUnicode_AsUTF8AndSize(owner, NULL) : NULL;
    int known = 0;
    if (text) {
        char *end = NULL;
        const int cuda = !strncmp(text, "cuda", 4);
        const long id = cuda && text[4] == ':' ? strtol(text + 5, &end, 10) : 0;
        known = !strcmp(text, "cpu") || !strcmp(text, "cpu:0") || (cuda && !text[4]) ||
                (end && end != text + 5 && !*end && id >= 0 && id < 4096);
        if (cuda) *out = (DLDevice){kDLCUDA, (int32_t)id};
        if (!known) {
            raise_error(QKV_ERR_INVALID,
                        "device: expected \"cpu\", \"cuda\" or \"cuda:N\", got \"%s\"", text);
        }
    }
    Py_XDECREF(owner);
    return known ? 0 : -1;
}

/* ---- the type ------------------------------------------------------------------------------------- */

enum {
    CONTEXT_DEVICE,
    CONTEXT_NUM_THREADS,
    CONTEXT_ISA,
    CONTEXT_JIT_POLICY,
    CONTEXT_BATCH_INVARIANT,
    CONTEXT_CACHE_DIR,
    CONTEXT_COMPILER,
    NUM_CONTEXT
};
static signature context_signature = {
    .text = "Context(device=\"cpu\", *, num_threads=0, isa=None, jit_policy=\"allow\", "
            "batch_invariant=False, cache_dir=None, compiler=None)\n--\n\n"
            "A device: its threads, kernels and compiled code; see qkv/context.h.\n\n"
            "device: \"cpu\", \"cuda\" (the first GPU) or \"cuda:1\". num_threads: of the CPU, 0 = "
            "all that\n"
            "this process may run on. isa: the level of CPU instructions (\"avx2\", ...), None = "
            "the fastest.\n"
            "jit_policy: \"allow\", \"cached\" or \"never\". batch_invariant: gemm gives a row the "
            "same bits in\n"
            "any batch on a GPU too. cache_dir: of compiled kernels, \"\" = none. compiler: of "
            "variants on the\n"
            "CPU. May be shared by threads. In a child of fork() it is of no use any more: make "
            "another."};

static PyObject *context_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *v[NUM_CONTEXT], *keep[3] = {NULL};
    qkv_context_options options = {QKV_CONTEXT_OPTIONS_INIT};
    context_object *self = NULL;
    if (read_call_dict(&context_signature, args, kwargs, v) ||
        read_device(v[CONTEXT_DEVICE], &options.device) ||
        read_i32(v[CONTEXT_NUM_THREADS], "num_threads", &options.num_threads) ||
        read_word(v[CONTEXT_JIT_POLICY], "jit_policy", &options.jit_policy, "allow", "cached",
                  "never", NULL) ||
        read_flag(v[CONTEXT_BATCH_INVARIANT], "batch_invariant", &options.batch_invariant) ||
        read_text(v[CONTEXT_ISA], "isa", &options.isa, &keep[0]) ||
        read_text(v[CONTEXT_CACHE_DIR], "cache_dir", &options.cache_dir, &keep[1]) ||
        read_text(v[CONTEXT_COMPILER], "compiler", &options.compiler, &keep[2])) {
        goto out;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    self = (context_object *)alloc(type, 0);
    if (!self) goto out;
    qkv_status status;
    UNLOCKED(status = qkv_context_create(&options, &self->ctx));
    self->device = options.device;
    if (status) {
        raise_status(status);
        Py_DECREF((PyObject *)self);
        self = NULL;
    }
out:
    for (int i = 0; i < 3; i++) Py_XDECREF(keep[i]);
    return (PyObject *)self;
}

static void context_dealloc(PyObject *object)
{
    qkv_context_destroy(((context_object *)object)->ctx);
    free_object(object);
}

static PyObject *get_device_name(PyObject *object, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(qkv_context_device_name(((context_object *)object)->ctx));
}

static PyObject *get_compiler(PyObject *object, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(qkv_context_compiler(((context_object *)object)->ctx));
}

static PyObject *get_num_threads(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromLong(qkv_context_num_threads(((context_object *)object)->ctx));
}

static PyObject *context_repr(PyObject *object)
{
    return PyUnicode_FromFormat("<qkv.Context %s>",
                                qkv_context_device_name(((context_object *)object)->ctx));
}

context_object *as_context(PyObject *value)
{
    if (PyObject_TypeCheck(value, context_type)) return (context_object *)value;
    PyErr_Format(PyExc_TypeError, "ctx: expected a qkv.Context, got %R", value);
    return NULL;
}

/* ---- defaults ------------------------------------------------------------------------------------- */

enum { MAX_GPUS = 64 };
/* [0] is the CPU's, [1 + i] that of GPU i. They stay until the process ends. */
static _Atomic(context_object *) defaults[1 + MAX_GPUS];

context_object *default_context(DLDevice device)
{
    int at = 0;
    if (device.device_type == kDLCUDA) {
        at = 1 + device.device_id;
    } else if (device.device_type != kDLCPU && device.device_type != kDLCUDAHost) {
        raise_error(QKV_ERR_UNSUPPORTED,
                    "device: expected the CPU or CUDA, got DLPack device type %d",
                    (int)device.device_type);
        return NULL;
    }
    if (at < 0 || at > MAX_GPUS) {
        raise_error(QKV_ERR_INVALID, "device: expected cuda:0 to cuda:%d, got cuda:%d",
                    MAX_GPUS - 1, device.device_id);
        return NULL;
    }
    context_object *found = atomic_load_explicit(&defaults[at], memory_order_acquire);
    if (found) return found;
    char name[32] = "cpu";
    if (at) snprintf(name, sizeof name, "cuda:%d", at - 1);
    found = (context_object *)PyObject_CallFunction((PyObject *)context_type, "s", name);
    if (!found) return NULL;
    /* Another thread may have been faster: then its context is everybody's. */
    context_object *first = NULL;
    if (atomic_compare_exchange_strong(&defaults[at], &first, found)) return found;
    Py_DECREF((PyObject *)found);
    return first;
}

static PyObject *context(PyObject *module, PyObject *value)
{
    (void)module;
    DLDevice device;
    if (read_device(value, &device)) return NULL;
    context_object *found = default_context(device);
    Py_XINCREF((PyObject *)found);
    return (PyObject *)found;
}

/* A context does not outlive fork(): the child makes its own. Those of the parent stay allocated, since
 * arrays and operators of it may still point there. */
static PyObject *forget_contexts(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    for (int i = 0; i <= MAX_GPUS; i++) atomic_store(&defaults[i], NULL);
    Py_RETURN_NONE;
}

/* ---- module --------------------------------------------------------------------------------------- */

static PyGetSetDef context_getset[] = {
    {"device_name", get_device_name, NULL, "\"cpu:avx512\": the device and the level in use.",
     NULL},
    {"compiler", get_compiler, NULL, "What kernels are compiled by, \"\" where there is none.",
     NULL},
    {"num_threads", get_num_threads, NULL, "How many tasks run at a time.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef context_functions[] = {
    {"context", context, METH_O,
     "context(device)\n--\n\nThe default Context of a device, which calls without ctx= use. It "
     "stays."},
    {"_forget_contexts", forget_contexts, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

int add_context(PyObject *module)
{
    if (read_signature(&context_signature)) return -1;
    if (!context_type) {
        PyType_Slot slots[] = {
            {Py_tp_doc, (void *)(uintptr_t)context_signature.text},
            {Py_tp_new, context_new},
            {Py_tp_dealloc, context_dealloc},
            {Py_tp_repr, context_repr},
            {Py_tp_getset, context_getset},
            {0, NULL},
        };
        PyType_Spec spec = {.name = "qkv.Context",
                            .basicsize = sizeof(context_object),
                            .flags = Py_TPFLAGS_DEFAULT,
                            .slots = slots};
        context_type = (PyTypeObject *)PyType_FromSpec(&spec);
        if (!context_type) return -1;
    }
    if (PyModule_AddObjectRef(module, "Context", (PyObject *)context_type) ||
        PyModule_AddFunctions(module, context_functions)) {
        return -1;
    }
    PyObject *forget = PyObject_GetAttrString(module, "_forget_contexts");
    PyObject *os = PyImport_ImportModule("os");
    PyObject *hook = os ? PyObject_GetAttrString(os, "register_at_fork") : NULL;
    PyObject *none = PyTuple_New(0), *options = Py_BuildValue("{sO}", "after_in_child", forget);
    PyObject *done = hook && none && options ? PyObject_Call(hook, none, options) : NULL;
    Py_XDECREF(forget);
    Py_XDECREF(os);
    Py_XDECREF(hook);
    Py_XDECREF(none);
    Py_XDECREF(options);
    Py_XDECREF(done);
    return done ? 0 : -1;
}
