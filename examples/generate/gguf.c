/* gguf.c - the reader of GGUF files: one pass that checks everything, then look-ups.
 *
 * Layout: "GGUF", u32 version, u64 tensors, u64 keys; the keys (string, u32 type, value); the
 * tensors (string, u32 dims, u64 each, u32 type, u64 offset); padding; tensor data. A string is a
 * u64 length and its bytes; an array is a u32 type, a u64 count and its elements.
 * SPDX-License-Identifier: Apache-2.0 */
#include "gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct entry {
    gguf_string key;
    gguf_type type;
    const uint8_t *value; /* scalars: their bytes; strings: the length; arrays: the elements */
    gguf_type element;    /* arrays only, as is count */
    size_t count;
} entry;

struct gguf {
    void *map; /* NULL when the bytes belong to the caller */
    size_t map_bytes;
    entry *entries; /* sorted by key */
    size_t num_entries;
    gguf_tensor *tensors; /* sorted by name */
    size_t num_tensors;
};

/* What is left to read. Invariant: at <= end. */
typedef struct cursor {
    const uint8_t *begin, *at, *end;
    char *error;
} cursor;

static const char *const type_names[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                         "bool", "string", "array", "u64", "i64", "f64"};
static const uint8_t type_bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8}; /* 0: varies */

/* Longest name shown in a message, so that the reason always fits. */
#define SHOWN(s) (int)((s).len < 80 ? (s).len : 80), (s).data

static inline bool never(int written)
{
    (void)written;
    return false;
}

/* A macro, so that the compiler sees that it is always false and checks the format. */
#define fail(error, ...) never(snprintf((error), GGUF_ERROR, __VA_ARGS__))

/* ---- scalars: unaligned, little-endian as the machines that qkv runs on ---------------------- */

static uint16_t load_u16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint32_t load_u32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint64_t load_u64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static int64_t load_int(gguf_type type, const uint8_t *p)
{
    switch (type) {
    case GGUF_U8: return *p;
    case GGUF_I8: return (int8_t)*p;
    case GGUF_U16: return load_u16(p);
    case GGUF_I16: return (int16_t)load_u16(p);
    case GGUF_U32: return load_u32(p);
    case GGUF_I32: return (int32_t)load_u32(p);
    default: return (int64_t)load_u64(p);
    }
}

/* ---- reading: each function moves the cursor, or fails with a message ------------------------ */

static const uint8_t *take(cursor *c, uint64_t bytes, const char *what)
{
    const uint8_t *at = c->at;
    const size_t left = (size_t)(c->end - at);
    if (bytes > left) {
        fail(c->error, "byte %zu: expected %s of %llu bytes, but the file ends after %zu",
             (size_t)(at - c->begin), what, (unsigned long long)bytes, left);
        return NULL;
    }
    c->at += bytes;
    return at;
}

static bool take_u32(cursor *c, const char *what, uint32_t *out)
{
    const uint8_t *p = take(c, 4, what);
    if (!p) return false;
    *out = load_u32(p);
    return true;
}

static bool take_u64(cursor *c, const char *what, uint64_t *out)
{
    const uint8_t *p = take(c, 8, what);
    if (!p) return false;
    *out = load_u64(p);
    return true;
}

static bool take_string(cursor *c, const char *what, gguf_string *out)
{
    uint64_t len;
    if (!take_u64(c, what, &len)) return false;
    const uint8_t *p = take(c, len, what);
    if (!p) return false;
    *out = (gguf_string){.data = (const char *)p, .len = (size_t)len};
    return true;
}

