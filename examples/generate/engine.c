/* engine.c - the life of requests and the step that moves them on.
 * SPDX-License-Identifier: Apache-2.0 */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "qkv/sampling.h"
#include "view.h"

/* ---- create ---------------------------------------------------------------------------------- */

/* A default pool takes no more than a quarter of the device's memory. */
static bool most_pages(const engine *e, int64_t *pages, char error[GGUF_ERROR])
{
    size_t memory;
    if (!device_memory(e->m->device, &memory, error)) return false;
    *pages = (int64_t)(memory / 4 / forward_page_bytes(e->m, e->options.page_size));
    return true;
}

static int compare_descending(const void *a, const void *b)
{
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x < y) - (x > y);
}

/* sizes: [num_requests] pages of each request, sorted here. */
static bool default_pages(engine *e, int32_t *sizes, char error[GGUF_ERROR])
{
    int64_t wanted = 0, most;
    if (!most_pages(e, &most, error)) return false;
    qsort(sizes, (size_t)e->num_requests, sizeof *sizes, compare_descending);
    for (int32_t i = 0; i < e->num_requests && i < e->options.max_batch; i++) wanted += sizes[i];
    if (wanted > most) wanted = most > sizes[0] ? most : sizes[0];
    e->options.num_pages = (int32_t)(wanted < INT32_MAX ? wanted : INT32_MAX);
    return true;
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
    r->arrival_ms = p->arrival_ms;
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
    const bool sized = e->options.num_pages > 0 || default_pages(e, sizes, error);
    free(sizes);
    if (!sized) return false;
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

/* What qkv_sample is told of every request, which is the same for all but the draw's number. */
static bool create_sampling(engine *e, char error[GGUF_ERROR])
{
    const compute_device *d = e->m->device;
    const size_t n = (size_t)e->options.max_batch, words = n * 4, doubles = n * 8;
    if (!mirror_create(d, words, &e->drawn) || !mirror_create(d, words, &e->temperatures) ||
        !mirror_create(d, words, &e->top_ps) || !mirror_create(d, words, &e->top_ks) ||
        !mirror_create(d, doubles, &e->seeds) || !mirror_create(d, doubles, &e->offsets))
        return fail(error, "out of memory");
    for (size_t i = 0; i < n; i++) {
        ((float *)e->temperatures.host)[i] = e->options.temperature;
        ((float *)e->top_ps.host)[i] = e->options.top_p;
        ((int32_t *)e->top_ks.host)[i] = e->options.top_k;
        ((uint64_t *)e->seeds.host)[i] = e->options.seed;
    }
    return mirror_upload(d, &e->temperatures, words, error) &&
           mirror_upload(d, &e->top_ps, words, error) &&
           mirror_upload(d, &e->top_ks, words, error) &&
           mirror_upload(d, &e->seeds, doubles, error);
}

static bool create_step(engine *e, char error[GGUF_ERROR])
{
    const size_t n = (size_t)e->options.max_batch;
    e->running = malloc(n * sizeof *e->running);
    e->sampled = malloc(n * sizeof *e->sampled);
    e->rows = malloc(n * sizeof *e->rows);
    if (!e->running || !e->sampled || !e->rows) return fail(error, "out of memory");
    return create_sampling(e, error);
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
    mirror *const mirrors[] = {&e->drawn,  &e->temperatures, &e->top_ps,
                               &e->top_ks, &e->seeds,        &e->offsets};
    for (size_t i = 0; i < sizeof mirrors / sizeof mirrors[0]; i++)
        mirror_destroy(e->m->device, mirrors[i]);
    free(e->requests);
    free(e->running);
    free(e->sampled);
    free(e->rows);
    page_pool_destroy(e->pool);
    forward_destroy(e->compute);
    free(e);
}

/* ---- a step ---------------------------------------------------------------------------------- */

/* Logits [num_sampled, vocab_size] to the first of drawn. The draw number is the count of tokens
 * generated so far, so a request's tokens do not depend on the steps they come from. */
static bool sample(engine *e, float *logits, char error[GGUF_ERROR])
{
    const compute_device *d = e->m->device;
    const int64_t n = e->num_sampled, vocab = e->m->config.vocab_size;
    view scores, drawn, temperatures, top_ks, top_ps, seeds, offsets;
    matrix(&scores, d->where, logits, QKV_F32, n, vocab, vocab);
    vector(&drawn, d->where, e->drawn.there, QKV_I32, n);
    if (e->options.temperature == 0)
        return works(error, "qkv_argmax", qkv_argmax(e->ctx, &drawn.tensor, &scores.tensor, NULL));
    uint64_t *numbers = e->offsets.host;
    for (int64_t i = 0; i < n; i++)
        numbers[i] = (uint64_t)(e->sampled[i]->num_tokens - e->sampled[i]->prompt_len);
    const qkv_sampling_params params = {
        QKV_SAMPLING_PARAMS_INIT,
        .temperature = vector(&temperatures, d->where, e->temperatures.there, QKV_F32, n),
        .top_k = vector(&top_ks, d->where, e->top_ks.there, QKV_I32, n),
        .top_p = vector(&top_ps, d->where, e->top_ps.there, QKV_F32, n),
        .seed = vector(&seeds, d->where, e->seeds.there, QKV_U64, n),
        .offset = vector(&offsets, d->where, e->offsets.there, QKV_U64, n)};
    return mirror_upload(d, &e->offsets, (size_t)n * sizeof *numbers, error) &&
           works(error, "qkv_sample",
                 qkv_sample(e->ctx, &drawn.tensor, &scores.tensor, &params, NULL));
}

/* The step's tokens, when all of it is done. */
static bool draw(engine *e, char error[GGUF_ERROR])
{
    const compute_device *d = e->m->device;
    if (e->num_sampled == 0) return device_wait(d, error);
    float *logits = forward_logits(e->compute, e->rows, e->num_sampled, error);
    return logits && sample(e, logits, error) &&
           mirror_download(d, &e->drawn, (size_t)e->num_sampled * sizeof(int32_t), error);
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
    const int32_t *drawn = e->drawn.host;
    for (int32_t i = 0; i < e->num_sampled; i++) {
        request *r = e->sampled[i];
        const int32_t token = drawn[i];
        r->token_ms[r->num_tokens - r->prompt_len] = ms;
        r->tokens[r->num_tokens++] = token;
        if (r->num_tokens == r->prompt_len + r->max_new ||
            (!e->options.ignore_end && tokenizer_is_end(e->text, token)))
            finish(e, r);
    }
}

/* With nothing else to do. */
static void await_next(engine *e)
{
    const request *r = e->num_running == 0 ? engine_next(e) : NULL;
    for (double ms; r && (ms = engine_ms_until(e, r)) > 0;) sleep_ms(ms);
}

bool engine_step(engine *e, char error[GGUF_ERROR])
{
    await_next(e);
    const double before = now_ms();
    if (!engine_schedule(e, error) || !forward_run(e->compute, error) || !draw(e, error))
        return false;
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
