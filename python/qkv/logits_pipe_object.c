/* logits_pipe_object.c - qkv._native.LogitsPipe: stages for qkv_logits_pipe, which is made at the first run on
 * a device and again for rows that are longer than any before. Former ones stay until the object goes: graphs
 * that were captured use what they have.
 * SPDX-License-Identifier: Apache-2.0 */
#include "context_object.h"
#include "sampling_arguments.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_STAGES = 16, MAX_PARAMS = 40 };

/* A pipe of one context. */
typedef struct made_pipe {
    struct made_pipe *next;
    qkv_logits_pipe *pipe;
    PyObject *owner; /* of ctx, NULL for a default context, which stays */
    qkv_context *ctx;
    int64_t max_batch, max_vocab;
} made_pipe;

typedef struct pipe_object {
    PyObject_HEAD qkv_stage stages[MAX_STAGES];
    qkv_logits_pipe_spec spec;
    PyObject *texts; /* list: owns the strings of stages */
    made_pipe *made; /* newest first */
    pthread_mutex_t lock;
} pipe_object;

static PyTypeObject *pipe_type;

/* ---- making --------------------------------------------------------------------------------------- */

enum { NEW_STAGES, NEW_KIND, NEW_UNFUSED };
static signature pipe_signature = {
    .text = "LogitsPipe(stages, *, kind=\"logits\", unfused=False)\n--\n\n"
            "Stages that run as one kernel, qkv_logits_pipe of qkv/sampling.h.\n\n"
            "stages: of each (kind, default, source, value_name, tensor_name), None for what it "
            "has not.\n"
            "kind: of the rows, \"logits\" or \"probs\". unfused: a kernel for each stage."};

/* Reads a text, which is then owned by the list. */
static int own_text(PyObject *list, PyObject *value, const char *name, const char **out)
{
    PyObject *keep;
    const int bad = read_text(value, name, out, &keep) || (keep && PyList_Append(list, keep));
    Py_XDECREF(keep);
    return bad ? -1 : 0;
}

static int read_stage(pipe_object *self, PyObject *value, qkv_stage *out)
{
    PyObject *fields[5];
    if (!PyTuple_Check(value) || PyTuple_Size(value) != 5) {
        PyErr_Format(PyExc_TypeError, "stages: expected tuples of 5, got %R", value);
        return -1;
    }
    for (int i = 0; i < 5; i++) fields[i] = PyTuple_GetItem(value, i);
    *out = (qkv_stage){QKV_STAGE_INIT, .has_default = !absent(fields[1])};
    return read_word(fields[0], "stages.kind", &out->kind, "repetition", "frequency", "presence",
                     "bias", "bitmask", "user", "temperature", "top_n_sigma", "softmax", "top_k",
                     "top_p", "min_p", "typical_p", "sample", NULL) ||
                   read_f32(fields[1], "stages.default", &out->default_value) ||
                   own_text(self->texts, fields[2], "stages.source", &out->source) ||
                   own_text(self->texts, fields[3], "stages.value_name", &out->value_name) ||
                   own_text(self->texts, fields[4], "stages.tensor_name", &out->tensor_name)
               ? -1
               : 0;
}

static int read_stages(pipe_object *self, PyObject *value)
{
    PyObject *list = PySequence_Tuple(value);
    if (!list) return -1;
    const Py_ssize_t num = PyTuple_Size(list);
    int bad = num < 1 || num > MAX_STAGES;
    if (bad) {
        raise_error(QKV_ERR_INVALID, "stages: expected 1 to %d in a row, got %zd", MAX_STAGES, num);
    }
    for (Py_ssize_t i = 0; i < num && !bad; i++) {
        bad = read_stage(self, PyTuple_GetItem(list, i), &self->stages[i]);
    }
    Py_DECREF(list);
    self->spec.num_stages = (int32_t)num;
    self->spec.stages = self->stages;
    return bad ? -1 : 0;
}

