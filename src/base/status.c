/* status.c - the thread's last error, and reading versioned structs.
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"

static _Thread_local char message[2048];

const char *qkv_last_error(void)
{
    return message;
}

qkv_status qi_fail(qkv_status status, const char *file, int line, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    const int n = vsnprintf(message, sizeof message, format, args);
    va_end(args);
    const char *slash = strrchr(file, '/');
    if (n >= 0 && (size_t)n < sizeof message)
        snprintf(message + n, sizeof message - (size_t)n, " (%s:%d)", slash ? slash + 1 : file,
                 line);
    if (qi_verbose(NULL, QI_VERBOSE_ERROR))
        qi_log(NULL, "error,%s,%s", qkv_status_name(status), message);
    return status;
}

const char *qkv_status_name(qkv_status status)
{
    switch (status) {
    case QKV_OK: return "QKV_OK";
    case QKV_ERR_INVALID: return "QKV_ERR_INVALID";
    case QKV_ERR_UNSUPPORTED: return "QKV_ERR_UNSUPPORTED";
    case QKV_ERR_MEMORY: return "QKV_ERR_MEMORY";
    case QKV_ERR_COMPILE: return "QKV_ERR_COMPILE";
    case QKV_ERR_DEVICE: return "QKV_ERR_DEVICE";
    case QKV_ERR_COMM: return "QKV_ERR_COMM";
    case QKV_ERR_INTERNAL: return "QKV_ERR_INTERNAL";
    }
    return "unknown status";
}

int32_t qkv_version(void)
{
    return QKV_VERSION_MAJOR * 10000 + QKV_VERSION_MINOR * 100 + QKV_VERSION_PATCH;
}

qkv_status qi_read_aligned_struct(void *to, size_t bytes, size_t alignment, const void *from,
                                  const char *name)
{
    uint32_t size;
    QI_REQUIRE(from, "%s: expected a struct, got NULL", name);
    memcpy(&size, from, sizeof size);
    QI_REQUIRE(size >= sizeof size && size <= 4096 && size % alignment == 0,
               "%s: expected struct_size as set by its INIT macro, got %u", name, (unsigned)size);
    memset(to, 0, bytes);
    memcpy(to, from, size < bytes ? size : bytes);
    for (size_t i = bytes; i < size; i++)
        QI_REQUIRE(((const unsigned char *)from)[i] == 0,
                   "%s: expected zeros in the fields that this library does not know, got a set "
                   "byte at offset %zu",
                   name, i);
    return QKV_OK;
}
