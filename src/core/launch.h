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

/* One row of a kernel table. Rows stand fastest first, the reference row last; a table ends with an
 * all-zero row. reject() returns NULL, or why the row does not take what desc describes. */
typedef struct qi_kernel {
    const char *name;
    DLDeviceType device;
    const char *(*reject)(const void *desc); /* NULL: takes everything */
    qi_cpu_kernel cpu[QI_NUM_CPU_LEVELS];
} qi_kernel;

/* Declares qi_NAME_<level> for every level, and lists them for a table row. In the params header:
 * QI_CPU_DECLARE(rmsnorm); in the table: {"rmsnorm.any", kDLCPU, NULL, QI_CPU_ENTRIES(rmsnorm)}.
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

/* The first row that runs on the context's device and does not reject desc (NULL where no row of
 * the table looks at it). UNSUPPORTED with every row's reason. Under QKV_VERBOSE=dispatch logs
 * each. */
qkv_status qi_select(const qkv_context *ctx, const qi_kernel *table, const void *desc,
                     const qi_kernel **row);

/* Runs a row: on the CPU as min(max_tasks, threads) tasks, done on return. max_tasks >= 1. */
void qi_launch(const qkv_context *ctx, const qi_kernel *row, int64_t max_tasks, const void *params);

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

/* What every call that computes or creates asks first: is there a context, and of this process? */
qkv_status qi_check_context(const qkv_context *ctx);
#define QI_REQUIRE_CONTEXT(ctx) QI_TRY(qi_check_context(ctx))

#endif
