/* attention_object.c - qkv.attention.Attention: create, plan, run; and merge, can_run, workspace_size.
 *
 * The object has references to what the C operator borrows beyond a call: its context, mask_bits and
 * bsr arrays of the plan in force, on a GPU all arrays of it, and, for its whole life, those of plans and
 * runs that were captured into a graph, which may be replayed at any time.
 * One thread uses an operator at a time: others wait, without the interpreter's lock.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_arguments.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

typedef struct attention_object {
    PyObject_HEAD qkv_attention *op;
    context_object *ctx;
    pthread_mutex_t in_use;
    PyObject *borrowed;    /* list: of the plan in force */
    PyObject *captured;    /* list: of plans in graphs, and of runs there */
    PyObject *param_names; /* tuple: of the variant */
    int32_t num_qo_heads, head_dim_vo;
    DLDataType dtype_o;
    int32_t num_params, param_types[MAX_PARAMS];
    void *last_stream; /* of the last plan or run; on a GPU */
    int has_planned;
} attention_object;

static PyTypeObject *attention_type;

/* Is the stream being captured into a graph? Asked of the driver, which is loaded where a GPU is used. */
static int is_capturing(void *stream)
{
    static _Atomic(void *) found;
    void *symbol = atomic_load_explicit(&found, memory_order_relaxed);
    if (!symbol) {
        void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
        symbol = driver ? dlsym(driver, "cuStreamIsCapturing") : NULL;
        if (driver) dlclose(driver); /* others keep it */
        if (!symbol) return 0;
        atomic_store_explicit(&found, symbol, memory_order_relaxed);
    }
    int (*query)(void *stream, int *status);
    memcpy(&query, &symbol, sizeof query);
    int status = 0;
    return query(stream, &status) == 0 && status != 0;
}

/* ---- create --------------------------------------------------------------------------------------- */

#define OPERATOR_DOC                                                                               \
    "num_qo_heads: 1 to 512 times num_kv_heads. head_dim_qk, head_dim_vo: multiples of 8 up to "   \
    "512, vo as\n"                                                                                 \
    "qk if None. page_size: tokens a page, 0 = ragged, no pages. kv_layout: \"NHD\" or \"HND\". "  \
    "mask:\n"                                                                                      \
    "\"none\", \"causal\" or \"custom\". dtypes: \"f32\", \"f16\", \"bf16\", \"e4m3\", \"e5m2\", " \
    "for KV \"i8\" too, or\n"                                                                      \
    "the framework's own; None = dtype_q. sm_scale: None = 1 / sqrt(head_dim_qk). "                \
    "logits_soft_cap: 0 =\n"                                                                       \
    "none. window_left, window_right: keys visible beside the row's own, -1 = all. alibi, sink: "  \
    "every run\n"                                                                                  \
    "brings alibi_slopes, sink. rope: a qkv.Rope; the cache holds keys that are not rotated yet. " \
    "variant:\n"                                                                                   \
    "a qkv.Variant. batch_invariant: a request's bits depend on nothing but the request. "         \
    "lse_base_2: lse\n"                                                                            \
    "in base 2. only_appends: the promise that from plan to its last run only the keys and "       \
    "values of the\n"                                                                              \
    "batch's rows are written; a GPU may then read older ones early. max_...: how large a step "   \
    "can get;\n"                                                                                   \
    "see qkv_attention_limits. ctx: a qkv.Context, None =\n"                                       \
    "the default one of device.\n"

static signature attention_signature = {
    .text = "Attention(" OPERATOR_PARAMETERS ")\n--\n\n"
            "Attention of rows of queries over lists of KV pages; see qkv/attention.h.\n\n"
            "Made once a model; plan() once a step; run() once a layer.\n\n" OPERATOR_DOC};

