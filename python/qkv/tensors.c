/* tensors.c - arrays of any framework in, through DLPack, and new arrays out.
 *
 * In: the exchange table of the array's type where there is one (torch from 2.10 on: some tens of ns), else
 * __dlpack__. A capsule is not consumed but held for the call: its destructor then releases it.
 * Out: the exchange table, else the framework's own empty(), else from_dlpack() of filled memory.
 * Nothing waits for a GPU: work goes to the stream that the framework works on, and __dlpack__ is told of
 * it, so that arrays of another stream are ordered before it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tensors.h"

#include "arguments.h"
#include "context_object.h"
#include "frameworks.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static PyObject *str_dlpack, *str_dlpack_device, *str_max_version, *str_stream, *str_requires_grad,
    *max_version;

void begin_call(call *c, tensor *tensors, int capacity, PyObject *ctx, PyObject *stream)
{
    *c = (call){
        .tensors = tensors, .capacity = capacity, .ctx_object = ctx, .stream_object = stream};
}

static tensor *add_tensor(call *c)
{
    if (c->failed) return NULL;
    if (c->num_tensors == c->capacity) {
        PyErr_SetString(PyExc_SystemError, "too many arrays in a call");
        c->failed = 1;
        return NULL;
    }
    tensor *t = &c->tensors[c->num_tensors++];
    t->object = t->owner = NULL;
    t->lent = NULL;
    t->adopted = 0;
    return t;
}

static tensor *fail(call *c)
{
    c->failed = 1;
    return NULL;
}

/* ---- arrays in ------------------------------------------------------------------------------------ */

int is_array(PyObject *value)
{
    /* What an AttributeError costs is more than the rest of a scale that is a number. */
    if (PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyList_CheckExact(value) ||
        PyTuple_CheckExact(value)) {
        return 0;
    }
    if (exchange_of(Py_TYPE(value))) return 1;
    PyObject *method = PyObject_GetAttr(value, str_dlpack);
    if (!method) PyErr_Clear();
    Py_XDECREF(method);
    return method != NULL;
}

/* Does torch record what this thread does? */
static int torch_records(void)
{
    static _Atomic(PyObject *) found; /* weights under no_grad() ask in every call */
    PyObject *ask = atomic_load(&found);
    if (!ask) {
        PyObject *torch = imported("torch");
        ask = torch ? PyObject_GetAttrString(torch, "is_grad_enabled") : NULL;
        Py_XDECREF(torch);
        if (ask) atomic_store(&found, ask);
    }
    PyObject *answer = ask ? PyObject_CallNoArgs(ask) : NULL;
    Py_XDECREF(answer);
    if (!answer) PyErr_Clear();
    return answer == Py_True;
}

/* Gradients do not flow through the library: silence would train the wrong model. Where torch does not
 * record (no_grad, inference_mode) an array may well ask for them: weights do. Returns whether it does, -1
 * with an exception if that is refused. */
static int check_gradient(PyObject *value, const char *name)
{
    PyObject *wanted = PyObject_GetAttr(value, str_requires_grad);
    if (!wanted) {
        PyErr_Clear();
        return 0;
    }
    Py_DECREF(wanted);
    if (wanted != Py_True) return 0;
    if (!torch_records()) return 1;
    raise_error(
        QKV_ERR_INVALID,
        "%s: expected an array outside of autograd, got one that requires grad (detach() it, "
        "or call under torch.no_grad())",
        name);
    return -1;
}

static int refuse_read_only(uint64_t flags, const char *name)
{
    if (!(flags & READ_ONLY)) return 0;
    raise_error(QKV_ERR_INVALID, "%s: expected an array that can be written, got a read-only one",
                name);
    return -1;
}

static int read_exchange(const exchange_api *api, tensor *t, const char *name, int written)
{
    if (check_gradient(t->object, name) < 0) return -1;
    if (api->borrow && !written) return api->borrow(t->object, &t->dl);
    if (api->lend(t->object, &t->lent)) return -1; /* the only way to learn of flags */
    t->dl = t->lent->tensor;
    return written ? refuse_read_only(t->lent->flags, name) : 0;
}

