/* model.c - loads and converts weights: one block of memory, filled by several threads, and copied to
 * the device where that is not the CPU.
 * SPDX-License-Identifier: Apache-2.0 */
#include "model.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One tensor of the file and where its rows go. */
typedef struct job {
    const gguf_tensor *source;
    uint8_t *target;
    bool to_f32;
    size_t first_row; /* rows of all jobs before it */
} job;

typedef struct loader {
    const gguf *file;
    model *m;
    uint8_t *base; /* NULL while measuring */
    size_t used;
    job *jobs;
    size_t num_jobs, num_rows, max_row_len;
    atomic_size_t next_row, done_rows;
    atomic_bool out_of_memory;
    model_progress progress;
    void *user;
} loader;

enum { ROWS_A_TURN = 32 };

/* ---- where everything goes ---------------------------------------------------------------- */

static void *carve(loader *l, size_t rows, size_t row_len, bool f32)
{
    const size_t bytes = rows * row_len * (f32 ? 4 : l->m->dtype.bits / 8);
    void *at = l->base ? l->base + l->used : NULL;
    l->used += (bytes + 63) / 64 * 64;
    return at;
}

/* Adds a tensor [rows, row_len]; it begins at row first of target. Rows of 1 are norm weights. */
static bool add(loader *l, const char *name, size_t rows, size_t row_len, void *target,
                size_t first, char error[GGUF_ERROR])
{
    const gguf_tensor *source = gguf_find_tensor(l->file, name);
    if (!source) return fail(error, "%s: missing", name);
    if (source->num_rows != rows || source->dims[0] != row_len)
        return fail(error, "%s: expected [%zu, %zu], got [%zu, %llu]", name, rows, row_len,
                    source->num_rows, (unsigned long long)source->dims[0]);
    const bool to_f32 = rows == 1;
    const size_t row_bytes = row_len * (to_f32 ? 4 : l->m->dtype.bits / 8);
    l->jobs[l->num_jobs++] = (job){.source = source,
                                   .target = target ? (uint8_t *)target + first * row_bytes : NULL,
                                   .to_f32 = to_f32,
                                   .first_row = l->num_rows};
    l->num_rows += rows;
    if (row_len > l->max_row_len) l->max_row_len = row_len;
    return true;
}

static bool add_layer(loader *l, int32_t index, char error[GGUF_ERROR])
{
    const model_config *c = &l->m->config;
    model_layer *layer = &l->m->layers[index];
    const size_t hidden = (size_t)c->hidden_size, ffn = (size_t)c->ffn_size;
    const size_t qo = (size_t)c->num_qo_heads * (size_t)c->head_dim;
    const size_t kv = (size_t)c->num_kv_heads * (size_t)c->head_dim;
    layer->attention_norm = carve(l, 1, hidden, true);
    layer->qkv = carve(l, qo + 2 * kv, hidden, false);
    layer->output = carve(l, hidden, qo, false);
    layer->ffn_norm = carve(l, 1, hidden, true);
    layer->gate_up = carve(l, 2 * ffn, hidden, false);
    layer->down = carve(l, hidden, ffn, false);

    const struct {
        const char *name;
        size_t rows, row_len;
        void *target;
        size_t first;
    } parts[] = {
        {"attn_norm", 1, hidden, layer->attention_norm, 0},
        {"attn_q", qo, hidden, layer->qkv, 0},
        {"attn_k", kv, hidden, layer->qkv, qo},
        {"attn_v", kv, hidden, layer->qkv, qo + kv},
        {"attn_output", hidden, qo, layer->output, 0},
        {"ffn_norm", 1, hidden, layer->ffn_norm, 0},
        {"ffn_gate", ffn, hidden, layer->gate_up, 0},
        {"ffn_up", ffn, hidden, layer->gate_up, ffn},
        {"ffn_down", hidden, ffn, layer->down, 0},
    };
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%d.%s.weight", (int)index, parts[i].name);
        if (!add(l, name, parts[i].rows, parts[i].row_len, parts[i].target, parts[i].first, error))
            return false;
    }
    return true;
}

/* Runs twice, as the measuring and as the carving pass, so that size and use cannot differ. */
static bool lay_out(loader *l, char error[GGUF_ERROR])
{
    model *m = l->m;
    const size_t hidden = (size_t)m->config.hidden_size, vocab = (size_t)m->config.vocab_size;
    l->used = l->num_jobs = l->num_rows = 0;
    m->embedding = carve(l, vocab, hidden, false); /* the block's first */
    if (!add(l, "token_embd.weight", vocab, hidden, m->embedding, 0, error)) return false;
    for (int32_t i = 0; i < m->config.num_layers; i++)
        if (!add_layer(l, i, error)) return false;
    m->output_norm = carve(l, 1, hidden, true);
    if (!add(l, "output_norm.weight", 1, hidden, m->output_norm, 0, error)) return false;
    m->head = m->embedding;
    if (!gguf_find_tensor(l->file, "output.weight")) return true;
    m->head = carve(l, vocab, hidden, false);
    return add(l, "output.weight", vocab, hidden, m->head, 0, error);
}

