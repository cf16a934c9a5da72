/* forward.c - the layers of a Llama model, in calls to the library.
 * SPDX-License-Identifier: Apache-2.0 */
#include "forward.h"

#include <stdlib.h>
#include <string.h>

#include "qkv/qkv.h"

struct forward {
    qkv_context *ctx;
    const model *m;
    forward_limits limits;
    int32_t pages_per_request; /* most pages that one request can list */
    int32_t qkv_width, qo_width;
    qkv_attention *attention;

    /* The step. Capacities follow from the limits; num_entries counts kv_indices. */
    int32_t num_requests, num_tokens, num_entries;
    int32_t *tokens, *positions;                    /* [max_tokens] */
    int32_t *qo_indptr, *kv_indptr, *last_page_len; /* [max_requests + 1], the last without + 1 */
    int32_t *kv_indices;                            /* [max_requests * pages_per_request] */

    /* The KV pool: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim], so that all of a
     * page is one block, which makes saving it one copy. */
    uint8_t *pool;

    /* Activations, f32. hidden is the residual stream; delta is what the last operator adds to it.
 */
    float *hidden, *normed, *delta;  /* [max_tokens, hidden_size] */
    float *qkv;                      /* [max_tokens, qkv_width]: q, k, v side by side */
    float *mixed;                    /* [max_tokens, qo_width]: attention's output */
    float *gate_up, *activated;      /* [max_tokens, 2 ffn_size], [max_tokens, ffn_size] */
    float *head_hidden, *head_delta; /* [max_logits, hidden_size] */
    float *logits;                   /* [max_logits, vocab_size] */
};

/* ---- tensors over plain memory ------------------------------------------------------------- */

/* A DLTensor with its shape and strides. `tensor` points into the struct itself: fill it in place
 * and do not copy it. */
typedef struct view {
    DLTensor tensor;
    int64_t shape[4], strides[4];
} view;

static DLTensor *view_of(view *v, const void *data, DLDataType dtype, int32_t ndim,
                         const int64_t *shape, const int64_t *strides)
{
    *v = (view){.tensor = {.data = (void *)(uintptr_t)data,
                           .device = {kDLCPU, 0},
                           .ndim = ndim,
                           .dtype = dtype,
                           .shape = v->shape,
                           .strides = v->strides}};
    memcpy(v->shape, shape, (size_t)ndim * sizeof *shape);
    memcpy(v->strides, strides, (size_t)ndim * sizeof *strides);
    return &v->tensor;
}

static DLTensor *vector(view *v, const void *data, DLDataType dtype, int64_t n)
{
    return view_of(v, data, dtype, 1, (int64_t[]){n}, (int64_t[]){1});
}

/* [rows, cols], rows stride elements apart. */
static DLTensor *matrix(view *v, const void *data, DLDataType dtype, int64_t rows, int64_t cols,
                        int64_t stride)
{
    return view_of(v, data, dtype, 2, (int64_t[]){rows, cols}, (int64_t[]){stride, 1});
}

/* [rows, heads, head_dim], rows stride elements apart. */
static DLTensor *heads_of(view *v, const float *data, int64_t rows, int64_t heads, int64_t head_dim,
                          int64_t stride)
{
    return view_of(v, data, QKV_F32, 3, (int64_t[]){rows, heads, head_dim},
                   (int64_t[]){stride, head_dim, 1});
}

/* ---- create ---------------------------------------------------------------------------------- */

/* Elements of one layer's keys (or values) in a page. */
static int64_t page_part(const model *m, int32_t page_size)
{
    return (int64_t)page_size * m->config.num_kv_heads * m->config.head_dim;
}

size_t forward_page_bytes(const model *m, int32_t page_size)
{
    return (size_t)(page_part(m, page_size) * 2 * m->config.num_layers) * (m->dtype.bits / 8);
}

static bool create_attention(forward *f, char error[GGUF_ERROR])
{
    const model_config *c = &f->m->config;
    const forward_limits *l = &f->limits;
    const qkv_attention_spec spec = {QKV_ATTENTION_SPEC_INIT,
                                     .num_qo_heads = c->num_qo_heads,
                                     .num_kv_heads = c->num_kv_heads,
                                     .head_dim_qk = c->head_dim,
                                     .head_dim_vo = c->head_dim,
                                     .page_size = l->page_size,
                                     .kv_layout = QKV_NHD,
                                     .mask = QKV_MASK_CAUSAL,
                                     .dtype_q = QKV_F32,
                                     .dtype_kv = f->m->dtype,
                                     .dtype_o = QKV_F32};
    const qkv_attention_limits limits = {
        QKV_ATTENTION_LIMITS_INIT,
        .max_requests = l->max_requests,
        .max_tokens = l->max_tokens,
        .max_kv_len = l->max_kv_len,
        .max_pages = (int64_t)l->max_requests * f->pages_per_request,
        .max_split_rows = 1, /* no splits: the batch must not change a request's rounding */
        .pool_pages = l->num_pages};
    return works(error, "qkv_attention_create",
                 qkv_attention_create(f->ctx, &spec, &limits, NULL, &f->attention));
}