static int set_params(attention_object *self, const operator_spec *op)
{
    self->num_params = op->variant.num_params;
    self->param_names = PyTuple_New(self->num_params);
    for (int i = 0; self->param_names && i < self->num_params; i++) {
        self->param_types[i] = op->params[i].type;
        PyObject *name = PyUnicode_FromString(op->params[i].name);
        if (!name || PyTuple_SetItem(self->param_names, i, name)) return -1;
    }
    return self->param_names ? 0 : -1;
}

static PyObject *attention_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *v[NUM_OP];
    if (read_call_dict(&attention_signature, args, kwargs, v)) return NULL;
    operator_spec op;
    attention_object *self = NULL;
    if (read_operator(v, &op)) goto out;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    self = (attention_object *)alloc(type, 0);
    if (!self) goto out;
    pthread_mutex_init(&self->in_use, NULL);
    Py_INCREF((PyObject *)op.ctx);
    self->ctx = op.ctx;
    self->num_qo_heads = op.spec.num_qo_heads;
    self->head_dim_vo = op.spec.head_dim_vo;
    self->dtype_o = op.spec.dtype_o;
    self->borrowed = PyList_New(0);
    self->captured = PyList_New(0);
    qkv_status status = QKV_OK;
    if (self->borrowed && self->captured) {
        UNLOCKED(status = qkv_attention_create(op.ctx->ctx, &op.spec, &op.limits, NULL, &self->op));
        if (status) raise_status(status);
    }
    if (!self->op || set_params(self, &op)) {
        Py_DECREF((PyObject *)self);
        self = NULL;
    }
out:
    free_operator(&op);
    return (PyObject *)self;
}

static int attention_traverse(PyObject *object, visitproc visit, void *arg)
{
    attention_object *self = (attention_object *)object;
    Py_VISIT((PyObject *)Py_TYPE(object));
    Py_VISIT(self->borrowed);
    Py_VISIT(self->captured);
    return 0;
}

/* Work on a GPU that still runs needs the operator's memory and its arrays: it is waited for, unless it was
 * captured, when nothing runs. */
static void attention_dealloc(PyObject *object)
{
    attention_object *self = (attention_object *)object;
    PyObject_GC_UnTrack(object);
    if (self->has_planned && self->ctx->device.device_type == kDLCUDA &&
        !is_capturing(self->last_stream)) {
        UNLOCKED(qkv_attention_status(self->op, self->last_stream));
    }
    qkv_attention_destroy(self->op);
    pthread_mutex_destroy(&self->in_use);
    Py_XDECREF(self->borrowed);
    Py_XDECREF(self->captured);
    Py_XDECREF(self->param_names);
    Py_XDECREF((PyObject *)self->ctx);
    free_object(object);
}

/* ---- plan ----------------------------------------------------------------------------------------- */

enum {
    PLAN_LEVEL, /* the names of a level come first */
    PLAN_LEVELS = NUM_LEVEL,
    PLAN_QO_POS,
    PLAN_MASK_BITS,
    PLAN_MASK_INDPTR,
    PLAN_DETECT,
    PLAN_MAX_TOKENS,
    PLAN_STREAM,
    NUM_PLAN
};
#define LEVEL_PARAMETERS                                                                           \
    "qo_indptr=None, kv_indptr=None, kv_indices=None, kv_last_page_len=None, block_table=None, "   \
    "kv_lens=None, bsr_rows=0, bsr_cols=0, bsr_indptr=None, bsr_indices=None, bsr_mask=None"
