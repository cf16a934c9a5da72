/* prelude.h - what every .cpu.c file includes first: types, inlining, entry names.
 * QI_LEVEL is set by the build to the ISA level that the file is compiled for.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CPU_PRELUDE_H
#define QI_KERN_CPU_PRELUDE_H

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "kern/abi.h"

#ifndef QI_LEVEL
#error "compile .cpu.c files with -DQI_LEVEL=<level>"
#endif

#define QI_JOIN_(a, b, c) a##b##_##c
#define QI_JOIN(a, b, c)  QI_JOIN_(a, b, c)
/* Defines a kernel's entry of this level: QI_CPU_KERNEL(rmsnorm) { ... params, task ... } */
#define QI_CPU_KERNEL(name)                                                                        \
    void QI_JOIN(qi_, name, QI_LEVEL)(const void *params, qi_task task);                           \
    void QI_JOIN(qi_, name, QI_LEVEL)(const void *params, qi_task task)

/* A function that must vanish into its caller, so that constant arguments specialise it. */
#define QI_INLINE static inline __attribute__((always_inline))

#define QI_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define QI_UNROLL(n) QI_PRAGMA(clang loop unroll_count(n))
#else
#define QI_UNROLL(n) QI_PRAGMA(GCC unroll n)
#endif

#define QI_LOG2E 1.44269504088896340736f

#endif
