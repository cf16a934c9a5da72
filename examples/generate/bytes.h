/* bytes.h - a string that grows, and UTF-8 that arrives in pieces.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_BYTES_H
#define GENERATE_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

/* All zero is empty. */
typedef struct bytes {
    char *data;
    size_t len, capacity;
} bytes;

/* False when out of memory: b is then as before. */
bool bytes_add(bytes *b, const char *data, size_t len);
void bytes_free(bytes *b);

/* The length, 1 to 4, of the well-formed character that data begins with; 0 if it may become one
 * with more bytes; -n if its first n bytes never will. len is at least 1. */
int utf8_length(const char *data, size_t len);

/* Writes the characters that are complete, with U+FFFD for what is none, and returns how many bytes
 * of data they were. At the end of a text (last) everything is complete. */
size_t utf8_write(FILE *file, const char *data, size_t len, bool last);

/* A JSON string with its quotes. */
void json_write_string(FILE *file, const char *data, size_t len);

#endif
