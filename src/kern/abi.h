/* abi.h - fixed-width types and the task a kernel runs as; shared by host code and kernels.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_ABI_H
#define QI_KERN_ABI_H

#if defined(__CUDACC_RTC__) /* NVRTC has no headers */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;
#define _Static_assert static_assert

#else

#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;

#endif

/* Bytes of private memory that a CPU task may use as it likes; 64-byte aligned, never cleared. */
#define QI_TASK_SCRATCH_BYTES (5632 * 1024)

/* One of count equal tasks of a launch. count is at most the context's threads, so a kernel splits
 * its work by index / count. Tasks may run one after the other: none waits for one that may not have begun. */
typedef struct qi_task {
    i32 index, count;
    void *scratch; /* QI_TASK_SCRATCH_BYTES */
} qi_task;

/* The share [*begin, *end) of n items that falls to a task; shares are multiples of grain but the
 * last, and differ by at most one grain. */
static inline void qi_task_share(qi_task task, i64 n, i64 grain, i64 *begin, i64 *end)
{
    const i64 units = (n + grain - 1) / grain;
    const i64 first = units * task.index / task.count, last = units * (task.index + 1) / task.count;
    *begin = first * grain < n ? first * grain : n;
    *end = last * grain < n ? last * grain : n;
}

/* Element types, as kernels switch on them; the host gets them from qi_dtype_of(). */
typedef enum qi_dtype {
    QI_F32 = 0,
    QI_F16 = 1,
    QI_BF16 = 2,
    QI_E4M3 = 3,
    QI_E5M2 = 4,
    QI_I8 = 5,
    QI_U8 = 6,
    QI_I32 = 7,
    QI_I64 = 8,
    QI_U64 = 9,
    QI_NUM_DTYPES = 10
} qi_dtype;

#endif
