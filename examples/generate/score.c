/* score.c - SPDX-License-Identifier: Apache-2.0 */
#include "score.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WINDOW = 512, WINDOWS_A_STEP = 4, ROWS_A_TURN = 128 };

static int32_t min_int(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

/* A forward pass whose logits are wanted on the host. */
typedef struct scorer {
    forward *f;
    const model *m;
    float *logits;  /* [ROWS_A_TURN, vocab_size] */
    int32_t *pages; /* of its requests, one after the other */
    int32_t pages_per_request;
} scorer;

static void destroy(scorer *s)
{
    forward_destroy(s->f);
    free(s->logits);
    free(s->pages);
}

/* For num_requests requests of len tokens. To be destroyed even on failure. */
static bool create(scorer *s, qkv_context *ctx, const model *m, int32_t page_size,
                   int32_t num_requests, int32_t len, int32_t max_tokens, char error[GGUF_ERROR])
{
    *s = (scorer){.m = m, .pages_per_request = (len - 1) / page_size + 1};
    const forward_limits limits = {.max_requests = num_requests,
                                   .max_tokens = max_tokens,
                                   .max_logits = ROWS_A_TURN,
                                   .max_kv_len = len,
                                   .num_pages = num_requests * s->pages_per_request,
                                   .page_size = page_size};
    s->logits = malloc(ROWS_A_TURN * (size_t)m->config.vocab_size * sizeof *s->logits);
    s->pages = malloc((size_t)limits.num_pages * sizeof *s->pages);
    if (!s->logits || !s->pages) return fail(error, "out of memory");
    for (int32_t i = 0; i < limits.num_pages; i++) s->pages[i] = i;
    s->f = forward_create(ctx, m, &limits, error);
    return s->f != NULL;
}

/* Rows [first, first + n) of the step, n at most ROWS_A_TURN, to s->logits. */
static bool read_logits(const scorer *s, int32_t first, int32_t n, char error[GGUF_ERROR])
{
    int32_t rows[ROWS_A_TURN];
    const size_t row_bytes = (size_t)s->m->config.vocab_size * sizeof *s->logits;
    for (int32_t i = 0; i < n; i++) rows[i] = first + i;
    const float *logits = forward_logits(s->f, rows, n, error);
    return logits && device_download(s->m->device, s->logits, logits, (size_t)n * row_bytes, error);
}

static bool write_logits(const scorer *s, const int32_t *tokens, int32_t num_tokens, int32_t chunk,
                         FILE *file, char error[GGUF_ERROR])
{
    const size_t row_bytes = (size_t)s->m->config.vocab_size * sizeof *s->logits;
    for (int32_t at = 0; at < num_tokens; at += chunk) {
        const int32_t n = min_int(chunk, num_tokens - at);
        forward_begin(s->f);
        forward_add(s->f, tokens + at, n, at, s->pages);
        if (!forward_run(s->f, error)) return false;
        for (int32_t row = 0; row < n; row += ROWS_A_TURN) {
            const int32_t rows = min_int(ROWS_A_TURN, n - row);
            if (!read_logits(s, row, rows, error)) return false;
            if (fwrite(s->logits, row_bytes, (size_t)rows, file) != (size_t)rows)
                return fail(error, "logits file: %s", strerror(errno));
        }
    }
    return true;
}

static bool write_logits_file(const scorer *s, const int32_t *tokens, int32_t num_tokens,
                              int32_t chunk, const char *path, char error[GGUF_ERROR])
{
    FILE *file = fopen(path, "wb");
    if (!file) return fail(error, "%s: %s", path, strerror(errno));
    const bool good = write_logits(s, tokens, num_tokens, chunk, file, error);
    const bool closed = fclose(file) == 0;
    return good && (closed || fail(error, "%s: %s", path, strerror(errno)));
}

bool score_logits(qkv_context *ctx, const model *m, const engine_options *options,
                  const int32_t *tokens, int32_t num_tokens, const char *path,
                  char error[GGUF_ERROR])
{
    if (num_tokens < 1) return fail(error, "the prompt has no tokens");
    if (num_tokens > m->config.context_len)
        return fail(error, "the prompt has %d tokens, more than the model's context of %d",
                    num_tokens, m->config.context_len);
    const int32_t chunk = min_int(options->chunk, num_tokens);
    scorer s;
    const bool good = create(&s, ctx, m, options->page_size, 1, num_tokens, chunk, error) &&
                      write_logits_file(&s, tokens, num_tokens, chunk, path, error);
    destroy(&s);
    return good;
}

/* -log softmax(logits)[token] */
static double surprise(const float *logits, int32_t vocab, int32_t token)
{
    float max = logits[0];
    double sum = 0;
    for (int32_t i = 1; i < vocab; i++) max = logits[i] > max ? logits[i] : max;
    for (int32_t i = 0; i < vocab; i++) sum += (double)expf(logits[i] - max);
    return log(sum) - (double)(logits[token] - max);
}

/* Sums over the rows of one step, which holds num_tokens tokens from a window's start on. */
static bool add_step(const scorer *s, const int32_t *tokens, int32_t num_tokens, double *sum,
                     int64_t *count, char error[GGUF_ERROR])
{
    const int32_t vocab = s->m->config.vocab_size;
    for (int32_t row = 0; row < num_tokens; row += ROWS_A_TURN) {
        const int32_t rows = min_int(ROWS_A_TURN, num_tokens - row);
        if (!read_logits(s, row, rows, error)) return false;
        for (int32_t i = row; i < row + rows; i++) {
            if (i + 1 == num_tokens || (i + 1) % WINDOW == 0) continue; /* a window's last */
            *sum += surprise(s->logits + (int64_t)(i - row) * vocab, vocab, tokens[i + 1]);
            ++*count;
        }
    }
    return true;
}

static bool add_all(const scorer *s, const int32_t *tokens, int32_t num_tokens, console *terminal,
                    double *nll, char error[GGUF_ERROR])
{
    double sum = 0;
    int64_t count = 0;
    for (int32_t at = 0; at < num_tokens; at += WINDOW * WINDOWS_A_STEP) {
        const int32_t n = min_int(WINDOW * WINDOWS_A_STEP, num_tokens - at);
        console_progress(terminal, "perplexity: %d of %d tokens", at, num_tokens);
        forward_begin(s->f);
        for (int32_t i = 0; i * WINDOW < n; i++)
            forward_add(s->f, tokens + at + i * WINDOW, min_int(WINDOW, n - i * WINDOW), 0,
                        s->pages + i * s->pages_per_request);
        if (!forward_run(s->f, error) || !add_step(s, tokens + at, n, &sum, &count, error))
            return false;
    }
    *nll = sum / (double)count;
    return true;
}

bool score_perplexity(qkv_context *ctx, const model *m, const engine_options *options,
                      const int32_t *tokens, int32_t num_tokens, console *terminal, double *nll,
                      char error[GGUF_ERROR])
{
    if (num_tokens < 2) return fail(error, "the text has %d tokens, too few", num_tokens);
    if (m->config.context_len < WINDOW)
        return fail(error, "the model's context of %d is less than a window of %d",
                    m->config.context_len, WINDOW);
    scorer s;
    const bool good = create(&s, ctx, m, options->page_size, WINDOWS_A_STEP, WINDOW,
                             WINDOW * WINDOWS_A_STEP, error) &&
                      add_all(&s, tokens, num_tokens, terminal, nll, error);
    destroy(&s);
    return good;
}