static signature level_signature = {.text = "level(*, " LEVEL_PARAMETERS ")"};
static signature plan_signature = {
    .text = "plan($self, *, " LEVEL_PARAMETERS ", levels=None, qo_pos=None, mask_bits=None, "
            "mask_indptr=None, detect_shared_prefix=False, max_tokens=0, stream=None)\n--\n\n"
            "Takes one step's lengths and page tables, checks them and cuts the work.\n\n"
            "Arrays are i32, all on the host (of any framework, or lists), or all on the GPU.\n"
            "qo_indptr: [requests + 1] offsets into q's rows. Where the keys are, one of:\n"
            "  kv_indptr [requests + 1], kv_indices [pages], kv_last_page_len [requests]\n"
            "  block_table [requests, columns], kv_lens [requests]\n"
            "  kv_indptr [requests + 1] alone (page_size=0): offsets into k and v\n"
            "bsr_...: only listed blocks of each request's matrix exist. bsr_indptr: [1 or "
            "num_kv_heads,\n"
            "row_blocks + 1]; bsr_indices: column blocks; bsr_mask: u8, bits of each block.\n"
            "levels: a list of dicts of the above, shared keys first, instead of the above.\n"
            "qo_pos: [requests] position of each request's first row. mask_bits: u8 [bytes], with\n"
            "mask=\"custom\"; mask_indptr: i64 [requests + 1] offsets in bytes. "
            "detect_shared_prefix: requests\n"
            "whose page lists begin alike share levels. max_tokens: arrays on a GPU, whose rows "
            "are not\n"
            "known here: at most so many. stream: a handle, None = the current one.\n"
            "A failed plan leaves the former one in force."};

static int has_level(PyObject *const *v)
{
    for (int i = 0; i < NUM_LEVEL; i++) {
        if (!absent(v[i]) && i != LEVEL_BSR_ROWS && i != LEVEL_BSR_COLS) return 1;
    }
    return 0;
}

/* What the plan borrows: on the host mask and blocks, on a GPU everything. */
static PyObject *borrowed_of(call *c, const level_tensors *levels, int num_levels,
                             tensor *mask_bits)
{
    PyObject *list = PyList_New(0);
    int bad = !list;
    int on_gpu = 0;
    for (int i = 0; i < c->num_tensors; i++) {
        on_gpu |= c->tensors[i].dl.device.device_type == kDLCUDA;
    }
    for (int i = 0; i < c->num_tensors && on_gpu && !bad; i++)
        bad = keep_alive(list, &c->tensors[i]);
    for (int i = 0; i < num_levels && !on_gpu && !bad; i++) {
        bad = keep_alive(list, levels[i].of[LEVEL_BSR_INDICES]) ||
              keep_alive(list, levels[i].of[LEVEL_BSR_MASK]);
    }
    if (!on_gpu && !bad) bad = keep_alive(list, mask_bits);
    if (!bad) return list;
    Py_XDECREF(list);
    c->failed = 1;
    return NULL;
}

/* A graph keeps the addresses of the plan in force. With the operator and the interpreter locked. */
static int keep_captured(attention_object *self)
{
    const Py_ssize_t num = PyList_Size(self->captured);
    if (num && PyList_GetItem(self->captured, num - 1) == self->borrowed) return 0;
    return PyList_Append(self->captured, self->borrowed);
}

enum { MAX_LEVELS = 64 };

/* A list of copies of the dicts: other threads may change theirs. */
static PyObject *copy_levels(PyObject *value)
{
    PyObject *list = PySequence_List(value);
    const Py_ssize_t num = list ? PyList_Size(list) : 0;
    for (Py_ssize_t i = 0; i < num; i++) {
        PyObject *level = PyList_GetItem(list, i), *copy = NULL;
        if (PyDict_Check(level))
            copy = PyDict_Copy(level);
        else
            PyErr_Format(PyExc_TypeError, "levels: expected dicts, got %R", level);
        if (!copy) {
            Py_DECREF(list);
            return NULL;
        }
        PyList_SetItem(list, i, copy);
    }
    return list;
}

