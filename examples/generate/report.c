/* report.c - SPDX-License-Identifier: Apache-2.0 */
#include "report.h"

#include <stdlib.h>

#include "clock.h"

static int64_t num_generated(const engine *e)
{
    int64_t n = 0;
    for (int32_t i = 0; i < e->num_requests; i++)
        n += e->requests[i].num_tokens - e->requests[i].prompt_len;
    return n;
}

static double per_second(int64_t count, double ms)
{
    return ms > 0 ? (double)count * 1e3 / ms : 0;
}

void report_progress(const engine *e, console *terminal)
{
    const int32_t waiting = e->num_requests - e->num_finished - e->num_running;
    console_progress(terminal, "running %d, waiting %d, done %d | %.0f tokens/s | KV %d/%d pages",
                     (int)e->num_running, (int)waiting, (int)e->num_finished,
                     per_second(num_generated(e), now_ms() - e->start_ms),
                     (int)page_pool_num_held(e->pool), (int)page_pool_size(e->pool));
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Milliseconds, sorted before percentile is asked. */
typedef struct samples {
    double *ms;
    size_t count;
} samples;

static double mean(const samples *s)
{
    double sum = 0;
    for (size_t i = 0; i < s->count; i++) sum += s->ms[i];
    return s->count ? sum / (double)s->count : 0;
}

/* The smallest sample that a share of all samples does not exceed; s is sorted. */
static double percentile(const samples *s, double share)
{
    const size_t i = (size_t)((double)s->count * share);
    return s->count ? s->ms[i < s->count ? i : s->count - 1] : 0;
}

bool report_write(const engine *e, console *terminal, char error[GGUF_ERROR])
{
    const engine_counts *c = &e->counts;
    const int64_t generated = num_generated(e);
    samples first = {.ms = malloc((size_t)e->num_requests * sizeof(double))};
    samples between = {.ms = malloc((size_t)(generated ? generated : 1) * sizeof(double))};
    if (!first.ms || !between.ms) {
        free(first.ms);
        free(between.ms);
        return fail(error, "out of memory");
    }
    for (int32_t i = 0; i < e->num_requests; i++) {
        const request *r = &e->requests[i];
        first.ms[first.count++] = r->token_ms[0] - e->start_ms;
        for (int32_t t = 1; t < r->num_tokens - r->prompt_len; t++)
            between.ms[between.count++] = r->token_ms[t] - r->token_ms[t - 1];
    }
    qsort(first.ms, first.count, sizeof(double), compare);
    qsort(between.ms, between.count, sizeof(double), compare);
    console_say(terminal, "time to first token   mean %.1f ms, p50 %.1f, max %.1f", mean(&first),
                percentile(&first, 0.5), percentile(&first, 1));
    console_say(terminal, "time between tokens   mean %.2f ms, p50 %.2f, p99 %.2f", mean(&between),
                percentile(&between, 0.5), percentile(&between, 0.99));
    console_say(terminal,
                "prefill               %.0f tokens/s (%lld tokens, in steps with prompts)",
                per_second(c->prompt_tokens, c->prompt_ms), (long long)c->prompt_tokens);
    console_say(terminal, "decode                %.0f tokens/s (%lld tokens, in the other steps)",
                per_second(c->decode_tokens, c->decode_ms), (long long)c->decode_tokens);
    console_say(terminal, "KV cache              peak %d of %d pages of %d tokens, %zu KiB each",
                (int)page_pool_peak_held(e->pool), (int)page_pool_size(e->pool),
                (int)e->options.page_size, forward_page_bytes(e->m, e->options.page_size) >> 10);
    console_say(terminal, "shared                %lld prompt tokens; preemptions %lld",
                (long long)c->shared_tokens, (long long)c->preemptions);
    free(first.ms);
    free(between.ms);
    return true;
}