/* __dlpack_device__() of an array. */
static int read_array_device(PyObject *value, DLDevice *out)
{
    PyObject *method = PyObject_GetAttr(value, str_dlpack_device);
    PyObject *pair = method ? PyObject_CallObject(method, NULL) : NULL;
    Py_XDECREF(method);
    if (!pair) return -1;
    int type, id;
    const int bad = !PyTuple_Check(pair) || !PyArg_ParseTuple(pair, "ii", &type, &id);
    Py_DECREF(pair);
    if (bad) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "__dlpack_device__: expected a pair");
        return -1;
    }
    *out = (DLDevice){(DLDeviceType)type, id};
    return 0;
}

/* Calls value.__dlpack__(max_version=(1, 3), stream=stream), without max_version where that is unknown. */
static PyObject *ask_capsule(PyObject *value, PyObject *stream)
{
    PyObject *method = PyObject_GetAttr(value, str_dlpack), *none = PyTuple_New(0);
    PyObject *options = PyDict_New(), *capsule = NULL;
    if (!method || !none || !options) goto out;
    if (stream && PyDict_SetItem(options, str_stream, stream)) goto out;
    if (PyDict_SetItem(options, str_max_version, max_version)) goto out;
    capsule = PyObject_Call(method, none, options);
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        if (PyDict_DelItem(options, str_max_version)) goto out;
        capsule = PyObject_Call(method, none, options);
    }
out:
    Py_XDECREF(method);
    Py_XDECREF(none);
    Py_XDECREF(options);
    return capsule;
}

static int read_capsule(tensor *t, const char *name, int written)
{
    if (PyCapsule_IsValid(t->owner, "dltensor_versioned")) {
        const managed_tensor *managed = PyCapsule_GetPointer(t->owner, "dltensor_versioned");
        if (managed->version.major != 1) {
            raise_error(QKV_ERR_INVALID, "%s: expected DLPack version 1, got %u.%u", name,
                        managed->version.major, managed->version.minor);
            return -1;
        }
        t->dl = managed->tensor;
        return written ? refuse_read_only(managed->flags, name) : 0;
    }
    if (PyCapsule_IsValid(t->owner, "dltensor")) {
        const DLManagedTensor *managed = PyCapsule_GetPointer(t->owner, "dltensor");
        t->dl = managed->dl_tensor;
        return 0;
    }
    raise_error(QKV_ERR_INVALID, "%s: expected a DLPack capsule that nobody has consumed", name);
    return -1;
}

static int read_protocol(call *c, tensor *t, const char *name, int written)
{
    DLDevice device;
    if (read_array_device(t->object, &device)) return -1;
    if (written && comes_from(t->object, "jaxlib")) { /* does not say so itself */
        raise_error(QKV_ERR_INVALID, "%s: expected an array that can be written, JAX's cannot",
                    name);
        return -1;
    }
    PyObject *stream = NULL;
    if (device.device_type == kDLCUDA || device.device_type == kDLCUDAManaged) {
        if (!c->like) c->like = t->object, c->device = device;
        if (find_stream(c, device.device_id)) return -1;
        /* 0 is ambiguous to the protocol, whose 1 is the legacy default stream. */
        stream = PyLong_FromVoidPtr(c->stream ? c->stream : (void *)1);
        if (!stream) return -1;
    }
    const int gradient = check_gradient(t->object, name);
    if (gradient > 0) { /* torch's __dlpack__ would refuse it even under no_grad() */
        PyObject *detached = PyObject_CallMethod(t->object, "detach", NULL);
        t->owner = detached ? ask_capsule(detached, stream) : NULL;
        Py_XDECREF(detached);
    } else if (gradient == 0) {
        t->owner = ask_capsule(t->object, stream);
    }
    Py_XDECREF(stream);
    return t->owner ? read_capsule(t, name, written) : -1;
}

/* A framework's reason why it lends no array, with the argument's name before it. */
static void name_argument(const char *name)
{
    if (!PyErr_ExceptionMatches(PyExc_Exception) || is_own_error()) return;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (trace) PyException_SetTraceback(value, trace);
    PyObject *owner = PyObject_Str(value);
    const char *text = owner ? PyUnicode_AsUTF8AndSize(owner, NULL) : NULL;
    if (!text) PyErr_Clear();
    const int line = text ? (int)strcspn(text, "\n") : 0; /* torch appends a backtrace */
    raise_error(QKV_ERR_INVALID, "%s: expected an array that DLPack can lend: %.*s", name, line,
                text ? text : "");
    Py_XDECREF(owner);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    PyErr_Fetch(&type, &owner, &trace);
    PyErr_NormalizeException(&type, &owner, &trace);
    PyException_SetCause(owner, value); /* takes value over */
    PyErr_Restore(type, owner, trace);
}

