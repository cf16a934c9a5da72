/* launch.h - kernel tables: what an operator's host side needs to choose and run a kernel.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_CORE_LAUNCH_H
#define QI_CORE_LAUNCH_H

#include "base/dtype.h"
#include "base/log.h"
#include "base/status.h"
#include "base/tensor.h"
#include "core/context.h"

/* A CPU kernel does its share of the launch: params is the op's params struct. */
typedef void (*qi_cpu_kernel)(const void *params, qi_task task);

/* A GPU kernel: compiled by NVRTC for each device and set of constants that it is launched with. */
typedef struct qi_cuda_kernel {
    const char *file;      /* below src/ */
    const char *entry;     /* its name there */
    const char *constants; /* names, by spaces, of the defines that a launch gives values for */
} qi_cuda_kernel;

/* One row of a kernel table. Rows stand fastest first, the reference row last; a table ends with an
 * all-zero row. reject() returns NULL, or why the row does not take what desc describes. */
typedef struct qi_kernel {
    const char *name;
    DLDeviceType device;
    const char *(*reject)(const void *desc); /* NULL: takes everything */
    qi_cpu_kernel cpu[QI_NUM_CPU_LEVELS];
    qi_cuda_kernel cuda;
} qi_kernel;

/* Declares qi_NAME_<level> for every level, and lists them for a table row. In the params header:
 * QI_CPU_DECLARE(rmsnorm); in the table: QI_CPU_ROW("rmsnorm.any", NULL, rmsnorm).
 * The .cpu.c file defines them through QI_CPU_KERNEL(rmsnorm) of kern/cpu/prelude.h. */
#if defined(__x86_64__)
#define QI_CPU_DECLARE(name)                                                                       \
    void qi_##name##_amx(const void *params, qi_task task);                                        \
    void qi_##name##_avx512_bf16(const void *params, qi_task task);                                \
    void qi_##name##_avx512(const void *params, qi_task task);                                     \
    void qi_##name##_avx2(const void *params, qi_task task)
#define QI_CPU_ENTRIES(name)                                                                       \
    {                                                                                              \
        qi_##name##_amx, qi_##name##_avx512_bf16, qi_##name##_avx512, qi_##name##_avx2             \
    }
#else
#define QI_CPU_DECLARE(name) void qi_##name##_neon(const void *params, qi_task task)
#define QI_CPU_ENTRIES(name)                                                                       \
    {                                                                                              \
        qi_##name##_neon                                                                           \
    }
#endif

/* A row of a table: its name, why it declines, and the CPU kernel, or file, entry and constants of a GPU's.
 */
#define QI_CPU_ROW(row, why, kernel)                                                               \
    {                                                                                              \
        .name = (row), .device = kDLCPU, .reject = (why), .cpu = QI_CPU_ENTRIES(kernel)            \
    }
#define QI_CUDA_ROW(row, why, path, function, names)                                               \
    {                                                                                              \
        .name = (row), .device = kDLCUDA, .reject = (why), .cuda = {(path), (function), (names) }  \
    }

/* A row that the host side runs by a library of the device, which has no kernel here. */
#define QI_LIBRARY_ROW(row, why)                                                                   \
    {                                                                                              \
        .name = (row), .device = kDLCUDA, .reject = (why)                                          \
    }

/* The first row that runs on the context's device and does not reject desc (NULL where no row of
 * the table looks at it). UNSUPPORTED with every row's reason. Under QKV_VERBOSE=dispatch logs
 * each. */
qkv_status qi_select(const qkv_context *ctx, const qi_kernel *table, const void *desc,
                     const qi_kernel **row);

/* Runs a row: on the CPU as min(max_tasks, threads) tasks, done on return. max_tasks >= 1. */
void qi_launch(const qkv_context *ctx, const qi_kernel *row, int64_t max_tasks, const void *params);

/* The same on a GPU: finds or makes the kernel of these constants, in the order of the row's names, and
 * enqueues one launch. The first launch of a kernel compiles or loads it: COMPILE, see jit/jit.h. */
qkv_status qi_launch_cuda(const qkv_context *ctx, const qi_kernel *row, const i32 *constants,
                          const qi_grid *grid, const void *params, void *stream);

/* The kernel itself, among functions of the caller's, compiled with a user's text as "qi_variant.h". NULL where
 * contexts only compile (QKV_JIT_FILL). */
qkv_status qi_find_cuda_text(const qkv_context *ctx, qi_functions *functions, const char *header,
                             const qi_kernel *row, const i32 *constants, cu_function *out);

/* The most elements of one access of a GPU kernel: the largest power of two, up to `most`, that every
 * number is a multiple of. Numbers are sizes and strides in elements, and addresses by QI_ADDRESS. */
static inline i32 qi_common_vector(i32 most, int count, const i64 *numbers)
{
    i64 bits = most; /* the lowest one of any number says what divides all */
    for (int i = 0; i < count; i++) bits |= numbers[i];
    return (i32)(bits & -bits);
}
#define QI_VECTOR(most, ...)                                                                       \
    qi_common_vector((most), (int)(sizeof((const i64[]){__VA_ARGS__}) / sizeof(i64)),              \
                     (const i64[]){__VA_ARGS__})
#define QI_ADDRESS(pointer, dtype)                                                                 \
    ((i64)((uintptr_t)(pointer) >> __builtin_ctz((unsigned)qi_dtype_bytes(dtype))))

/* A row's launch in as many blocks as it takes, of which each covers so many items. */
static inline u32 qi_blocks(i64 items, i64 per_block)
{
    return (u32)((items + per_block - 1) / per_block);
}

/* Row i of all tables, fastest first within an op; NULL past the last. In ops/tables.c. */
const qi_kernel *qi_kernel_row(int i, const char **op);

/* The #define lines of a GPU kernel's constants. */
void qi_write_defines(const qi_cuda_kernel *k, const i32 *constants, char *text, size_t bytes);

/* A kernel file to compile again with a user's text. */
typedef struct qi_source {
    const char *what;    /* "variant alibi": for messages */
    const char *main;    /* the file, below src/ */
    const char *defines; /* #define lines in front of it */
    const char *header;  /* text of "qi_variant.h", which the file includes under QI_VARIANT */
} qi_source;

/* Compiles for the context's device and level, or finds it done: out[i] is the kernel that the file
 * defines as QI_CPU_KERNEL(names[i]). COMPILE: see jit/jit.h. */
qkv_status qi_compile(const qkv_context *ctx, const qi_source *source, const char *const *names,
                      int num_names, qi_cpu_kernel *out);

/* The same on a GPU: out[i] is the kernel names[i], loaded onto the context's device; NULL where contexts
 * only compile (QKV_JIT_FILL). */
qkv_status qi_compile_cuda(const qkv_context *ctx, const qi_source *source,
                           const char *const *names, int num_names, cu_function *out);

/* How many tasks are worth waking for work of this many elementary operations (bytes moved, or
 * multiply-adds over 8): one for what a thread does in the time that waking takes. */
static inline int64_t qi_tasks_for(int64_t work)
{
    return work < 32768 ? 1 : work / 16384;
}

/* Is an output of so many bytes stored past the caches? Then it is larger than several L2 caches, and
 * whoever reads it next would hardly find it there. */
static inline int qi_streams(int64_t bytes)
{
    return bytes >= 8 << 20;
}

/* What every call that computes or creates asks first: is there a context, and of this process? From here
 * on tensors of this thread are expected on its device. */
qkv_status qi_check_context(const qkv_context *ctx);
#define QI_REQUIRE_CONTEXT(ctx) QI_TRY(qi_check_context(ctx))

#endif
