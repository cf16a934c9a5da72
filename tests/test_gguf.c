/* test_gguf.c - what is in a file is read back; what is wrong with it is named; nothing crashes.
 *
 * The file of make_tiny_gguf.py comes from the environment (QKV_TEST_GGUF) or as an argument.
 * SPDX-License-Identifier: Apache-2.0 */
#include "support.h"

#include "gguf_writer.h"

static const char *tiny_path;

/* ---- a small file, and what can be wrong with it -------------------------------------------- */

/* What is added to the fields of a good file: all zeros leaves it good. */
typedef struct broken {
    const char *why, *message;
    uint32_t magic, version, array_type, alignment, type, num_dims, value_type;
    uint64_t num_keys, num_tensors, array_count, text_len, dims[3], offset;
    const char *same_key, *same_tensor; /* NULL: names of their own */
} broken;

static writer build(const broken *b)
{
    writer w = {.data = NULL};
    const uint32_t magic = 0x46554747 + b->magic;
    put_u32(&w, magic);
    put_u32(&w, 3 + b->version);
    put_u64(&w, 2 + b->num_tensors);
    put_u64(&w, 5 + b->num_keys);
    put_string_key(&w, "general.architecture", "llama");
    put_u32_key(&w, "general.alignment", 32 + b->alignment);
    put_array_key(&w, "an.array", GGUF_I32 + b->array_type, 3 + b->array_count);
    for (uint32_t i = 0; i < 3; i++) put_u32(&w, 7 - i * 8); /* 7, -1, -9 */
    put_key(&w, "a.text", GGUF_STRING);
    put_u64(&w, 4 + b->text_len);
    put(&w, "text", 4);
    put_key(&w, b->same_key ? b->same_key : "a.number", GGUF_U32 + b->value_type);
    put_u32(&w, 42);
    const uint64_t dims[] = {64 + b->dims[0], 3 + b->dims[1], 1 + b->dims[2], 1, 1};
    put_tensor(&w, "a.weight", 2, (const uint64_t[]){8, 2}, GGUF_TENSOR_F32, 0);
    put_tensor(&w, b->same_tensor ? b->same_tensor : "b.weight", 2 + b->num_dims, dims,
               GGUF_TENSOR_Q8_0 + b->type, 64 + b->offset);
    put_padding(&w, 32);
    uint8_t data[64 + 3 * 2 * 34];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(i & 63); /* no NaN */
    put(&w, data, sizeof data);
    return w;
}

