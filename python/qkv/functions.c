/* functions.c - the operators without state: norms, activation, RoPE, products, cache pages.
 * Each reads its arguments, makes its output and calls the C function of its name.
 * SPDX-License-Identifier: Apache-2.0 */
#include "arguments.h"
#include "attention_arguments.h"
#include "tensors.h"

/* ---- norms and activation ------------------------------------------------------------------------- */

enum {
    RMSNORM_X,
    RMSNORM_WEIGHT,
    RMSNORM_EPS,
    RMSNORM_BIAS,
    RMSNORM_OUT,
    RMSNORM_CTX,
    RMSNORM_STREAM
};
static signature rmsnorm_signature = {
    .text =
        "rmsnorm(x, weight, eps=1e-06, weight_bias=0.0, *, out=None, ctx=None, stream=None)\n--\n\n"
        "x / sqrt(mean(x^2) + eps) * (weight_bias + weight) over the last axis.\n\n"
        "x: [num_tokens, hidden_size] f32, f16 or bf16. weight: [hidden_size] f32 or x's dtype.\n"
        "weight_bias: 0 for Llama, 1 for Gemma. out: like x, may be x; made if None.\n" COMMON
        "Returns out."};

static PyObject *rmsnorm(ARGUMENTS)
{
    (void)module;
    PyObject *v[RMSNORM_STREAM + 1];
    float eps = 1e-6f, bias = 0;
    if (read_call(&rmsnorm_signature, args, nargs, kwnames, v) ||
        read_f32(v[RMSNORM_EPS], "eps", &eps) || read_f32(v[RMSNORM_BIAS], "weight_bias", &bias)) {
        return NULL;
    }
    call c;
    tensor slots[3];
    begin_call(&c, slots, 3, v[RMSNORM_CTX], v[RMSNORM_STREAM]);
    tensor *x = array(&c, v[RMSNORM_X], "x"), *weight = array(&c, v[RMSNORM_WEIGHT], "weight");
    tensor *out = output_like(&c, v[RMSNORM_OUT], "out", x);
    if (ready(&c)) RUN(&c, qkv_rmsnorm(c.ctx, dl(out), dl(x), dl(weight), eps, bias, c.stream));
    return end_call(&c, out);
}

enum { ADD_X, ADD_RESIDUAL, ADD_WEIGHT, ADD_EPS, ADD_BIAS, ADD_OUT, ADD_CTX, ADD_STREAM };
static signature add_rmsnorm_signature = {
    .text = "add_rmsnorm(x, residual, weight, eps=1e-06, weight_bias=0.0, *, out=None, ctx=None, "
            "stream=None)\n--\n\n"
            "residual += x in place; out = rmsnorm(residual), in one pass.\n\n"
            "x, residual: [num_tokens, hidden_size] of one dtype, f32, f16 or bf16. weight: "
            "[hidden_size]\n"
            "f32 or x's dtype. out: like x, may be x; made if None. " COMMON "Returns out."};

static PyObject *add_rmsnorm(ARGUMENTS)
{
    (void)module;
    PyObject *v[ADD_STREAM + 1];
    float eps = 1e-6f, bias = 0;
    if (read_call(&add_rmsnorm_signature, args, nargs, kwnames, v) ||
        read_f32(v[ADD_EPS], "eps", &eps) || read_f32(v[ADD_BIAS], "weight_bias", &bias)) {
        return NULL;
    }
    call c;
    tensor slots[4];
    begin_call(&c, slots, 4, v[ADD_CTX], v[ADD_STREAM]);
    tensor *x = array(&c, v[ADD_X], "x"),
           *residual = written_array(&c, v[ADD_RESIDUAL], "residual");
    tensor *weight = array(&c, v[ADD_WEIGHT], "weight");
    tensor *out = output_like(&c, v[ADD_OUT], "out", x);
    if (ready(&c)) {
        RUN(&c,
            qkv_add_rmsnorm(c.ctx, dl(out), dl(residual), dl(x), dl(weight), eps, bias, c.stream));
    }
    return end_call(&c, out);
}