static PyObject *attention_plan(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                                PyObject *kwnames)
{
    attention_object *self = (attention_object *)object;
    PyObject *v[NUM_PLAN], *of_level[NUM_LEVEL];
    qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1};
    if (read_call(&plan_signature, args, nargs, kwnames, v) ||
        read_flag(v[PLAN_DETECT], "detect_shared_prefix", &batch.detect_shared_prefix) ||
        read_i32(v[PLAN_MAX_TOKENS], "max_tokens", &batch.max_tokens)) {
        return NULL;
    }
    PyObject *levels = NULL;
    if (!absent(v[PLAN_LEVELS])) {
        if (has_level(v)) {
            return raise_error(
                QKV_ERR_INVALID,
                "levels: expected without qo_indptr and the like, which stand in them");
        }
        levels = copy_levels(v[PLAN_LEVELS]);
        if (!levels) return NULL;
        const Py_ssize_t num = PyList_Size(levels);
        if (num < 1 || num > MAX_LEVELS) {
            Py_DECREF(levels);
            return raise_error(QKV_ERR_INVALID, "levels: expected 1 to %d, got %zd", MAX_LEVELS,
                               num);
        }
        batch.num_levels = (int32_t)num;
    } else if (absent(v[LEVEL_QO_INDPTR])) {
        PyErr_SetString(PyExc_TypeError, "plan() misses the argument 'qo_indptr'");
        return NULL;
    }

    /* One level, the common case, needs no memory of its own. */
    const int capacity = batch.num_levels * LEVEL_ARRAYS + 3;
    tensor one[LEVEL_ARRAYS + 3], *slots = one;
    qkv_kv_index one_index, *indices = &one_index;
    level_tensors one_level = {{NULL}}, *tensors = &one_level;
    void *memory = NULL;
    if (batch.num_levels > 1) {
        const size_t bytes = (size_t)capacity * sizeof *slots +
                             (size_t)batch.num_levels * (sizeof *indices + sizeof *tensors);
        slots = memory = PyMem_Calloc(1, bytes);
        if (!memory) {
            Py_XDECREF(levels);
            return PyErr_NoMemory();
        }
        indices = (qkv_kv_index *)(slots + capacity);
        tensors = (level_tensors *)(indices + batch.num_levels);
    }
    call c;
    begin_call(&c, slots, capacity, NULL, v[PLAN_STREAM]);
    for (int i = 0; i < batch.num_levels && !c.failed; i++) {
        if (levels)
            c.failed = read_call_dict(&level_signature, NULL, PyList_GetItem(levels, i), of_level);
        if (!c.failed)
            read_level(&c, self->ctx->device, levels ? of_level : v, &indices[i], &tensors[i]);
    }
    batch.levels = indices;
    batch.qo_pos = dl(optional_array_or_list(&c, v[PLAN_QO_POS], "qo_pos", QKV_I32));
    tensor *mask_bits = optional_array_or_list(&c, v[PLAN_MASK_BITS], "mask_bits", QKV_U8);
    if (self->ctx->device.device_type == kDLCUDA) share_pinned(mask_bits);
    batch.mask_bits = dl(mask_bits);
    batch.mask_indptr = dl(optional_array_or_list(&c, v[PLAN_MASK_INDPTR], "mask_indptr", QKV_I64));

    PyObject *borrowed = NULL;
    if (ready_on(&c, self->ctx->ctx, self->ctx->device)) {
        borrowed = borrowed_of(&c, tensors, batch.num_levels, mask_bits);
    }
    const int capturing =
        !c.failed && self->ctx->device.device_type == kDLCUDA && is_capturing(c.stream);
    if (!c.failed) {
        qkv_status status;
        UNLOCKED(pthread_mutex_lock(&self->in_use);
                 status = qkv_attention_plan(self->op, &batch, c.stream));
        if (!status) { /* under both locks: plan and list change together, out of the collector's sight */
            PyObject *former = self->borrowed;
            self->borrowed = borrowed;
            borrowed = former;
            self->last_stream = c.stream;
            self->has_planned = 1;
            if (capturing && keep_captured(self)) c.failed = 1;
        }
        pthread_mutex_unlock(&self->in_use);
        if (status) c.failed = 1, raise_status(status);
    }
    Py_XDECREF(borrowed);
    PyObject *result = end_call(&c, NULL);
    Py_XDECREF(levels);
    PyMem_Free(memory);
    return result;
}

/* ---- run ------------------------------------------------------------------------------------------ */

