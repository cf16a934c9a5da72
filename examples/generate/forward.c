/* forward.c - the layers of a Llama model, in calls to the library.
 * SPDX-License-Identifier: Apache-2.0 */
#include "forward.h"

#include <stdlib.h>
#include <string.h>

#include "qkv/qkv.h"
#include "view.h"

struct forward {
    qkv_context *ctx;
    const model *m;
    const compute_device *device; /* the model's */
    forward_limits limits;
    int32_t pages_per_request; /* most pages that one request can list */
    int32_t qkv_width, qo_width;
    qkv_attention *attention;

    /* The step. Capacities follow from the limits; num_entries counts kv_indices. All but the tokens,
     * which stay here, are parts of one block that the device gets as well. */
    int32_t num_requests, num_tokens, num_entries;
    int32_t *tokens, *positions;                    /* [max_tokens] */
    int32_t *qo_indptr, *kv_indptr, *last_page_len; /* [max_requests + 1], the last without + 1 */
    int32_t *kv_indices; /* [max_requests * pages_per_request], the last */
    mirror step;

    /* The KV pool: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim], so that all of a
     * page is one block, which makes saving it one copy. */
    uint8_t *pool;

    /* Activations, of the model's dtype. hidden is the residual stream; delta is what the last
     * operator adds to it. */
    mirror embedded;                   /* hidden, as the host fills it with embeddings */
    uint8_t *hidden, *normed, *delta;  /* [max_tokens, hidden_size] */
    uint8_t *qkv;                      /* [max_tokens, qkv_width]: q, k, v side by side */
    uint8_t *mixed;                    /* [max_tokens, qo_width]: attention's output */
    uint8_t *gate_up, *activated;      /* [max_tokens, 2 ffn_size], [max_tokens, ffn_size] */
    uint8_t *head_hidden, *head_mixed; /* [max_logits, ...] of the rows that logits are asked for */
    float *logits;                     /* [max_logits, vocab_size] */
};

/* The bytes of n weights, keys or activations. */
static size_t bytes_of(const model *m, int64_t n)
{
    return (size_t)n * (m->dtype.bits / 8);
}

/* ---- create ---------------------------------------------------------------------------------- */

/* Elements of one layer's keys (or values) in a page. */
static int64_t page_part(const model *m, int32_t page_size)
{
    return (int64_t)page_size * m->config.num_kv_heads * m->config.head_dim;
}

size_t forward_page_bytes(const model *m, int32_t page_size)
{
    return bytes_of(m, page_part(m, page_size) * 2 * m->config.num_layers);
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
                                     .dtype_q = f->m->dtype,
                                     .dtype_kv = f->m->dtype,
                                     .dtype_o = f->m->dtype};
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

/* *sum adds up what was asked for. */
static void *buffer(const forward *f, size_t *sum, size_t bytes)
{
    *sum += bytes;
    return device_alloc(f->device, bytes);
}

static void *activations(const forward *f, size_t *sum, int64_t rows, int64_t width)
{
    return buffer(f, sum, bytes_of(f->m, rows * width));
}

/* The arrays that describe a step. */
static bool create_step(forward *f, size_t *sum)
{
    const size_t tokens = (size_t)f->limits.max_tokens, requests = (size_t)f->limits.max_requests;
    const size_t entries = requests * (size_t)f->pages_per_request;
    const size_t bytes = (tokens + 3 * requests + 2 + entries) * sizeof(int32_t);
    *sum += bytes + tokens * sizeof *f->tokens;
    f->tokens = malloc(tokens * sizeof *f->tokens);
    if (!f->tokens || !mirror_create(f->device, bytes, &f->step)) return false;
    f->positions = f->step.host;
    f->qo_indptr = f->positions + tokens;
    f->kv_indptr = f->qo_indptr + requests + 1;
    f->last_page_len = f->kv_indptr + requests + 1;
    f->kv_indices = f->last_page_len + requests;
    f->qo_indptr[0] = f->kv_indptr[0] = 0;
    return true;
}

