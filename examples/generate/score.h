/* score.h - what the model thinks of a given text: its logits, or their summary.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_SCORE_H
#define GENERATE_SCORE_H

#include "console.h"
#include "engine.h"

/* Writes f32 [num_tokens, vocab_size], as the machine orders bytes. */
bool score_logits(qkv_context *ctx, const model *m, const engine_options *options,
                  const int32_t *tokens, int32_t num_tokens, const char *path,
                  char error[GGUF_ERROR]);

/* The mean negative log-likelihood (natural) of the tokens, cut into windows of 512 that know
 * nothing of each other; the first token of a window is not predicted. */
bool score_perplexity(qkv_context *ctx, const model *m, const engine_options *options,
                      const int32_t *tokens, int32_t num_tokens, console *terminal, double *nll,
                      char error[GGUF_ERROR]);

#endif
