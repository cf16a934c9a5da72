/* fuzz_gguf.c - libFuzzer: any bytes are refused with a message or are a file that can be used.
 * Built and run by tools/fuzz.sh, from the tiny model that the tests use.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>

#include "gguf.h"
#include "tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void convert(const gguf *file)
{
    for (size_t i = 0; i < gguf_num_tensors(file); i++) {
        const gguf_tensor *t = gguf_tensor_at(file, i);
        float *row = malloc((size_t)t->dims[0] * sizeof *row);
        if (!row) abort();
        for (size_t r = 0; r < t->num_rows; r++) gguf_dequantize_row(t, r, row);
        free(row);
    }
}

static void encode(const gguf *file, char *error)
{
    static const char text[] = "It's 12  \u00e9t\u00e9s<|im_end|>\n\n\xff";
    size_t count;
    tokenizer *t = tokenizer_create(file, error);
    if (!t) return;
    int32_t *ids =
        tokenizer_encode(t, text, sizeof text, TOKENIZER_SPECIAL | TOKENIZER_BOS, &count, error);
    if (!ids) abort();
    for (size_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= tokenizer_vocab_size(t)) abort();
    free(ids);
    tokenizer_destroy(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char error[GGUF_ERROR] = "";
    gguf *file = gguf_open_memory(data, size, error);
    if (file) {
        convert(file);
        encode(file, error);
    } else if (!error[0]) {
        abort();
    }
    gguf_close(file);
    return 0;
}
