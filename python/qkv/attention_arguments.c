/* attention_arguments.c - attention's structures, read from arguments of calls.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_arguments.h"

#include <string.h>

void read_scale(call *c, PyObject *value, const char *name, qkv_scale *out)
{
    *out = (qkv_scale){0};
    if (c->failed || absent(value)) return;
    if (PyNumber_Check(value) && !is_array(value)) {
        if (read_f32(value, name, &out->value)) {
            c->failed = 1;
        } else if (!(out->value > 0)) { /* 0 would mean that there is none */
            raise_error(QKV_ERR_INVALID, "%s: expected a scale > 0, got %g", name,
                        (double)out->value);
            c->failed = 1;
        }
        return;
    }
    out->tensor = dl(value_array(c, value, name, QKV_F32));
}

/* ---- variants ------------------------------------------------------------------------------------- */

/* ("slope", "f32"), ("n", "i32") or ("table", "f32", ndim) */
static int read_param(operator_spec *op, PyObject *value, qkv_param *out)
{
    const char *const name = "variant.params";
    PyObject *fields = PySequence_Tuple(value), *text = NULL;
    if (!fields) return -1;
    const Py_ssize_t size = PyTuple_Size(fields);
    int bad = -1;
    if (size != 2 && size != 3) {
        PyErr_Format(PyExc_TypeError, "%s: expected (name, type) or (name, dtype, ndim), got %R",
                     name, value);
    } else if (!read_text(PyTuple_GetItem(fields, 0), name, &out->name, &text)) {
        int32_t type = 0;
        if (size == 3) {
            out->type = QKV_PARAM_TENSOR;
            bad = read_dtype(PyTuple_GetItem(fields, 1), name, &out->dtype) ||
                  read_i32(PyTuple_GetItem(fields, 2), name, &out->ndim);
        } else {
            bad = read_word(PyTuple_GetItem(fields, 1), name, &type, "f32", "i32", NULL);
            out->type = type ? QKV_PARAM_I32 : QKV_PARAM_F32;
        }
        bad = bad || (text && PyList_Append(op->texts, text)) ? -1 : 0;
    }
    Py_XDECREF(text);
    Py_DECREF(fields);
    return bad;
}

static int read_variant(operator_spec *op, PyObject *value)
{
    if (absent(value)) return 0;
    if (!PyTuple_Check(value) || PyTuple_Size(value) != 3) {
        PyErr_Format(PyExc_TypeError, "variant: expected a qkv.Variant, got %R", value);
        return -1;
    }
    op->variant = (qkv_variant){QKV_VARIANT_INIT, .params = op->params};
    PyObject *texts[2] = {NULL}, *params = PySequence_Tuple(PyTuple_GetItem(value, 2));
    const Py_ssize_t num = params ? PyTuple_Size(params) : -1;
    int bad =
        num < 0 ||
        read_text(PyTuple_GetItem(value, 0), "variant.name", &op->variant.name, &texts[0]) ||
        read_text(PyTuple_GetItem(value, 1), "variant.source", &op->variant.source, &texts[1]);
    for (int i = 0; i < 2 && !bad; i++) bad = texts[i] && PyList_Append(op->texts, texts[i]);
    if (!bad && num > MAX_PARAMS) {
        raise_error(QKV_ERR_INVALID, "variant.params: expected at most %d, got %zd", MAX_PARAMS,
                    num);
        bad = 1;
    }
    for (Py_ssize_t i = 0; i < num && !bad; i++) {
        bad = read_param(op, PyTuple_GetItem(params, i), &op->params[i]);
    }
    op->variant.num_params = (int32_t)num;
    op->spec.variant = &op->variant;
    Py_XDECREF(texts[0]);
    Py_XDECREF(texts[1]);
    Py_XDECREF(params);
    return bad ? -1 : 0;
}

/* ---- operators ------------------------------------------------------------------------------------ */

