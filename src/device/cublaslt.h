/* cublaslt.h - matrix products by cuBLASLt on one context's GPU: which algorithm takes a problem, and
 * running it.
 *
 * The algorithm is asked for once a problem and kept, so that a call after the first makes no object and
 * allocates nothing; the table has room for CACHE problems, and then forgets old ones.
 *
 * Memory that an algorithm works in is one block a stream, allocated when a stream first needs it and freed
 * with the context: calls of one stream follow each other, those of two may not. A graph goes on using the
 * block of the stream that it was captured on, so two graphs captured on one stream must not run at the same
 * time. Where there is no block (more than STREAMS streams, no memory, or the stream that stands for one of
 * each thread), an algorithm that needs none runs.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_DEVICE_CUBLASLT_H
#define QI_DEVICE_CUBLASLT_H

#include <pthread.h>

#include "device/cublaslt_api.h"
#include "device/cuda.h"

/* out[m, n] = x[m, k] w[n, k]^T: everything that an algorithm may depend on. No padding: it is compared as
 * bytes. */
typedef struct qi_matmul {
    i64 m, n, k;
    i64 out_stride, x_stride, w_stride;          /* of a row, at least its length */
    qi_dtype dtype_out, dtype;                   /* f32, f16 or bf16; dtype of x and w */
    u32 out_alignment, x_alignment, w_alignment; /* bytes, of the addresses */
    u32 workspace;                               /* filled in here */
} qi_matmul;

typedef struct qi_cublaslt_entry qi_cublaslt_entry;

typedef struct qi_cublaslt {
    pthread_mutex_t lock;       /* of all below; a call holds it while it enqueues */
    const qi_cublaslt_api *api; /* tests put their own here */
    const char *unusable;       /* why, once that is known */
    lt_handle handle;
    lt_operation operation;
    lt_layout w, x, out; /* set anew for each call */
    lt_preference preference;
    qi_cublaslt_entry *entries;
    u32 turn; /* of the entries that are forgotten */
    struct {
        void *stream, *memory;
    } workspaces[16];
    int num_workspaces;
} qi_cublaslt;

void qi_cublaslt_init(qi_cublaslt *lt);
/* device NULL: in a process forked since, which cannot use the parent's. */
void qi_cublaslt_free(qi_cublaslt *lt, const qi_cuda_device *device);

/* NULL if cuBLASLt takes the problem, else why not. The first call opens the library. */
const char *qi_cublaslt_declines(qi_cublaslt *lt, const qi_cuda_device *device,
                                 const qi_matmul *problem);

/* Enqueues a problem that it takes. DEVICE, MEMORY */
qkv_status qi_cublaslt_multiply(qi_cublaslt *lt, const qi_cuda_device *device,
                                const qi_matmul *problem, void *out, const void *x, const void *w,
                                void *stream);

#endif