static bool take_array(cursor *c, entry *e)
{
    uint32_t type;
    uint64_t count;
    if (!take_u32(c, "an array's type", &type) || !take_u64(c, "an array's length", &count))
        return false;
    if (type > GGUF_F64 || type == GGUF_ARRAY)
        return fail(c->error, "%.*s: expected an array of numbers or strings, got type %u",
                    SHOWN(e->key), type);
    /* An element takes at least this much, which also bounds the product below. */
    const size_t least = type == GGUF_STRING ? 8 : type_bytes[type];
    if (count > (size_t)(c->end - c->at) / least)
        return fail(c->error, "%.*s: an array of %llu elements does not fit in the file",
                    SHOWN(e->key), (unsigned long long)count);
    e->element = (gguf_type)type;
    e->count = (size_t)count;
    e->value = c->at;
    if (type != GGUF_STRING) return take(c, count * least, "an array") != NULL;
    gguf_string skipped;
    for (size_t i = 0; i < e->count; i++)
        if (!take_string(c, "a string in an array", &skipped)) return false;
    return true;
}

static bool take_entry(cursor *c, entry *e)
{
    uint32_t type;
    if (!take_string(c, "a key", &e->key) || !take_u32(c, "a value's type", &type)) return false;
    if (type > GGUF_F64)
        return fail(c->error, "%.*s: unknown type of value %u", SHOWN(e->key), type);
    e->type = (gguf_type)type;
    if (type == GGUF_ARRAY) return take_array(c, e);
    e->value = c->at;
    if (type != GGUF_STRING) return take(c, type_bytes[type], "a value") != NULL;
    gguf_string skipped;
    return take_string(c, "a string", &skipped);
}

/* Numbers and bytes per block of a type that can be read; false for others. */
static bool block_of(uint32_t type, size_t *numbers, size_t *bytes)
{
    *numbers = 32;
    switch (type) {
    case GGUF_TENSOR_Q4_0: *bytes = 18; return true;
    case GGUF_TENSOR_Q4_1: *bytes = 20; return true;
    case GGUF_TENSOR_Q8_0: *bytes = 34; return true;
    default: break;
    }
    *numbers = 1;
    *bytes = type == GGUF_TENSOR_F32 ? 4 : 2;
    return type == GGUF_TENSOR_F32 || type == GGUF_TENSOR_F16 || type == GGUF_TENSOR_BF16;
}

/* False when the product passes SIZE_MAX. */
static bool multiply(size_t *a, uint64_t b)
{
    if (b && *a > SIZE_MAX / b) return false;
    *a *= (size_t)b;
    return true;
}

static bool take_dims(cursor *c, gguf_tensor *t)
{
    uint32_t num_dims;
    if (!take_u32(c, "a tensor's dimensions", &num_dims)) return false;
    if (num_dims < 1 || num_dims > 4)
        return fail(c->error, "%.*s: expected 1 to 4 dimensions, got %u", SHOWN(t->name), num_dims);
    t->num_dims = (int)num_dims;
    t->num_rows = 1;
    for (uint32_t i = 0; i < 4; i++) {
        t->dims[i] = 1;
        if (i >= num_dims) continue;
        if (!take_u64(c, "a tensor's dimensions", &t->dims[i])) return false;
        if (t->dims[i] == 0 || t->dims[i] > INT64_MAX || (i && !multiply(&t->num_rows, t->dims[i])))
            return fail(c->error, "%.*s: dimension %u is %llu", SHOWN(t->name), i,
                        (unsigned long long)t->dims[i]);
    }
    return true;
}

/* All of a tensor but its data: the data section is not known yet, see place_tensor. */
static bool take_tensor(cursor *c, gguf_tensor *t, uint64_t *offset)
{
    uint32_t type;
    size_t numbers, bytes;
    if (!take_string(c, "a tensor's name", &t->name) || !take_dims(c, t) ||
        !take_u32(c, "a tensor's type", &type) || !take_u64(c, "a tensor's offset", offset))
        return false;
    if (!block_of(type, &numbers, &bytes))
        return fail(
            c->error,
            "%.*s: type %s (%u) cannot be read; expected F32, F16, BF16, Q8_0, Q4_0 or Q4_1",
            SHOWN(t->name), gguf_tensor_type_name(type), type);
    t->type = (gguf_tensor_type)type;
    if (t->dims[0] % numbers)
        return fail(c->error, "%.*s: a row of %llu numbers is not made of blocks of %zu",
                    SHOWN(t->name), (unsigned long long)t->dims[0], numbers);
    t->row_bytes = bytes;
    t->bytes = t->num_rows;
    if (!multiply(&t->row_bytes, t->dims[0] / numbers) || !multiply(&t->bytes, t->row_bytes))
        return fail(c->error, "%.*s: larger than any memory", SHOWN(t->name));
    return true;
}

