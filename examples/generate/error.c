/* error.c - SPDX-License-Identifier: Apache-2.0 */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

bool fail(char error[GGUF_ERROR], const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(error, GGUF_ERROR, format, args);
    va_end(args);
    return false;
}

bool works(char error[GGUF_ERROR], const char *call, qkv_status status)
{
    return status == QKV_OK ||
           fail(error, "%s: %s: %s", call, qkv_status_name(status), qkv_last_error());
}

void *allocate(size_t bytes)
{
    if (bytes > SIZE_MAX - 63) return NULL;
    return aligned_alloc(64, bytes ? (bytes + 63) / 64 * 64 : 64);
}