static int read_spec(PyObject *const *v, operator_spec *op)
{
    qkv_attention_spec *s = &op->spec;
    int32_t alibi = 0, sink = 0, invariant = 0, base_2 = 0, appends = 0, has_rope = 0;
    *s = (qkv_attention_spec){QKV_ATTENTION_SPEC_INIT, .mask = QKV_MASK_CAUSAL, .dtype_q = QKV_BF16,
                              .window_left = -1, .window_right = -1};
    op->rope = (qkv_rope_spec){QKV_ROPE_SPEC_INIT};
    if (read_i32(v[OP_NUM_QO_HEADS], "num_qo_heads", &s->num_qo_heads) ||
        read_i32(v[OP_NUM_KV_HEADS], "num_kv_heads", &s->num_kv_heads) ||
        read_i32(v[OP_HEAD_DIM_QK], "head_dim_qk", &s->head_dim_qk)) {
        return -1;
    }
    s->head_dim_vo = s->head_dim_qk;
    if (read_i32(v[OP_HEAD_DIM_VO], "head_dim_vo", &s->head_dim_vo) ||
        read_i32(v[OP_PAGE_SIZE], "page_size", &s->page_size) ||
        read_word(v[OP_KV_LAYOUT], "kv_layout", &s->kv_layout, "NHD", "HND", NULL) ||
        read_word(v[OP_MASK], "mask", &s->mask, "none", "causal", "custom", NULL) ||
        read_dtype(v[OP_DTYPE_Q], "dtype_q", &s->dtype_q)) {
        return -1;
    }
    s->dtype_kv = s->dtype_o = s->dtype_q;
    if (read_dtype(v[OP_DTYPE_KV], "dtype_kv", &s->dtype_kv) ||
        read_dtype(v[OP_DTYPE_O], "dtype_o", &s->dtype_o) ||
        read_f32(v[OP_SM_SCALE], "sm_scale", &s->sm_scale) ||
        read_f32(v[OP_LOGITS_SOFT_CAP], "logits_soft_cap", &s->logits_soft_cap) ||
        read_i32(v[OP_WINDOW_LEFT], "window_left", &s->window_left) ||
        read_i32(v[OP_WINDOW_RIGHT], "window_right", &s->window_right) ||
        read_flag(v[OP_ALIBI], "alibi", &alibi) || read_flag(v[OP_SINK], "sink", &sink) ||
        read_rope(v[OP_ROPE], "rope", &op->rope, &has_rope) || read_variant(op, v[OP_VARIANT]) ||
        read_flag(v[OP_BATCH_INVARIANT], "batch_invariant", &invariant) ||
        read_flag(v[OP_LSE_BASE_2], "lse_base_2", &base_2) ||
        read_flag(v[OP_ONLY_APPENDS], "only_appends", &appends)) {
        return -1;
    }
    if (s->logits_soft_cap != 0) s->features |= QKV_FEATURE_SOFT_CAP;
    if (alibi) s->features |= QKV_FEATURE_ALIBI;
    if (s->window_left != -1 || s->window_right != -1) s->features |= QKV_FEATURE_WINDOW;
    if (has_rope) {
        s->features |= QKV_FEATURE_ROPE;
        s->rope = &op->rope;
    }
    if (invariant) s->flags |= QKV_ATTENTION_BATCH_INVARIANT;
    if (base_2) s->flags |= QKV_ATTENTION_LSE_BASE_2;
    if (sink) s->flags |= QKV_ATTENTION_HAS_SINK;
    if (appends) s->flags |= QKV_ATTENTION_ONLY_APPENDS;
    return 0;
}