static bool place_tensor(const cursor *c, gguf_tensor *t, uint64_t offset, uint64_t alignment)
{
    /* c->at is where tensor data begins. */
    const size_t data_bytes = (size_t)(c->end - c->at);
    if (offset % alignment)
        return fail(c->error, "%.*s: offset %llu is not a multiple of the alignment %llu",
                    SHOWN(t->name), (unsigned long long)offset, (unsigned long long)alignment);
    if (offset > data_bytes || t->bytes > data_bytes - offset)
        return fail(c->error, "%.*s: %zu bytes at offset %llu pass the end of the file's %zu",
                    SHOWN(t->name), t->bytes, (unsigned long long)offset, data_bytes);
    t->data = c->at + offset;
    return true;
}

/* ---- sorting and finding by name ------------------------------------------------------------ */

static int compare(gguf_string a, gguf_string b)
{
    const int order = memcmp(a.data, b.data, a.len < b.len ? a.len : b.len);
    return order ? order : (a.len > b.len) - (a.len < b.len);
}

/* Entries and tensors both begin with their name, which is all that these two look at. */
static int compare_named(const void *a, const void *b)
{
    return compare(*(const gguf_string *)a, *(const gguf_string *)b);
}

static bool sort_unique(void *items, size_t count, size_t bytes, const char *what, char *error)
{
    if (count) qsort(items, count, bytes, compare_named);
    for (size_t i = 1; i < count; i++) {
        const gguf_string *name = (const void *)((const char *)items + i * bytes);
        if (compare_named((const char *)items + (i - 1) * bytes, name) == 0)
            return fail(error, "%.*s: the file has two %s of that name", SHOWN(*name), what);
    }
    return true;
}

static const void *find_named(const void *items, size_t count, size_t bytes, const char *name)
{
    const gguf_string key = {.data = name, .len = strlen(name)};
    return count ? bsearch(&key, items, count, bytes, compare_named) : NULL;
}

/* ---- opening -------------------------------------------------------------------------------- */

static bool read_header(cursor *c, uint64_t *num_tensors, uint64_t *num_entries)
{
    uint32_t version;
    const uint8_t *magic = take(c, 4, "the magic \"GGUF\"");
    if (!magic) return false;
    if (memcmp(magic, "GGUF", 4) != 0) return fail(c->error, "not a GGUF file");
    if (!take_u32(c, "the version", &version)) return false;
    if (version != 2 && version != 3)
        return fail(c->error, "GGUF version: expected 2 or 3 (little-endian), got %u", version);
    if (!take_u64(c, "the number of tensors", num_tensors) ||
        !take_u64(c, "the number of keys", num_entries))
        return false;
    /* The smallest key takes 13 bytes and the smallest tensor 32. The check bounds what is
     * allocated next by the size of the file. */
    const size_t left = (size_t)(c->end - c->at);
    if (*num_entries > left / 13 || *num_tensors > left / 32)
        return fail(c->error, "%llu keys and %llu tensors do not fit in the file",
                    (unsigned long long)*num_entries, (unsigned long long)*num_tensors);
    return true;
}

