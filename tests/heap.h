/* heap.h - memory that is counted, and faults at will: the n-th allocation of a thread fails, whether by
 * the context's allocator, by malloc and its kin, or of a thread or a memory file.
 *
 * For one file of a test: it replaces the C library's functions. A sanitizer has its own malloc, which
 * is left alone: then only the context's allocator and memory files count.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_HEAP_H
#define QKV_TESTS_HEAP_H

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

#include "attention_run.h"

/* ---- faults ------------------------------------------------------------------------------- */

static atomic_long heap_num_allocs; /* by malloc and its kin, on any thread */

/* This thread's, from heap_arm() on. */
static _Thread_local struct {
    bool armed;
    long num_points;   /* calls that might fail */
    long first, until; /* those that do: [first, until) */
    long num_live;     /* blocks by malloc and its kin, less those that were freed */
} heap_state;

static inline void heap_arm(long first, long until)
{
    heap_state.num_points = 0;
    heap_state.first = first;
    heap_state.until = until;
    heap_state.armed = true;
}

/* Has any call failed since heap_arm()? */
static inline bool heap_disarm(void)
{
    heap_state.armed = false;
    return heap_state.num_points >= heap_state.first;
}

static inline bool heap_fault(void)
{
    if (!heap_state.armed) return false;
    const long point = ++heap_state.num_points;
    return point >= heap_state.first && point < heap_state.until;
}

/* ---- the C library's ----------------------------------------------------------------------- */

/* The C library's function of this name; looking for it may allocate. */
static inline void *heap_real(const char *name)
{
    const bool armed = heap_state.armed;
    heap_state.armed = false;
    void *real = dlsym(RTLD_NEXT, name);
    heap_state.armed = armed;
    return real;
}

int memfd_create(const char *name, unsigned flags)
{
    if (heap_fault()) {
        errno = ENOMEM;
        return -1;
    }
    int (*real)(const char *, unsigned);
    *(void **)&real = heap_real("memfd_create");
    return real(name, flags);
}

#if defined(__GLIBC__) && !CASE_SANITIZED
#define HEAP_COUNTS_MALLOC 1
void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t n, size_t bytes);
void *__libc_realloc(void *p, size_t bytes);
void *__libc_memalign(size_t alignment, size_t bytes);
void __libc_free(void *p);

/* What p is for the counters, or NULL in want of memory. */
static void *heap_count(void *p)
{
    atomic_fetch_add_explicit(&heap_num_allocs, 1, memory_order_relaxed);
    if (p) heap_state.num_live++;
    return p;
}

static void *heap_none(void)
{
    errno = ENOMEM;
    return NULL;
}

void *malloc(size_t bytes)
{
    return heap_fault() ? heap_none() : heap_count(__libc_malloc(bytes));
}

void *calloc(size_t n, size_t bytes)
{
    return heap_fault() ? heap_none() : heap_count(__libc_calloc(n, bytes));
}

void *realloc(void *p, size_t bytes)
{
    if (heap_fault()) return heap_none();
    if (p) heap_state.num_live--;
    return heap_count(__libc_realloc(p, bytes));
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
    return heap_fault() ? heap_none() : heap_count(__libc_memalign(alignment, bytes));
}

int posix_memalign(void **p, size_t alignment, size_t bytes)
{
    *p = aligned_alloc(alignment, bytes);
    return *p ? 0 : ENOMEM;
}

void free(void *p)
{
    if (p) heap_state.num_live--;
    __libc_free(p);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*main)(void *), void *arg)
{
    if (heap_fault()) return EAGAIN;
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    *(void **)&real = heap_real("pthread_create");
    return real(thread, attr, main, arg);
}
#else
#define HEAP_COUNTS_MALLOC 0
#endif

/* ---- the context's allocator ---------------------------------------------------------------- */

enum { ACCOUNT_MAX_BLOCKS = 256 };

/* What it handed out. */
typedef struct account {
    pthread_mutex_t lock;
    long num_calls, num_blocks, num_wrong; /* wrong: freed with another size, or never had */
    size_t num_bytes;
    struct {
        void *p;
        size_t bytes;
    } blocks[ACCOUNT_MAX_BLOCKS];
} account;
#define ACCOUNT_INIT .lock = PTHREAD_MUTEX_INITIALIZER

static void *account_alloc(void *user, size_t bytes, size_t alignment)
{
    account *a = user;
    if (heap_fault()) return NULL;
    const bool armed = heap_state.armed;
    heap_state.armed = false;
    void *p = aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
    heap_state.armed = armed;
    if (!p) return NULL;
    memset(p, 0xff, bytes);
    pthread_mutex_lock(&a->lock);
    a->num_calls++;
    a->num_wrong += !alignment || (alignment & (alignment - 1)) || alignment > 4096;
    for (int i = 0; i < ACCOUNT_MAX_BLOCKS; i++) {
        if (a->blocks[i].p) continue;
        a->blocks[i].p = p;
        a->blocks[i].bytes = bytes;
        break;
    }
    a->num_blocks++;
    a->num_bytes += bytes;
    pthread_mutex_unlock(&a->lock);
    return p;
}

static void account_free(void *user, void *p, size_t bytes)
{
    account *a = user;
    bool found = false;
    pthread_mutex_lock(&a->lock);
    for (int i = 0; i < ACCOUNT_MAX_BLOCKS && !found; i++) {
        if (a->blocks[i].p != p) continue;
        found = a->blocks[i].bytes == bytes;
        a->blocks[i].p = NULL;
    }
    a->num_wrong += !found;
    a->num_blocks--;
    a->num_bytes -= bytes;
    pthread_mutex_unlock(&a->lock);
    free(p);
}

static inline qkv_allocator account_allocator(account *a)
{
    return (qkv_allocator){.user = a, .alloc = account_alloc, .free = account_free};
}

#endif