enum {
    RUN_Q,
    RUN_K,
    RUN_V,
    RUN_O,
    RUN_LSE,
    RUN_SM_SCALE,
    RUN_SOFT_CAP,
    RUN_WINDOW,
    RUN_Q_SCALE,
    RUN_K_SCALE,
    RUN_V_SCALE,
    RUN_O_SCALE,
    RUN_SINK,
    RUN_ALIBI,
    RUN_ARGS,
    RUN_STREAM,
    NUM_RUN
};
static signature run_signature = {
    .text = "run($self, q, k, v=None, *, o=None, lse=None, sm_scale=0.0, logits_soft_cap=0.0, "
            "window=None, "
            "q_scale=None, k_scale=None, v_scale=None, o_scale=None, sink=None, alibi_slopes=None, "
            "args=(), stream=None)\n--\n\n"
            "Computes one layer under the current plan.\n\n"
            "q: [tokens, num_qo_heads, head_dim_qk]. k, v: [pages, page_size, num_kv_heads, "
            "head_dim] or\n"
            "[pages, num_kv_heads, page_size, head_dim] by kv_layout, ragged without the pages "
            "axis; v\n"
            "None: k is [pages, 2, ...] and holds both. o: [tokens, num_qo_heads, head_dim_vo], "
            "made if\n"
            "None. lse: True, or f32 [tokens, num_qo_heads]: wanted too.\n"
            "sm_scale, logits_soft_cap: this layer's, 0 = the operator's; window: (left, right), "
            "within the\n"
            "operator's. q_scale, ...: a number, or f32 [1] or [heads]: what a stored element is "
            "multiplied\n"
            "by. sink, alibi_slopes: f32 [num_qo_heads]. args: the variant's, a sequence in order "
            "or a dict\n"
            "by name. stream: a handle, None = the current one.\n"
            "Returns o, or (o, lse) if lse is wanted."};

static int read_window(PyObject *value, qkv_attention_io *io)
{
    if (absent(value)) return 0;
    PyObject *pair = PySequence_Tuple(value);
    int bad = !pair;
    if (pair && PyTuple_Size(pair) != 2) {
        raise_error(QKV_ERR_INVALID, "window: expected (left, right)");
        bad = 1;
    }
    bad = bad || read_i32(PyTuple_GetItem(pair, 0), "window", &io->window_left) ||
          read_i32(PyTuple_GetItem(pair, 1), "window", &io->window_right);
    Py_XDECREF(pair);
    io->set_window = 1;
    return bad ? -1 : 0;
}

/* The arguments of the variant as a tuple in the order of its parameters: a new reference. */
static PyObject *order_args(const attention_object *self, PyObject *value)
{
    if (absent(value)) return PyTuple_New(0);
    if (!PyDict_Check(value)) return PySequence_Tuple(value);
    PyObject *ordered = PyTuple_New(self->num_params);
    for (int i = 0; ordered && i < self->num_params; i++) {
        PyObject *name = PyTuple_GetItem(self->param_names, i);
        PyObject *arg = PyObject_GetItem(value, name);
        if (!arg) {
            PyErr_Format(PyExc_TypeError, "args: expected one for %R", name);
            Py_DECREF(ordered);
            return NULL;
        }
        PyTuple_SetItem(ordered, i, arg);
    }
    if (ordered && PyDict_Size(value) != self->num_params) {
        PyErr_Format(PyExc_TypeError, "args: expected %R alone, got %R", self->param_names, value);
        Py_DECREF(ordered);
        return NULL;
    }
    return ordered;
}

