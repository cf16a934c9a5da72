/* engine.c - the life of requests and the step that moves them on.
 * SPDX-License-Identifier: Apache-2.0 */
#include "engine.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "qkv/sampling.h"

/* ---- create ---------------------------------------------------------------------------------- */

/* A default pool takes no more than a quarter of the machine's memory. */
static int64_t most_pages(const engine *e)
{
    const int64_t memory = (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    return memory / 4 / (int64_t)forward_page_bytes(e->m, e->options.page_size);
}

static int compare_descending(const void *a, const void *b)
{
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x < y) - (x > y);
}

/* sizes: [num_requests] pages of each request, sorted here. */
static int32_t default_pages(const engine *e, int32_t *sizes)
{
    int64_t wanted = 0;
    qsort(sizes, (size_t)e->num_requests, sizeof *sizes, compare_descending);
    for (int32_t i = 0; i < e->num_requests && i < e->options.max_batch; i++) wanted += sizes[i];
    const int64_t most = most_pages(e);
    if (wanted > most) wanted = most > sizes[0] ? most : sizes[0];
    return (int32_t)(wanted < INT32_MAX ? wanted : INT32_MAX);
}

static bool add_request(engine *e, request *r, const engine_prompt *p, char error[GGUF_ERROR])
{
    const int32_t context = e->m->config.context_len, number = (int32_t)(r - e->requests) + 1;
    if (p->num_tokens < 1) return fail(error, "prompt %d has no tokens", number);
    if (p->num_tokens > context)
        return fail(error, "prompt %d has %d tokens, more than the model's context of %d", number,
                    p->num_tokens, context);
    r->prompt_len = r->num_tokens = p->num_tokens;
    r->max_new = p->max_new;
    if (r->max_new > context - p->num_tokens + 1) r->max_new = context - p->num_tokens + 1;
    const int32_t kv_len = r->prompt_len + r->max_new - 1;
    r->tokens = malloc(((size_t)kv_len + 1) * sizeof *r->tokens);
    r->token_ms = malloc((size_t)r->max_new * sizeof *r->token_ms);
    r->pages = malloc((size_t)engine_pages_for(e, kv_len) * sizeof *r->pages);
    if (!r->tokens || !r->token_ms || !r->pages) return fail(error, "out of memory");
    memcpy(r->tokens, p->tokens, (size_t)p->num_tokens * sizeof *r->tokens);
    return true;
}

/* The step cannot be larger than this; the requests are known. */
static bool create_compute(engine *e, char error[GGUF_ERROR])
{
    const int32_t max_batch = e->options.max_batch;
    int32_t max_len = 0;
    int64_t piece = 0; /* most prompt tokens of a step */
    int32_t *sizes = malloc((size_t)e->num_requests * sizeof *sizes);
    if (!sizes) return fail(error, "out of memory");
    for (int32_t i = 0; i < e->num_requests; i++) {
        const int32_t len = e->requests[i].prompt_len + e->requests[i].max_new - 1;
        sizes[i] = engine_pages_for(e, len);
        if (len > max_len) max_len = len;
        piece += e->requests[i].prompt_len;
    }
    if (piece > e->options.chunk) piece = e->options.chunk;
    if (e->options.num_pages == 0) e->options.num_pages = default_pages(e, sizes);
    free(sizes);
    if (engine_pages_for(e, max_len) > e->options.num_pages)
        return fail(error,
                    "the longest prompt and what it may generate need %d pages of %d tokens, "
                    "the pool has %d (--pages, -n)",
                    engine_pages_for(e, max_len), e->options.page_size, e->options.num_pages);
    const forward_limits limits = {.max_requests = max_batch,
                                   .max_tokens = max_batch + (int32_t)piece,
                                   .max_logits = max_batch,
                                   .max_kv_len = max_len,
                                   .num_pages = e->options.num_pages,
                                   .page_size = e->options.page_size};
    e->compute = forward_create(e->ctx, e->m, &limits, error);
    if (!e->compute) return false;
    e->pool = page_pool_create(e->options.num_pages, e->options.page_size);
    return e->pool || fail(error, "out of memory");
}

static bool create_step(engine *e, char error[GGUF_ERROR])
{
    const size_t n = (size_t)e->options.max_batch;
    e->running = malloc(n * sizeof *e->running);
    e->sampled = malloc(n * sizeof *e->sampled);
    e->rows = malloc(n * sizeof *e->rows);
    e->drawn = malloc(n * sizeof *e->drawn);
    e->top_ks = malloc(n * sizeof *e->top_ks);
    e->temperatures = malloc(n * sizeof *e->temperatures);
    e->top_ps = malloc(n * sizeof *e->top_ps);
    e->seeds = malloc(n * sizeof *e->seeds);
    e->offsets = malloc(n * sizeof *e->offsets);
    if (!e->running || !e->sampled || !e->rows || !e->drawn || !e->top_ks || !e->temperatures ||
        !e->top_ps || !e->seeds || !e->offsets)
        return fail(error, "out of memory");
    for (size_t i = 0; i < n; i++) {
        e->temperatures[i] = e->options.temperature;
        e->top_ks[i] = e->options.top_k;
        e->top_ps[i] = e->options.top_p;
        e->seeds[i] = e->options.seed;
    }
    return true;
}

