/* forward.h - the transformer over a paged KV cache: one batch of rows through all layers.
 *
 * A step is a batch: for each request some new tokens (a chunk of its prompt, or the last token it
 * produced), where they stand, and the pages that hold its keys. Weights, KV cache and activations
 * are of the model's dtype, logits f32; all of them are on the model's device.
 *
 * What comes out for a row depends on that request alone: every operator used here gives a row the
 * same bits whatever it is batched with (on a GPU, qkv_gemm as gemm.h says), and attention is never
 * split (max_split_rows).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_FORWARD_H
#define GENERATE_FORWARD_H

#include "model.h"
#include "qkv/context.h"

typedef struct forward forward;

typedef struct forward_limits {
    int32_t max_requests, max_tokens; /* of one step */
    int32_t max_logits;               /* rows of one call of forward_logits */
    int32_t max_kv_len;               /* of one request */
    int32_t num_pages, page_size;
} forward_limits;

/* Bytes of keys and values in one page, all layers. */
size_t forward_page_bytes(const model *m, int32_t page_size);

/* NULL and a message if memory runs out. ctx and m are borrowed. */
forward *forward_create(qkv_context *ctx, const model *m, const forward_limits *limits,
                        char error[GGUF_ERROR]);
/* NULL is fine. */
void forward_destroy(forward *f);

/* Building a step. Adds num_tokens tokens of one request, the first of them at this position;
 * pages (those it holds, in order) reach at least to the last. Returns the row of the last token.
 * The caller keeps to the limits. */
void forward_begin(forward *f);
int32_t forward_add(forward *f, const int32_t *tokens, int32_t num_tokens, int32_t position,
                    const int32_t *pages);

/* Computes the step: keys and values go to the pages, what the last layer's attention gives stays
 * for forward_logits. The device may still be at it on return; the next step begins after a wait. */
bool forward_run(forward *f, char error[GGUF_ERROR]);

/* f32 [num_rows, vocab_size] on the device, for some rows of the step, each once in a call, or NULL;
 * overwritten by the next call. */
float *forward_logits(forward *f, const int32_t *rows, int32_t num_rows, char error[GGUF_ERROR]);

/* Copies pages out to, or back from, [num_pages] blocks of forward_page_bytes on the host. */
bool forward_save_pages(const forward *f, const int32_t *pages, int32_t num_pages, void *to,
                        char error[GGUF_ERROR]);
bool forward_load_pages(forward *f, const int32_t *pages, int32_t num_pages, const void *from,
                        char error[GGUF_ERROR]);

#endif