static bool read_entries(gguf *file, cursor *c, uint64_t count)
{
    file->entries = calloc((size_t)count + 1, sizeof *file->entries);
    if (!file->entries) return fail(c->error, "out of memory");
    for (; file->num_entries < count; file->num_entries++)
        if (!take_entry(c, &file->entries[file->num_entries])) return false;
    return sort_unique(file->entries, file->num_entries, sizeof *file->entries, "keys", c->error);
}

static bool read_alignment(const gguf *file, uint64_t *out, char *error)
{
    *out = 32;
    if (!gguf_has(file, "general.alignment")) return true;
    if (!gguf_get_uint(file, "general.alignment", out, error)) return false;
    if (*out < 8 || *out > 1u << 20 || (*out & (*out - 1)))
        return fail(error, "general.alignment: expected a power of two from 8 to 2^20, got %llu",
                    (unsigned long long)*out);
    return true;
}

static bool read_tensors(gguf *file, cursor *c, uint64_t count)
{
    bool ok = false;
    uint64_t alignment;
    uint64_t *offsets = calloc((size_t)count + 1, sizeof *offsets);
    file->tensors = calloc((size_t)count + 1, sizeof *file->tensors);
    if (!offsets || !file->tensors) {
        fail(c->error, "out of memory");
        goto done;
    }
    for (; file->num_tensors < count; file->num_tensors++)
        if (!take_tensor(c, &file->tensors[file->num_tensors], &offsets[file->num_tensors]))
            goto done;
    if (!read_alignment(file, &alignment, c->error)) goto done;
    const uint64_t past = (uint64_t)(c->at - c->begin) % alignment;
    /* A file without tensors may end right here. */
    if (count && past && !take(c, alignment - past, "padding")) goto done;
    for (size_t i = 0; i < file->num_tensors; i++)
        if (!place_tensor(c, &file->tensors[i], offsets[i], alignment)) goto done;
    ok = sort_unique(file->tensors, file->num_tensors, sizeof *file->tensors, "tensors", c->error);
done:
    free(offsets);
    return ok;
}

gguf *gguf_open_memory(const void *data, size_t bytes, char error[GGUF_ERROR])
{
    cursor c = {.begin = data, .at = data, .end = (const uint8_t *)data + bytes, .error = error};
    uint64_t num_tensors, num_entries;
    if (!read_header(&c, &num_tensors, &num_entries)) return NULL;
    gguf *file = calloc(1, sizeof *file);
    if (!file) {
        fail(error, "out of memory");
        return NULL;
    }
    if (read_entries(file, &c, num_entries) && read_tensors(file, &c, num_tensors)) return file;
    gguf_close(file);
    return NULL;
}

static void *map_file(const char *path, size_t *bytes, char *error)
{
    struct stat info;
    void *map = MAP_FAILED;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &info) != 0) {
        fail(error, "%.160s: %.60s", path, strerror(errno));
    } else if (!S_ISREG(info.st_mode) || info.st_size <= 0) {
        fail(error, "%.160s: not a file with anything in it", path);
    } else {
        *bytes = (size_t)info.st_size;
        map = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED) fail(error, "%.160s: %.60s", path, strerror(errno));
    }
    if (fd >= 0) close(fd);
    return map == MAP_FAILED ? NULL : map;
}

gguf *gguf_open(const char *path, char error[GGUF_ERROR])
{
    size_t bytes = 0;
    void *map = map_file(path, &bytes, error);
    if (!map) return NULL;
    gguf *file = gguf_open_memory(map, bytes, error);
    if (!file) {
        munmap(map, bytes);
        return NULL;
    }
    file->map = map;
    file->map_bytes = bytes;
    return file;
}

void gguf_close(gguf *file)
{
    if (!file) return;
    if (file->map) munmap(file->map, file->map_bytes);
    free(file->tensors);
    free(file->entries);
    free(file);
}

/* ---- metadata ------------------------------------------------------------------------------- */

static const entry *find_entry(const gguf *file, const char *key)
{
    return find_named(file->entries, file->num_entries, sizeof *file->entries, key);
}