enum { GATED_GATE, GATED_UP, GATED_KIND, GATED_OUT, GATED_CTX, GATED_STREAM };
static signature gated_activation_signature = {
    .text = "gated_activation(gate, up, kind=\"silu\", *, out=None, ctx=None, stream=None)\n--\n\n"
            "activation(gate) * up.\n\n"
            "gate, up: [num_tokens, size] of one dtype, f32, f16 or bf16; may be the halves of one "
            "wider\n"
            "array. kind: \"silu\", \"gelu\" or \"gelu_tanh\". out: [num_tokens, size], may be "
            "gate or up;\n"
            "made if None. " COMMON "Returns out."};

static PyObject *gated_activation(ARGUMENTS)
{
    (void)module;
    PyObject *v[GATED_STREAM + 1];
    int32_t kind = QKV_SILU;
    if (read_call(&gated_activation_signature, args, nargs, kwnames, v) ||
        read_word(v[GATED_KIND], "kind", &kind, "silu", "gelu", "gelu_tanh", NULL)) {
        return NULL;
    }
    call c;
    tensor slots[3];
    begin_call(&c, slots, 3, v[GATED_CTX], v[GATED_STREAM]);
    tensor *gate = array(&c, v[GATED_GATE], "gate"), *up = array(&c, v[GATED_UP], "up");
    tensor *out = output_like(&c, v[GATED_OUT], "out", gate);
    if (ready(&c)) RUN(&c, qkv_gated_activation(c.ctx, dl(out), dl(gate), dl(up), kind, c.stream));
    return end_call(&c, out);
}

/* ---- RoPE ----------------------------------------------------------------------------------------- */

enum {
    ROPE_Q,
    ROPE_K,
    ROPE_POSITIONS,
    ROPE_INDPTR,
    ROPE_OFFSETS,
    ROPE_ROTARY_DIM, /* to old_context: the fields of qkv.Rope */
    ROPE_Q_OUT = ROPE_ROTARY_DIM + 7,
    ROPE_K_OUT,
    ROPE_CTX,
    ROPE_STREAM
};
static signature rope_signature = {
    .text = "rope(q, k=None, *, positions=None, indptr=None, offsets=None, rotary_dim=0, "
            "interleaved=False, theta=10000.0, scale=1.0, low_freq=0.0, high_freq=0.0, "
            "old_context=0.0, q_out=None, k_out=None, ctx=None, stream=None)\n--\n\n"
            "Rotates pairs of elements of q and k by their token's position.\n\n"
            "q: [nnz, num_qo_heads, head_dim] f32, f16 or bf16. k: [nnz, num_kv_heads, head_dim] "
            "of the\n"
            "same dtype. positions: i32 [nnz]; or indptr: i32 [requests + 1] and offsets: i32 "
            "[requests],\n"
            "row t of request r being at offsets[r] + t - indptr[r]. rotary_dim: 0 = head_dim.\n"
            "interleaved: pairs (2i, 2i + 1), else (i, i + rotary_dim / 2). low_freq, high_freq,\n"
            "old_context: the scaling of Llama 3.1. q_out, k_out: may be q and k; made if "
            "None.\n" COMMON "Returns (q_out, k_out), the second None without k."};

static PyObject *rope(ARGUMENTS)
{
    (void)module;
    PyObject *v[ROPE_STREAM + 1];
    qkv_rope_spec spec = {QKV_ROPE_SPEC_INIT};
    if (read_call(&rope_signature, args, nargs, kwnames, v) ||
        read_rope_fields(v + ROPE_ROTARY_DIM, 0, &spec)) {
        return NULL;
    }
    call c;
    tensor slots[7];
    begin_call(&c, slots, 7, v[ROPE_CTX], v[ROPE_STREAM]);
    tensor *q = array(&c, v[ROPE_Q], "q"), *k = optional_array(&c, v[ROPE_K], "k");
    tensor *positions = optional_array_or_list(&c, v[ROPE_POSITIONS], "positions", QKV_I32);
    tensor *indptr = optional_array_or_list(&c, v[ROPE_INDPTR], "indptr", QKV_I32);
    tensor *offsets = optional_array_or_list(&c, v[ROPE_OFFSETS], "offsets", QKV_I32);
    tensor *q_out = output_like(&c, v[ROPE_Q_OUT], "q_out", q);
    tensor *k_out = k ? output_like(&c, v[ROPE_K_OUT], "k_out", k)
                      : optional_written_array(&c, v[ROPE_K_OUT], "k_out");
    if (ready(&c)) {
        RUN(&c, qkv_rope(c.ctx, &spec, dl(q_out), dl(q), dl(k_out), dl(k), dl(positions),
                         dl(indptr), dl(offsets), c.stream));
    }
    return end_call_tuple(&c, 2, (tensor *[]){q_out, k_out});
}

