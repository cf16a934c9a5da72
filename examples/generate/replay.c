/* replay.c - SPDX-License-Identifier: Apache-2.0 */
#include "replay.h"

#include <stdlib.h>

#include "report.h"

enum { WARM_PROMPT = 32 }; /* many rows to attention */

static int32_t min_int(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static const engine_prompt *longest(const engine_prompt *prompts, int32_t count)
{
    const engine_prompt *best = prompts;
    for (const engine_prompt *p = prompts; p < prompts + count; p++)
        if (p->num_tokens + p->max_new > best->num_tokens + best->max_new) best = p;
    return best;
}

static bool run(engine *e, console *terminal, char error[GGUF_ERROR])
{
    bool good = true;
    while (good && engine_busy(e)) {
        report_progress(e, terminal);
        good = engine_step(e, error);
    }
    console_clear(terminal);
    return good;
}

/* As many requests as a step takes, all at once; of those that run, half end in each step, so that
 * batches of all sizes come up. None needs more pages than the trace's longest. */
static bool warm_up(qkv_context *ctx, const model *m, engine_options options,
                    const engine_prompt *prompts, int32_t count, console *terminal,
                    char error[GGUF_ERROR])
{
    const engine_prompt *most = longest(prompts, count);
    const int32_t n = min_int(options.max_batch, count);
    engine_prompt *warm = malloc((size_t)n * sizeof *warm);
    if (!warm) return fail(error, "out of memory");
    for (int32_t i = 0; i < n; i++) {
        int32_t num_new = 2;
        for (int32_t k = i + 1; k <= n / 2; k *= 2) num_new++;
        warm[i] = (engine_prompt){.tokens = most->tokens,
                                  .num_tokens = min_int(WARM_PROMPT, most->num_tokens),
                                  .max_new = min_int(num_new, most->max_new)};
    }
    options.share_prefixes = false;
    engine *e = engine_create(ctx, m, NULL, &options, warm, n, error);
    free(warm);
    const bool good = e && run(e, terminal, error);
    engine_destroy(e);
    return good;
}

bool replay(qkv_context *ctx, const model *m, const engine_options *options, trace *t, double speed,
            bool json, console *terminal, char error[GGUF_ERROR])
{
    engine_options o = *options;
    o.ignore_end = true;
    engine_prompt *prompts = trace_prompts(t, &m->config, o.seed, speed, error);
    if (!prompts) return false;
    engine *e = NULL;
    if (warm_up(ctx, m, o, prompts, t->count, terminal, error))
        e = engine_create(ctx, m, NULL, &o, prompts, t->count, error);
    free(prompts);
    const bool good =
        e && run(e, terminal, error) && report_trace(e, t->path, json, terminal, error);
    engine_destroy(e);
    return good;
}