static tensor *read_array(call *c, PyObject *value, const char *name, int written)
{
    tensor *t = add_tensor(c);
    if (!t) return NULL;
    t->object = value;
    const exchange_api *api = exchange_of(Py_TYPE(value));
    if (!api && !is_array(value)) {
        PyErr_Format(PyExc_TypeError, "%s: expected an array (with __dlpack__), got %R", name,
                     (PyObject *)Py_TYPE(value));
        return fail(c);
    }
    if (api ? read_exchange(api, t, name, written) : read_protocol(c, t, name, written)) {
        name_argument(name);
        return fail(c);
    }
    if (!c->like || c->like == value) {
        c->like = value;
        c->api = api;
        c->device = t->dl.device;
    }
    return t;
}

tensor *array(call *c, PyObject *value, const char *name)
{
    return c->failed ? NULL : read_array(c, value ? value : Py_None, name, 0);
}

tensor *optional_array(call *c, PyObject *value, const char *name)
{
    return absent(value) ? NULL : array(c, value, name);
}

tensor *written_array(call *c, PyObject *value, const char *name)
{
    return c->failed ? NULL : read_array(c, value ? value : Py_None, name, 1);
}

tensor *optional_written_array(call *c, PyObject *value, const char *name)
{
    return absent(value) ? NULL : written_array(c, value, name);
}

/* ---- lists in ------------------------------------------------------------------------------------- */

static int is_sequence(PyObject *value)
{
    return PySequence_Check(value) && !PyUnicode_Check(value) && !PyDict_Check(value);
}

/* Writes a number at *at and moves on. */
static int put_number(PyObject *value, const char *name, DLDataType dtype, char **at)
{
    const size_t bytes = dtype.bits / 8u;
    if (absent(value)) { /* would be left out */
        PyErr_Format(PyExc_ValueError, "%s: expected numbers, got None", name);
        return -1;
    }
    if (dtype.code == kDLFloat) {
        float number = 0;
        if (read_f32(value, name, &number)) return -1;
        memcpy(*at, &number, sizeof number);
    } else if (dtype.code == kDLUInt && dtype.bits == 64) {
        uint64_t number = 0;
        if (read_u64(value, name, &number)) return -1;
        memcpy(*at, &number, sizeof number);
    } else {
        int64_t number = 0;
        if (read_i64(value, name, &number)) return -1;
        const int64_t low = dtype.code == kDLUInt ? 0 : INT64_MIN >> (64 - dtype.bits);
        const int64_t high =
            dtype.code == kDLUInt ? INT64_MAX >> (63 - dtype.bits) : INT64_MAX >> (64 - dtype.bits);
        if (number < low || number > high) {
            PyErr_Format(PyExc_ValueError, "%s: expected integers from %lld to %lld, got %R", name,
                         (long long)low, (long long)high, value);
            return -1;
        }
        memcpy(*at, &number, bytes); /* little endian */
    }
    *at += bytes;
    return 0;
}

static int put_sequence(PyObject *value, const char *name, tensor *t, int axis, char **at)
{
    if (axis == t->dl.ndim) return put_number(value, name, t->dl.dtype, at);
    PyObject *list = is_sequence(value) ? PySequence_List(value) : NULL;
    if (!list || PyList_Size(list) != t->shape[axis]) {
        if (!PyErr_Occurred()) {
            raise_error(QKV_ERR_INVALID, "%s: expected rows of one length", name);
        }
        Py_XDECREF(list);
        return -1;
    }
    int bad = 0;
    for (Py_ssize_t i = 0; i < t->shape[axis] && !bad; i++) {
        bad = put_sequence(PyList_GetItem(list, i), name, t, axis + 1, at);
    }
    Py_DECREF(list);
    return bad;
}