/* A tensor that nothing reads (a bias, say) means that the model computes something else. */
static bool check_all_used(const loader *l, char error[GGUF_ERROR])
{
    for (size_t i = 0; i < gguf_num_tensors(l->file); i++) {
        const gguf_tensor *tensor = gguf_tensor_at(l->file, i);
        bool used = gguf_equal(tensor->name, "rope_freqs.weight");
        for (size_t j = 0; j < l->num_jobs && !used; j++) used = l->jobs[j].source == tensor;
        if (!used)
            return fail(error, "tensor %.*s is not supported",
                        (int)(tensor->name.len < 64 ? tensor->name.len : 64), tensor->name.data);
    }
    return true;
}

/* ---- conversion ---------------------------------------------------------------------------- */

/* To the nearest bf16, ties to even. NaN keeps a set mantissa bit. */
static uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void convert_row(const loader *l, const job *j, size_t row, float *scratch)
{
    const size_t row_len = j->source->dims[0];
    if (j->to_f32 || l->m->dtype.bits == 32) {
        gguf_dequantize_row(j->source, row, (float *)(void *)j->target + row * row_len);
    } else {
        uint16_t *out = (uint16_t *)(void *)j->target + row * row_len;
        gguf_dequantize_row(j->source, row, scratch);
        for (size_t i = 0; i < row_len; i++) out[i] = to_bf16(scratch[i]);
    }
}

/* Takes some rows of the whole at a time until none are left. */
static void convert_rows(loader *l, bool show)
{
    float *scratch = malloc(l->max_row_len * sizeof *scratch);
    if (!scratch) {
        atomic_store(&l->out_of_memory, true);
        return;
    }
    size_t row, at = 0;
    while ((row = atomic_fetch_add(&l->next_row, ROWS_A_TURN)) < l->num_rows) {
        const size_t end = row + ROWS_A_TURN < l->num_rows ? row + ROWS_A_TURN : l->num_rows;
        for (size_t r = row; r < end; r++) {
            while (r >= l->jobs[at].first_row + l->jobs[at].source->num_rows) at++;
            convert_row(l, &l->jobs[at], r - l->jobs[at].first_row, scratch);
        }
        const size_t done = atomic_fetch_add(&l->done_rows, end - row) + end - row;
        if (show && l->progress) l->progress(l->user, (double)done / (double)l->num_rows);
    }
    free(scratch);
}

static void *convert_in_thread(void *arg)
{
    convert_rows(arg, false);
    return NULL;
}

static bool convert_all(loader *l, int32_t num_threads, char error[GGUF_ERROR])
{
    pthread_t threads[64];
    int32_t started = 0;
    while (started + 1 < num_threads && started < 64 &&
           !pthread_create(&threads[started], NULL, convert_in_thread, l))
        started++; /* fewer than asked for is slower, not wrong */
    convert_rows(l, true);
    for (int32_t i = 0; i < started; i++) pthread_join(threads[i], NULL);
    return !atomic_load(&l->out_of_memory) || fail(error, "out of memory while loading the model");
}

static bool fails_for_memory(const model *m, char error[GGUF_ERROR])
{
    return fail(error, "out of memory: the weights need %zu MiB", m->weight_bytes >> 20);
}

/* Copies the weights to the device and keeps of those here the embedding alone. */
static bool move_to_device(loader *l, char error[GGUF_ERROR])
{
    model *m = l->m;
    uint8_t *host = l->base;
    l->base = m->weights = device_alloc(m->device, m->weight_bytes);
    if (!l->base) return fails_for_memory(m, error);
    if (!device_upload(m->device, l->base, host, m->weight_bytes, error) || !lay_out(l, error))
        return false;
    const size_t bytes =
        (size_t)m->config.vocab_size * (size_t)m->config.hidden_size * (m->dtype.bits / 8);
    m->embedding = allocate(bytes);
    if (!m->embedding) return fails_for_memory(m, error);
    memcpy(m->embedding, host, bytes);
    free(host);
    m->host_weights = m->embedding;
    return true;
}

static bool load(loader *l, int32_t num_threads, char error[GGUF_ERROR])
{
    model *m = l->m;
    if (!model_config_read(l->file, &m->config, error)) return false;
    m->layers = calloc((size_t)m->config.num_layers, sizeof *m->layers);
    l->jobs = malloc(((size_t)m->config.num_layers * 9 + 3) * sizeof *l->jobs);
    if (!m->layers || !l->jobs) return fail(error, "out of memory");
    if (!lay_out(l, error) || !check_all_used(l, error)) return false;
    m->weight_bytes = l->used;
    m->host_weights = l->base = allocate(m->weight_bytes);
    if (!m->host_weights) return fails_for_memory(m, error);
    if (!lay_out(l, error) || !convert_all(l, num_threads, error)) return false;
    if (m->device->where.device_type != kDLCPU) return move_to_device(l, error);
    m->weights = m->host_weights;
    return true;
}

model *model_load(const gguf *file, const compute_device *d, DLDataType dtype, int32_t num_threads,
                  model_progress progress, void *user, char error[GGUF_ERROR])
{
    model *m = calloc(1, sizeof *m);
    if (!m) {
        fail(error, "out of memory");
        return NULL;
    }
    m->device = d;
    m->dtype = dtype;
    loader l = {.file = file, .m = m, .progress = progress, .user = user};
    const bool loaded = load(&l, num_threads, error);
    free(l.jobs);
    if (loaded) return m;
    model_destroy(m);
    return NULL;
}

void model_destroy(model *m)
{
    if (!m) return;
    free(m->layers);
    if (m->weights != m->host_weights) device_free(m->device, m->weights);
    free(m->host_weights);
    free(m);
}