/* ---- products ------------------------------------------------------------------------------------- */

/* out of x [m, k] and w with n rows: [m, n] of x's dtype. */
static tensor *product_output(call *c, PyObject *value, const tensor *x, const tensor *w)
{
    if (c->failed) return NULL;
    const int64_t shape[] = {x->dl.ndim ? x->dl.shape[0] : 0, w->dl.ndim ? w->dl.shape[0] : 0};
    return output(c, value, "out", x->dl.dtype, 2, shape);
}

enum { GEMM_X, GEMM_W, GEMM_OUT, GEMM_CTX, GEMM_STREAM };
static signature gemm_signature = {.text = "gemm(x, w, *, out=None, ctx=None, stream=None)\n--\n\n"
                                           "x @ w.T, sums in f32.\n\n"
                                           "x: [m, k], w: [n, k] f32, f16 or bf16 each. out: [m, "
                                           "n] of any of these; made with x's dtype\n"
                                           "if None. " COMMON "Returns out."};

static PyObject *gemm(ARGUMENTS)
{
    (void)module;
    PyObject *v[GEMM_STREAM + 1];
    if (read_call(&gemm_signature, args, nargs, kwnames, v)) return NULL;
    call c;
    tensor slots[3];
    begin_call(&c, slots, 3, v[GEMM_CTX], v[GEMM_STREAM]);
    tensor *x = array(&c, v[GEMM_X], "x"), *w = array(&c, v[GEMM_W], "w");
    tensor *out = product_output(&c, v[GEMM_OUT], x, w);
    if (ready(&c)) RUN(&c, qkv_gemm(c.ctx, dl(out), dl(x), dl(w), c.stream));
    return end_call(&c, out);
}

enum { QUANTIZED_X, QUANTIZED_W, QUANTIZED_FORMAT, QUANTIZED_OUT, QUANTIZED_CTX, QUANTIZED_STREAM };
static signature gemm_quantized_signature = {
    .text =
        "gemm_quantized(x, w, format, *, out=None, ctx=None, stream=None)\n--\n\n"
        "x @ w.T with w packed in blocks of 32, as GGUF files hold them.\n\n"
        "x: [m, k] f32, f16 or bf16, k a multiple of 32. w: u8 [n, k / 32 * block bytes]. format:\n"
        "\"q8_0\" (34 bytes a block), \"q4_0\" (18) or \"q4_1\" (20). out: [m, n]; made with x's "
        "dtype\n"
        "if None. " COMMON "Returns out."};

static PyObject *gemm_quantized(ARGUMENTS)
{
    (void)module;
    PyObject *v[QUANTIZED_STREAM + 1];
    int32_t format = 0;
    if (read_call(&gemm_quantized_signature, args, nargs, kwnames, v) ||
        read_word(v[QUANTIZED_FORMAT], "format", &format, "q8_0", "q4_0", "q4_1", NULL)) {
        return NULL;
    }
    call c;
    tensor slots[3];
    begin_call(&c, slots, 3, v[QUANTIZED_CTX], v[QUANTIZED_STREAM]);
    tensor *x = array(&c, v[QUANTIZED_X], "x"), *w = array(&c, v[QUANTIZED_W], "w");
    tensor *out = product_output(&c, v[QUANTIZED_OUT], x, w);
    if (ready(&c)) {
        RUN(&c,
            qkv_gemm_quantized(c.ctx, dl(out), dl(x), dl(w), (qkv_weight_format)format, c.stream));
    }
    return end_call(&c, out);
}

/* ---- pages of the KV cache ------------------------------------------------------------------------ */

#define CACHE                                                                                      \
    "k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim], or with kv_layout=\"HND\"\n"    \
    "[pages, num_kv_heads, page_size, head_dim], of f32, f16, bf16, e4m3, e5m2 or i8; v_cache "    \
    "None:\n"                                                                                      \
    "k_cache is [pages, 2, ...] and holds both. k, v: [nnz, num_kv_heads, head_dim] f32, f16, "    \
    "bf16.\n"