static void gguf_names_what_is_wrong(void **state)
{
    (void)state;
    static const broken cases[] = {
        {.why = "another magic", .message = "not a GGUF file", .magic = 1},
        {.why = "version 1", .message = "expected 2 or 3 (little-endian), got 1", .version = -2u},
        {.why = "version 4", .message = "got 4", .version = 1},
        {.why = "big-endian", .message = "got 50331648", .version = 0x03000000 - 3},
        {.why = "count of keys", .message = "do not fit", .num_keys = UINT64_MAX - 5},
        {.why = "count of tensors", .message = "do not fit", .num_tensors = UINT64_MAX - 2},
        {.why = "a key too many", .message = "expected", .num_keys = 1},
        {.why = "a tensor too many", .message = "expected 1 to 4", .num_tensors = 1},
        {.why = "string past the end", .message = "a string of", .text_len = 1u << 20},
        {.why = "string past 2^64", .message = "a string of", .text_len = UINT64_MAX - 4},
        {.why = "array past the end", .message = "an.array", .array_count = 1u << 20},
        {.why = "array past 2^64", .message = "an.array", .array_count = UINT64_MAX / 4},
        {.why = "array of arrays", .message = "an.array: expected", .array_type = GGUF_ARRAY - 5},
        {.why = "array of type 13", .message = "got type 13", .array_type = 13 - GGUF_I32},
        {.why = "value of type 13", .message = "a.number: unknown type", .value_type = 13 - 4},
        {.why = "key twice", .message = "a.text: the file has two keys", .same_key = "a.text"},
        {.why = "tensor twice", .message = "a.weight: the file has two", .same_tensor = "a.weight"},
        {.why = "alignment 0", .message = "general.alignment: expected", .alignment = -32u},
        {.why = "alignment 4", .message = "general.alignment: expected", .alignment = -28u},
        {.why = "alignment 48", .message = "general.alignment: expected", .alignment = 16},
        {.why = "no dimensions", .message = "b.weight: expected 1 to 4", .num_dims = -2u},
        {.why = "5 dimensions", .message = "b.weight: expected 1 to 4", .num_dims = 3},
        {.why = "an empty row", .message = "b.weight: dimension 0 is 0", .dims[0] = -64ull},
        {.why = "no rows", .message = "b.weight: dimension 1 is 0", .dims[1] = -3ull},
        {.why = "rows past 2^64",
         .message = "b.weight: dimension 2",
         .num_dims = 1,
         .dims = {0, 1ull << 33, 1ull << 33}},
        {.why = "bytes past 2^64", .message = "b.weight: larger", .dims[1] = 1ull << 60},
        {.why = "row of 63", .message = "b.weight: a row of 63", .dims[0] = -1ull},
        {.why = "a type not read", .message = "b.weight: type Q6_K (14)", .type = 14 - 8},
        {.why = "a type never heard of",
         .message = "type unknown (4000000008)",
         .type = 4000000000},
        {.why = "offset not aligned", .message = "b.weight: offset 72", .offset = 8},
        {.why = "offset past the end", .message = "b.weight: 204 bytes at", .offset = 32},
        {.why = "offset past 2^64", .message = "b.weight: 204 bytes", .offset = -96ull},
        {.why = "a row past the end", .message = "b.weight: 272 bytes at", .dims[1] = 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char error[GGUF_ERROR] = "";
        writer w = build(&cases[i]);
        gguf *file = gguf_open_memory(w.data, w.len, error);
        if (file || !strstr(error, cases[i].message))
            fail_msg("%s: expected \"%s\", got \"%s\"", cases[i].why, cases[i].message, error);
        free(w.data);
    }
}

static void gguf_names_a_file_that_cannot_be_read(void **state)
{
    (void)state;
    char error[GGUF_ERROR] = "";
    assert_null(gguf_open("no/such/file.gguf", error));
    assert_non_null(strstr(error, "no/such/file.gguf: No such file"));
    assert_null(gguf_open(".", error));
    assert_non_null(strstr(error, ".: not a file"));
    assert_null(gguf_open("/dev/null", error));
    assert_non_null(strstr(error, "/dev/null: not a file"));
    gguf_close(NULL);
}

/* ---- reading back --------------------------------------------------------------------------- */

static void gguf_reads_a_file_back(void **state)
{
    (void)state;
    char error[GGUF_ERROR] = "none";
    writer w = build(&(broken){.why = "nothing"});
    gguf *file = gguf_open_memory(w.data, w.len, error);
    if (!file) fail_msg("%s", error);
    gguf_string text;
    gguf_array array;
    assert_true(gguf_get_string(file, "a.text", &text, error) && gguf_equal(text, "text"));
    assert_false(gguf_equal(text, "tex") || gguf_equal(text, "texts") || gguf_equal(text, "test"));
    assert_true(gguf_get_array(file, "an.array", GGUF_I32, &array, error));
    assert_int_equal(array.count, 3);
    for (size_t i = 0; i < 3; i++) assert_int_equal(gguf_int_at(&array, i), 7 - 8 * (int)i);
    assert_int_equal(gguf_num_tensors(file), 2);
    assert_ptr_equal(gguf_tensor_at(file, 1), gguf_find_tensor(file, "b.weight"));
    assert_null(gguf_find_tensor(file, "b.weigh"));
    const gguf_tensor *t = gguf_find_tensor(file, "b.weight");
    assert_int_equal(t->type, GGUF_TENSOR_Q8_0);
    assert_int_equal(t->num_dims, 2);
    assert_true(t->dims[0] == 64 && t->dims[1] == 3 && t->dims[2] == 1 && t->dims[3] == 1);
    assert_int_equal(t->num_rows, 3);
    assert_int_equal(t->row_bytes, 68);
    assert_int_equal(t->bytes, 204);
    assert_ptr_equal(t->data, w.data + w.len - 204);
    assert_string_equal(error, "none");
    gguf_close(file);
    free(w.data);
}

/* One key of every type of scalar. */
static writer build_scalars(void)
{
    writer w = {.data = NULL};
    put_header(&w, 0, 14);
    put_array_key(&w, "list", GGUF_I32, 0);
    const struct {
        const char *key;
        uint32_t type;
        size_t bytes;
        uint64_t bits;
    } keys[] = {
        {"u8", GGUF_U8, 1, 200},
        {"i8", GGUF_I8, 1, 0xff},
        {"u16", GGUF_U16, 2, 60000},
        {"i16", GGUF_I16, 2, 0xfffe},
        {"u32", GGUF_U32, 4, 4000000000},
        {"i32", GGUF_I32, 4, 77},
        {"f32", GGUF_F32, 4, 0x3fc00000},
        {"true", GGUF_BOOL, 1, 1},
        {"neither", GGUF_BOOL, 1, 2},
        {"u64", GGUF_U64, 8, UINT64_MAX},
        {"i64", GGUF_I64, 8, INT64_MAX},
        {"minus", GGUF_I64, 8, UINT64_MAX},
        {"f64", GGUF_F64, 8, 0xc004000000000000},
    };
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        put_key(&w, keys[i].key, keys[i].type);
        put(&w, &keys[i].bits, keys[i].bytes);
    }
    return w;
}