static bool create_buffers(forward *f, char error[GGUF_ERROR])
{
    const model_config *c = &f->m->config;
    const forward_limits *l = &f->limits;
    const int64_t tokens = l->max_tokens, rows = l->max_logits;
    const size_t page_bytes = forward_page_bytes(f->m, l->page_size);
    if (page_bytes > SIZE_MAX / 2 / (size_t)l->num_pages)
        return fail(error, "out of memory: %d pages of %zu MiB", l->num_pages, page_bytes >> 20);
    size_t bytes = 0;
    const size_t hidden_bytes = bytes_of(f->m, tokens * c->hidden_size);
    const bool described = create_step(f, &bytes);
    const bool embedded = mirror_create(f->device, hidden_bytes, &f->embedded);
    bytes += hidden_bytes;
    f->hidden = f->embedded.there;
    f->normed = activations(f, &bytes, tokens, c->hidden_size);
    f->delta = activations(f, &bytes, tokens, c->hidden_size);
    f->qkv = activations(f, &bytes, tokens, f->qkv_width);
    f->mixed = activations(f, &bytes, tokens, f->qo_width);
    f->gate_up = activations(f, &bytes, tokens, 2 * (int64_t)c->ffn_size);
    f->activated = activations(f, &bytes, tokens, c->ffn_size);
    f->head_hidden = activations(f, &bytes, rows, c->hidden_size);
    f->head_mixed = activations(f, &bytes, rows, f->qo_width);
    f->logits = buffer(f, &bytes, (size_t)(rows * c->vocab_size) * sizeof(float));
    f->pool = buffer(f, &bytes, page_bytes * (size_t)l->num_pages);
    if (described && embedded && f->normed && f->delta && f->qkv && f->mixed && f->gate_up &&
        f->activated && f->head_hidden && f->head_mixed && f->logits && f->pool)
        return true;
    return fail(error, "out of memory: KV cache and buffers need %zu MiB (%d pages of %d)",
                bytes >> 20, l->num_pages, l->page_size);
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
    f->device = m->device;
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
    void *const buffers[] = {f->normed,    f->delta,       f->qkv,        f->mixed,  f->gate_up,
                             f->activated, f->head_hidden, f->head_mixed, f->logits, f->pool};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        device_free(f->device, buffers[i]);
    mirror_destroy(f->device, &f->step);
    mirror_destroy(f->device, &f->embedded);
    free(f->tokens);
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

/* The tokens' rows of the table, and the step's arrays, to the device. */
static bool embed(forward *f, char error[GGUF_ERROR])
{
    const size_t bytes = bytes_of(f->m, f->m->config.hidden_size);
    const uint8_t *table = f->m->embedding;
    uint8_t *to = f->embedded.host;
    for (int32_t row = 0; row < f->num_tokens; row++)
        memcpy(to + (size_t)row * bytes, table + (size_t)f->tokens[row] * bytes, bytes);
    const int32_t *end = f->kv_indices + f->num_entries, *begin = f->step.host;
    return mirror_upload(f->device, &f->embedded, (size_t)f->num_tokens * bytes, error) &&
           mirror_upload(f->device, &f->step, (size_t)(end - begin) * sizeof *begin, error);
}

/* The page tables of a step in the block that begins at base: the host's, or the device's. */
typedef struct page_table {
    view qo_indptr, kv_indptr, kv_indices, last_page_len;
    qkv_kv_index index;
} page_table;

static const qkv_kv_index *table_of(const forward *f, page_table *t, DLDevice where,
                                    const int32_t *base)
{
    const int32_t *host = f->step.host;
    const int64_t requests = f->num_requests;
    t->index = (qkv_kv_index){
        QKV_KV_INDEX_INIT,
        .qo_indptr =
            vector(&t->qo_indptr, where, base + (f->qo_indptr - host), QKV_I32, requests + 1),
        .kv_indptr =
            vector(&t->kv_indptr, where, base + (f->kv_indptr - host), QKV_I32, requests + 1),
        .kv_indices =
            vector(&t->kv_indices, where, base + (f->kv_indices - host), QKV_I32, f->num_entries),
        .kv_last_page_len =
            vector(&t->last_page_len, where, base + (f->last_page_len - host), QKV_I32, requests)};
    return &t->index;
}

/* out[rows, n] = x[rows, k] * w[n, k]^T */
static qkv_status linear(forward *f, void *out, DLDataType dtype_out, int64_t n, const void *x,
                         int64_t k, const void *w, int64_t rows)
{
    const DLDevice on = f->device->where;
    view out_view, x_view, w_view;
    return qkv_gemm(f->ctx, matrix(&out_view, on, out, dtype_out, rows, n, n),
                    matrix(&x_view, on, x, f->m->dtype, rows, k, k),
                    matrix(&w_view, on, w, f->m->dtype, n, k, k), NULL);
}

/* hidden += delta (unless this is the first norm of all), normed = rmsnorm(hidden). */
static qkv_status norm(forward *f, void *normed, void *hidden, const void *delta,
                       const float *weight, int64_t rows)
{
    const int64_t width = f->m->config.hidden_size;
    const DLDataType dtype = f->m->dtype;
    const DLDevice on = f->device->where;
    view out, residual, x, w;
    matrix(&out, on, normed, dtype, rows, width, width);
    matrix(&residual, on, hidden, dtype, rows, width, width);
    vector(&w, on, weight, QKV_F32, width);
    const float eps = f->m->config.norm_eps;
    if (!delta) return qkv_rmsnorm(f->ctx, &out.tensor, &residual.tensor, &w.tensor, eps, 0, NULL);
    matrix(&x, on, delta, dtype, rows, width, width);
    return qkv_add_rmsnorm(f->ctx, &out.tensor, &residual.tensor, &x.tensor, &w.tensor, eps, 0,
                           NULL);
}

#define TRY(call)                                                                                  \
    do {                                                                                           \
        const qkv_status try_ = (call);                                                            \
        if (try_ != QKV_OK) return try_;                                                           \
    } while (0)

/* normed -> mixed: projections, rotation, keys and values to their pages, attention. */
static qkv_status attend(forward *f, int32_t index, const qkv_kv_index *kv)
{
    const model_config *c = &f->m->config;
    const model_layer *layer = &f->m->layers[index];
    const DLDataType dtype = f->m->dtype;
    const int64_t rows = f->num_tokens, dim = c->head_dim, kv_heads = c->num_kv_heads;
    const int64_t part = page_part(f->m, f->limits.page_size), kv_width = kv_heads * dim;
    TRY(linear(f, f->qkv, dtype, f->qkv_width, f->normed, c->hidden_size, layer->qkv, rows));

    const DLDevice on = f->device->where;
    view q, k, v, o, positions, k_pages, v_pages;
    const uint8_t *keys = f->qkv + bytes_of(f->m, f->qo_width);
    heads_of(&q, on, f->qkv, dtype, rows, c->num_qo_heads, dim, f->qkv_width);
    heads_of(&k, on, keys, dtype, rows, kv_heads, dim, f->qkv_width);
    heads_of(&v, on, keys + bytes_of(f->m, kv_width), dtype, rows, kv_heads, dim, f->qkv_width);
    heads_of(&o, on, f->mixed, dtype, rows, c->num_qo_heads, dim, f->qo_width);
    vector(&positions, on, f->step.there, QKV_I32, rows); /* the block's first */
    const int64_t shape[] = {f->limits.num_pages, f->limits.page_size, kv_heads, dim};
    const int64_t strides[] = {part * 2 * c->num_layers, kv_width, dim, 1};
    const uint8_t *pages = f->pool + bytes_of(f->m, index * 2 * part);
    view_of(&k_pages, on, pages, dtype, 4, shape, strides);
    view_of(&v_pages, on, pages + bytes_of(f->m, part), dtype, 4, shape, strides);

    const qkv_kv_append_options rotated = {QKV_KV_APPEND_OPTIONS_INIT, .rope = &c->rope,
                                           .q = &q.tensor, .q_out = &q.tensor};
    TRY(qkv_kv_append(f->ctx, &k_pages.tensor, &v_pages.tensor, QKV_NHD, &k.tensor, &v.tensor, kv,
                      &positions.tensor, &rotated, NULL));
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .q = &q.tensor, .k = &k_pages.tensor,
                                 .v = &v_pages.tensor, .o = &o.tensor};
    return qkv_attention_run(f->attention, &io, NULL);
}