static PyObject *pipe_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *v[NEW_UNFUSED + 1];
    if (read_call_dict(&pipe_signature, args, kwargs, v)) return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    pipe_object *self = (pipe_object *)alloc(type, 0);
    if (!self) return NULL;
    pthread_mutex_init(&self->lock, NULL);
    self->spec = (qkv_logits_pipe_spec){QKV_LOGITS_PIPE_SPEC_INIT};
    self->texts = PyList_New(0);
    if (self->texts && !read_stages(self, v[NEW_STAGES]) &&
        !read_word(v[NEW_KIND], "kind", &self->spec.kind, "logits", "probs", NULL) &&
        !read_flag(v[NEW_UNFUSED], "unfused", &self->spec.unfused)) {
        return (PyObject *)self;
    }
    Py_DECREF((PyObject *)self);
    return NULL;
}

static void pipe_dealloc(PyObject *object)
{
    pipe_object *self = (pipe_object *)object;
    for (made_pipe *at = self->made, *next; at; at = next) {
        next = at->next;
        qkv_logits_pipe_destroy(at->pipe);
        Py_XDECREF(at->owner);
        free(at);
    }
    pthread_mutex_destroy(&self->lock);
    Py_XDECREF(self->texts);
    free_object(object);
}

/* Finds or makes the pipe for a context and so many rows of such a length. *spare: has the context, and becomes
 * the new one, NULL, if it is needed. With self->lock, without the interpreter's. */
static qkv_status find_pipe(pipe_object *self, made_pipe **spare, int64_t batch, int64_t vocab,
                            qkv_logits_pipe **out)
{
    made_pipe *fresh = *spare;
    int64_t most = 0;
    for (made_pipe *at = self->made; at; at = at->next) {
        if (at->ctx != fresh->ctx) continue;
        if (vocab <= at->max_vocab && (!self->spec.unfused || batch <= at->max_batch)) {
            *out = at->pipe;
            return QKV_OK;
        }
        if (at->max_batch > most) most = at->max_batch;
    }
    /* Those before stay: by doubling, all together take twice the memory of the last. */
    qkv_logits_pipe_spec spec = self->spec;
    spec.max_batch = batch > 2 * most || !spec.unfused ? batch : 2 * most;
    spec.max_vocab = vocab;
    const qkv_status status = qkv_logits_pipe_create(fresh->ctx, &spec, &fresh->pipe);
    if (status) return status;
    fresh->max_batch = spec.max_batch;
    fresh->max_vocab = spec.max_vocab;
    fresh->next = self->made;
    self->made = fresh;
    *spare = NULL;
    *out = fresh->pipe;
    return QKV_OK;
}

/* ---- running -------------------------------------------------------------------------------------- */

enum { RUN_ROWS, RUN_PARAMS, RUN_OUT, RUN_CTX, RUN_STREAM };
static signature run_signature = {
    .text = "run($self, rows, params, *, out=None, ctx=None, stream=None)\n--\n\n"
            "Rows through the stages.\n\n"
            "rows: [batch, vocab] f32, f16 or bf16. params: a dict by name; also indices and "
            "valid, as of\n"
            "sample(). out: i32 [batch] of a pipe that samples, else f32, f16 or bf16 [batch, "
            "vocab], f32 if\n"
            "None.\n" COMMON "Returns out, or (out, valid) if valid is wanted."};

static DLDataType dtype_of_parameter(const char *name)
{
    static const char *const whole[] = {"top_k", "counts", "prompt", "bitmask", "indices"};
    if (strcmp(name, "seed") == 0 || strcmp(name, "offset") == 0) return QKV_U64;
    for (size_t i = 0; i < sizeof whole / sizeof whole[0]; i++) {
        if (strcmp(name, whole[i]) == 0) return QKV_I32;
    }
    return QKV_F32;
}

typedef struct pipe_params {
    qkv_named_tensor of[MAX_PARAMS];
    int32_t num;
    tensor *indices;
    PyObject *valid;
} pipe_params;