/* The call fails and leaves this in `error`. */
#define REFUSED(message, call)                                                                     \
    do {                                                                                           \
        if ((call) || !strstr(error, (message)))                                                   \
            fail_msg("%s: expected \"%s\", got \"%s\"", #call, (message), error);                  \
    } while (0)

static void gguf_checks_the_type_of_values(void **state)
{
    (void)state;
    char error[GGUF_ERROR] = "";
    writer w = build_scalars();
    gguf *file = gguf_open_memory(w.data, w.len, error);
    if (!file) fail_msg("%s", error);
    uint64_t n = 1;
    double x = 0;
    bool yes = false;
    gguf_string text;
    gguf_array array;
    assert_true(gguf_get_uint(file, "u8", &n, error) && n == 200);
    assert_true(gguf_get_uint(file, "u16", &n, error) && n == 60000);
    assert_true(gguf_get_uint(file, "u32", &n, error) && n == 4000000000);
    assert_true(gguf_get_uint(file, "i32", &n, error) && n == 77);
    assert_true(gguf_get_uint(file, "u64", &n, error) && n == UINT64_MAX);
    assert_true(gguf_get_uint(file, "i64", &n, error) && n == INT64_MAX);
    assert_true(gguf_get_float(file, "f32", &x, error) && x == 1.5);
    assert_true(gguf_get_float(file, "f64", &x, error) && x == -2.5);
    assert_true(gguf_get_bool(file, "true", &yes, error) && yes);
    assert_true(gguf_has(file, "u8") && !gguf_has(file, "u7"));

    REFUSED("i8: expected a number >= 0, got -1", gguf_get_uint(file, "i8", &n, error));
    REFUSED("i16: expected a number >= 0, got -2", gguf_get_uint(file, "i16", &n, error));
    REFUSED("minus: expected a number >= 0, got -1", gguf_get_uint(file, "minus", &n, error));
    REFUSED("f32: expected an integer, got f32", gguf_get_uint(file, "f32", &n, error));
    REFUSED("gone: expected an integer, got no such", gguf_get_uint(file, "gone", &n, error));
    REFUSED("u8: expected a float, got u8", gguf_get_float(file, "u8", &x, error));
    REFUSED("u8: expected a bool, got u8", gguf_get_bool(file, "u8", &yes, error));
    REFUSED("neither: expected 0 or 1, got 2", gguf_get_bool(file, "neither", &yes, error));
    REFUSED("u8: expected a string, got u8", gguf_get_string(file, "u8", &text, error));
    REFUSED("u8: expected an array", gguf_get_array(file, "u8", GGUF_I32, &array, error));
    REFUSED("of u8, got one of i32", gguf_get_array(file, "list", GGUF_U8, &array, error));
    assert_true(n == INT64_MAX && x == -2.5 && yes);
    gguf_close(file);
    free(w.data);
}

static void gguf_opens_a_file_as_converters_write_it(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        uint64_t dims[2];
    } want[] = {
        {"blk.0.attn_norm.weight", {64, 1}},    {"blk.0.attn_q.weight", {64, 64}},
        {"blk.0.attn_k.weight", {64, 32}},      {"blk.1.attn_v.weight", {64, 32}},
        {"blk.1.attn_output.weight", {64, 64}}, {"blk.1.ffn_norm.weight", {64, 1}},
        {"blk.1.ffn_gate.weight", {64, 128}},   {"blk.1.ffn_up.weight", {64, 128}},
        {"blk.0.ffn_down.weight", {128, 64}},   {"output_norm.weight", {64, 1}},
    };
    char error[GGUF_ERROR] = "";
    gguf *file = gguf_open(tiny_path, error);
    if (!file) fail_msg("%s", error);
    gguf_string architecture;
    gguf_array tokens;
    uint64_t layers;
    double eps;
    assert_true(gguf_get_string(file, "general.architecture", &architecture, error));
    assert_true(gguf_equal(architecture, "llama"));
    assert_true(gguf_get_uint(file, "llama.block_count", &layers, error) && layers == 2);
    assert_true(gguf_get_float(file, "llama.attention.layer_norm_rms_epsilon", &eps, error));
    assert_true(eps == (double)1e-5f);
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        const gguf_tensor *t = gguf_find_tensor(file, want[i].name);
        if (!t || t->dims[0] != want[i].dims[0] || t->num_rows != want[i].dims[1])
            fail_msg("%s: missing, or of another shape", want[i].name);
    }
    assert_true(gguf_get_array(file, "tokenizer.ggml.tokens", GGUF_STRING, &tokens, error));
    assert_int_equal(gguf_find_tensor(file, "token_embd.weight")->num_rows, tokens.count);
    assert_true(gguf_equal(gguf_next_string(&tokens), "<|endoftext|>"));
    assert_true(gguf_equal(gguf_next_string(&tokens), "<|im_start|>"));
    gguf_close(file);
}

