/* memory.c - memory of the emulated GPU: host memory, which the host cannot touch between the driver's calls.
 * An allocation ends where a page begins that nobody may touch. Of the host's own it has what was pinned.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "driver.h"

enum { PAGE = 4096, ALIGNMENT = 256, POISON = 0xcb, POISON_BYTES = 32 << 20 };

typedef struct allocation {
    char *map, *base; /* base up to the end of map but a page */
    size_t map_bytes;
    bool managed; /* the host's, too */
} allocation;

static allocation *allocations;
static size_t count, room;
static int opened;

/* Host memory that was allocated or registered for the GPU. */
enum { MAX_PINNED = 256 };
static struct {
    const char *begin, *end;
} pinned[MAX_PINNED];
static int num_pinned;

static CUresult pin(const void *p, size_t bytes)
{
    if (num_pinned == MAX_PINNED) return OUT_OF_MEMORY;
    pinned[num_pinned].begin = p;
    pinned[num_pinned++].end = (const char *)p + bytes;
    return SUCCESS;
}

static CUresult unpin(const void *p)
{
    for (int i = 0; i < num_pinned; i++)
        if (pinned[i].begin == p) {
            pinned[i] = pinned[--num_pinned];
            return SUCCESS;
        }
    return INVALID_VALUE;
}

static void set_access(const allocation *a, int access)
{
    if (!a->managed && mprotect(a->map, a->map_bytes - PAGE, access) != 0) abort();
}

void memory_open(void)
{
    if (opened++ == 0)
        for (size_t i = 0; i < count; i++) set_access(&allocations[i], PROT_READ | PROT_WRITE);
}

void memory_close(void)
{
    if (--opened == 0)
        for (size_t i = 0; i < count; i++) set_access(&allocations[i], PROT_NONE);
}

static CUresult allocate(CUdeviceptr *out, size_t bytes, bool managed)
{
    if (bytes == 0) return INVALID_VALUE;
    const size_t used = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const size_t map_bytes = (used + PAGE - 1) / PAGE * PAGE + PAGE;
    if (count == room) {
        room = room ? 2 * room : 64;
        allocation *grown = realloc(allocations, room * sizeof *allocations);
        if (!grown) return OUT_OF_MEMORY;
        allocations = grown;
    }
    char *map = mmap(NULL, map_bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(map + map_bytes - PAGE, PAGE, PROT_NONE);
    const allocation a = {.map = map,
                          .base = map + map_bytes - PAGE - used,
                          .map_bytes = map_bytes,
                          .managed = managed};
    if (!managed) memset(a.base, POISON, used < POISON_BYTES ? used : POISON_BYTES);
    if (!opened) set_access(&a, PROT_NONE);
    allocations[count++] = a;
    *out = (CUdeviceptr)(uintptr_t)a.base;
    return SUCCESS;
}

static CUresult release(CUdeviceptr p)
{
    if (p == 0) return SUCCESS;
    for (size_t i = 0; i < count; i++)
        if ((CUdeviceptr)(uintptr_t)allocations[i].base == p) {
            munmap(allocations[i].map, allocations[i].map_bytes);
            allocations[i] = allocations[--count];
            return SUCCESS;
        }
    return INVALID_VALUE;
}

static bool is_within(const char *p, const char *begin, const char *end)
{
    return (uintptr_t)p >= (uintptr_t)begin &&
           (uintptr_t)p <= (uintptr_t)end; /* where it ends, too */
}

bool memory_is_unshared(const void *p)
{
    unsigned char resident;
    for (size_t i = 0; i < count; i++)
        if (is_within(p, allocations[i].map, allocations[i].map + allocations[i].map_bytes))
            return false;
    for (int i = 0; i < num_pinned; i++)
        if (is_within(p, pinned[i].begin, pinned[i].end)) return false;
    return mincore((void *)((uintptr_t)p / PAGE * PAGE), 1, &resident) == 0;
}

/* ---- entry points --------------------------------------------------------------------------- */

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t bytes)
{
    ENTER();
    const CUresult safe = stream_unsafe();
    LEAVE(safe == SUCCESS ? allocate(p, bytes, false) : safe);
}