/* count elements of 4 bytes; *bytes sums what was asked for. */
static void *buffer(size_t *bytes, int64_t count)
{
    *bytes += (size_t)count * 4;
    return allocate((size_t)count * 4);
}

static bool create_buffers(forward *f, char error[GGUF_ERROR])
{
    const model_config *c = &f->m->config;
    const forward_limits *l = &f->limits;
    const int64_t tokens = l->max_tokens, requests = l->max_requests, rows = l->max_logits;
    const size_t page_bytes = forward_page_bytes(f->m, l->page_size);
    if (page_bytes > SIZE_MAX / 2 / (size_t)l->num_pages)
        return fail(error, "out of memory: %d pages of %zu MiB", l->num_pages, page_bytes >> 20);
    const size_t pool_bytes = page_bytes * (size_t)l->num_pages;
    size_t bytes = pool_bytes;
    f->tokens = buffer(&bytes, tokens);
    f->positions = buffer(&bytes, tokens);
    f->qo_indptr = buffer(&bytes, requests + 1);
    f->kv_indptr = buffer(&bytes, requests + 1);
    f->last_page_len = buffer(&bytes, requests);
    f->kv_indices = buffer(&bytes, requests * f->pages_per_request);
    f->hidden = buffer(&bytes, tokens * c->hidden_size);
    f->normed = buffer(&bytes, tokens * c->hidden_size);
    f->delta = buffer(&bytes, tokens * c->hidden_size);
    f->qkv = buffer(&bytes, tokens * f->qkv_width);
    f->mixed = buffer(&bytes, tokens * f->qo_width);
    f->gate_up = buffer(&bytes, tokens * 2 * c->ffn_size);
    f->activated = buffer(&bytes, tokens * c->ffn_size);
    f->head_hidden = buffer(&bytes, rows * c->hidden_size);
    f->head_delta = buffer(&bytes, rows * c->hidden_size);
    f->logits = buffer(&bytes, rows * c->vocab_size);
    f->pool = allocate(pool_bytes);
    if (!f->tokens || !f->positions || !f->qo_indptr || !f->kv_indptr || !f->last_page_len ||
        !f->kv_indices || !f->hidden || !f->normed || !f->delta || !f->qkv || !f->mixed ||
        !f->gate_up || !f->activated || !f->head_hidden || !f->head_delta || !f->logits || !f->pool)
        return fail(error, "out of memory: KV cache and buffers need %zu MiB (%d pages of %d)",
                    bytes >> 20, l->num_pages, l->page_size);
    f->qo_indptr[0] = f->kv_indptr[0] = 0;
    return true;
}

forward *forward_create(qkv_context *ctx, const model *m, const forward_limits *limits,
                        char error[GGUF_ERROR])
{
    forward *f = calloc(1, sizeof *f);
    if (!f) {
        fail(error, "out of memory");
        return NULL;
    }
    f->ctx = ctx;
    f->m = m;
    f->limits = *limits;
    f->pages_per_request = (limits->max_kv_len - 1) / limits->page_size + 1;
    if (f->pages_per_request > limits->num_pages) f->pages_per_request = limits->num_pages;
    f->qo_width = m->config.num_qo_heads * m->config.head_dim;
    f->qkv_width = f->qo_width + 2 * m->config.num_kv_heads * m->config.head_dim;
    if (create_buffers(f, error) && create_attention(f, error)) return f;
    forward_destroy(f);
    return NULL;
}

void forward_destroy(forward *f)
{
    if (!f) return;
    qkv_attention_destroy(f->attention);
    void *const buffers[] = {
        f->tokens,    f->positions,   f->qo_indptr,  f->kv_indptr, f->last_page_len, f->kv_indices,
        f->hidden,    f->normed,      f->delta,      f->qkv,       f->mixed,         f->gate_up,
        f->activated, f->head_hidden, f->head_delta, f->logits,    f->pool};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++) free(buffers[i]);
    free(f);
}

/* ---- a step ---------------------------------------------------------------------------------- */

void forward_begin(forward *f)
{
    f->num_requests = f->num_tokens = f->num_entries = 0;
}