/* ---- conversion, against the formulas in double --------------------------------------------- */

/* Number i of a row, from the definition of its type. */
static double reference(gguf_tensor_type type, const uint8_t *row, size_t i)
{
    float f;
    uint16_t h[2];
    switch (type) {
    case GGUF_TENSOR_F32: memcpy(&f, row + 4 * i, 4); return (double)f;
    case GGUF_TENSOR_F16: memcpy(h, row + 2 * i, 2); return test_f16_value(h[0]);
    case GGUF_TENSOR_BF16:
        memcpy(h, row + 2 * i, 2);
        return (double)test_bits_float((uint32_t)h[0] << 16);
    default: break;
    }
    const size_t block_bytes = type == GGUF_TENSOR_Q8_0 ? 34 : type == GGUF_TENSOR_Q4_1 ? 20 : 18;
    const uint8_t *block = row + i / 32 * block_bytes;
    const size_t j = i % 32;
    memcpy(h, block, 4);
    const double d = test_f16_value(h[0]);
    if (type == GGUF_TENSOR_Q8_0) return d * (int8_t)block[2 + j];
    const uint8_t two = block[(type == GGUF_TENSOR_Q4_1 ? 4 : 2) + j % 16];
    const int q = j < 16 ? two & 15 : two >> 4;
    return type == GGUF_TENSOR_Q4_0 ? d * (q - 8) : d * q + test_f16_value(h[1]);
}