#define OPTIONS                                                                                    \
    "k_scale, v_scale: a number, or f32 [1] or [num_kv_heads]; what is stored is the value "       \
    "divided by\n"                                                                                 \
    "it. rope: a qkv.Rope by which k, and q if given, are rotated on the way. q, q_out:\n"         \
    "[nnz, num_qo_heads, head_dim]; q_out is made like q if None; q_scale: of q_out. "

/* The parameters that both appends have: the caches and rows first, the options last. */
enum { APPEND_K_CACHE, APPEND_V_CACHE, APPEND_K, APPEND_V };
enum {
    OPTION_KV_LAYOUT,
    OPTION_POSITIONS,
    OPTION_K_SCALE,
    OPTION_V_SCALE,
    OPTION_ROPE,
    OPTION_Q,
    OPTION_Q_OUT,
    OPTION_Q_SCALE,
    OPTION_CTX,
    OPTION_STREAM,
    NUM_OPTION
};
#define OPTION_PARAMETERS                                                                          \
    "kv_layout=\"NHD\", positions=None, k_scale=None, v_scale=None, rope=None, q=None, "           \
    "q_out=None, q_scale=None, ctx=None, stream=None"
enum { APPEND_ARRAYS = 10 }; /* that read_append reads at most */

/* The fields of options point into the call's tensors. */
typedef struct append {
    tensor *k_cache, *v_cache, *k, *v, *positions, *q_out;
    int32_t kv_layout;
    qkv_rope_spec rope;
    qkv_kv_append_options options;
} append;

static void read_append(call *c, PyObject *const *v, PyObject *const *option, append *a)
{
    *a = (append){.rope = {QKV_ROPE_SPEC_INIT}, .options = {QKV_KV_APPEND_OPTIONS_INIT}};
    int has_rope;
    if (read_word(option[OPTION_KV_LAYOUT], "kv_layout", &a->kv_layout, "NHD", "HND", NULL) ||
        read_rope(option[OPTION_ROPE], "rope", &a->rope, &has_rope)) {
        c->failed = 1;
        return;
    }
    a->k = array(c, v[APPEND_K], "k"); /* first: outputs are made as k is */
    a->v = array(c, v[APPEND_V], "v");
    a->k_cache = written_array(c, v[APPEND_K_CACHE], "k_cache");
    a->v_cache = optional_written_array(c, v[APPEND_V_CACHE], "v_cache");
    tensor *q = optional_array(c, option[OPTION_Q], "q");
    a->q_out = q ? output_like(c, option[OPTION_Q_OUT], "q_out", q)
                 : optional_written_array(c, option[OPTION_Q_OUT], "q_out");
    if (has_rope) a->options.rope = &a->rope;
    a->options.q = dl(q);
    a->options.q_out = dl(a->q_out);
    read_scale(c, option[OPTION_K_SCALE], "k_scale", &a->options.k_scale);
    read_scale(c, option[OPTION_V_SCALE], "v_scale", &a->options.v_scale);
    read_scale(c, option[OPTION_Q_SCALE], "q_scale", &a->options.q_scale);
    a->positions = optional_array_or_list(c, option[OPTION_POSITIONS], "positions", QKV_I32);
}

enum {
    APPEND_QO_INDPTR = APPEND_V + 1,
    APPEND_KV_INDPTR,
    APPEND_KV_INDICES,
    APPEND_KV_LAST_PAGE_LEN,
    APPEND_BLOCK_TABLE,
    APPEND_KV_LENS,
    APPEND_OPTIONS
};
static signature kv_append_signature = {
    .text =
        "kv_append(k_cache, v_cache, k, v, *, qo_indptr, kv_indptr=None, kv_indices=None, "
        "kv_last_page_len=None, block_table=None, kv_lens=None, " OPTION_PARAMETERS ")\n--\n\n"
        "Writes new keys and values into the pages of their requests.\n\n" CACHE
        "qo_indptr: i32 [requests + 1], the rows of each request. Where its pages are, counting "
        "the\n"
        "new tokens: kv_indptr [requests + 1], kv_indices and kv_last_page_len [requests], or\n"
        "block_table [requests, columns] and kv_lens [requests], all i32. positions: i32 [nnz] in "
        "the\n"
        "request, None = its last ones. " OPTIONS COMMON "Returns q_out, None without q."};