static void read_args(call *c, const attention_object *self, PyObject *ordered, qkv_arg *out)
{
    if (c->failed) return;
    if (PyTuple_Size(ordered) != self->num_params) {
        raise_error(QKV_ERR_INVALID, "args: expected %d for the variant, got %zd", self->num_params,
                    PyTuple_Size(ordered));
        c->failed = 1;
    }
    for (int i = 0; i < self->num_params && !c->failed; i++) {
        PyObject *value = PyTuple_GetItem(ordered, i);
        PyObject *name = PyTuple_GetItem(self->param_names, i);
        const char *text = PyUnicode_AsUTF8AndSize(name, NULL);
        out[i] = (qkv_arg){0};
        if (!text) {
            c->failed = 1;
        } else if (self->param_types[i] == QKV_PARAM_TENSOR) {
            out[i].tensor = dl(array(c, value, text));
        } else if (absent(value)) {
            PyErr_Format(PyExc_TypeError, "args: expected a number for %U, got None", name);
            c->failed = 1;
        } else if (self->param_types[i] == QKV_PARAM_F32) {
            c->failed = read_f32(value, text, &out[i].f32);
        } else {
            c->failed = read_i32(value, text, &out[i].i32);
        }
    }
}

static PyObject *attention_run(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                               PyObject *kwnames)
{
    attention_object *self = (attention_object *)object;
    PyObject *v[NUM_RUN];
    qkv_attention_io io = {QKV_ATTENTION_IO_INIT};
    if (read_call(&run_signature, args, nargs, kwnames, v) ||
        read_f32(v[RUN_SM_SCALE], "sm_scale", &io.sm_scale) ||
        read_f32(v[RUN_SOFT_CAP], "logits_soft_cap", &io.logits_soft_cap) ||
        read_window(v[RUN_WINDOW], &io)) {
        return NULL;
    }
    PyObject *ordered = order_args(self, v[RUN_ARGS]);
    if (!ordered) return NULL;
    call c;
    tensor slots[11 + MAX_PARAMS];
    qkv_arg of_variant[MAX_PARAMS];
    begin_call(&c, slots, 11 + MAX_PARAMS, NULL, v[RUN_STREAM]);
    tensor *q = array(&c, v[RUN_Q], "q");
    io.q = dl(q);
    io.k = dl(array(&c, v[RUN_K], "k"));
    io.v = dl(optional_array(&c, v[RUN_V], "v"));
    const int64_t shape[] = {q && q->dl.ndim ? q->dl.shape[0] : 0, self->num_qo_heads,
                             self->head_dim_vo};
    tensor *o = output(&c, v[RUN_O], "o", self->dtype_o, 3, shape);
    tensor *lse = wanted_output(&c, v[RUN_LSE], "lse", QKV_F32, 2, shape);
    io.o = dl(o);
    io.lse = dl(lse);
    read_scale(&c, v[RUN_Q_SCALE], "q_scale", &io.q_scale);
    read_scale(&c, v[RUN_K_SCALE], "k_scale", &io.k_scale);
    read_scale(&c, v[RUN_V_SCALE], "v_scale", &io.v_scale);
    read_scale(&c, v[RUN_O_SCALE], "o_scale", &io.o_scale);
    io.sink = dl(optional_array_or_list(&c, v[RUN_SINK], "sink", QKV_F32));
    io.alibi_slopes = dl(optional_array_or_list(&c, v[RUN_ALIBI], "alibi_slopes", QKV_F32));
    read_args(&c, self, ordered, of_variant);
    io.num_args = self->num_params;
    io.args = of_variant;
    if (ready_on(&c, self->ctx->ctx, self->ctx->device)) {
        qkv_status status;
        UNLOCKED(pthread_mutex_lock(&self->in_use);
                 status = qkv_attention_run(self->op, &io, c.stream));
        self->last_stream = c.stream;
        if (!status && self->ctx->device.device_type == kDLCUDA && PyList_Size(self->borrowed) &&
            is_capturing(c.stream) && keep_captured(self)) {
            c.failed = 1;
        }
        pthread_mutex_unlock(&self->in_use);
        if (status) c.failed = 1, raise_status(status);
    }
    Py_DECREF(ordered);
    return end_call_wanted(&c, o, lse);
}

enum { STATUS_STREAM };
static signature status_signature = {
    .text =
        "status($self, stream=None)\n--\n\n"
        "Waits for the stream; raises if the last plan of arrays on a GPU was outside the limits."};