static void expect_number(gguf_tensor_type type, size_t i, float got, double want)
{
    /* One rounding, in the sum of Q4_1; all else is exact. */
    const double margin = type == GGUF_TENSOR_Q4_1 ? fabs(want) * 0x1p-24 : 0;
    const bool same = want != want ? got != got : (double)got == want;
    if (!same && !(fabs((double)got - want) <= margin))
        fail_msg("%s, number %zu: expected %.9g, got %.9g", gguf_tensor_type_name(type), i, want,
                 (double)got);
}

/* A tensor of random bytes, opened and converted. pattern: 2-byte numbers count up from 0. */
static void convert(gguf_tensor_type type, size_t row_len, size_t num_rows, size_t row_bytes,
                    bool pattern)
{
    writer w = {.data = NULL};
    put_header(&w, 1, 0);
    put_tensor(&w, "t", 2, (const uint64_t[]){row_len, num_rows}, type, 0);
    put_padding(&w, 32);
    const size_t begin = w.len;
    for (size_t i = 0; i < num_rows * row_bytes; i += 2) {
        uint16_t bits = pattern ? (uint16_t)(i / 2) : (uint16_t)test_u64();
        if (!pattern && (bits & 0x7c00) == 0x7c00) bits ^= 0x4000; /* scales are finite */
        put(&w, &bits, 2);
    }
    char error[GGUF_ERROR] = "";
    gguf *file = gguf_open_memory(w.data, w.len, error);
    if (!file) fail_msg("%s", error);
    const gguf_tensor *t = gguf_find_tensor(file, "t");
    assert_int_equal(t->row_bytes, row_bytes);
    float *out = malloc((row_len + 1) * sizeof *out);
    for (size_t row = 0; row < num_rows; row++) {
        for (size_t i = 0; i <= row_len; i++) out[i] = i < row_len ? NAN : 12345;
        gguf_dequantize_row(t, row, out);
        for (size_t i = 0; i < row_len; i++)
            expect_number(type, i, out[i], reference(type, w.data + begin + row * row_bytes, i));
        assert_true(out[row_len] == 12345);
    }
    free(out);
    gguf_close(file);
    free(w.data);
}

static void gguf_converts_every_type(void **state)
{
    (void)state;
    convert(GGUF_TENSOR_F32, 7, 5, 28, false);
    convert(GGUF_TENSOR_F16, 65536, 1, 131072, true);
    convert(GGUF_TENSOR_BF16, 65536, 1, 131072, true);
    convert(GGUF_TENSOR_F16, 3, 9, 6, false);
    convert(GGUF_TENSOR_BF16, 1, 9, 2, false);
    convert(GGUF_TENSOR_Q8_0, 96, 500, 102, false);
    convert(GGUF_TENSOR_Q4_0, 96, 500, 54, false);
    convert(GGUF_TENSOR_Q4_1, 96, 500, 60, false);
}

/* ---- files that lie ------------------------------------------------------------------------- */

/* Reads whatever an opened file offers. */
static void use(const gguf *file, const uint8_t *data, size_t len)
{
    char error[GGUF_ERROR];
    gguf_array tokens;
    gguf_string text;
    size_t bytes = 0;
    if (gguf_get_array(file, "tokenizer.ggml.tokens", GGUF_STRING, &tokens, error))
        while (tokens.count) {
            text = gguf_next_string(&tokens);
            for (size_t i = 0; i < text.len; i++) bytes += (uint8_t)text.data[i];
        }
    for (size_t i = 0; i < gguf_num_tensors(file); i++) {
        const gguf_tensor *t = gguf_tensor_at(file, i);
        assert_true(t->data >= data && t->bytes <= (size_t)(data + len - t->data));
        assert_true(t->bytes == t->num_rows * t->row_bytes && t->row_bytes >= t->dims[0] / 2);
        float *row = malloc((size_t)t->dims[0] * sizeof *row);
        for (size_t r = 0; r < t->num_rows; r++) gguf_dequantize_row(t, r, row);
        free(row);
    }
    assert_true(bytes <= len * 255);
}