static PyObject *kv_append(ARGUMENTS)
{
    (void)module;
    PyObject *v[APPEND_OPTIONS + NUM_OPTION], **option = v + APPEND_OPTIONS;
    if (read_call(&kv_append_signature, args, nargs, kwnames, v)) return NULL;
    call c;
    tensor slots[APPEND_ARRAYS + 6];
    begin_call(&c, slots, APPEND_ARRAYS + 6, option[OPTION_CTX], option[OPTION_STREAM]);
    append a;
    read_append(&c, v, option, &a);
    const qkv_kv_index index = {
        QKV_KV_INDEX_INIT,
        .qo_indptr = dl(array_or_list(&c, v[APPEND_QO_INDPTR], "qo_indptr", QKV_I32)),
        .kv_indptr = dl(optional_array_or_list(&c, v[APPEND_KV_INDPTR], "kv_indptr", QKV_I32)),
        .kv_indices = dl(optional_array_or_list(&c, v[APPEND_KV_INDICES], "kv_indices", QKV_I32)),
        .kv_last_page_len =
            dl(optional_array_or_list(&c, v[APPEND_KV_LAST_PAGE_LEN], "kv_last_page_len", QKV_I32)),
        .block_table =
            dl(optional_array_or_list(&c, v[APPEND_BLOCK_TABLE], "block_table", QKV_I32)),
        .kv_lens = dl(optional_array_or_list(&c, v[APPEND_KV_LENS], "kv_lens", QKV_I32)),
    };
    if (ready(&c)) {
        RUN(&c, qkv_kv_append(c.ctx, dl(a.k_cache), dl(a.v_cache), a.kv_layout, dl(a.k), dl(a.v),
                              &index, dl(a.positions), &a.options, c.stream));
    }
    return end_call(&c, a.q_out);
}

enum { SLOTS_SLOT_MAPPING = APPEND_V + 1, SLOTS_OPTIONS };
static signature kv_append_slots_signature = {
    .text =
        "kv_append_slots(k_cache, v_cache, k, v, slot_mapping, *, " OPTION_PARAMETERS ")\n--\n\n"
        "Writes new keys and values into numbered slots of the pages.\n\n" CACHE
        "slot_mapping: i32 or i64 [nnz], page * page_size + slot of each row, negative = skip it.\n"
        "positions: i32 [nnz], with rope. " OPTIONS COMMON "Returns q_out, None without q."};

static PyObject *kv_append_slots(ARGUMENTS)
{
    (void)module;
    PyObject *v[SLOTS_OPTIONS + NUM_OPTION], **option = v + SLOTS_OPTIONS;
    if (read_call(&kv_append_slots_signature, args, nargs, kwnames, v)) return NULL;
    call c;
    tensor slots[APPEND_ARRAYS + 1];
    begin_call(&c, slots, APPEND_ARRAYS + 1, option[OPTION_CTX], option[OPTION_STREAM]);
    append a;
    read_append(&c, v, option, &a);
    tensor *slot_mapping = array_or_list(&c, v[SLOTS_SLOT_MAPPING], "slot_mapping", QKV_I64);
    a.options.positions = dl(a.positions);
    if (ready(&c)) {
        RUN(&c, qkv_kv_append_slots(c.ctx, dl(a.k_cache), dl(a.v_cache), a.kv_layout, dl(a.k),
                                    dl(a.v), dl(slot_mapping), &a.options, c.stream));
    }
    return end_call(&c, a.q_out);
}

enum { COPY_K_CACHE, COPY_V_CACHE, COPY_SRC, COPY_DST, COPY_CTX, COPY_STREAM };
static signature kv_copy_pages_signature = {
    .text = "kv_copy_pages(k_cache, v_cache, src, dst, *, ctx=None, stream=None)\n--\n\n"
            "Copies whole pages within the pool: cache[dst[i]] = cache[src[i]].\n\n"
            "k_cache, v_cache: [pages, ...] of any dtype; v_cache may be None. src, dst: i32 [n]; "
            "no page\n"
            "is both, and none twice in dst. " COMMON};