static PyObject *attention_status(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                                  PyObject *kwnames)
{
    attention_object *self = (attention_object *)object;
    PyObject *v[1];
    if (read_call(&status_signature, args, nargs, kwnames, v)) return NULL;
    call c;
    begin_call(&c, NULL, 0, NULL, v[STATUS_STREAM]);
    if (ready_on(&c, self->ctx->ctx, self->ctx->device)) {
        qkv_status status;
        UNLOCKED(pthread_mutex_lock(&self->in_use);
                 status = qkv_attention_status(self->op, c.stream);
                 pthread_mutex_unlock(&self->in_use));
        if (status) c.failed = 1, raise_status(status);
    }
    return end_call(&c, NULL);
}

static PyObject *get_ctx(PyObject *object, void *unused)
{
    (void)unused;
    PyObject *ctx = (PyObject *)((attention_object *)object)->ctx;
    Py_INCREF(ctx);
    return ctx;
}

/* ---- functions beside it -------------------------------------------------------------------------- */

static signature can_run_signature = {
    .text = "can_run(" OPERATOR_PARAMETERS ")\n--\n\n"
            "Which kernels take such an Attention, and why the others do not: a line each.\n\n"
            "Raises UnsupportedError if none does. Parameters as of Attention."};

static PyObject *can_run(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                         PyObject *kwnames)
{
    (void)module;
    PyObject *v[NUM_OP], *result = NULL;
    if (read_call(&can_run_signature, args, nargs, kwnames, v)) return NULL;
    operator_spec op;
    if (!read_operator(v, &op)) {
        char reasons[8192] = "";
        qkv_status status;
        UNLOCKED(status = qkv_attention_can_run(op.ctx->ctx, &op.spec, &op.limits, reasons,
                                                sizeof reasons));
        result = status ? raise_status(status) : PyUnicode_FromString(reasons);
    }
    free_operator(&op);
    return result;
}

static signature workspace_size_signature = {
    .text = "workspace_size(" OPERATOR_PARAMETERS ")\n--\n\n"
            "The exact memory of such an Attention in bytes: (plan, scratch, pinned).\n\n"
            "Parameters as of Attention."};

static PyObject *workspace_size(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                PyObject *kwnames)
{
    (void)module;
    PyObject *v[NUM_OP], *result = NULL;
    if (read_call(&workspace_size_signature, args, nargs, kwnames, v)) return NULL;
    operator_spec op;
    if (!read_operator(v, &op)) {
        qkv_workspace_size size;
        qkv_status status;
        UNLOCKED(status = qkv_attention_workspace_size(op.ctx->ctx, &op.spec, &op.limits, &size));
        result = status ? raise_status(status)
                        : Py_BuildValue("(KKK)", (unsigned long long)size.plan_bytes,
                                        (unsigned long long)size.scratch_bytes,
                                        (unsigned long long)size.pinned_bytes);
    }
    free_operator(&op);
    return result;
}

enum {
    MERGE_O_STATES,
    MERGE_LSE_STATES,
    MERGE_BASE_2,
    MERGE_O,
    MERGE_LSE,
    MERGE_CTX,
    MERGE_STREAM
};
enum { MAX_STATES = 64 };
static signature merge_signature = {
    .text =
        "merge(o_states, lse_states, *, base_2=False, o=None, lse=None, ctx=None, "
        "stream=None)\n--\n\n"
        "Combines attention over parts of the keys into attention over all of them.\n\n"
        "o_states: 1 to 64 arrays [tokens, heads, dim] f32, f16 or bf16. lse_states: as many f32\n"
        "[tokens, heads], natural log, or with base_2 of base 2. o: like the first state, may be "
        "one of\n"
        "them; made if None. lse: True, or f32 [tokens, heads]: wanted too. A state of lse -inf "
        "counts\n"
        "for nothing. Returns o, or (o, lse) if lse is wanted."};

