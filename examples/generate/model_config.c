/* model_config.c - a model's shape from the metadata of its file; what is not supported is refused.
 * SPDX-License-Identifier: Apache-2.0 */
#include "model.h"

#include <math.h>
#include <string.h>

static bool read_int(const gguf *file, const char *key, int32_t min, int32_t max, int32_t *out,
                     char error[GGUF_ERROR])
{
    uint64_t value;
    if (!gguf_get_uint(file, key, &value, error)) return false;
    if (value < (uint64_t)min || value > (uint64_t)max)
        return fail(error, "%s: expected %d .. %d, got %llu", key, min, max,
                    (unsigned long long)value);
    *out = (int32_t)value;
    return true;
}

/* The same for a key that may be missing: *out then stays. */
static bool read_optional_int(const gguf *file, const char *key, int32_t min, int32_t max,
                              int32_t *out, char error[GGUF_ERROR])
{
    return !gguf_has(file, key) || read_int(file, key, min, max, out, error);
}

static bool read_float(const gguf *file, const char *key, float *out, char error[GGUF_ERROR])
{
    double value;
    if (!gguf_get_float(file, key, &value, error)) return false;
    if (!(value > 0 && value < 1e12)) return fail(error, "%s: expected > 0, got %g", key, value);
    *out = (float)value;
    return true;
}

static bool check_architecture(const gguf *file, char error[GGUF_ERROR])
{
    gguf_string name, kind;
    if (!gguf_get_string(file, "general.architecture", &name, error)) return false;
    if (!gguf_equal(name, "llama"))
        return fail(error, "architecture \"%.*s\" is not supported, only llama",
                    (int)(name.len < 64 ? name.len : 64), name.data);
    int32_t experts = 0, window = 0;
    if (!read_optional_int(file, "llama.expert_count", 0, INT32_MAX, &experts, error) ||
        !read_optional_int(file, "llama.attention.sliding_window", 0, INT32_MAX, &window, error))
        return false;
    if (experts) return fail(error, "a mixture of experts (llama.expert_count) is not supported");
    if (window) return fail(error, "llama.attention.sliding_window is not supported");
    if (gguf_has(file, "llama.rope.scaling.type")) {
        if (!gguf_get_string(file, "llama.rope.scaling.type", &kind, error)) return false;
        if (!gguf_equal(kind, "none") && !gguf_equal(kind, "linear"))
            return fail(error, "llama.rope.scaling.type \"%.*s\" is not supported",
                        (int)(kind.len < 64 ? kind.len : 64), kind.data);
    }
    return true;
}

/* The factor by which Llama 3.1's scaling divides frequency i (see qkv/rope.h). */
static double llama3_factor(const qkv_rope_spec *rope, int32_t i)
{
    const double freq = pow((double)rope->theta, -2.0 * i / rope->rotary_dim);
    const double turns = (double)rope->old_context * freq / (2 * 3.14159265358979323846);
    const double low = (double)rope->low_freq, high = (double)rope->high_freq;
    if (turns > high) return 1;
    if (turns < low) return (double)rope->scale;
    const double s = (turns - low) / (high - low);
    return 1 / ((1 - s) / (double)rope->scale + s);
}

/* A file of a Llama 3.1 model has no scaling parameters, only the factors that follow from them:
 * the largest is the scale, the others must be what that scale gives. */
static bool read_rope_factors(const gguf *file, qkv_rope_spec *rope, char error[GGUF_ERROR])
{
    const gguf_tensor *tensor = gguf_find_tensor(file, "rope_freqs.weight");
    if (!tensor) return true;
    float factors[256];
    const int32_t n = rope->rotary_dim / 2;
    if (tensor->dims[0] != (uint64_t)n || tensor->num_rows != 1)
        return fail(error, "rope_freqs.weight: expected %d factors", n);
    gguf_dequantize_row(tensor, 0, factors);
    if (rope->scale != 1) return fail(error, "rope_freqs.weight with linear scaling");
    for (int32_t i = 0; i < n; i++)
        if (factors[i] > rope->scale) rope->scale = factors[i];
    if (rope->scale > 1) {
        rope->low_freq = 1;
        rope->high_freq = 4;
        rope->old_context = 8192;
    }
    for (int32_t i = 0; i < n; i++) {
        const double expected = rope->scale > 1 ? llama3_factor(rope, i) : 1;
        if (!(fabs((double)factors[i] - expected) <= 1e-3 * expected))
            return fail(error, "rope_freqs.weight: not the scaling of Llama 3.1, not supported");
    }
    return true;
}

