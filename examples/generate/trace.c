/* trace.c - SPDX-License-Identifier: Apache-2.0 */
#include "trace.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TOKENS = 1 << 24 };
static const char blanks[] = " \t\r\n";

/* The next number of a line, min .. max; *text moves past it. */
static bool read_number(const trace *t, int32_t line, char **text, const char *name, double min,
                        double max, bool whole, double *out, char error[GGUF_ERROR])
{
    char *end;
    char *word = *text + strspn(*text, blanks);
    *text = word + strcspn(word, blanks);
    if (**text) *(*text)++ = '\0';
    *out = strtod(word, &end);
    if (end != word && !*end && *out >= min && *out <= max && (!whole || *out == floor(*out)))
        return true;
    return fail(error, "%.120s:%d: %s: expected %s%.10g to %.10g, got \"%.24s\"", t->path,
                (int)line, name, whole ? "a whole number, " : "", min, max, word);
}

static bool read_whole(const trace *t, int32_t line, char **text, const char *name, int32_t min,
                       int32_t max, int32_t *out, char error[GGUF_ERROR])
{
    double value;
    if (!read_number(t, line, text, name, min, max, true, &value, error)) return false;
    *out = (int32_t)value;
    return true;
}

static bool is_empty(const char *text)
{
    return text[strspn(text, blanks)] == '\0';
}

/* text: a line that is not empty, without its comment. */
static bool read_request(const trace *t, char *text, trace_request *r, char error[GGUF_ERROR])
{
    const double former = t->count > 0 ? t->requests[t->count - 1].arrival_ms : 0;
    const int32_t line = r->line;
    if (!read_number(t, line, &text, "arrival_ms", former, 1e12, false, &r->arrival_ms, error) ||
        !read_whole(t, line, &text, "prompt_tokens", 1, MAX_TOKENS, &r->prompt_tokens, error) ||
        !read_whole(t, line, &text, "output_tokens", 1, MAX_TOKENS, &r->output_tokens, error))
        return false;
    if (is_empty(text)) return true;
    if (!read_whole(t, line, &text, "prefix_id", 0, MAX_TOKENS, &r->prefix_id, error) ||
        !read_whole(t, line, &text, "prefix_tokens", 1, r->prompt_tokens, &r->prefix_tokens, error))
        return false;
    return is_empty(text) ||
           fail(error, "%.120s:%d: expected 3 or 5 numbers, got more", t->path, (int)line);
}

static bool add(trace *t, const trace_request *r, char error[GGUF_ERROR])
{
    if ((t->count & (t->count - 1)) == 0) { /* full at powers of two */
        const size_t capacity = t->count ? (size_t)t->count * 2 : 1;
        trace_request *larger = realloc(t->requests, capacity * sizeof *larger);
        if (!larger) return fail(error, "out of memory");
        t->requests = larger;
    }
    t->requests[t->count++] = *r;
    return true;
}

static bool read_lines(FILE *file, trace *t, char error[GGUF_ERROR])
{
    char *text = NULL;
    size_t capacity = 0;
    bool good = true;
    for (int32_t line = 1; good && getline(&text, &capacity, file) >= 0; line++) {
        trace_request r = {.line = line};
        text[strcspn(text, "#")] = '\0';
        if (!is_empty(text)) good = read_request(t, text, &r, error) && add(t, &r, error);
    }
    free(text);
    if (good && ferror(file)) return fail(error, "%.160s: %s", t->path, strerror(errno));
    return good && (t->count > 0 || fail(error, "%.160s: expected requests, got none", t->path));
}

bool trace_read(const char *path, trace *t, char error[GGUF_ERROR])
{
    *t = (trace){.path = path};
    FILE *file = fopen(path, "r");
    if (!file) return fail(error, "%.160s: %s", path, strerror(errno));
    const bool good = read_lines(file, t, error);
    fclose(file);
    if (!good) trace_free(t);
    return good;
}

void trace_free(trace *t)
{
    free(t->requests);
    free(t->tokens);
    *t = (trace){.count = 0};
}

/* ---- prompts ----------------------------------------------------------------------------------- */

/* Token number `position` of an endless random text (splitmix64, Steele et al. 2014). */
static int32_t token_of(uint64_t seed, uint64_t text, int32_t position, int32_t vocab_size)
{
    uint64_t x = seed + text * 0xd1342543de82ef95u + ((uint64_t)position + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (int32_t)((x ^ x >> 31) % (uint64_t)vocab_size);
}

static void fill(const trace_request *r, int32_t index, uint64_t seed, int32_t vocab_size,
                 int32_t *tokens)
{
    const uint64_t own = 2 * (uint64_t)index, shared = 2 * (uint64_t)r->prefix_id + 1;
    for (int32_t i = 0; i < r->prompt_tokens; i++)
        tokens[i] = token_of(seed, i < r->prefix_tokens ? shared : own, i, vocab_size);
}

engine_prompt *trace_prompts(trace *t, const model_config *c, uint64_t seed, double speed,
                             char error[GGUF_ERROR])
{
    size_t total = 0;
    for (int32_t i = 0; i < t->count; i++) {
        const trace_request *r = &t->requests[i];
        const int32_t len = r->prompt_tokens + r->output_tokens - 1; /* the last is no input */
        if (len > c->context_len) {
            fail(error, "%.120s:%d: expected at most the model's context of %d tokens, got %d",
                 t->path, (int)r->line, (int)c->context_len, (int)len);
            return NULL;
        }
        total += (size_t)r->prompt_tokens;
    }
    engine_prompt *prompts = malloc((size_t)t->count * sizeof *prompts);
    int32_t *tokens = t->tokens = malloc(total * sizeof *tokens);
    if (!prompts || !tokens) {
        free(prompts);
        fail(error, "out of memory");
        return NULL;
    }
    for (int32_t i = 0; i < t->count; i++) {
        const trace_request *r = &t->requests[i];
        fill(r, i, seed, c->vocab_size, tokens);
        prompts[i] = (engine_prompt){.tokens = tokens,
                                     .num_tokens = r->prompt_tokens,
                                     .max_new = r->output_tokens,
                                     .arrival_ms = r->arrival_ms / speed};
        tokens += r->prompt_tokens;
    }
    return prompts;
}
