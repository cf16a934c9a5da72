/* base.h - export macro, version, status codes, dtypes: what every other header needs.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_BASE_H
#define QKV_BASE_H

#include <stddef.h>
#include <stdint.h>

#include <dlpack/dlpack.h>

#define QKV_VERSION_MAJOR 0
#define QKV_VERSION_MINOR 1
#define QKV_VERSION_PATCH 0

#if defined(__GNUC__)
#define QKV_API __attribute__((visibility("default")))
#else
#define QKV_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Status of a call. The values are pinned: they never change meaning or number. */
typedef enum qkv_status {
    QKV_OK = 0,
    QKV_ERR_INVALID = 1,     /* an argument breaks the documented contract */
    QKV_ERR_UNSUPPORTED = 2, /* valid request, but no kernel here accepts it */
    QKV_ERR_MEMORY = 3,      /* allocation failed, or a workspace is too small */
    QKV_ERR_COMPILE = 4,     /* a kernel compiler is absent or rejected the source */
    QKV_ERR_DEVICE = 5,      /* a driver or the operating system reported an error */
    QKV_ERR_COMM = 6,        /* a peer failed, timed out, or disagreed */
    QKV_ERR_INTERNAL = 7     /* a bug in qkv; please report the message */
} qkv_status;

/*
 * Rules that hold for every call unless its comment says otherwise:
 *   - a failing call returns a status, leaves its outputs untouched and its objects usable, and
 *     describes the argument at fault in qkv_last_error();
 *   - DLTensors are borrowed for the call; strides may be NULL (contiguous), byte_offset counts;
 *     the last axis must be contiguous, every other stride is free;
 *   - structs begin with struct_size, are zeroed and set by their ..._INIT macro; zero in any
 *     field is its default, and fields beyond what this library knows must be zero; struct_size is
 *     what a compiler gives the struct: whole units of its alignment;
 *   - stream is a CUstream; the CPU backend runs synchronously and ignores it.
 */

/* The detail of the last failure on this thread: "<argument>: expected <what>, got <what>
 * (file:line)". Never NULL; empty before the first failure; valid until the next one. */
QKV_API const char *qkv_last_error(void);

/* "QKV_ERR_INVALID" for QKV_ERR_INVALID; never NULL. */
QKV_API const char *qkv_status_name(qkv_status status);

/* Version of the library in use, major * 10000 + minor * 100 + patch. */
QKV_API int32_t qkv_version(void);

/* The dtypes, as DLPack spells them. Codes newer than an old <dlpack/dlpack.h> are DLPack's
 * numbers. Which operator takes which is said in its own header. */
#ifdef __cplusplus
#define QKV_DTYPE(code, bits) (DLDataType{(code), (bits), 1})
#else
#define QKV_DTYPE(code, bits) ((DLDataType){(code), (bits), 1})
#endif
#define QKV_F32  QKV_DTYPE(2, 32)
#define QKV_F16  QKV_DTYPE(2, 16)
#define QKV_BF16 QKV_DTYPE(4, 16)
#define QKV_E4M3 QKV_DTYPE(10, 8) /* fp8 e4m3, finite only ("fn"): largest value 448 */
#define QKV_E5M2 QKV_DTYPE(12, 8) /* fp8 e5m2, with infinities: largest value 57344 */
#define QKV_I8   QKV_DTYPE(0, 8)
#define QKV_I32  QKV_DTYPE(0, 32)
#define QKV_I64  QKV_DTYPE(0, 64)
#define QKV_U8   QKV_DTYPE(1, 8)
#define QKV_U64  QKV_DTYPE(1, 64)

#ifdef __cplusplus
}
#endif
#endif