static bool read_rope(const gguf *file, const model_config *c, qkv_rope_spec *rope,
                      char error[GGUF_ERROR])
{
    *rope = (qkv_rope_spec){QKV_ROPE_SPEC_INIT, .rotary_dim = c->head_dim, .interleaved = 1,
                            .theta = 10000, .scale = 1};
    if (!read_optional_int(file, "llama.rope.dimension_count", 2, c->head_dim, &rope->rotary_dim,
                           error))
        return false;
    if (rope->rotary_dim % 2) return fail(error, "llama.rope.dimension_count: expected even");
    if (gguf_has(file, "llama.rope.freq_base") &&
        !read_float(file, "llama.rope.freq_base", &rope->theta, error))
        return false;
    static const char *const factors[] = {"llama.rope.scaling.factor", "llama.rope.scale_linear"};
    for (int i = 0; i < 2; i++)
        if (gguf_has(file, factors[i]) && !read_float(file, factors[i], &rope->scale, error))
            return false;
    if (rope->scale < 1) return fail(error, "llama.rope.scaling.factor: expected >= 1");
    return read_rope_factors(file, rope, error);
}

bool model_config_read(const gguf *file, model_config *config, char error[GGUF_ERROR])
{
    model_config c = {.num_qo_heads = 1};
    if (!check_architecture(file, error)) return false;
    if (!read_int(file, "llama.block_count", 1, 1024, &c.num_layers, error) ||
        !read_int(file, "llama.embedding_length", 1, 65536, &c.hidden_size, error) ||
        !read_int(file, "llama.feed_forward_length", 1, 1 << 20, &c.ffn_size, error) ||
        !read_int(file, "llama.context_length", 1, 1 << 24, &c.context_len, error) ||
        !read_int(file, "llama.attention.head_count", 1, 1024, &c.num_qo_heads, error) ||
        !read_float(file, "llama.attention.layer_norm_rms_epsilon", &c.norm_eps, error))
        return false;
    c.num_kv_heads = c.num_qo_heads;
    c.head_dim = c.hidden_size / c.num_qo_heads;
    int32_t value_dim = c.head_dim;
    if (!read_optional_int(file, "llama.attention.head_count_kv", 1, c.num_qo_heads,
                           &c.num_kv_heads, error) ||
        !read_optional_int(file, "llama.attention.key_length", 1, 512, &c.head_dim, error))
        return false;
    if (gguf_has(file, "llama.attention.key_length")) value_dim = c.head_dim;
    if (!read_optional_int(file, "llama.attention.value_length", 1, 512, &value_dim, error))
        return false;
    if (c.num_qo_heads % c.num_kv_heads)
        return fail(error, "llama.attention.head_count: %d is no multiple of %d KV heads",
                    c.num_qo_heads, c.num_kv_heads);
    if (c.head_dim % 8 || c.head_dim < 8 || c.head_dim > 512 || value_dim != c.head_dim)
        return fail(error, "head dims %d (keys) and %d (values) are not supported", c.head_dim,
                    value_dim);
    const gguf_tensor *embedding = gguf_find_tensor(file, "token_embd.weight");
    if (!embedding || embedding->num_rows > 1 << 24)
        return fail(error, "token_embd.weight: missing or too large");
    c.vocab_size = (int32_t)embedding->num_rows;
    if (!read_rope(file, &c, &c.rope, error)) return false;
    *config = c;
    return true;
}
