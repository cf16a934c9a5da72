/* driver.h - between the parts of the emulated CUDA driver. Its entry points have the names and arguments of
 * the driver's; where there are versions, the symbols carry the newest's suffix.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMULATOR_DRIVER_H
#define EMULATOR_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "grid.h"

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUgraph_st *CUgraph;
typedef struct CUlib_st *CUlibrary;
typedef struct CUkern_st *CUkernel;
typedef struct CUkern_st *CUfunction; /* the same here */

/* Value, name after CUDA_ERROR_, text. */
#define RESULTS(X)                                                                                 \
    X(0, SUCCESS, "no error")                                                                      \
    X(1, INVALID_VALUE, "invalid argument")                                                        \
    X(2, OUT_OF_MEMORY, "out of memory")                                                           \
    X(3, NOT_INITIALIZED, "initialization error")                                                  \
    X(101, INVALID_DEVICE, "invalid device ordinal")                                               \
    X(200, INVALID_IMAGE, "device kernel image is invalid")                                        \
    X(201, INVALID_CONTEXT, "invalid device context")                                              \
    X(400, INVALID_HANDLE, "invalid resource handle")                                              \
    X(500, NOT_FOUND, "named symbol not found")                                                    \
    X(701, LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch")                     \
    X(719, LAUNCH_FAILED, "unspecified launch failure")                                            \
    X(801, NOT_SUPPORTED, "operation not supported")                                               \
    X(900, STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing")         \
    X(901, STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture")  \
    X(904, STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work")                          \
    X(906, STREAM_CAPTURE_IMPLICIT,                                                                \
      "operation would make the legacy stream depend on a capturing blocking stream")              \
    X(907, CAPTURED_EVENT,                                                                         \
      "operation not permitted on an event last recorded in a capturing stream")                   \
    X(912, INVALID_CLUSTER_SIZE, "misconfigured cluster")

typedef enum CUresult {
#define X(value, name, text) name = value,
    RESULTS(X)
#undef X
} CUresult;

struct CUkern_st {
    CUlibrary library;
    const emulator_kernel *kernel;
    char name[64];
    unsigned max_shared_bytes; /* dynamic */
    bool any_cluster;          /* also of more than PORTABLE_CLUSTER blocks */
    CUkernel next;
};

typedef struct CUlaunchAttribute {
    int id;
    char pad[4];
    union {
        char room[64];
        emulator_index cluster;
    } value;
} CUlaunchAttribute;

typedef struct CUlaunchConfig {
    emulator_index grid, block;
    unsigned shared_bytes;
    CUstream stream;
    CUlaunchAttribute *attributes;
    unsigned num_attributes;
} CUlaunchConfig;

/* The result of work that a launch, a copy or a memset has; what a graph keeps of it, too. */
typedef enum work_kind { WORK_LAUNCH, WORK_COPY, WORK_FILL } work_kind;
typedef struct work {
    work_kind kind;
    CUfunction function;
    emulator_index grid, block;
    unsigned shared_bytes, cluster;
    void *params; /* a copy, of the graph */
    void *to;
    const void *from;
    size_t bytes; /* or elements */
    unsigned value, size;
} work;

/* Every entry point holds it. Returned by ENTER, which fails before cuInit, without a current context, and
 * after a kernel has failed, as the driver does. */
CUresult driver_enter(void);
void driver_leave(void);
CUresult driver_do(const work *w); /* at once */

/* stream.c: at once, or into the graph of a stream that is capturing. */
CUresult stream_do(CUstream stream, const work *w);
/* What may not be called while this thread, or any one globally, is capturing; it ends the capture. */
CUresult stream_unsafe(void);

#define ENTER()                                                                                    \
    do {                                                                                           \
        const CUresult result_ = driver_enter();                                                   \
        if (result_ != SUCCESS) return result_;                                                    \
    } while (0)
#define LEAVE(result)                                                                              \
    do {                                                                                           \
        const CUresult result_ = (result);                                                         \
        driver_leave();                                                                            \
        return result_;                                                                            \
    } while (0)

/* memory.c: device memory, out of the host's reach while closed. */
void memory_open(void);
void memory_close(void);
/* Whether there is memory of the host's that the GPU has not been given. */
bool memory_is_unshared(const void *p);

#endif