/* normed -> delta: down(silu(gate) * up). */
static qkv_status feed_forward(forward *f, const model_layer *layer, int64_t rows)
{
    const int64_t hidden = f->m->config.hidden_size;
    const int64_t ffn = f->m->config.ffn_size;
    const DLDataType dtype = f->m->dtype;
    const DLDevice on = f->device->where;
    view gate, up, out;
    TRY(linear(f, f->gate_up, dtype, 2 * ffn, f->normed, hidden, layer->gate_up, rows));
    matrix(&gate, on, f->gate_up, dtype, rows, ffn, 2 * ffn);
    matrix(&up, on, f->gate_up + bytes_of(f->m, ffn), dtype, rows, ffn, 2 * ffn);
    matrix(&out, on, f->activated, dtype, rows, ffn, ffn);
    TRY(qkv_gated_activation(f->ctx, &out.tensor, &gate.tensor, &up.tensor, QKV_SILU, NULL));
    return linear(f, f->delta, dtype, hidden, f->activated, ffn, layer->down, rows);
}

/* What follows attention in a layer, row by row: hidden gets its output, delta the rest's. */
static qkv_status finish_layer(forward *f, const model_layer *layer, uint8_t *hidden,
                               const uint8_t *mixed, int64_t rows)
{
    TRY(linear(f, f->delta, f->m->dtype, f->m->config.hidden_size, mixed, f->qo_width,
               layer->output, rows));
    TRY(norm(f, f->normed, hidden, f->delta, layer->ffn_norm, rows));
    return feed_forward(f, layer, rows);
}

