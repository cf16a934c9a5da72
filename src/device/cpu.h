/* cpu.h - the CPU device: its ISA levels and its threads.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_DEVICE_CPU_H
#define QI_DEVICE_CPU_H

#include "kern/abi.h"
#include "qkv/context.h"

/* The levels that each .cpu.c file is compiled for, best first. CMakeLists.txt has their flags. */
#if defined(__x86_64__)
#define QI_CPU_LEVELS(X) X(amx) X(avx512_bf16) X(avx512) X(avx2)
#elif defined(__aarch64__)
#define QI_CPU_LEVELS(X) X(neon)
#else
#error "qkv runs on x86-64 and AArch64"
#endif

enum {
#define X(level) QI_CPU_##level,
    QI_CPU_LEVELS(X)
#undef X
        QI_NUM_CPU_LEVELS
};

const char *qi_cpu_level_name(int level);

/* Can this machine (and its operating system) run the level? */
int qi_cpu_level_usable(int level);

/* The level by name, or for NULL the fastest usable one. UNSUPPORTED: names what is missing. */
qkv_status qi_cpu_find_level(const char *name, int *level);

typedef struct qi_threads qi_threads;

/* Starts count - 1 threads; count 0: as many as the process may run on. With parallel->run set,
 * starts none and uses the engine's. */
qkv_status qi_threads_create(int32_t count, const qkv_parallel *parallel,
                             const qkv_allocator *allocator, qi_threads **out);
void qi_threads_destroy(qi_threads *threads);
int32_t qi_threads_count(const qi_threads *threads);

/* 0 in a process that fork() made since they were created: there they can only be destroyed. */
int qi_threads_are_here(const qi_threads *threads);

/* Runs task(arg, {i, count, scratch i}) for i in [0, count) and returns when all have; count <=
 * qi_threads_count(). Callers on several threads take turns. */
void qi_parallel(qi_threads *threads, int32_t count, void (*task)(const void *arg, qi_task task),
                 const void *arg);

#endif
