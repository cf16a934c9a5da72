/* bytes.c - SPDX-License-Identifier: Apache-2.0 */
#include "bytes.h"

#include <stdlib.h>
#include <string.h>

#define REPLACEMENT "\xef\xbf\xbd" /* U+FFFD */

bool bytes_add(bytes *b, const char *data, size_t len)
{
    if (b->len + len > b->capacity) {
        const size_t capacity = (b->len + len) * 2;
        char *larger = realloc(b->data, capacity);
        if (!larger) return false;
        b->data = larger;
        b->capacity = capacity;
    }
    if (len > 0) memcpy(b->data + b->len, data, len);
    b->len += len;
    return true;
}

void bytes_free(bytes *b)
{
    free(b->data);
    *b = (bytes){0};
}

/* Source: the Unicode standard, table 3-7: which second bytes may follow a first one. */
int utf8_length(const char *data, size_t len)
{
    const unsigned char first = (unsigned char)data[0];
    if (first < 0x80) return 1;
    if (first < 0xc2 || first > 0xf4) return -1;
    const int wanted = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    unsigned char low = 0x80, high = 0xbf;
    if (first == 0xe0) low = 0xa0;  /* shorter forms exist */
    if (first == 0xed) high = 0x9f; /* surrogates */
    if (first == 0xf0) low = 0x90;  /* shorter forms exist */
    if (first == 0xf4) high = 0x8f; /* past U+10FFFF */
    for (int i = 1; i < wanted; i++, low = 0x80, high = 0xbf) {
        if ((size_t)i == len) return 0;
        const unsigned char byte = (unsigned char)data[i];
        if (byte < low || byte > high) return -i;
    }
    return wanted;
}

size_t utf8_write(FILE *file, const char *data, size_t len, bool last)
{
    size_t at = 0;
    while (at < len) {
        const int n = utf8_length(data + at, len - at);
        if (n > 0) {
            fwrite(data + at, 1, (size_t)n, file);
            at += (size_t)n;
        } else if (n < 0 || last) {
            fputs(REPLACEMENT, file);
            at += n < 0 ? (size_t)-n : len - at;
        } else {
            break;
        }
    }
    return at;
}

/* What stands for a character in JSON if it may not stand for itself, else NULL. The line breaks of
 * Unicode may, but many readers split text at them, and an object is to stay one line. */
static const char *json_escape(const char *data, size_t len)
{
    static const char *const escapes[][2] = {
        {"\"", "\\\""},
        {"\\", "\\\\"},
        {"\n", "\\n"},
        {"\t", "\\t"},
        {"\r", "\\r"},
        {"\xc2\x85", "\\u0085"},
        {"\xe2\x80\xa8", "\\u2028"},
        {"\xe2\x80\xa9", "\\u2029"},
    };
    for (size_t i = 0; i < sizeof escapes / sizeof escapes[0]; i++)
        if (strlen(escapes[i][0]) == len && !memcmp(escapes[i][0], data, len)) return escapes[i][1];
    return NULL;
}

static void json_write_character(FILE *file, const char *data, size_t len)
{
    const char *const escape = json_escape(data, len);
    if (escape)
        fputs(escape, file);
    else if ((unsigned char)data[0] < 0x20)
        fprintf(file, "\\u%04x", data[0]);
    else
        fwrite(data, 1, len, file);
}

void json_write_string(FILE *file, const char *data, size_t len)
{
    fputc('"', file);
    for (size_t at = 0; at < len;) {
        const int n = utf8_length(data + at, len - at);
        if (n > 0)
            json_write_character(file, data + at, (size_t)n);
        else
            fputs(REPLACEMENT, file);
        at += n > 0 ? (size_t)n : n < 0 ? (size_t)-n : len - at;
    }
    fputc('"', file);
}
