/* device.h - memory of the device that computes: the program's own on the CPU; on a GPU what NVIDIA's
 * driver, opened at run time, gives out.
 *
 * Work of one device is done in the order in which it is asked for, on the legacy stream (NULL), as
 * are the library's calls of this program. On a GPU it is done later than asked for: what reads its
 * results on the host waits first.
 *
 * Functions that can fail take `error` as those of gguf.h do. Calls come from the thread that opened
 * the device.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_DEVICE_H
#define GENERATE_DEVICE_H

#include "error.h"

typedef struct compute_device {
    DLDevice where; /* of every tensor there */
    int ordinal;    /* the driver's handle */
} compute_device;

#define DEVICE_CPU ((compute_device){.where = {kDLCPU, 0}})

/* The library's context of the same device should exist: its messages say what a machine lacks. */
bool device_open(compute_device *d, DLDevice where, char error[GGUF_ERROR]);
/* A device that was never opened (all zero) is fine. */
void device_close(compute_device *d);

/* What a default may be a share of: the CPU's memory, or what is free of a GPU's. */
bool device_memory(const compute_device *d, size_t *bytes, char error[GGUF_ERROR]);

/* NULL when out of memory; aligned to 64 bytes or more. */
void *device_alloc(const compute_device *d, size_t bytes);
/* NULL is fine. */
void device_free(const compute_device *d, void *block);

/* Copies from and to the host: done on return. */
bool device_upload(const compute_device *d, void *to, const void *from, size_t bytes,
                   char error[GGUF_ERROR]);
bool device_download(const compute_device *d, void *to, const void *from, size_t bytes,
                     char error[GGUF_ERROR]);
/* Copies within the device. */
bool device_copy(const compute_device *d, void *to, const void *from, size_t bytes,
                 char error[GGUF_ERROR]);

/* Until all that was asked for is done. */
bool device_wait(const compute_device *d, char error[GGUF_ERROR]);

/* A block that the host writes and the device reads, or the other way round: two blocks, of which the
 * host's is pinned, or on the CPU one and the same. */
typedef struct mirror {
    void *host, *there;
} mirror;

/* False when out of memory. */
bool mirror_create(const compute_device *d, size_t bytes, mirror *m);
/* All zero is fine. */
void mirror_destroy(const compute_device *d, mirror *m);

/* The first bytes, host to device: the host may write them again after a wait. */
bool mirror_upload(const compute_device *d, const mirror *m, size_t bytes, char error[GGUF_ERROR]);
/* The first bytes, device to host: done on return, and all before it. */
bool mirror_download(const compute_device *d, const mirror *m, size_t bytes,
                     char error[GGUF_ERROR]);

#endif