EXPORT CUresult cuMemAllocManaged(CUdeviceptr *p, size_t bytes, unsigned flags)
{
    (void)flags;
    ENTER();
    const CUresult safe = stream_unsafe();
    LEAVE(safe == SUCCESS ? allocate(p, bytes, true) : safe);
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr p)
{
    ENTER();
    const CUresult safe = stream_unsafe();
    LEAVE(safe == SUCCESS ? release(p) : safe);
}

EXPORT CUresult cuMemHostAlloc(void **p, size_t bytes, unsigned flags)
{
    (void)flags;
    ENTER();
    const CUresult safe = stream_unsafe();
    if (safe != SUCCESS) LEAVE(safe);
    if (bytes == 0) LEAVE(INVALID_VALUE);
    *p = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
    if (!*p) LEAVE(OUT_OF_MEMORY);
    memset(*p, POISON, bytes);
    LEAVE(pin(*p, bytes));
}

EXPORT CUresult cuMemAllocHost_v2(void **p, size_t bytes)
{
    return cuMemHostAlloc(p, bytes, 0);
}

EXPORT CUresult cuMemFreeHost(void *p)
{
    ENTER();
    const CUresult safe = stream_unsafe();
    if (safe != SUCCESS || !p) LEAVE(safe);
    const CUresult result = unpin(p);
    if (result == SUCCESS) free(p);
    LEAVE(result);
}

EXPORT CUresult cuMemHostRegister_v2(void *p, size_t bytes, unsigned flags)
{
    (void)flags;
    ENTER();
    LEAVE(p && bytes ? pin(p, bytes) : INVALID_VALUE);
}

EXPORT CUresult cuMemHostUnregister(void *p)
{
    ENTER();
    LEAVE(unpin(p));
}

EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *device, void *p, unsigned flags)
{
    (void)flags;
    ENTER();
    *device = (CUdeviceptr)(uintptr_t)p;
    LEAVE(SUCCESS);
}

EXPORT CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
    ENTER();
    *free_bytes = (size_t)8 << 30;
    *total = (size_t)16 << 30;
    LEAVE(SUCCESS);
}

/* ---- copies --------------------------------------------------------------------------------- */

static CUresult copy_on(CUstream stream, void *to, const void *from, size_t bytes)
{
    return stream_do(stream, &(work){.kind = WORK_COPY, .to = to, .from = from, .bytes = bytes});
}

static void *at(CUdeviceptr p)
{
    return (void *)(uintptr_t)p;
}

EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    ENTER();
    LEAVE(copy_on(stream, at(to), at(from), bytes));
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes,
                                     CUstream stream)
{
    ENTER();
    LEAVE(copy_on(stream, at(to), from, bytes));
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    ENTER();
    LEAVE(copy_on(stream, to, at(from), bytes));
}

EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes,
                                     CUstream stream)
{
    ENTER();
    LEAVE(copy_on(stream, at(to), at(from), bytes));
}

/* Those without a stream wait. */
static CUresult copy_now(void *to, const void *from, size_t bytes)
{
    const CUresult safe = stream_unsafe();
    return safe == SUCCESS ? copy_on(NULL, to, from, bytes) : safe;
}

EXPORT CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes)
{
    ENTER();
    LEAVE(copy_now(at(to), at(from), bytes));
}

EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes)
{
    ENTER();
    LEAVE(copy_now(at(to), from, bytes));
}

EXPORT CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes)
{
    ENTER();
    LEAVE(copy_now(to, at(from), bytes));
}

EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes)
{
    ENTER();
    LEAVE(copy_now(at(to), at(from), bytes));
}

static CUresult fill_on(CUstream stream, CUdeviceptr to, unsigned value, unsigned size, size_t n)
{
    return stream_do(
        stream,
        &(work){.kind = WORK_FILL, .to = at(to), .value = value, .size = size, .bytes = n * size});
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t n, CUstream stream)
{
    ENTER();
    LEAVE(fill_on(stream, to, value, 1, n));
}

EXPORT CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t n, CUstream stream)
{
    ENTER();
    LEAVE(fill_on(stream, to, value, 2, n));
}

EXPORT CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t n, CUstream stream)
{
    ENTER();
    LEAVE(fill_on(stream, to, value, 4, n));
}

EXPORT CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t n)
{
    return cuMemsetD8Async(to, value, n, NULL);
}

EXPORT CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t n)
{
    return cuMemsetD32Async(to, value, n, NULL);
}