/* The bytes before the data of the first tensor. */
static size_t header_len(const uint8_t *data, size_t len)
{
    char error[GGUF_ERROR] = "";
    size_t end = len;
    gguf *file = gguf_open_memory(data, len, error);
    if (!file) fail_msg("%s", error);
    for (size_t i = 0; i < gguf_num_tensors(file); i++) {
        const size_t at = (size_t)(gguf_tensor_at(file, i)->data - data);
        if (at < end) end = at;
    }
    gguf_close(file);
    return end;
}

static void expect_no_prefix(const uint8_t *data, size_t len)
{
    for (size_t n = 0; n <= len; n++) {
        char error[GGUF_ERROR] = "";
        uint8_t *copy = malloc(n ? n : 1); /* its own block: reads past n bytes are seen */
        memcpy(copy, data, n);
        if (gguf_open_memory(copy, n, error) || !error[0])
            fail_msg("%zu bytes: expected a message, got \"%s\"", n, error);
        free(copy);
    }
}

static void flip_bytes(const uint8_t *data, size_t len, size_t header, int rounds, int *opened)
{
    uint8_t *copy = malloc(len);
    for (int round = 0; round < rounds; round++) {
        char error[GGUF_ERROR] = "";
        memcpy(copy, data, len);
        for (int64_t i = test_below(4); i >= 0; i--)
            copy[test_below((int64_t)header)] = (uint8_t)(test_below(3) ? test_u64() : 255);
        gguf *file = gguf_open_memory(copy, len, error);
        if (!file && !error[0]) fail_msg("round %d: neither file nor message", round);
        if (!file) continue;
        use(file, copy, len);
        gguf_close(file);
        ++*opened;
    }
    free(copy);
}

static void gguf_refuses_every_truncated_file(void **state)
{
    (void)state;
    size_t len = 0;
    uint8_t *tiny = read_bytes(tiny_path, &len);
    assert_non_null(tiny);
    expect_no_prefix(tiny, header_len(tiny, len));
    free(tiny);
    writer w = build(&(broken){.why = "nothing"});
    expect_no_prefix(w.data, w.len - 1);
    free(w.data);
}

static void gguf_survives_flipped_bytes(void **state)
{
    (void)state;
    size_t len = 0;
    int opened = 0;
    uint8_t *tiny = read_bytes(tiny_path, &len);
    assert_non_null(tiny);
    flip_bytes(tiny, len, header_len(tiny, len), 5000, &opened);
    assert_true(opened > 0); /* most of the header is text, where any byte will do */
    free(tiny);
    writer w = build(&(broken){.why = "nothing"});
    flip_bytes(w.data, w.len, header_len(w.data, w.len), 100000, &opened);
    free(w.data);
}

int main(int argc, char **argv)
{
    test_seed();
    tiny_path = argc > 1 ? argv[1] : getenv("QKV_TEST_GGUF");
    if (!tiny_path) {
        fprintf(stderr, "expected the path of tiny.gguf in QKV_TEST_GGUF or as an argument\n");
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gguf_names_what_is_wrong),
        cmocka_unit_test(gguf_names_a_file_that_cannot_be_read),
        cmocka_unit_test(gguf_reads_a_file_back),
        cmocka_unit_test(gguf_checks_the_type_of_values),
        cmocka_unit_test(gguf_opens_a_file_as_converters_write_it),
        cmocka_unit_test(gguf_converts_every_type),
        cmocka_unit_test(gguf_refuses_every_truncated_file),
        cmocka_unit_test(gguf_survives_flipped_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
