/* cuda.h - an NVIDIA GPU: its primary context, which frameworks share, memory, modules and launches.
 * Every function makes the device current on this thread for its own time only.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_DEVICE_CUDA_H
#define QI_DEVICE_CUDA_H

#include "device/cuda_api.h"
#include "kern/tensor_map.h"

typedef struct qi_cuda_device {
    cu_context context; /* the primary one */
    int ordinal, device;
    int major, minor; /* compute capability */
    int num_sms, shared_bytes, l2_bytes;
    int driver; /* 1000 major + 10 minor of the CUDA that the driver brings */
    char name[64];
} qi_cuda_device;

/* Opens device `ordinal`. UNSUPPORTED: no driver, no such device, older than sm_80. DEVICE: the driver
 * refuses, as it does in a process forked after its parent used it. */
qkv_status qi_cuda_open(int ordinal, qi_cuda_device *out);
void qi_cuda_close(qi_cuda_device *device);

/* What is known of GPUs of an architecture, "sm_90a", where there is none: to compile for them. Whatever
 * else is asked of such a device is UNSUPPORTED. INVALID: it is no such name. */
qkv_status qi_cuda_describe(const char *isa, qi_cuda_device *out);

/* Makes the device current on this thread until it leaves, which makes current what was before. Returns the
 * driver's result; on failure there is nothing to leave. */
int qi_cuda_enter(const qi_cuda_device *device, cu_context *before);
void qi_cuda_leave(const qi_cuda_device *device, cu_context before);

/* Memory of the device; and of the host, pinned. */
qkv_status qi_cuda_alloc(const qi_cuda_device *device, size_t bytes, void **out);
void qi_cuda_free(const qi_cuda_device *device, void *memory);
qkv_status qi_cuda_alloc_pinned(const qi_cuda_device *device, size_t bytes, void **out);
void qi_cuda_free_pinned(const qi_cuda_device *device, void *memory);

/* A compiled image (cubin or PTX), which serves every device of its architecture. *out stays NULL for one that
 * the driver does not take; *error is why, in its words. MEMORY, DEVICE */
qkv_status qi_cuda_load_image(const void *image, void **out, const char **error);
/* *out: the kernel of that name, NULL if there is none. MEMORY, DEVICE */
qkv_status qi_cuda_find(void *library, const char *name, void **out);

/* The most blocks of a cluster: 1 before sm_90, then 8, and 16 where so many multiprocessors are sure to be in one group. */
i32 qi_cuda_most_clustered(const qi_cuda_device *device);

/* Loads a kernel onto the device and allows it all of the shared memory, and its largest clusters. */
qkv_status qi_cuda_function(const qi_cuda_device *device, void *kernel, cu_function *out);

typedef struct qi_grid {
    u32 x, y, z;      /* blocks; 0 counts as 1 */
    u32 threads;      /* of a block */
    u32 shared_bytes; /* dynamic */
    i32 overlaps_before; /* from sm_90 on it may begin before what precedes it in the stream has ended: the
                            kernel waits for that itself (griddepcontrol.wait) */
    u32 cluster; /* blocks along x that form a cluster (kern/cuda/cluster.cuh); 0 and 1: none. x is a multiple of it */
} qi_grid;

/* Enqueues one launch; params is the kernel's only parameter. UNSUPPORTED: a cluster, on a device older than
 * sm_90. */
qkv_status qi_cuda_launch(const qi_cuda_device *device, cu_function function, const qi_grid *grid,
                          const void *params, void *stream);

/* A tensor as the copy engine (sm_90 and later) takes boxes of it: rows of `sizes[0]` elements, strides of the other
 * axes in bytes. A box is 128 bytes wide, which shared memory gets as rows in the exchanged order that wgmma reads.
 * Base and strides are multiples of 16 bytes. */
typedef struct qi_box_tensor {
    void *base;
    u64 sizes[5], strides[4];
    u32 box[5];
    u32 axes;           /* up to 5 */
    u32 element_bytes;  /* 1 or 2 */
    qi_tensor_map *map; /* where it goes */
} qi_box_tensor;

/* Encodes so many of them, on the host. */
qkv_status qi_cuda_tensor_maps(const qi_cuda_device *device, const qi_box_tensor *tensors,
                               i32 count);

/* Is the stream being captured into a graph? */
qkv_status qi_cuda_capturing(const qi_cuda_device *device, void *stream, int *capturing);

/* A mark in a stream; waiting for one that was never recorded returns at once. */
qkv_status qi_cuda_event_create(const qi_cuda_device *device, cu_event *out);
void qi_cuda_event_destroy(const qi_cuda_device *device, cu_event event);
qkv_status qi_cuda_event_record(const qi_cuda_device *device, cu_event event, void *stream);
qkv_status qi_cuda_event_wait(const qi_cuda_device *device, cu_event event);

/* Enqueues copies and waits, for plans. */
qkv_status qi_cuda_copy(const qi_cuda_device *device, void *dst, const void *src, size_t bytes,
                        void *stream);
qkv_status qi_cuda_zero(const qi_cuda_device *device, void *dst, size_t bytes, void *stream);
qkv_status qi_cuda_wait(const qi_cuda_device *device, void *stream);

#endif
