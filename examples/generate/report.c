/* report.c - SPDX-License-Identifier: Apache-2.0 */
#include "report.h"

#include <stdlib.h>
#include <string.h>

#include "bytes.h"
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
    int32_t arrived = e->num_running + e->num_finished;
    for (int32_t i = 0; i < e->num_requests; i++)
        arrived += e->requests[i].state == PREEMPTED ||
                   (e->requests[i].state == WAITING && engine_ms_until(e, &e->requests[i]) <= 0);
    console_progress(terminal, "running %d, waiting %d, done %d | %.0f tokens/s | KV %d/%d pages",
                     (int)e->num_running, (int)(arrived - e->num_running - e->num_finished),
                     (int)e->num_finished, per_second(num_generated(e), now_ms() - e->start_ms),
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

/* What every request, and every token but its first, was waited for. */
typedef struct latencies {
    samples first, between;
} latencies;

static void free_latencies(latencies *l)
{
    free(l->first.ms);
    free(l->between.ms);
}

/* Of a run that has ended; to be freed. */
static bool collect(const engine *e, latencies *l, char error[GGUF_ERROR])
{
    *l = (latencies){.first = {.ms = malloc((size_t)e->num_requests * sizeof(double))},
                     .between = {.ms = malloc((size_t)num_generated(e) * sizeof(double))}};
    if (!l->first.ms || !l->between.ms) {
        free_latencies(l);
        fail(error, "out of memory");
        return false;
    }
    for (int32_t i = 0; i < e->num_requests; i++) {
        const request *r = &e->requests[i];
        l->first.ms[l->first.count++] = r->token_ms[0] - e->start_ms - r->arrival_ms;
        for (int32_t t = 1; t < r->num_tokens - r->prompt_len; t++)
            l->between.ms[l->between.count++] = r->token_ms[t] - r->token_ms[t - 1];
    }
    qsort(l->first.ms, l->first.count, sizeof(double), compare);
    qsort(l->between.ms, l->between.count, sizeof(double), compare);
    return true;
}

static void say_memory(const engine *e, console *terminal)
{
    console_say(terminal, "KV cache              peak %d of %d pages of %d tokens, %zu KiB each",
                (int)page_pool_peak_held(e->pool), (int)page_pool_size(e->pool),
                (int)e->options.page_size, forward_page_bytes(e->m, e->options.page_size) >> 10);
    console_say(terminal, "shared                %lld prompt tokens; preemptions %lld",
                (long long)e->counts.shared_tokens, (long long)e->counts.preemptions);
}

bool report_write(const engine *e, console *terminal, char error[GGUF_ERROR])
{
    const engine_counts *c = &e->counts;
    latencies l;
    if (!collect(e, &l, error)) return false;
    console_say(terminal, "time to first token   mean %.1f ms, p50 %.1f, max %.1f", mean(&l.first),
                percentile(&l.first, 0.5), percentile(&l.first, 1));
    console_say(terminal, "time between tokens   mean %.2f ms, p50 %.2f, p99 %.2f",
                mean(&l.between), percentile(&l.between, 0.5), percentile(&l.between, 0.99));
    console_say(terminal,
                "prefill               %.0f tokens/s (%lld tokens, in steps with prompts)",
                per_second(c->prompt_tokens, c->prompt_ms), (long long)c->prompt_tokens);
    console_say(terminal, "decode                %.0f tokens/s (%lld tokens, in the other steps)",
                per_second(c->decode_tokens, c->decode_ms), (long long)c->decode_tokens);
    say_memory(e, terminal);
    free_latencies(&l);
    return true;
}

/* ---- of a trace ------------------------------------------------------------------------------ */

/* Counts of a whole run, from its start to its last token. */
typedef struct totals {
    int64_t prompt_tokens, output_tokens;
    double ms;
} totals;

static totals add_up(const engine *e)
{
    totals sum = {.output_tokens = num_generated(e)};
    for (int32_t i = 0; i < e->num_requests; i++) {
        const request *r = &e->requests[i];
        const double end = r->token_ms[r->num_tokens - r->prompt_len - 1] - e->start_ms;
        sum.prompt_tokens += r->prompt_len;
        if (end > sum.ms) sum.ms = end;
    }
    return sum;
}

static void say_row(console *terminal, const char *name, const samples *s)
{
    console_say(terminal, "%-22s%10.2f%10.2f%10.2f%10.2f%10.2f", name, mean(s), percentile(s, 0.5),
                percentile(s, 0.9), percentile(s, 0.99), percentile(s, 1));
}

static void say_trace(const engine *e, const totals *sum, const latencies *l, const char *name,
                      console *terminal)
{
    console_say(terminal, "trace                 %s on %s, %.2f s", name,
                qkv_context_device_name(e->ctx), sum->ms * 1e-3);
    console_say(terminal, "requests              %d; tokens %lld in prompts, %lld generated",
                (int)e->num_requests, (long long)sum->prompt_tokens, (long long)sum->output_tokens);
    console_say(terminal, "throughput            %.2f requests/s, %.1f tokens/s generated",
                per_second(e->num_requests, sum->ms), per_second(sum->output_tokens, sum->ms));
    console_say(terminal, "%-22s%10s%10s%10s%10s%10s", "ms", "mean", "p50", "p90", "p99", "max");
    say_row(terminal, "time to first token", &l->first);
    say_row(terminal, "time between tokens", &l->between);
    say_memory(e, terminal);
}

static void print_samples(const char *name, const samples *s)
{
    printf("\"%s\": {\"mean\": %.4f, \"p50\": %.4f, \"p90\": %.4f, \"p99\": %.4f, \"max\": %.4f}, ",
           name, mean(s), percentile(s, 0.5), percentile(s, 0.9), percentile(s, 0.99),
           percentile(s, 1));
}

static void print_trace(const engine *e, const totals *sum, const latencies *l, const char *name)
{
    fputs("{\"trace\": ", stdout);
    json_write_string(stdout, name, strlen(name));
    printf(", \"device\": \"%s\", \"requests\": %d, \"prompt_tokens\": %lld, "
           "\"output_tokens\": %lld, \"seconds\": %.4f, \"requests_per_s\": %.4f, "
           "\"output_tokens_per_s\": %.3f, ",
           qkv_context_device_name(e->ctx), (int)e->num_requests, (long long)sum->prompt_tokens,
           (long long)sum->output_tokens, sum->ms * 1e-3, per_second(e->num_requests, sum->ms),
           per_second(sum->output_tokens, sum->ms));
    print_samples("ttft_ms", &l->first);
    print_samples("tbt_ms", &l->between);
    printf("\"shared_tokens\": %lld, \"preemptions\": %lld, \"peak_pages\": %d}\n",
           (long long)e->counts.shared_tokens, (long long)e->counts.preemptions,
           (int)page_pool_peak_held(e->pool));
}

bool report_trace(const engine *e, const char *name, bool json, console *terminal,
                  char error[GGUF_ERROR])
{
    const totals sum = add_up(e);
    latencies l;
    if (!collect(e, &l, error)) return false;
    say_trace(e, &sum, &l, name, terminal);
    if (json) print_trace(e, &sum, &l, name);
    free_latencies(&l);
    return !fflush(stdout) || fail(error, "standard output: cannot write");
}