/* The shape of nested sequences, by the first element of each. */
static int list_shape(PyObject *value, const char *name, tensor *t, int64_t *numel)
{
    Py_INCREF(value);
    for (*numel = 1; is_sequence(value);) {
        const Py_ssize_t size = t->dl.ndim < MAX_DIMS ? PySequence_Size(value) : -1;
        PyObject *first = size > 0 ? PySequence_GetItem(value, 0) : NULL;
        Py_DECREF(value);
        if (size < 0 || (size && !first)) {
            if (!PyErr_Occurred()) raise_error(QKV_ERR_INVALID, "%s: nested too deeply", name);
            return -1;
        }
        t->shape[t->dl.ndim++] = size;
        *numel *= size;
        if (!first) return 0;
        value = first;
    }
    Py_DECREF(value);
    return 0;
}

static tensor *read_list(call *c, PyObject *value, const char *name, DLDataType dtype)
{
    tensor *t = add_tensor(c);
    if (!t) return NULL;
    t->dl = (DLTensor){.device = {kDLCPU, 0}, .dtype = dtype, .shape = t->shape};
    int64_t numel;
    if (list_shape(value, name, t, &numel)) return fail(c);
    t->owner = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)numel * (dtype.bits / 8));
    char *data = t->owner ? PyBytes_AsString(t->owner) : NULL; /* ours alone until the call */
    if (!data) return fail(c);
    t->dl.data = data;
    return put_sequence(value, name, t, 0, &data) ? fail(c) : t;
}

tensor *array_or_list(call *c, PyObject *value, const char *name, DLDataType dtype)
{
    if (c->failed) return NULL;
    if (value && is_sequence(value) && !is_array(value)) return read_list(c, value, name, dtype);
    return array(c, value, name);
}

tensor *optional_array_or_list(call *c, PyObject *value, const char *name, DLDataType dtype)
{
    return absent(value) ? NULL : array_or_list(c, value, name, dtype);
}

tensor *value_array(call *c, PyObject *value, const char *name, DLDataType dtype)
{
    tensor *t = array_or_list(c, value, name, dtype);
    if (!t || t->dl.ndim > 0) return t;
    t->shape[0] = 1;
    t->dl.ndim = 1;
    t->dl.shape = t->shape;
    t->dl.strides = NULL;
    return t;
}

/* An array of one on the host, in the tensor itself. */
static tensor *read_number(call *c, PyObject *value, const char *name, DLDataType dtype)
{
    tensor *t = add_tensor(c);
    if (!t) return NULL;
    char *at = (char *)&t->shape[1];
    t->shape[0] = 1;
    t->dl =
        (DLTensor){.data = at, .device = {kDLCPU, 0}, .ndim = 1, .dtype = dtype, .shape = t->shape};
    return put_number(value, name, dtype, &at) ? fail(c) : t;
}

tensor *number_or_array(call *c, PyObject *value, const char *name, DLDataType dtype)
{
    if (c->failed || absent(value)) return NULL;
    if (PyNumber_Check(value) && !is_array(value)) return read_number(c, value, name, dtype);
    tensor *t = value_array(c, value, name, dtype);
    const int is_i64 = t && t->dl.dtype.bits == 64 && t->dl.dtype.code == kDLInt;
    if (is_i64 && dtype.bits == 64) t->dl.dtype = dtype;
    return t;
}

/* ---- arrays out ----------------------------------------------------------------------------------- */

/* By the framework's allocator. */
static void set_exchange_error(void *user, const char *kind, const char *message)
{
    (void)kind;
    raise_error(QKV_ERR_MEMORY, "%s: %.*s", (const char *)user, (int)strcspn(message, "\n"),
                message);
}

static int make_by_exchange(call *c, tensor *t, const char *name)
{
    managed_tensor *made = NULL;
    void *object = NULL;
    if (c->api->allocate(&t->dl, &made, (void *)(uintptr_t)name, set_exchange_error)) return -1;
    t->dl = made->tensor; /* stays where it is while the new array lives */
    if (c->api->import(made, &object)) return -1;
    t->object = t->owner = object;
    return 0;
}

/* The package whose empty() makes arrays like the call's first: a new reference, NULL if unknown. */
static PyObject *making_module(const call *c)
{
    static const char *const known[] = {"torch", "numpy", "cupy"};
    for (int i = 0; i < 3 && c->like; i++) {
        if (comes_from(c->like, known[i])) return imported(known[i]);
    }
    return NULL;
}

