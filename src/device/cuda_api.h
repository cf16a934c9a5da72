/* cuda_api.h - the CUDA driver, opened at run time: what of it the library uses, in one table.
 *
 * No CUDA header is needed to build: handles are opaque pointers, and the few structs and numbers below
 * are the driver's ABI, which does not change within a versioned symbol. Tests put their own functions
 * into the table to see what a call does.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_DEVICE_CUDA_API_H
#define QI_DEVICE_CUDA_API_H

#include <stddef.h>

#include "kern/abi.h"
#include "qkv/base.h"

typedef struct cu_context *cu_context;
typedef struct cu_stream *cu_stream;
typedef struct cu_event *cu_event;
typedef struct cu_library *cu_library;
typedef struct cu_kernel *cu_kernel;
typedef struct cu_function *cu_function;
typedef u64 cu_ptr;

/* Results that the library tells apart. */
enum {
    CU_SUCCESS = 0,
    CU_OUT_OF_MEMORY = 2,
    CU_NOT_INITIALIZED = 3,
    CU_NO_DEVICE = 100,
    CU_INVALID_IMAGE = 200,
    CU_NO_BINARY_FOR_GPU = 209,
    CU_INVALID_PTX = 218,
    CU_JIT_COMPILER_NOT_FOUND = 221,
    CU_UNSUPPORTED_PTX_VERSION = 222,
    CU_JIT_COMPILATION_DISABLED = 223,
    CU_INVALID_SOURCE = 300,
    CU_NOT_FOUND = 500
};

/* Attributes of a device. */
enum {
    CU_DEVICE_MAX_SHARED_BYTES_PER_BLOCK_OPTIN = 97,
    CU_DEVICE_NUM_SMS = 16,
    CU_DEVICE_MAJOR = 75,
    CU_DEVICE_MINOR = 76,
    CU_DEVICE_L2_BYTES = 38
};

enum {
    CU_FUNCTION_SHARED_BYTES = 1,
    CU_FUNCTION_MAX_DYNAMIC_SHARED_BYTES = 8,
    CU_FUNCTION_ANY_CLUSTER_SIZE = 14
};
enum { CU_CAPTURE_NONE = 0, CU_CAPTURE_RELAXED = 2 };
enum { CU_LAUNCH_CLUSTER = 4, CU_LAUNCH_PROGRAMMATIC = 6 };
enum { CU_EVENT_NO_TIMING = 2 };
enum { CU_MAP_U8 = 0, CU_MAP_U16 = 1, CU_MAP_SWIZZLE_128B = 3, CU_MAP_PROMOTE_128B = 2 };

typedef struct cu_launch_attribute {
    i32 id;
    char pad[4];
    union {
        char room[64];
        i32 flag;
        u32 cluster[3]; /* blocks, in x, y, z */
    } value;
} cu_launch_attribute;

typedef struct cu_launch_config {
    u32 grid[3], block[3];
    u32 shared_bytes;
    cu_stream stream;
    cu_launch_attribute *attributes;
    u32 num_attributes;
} cu_launch_config;

