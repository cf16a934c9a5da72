/* gguf.h - reads GGUF model files (versions 2 and 3, little-endian).
 *
 * The file is mapped and never trusted: when opening succeeds, every key, string, array and tensor
 * lies inside it, every tensor has a type that can be converted, and names are unique. What the
 * getters return points into the file and lives until gguf_close(). A file that is open may be
 * read by any number of threads. (One thing cannot be checked: a mapped file that another program
 * makes shorter while it is open.)
 *
 * Functions that can fail take `error`, an array of GGUF_ERROR chars that receives one line of
 * text; on success it is left alone.
 *
 * Source: the GGUF specification, ggml project (docs/gguf.md).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_GENERATE_GGUF_H
#define QKV_GENERATE_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GGUF_ERROR 256

typedef struct gguf gguf;

/* Text in the file: any bytes, no terminating zero. */
typedef struct gguf_string {
    const char *data;
    size_t len;
} gguf_string;

/* Types of metadata values, as the file numbers them. */
typedef enum gguf_type {
    GGUF_U8 = 0,
    GGUF_I8 = 1,
    GGUF_U16 = 2,
    GGUF_I16 = 3,
    GGUF_U32 = 4,
    GGUF_I32 = 5,
    GGUF_F32 = 6,
    GGUF_BOOL = 7,
    GGUF_STRING = 8,
    GGUF_ARRAY = 9,
    GGUF_U64 = 10,
    GGUF_I64 = 11,
    GGUF_F64 = 12,
} gguf_type;

/* An array in the metadata. Walk strings with gguf_next_string, index numbers with gguf_int_at. */
typedef struct gguf_array {
    gguf_type type; /* of the elements; never GGUF_ARRAY */
    size_t count;
    const uint8_t *data; /* packed, so numbers may be unaligned */
} gguf_array;

/* Types of tensors that can be read, as the file numbers them. */
typedef enum gguf_tensor_type {
    GGUF_TENSOR_F32 = 0,
    GGUF_TENSOR_F16 = 1,
    GGUF_TENSOR_Q4_0 = 2, /* blocks of 32: f16 d, 32 nibbles q;        x = d (q - 8) */
    GGUF_TENSOR_Q4_1 = 3, /* blocks of 32: f16 d, f16 m, 32 nibbles q; x = d q + m */
    GGUF_TENSOR_Q8_0 = 8, /* blocks of 32: f16 d, 32 int8 q;           x = d q */
    GGUF_TENSOR_BF16 = 30,
} gguf_tensor_type;

typedef struct gguf_tensor {
    gguf_string name;
    gguf_tensor_type type;
    int num_dims;     /* 1..4 */
    uint64_t dims[4]; /* dims[0] is the contiguous axis: the row length; 1 past num_dims */
    size_t num_rows;  /* product of dims[1..3] */
    size_t row_bytes;
    size_t bytes;        /* num_rows * row_bytes */
    const uint8_t *data; /* aligned as the file says (32 bytes unless it says otherwise, >= 8) */
} gguf_tensor;

/* Opens a file; NULL and a message if it cannot be read or is no valid GGUF. */
gguf *gguf_open(const char *path, char error[GGUF_ERROR]);

/* The same for bytes in memory, which must outlive the result. They should begin at a multiple of
 * 32, or tensor data is not aligned either (gguf_dequantize_row does not mind). */
gguf *gguf_open_memory(const void *data, size_t bytes, char error[GGUF_ERROR]);

/* NULL is fine. */
void gguf_close(gguf *file);

/* Metadata by key. False, with the key and the reason in error, if the key is missing or its value
 * is of another type. gguf_get_uint takes every integer type that holds a number >= 0,
 * gguf_get_float takes f32 and f64. */
bool gguf_has(const gguf *file, const char *key);
bool gguf_get_uint(const gguf *file, const char *key, uint64_t *out, char error[GGUF_ERROR]);
bool gguf_get_float(const gguf *file, const char *key, double *out, char error[GGUF_ERROR]);
bool gguf_get_bool(const gguf *file, const char *key, bool *out, char error[GGUF_ERROR]);
bool gguf_get_string(const gguf *file, const char *key, gguf_string *out, char error[GGUF_ERROR]);
bool gguf_get_array(const gguf *file, const char *key, gguf_type element, gguf_array *out,
                    char error[GGUF_ERROR]);

/* Takes the first string off an array of strings; call at most `count` times. */
gguf_string gguf_next_string(gguf_array *array);

/* Element i < count of an array of 8- to 32-bit integers or of i64. */
int64_t gguf_int_at(const gguf_array *array, size_t i);

bool gguf_equal(gguf_string a, const char *b);

/* Tensors: by position (sorted by name), or by name; NULL if there is none. */
size_t gguf_num_tensors(const gguf *file);
const gguf_tensor *gguf_tensor_at(const gguf *file, size_t i);
const gguf_tensor *gguf_find_tensor(const gguf *file, const char *name);

/* Converts row < num_rows of a tensor to dims[0] floats. */
void gguf_dequantize_row(const gguf_tensor *tensor, size_t row, float *out);

/* "Q4_1" and so on, for any number that a file may hold; "unknown" past those. */
const char *gguf_tensor_type_name(uint32_t type);

#endif
