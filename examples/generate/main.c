/* main.c - qkv-generate: prompts in, completions out. `qkv-generate --help` says how.
 *
 *   options -> gguf, tokenizer -> prompts -> model -> engine (schedule, forward, pages) -> output
 *                               (or trace)                                                (or report)
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "output.h"
#include "qkv/qkv.h"
#include "replay.h"
#include "report.h"
#include "score.h"

/* What every mode works with; all of it is released at the end of main. */
typedef struct program {
    options o;
    console terminal;
    gguf *file;
    tokenizer *text;
    prompt *prompts;
    trace requests; /* of --trace */
    qkv_context *ctx;
    compute_device where;
    model *m;
} program;

static void show_loading(void *terminal, double share)
{
    console_progress(terminal, "loading the model: %.0f %%", share * 100);
}

/* A kernel's first use on a GPU may take a second. */
static void show_compiling(void *terminal, const char *kernel, double seconds)
{
    if (seconds < 0) console_progress(terminal, "compiling %s", kernel);
}

/* Puts the model's path before an error in its file, where it does not stand there yet. */
static bool fails_in_model(const program *p, char error[GGUF_ERROR])
{
    char why[GGUF_ERROR];
    if (strncmp(error, p->o.model, strlen(p->o.model)) == 0) return false;
    memcpy(why, error, sizeof why);
    return fail(error, "%.160s: %s", p->o.model, why);
}

/* For what the host does whatever the device. */
static int32_t num_host_threads(const program *p)
{
    if (p->o.device.device_type == kDLCPU) return qkv_context_num_threads(p->ctx);
    return p->o.num_threads > 0 ? p->o.num_threads : (int32_t)sysconf(_SC_NPROCESSORS_ONLN);
}

static bool load(program *p, char error[GGUF_ERROR])
{
    const qkv_context_options how = {QKV_CONTEXT_OPTIONS_INIT, .num_threads = p->o.num_threads,
                                     .device = p->o.device, .jit_progress = show_compiling,
                                     .jit_user = &p->terminal};
    if (!works(error, "qkv_context_create", qkv_context_create(&how, &p->ctx))) return false;
    if (!device_open(&p->where, p->o.device, error)) return false;
    const int32_t num_threads = num_host_threads(p);
    p->m =
        model_load(p->file, &p->where, p->o.dtype, num_threads, show_loading, &p->terminal, error);
    console_clear(&p->terminal);
    if (!p->m) return fails_in_model(p, error);
    if (tokenizer_vocab_size(p->text) > p->m->config.vocab_size)
        return fail(error, "the tokenizer has %d tokens, the model only %d",
                    tokenizer_vocab_size(p->text), p->m->config.vocab_size);
    return true;
}

static bool print_tokens(const program *p, char error[GGUF_ERROR])
{
    for (int32_t i = 0; i < p->o.num_prompts; i++) {
        for (int32_t t = 0; t < p->prompts[i].num_tokens; t++)
            printf("%s%" PRId32, t ? " " : "", p->prompts[i].tokens[t]);
        putchar('\n');
    }
    return !fflush(stdout) || fail(error, "standard output: cannot write");
}

static bool print_perplexity(program *p, char error[GGUF_ERROR])
{
    int32_t n = p->prompts[0].num_tokens;
    double nll;
    if (n > p->o.max_tokens) n = p->o.max_tokens;
    if (!score_perplexity(p->ctx, p->m, &p->o.engine, p->prompts[0].tokens, n, &p->terminal, &nll,
                          error))
        return false;
    console_clear(&p->terminal);
    printf("{\"tokens\": %" PRId32 ", \"nll\": %.8f, \"perplexity\": %.6f}\n", n, nll, exp(nll));
    return !fflush(stdout) || fail(error, "standard output: cannot write");
}

static bool run_engine(program *p, engine *e, char error[GGUF_ERROR])
{
    output out = output_open(e, p->prompts, p->text, p->o.json, &p->terminal);
    bool good = true;
    while (good && engine_busy(e)) {
        if (output_at_line_start(&out)) report_progress(e, &p->terminal);
        good = engine_step(e, error) && output_update(&out, error);
    }
    output_close(&out);
    console_clear(&p->terminal);
    return good && report_write(e, &p->terminal, error);
}

static bool generate(program *p, char error[GGUF_ERROR])
{
    const int32_t n = p->o.num_prompts;
    engine_prompt *prompts = malloc((size_t)n * sizeof *prompts);
    if (!prompts) return fail(error, "out of memory");
    for (int32_t i = 0; i < n; i++)
        prompts[i] = (engine_prompt){.tokens = p->prompts[i].tokens,
                                     .num_tokens = p->prompts[i].num_tokens,
                                     .max_new = p->o.max_new};
    engine *e = engine_create(p->ctx, p->m, p->text, &p->o.engine, prompts, n, error);
    free(prompts);
    const bool good = e && run_engine(p, e, error);
    engine_destroy(e);
    return good;
}

static bool run(program *p, char error[GGUF_ERROR])
{
    p->file = gguf_open(p->o.model, error);
    if (!p->file) return fails_in_model(p, error);
    p->text = tokenizer_create(p->file, error);
    if (!p->text) return fails_in_model(p, error);
    if (p->o.trace_file) {
        if (!trace_read(p->o.trace_file, &p->requests, error)) return false;
    } else {
        p->prompts = prompts_create(&p->o, p->file, p->text, error);
        if (!p->prompts) return false;
    }
    if (p->o.tokenize) return print_tokens(p, error);
    if (!load(p, error)) return false;
    gguf_close(p->file); /* the weights are copies; a mapped file need not stay in memory */
    p->file = NULL;
    if (p->o.trace_file)
        return replay(p->ctx, p->m, &p->o.engine, &p->requests, (double)p->o.trace_speed, p->o.json,
                      &p->terminal, error);
    if (p->o.perplexity) return print_perplexity(p, error);
    if (p->o.logits_file)
        return score_logits(p->ctx, p->m, &p->o.engine, p->prompts[0].tokens,
                            p->prompts[0].num_tokens, p->o.logits_file, error);
    return generate(p, error);
}

int main(int argc, char **argv)
{
    program p = {.terminal = console_open()};
    char error[GGUF_ERROR] = "";
    int status = options_parse(&p.o, argc, argv);
    if (status == OPTIONS_GO) {
        status = run(&p, error) ? EXIT_SUCCESS : EXIT_FAILURE;
        if (status != EXIT_SUCCESS) console_say(&p.terminal, "qkv-generate: %s", error);
    }
    model_destroy(p.m);
    device_close(&p.where);
    qkv_context_destroy(p.ctx);
    prompts_destroy(p.prompts, p.o.num_prompts);
    trace_free(&p.requests);
    tokenizer_destroy(p.text);
    gguf_close(p.file);
    free(p.o.prompts);
    return status;
}
