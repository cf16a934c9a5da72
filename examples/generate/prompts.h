/* prompts.h - from the command line's texts and files to tokens.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_PROMPTS_H
#define GENERATE_PROMPTS_H

#include "options.h"
#include "tokenizer.h"

typedef struct prompt {
    char *text; /* as the user gave it */
    size_t text_len;
    int32_t *tokens; /* with the chat form around it, if that was asked for */
    int32_t num_tokens;
} prompt;

/* [num_prompts], or NULL and a message. */
prompt *prompts_create(const options *o, const gguf *file, const tokenizer *t,
                       char error[GGUF_ERROR]);
/* NULL is fine. */
void prompts_destroy(prompt *prompts, int32_t num_prompts);

#endif
