/* output.c - SPDX-License-Identifier: Apache-2.0 */
#include "output.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

output output_open(const engine *e, const prompt *prompts, const tokenizer *text, bool json,
                   console *terminal)
{
    return (output){.e = e,
                    .prompts = prompts,
                    .text = text,
                    .terminal = terminal,
                    .json = json,
                    .whole_lines =
                        terminal->is_terminal && isatty(STDOUT_FILENO) == 1 && e->num_requests > 1};
}

bool output_at_line_start(const output *o)
{
    return o->json || o->whole_lines || o->num_taken == 0 || isatty(STDOUT_FILENO) != 1;
}

void output_close(output *o)
{
    bytes_free(&o->pending);
}

/* The text of tokens that were generated since the last call. */
static bool take_text(output *o, const request *r)
{
    for (; r->prompt_len + o->num_taken < r->num_tokens; o->num_taken++) {
        const int32_t token = r->tokens[r->prompt_len + o->num_taken];
        if (tokenizer_is_special(o->text, token)) continue;
        const gguf_string text = tokenizer_decode(o->text, token);
        if (!bytes_add(&o->pending, text.data, text.len)) return false;
    }
    return true;
}

static void write_text(output *o, bool last)
{
    size_t len = o->pending.len;
    if (o->whole_lines && !last)
        while (len > 0 && o->pending.data[len - 1] != '\n') len--;
    if (len == 0) return;
    console_clear(o->terminal);
    const size_t written = utf8_write(stdout, o->pending.data, len, last);
    o->pending.len -= written;
    memmove(o->pending.data, o->pending.data + written, o->pending.len);
}

static void write_object(output *o, const request *r)
{
    const prompt *p = &o->prompts[o->current];
    const int32_t num_new = r->num_tokens - r->prompt_len;
    const double after_first = r->token_ms[num_new - 1] - r->token_ms[0];
    console_clear(o->terminal);
    fputs("{\"prompt\": ", stdout);
    json_write_string(stdout, p->text, p->text_len);
    fputs(", \"text\": ", stdout);
    json_write_string(stdout, o->pending.data, o->pending.len);
    fputs(", \"tokens\": [", stdout);
    for (int32_t i = 0; i < num_new; i++)
        printf("%s%d", i ? ", " : "", r->tokens[r->prompt_len + i]);
    printf("], \"ttft_ms\": %.3f, \"tokens_per_s\": %.3f}\n", r->token_ms[0] - o->e->start_ms,
           after_first > 0 ? (num_new - 1) * 1e3 / after_first : 0.0);
}

bool output_update(output *o, char error[GGUF_ERROR])
{
    while (o->current < o->e->num_requests) {
        const request *r = &o->e->requests[o->current];
        const bool finished = r->state == FINISHED;
        if (!take_text(o, r)) return fail(error, "out of memory");
        if (!o->json) write_text(o, finished);
        if (!finished) break;
        if (o->json) {
            write_object(o, r);
        } else {
            console_clear(o->terminal);
            fputs(o->current + 1 < o->e->num_requests ? "\n---\n" : "\n", stdout);
        }
        o->current++;
        o->num_taken = 0;
        o->pending.len = 0;
    }
    if (fflush(stdout) || ferror(stdout))
        return fail(error, "standard output: %s", strerror(errno));
    return true;
}