/* shape and dtype of a new array, and torch's device, as the arguments of empty(). */
static int making_arguments(const call *c, const tensor *t, PyObject *module, PyObject **args,
                            PyObject **options)
{
    PyObject *shape = PyTuple_New(t->dl.ndim);
    for (int i = 0; shape && i < t->dl.ndim; i++) {
        PyObject *size = PyLong_FromLongLong(t->shape[i]);
        if (!size || PyTuple_SetItem(shape, i, size)) break;
    }
    const int of_torch = comes_from(c->like, "torch");
    const char *name = dtype_name(t->dl.dtype);
    if (!of_torch && strcmp(name, "bool") == 0) name = "bool_"; /* in NumPy before 2 the only one */
    PyObject *dtype = PyObject_GetAttrString(module, name);
    PyObject *device = of_torch ? PyObject_GetAttrString(c->like, "device") : NULL;
    if (!PyErr_Occurred()) {
        *args = Py_BuildValue("(O)", shape);
        *options = device ? Py_BuildValue("{sOsO}", "dtype", dtype, "device", device)
                          : Py_BuildValue("{sO}", "dtype", dtype);
    }
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    Py_XDECREF(device);
    return *args && *options ? 0 : -1;
}

static tensor *make_by_module(call *c, PyObject *module, const char *name)
{
    tensor *t = &c->tensors[c->num_tensors - 1];
    PyObject *args = NULL, *options = NULL, *make = NULL, *made = NULL;
    if (!making_arguments(c, t, module, &args, &options)) {
        make = PyObject_GetAttrString(module, "empty");
        if (make) made = PyObject_Call(make, args, options);
    }
    Py_XDECREF(args);
    Py_XDECREF(options);
    Py_XDECREF(make);
    if (!made) return fail(c);
    c->num_tensors--; /* read into the same place, as any array is */
    t = read_array(c, made, name, 1);
    if (!t || !t->owner) {
        if (t)
            t->owner = made;
        else
            Py_DECREF(made);
        return t;
    }
    PyObject *both = PyTuple_Pack(2, made, t->owner);
    Py_DECREF(made);
    Py_DECREF(t->owner);
    t->owner = both;
    return both ? t : fail(c);
}

/* On the CPU, of memory that becomes an array at the end of the call. */
typedef struct block {
    DLManagedTensor managed;
    int64_t shape[MAX_DIMS];
} block;

static void free_block(DLManagedTensor *managed)
{
    free(managed->dl_tensor.data);
    free(managed);
}

static void free_capsule(PyObject *capsule)
{
    if (!PyCapsule_IsValid(capsule, "dltensor")) return; /* consumed */
    free_block(PyCapsule_GetPointer(capsule, "dltensor"));
}

static tensor *make_block(call *c, tensor *t)
{
    size_t bytes = (size_t)t->dl.dtype.bits / 8;
    for (int i = 0; i < t->dl.ndim; i++) bytes *= (size_t)t->shape[i];
    block *b = malloc(sizeof *b);
    void *data = aligned_alloc(64, (bytes / 64 + 1) * 64); /* JAX copies what is aligned to less */
    if (!b || !data) {
        free(b);
        free(data);
        PyErr_NoMemory();
        return fail(c);
    }
    memcpy(b->shape, t->shape, sizeof b->shape);
    b->managed = (DLManagedTensor){.dl_tensor = t->dl, .deleter = free_block};
    b->managed.dl_tensor.data = data;
    b->managed.dl_tensor.shape = b->shape;
    t->dl.data = data;
    t->adopted = 1;
    t->owner = PyCapsule_New(&b->managed, "dltensor", free_capsule);
    if (t->owner) return t;
    free_block(&b->managed);
    return fail(c);
}

/* A new reference to the array of a tensor, None for NULL. */
static PyObject *array_of(const call *c, const tensor *t)
{
    if (t && t->adopted) {
        PyObject *module = PyImport_ImportModule("qkv._adopt");
        PyObject *array =
            module ? PyObject_CallMethod(module, "adopt", "OO", c->like, t->owner) : NULL;
        Py_XDECREF(module);
        return array;
    }
    PyObject *object = t ? t->object : Py_None;
    Py_INCREF(object);
    return object;
}

