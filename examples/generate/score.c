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

/* A forward pass for num_requests requests of len tokens, with the pages each of them needs:
 * request i has pages[i * (number of pages) ...]. */
static forward *create(qkv_context *ctx, const model *m, const engine_options *options,
                       int32_t num_requests, int32_t len, int32_t max_tokens, int32_t **pages,
                       char error[GGUF_ERROR])
{
    const int32_t per_request = (len - 1) / options->page_size + 1;
    const forward_limits limits = {.max_requests = num_requests,
                                   .max_tokens = max_tokens,
                                   .max_logits = ROWS_A_TURN,
                                   .max_kv_len = len,
                                   .num_pages = num_requests * per_request,
                                   .page_size = options->page_size};
    *pages = malloc((size_t)limits.num_pages * sizeof **pages);
    if (!*pages) {
        fail(error, "out of memory");
        return NULL;
    }
    for (int32_t i = 0; i < limits.num_pages; i++) (*pages)[i] = i;
    forward *f = forward_create(ctx, m, &limits, error);
    if (!f) free(*pages);
    return f;
}

/* Rows [first, first + n) of the step, n at most ROWS_A_TURN. */
static float *logits_of(forward *f, int32_t first, int32_t n, char error[GGUF_ERROR])
{
    int32_t rows[ROWS_A_TURN];
    for (int32_t i = 0; i < n; i++) rows[i] = first + i;
    return forward_logits(f, rows, n, error);
}

static bool write_logits(forward *f, const int32_t *tokens, int32_t num_tokens, int32_t chunk,
                         const int32_t *pages, size_t vocab, FILE *file, char error[GGUF_ERROR])
{
    for (int32_t at = 0; at < num_tokens; at += chunk) {
        const int32_t n = min_int(chunk, num_tokens - at);
        forward_begin(f);
        forward_add(f, tokens + at, n, at, pages);
        if (!forward_run(f, error)) return false;
        for (int32_t row = 0; row < n; row += ROWS_A_TURN) {
            const int32_t rows = min_int(ROWS_A_TURN, n - row);
            const float *logits = logits_of(f, row, rows, error);
            if (!logits) return false;
            if (fwrite(logits, sizeof(float) * vocab, (size_t)rows, file) != (size_t)rows)
                return fail(error, "logits file: %s", strerror(errno));
        }
    }
    return true;
}

bool score_logits(qkv_context *ctx, const model *m, const engine_options *options,
                  const int32_t *tokens, int32_t num_tokens, const char *path,
                  char error[GGUF_ERROR])
{
    if (num_tokens < 1) return fail(error, "the prompt has no tokens");
    if (num_tokens > m->config.context_len)
        return fail(error, "the prompt has %d tokens, more than the model's context of %d",
                    num_tokens, m->config.context_len);
    int32_t *pages;
    const int32_t chunk = min_int(options->chunk, num_tokens);
    forward *f = create(ctx, m, options, 1, num_tokens, chunk, &pages, error);
    if (!f) return false;
    FILE *file = fopen(path, "wb");
    bool good = file || fail(error, "%s: %s", path, strerror(errno));
    good = good && write_logits(f, tokens, num_tokens, chunk, pages, (size_t)m->config.vocab_size,
                                file, error);
    if (file && fclose(file) && good) good = fail(error, "%s: %s", path, strerror(errno));
    free(pages);
    forward_destroy(f);
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
static bool add_step(forward *f, const int32_t *tokens, int32_t num_tokens, int32_t vocab,
                     double *sum, int64_t *count, char error[GGUF_ERROR])
{
    for (int32_t row = 0; row < num_tokens; row += ROWS_A_TURN) {
        const int32_t rows = min_int(ROWS_A_TURN, num_tokens - row);
        const float *logits = logits_of(f, row, rows, error);
        if (!logits) return false;
        for (int32_t i = row; i < row + rows; i++) {
            if (i + 1 == num_tokens || (i + 1) % WINDOW == 0) continue; /* a window's last */
            *sum += surprise(logits + (int64_t)(i - row) * vocab, vocab, tokens[i + 1]);
            ++*count;
        }
    }
    return true;
}

static bool add_all(forward *f, const model *m, const int32_t *tokens, int32_t num_tokens,
                    int32_t pages_per_window, const int32_t *pages, console *terminal, double *nll,
                    char error[GGUF_ERROR])
{
    double sum = 0;
    int64_t count = 0;
    for (int32_t at = 0; at < num_tokens; at += WINDOW * WINDOWS_A_STEP) {
        const int32_t n = min_int(WINDOW * WINDOWS_A_STEP, num_tokens - at);
        console_progress(terminal, "perplexity: %d of %d tokens", at, num_tokens);
        forward_begin(f);
        for (int32_t i = 0; i * WINDOW < n; i++)
            forward_add(f, tokens + at + i * WINDOW, min_int(WINDOW, n - i * WINDOW), 0,
                        pages + i * pages_per_window);
        if (!forward_run(f, error) ||
            !add_step(f, tokens + at, n, m->config.vocab_size, &sum, &count, error))
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
    int32_t *pages;
    forward *f =
        create(ctx, m, options, WINDOWS_A_STEP, WINDOW, WINDOW * WINDOWS_A_STEP, &pages, error);
    if (!f) return false;
    const bool good = add_all(f, m, tokens, num_tokens, (WINDOW - 1) / options->page_size + 1,
                              pages, terminal, nll, error);
    free(pages);
    forward_destroy(f);
    return good;
}
