/* context.h - one context per device: backend, threads, allocator, log; and what the library holds.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_CONTEXT_H
#define QKV_CONTEXT_H

#include "qkv/base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qkv_context qkv_context;

/* Memory for contexts, operators and workspaces. Both functions or neither; NULL is the C library.
 * alloc returns a block aligned to alignment (a power of two, at most 4096), or NULL.
 * free gets the size that alloc was asked for. */
typedef struct qkv_allocator {
    void *user;
    void *(*alloc)(void *user, size_t bytes, size_t alignment);
    void (*free)(void *user, void *ptr, size_t bytes);
} qkv_allocator;

/* The engine's own threads, for the CPU backend. run must call task(arg, i) once for each i in
 * [0, num_tasks), on any threads and in any order, one after another if it likes, and return when
 * all have returned. Tasks never wait for each other. run must not call anything of the library on
 * the same context: it would wait for itself. */
typedef struct qkv_parallel {
    void *user;
    void (*run)(void *user, int32_t num_tasks, void (*task)(void *arg, int32_t index), void *arg);
    int32_t num_threads; /* 1 .. 4096: how many tasks run at a time; without run not looked at */
    int32_t reserved;    /* 0 */
} qkv_parallel;

/* One line of text without its newline; called from any thread that calls the library, or that it
 * starts. Lines of QKV_VERBOSE=error do not come here but go to standard error: a call may fail
 * without a context. */
typedef void (*qkv_log_fn)(void *user, const char *line);

/* May kernels be compiled: an operator's with a variant on the CPU, all of a GPU's? */
enum {
    QKV_JIT_ALLOW = 0,  /* from the disk cache, or by the compiler */
    QKV_JIT_CACHED = 1, /* from the disk cache only */
    QKV_JIT_NEVER = 2,  /* neither: QKV_ERR_COMPILE */
    QKV_JIT_FILL = 3 /* GPUs of the architecture isa, of which there need be none here: warm-ups and
                           calls that compute compile what they need into the disk cache, for machines
                           with such a GPU and no compiler, and compute nothing; nothing can be created */
};

/* A compilation of a kernel begins (seconds < 0), or has ended after so many seconds. */
typedef void (*qkv_jit_progress_fn)(void *user, const char *kernel, double seconds);

typedef struct qkv_context_options {
    uint32_t struct_size;
    int32_t num_threads; /* CPU: 0 = all that this process may run on; ignored with parallel.run */
    DLDevice device;     /* {kDLCPU, 0}; a zeroed device means the same */
    const char *isa;     /* CPU: NULL = the fastest level; else "avx2", "avx512", "avx512_bf16",
                            "amx", "neon". QKV_DEVICE=cpu:LEVEL in the environment wins over it.
                            With QKV_JIT_FILL "sm_80", "sm_90a", "sm_100a", ...; else a GPU
                            says itself what it is */
    qkv_allocator allocator;
    qkv_parallel parallel;
    int32_t jit_policy;      /* QKV_JIT_... */
    int32_t batch_invariant; /* CUDA: 1 = qkv_gemm gives a row the same bits in any batch, as the
                                CPU always does; else the fastest kernel of each size runs */
    const char *cache_dir;   /* compiled variants; NULL = $QKV_CACHE_DIR, else qkv in the user's
                                 cache folder; "" = no cache. Read by create */
    const char *compiler;    /* NULL = $QKV_CC, else cc: the C compiler that variants go through */
    qkv_jit_progress_fn jit_progress; /* NULL, or told of each compilation; may be any thread */
    void *jit_user;
    qkv_log_fn log; /* verbose lines (QKV_VERBOSE=dispatch,plan,run or all); NULL = stderr */
    void *log_user;
} qkv_context_options;
#define QKV_CONTEXT_OPTIONS_INIT .struct_size = sizeof(qkv_context_options)

/*
 * qkv_context_create - open a device.
 *
 *   options  NULL: the CPU with all defaults
 *   out      set to the context, or to NULL on failure
 *
 * A context may be shared by threads; on the CPU one call computes at a time and others wait for
 * it. Objects made from it must be destroyed first. Starts num_threads - 1 threads unless
 * parallel.run is given; they sleep between calls, and block all signals but those of their own
 * faults.
 *
 * A context belongs to the process that created it. In a child of fork(), with whatever number of
 * threads, it and its objects can be destroyed; every call that computes, plans or creates is
 * INVALID there and says so. The child may create contexts of its own.
 *
 * Errors: INVALID (names the option: num_threads is not parallel.num_threads), UNSUPPORTED (device,
 * or an ISA level that this machine lacks), MEMORY, DEVICE (threads could not be started).
 */
QKV_API qkv_status qkv_context_create(const qkv_context_options *options, qkv_context **out);

/* NULL is fine. */
QKV_API void qkv_context_destroy(qkv_context *ctx);

/* "cpu:avx512": the device and the ISA level in use. Lives as long as the context. */
QKV_API const char *qkv_context_device_name(const qkv_context *ctx);

/* The compiler that kernels go through, "nvrtc 13.0"; "" where there is none. Lives as long as the
 * context. */
QKV_API const char *qkv_context_compiler(const qkv_context *ctx);

/* How many tasks run at a time; the default of max_workers. */
QKV_API int32_t qkv_context_num_threads(const qkv_context *ctx);

/* The i-th CPU level that this library was built with, best first, NULL past the end.
 * *usable (may be NULL) is set to 1 if this machine can run it, else to 0. */
QKV_API const char *qkv_cpu_level(int32_t i, int32_t *usable);

/* One row of a kernel table. */
typedef struct qkv_kernel_info {
    uint32_t struct_size;
    DLDeviceType device_type;
    const char *op;  /* "attention" */
    const char *row; /* "attention.d128" */
} qkv_kernel_info;

/* Calls visit for every row of every table, fastest first within an op. */
QKV_API void qkv_enumerate_kernels(void (*visit)(void *user, const qkv_kernel_info *info),
                                   void *user);

#ifdef __cplusplus
}
#endif
#endif