static tensor *make_array(call *c, const char *name, DLDataType dtype, int ndim,
                          const int64_t *shape)
{
    tensor *t = add_tensor(c);
    if (!t) return NULL;
    if (!dtype_name(dtype) || ndim > MAX_DIMS) {
        raise_error(QKV_ERR_INVALID, "%s: expected an array where its dtype or %d axes are unusual",
                    name, ndim);
        return fail(c);
    }
    for (int i = 0; i < ndim; i++) t->shape[i] = shape[i];
    t->dl = (DLTensor){.device = c->device, .ndim = ndim, .dtype = dtype, .shape = t->shape};
    if (c->api) return make_by_exchange(c, t, name) ? fail(c) : t;
    PyObject *module = making_module(c);
    if (module) {
        t = make_by_module(c, module, name);
        Py_DECREF(module);
        return t;
    }
    if (c->like && c->device.device_type == kDLCPU &&
        PyObject_HasAttrString(c->like, "__array_namespace__")) {
        return make_block(c, t);
    }
    raise_error(QKV_ERR_UNSUPPORTED, "%s: expected an array, since none can be made like %s", name,
                c->device.device_type == kDLCPU ? "those given" : "those given on this device");
    return fail(c);
}

tensor *output(call *c, PyObject *value, const char *name, DLDataType dtype, int ndim,
               const int64_t *shape)
{
    if (!absent(value)) return written_array(c, value, name);
    return make_array(c, name, dtype, ndim, shape);
}

tensor *output_like(call *c, PyObject *value, const char *name, const tensor *like)
{
    if (c->failed) return NULL;
    return output(c, value, name, like->dl.dtype, like->dl.ndim, like->dl.shape);
}

tensor *wanted_output(call *c, PyObject *value, const char *name, DLDataType dtype, int ndim,
                      const int64_t *shape)
{
    if (c->failed || absent(value) || value == Py_False) return NULL;
    return output(c, value == Py_True ? NULL : value, name, dtype, ndim, shape);
}

/* ---- calls ---------------------------------------------------------------------------------------- */

int ready_on(call *c, qkv_context *ctx, DLDevice device)
{
    if (c->failed) return 0;
    c->ctx = ctx;
    if (device.device_type == kDLCUDA && find_stream(c, device.device_id)) c->failed = 1;
    return !c->failed;
}

int ready(call *c)
{
    if (c->failed) return 0;
    context_object *ctx =
        absent(c->ctx_object) ? default_context(c->device) : as_context(c->ctx_object);
    if (!ctx) return c->failed = 1, 0;
    return ready_on(c, ctx->ctx, ctx->device);
}

static void release_tensors(call *c)
{
    for (int i = 0; i < c->num_tensors; i++) {
        tensor *t = &c->tensors[i];
        Py_XDECREF(t->owner);
        if (t->lent && t->lent->deleter) t->lent->deleter(t->lent);
    }
    c->num_tensors = 0;
}

PyObject *end_call(call *c, tensor *result)
{
    PyObject *value = c->failed ? NULL : array_of(c, result);
    release_tensors(c);
    return value;
}

PyObject *end_call_tuple(call *c, int num, tensor *const *results)
{
    PyObject *tuple = c->failed ? NULL : PyTuple_New(num);
    for (int i = 0; tuple && i < num; i++) {
        PyObject *value = array_of(c, results[i]);
        if (value && !PyTuple_SetItem(tuple, i, value)) continue;
        Py_DECREF(tuple);
        tuple = NULL;
    }
    release_tensors(c);
    return tuple;
}

PyObject *end_call_wanted(call *c, tensor *result, tensor *wanted)
{
    if (!wanted) return end_call(c, result);
    return end_call_tuple(c, 2, (tensor *[]){result, wanted});
}

int keep_alive(PyObject *list, tensor *t)
{
    if (!t) return 0;
    if (t->object && PyList_Append(list, t->object)) return -1;
    return t->owner ? PyList_Append(list, t->owner) : 0;
}

/* ---- module --------------------------------------------------------------------------------------- */

int add_tensors(PyObject *module)
{
    (void)module;
    if (max_version) return 0;
    if (add_frameworks()) return -1;
    str_dlpack = PyUnicode_InternFromString("__dlpack__");
    str_dlpack_device = PyUnicode_InternFromString("__dlpack_device__");
    str_max_version = PyUnicode_InternFromString("max_version");
    str_stream = PyUnicode_InternFromString("stream");
    str_requires_grad = PyUnicode_InternFromString("requires_grad");
    max_version = Py_BuildValue("(ii)", 1, 3);
    return str_dlpack && str_dlpack_device && str_max_version && str_stream && str_requires_grad &&
                   max_version
               ? 0
               : -1;
}