/* All but valid, which is made when the batch is known. Names live as long as the dict. */
static void read_params(call *c, PyObject *dict, pipe_params *p)
{
    p->num = 0;
    p->indices = NULL;
    p->valid = NULL;
    if (!c->failed && !PyDict_Check(dict)) {
        PyErr_Format(PyExc_TypeError, "params: expected a dict, got %R", dict);
        c->failed = 1;
    }
    PyObject *key, *value;
    for (Py_ssize_t at = 0; !c->failed && PyDict_Next(dict, &at, &key, &value);) {
        const char *name = PyUnicode_Check(key) ? PyUnicode_AsUTF8AndSize(key, NULL) : NULL;
        if (!name || p->num + 1 >= MAX_PARAMS) {
            if (!PyErr_Occurred())
                PyErr_Format(PyExc_TypeError, "params: expected at most %d names, got %R",
                             MAX_PARAMS - 1, key);
            c->failed = 1;
        } else if (strcmp(name, "valid") == 0) {
            p->valid = value;
        } else if (!absent(value)) {
            tensor *t = number_or_array(c, value, name, dtype_of_parameter(name));
            if (strcmp(name, "indices") == 0) p->indices = t;
            p->of[p->num++] = (qkv_named_tensor){.name = name, .tensor = dl(t)};
        }
    }
}

static PyObject *pipe_run(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *kwnames)
{
    pipe_object *self = (pipe_object *)object;
    PyObject *v[RUN_STREAM + 1];
    if (read_call(&run_signature, args, nargs, kwnames, v)) return NULL;
    call c;
    tensor slots[MAX_PARAMS + 2];
    begin_call(&c, slots, MAX_PARAMS + 2, v[RUN_CTX], v[RUN_STREAM]);
    tensor *rows = array(&c, v[RUN_ROWS], "rows");
    if (rows && rows->dl.ndim != 2) {
        raise_error(QKV_ERR_INVALID, "rows: expected [batch, vocab], got %d axes", rows->dl.ndim);
        c.failed = 1;
    }
    pipe_params params;
    read_params(&c, v[RUN_PARAMS], &params);
    const int64_t shape[2] = {size_of(params.indices ? params.indices : rows, 0), size_of(rows, 1)};
    tensor *valid = valid_output(&c, params.valid, shape[0]);
    if (valid) params.of[params.num++] = (qkv_named_tensor){.name = "valid", .tensor = dl(valid)};
    const int samples = self->stages[self->spec.num_stages - 1].kind == QKV_STAGE_SAMPLE;
    tensor *out =
        output(&c, v[RUN_OUT], "out", samples ? QKV_I32 : QKV_F32, samples ? 1 : 2, shape);
    made_pipe *spare = NULL;
    if (ready(&c)) {
        spare = calloc(1, sizeof *spare);
        if (!spare) c.failed = 1, PyErr_NoMemory();
    }
    if (!c.failed) {
        spare->ctx = c.ctx;
        spare->owner = absent(v[RUN_CTX]) ? NULL : v[RUN_CTX];
        Py_XINCREF(spare->owner);
        qkv_status status;
        qkv_logits_pipe *pipe;
        /* Of an unfused pipe, whose rows between stages are its own, threads take turns. */
        UNLOCKED(pthread_mutex_lock(&self->lock);
                 status = find_pipe(self, &spare, shape[0], shape[1], &pipe);
                 if (!self->spec.unfused) pthread_mutex_unlock(&self->lock);
                 if (!status) status =
                     qkv_logits_pipe_run(pipe, dl(out), dl(rows), params.of, params.num, c.stream);
                 if (self->spec.unfused) pthread_mutex_unlock(&self->lock));
        if (status) c.failed = 1, raise_status(status);
    }
    if (spare) Py_XDECREF(spare->owner);
    free(spare);
    return end_call_wanted(&c, out, valid);
}

/* ---- module --------------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    METHOD("run", pipe_run),
    {NULL, NULL, 0, NULL},
};
static signature *const method_signatures[] = {&run_signature};

int add_logits_pipe(PyObject *module)
{
    if (read_signature(&pipe_signature) || read_methods(methods, method_signatures)) return -1;
    if (!pipe_type) {
        PyType_Slot slots[] = {
            {Py_tp_doc, (void *)(uintptr_t)pipe_signature.text},
            {Py_tp_new, pipe_new},
            {Py_tp_dealloc, pipe_dealloc},
            {Py_tp_methods, methods},
            {0, NULL},
        };
        PyType_Spec spec = {.name = "qkv._native.LogitsPipe",
                            .basicsize = sizeof(pipe_object),
                            .flags = Py_TPFLAGS_DEFAULT,
                            .slots = slots};
        pipe_type = (PyTypeObject *)PyType_FromSpec(&spec);
        if (!pipe_type) return -1;
    }
    return PyModule_AddObjectRef(module, "LogitsPipe", (PyObject *)pipe_type);
}
