/* test_bytes.c - UTF-8 that arrives in pieces, and JSON strings, of examples/generate.
 * SPDX-License-Identifier: Apache-2.0 */
#include "support.h"

#include "bytes.h"

/* What utf8_write gives for data, and how many bytes it took. */
static size_t written(const char *data, size_t len, bool last, char *out, size_t out_size)
{
    FILE *file = tmpfile();
    assert_non_null(file);
    const size_t taken = utf8_write(file, data, len, last);
    rewind(file);
    out[fread(out, 1, out_size - 1, file)] = '\0';
    fclose(file);
    return taken;
}

#define BAD "\xef\xbf\xbd"

static void bytes_utf8_write_holds_what_may_become_a_character(void **state)
{
    (void)state;
    static const struct {
        const char *in;
        size_t taken; /* when more may come */
        const char *out, *out_last;
        const char *why;
    } cases[] = {
        {"abc", 3, "abc", "abc", "ASCII"},
        {"\xc3\xa9", 2, "\xc3\xa9", "\xc3\xa9", "two bytes"},
        {"a\xc3", 1, "a", "a" BAD, "half of two"},
        {"\xe2\x82", 0, "", BAD, "two thirds of three"},
        {"\xf0\x9f\x8d", 0, "", BAD, "three quarters of four"},
        {"\xf0\x9f\x8d\x82!", 5, "\xf0\x9f\x8d\x82!", "\xf0\x9f\x8d\x82!", "four bytes"},
        {"\x80", 1, BAD, BAD, "a lone continuation"},
        {"\xff\xfe", 2, BAD BAD, BAD BAD, "never valid"},
        {"\xe2\x82!", 3, BAD "!", BAD "!", "broken off: one mark for the two"},
        {"\xc0\xaf", 2, BAD BAD, BAD BAD, "a slash in two bytes"},
        {"\xe0\x80\x80", 3, BAD BAD BAD, BAD BAD BAD, "three bytes where one would do"},
        {"\xed\xa0\x80", 3, BAD BAD BAD, BAD BAD BAD, "a surrogate"},
        {"\xf4\x90\x80\x80", 4, BAD BAD BAD BAD, BAD BAD BAD BAD, "past U+10FFFF"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char out[64];
        const size_t len = strlen(cases[i].in);
        const size_t taken = written(cases[i].in, len, false, out, sizeof out);
        if (taken != cases[i].taken || strcmp(out, cases[i].out) != 0)
            fail_msg("%s: took %zu bytes, wrote \"%s\"", cases[i].why, taken, out);
        if (written(cases[i].in, len, true, out, sizeof out) != len ||
            strcmp(out, cases[i].out_last) != 0)
            fail_msg("%s, at the end: wrote \"%s\"", cases[i].why, out);
    }
}

/* A code point by the definition of UTF-8. */
static size_t encode(uint32_t code, char *out)
{
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    const size_t n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = n; i-- > 1; code >>= 6) out[i] = (char)(0x80 | (code & 0x3f));
    out[0] = (char)((0xf00 >> n & 0xff) | code);
    return n;
}

static void bytes_utf8_length_knows_every_code_point(void **state)
{
    (void)state;
    for (uint32_t code = 0; code < 0x110000; code++) {
        char data[4];
        const size_t n = encode(code, data);
        const bool surrogate = code >= 0xd800 && code < 0xe000;
        const int want = surrogate ? -1 : (int)n;
        if (utf8_length(data, n) != want) fail_msg("U+%04x: %d", code, utf8_length(data, n));
        for (size_t part = 1; part < n && !surrogate; part++)
            if (utf8_length(data, part) != 0) fail_msg("U+%04x, %zu bytes of it", code, part);
    }
}

static void bytes_json_string_is_escaped(void **state)
{
    (void)state;
    static const struct {
        const char *in;
        size_t len;
        const char *out;
    } cases[] = {
        {"", 0, "\"\""},
        {"a\"b\\c/", 6, "\"a\\\"b\\\\c/\""},
        {"\n\t\r\b\f", 5, "\"\\n\\t\\r\\u0008\\u000c\""},
        {"\0\x01\x1f\x7f", 4, "\"\\u0000\\u0001\\u001f\x7f\""},
        {"nrtb", 4, "\"nrtb\""},
        {"\xc3\xa9\xf0\x9f\x8d\x82", 6, "\"\xc3\xa9\xf0\x9f\x8d\x82\""},
        {"\xc2\x85\xc2\x86\xe2\x80\xa8\xe2\x80\xa9", 10, "\"\\u0085\xc2\x86\\u2028\\u2029\""},
        {"a\xff\xe2\x82", 4, "\"a" BAD BAD "\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char out[64];
        FILE *file = tmpfile();
        assert_non_null(file);
        json_write_string(file, cases[i].in, cases[i].len);
        rewind(file);
        out[fread(out, 1, sizeof out - 1, file)] = '\0';
        fclose(file);
        assert_string_equal(out, cases[i].out);
    }
}

static void bytes_add_keeps_what_was_there(void **state)
{
    (void)state;
    bytes b = {0};
    char all[3000];
    size_t len = 0;
    while (len + 40 < sizeof all) {
        char piece[40];
        const size_t n = (size_t)test_below(40);
        for (size_t i = 0; i < n; i++) piece[i] = (char)test_below(256);
        assert_true(bytes_add(&b, piece, n));
        memcpy(all + len, piece, n);
        len += n;
        assert_int_equal(b.len, len);
    }
    assert_memory_equal(b.data, all, len);
    bytes_free(&b);
    assert_null(b.data);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_utf8_write_holds_what_may_become_a_character),
        cmocka_unit_test(bytes_utf8_length_knows_every_code_point),
        cmocka_unit_test(bytes_json_string_is_escaped),
        cmocka_unit_test(bytes_add_keeps_what_was_there),
    };
    return cmocka_run_group_tests_name("bytes", tests, NULL, NULL);
}
