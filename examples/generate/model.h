/* model.h - a Llama model: its shape, and its weights as the kernels want them.
 *
 * Matrices that read the same input are stored as one: [q; k; v] and [gate; up]. Matrices and the
 * embedding are of the model's dtype, norm weights always f32. All of them are on the device but the
 * embedding, whose rows the host looks up; a head that is tied to it is a copy there.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_MODEL_H
#define GENERATE_MODEL_H

#include "device.h"
#include "qkv/rope.h"

typedef struct model_config {
    int32_t num_layers, hidden_size, ffn_size, vocab_size, context_len;
    int32_t num_qo_heads, num_kv_heads, head_dim;
    float norm_eps;
    qkv_rope_spec rope;
} model_config;

typedef struct model_layer {
    float *attention_norm, *ffn_norm; /* [hidden_size] */
    void *qkv;                        /* [(num_qo_heads + 2 num_kv_heads) head_dim, hidden_size] */
    void *output;                     /* [hidden_size, num_qo_heads head_dim] */
    void *gate_up;                    /* [2 ffn_size, hidden_size] */
    void *down;                       /* [hidden_size, ffn_size] */
} model_layer;

typedef struct model {
    model_config config;
    DLDataType dtype; /* f32 or bf16 */
    model_layer *layers;
    const compute_device *device;
    void *embedding;    /* [vocab_size, hidden_size], on the host */
    float *output_norm; /* [hidden_size] */
    void *head;         /* [vocab_size, hidden_size]; the embedding itself when they are tied */
    void *weights;      /* the device's block that all of the above but the embedding point into */
    void *host_weights; /* the embedding's block: on the CPU the same */
    size_t weight_bytes;
} model;

/* Called now and then while the weights are converted. */
typedef void (*model_progress)(void *user, double share);

/* Converts the file's weights; it may be closed afterwards. NULL and a message if the model is of a
 * kind that this program does not run, or memory runs out. d is borrowed; progress may be NULL. */
model *model_load(const gguf *file, const compute_device *d, DLDataType dtype, int32_t num_threads,
                  model_progress progress, void *user, char error[GGUF_ERROR]);

/* NULL is fine. */
void model_destroy(model *m);

/* The shape alone (model_config.c). False and a message for a model that is refused. */
bool model_config_read(const gguf *file, model_config *config, char error[GGUF_ERROR]);

#endif
