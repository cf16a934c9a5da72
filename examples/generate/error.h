/* error.h - one line of text for whatever went wrong; who can go on no further prints it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_ERROR_H
#define GENERATE_ERROR_H

#include <stdbool.h>

#include "gguf.h"
#include "qkv/base.h"

/* Writes the line and returns false, so that a failing function ends with `return fail(...)`. */
bool fail(char error[GGUF_ERROR], const char *format, ...) __attribute__((format(printf, 2, 3)));

/* True for QKV_OK; else the library's own message, after the name of the call. */
bool works(char error[GGUF_ERROR], const char *call, qkv_status status);

/* malloc's like, aligned to 64 bytes: a cache line, and a vector of any ISA level; large blocks to
 * huge pages. */
void *allocate(size_t bytes);

#endif