int32_t forward_add(forward *f, const int32_t *tokens, int32_t num_tokens, int32_t position,
                    const int32_t *pages)
{
    const int32_t page_size = f->limits.page_size, kv_len = position + num_tokens;
    const int32_t num_pages = (kv_len - 1) / page_size + 1;
    memcpy(f->tokens + f->num_tokens, tokens, (size_t)num_tokens * sizeof *tokens);
    memcpy(f->kv_indices + f->num_entries, pages, (size_t)num_pages * sizeof *pages);
    for (int32_t i = 0; i < num_tokens; i++) f->positions[f->num_tokens + i] = position + i;
    f->last_page_len[f->num_requests] = kv_len - (num_pages - 1) * page_size;
    f->num_tokens += num_tokens;
    f->num_entries += num_pages;
    f->num_requests++;
    f->qo_indptr[f->num_requests] = f->num_tokens;
    f->kv_indptr[f->num_requests] = f->num_entries;
    return f->num_tokens - 1;
}

static void embed(forward *f)
{
    const int64_t width = f->m->config.hidden_size;
    for (int32_t row = 0; row < f->num_tokens; row++) {
        float *out = f->hidden + row * width;
        const int64_t at = f->tokens[row] * width;
        if (f->m->dtype.bits == 32) {
            memcpy(out, (const float *)f->m->embedding + at, (size_t)width * sizeof *out);
            continue;
        }
        const uint16_t *in = (const uint16_t *)f->m->embedding + at;
        for (int64_t i = 0; i < width; i++) {
            const uint32_t bits = (uint32_t)in[i] << 16; /* bf16 is the upper half of f32 */
            memcpy(&out[i], &bits, sizeof bits);
        }
    }
}

/* out[rows, n] = x[rows, k] * w[n, k]^T */
static qkv_status linear(forward *f, float *out, int64_t n, const float *x, int64_t k,
                         const void *w, int64_t rows)
{
    view out_view, x_view, w_view;
    return qkv_gemm(f->ctx, matrix(&out_view, out, QKV_F32, rows, n, n),
                    matrix(&x_view, x, QKV_F32, rows, k, k),
                    matrix(&w_view, w, f->m->dtype, n, k, k), NULL);
}

/* hidden += delta (unless this is the first norm of all), normed = rmsnorm(hidden). */
static qkv_status norm(forward *f, float *normed, float *hidden, const float *delta,
                       const float *weight, int64_t rows)
{
    const int64_t width = f->m->config.hidden_size;
    view out, residual, x, w;
    matrix(&out, normed, QKV_F32, rows, width, width);
    matrix(&residual, hidden, QKV_F32, rows, width, width);
    vector(&w, weight, QKV_F32, width);
    const float eps = f->m->config.norm_eps;
    if (!delta) return qkv_rmsnorm(f->ctx, &out.tensor, &residual.tensor, &w.tensor, eps, 0, NULL);
    matrix(&x, delta, QKV_F32, rows, width, width);
    return qkv_add_rmsnorm(f->ctx, &out.tensor, &residual.tensor, &x.tensor, &w.tensor, eps, 0,
                           NULL);
}

#define TRY(call)                                                                                  \
    do {                                                                                           \
        const qkv_status try_ = (call);                                                            \
        if (try_ != QKV_OK) return try_;                                                           \
    } while (0)

/* normed -> delta: projections, rotation, keys and values to their pages, attention. */
static qkv_status attend(forward *f, int32_t index, const qkv_kv_index *kv)
{
    const model_config *c = &f->m->config;
    const model_layer *layer = &f->m->layers[index];
    const int64_t rows = f->num_tokens, dim = c->head_dim, kv_heads = c->num_kv_heads;
    const int64_t part = page_part(f->m, f->limits.page_size);
    TRY(linear(f, f->qkv, f->qkv_width, f->normed, c->hidden_size, layer->qkv, rows));

    view q, k, v, o, positions, k_pages, v_pages;
    heads_of(&q, f->qkv, rows, c->num_qo_heads, dim, f->qkv_width);
    heads_of(&k, f->qkv + f->qo_width, rows, kv_heads, dim, f->qkv_width);
    heads_of(&v, f->qkv + f->qo_width + kv_heads * dim, rows, kv_heads, dim, f->qkv_width);
    heads_of(&o, f->mixed, rows, c->num_qo_heads, dim, f->qo_width);
    vector(&positions, f->positions, QKV_I32, rows);
    const int64_t shape[] = {f->limits.num_pages, f->limits.page_size, kv_heads, dim};
    const int64_t strides[] = {part * 2 * c->num_layers, kv_heads * dim, dim, 1};
    const uint8_t *pages = f->pool + (size_t)(index * 2 * part) * (f->m->dtype.bits / 8);
    view_of(&k_pages, pages, f->m->dtype, 4, shape, strides);
    view_of(&v_pages, pages + (size_t)part * (f->m->dtype.bits / 8), f->m->dtype, 4, shape,
            strides);

    TRY(qkv_rope(f->ctx, &c->rope, &q.tensor, &q.tensor, &k.tensor, &k.tensor, &positions.tensor,
                 NULL, NULL, NULL));
    TRY(qkv_kv_append(f->ctx, &k_pages.tensor, &v_pages.tensor, QKV_NHD, &k.tensor, &v.tensor, kv,
                      NULL, NULL, NULL));
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .q = &q.tensor, .k = &k_pages.tensor,
                                 .v = &v_pages.tensor, .o = &o.tensor};
    TRY(qkv_attention_run(f->attention, &io, NULL));
    return linear(f, f->delta, c->hidden_size, f->mixed, f->qo_width, layer->output, rows);
}

