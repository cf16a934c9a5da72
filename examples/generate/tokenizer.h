/* tokenizer.h - byte-level BPE, from the vocabulary in a GGUF file.
 *
 * Text -> special tokens (if asked) -> pieces by the file's regular expression -> bytes -> merges.
 * The file must say tokenizer.ggml.model "gpt2" and tokenizer.ggml.pre "smollm", "gpt-2" (or
 * "gpt2", "default") or "llama-bpe"; others are refused by name.
 *
 * A tokenizer copies what it needs: the file may be closed. It does not change after it is made,
 * so threads may share it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_GENERATE_TOKENIZER_H
#define QKV_GENERATE_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "gguf.h"

typedef struct tokenizer tokenizer;

enum {
    TOKENIZER_SPECIAL = 1, /* "<|im_end|>" in the text is that token, not eleven characters */
    TOKENIZER_BOS = 2,     /* begin with the BOS token if the file asks for one */
};

/* NULL and a message (see gguf.h) if the vocabulary is missing, broken or of another kind. */
tokenizer *tokenizer_create(const gguf *file, char error[GGUF_ERROR]);

/* NULL is fine. */
void tokenizer_destroy(tokenizer *t);

/* Text of any bytes to *count ids; free() the result. Bytes that are no UTF-8 are encoded as
 * bytes; a byte that has no token in the vocabulary is left out, as in the reference (SmolLM2's
 * lacks those that English text never has). NULL and a message when memory runs out or the text is
 * of 1 GiB or more. */
int32_t *tokenizer_encode(const tokenizer *t, const char *text, size_t len, unsigned flags,
                          size_t *count, char error[GGUF_ERROR]);

/* The bytes of one token; they live as long as the tokenizer. A character may be spread over
 * several tokens, so what is streamed is bytes. An id out of range has none. */
gguf_string tokenizer_decode(const tokenizer *t, int32_t id);

/* Control or user-defined token: nothing to show to a reader. */
bool tokenizer_is_special(const tokenizer *t, int32_t id);

/* The model is done: end of text, of turn or of document. */
bool tokenizer_is_end(const tokenizer *t, int32_t id);

/* Ids, or -1 where the file names none. */
int32_t tokenizer_bos(const tokenizer *t);
int32_t tokenizer_eos(const tokenizer *t);

int32_t tokenizer_vocab_size(const tokenizer *t);

/* ChatML: the text of a conversation up to where the assistant speaks, to be encoded with
 * TOKENIZER_SPECIAL; free() the result. Without a system text (NULL) it begins with the one that
 * the model was trained with, if the file's chat template has one. NULL and a message if the
 * vocabulary has no <|im_start|>, or memory runs out. */
char *tokenizer_chatml(const tokenizer *t, const char *system, const char *user, size_t user_len,
                       size_t *len, char error[GGUF_ERROR]);

#endif