/* The entry of a key whose type is in the set of bits; NULL and a message otherwise. */
static const entry *expect(const gguf *file, const char *key, unsigned types, const char *what,
                           char *error)
{
    const entry *e = find_entry(file, key);
    if (e && (types >> e->type & 1)) return e;
    fail(error, "%.160s: expected %s, got %s", key, what, e ? type_names[e->type] : "no such key");
    return NULL;
}

bool gguf_has(const gguf *file, const char *key)
{
    return find_entry(file, key) != NULL;
}

bool gguf_get_uint(const gguf *file, const char *key, uint64_t *out, char error[GGUF_ERROR])
{
    const unsigned types = 1u << GGUF_U8 | 1u << GGUF_I8 | 1u << GGUF_U16 | 1u << GGUF_I16 |
                           1u << GGUF_U32 | 1u << GGUF_I32 | 1u << GGUF_U64 | 1u << GGUF_I64;
    const entry *e = expect(file, key, types, "an integer", error);
    if (!e) return false;
    const int64_t value = load_int(e->type, e->value);
    if (value < 0 && e->type != GGUF_U64)
        return fail(error, "%.160s: expected a number >= 0, got %lld", key, (long long)value);
    *out = (uint64_t)value;
    return true;
}

bool gguf_get_float(const gguf *file, const char *key, double *out, char error[GGUF_ERROR])
{
    const entry *e = expect(file, key, 1u << GGUF_F32 | 1u << GGUF_F64, "a float", error);
    if (!e) return false;
    float single;
    if (e->type == GGUF_F64) {
        memcpy(out, e->value, sizeof *out);
    } else {
        memcpy(&single, e->value, sizeof single);
        *out = (double)single;
    }
    return true;
}

bool gguf_get_bool(const gguf *file, const char *key, bool *out, char error[GGUF_ERROR])
{
    const entry *e = expect(file, key, 1u << GGUF_BOOL, "a bool", error);
    if (!e) return false;
    if (*e->value > 1) return fail(error, "%.160s: expected 0 or 1, got %u", key, *e->value);
    *out = *e->value != 0;
    return true;
}

bool gguf_get_string(const gguf *file, const char *key, gguf_string *out, char error[GGUF_ERROR])
{
    const entry *e = expect(file, key, 1u << GGUF_STRING, "a string", error);
    if (!e) return false;
    *out = (gguf_string){.data = (const char *)e->value + 8, .len = (size_t)load_u64(e->value)};
    return true;
}

bool gguf_get_array(const gguf *file, const char *key, gguf_type element, gguf_array *out,
                    char error[GGUF_ERROR])
{
    const entry *e = expect(file, key, 1u << GGUF_ARRAY, "an array", error);
    if (!e) return false;
    if (e->element != element)
        return fail(error, "%.160s: expected an array of %s, got one of %s", key,
                    type_names[element], type_names[e->element]);
    *out = (gguf_array){.type = e->element, .count = e->count, .data = e->value};
    return true;
}

gguf_string gguf_next_string(gguf_array *array)
{
    const gguf_string s = {.data = (const char *)array->data + 8,
                           .len = (size_t)load_u64(array->data)};
    array->data += 8 + s.len;
    array->count--;
    return s;
}

int64_t gguf_int_at(const gguf_array *array, size_t i)
{
    return load_int(array->type, array->data + i * type_bytes[array->type]);
}

bool gguf_equal(gguf_string a, const char *b)
{
    return compare(a, (gguf_string){.data = b, .len = strlen(b)}) == 0;
}

/* ---- tensors -------------------------------------------------------------------------------- */

size_t gguf_num_tensors(const gguf *file)
{
    return file->num_tensors;
}

const gguf_tensor *gguf_tensor_at(const gguf *file, size_t i)
{
    return &file->tensors[i];
}

const gguf_tensor *gguf_find_tensor(const gguf *file, const char *name)
{
    return find_named(file->tensors, file->num_tensors, sizeof *file->tensors, name);
}

