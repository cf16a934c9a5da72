/* prompts.c - SPDX-License-Identifier: Apache-2.0 */
#include "prompts.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* The whole file, whatever its kind (a pipe has no size to ask for). */
static bool read_file(const char *path, char **text, size_t *len, char error[GGUF_ERROR])
{
    FILE *file = fopen(path, "rb");
    if (!file) return fail(error, "%s: %s", path, strerror(errno));
    size_t size = 0, capacity = 1 << 16;
    char *data = malloc(capacity);
    while (data) {
        const size_t n = fread(data + size, 1, capacity - size, file);
        size += n;
        if (n == 0) break;
        if (size < capacity) continue;
        char *larger = realloc(data, capacity *= 2);
        if (!larger) free(data);
        data = larger;
    }
    const bool broken = ferror(file) != 0;
    const int reason = errno;
    fclose(file);
    if (!data) return fail(error, "%s: out of memory", path);
    if (broken) {
        free(data);
        return fail(error, "%s: %s", path, strerror(reason));
    }
    *text = data;
    *len = size;
    return true;
}

static bool contains(gguf_string text, const char *part, bool any_case)
{
    const size_t n = strlen(part);
    for (size_t i = 0; i + n <= text.len; i++)
        if (any_case ? !strncasecmp(text.data + i, part, n) : !memcmp(text.data + i, part, n))
            return true;
    return false;
}

/* Was the model trained to answer in ChatML? Its template says so; a file without one may at least
 * have an instruct model's name. */
static bool is_chat_model(const gguf *file, const tokenizer *t)
{
    char unused[GGUF_ERROR];
    gguf_string text;
    if (gguf_get_string(file, "tokenizer.chat_template", &text, unused))
        return contains(text, "<|im_start|>", false);
    if (!gguf_get_string(file, "general.name", &text, unused) || !contains(text, "instruct", true))
        return false;
    size_t len;
    char *probe = tokenizer_chatml(t, NULL, "", 0, &len, unused);
    free(probe);
    return probe != NULL;
}

static bool encode(prompt *p, bool chat, const char *system, const tokenizer *t,
                   char error[GGUF_ERROR])
{
    char *form = NULL;
    size_t len = p->text_len, count;
    if (chat && !(form = tokenizer_chatml(t, system, p->text, p->text_len, &len, error)))
        return false;
    p->tokens = tokenizer_encode(t, chat ? form : p->text, len, TOKENIZER_SPECIAL | TOKENIZER_BOS,
                                 &count, error);
    free(form);
    if (!p->tokens) return false;
    if (count > INT32_MAX) return fail(error, "a prompt of %zu tokens is too long", count);
    p->num_tokens = (int32_t)count;
    return true;
}

static bool create(prompt *p, const prompt_source *source, bool chat, const char *system,
                   const tokenizer *t, char error[GGUF_ERROR])
{
    if (source->is_file) {
        if (!read_file(source->text, &p->text, &p->text_len, error)) return false;
    } else {
        p->text_len = strlen(source->text);
        p->text = strdup(source->text);
        if (!p->text) return fail(error, "out of memory");
    }
    return encode(p, chat, system, t, error);
}

prompt *prompts_create(const options *o, const gguf *file, const tokenizer *t,
                       char error[GGUF_ERROR])
{
    prompt *prompts = calloc((size_t)o->num_prompts, sizeof *prompts);
    if (!prompts) {
        fail(error, "out of memory");
        return NULL;
    }
    const bool only_raw = o->perplexity || o->logits_file;
    const bool chat =
        o->form == FORM_CHAT || (o->form == FORM_DEFAULT && !only_raw && is_chat_model(file, t));
    for (int32_t i = 0; i < o->num_prompts; i++) {
        if (create(&prompts[i], &o->prompts[i], chat, o->system, t, error)) continue;
        prompts_destroy(prompts, o->num_prompts);
        return NULL;
    }
    return prompts;
}

void prompts_destroy(prompt *prompts, int32_t num_prompts)
{
    for (int32_t i = 0; prompts && i < num_prompts; i++) {
        free(prompts[i].text);
        free(prompts[i].tokens);
    }
    free(prompts);
}