static PyObject *merge(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    (void)module;
    PyObject *v[MERGE_STREAM + 1];
    int32_t base_2 = 0;
    if (read_call(&merge_signature, args, nargs, kwnames, v) ||
        read_flag(v[MERGE_BASE_2], "base_2", &base_2)) {
        return NULL;
    }
    PyObject *o_list = PySequence_Tuple(v[MERGE_O_STATES]);
    PyObject *lse_list = o_list ? PySequence_Tuple(v[MERGE_LSE_STATES]) : NULL;
    if (!lse_list) {
        Py_XDECREF(o_list);
        return NULL;
    }
    const Py_ssize_t num = PyTuple_Size(o_list);
    call c;
    tensor slots[2 * MAX_STATES + 2];
    const DLTensor *o_states[MAX_STATES], *lse_states[MAX_STATES];
    begin_call(&c, slots, 2 * MAX_STATES + 2, v[MERGE_CTX], v[MERGE_STREAM]);
    if (num < 1 || num > MAX_STATES || PyTuple_Size(lse_list) != num) {
        raise_error(QKV_ERR_INVALID,
                    "lse_states: expected as many as o_states, 1 to %d, got %zd and %zd",
                    MAX_STATES, PyTuple_Size(lse_list), num);
        c.failed = 1;
    }
    for (Py_ssize_t i = 0; i < num && !c.failed; i++) {
        o_states[i] = dl(array(&c, PyTuple_GetItem(o_list, i), "o_states"));
        lse_states[i] = dl(array(&c, PyTuple_GetItem(lse_list, i), "lse_states"));
    }
    tensor *o = output_like(&c, v[MERGE_O], "o", &slots[0]), *lse = NULL;
    if (!c.failed) {
        const DLTensor *like = &slots[1].dl;
        lse = wanted_output(&c, v[MERGE_LSE], "lse", like->dtype, like->ndim, like->shape);
    }
    if (ready(&c)) {
        RUN(&c, qkv_attention_merge(c.ctx, dl(o), dl(lse), o_states, lse_states, (int32_t)num,
                                    base_2 ? QKV_ATTENTION_LSE_BASE_2 : 0, c.stream));
    }
    PyObject *result = end_call_wanted(&c, o, lse);
    Py_DECREF(o_list);
    Py_DECREF(lse_list);
    return result;
}

/* ---- module --------------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    METHOD("plan", attention_plan),
    METHOD("run", attention_run),
    METHOD("status", attention_status),
    {NULL, NULL, 0, NULL},
};
static signature *const method_signatures[] = {&plan_signature, &run_signature, &status_signature};
static PyMethodDef functions[] = {
    METHOD("can_run", can_run),
    METHOD("workspace_size", workspace_size),
    METHOD("merge", merge),
    {NULL, NULL, 0, NULL},
};
static signature *const signatures[] = {&can_run_signature, &workspace_size_signature,
                                        &merge_signature};
static PyGetSetDef getset[] = {
    {"ctx", get_ctx, NULL, "The qkv.Context that it was made from.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

int add_attention(PyObject *module)
{
    if (read_signature(&attention_signature) || read_signature(&level_signature) ||
        read_methods(methods, method_signatures)) {
        return -1;
    }
    if (!attention_type) {
        PyType_Slot slots[] = {
            {Py_tp_doc, (void *)(uintptr_t)attention_signature.text},
            {Py_tp_new, attention_new},
            {Py_tp_dealloc, attention_dealloc},
            {Py_tp_traverse, attention_traverse},
            {Py_tp_methods, methods},
            {Py_tp_getset, getset},
            {0, NULL},
        };
        PyType_Spec spec = {.name = "qkv.attention.Attention",
                            .basicsize = sizeof(attention_object),
                            .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                            .slots = slots};
        attention_type = (PyTypeObject *)PyType_FromSpec(&spec);
        if (!attention_type) return -1;
    }
    return PyModule_AddObjectRef(module, "Attention", (PyObject *)attention_type) ||
                   add_methods(module, functions, signatures)
               ? -1
               : 0;
}