const char *gguf_tensor_type_name(uint32_t type)
{
    static const char *const names[] = {
        [0] = "F32",     [1] = "F16",      [2] = "Q4_0",   [3] = "Q4_1",    [6] = "Q5_0",
        [7] = "Q5_1",    [8] = "Q8_0",     [9] = "Q8_1",   [10] = "Q2_K",   [11] = "Q3_K",
        [12] = "Q4_K",   [13] = "Q5_K",    [14] = "Q6_K",  [15] = "Q8_K",   [16] = "IQ2_XXS",
        [17] = "IQ2_XS", [18] = "IQ3_XXS", [19] = "IQ1_S", [20] = "IQ4_NL", [21] = "IQ3_S",
        [22] = "IQ2_S",  [23] = "IQ4_XS",  [24] = "I8",    [25] = "I16",    [26] = "I32",
        [27] = "I64",    [28] = "F64",     [29] = "IQ1_M", [30] = "BF16",   [34] = "TQ1_0",
        [35] = "TQ2_0",  [39] = "MXFP4",
    };
    const char *name = type < sizeof names / sizeof names[0] ? names[type] : NULL;
    return name ? name : "unknown";
}

/* ---- conversion ----------------------------------------------------------------------------- */

static float bits_to_float(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* The f16 bits in a float's place have an exponent too small by 112, subnormals included. */
static float f16_to_float(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    if (rest >= 31u << 23) return bits_to_float(sign | 0x7f800000 | rest); /* infinity, NaN */
    return bits_to_float(sign | rest) * 0x1p112f;
}

static void dequantize_nibbles(const uint8_t *q, float scale, float shift, float *out)
{
    for (int j = 0; j < 16; j++) {
        out[j] = (float)(q[j] & 15) * scale + shift;
        out[j + 16] = (float)(q[j] >> 4) * scale + shift;
    }
}

static void dequantize_q4_0(const uint8_t *p, size_t blocks, float *out)
{
    for (size_t b = 0; b < blocks; b++, p += 18, out += 32) {
        const float d = f16_to_float(load_u16(p));
        dequantize_nibbles(p + 2, d, -8 * d, out); /* exact: 15 bits at most */
    }
}

static void dequantize_q4_1(const uint8_t *p, size_t blocks, float *out)
{
    for (size_t b = 0; b < blocks; b++, p += 20, out += 32)
        dequantize_nibbles(p + 4, f16_to_float(load_u16(p)), f16_to_float(load_u16(p + 2)), out);
}

static void dequantize_q8_0(const uint8_t *p, size_t blocks, float *out)
{
    for (size_t b = 0; b < blocks; b++, p += 34, out += 32) {
        const float d = f16_to_float(load_u16(p));
        for (int j = 0; j < 32; j++) out[j] = (float)(int8_t)p[2 + j] * d;
    }
}

void gguf_dequantize_row(const gguf_tensor *tensor, size_t row, float *out)
{
    const uint8_t *p = tensor->data + row * tensor->row_bytes;
    const size_t n = (size_t)tensor->dims[0];
    switch (tensor->type) {
    case GGUF_TENSOR_F32: memcpy(out, p, tensor->row_bytes); break;
    case GGUF_TENSOR_F16:
        for (size_t i = 0; i < n; i++) out[i] = f16_to_float(load_u16(p + 2 * i));
        break;
    case GGUF_TENSOR_BF16:
        for (size_t i = 0; i < n; i++) out[i] = bits_to_float((uint32_t)load_u16(p + 2 * i) << 16);
        break;
    case GGUF_TENSOR_Q4_0: dequantize_q4_0(p, n / 32, out); break;
    case GGUF_TENSOR_Q4_1: dequantize_q4_1(p, n / 32, out); break;
    case GGUF_TENSOR_Q8_0: dequantize_q8_0(p, n / 32, out); break;
    }
}