static bool create(engine *e, const engine_prompt *prompts, char error[GGUF_ERROR])
{
    e->requests = calloc((size_t)e->num_requests, sizeof *e->requests);
    if (!e->requests) return fail(error, "out of memory");
    for (int32_t i = 0; i < e->num_requests; i++)
        if (!add_request(e, &e->requests[i], &prompts[i], error)) return false;
    return create_compute(e, error) && create_step(e, error);
}

engine *engine_create(qkv_context *ctx, const model *m, const tokenizer *text,
                      const engine_options *options, const engine_prompt *prompts,
                      int32_t num_prompts, char error[GGUF_ERROR])
{
    engine *e = calloc(1, sizeof *e);
    if (!e) {
        fail(error, "out of memory");
        return NULL;
    }
    e->ctx = ctx;
    e->m = m;
    e->text = text;
    e->options = *options;
    e->num_requests = num_prompts;
    if (e->options.max_batch > num_prompts) e->options.max_batch = num_prompts;
    if (create(e, prompts, error)) {
        e->start_ms = now_ms();
        return e;
    }
    engine_destroy(e);
    return NULL;
}

void engine_destroy(engine *e)
{
    if (!e) return;
    for (int32_t i = 0; e->requests && i < e->num_requests; i++) {
        request *r = &e->requests[i];
        void *const parts[] = {r->tokens, r->token_ms, r->pages, r->saved};
        for (int j = 0; j < 4; j++) free(parts[j]);
    }
    void *const arrays[] = {e->requests, e->running,      e->sampled, e->rows,  e->drawn,
                            e->top_ks,   e->temperatures, e->top_ps,  e->seeds, e->offsets};
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) free(arrays[i]);
    page_pool_destroy(e->pool);
    forward_destroy(e->compute);
    free(e);
}

/* ---- a step ---------------------------------------------------------------------------------- */

static DLTensor tensor_of(void *data, DLDataType dtype, int32_t ndim, int64_t *shape)
{
    return (DLTensor){
        .data = data, .device = {kDLCPU, 0}, .ndim = ndim, .dtype = dtype, .shape = shape};
}

/* Logits [num_sampled, vocab_size] to drawn[num_sampled]. The draw number is the count of tokens
 * generated so far, so a request's tokens do not depend on the steps they come from. */
static qkv_status sample(engine *e, float *logits)
{
    int64_t shape[] = {e->num_sampled, e->m->config.vocab_size};
    const DLTensor scores = tensor_of(logits, QKV_F32, 2, shape);
    DLTensor drawn = tensor_of(e->drawn, QKV_I32, 1, shape);
    if (e->options.temperature == 0) return qkv_argmax(e->ctx, &drawn, &scores, NULL);
    for (int32_t i = 0; i < e->num_sampled; i++)
        e->offsets[i] = (uint64_t)(e->sampled[i]->num_tokens - e->sampled[i]->prompt_len);
    const DLTensor temperatures = tensor_of(e->temperatures, QKV_F32, 1, shape);
    const DLTensor top_ks = tensor_of(e->top_ks, QKV_I32, 1, shape);
    const DLTensor top_ps = tensor_of(e->top_ps, QKV_F32, 1, shape);
    const DLTensor seeds = tensor_of(e->seeds, QKV_U64, 1, shape);
    const DLTensor offsets = tensor_of(e->offsets, QKV_U64, 1, shape);
    const qkv_sampling_params params = {QKV_SAMPLING_PARAMS_INIT, .temperature = &temperatures,
                                        .top_k = &top_ks,         .top_p = &top_ps,
                                        .seed = &seeds,           .offset = &offsets};
    return qkv_sample(e->ctx, &drawn, &scores, &params, NULL);
}

static void finish(engine *e, request *r)
{
    int32_t i = 0;
    while (e->running[i] != r) i++;
    e->num_running--;
    memmove(e->running + i, e->running + i + 1, (size_t)(e->num_running - i) * sizeof *e->running);
    page_pool_release(e->pool, r->pages, r->num_pages);
    r->num_pages = 0;
    r->state = FINISHED;
    e->num_finished++;
}

static void take_tokens(engine *e, double ms)
{
    for (int32_t i = 0; i < e->num_sampled; i++) {
        request *r = e->sampled[i];
        const int32_t token = e->drawn[i];
        r->token_ms[r->num_tokens - r->prompt_len] = ms;
        r->tokens[r->num_tokens++] = token;
        if (r->num_tokens == r->prompt_len + r->max_new ||
            (!e->options.ignore_end && tokenizer_is_end(e->text, token)))
            finish(e, r);
    }
}

bool engine_step(engine *e, char error[GGUF_ERROR])
{
    const double before = now_ms();
    if (!engine_schedule(e, error) || !forward_run(e->compute, error)) return false;
    if (e->num_sampled > 0) {
        float *logits = forward_logits(e->compute, e->rows, e->num_sampled, error);
        if (!logits || !works(error, "sampling", sample(e, logits))) return false;
    }
    const double after = now_ms();
    take_tokens(e, after);
    if (e->step_prompt_tokens > 0) {
        e->counts.prompt_tokens += e->step_prompt_tokens;
        e->counts.prompt_ms += after - before;
    } else {
        e->counts.decode_tokens += e->num_sampled;
        e->counts.decode_ms += after - before;
    }
    return true;
}
