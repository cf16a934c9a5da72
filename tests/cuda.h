/* cuda.h - tests on a GPU: QKV_TEST_DEVICE=cuda runs them on the first one, in place of the CPU's levels.
 * Tensors stay where the tests put them, on the stack, in variables and on the heap, all of which is pinned
 * and shared with the GPU; what the library itself allocates is the GPU's.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_CUDA_H
#define QKV_TESTS_CUDA_H

#include <alloca.h>
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <dlpack/dlpack.h>

static inline bool test_on_cuda(void)
{
    static int on = -1;
    if (on < 0) {
        const char *device = getenv("QKV_TEST_DEVICE");
        on = device && strcmp(device, "cuda") == 0;
    }
    return on == 1;
}

/* Of every tensor. */
static inline DLDevice test_device(void)
{
    return (DLDevice){test_on_cuda() ? kDLCUDAHost : kDLCPU, 0};
}

static inline void *test_driver(const char *symbol)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    void *function = driver ? dlsym(driver, symbol) : NULL;
    if (function) return function;
    printf("QKV_TEST_DEVICE=cuda: no %s\n", symbol);
    exit(1);
}

/* Whether the GPU is tests/emulator's, which is slow. */
static inline bool test_is_emulated(void)
{
    void *driver = test_on_cuda() ? dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) : NULL;
    return driver && dlsym(driver, "emulator_is_here");
}

/* Makes memory of this process the GPU's too, at the same address. */
static inline void test_share(const char *what, const void *begin, const void *end)
{
    enum { PAGE = 4096, PORTABLE = 1, MAPPED = 2 };
    int (*host_register)(void *, size_t, unsigned);
    *(void **)&host_register = test_driver("cuMemHostRegister_v2");
    const uintptr_t first = (uintptr_t)begin / PAGE * PAGE;
    const uintptr_t past = ((uintptr_t)end + PAGE - 1) / PAGE * PAGE;
    const int result = host_register((void *)first, past - first, PORTABLE | MAPPED);
    if (result == 0) return;
    printf("QKV_TEST_DEVICE=cuda: %s (%p to %p) cannot be shared with the GPU: error %d\n", what,
           begin, end, result);
    exit(1);
}

/* Where the heap begins. */
static inline void *test_heap(void)
{
    char line[512];
    unsigned long begin = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (maps && fgets(line, sizeof line, maps))
        if (strstr(line, "[heap]")) begin = strtoul(line, NULL, 16);
    if (maps) fclose(maps);
    return (void *)begin;
}

extern char __data_start, _end; /* by the linker: variables outside of functions */

/* Makes the first GPU's primary context current on this thread, and shares with it this thread's stack,
 * all variables, and a heap that malloc will not leave. Call first in main(). */
static inline void test_cuda_open(void)
{
    enum { HEAP = 1 << 30, STACK = 4 << 20 };
    static bool open;
    int (*init)(unsigned), (*retain)(void **, int), (*set)(void *);
    if (open) return;
    open = true;
    *(void **)&init = test_driver("cuInit");
    *(void **)&retain = test_driver("cuDevicePrimaryCtxRetain");
    *(void **)&set = test_driver("cuCtxSetCurrent");
    void *context = NULL;
    if (init(0) != 0 || retain(&context, 0) != 0 || set(context) != 0) {
        printf("QKV_TEST_DEVICE=cuda: no GPU\n");
        exit(1);
    }
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_TRIM_THRESHOLD, HEAP);
    mallopt(M_TOP_PAD, HEAP);
    void *volatile grown = malloc(1 << 20); /* more than the heap has left: it grows by HEAP */
    free(grown);
    mallopt(M_TOP_PAD, 0);
    test_share("heap", test_heap(), sbrk(0));
    char *stack = alloca(STACK);
    memset(stack, 0, STACK);
    pthread_attr_t attributes;
    void *lowest;
    size_t bytes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &lowest, &bytes);
    pthread_attr_destroy(&attributes);
    test_share("stack", stack, (char *)lowest + bytes);
    test_share("variables", &__data_start, &_end);
}

/* Address space that takes memory only where it is touched, zeros, here and on the GPU; NULL: refused. */
static inline void *test_map(size_t bytes)
{
    if (!test_on_cuda()) {
        void *block = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return block == MAP_FAILED ? NULL : block;
    }
    enum { GLOBAL = 1 };
    int (*alloc)(uint64_t *, size_t, unsigned);
    *(void **)&alloc = test_driver("cuMemAllocManaged");
    uint64_t block = 0;
    if (bytes > (size_t)32 << 30 || alloc(&block, bytes, GLOBAL) != 0) return NULL;
    return (void *)(uintptr_t)block;
}

static inline void test_unmap(void *block, size_t bytes)
{
    int (*free_memory)(uint64_t);
    if (!test_on_cuda()) {
        munmap(block, bytes);
        return;
    }
    *(void **)&free_memory = test_driver("cuMemFree_v2");
    free_memory((uint64_t)(uintptr_t)block);
}

/* Waits for all that was enqueued; the error that a kernel ended with, 0: none. */
static inline int test_synchronize(void)
{
    static int (*synchronize)(void);
    if (!test_on_cuda()) return 0;
    if (!synchronize) *(void **)&synchronize = test_driver("cuCtxSynchronize");
    return synchronize();
}

#endif