static int read_limits(PyObject *const *v, qkv_attention_limits *l)
{
    *l = (qkv_attention_limits){QKV_ATTENTION_LIMITS_INIT, .max_levels = 1};
    return read_i32(v[OP_MAX_REQUESTS], "max_requests", &l->max_requests) ||
                   read_i64(v[OP_MAX_TOKENS], "max_tokens", &l->max_tokens) ||
                   read_i32(v[OP_MAX_QO_LEN], "max_qo_len", &l->max_qo_len) ||
                   read_i64(v[OP_MAX_KV_LEN], "max_kv_len", &l->max_kv_len) ||
                   read_i64(v[OP_MAX_PAGES], "max_pages", &l->max_pages) ||
                   read_i32(v[OP_MAX_WORKERS], "max_workers", &l->max_workers) ||
                   read_i64(v[OP_MAX_SPLIT_ROWS], "max_split_rows", &l->max_split_rows) ||
                   read_i64(v[OP_POOL_PAGES], "pool_pages", &l->pool_pages) ||
                   read_i32(v[OP_MAX_LEVELS], "max_levels", &l->max_levels) ||
                   read_i32(v[OP_MAX_ROW_BLOCKS], "max_row_blocks", &l->max_row_blocks) ||
                   read_i32(v[OP_PLANS_IN_FLIGHT], "plans_in_flight", &l->plans_in_flight)
               ? -1
               : 0;
}

int read_operator(PyObject *const *v, operator_spec *op)
{
    memset(op, 0, sizeof *op);
    op->texts = PyList_New(0);
    if (!op->texts || read_spec(v, op) || read_limits(v, &op->limits)) return -1;
    if (!absent(v[OP_CTX])) {
        op->ctx = as_context(v[OP_CTX]);
    } else {
        DLDevice device;
        if (read_device(v[OP_DEVICE], &device)) return -1;
        op->ctx = default_context(device);
    }
    return op->ctx ? 0 : -1;
}

void free_operator(operator_spec *op)
{
    Py_XDECREF(op->texts);
}

/* ---- levels --------------------------------------------------------------------------------------- */

void share_pinned(tensor *t)
{
    if (!t || !t->object || t->dl.device.device_type != kDLCPU) return;
    PyObject *pinned = PyObject_CallMethod(t->object, "is_pinned", NULL);
    if (!pinned)
        PyErr_Clear(); /* of a framework that pins nothing */
    else if (PyObject_IsTrue(pinned) == 1)
        t->dl.device.device_type = kDLCUDAHost;
    Py_XDECREF(pinned);
}

void read_level(call *c, DLDevice device, PyObject *const *values, qkv_kv_index *out,
                level_tensors *tensors)
{
    static const char *const names[NUM_LEVEL] = {
        "qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len", "block_table", "kv_lens",
        "bsr_rows",  "bsr_cols",  "bsr_indptr", "bsr_indices",      "bsr_mask"};
    tensor **of = tensors->of;
    for (int i = 0; i < NUM_LEVEL; i++) {
        const DLDataType dtype = i == LEVEL_BSR_MASK ? QKV_U8 : QKV_I32;
        of[i] = i == LEVEL_BSR_ROWS || i == LEVEL_BSR_COLS
                    ? NULL
                    : optional_array_or_list(c, values[i], names[i], dtype);
    }
    *out = (qkv_kv_index){QKV_KV_INDEX_INIT,
                          .qo_indptr = dl(of[LEVEL_QO_INDPTR]),
                          .kv_indptr = dl(of[LEVEL_KV_INDPTR]),
                          .kv_indices = dl(of[LEVEL_KV_INDICES]),
                          .kv_last_page_len = dl(of[LEVEL_KV_LAST_PAGE_LEN]),
                          .block_table = dl(of[LEVEL_BLOCK_TABLE]),
                          .kv_lens = dl(of[LEVEL_KV_LENS]),
                          .bsr_indptr = dl(of[LEVEL_BSR_INDPTR]),
                          .bsr_indices = dl(of[LEVEL_BSR_INDICES]),
                          .bsr_mask = dl(of[LEVEL_BSR_MASK])};
    if (c->failed) return;
    if (device.device_type == kDLCUDA) {
        share_pinned(of[LEVEL_BSR_INDICES]);
        share_pinned(of[LEVEL_BSR_MASK]);
    }
    c->failed = read_i32(values[LEVEL_BSR_ROWS], names[LEVEL_BSR_ROWS], &out->bsr_rows) ||
                read_i32(values[LEVEL_BSR_COLS], names[LEVEL_BSR_COLS], &out->bsr_cols);
}
