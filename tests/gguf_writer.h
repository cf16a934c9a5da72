/* gguf_writer.h - builds GGUF files in memory, good ones and broken ones.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_GGUF_WRITER_H
#define QKV_TESTS_GGUF_WRITER_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../examples/generate/gguf.h"

typedef struct writer {
    uint8_t *data;
    size_t len, capacity;
} writer;

static inline void put(writer *w, const void *bytes, size_t len)
{
    while (w->len + len > w->capacity) {
        w->capacity = w->capacity ? 2 * w->capacity : 1024;
        w->data = realloc(w->data, w->capacity);
        if (!w->data) abort();
    }
    if (len) memcpy(w->data + w->len, bytes, len);
    w->len += len;
}

static inline void put_u32(writer *w, uint32_t v)
{
    put(w, &v, sizeof v);
}

static inline void put_u64(writer *w, uint64_t v)
{
    put(w, &v, sizeof v);
}

static inline void put_string(writer *w, const char *text)
{
    put_u64(w, strlen(text));
    put(w, text, strlen(text));
}

static inline void put_header(writer *w, uint64_t num_tensors, uint64_t num_keys)
{
    put(w, "GGUF", 4);
    put_u32(w, 3);
    put_u64(w, num_tensors);
    put_u64(w, num_keys);
}

/* A key; its value follows. */
static inline void put_key(writer *w, const char *key, uint32_t type)
{
    put_string(w, key);
    put_u32(w, type);
}

static inline void put_string_key(writer *w, const char *key, const char *text)
{
    put_key(w, key, GGUF_STRING);
    put_string(w, text);
}

static inline void put_u32_key(writer *w, const char *key, uint32_t v)
{
    put_key(w, key, GGUF_U32);
    put_u32(w, v);
}

/* An array; its elements follow. */
static inline void put_array_key(writer *w, const char *key, uint32_t element, uint64_t count)
{
    put_key(w, key, GGUF_ARRAY);
    put_u32(w, element);
    put_u64(w, count);
}

static inline void put_tensor(writer *w, const char *name, uint32_t num_dims, const uint64_t *dims,
                              uint32_t type, uint64_t offset)
{
    put_string(w, name);
    put_u32(w, num_dims);
    for (uint32_t i = 0; i < num_dims; i++) put_u64(w, dims[i]);
    put_u32(w, type);
    put_u64(w, offset);
}

static inline void put_padding(writer *w, size_t alignment)
{
    while (w->len % alignment) put(w, "", 1);
}

/* The bytes of a file, in a block of just their size, so that AddressSanitizer sees any read past
 * the end. NULL if it cannot be read. */
static inline uint8_t *read_bytes(const char *path, size_t *len)
{
    FILE *file = path ? fopen(path, "rb") : NULL;
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    const long size = ftell(file);
    rewind(file);
    uint8_t *data = size > 0 ? malloc((size_t)size) : NULL;
    *len = data ? fread(data, 1, (size_t)size, file) : 0;
    fclose(file);
    return data;
}

#endif