/* normed -> delta: down(silu(gate) * up). */
static qkv_status feed_forward(forward *f, const model_layer *layer)
{
    const int64_t rows = f->num_tokens, hidden = f->m->config.hidden_size;
    const int64_t ffn = f->m->config.ffn_size;
    view gate, up, out;
    TRY(linear(f, f->gate_up, 2 * ffn, f->normed, hidden, layer->gate_up, rows));
    matrix(&gate, f->gate_up, QKV_F32, rows, ffn, 2 * ffn);
    matrix(&up, f->gate_up + ffn, QKV_F32, rows, ffn, 2 * ffn);
    matrix(&out, f->activated, QKV_F32, rows, ffn, ffn);
    TRY(qkv_gated_activation(f->ctx, &out.tensor, &gate.tensor, &up.tensor, QKV_SILU, NULL));
    return linear(f, f->delta, hidden, f->activated, ffn, layer->down, rows);
}

static qkv_status run_layers(forward *f)
{
    const int64_t requests = f->num_requests, rows = f->num_tokens;
    view qo_indptr, kv_indptr, kv_indices, last_page_len;
    const qkv_kv_index kv = {
        QKV_KV_INDEX_INIT, .qo_indptr = vector(&qo_indptr, f->qo_indptr, QKV_I32, requests + 1),
        .kv_indptr = vector(&kv_indptr, f->kv_indptr, QKV_I32, requests + 1),
        .kv_indices = vector(&kv_indices, f->kv_indices, QKV_I32, f->num_entries),
        .kv_last_page_len = vector(&last_page_len, f->last_page_len, QKV_I32, requests)};
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &kv};
    TRY(qkv_attention_plan(f->attention, &batch, NULL));
    embed(f);
    for (int32_t i = 0; i < f->m->config.num_layers; i++) {
        const model_layer *layer = &f->m->layers[i];
        const float *delta = i ? f->delta : NULL;
        TRY(norm(f, f->normed, f->hidden, delta, layer->attention_norm, rows));
        TRY(attend(f, i, &kv));
        TRY(norm(f, f->normed, f->hidden, f->delta, layer->ffn_norm, rows));
        TRY(feed_forward(f, layer));
    }
    return QKV_OK;
}

bool forward_run(forward *f, char error[GGUF_ERROR])
{
    return works(error, "forward", run_layers(f));
}

float *forward_logits(forward *f, const int32_t *rows, int32_t num_rows, char error[GGUF_ERROR])
{
    const int64_t width = f->m->config.hidden_size, vocab = f->m->config.vocab_size;
    for (int32_t i = 0; i < num_rows; i++) {
        const size_t bytes = (size_t)width * sizeof(float);
        memcpy(f->head_hidden + i * width, f->hidden + rows[i] * width, bytes);
        memcpy(f->head_delta + i * width, f->delta + rows[i] * width, bytes);
    }
    qkv_status status =
        norm(f, f->head_delta, f->head_hidden, f->head_delta, f->m->output_norm, num_rows);
    if (status == QKV_OK)
        status = linear(f, f->logits, vocab, f->head_delta, width, f->m->head, num_rows);
    return works(error, "output head", status) ? f->logits : NULL;
}

/* ---- pages to and from the host ----------------------------------------------------------------
 */

void forward_save_pages(const forward *f, const int32_t *pages, int32_t num_pages, void *to)
{
    const size_t bytes = forward_page_bytes(f->m, f->limits.page_size);
    for (int32_t i = 0; i < num_pages; i++)
        memcpy((uint8_t *)to + (size_t)i * bytes, f->pool + (size_t)pages[i] * bytes, bytes);
}

void forward_load_pages(forward *f, const int32_t *pages, int32_t num_pages, const void *from)
{
    const size_t bytes = forward_page_bytes(f->m, f->limits.page_size);
    for (int32_t i = 0; i < num_pages; i++)
        memcpy(f->pool + (size_t)pages[i] * bytes, (const uint8_t *)from + (size_t)i * bytes,
               bytes);
}