static PyObject *kv_copy_pages(ARGUMENTS)
{
    (void)module;
    PyObject *v[COPY_STREAM + 1];
    if (read_call(&kv_copy_pages_signature, args, nargs, kwnames, v)) return NULL;
    call c;
    tensor slots[4];
    begin_call(&c, slots, 4, v[COPY_CTX], v[COPY_STREAM]);
    tensor *k_cache = written_array(&c, v[COPY_K_CACHE], "k_cache");
    tensor *v_cache = optional_written_array(&c, v[COPY_V_CACHE], "v_cache");
    tensor *src = array_or_list(&c, v[COPY_SRC], "src", QKV_I32);
    tensor *dst = array_or_list(&c, v[COPY_DST], "dst", QKV_I32);
    if (ready(&c)) {
        RUN(&c, qkv_kv_copy_pages(c.ctx, dl(k_cache), dl(v_cache), dl(src), dl(dst), c.stream));
    }
    return end_call(&c, NULL);
}

/* ---- arrays --------------------------------------------------------------------------------------- */

enum { EMPTY_X, EMPTY_SHAPE, EMPTY_DTYPE };
static signature empty_like_signature = {
    .text = "empty_like(x, shape=None, dtype=None)\n--\n\n"
            "A new array of x's framework and device, not initialised.\n\n"
            "shape: a number or a sequence, None = x's. dtype: \"bf16\", a framework's own, None = "
            "x's."};

/* Sizes of a new array. Returns how many, -1 with an exception. */
static int read_shape(PyObject *value, int64_t *shape)
{
    if (PyNumber_Check(value)) return read_i64(value, "shape", shape) ? -1 : 1;
    const Py_ssize_t ndim = PySequence_Size(value);
    if (ndim < 0) return -1;
    if (ndim > MAX_DIMS) {
        raise_error(QKV_ERR_INVALID, "shape: expected at most %d axes, got %zd", MAX_DIMS, ndim);
        return -1;
    }
    for (Py_ssize_t i = 0; i < ndim; i++) {
        PyObject *size = PySequence_GetItem(value, i);
        const int bad = !size || read_i64(size, "shape", &shape[i]);
        Py_XDECREF(size);
        if (bad) return -1;
    }
    return (int)ndim;
}

static PyObject *empty_like(ARGUMENTS)
{
    (void)module;
    PyObject *v[EMPTY_DTYPE + 1];
    if (read_call(&empty_like_signature, args, nargs, kwnames, v)) return NULL;
    call c;
    tensor slots[2];
    begin_call(&c, slots, 2, NULL, NULL);
    tensor *x = array(&c, v[EMPTY_X], "x"), *out = NULL;
    if (!c.failed) {
        int64_t sizes[MAX_DIMS], *shape = x->dl.shape;
        int ndim = x->dl.ndim;
        DLDataType dtype = x->dl.dtype;
        if (!absent(v[EMPTY_SHAPE])) {
            shape = sizes;
            ndim = read_shape(v[EMPTY_SHAPE], sizes);
        }
        for (int i = 0; i < ndim; i++) {
            if (shape[i] >= 0) continue;
            raise_error(QKV_ERR_INVALID, "shape: expected sizes from 0 on, got %lld",
                        (long long)shape[i]);
            ndim = -1;
        }
        c.failed = ndim < 0 || read_dtype(v[EMPTY_DTYPE], "dtype", &dtype);
        if (!c.failed) out = output(&c, NULL, "out", dtype, ndim, shape);
    }
    return end_call(&c, out);
}

/* ---- module --------------------------------------------------------------------------------------- */

static PyMethodDef functions[] = {
    METHOD("rmsnorm", rmsnorm),
    METHOD("add_rmsnorm", add_rmsnorm),
    METHOD("gated_activation", gated_activation),
    METHOD("rope", rope),
    METHOD("gemm", gemm),
    METHOD("gemm_quantized", gemm_quantized),
    METHOD("kv_append", kv_append),
    METHOD("kv_append_slots", kv_append_slots),
    METHOD("kv_copy_pages", kv_copy_pages),
    METHOD("empty_like", empty_like),
    {NULL, NULL, 0, NULL},
};
static signature *const signatures[] = {
    &rmsnorm_signature,
    &add_rmsnorm_signature,
    &gated_activation_signature,
    &rope_signature,
    &gemm_signature,
    &gemm_quantized_signature,
    &kv_append_signature,
    &kv_append_slots_signature,
    &kv_copy_pages_signature,
    &empty_like_signature,
};

int add_functions(PyObject *module)
{
    return add_methods(module, functions, signatures);
}