/* name in the table, symbol, version of its ABI, arguments */
#define QI_CUDA_API(X)                                                                             \
    X(init, "cuInit", 2000, (unsigned flags))                                                      \
    X(driver_version, "cuDriverGetVersion", 2020, (int *version))                                  \
    X(error_string, "cuGetErrorString", 6000, (int result, const char **text))                     \
    X(device_count, "cuDeviceGetCount", 2000, (int *count))                                        \
    X(device_get, "cuDeviceGet", 2000, (int *device, int ordinal))                                 \
    X(device_name, "cuDeviceGetName", 2000, (char *name, int bytes, int device))                   \
    X(device_attribute, "cuDeviceGetAttribute", 2000, (int *value, int attribute, int device))     \
    X(primary_retain, "cuDevicePrimaryCtxRetain", 7000, (cu_context * context, int device))        \
    X(primary_release, "cuDevicePrimaryCtxRelease", 11000, (int device))                           \
    X(context_current, "cuCtxGetCurrent", 4000, (cu_context * context))                            \
    X(context_set, "cuCtxSetCurrent", 4000, (cu_context context))                                  \
    X(library_load, "cuLibraryLoadData", 12000,                                                    \
      (cu_library * library, const void *image, void *jit_options, void **jit_values,              \
       unsigned num_jit, void *options, void **values, unsigned num_options))                      \
    X(library_unload, "cuLibraryUnload", 12000, (cu_library library))                              \
    X(library_kernel, "cuLibraryGetKernel", 12000,                                                 \
      (cu_kernel * kernel, cu_library library, const char *name))                                  \
    X(kernel_function, "cuKernelGetFunction", 12000, (cu_function * function, cu_kernel kernel))   \
    X(function_get, "cuFuncGetAttribute", 2020, (int *value, int attribute, cu_function function)) \
    X(function_set, "cuFuncSetAttribute", 9000, (cu_function function, int attribute, int value))  \
    X(occupancy, "cuOccupancyMaxActiveBlocksPerMultiprocessor", 6050,                              \
      (int *blocks, cu_function function, int block_size, size_t shared_bytes))                    \
    X(launch, "cuLaunchKernelEx", 11060,                                                           \
      (const cu_launch_config *config, cu_function function, void **params, void **extra))         \
    X(memory_alloc, "cuMemAlloc", 3020, (cu_ptr * ptr, size_t bytes))                              \
    X(memory_free, "cuMemFree", 3020, (cu_ptr ptr))                                                \
    X(host_alloc, "cuMemHostAlloc", 2020, (void **ptr, size_t bytes, unsigned flags))              \
    X(host_free, "cuMemFreeHost", 2000, (void *ptr))                                               \
    X(copy_async, "cuMemcpyAsync", 4000, (cu_ptr dst, cu_ptr src, size_t bytes, cu_stream stream)) \
    X(memset_async, "cuMemsetD8Async", 3020,                                                       \
      (cu_ptr dst, unsigned char value, size_t bytes, cu_stream stream))                           \
    X(stream_synchronize, "cuStreamSynchronize", 2000, (cu_stream stream))                         \
    X(stream_capturing, "cuStreamIsCapturing", 10000, (cu_stream stream, int *status))             \
    X(capture_mode, "cuThreadExchangeStreamCaptureMode", 10010, (int *mode))                       \
    X(event_create, "cuEventCreate", 2000, (cu_event * event, unsigned flags))                     \
    X(event_destroy, "cuEventDestroy", 4000, (cu_event event))                                     \
    X(event_record, "cuEventRecord", 2000, (cu_event event, cu_stream stream))                     \
    X(event_synchronize, "cuEventSynchronize", 2000, (cu_event event))                             \
    X(encode_tensor_map, "cuTensorMapEncodeTiled", 12000,                                          \
      (void *map, int type, u32 rank, void *base, const u64 *sizes, const u64 *strides,            \
       const u32 *box, const u32 *steps, int interleave, int swizzle, int promotion, int fill))

typedef struct qi_cuda_api {
#define X(name, symbol, version, args) int(*name) args;
    QI_CUDA_API(X)
#undef X
} qi_cuda_api;

extern qi_cuda_api qi_cuda;

/* Fills the table; the first call does the work. UNSUPPORTED: no driver, or one too old. */
qkv_status qi_cuda_load(void);

/* A driver's answer as a status: MEMORY or DEVICE, with the driver's name of the call and its words. call: a
 * call by the table as it is written, or that name. */
qkv_status qi_cuda_check(int result, const char *call, const char *file, int line);
#define QI_CUDA_TRY(call)                                                                          \
    do {                                                                                           \
        const int qi_result_ = (call);                                                             \
        if (qi_result_ != CU_SUCCESS) return qi_cuda_check(qi_result_, #call, __FILE__, __LINE__); \
    } while (0)

#endif