/* All layers but what follows the last one's attention: few rows need that. */
static qkv_status run_layers(forward *f)
{
    const int64_t rows = f->num_tokens;
    page_table here, there;
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1,
                                       .levels =
                                           table_of(f, &here, (DLDevice){kDLCPU, 0}, f->step.host)};
    const qkv_kv_index *kv = table_of(f, &there, f->device->where, f->step.there);
    TRY(qkv_attention_plan(f->attention, &batch, NULL));
    for (int32_t i = 0; i < f->m->config.num_layers; i++) {
        if (i > 0) TRY(finish_layer(f, &f->m->layers[i - 1], f->hidden, f->mixed, rows));
        TRY(norm(f, f->normed, f->hidden, i > 0 ? f->delta : NULL, f->m->layers[i].attention_norm,
                 rows));
        TRY(attend(f, i, kv));
    }
    return QKV_OK;
}

bool forward_run(forward *f, char error[GGUF_ERROR])
{
    return embed(f, error) && works(error, "forward", run_layers(f));
}

/* The last layer's rest and the head, for head_hidden and head_mixed. */
static qkv_status run_head(forward *f, int64_t rows)
{
    const model *m = f->m;
    TRY(finish_layer(f, &m->layers[m->config.num_layers - 1], f->head_hidden, f->head_mixed, rows));
    TRY(norm(f, f->normed, f->head_hidden, f->delta, m->output_norm, rows));
    return linear(f, f->logits, QKV_F32, m->config.vocab_size, f->normed, m->config.hidden_size,
                  m->head, rows);
}

/* to[i] = from[rows[i]]: a copy for each run of rows that follow each other. */
static bool gather(const forward *f, uint8_t *to, const uint8_t *from, size_t row_bytes,
                   const int32_t *rows, int32_t num_rows, char error[GGUF_ERROR])
{
    bool good = true;
    for (int32_t begin = 0, end; begin < num_rows && good; begin = end) {
        for (end = begin + 1; end < num_rows && rows[end] == rows[end - 1] + 1;) end++;
        good = device_copy(f->device, to + (size_t)begin * row_bytes,
                           from + (size_t)rows[begin] * row_bytes,
                           (size_t)(end - begin) * row_bytes, error);
    }
    return good;
}

float *forward_logits(forward *f, const int32_t *rows, int32_t num_rows, char error[GGUF_ERROR])
{
    const size_t hidden_bytes = bytes_of(f->m, f->m->config.hidden_size);
    const size_t mixed_bytes = bytes_of(f->m, f->qo_width);
    const bool good = gather(f, f->head_hidden, f->hidden, hidden_bytes, rows, num_rows, error) &&
                      gather(f, f->head_mixed, f->mixed, mixed_bytes, rows, num_rows, error) &&
                      works(error, "output head", run_head(f, num_rows));
    return good ? f->logits : NULL;
}

/* ---- pages to and from the host ------------------------------------------------------------- */

bool forward_save_pages(const forward *f, const int32_t *pages, int32_t num_pages, void *to,
                        char error[GGUF_ERROR])
{
    const size_t bytes = forward_page_bytes(f->m, f->limits.page_size);
    bool good = true;
    for (int32_t i = 0; i < num_pages && good; i++)
        good = device_download(f->device, (uint8_t *)to + (size_t)i * bytes,
                               f->pool + (size_t)pages[i] * bytes, bytes, error);
    return good;
}

bool forward_load_pages(forward *f, const int32_t *pages, int32_t num_pages, const void *from,
                        char error[GGUF_ERROR])
{
    const size_t bytes = forward_page_bytes(f->m, f->limits.page_size);
    bool good = true;
    for (int32_t i = 0; i < num_pages && good; i++)
        good = device_upload(f->device, f->pool + (size_t)pages[i] * bytes,
                             (const uint8_t *)from + (size_t)i * bytes, bytes, error);
    return good;
}
