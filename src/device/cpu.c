/* cpu.c - the CPU device: which ISA levels this machine has, and a persistent pool of threads.
 *
 * The pool publishes a job by bumping a generation counter. Idle threads poll it for a few tens of
 * microseconds, since a decode step is hundreds of launches back to back, and then sleep on a
 * condition variable. The caller takes part as task 0.
 * SPDX-License-Identifier: Apache-2.0 */
#include "device/cpu.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "base/log.h"
#include "base/status.h"
#include "base/thread.h"

/* ---- levels ------------------------------------------------------------------------------- */

static const char *const level_names[QI_NUM_CPU_LEVELS] = {
#define X(level) [QI_CPU_##level] = #level,
    QI_CPU_LEVELS(X)
#undef X
};

const char *qi_cpu_level_name(int level)
{
    return level_names[level];
}

#if defined(__x86_64__)
/* Has the CPU tiles of bf16, and may this process use them? Linux asks each process to request the
 * larger register state; all its threads then have it. */
static int amx_usable(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    const unsigned tile_and_bf16 = 1u << 24 | 1u << 22;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
    return (edx & tile_and_bf16) == tile_and_bf16 &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

int qi_cpu_level_usable(int level)
{
    /* These builtins also ask the operating system whether it saves the wide registers. */
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx512dq");
    const int bf16 = avx512 && __builtin_cpu_supports("avx512bf16") &&
                     __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
    switch (level) {
    case QI_CPU_amx: return bf16 && amx_usable();
    case QI_CPU_avx512_bf16: return bf16;
    case QI_CPU_avx512: return avx512;
    default: return avx2; /* F16C came before AVX2 on every CPU that has it */
    }
}
/* vdpbf16ps does twice the multiply-adds of an f32 FMA a cycle on AMD's cores, half on Intel's (228
 * against 431 GFLOP/s on 2 cores of a Sapphire Rapids): there widening to f32 is faster, and exact. */
static int level_pays(int level)
{
    return level != QI_CPU_avx512_bf16 || __builtin_cpu_is("amd");
}
#else
int qi_cpu_level_usable(int level)
{
    (void)level;
    return 1; /* NEON is part of the base architecture */
}

static int level_pays(int level)
{
    (void)level;
    return 1;
}
#endif

const char *qkv_cpu_level(int32_t i, int32_t *usable)
{
    if (i < 0 || i >= QI_NUM_CPU_LEVELS) return NULL;
    if (usable) *usable = qi_cpu_level_usable(i);
    return level_names[i];
}

qkv_status qi_cpu_find_level(const char *name, int *level)
{
    for (int i = 0; i < QI_NUM_CPU_LEVELS; i++) {
        if (name ? strcmp(name, level_names[i]) != 0 : !level_pays(i)) continue;
        if (qi_cpu_level_usable(i)) {
            *level = i;
            return QKV_OK;
        }
        if (name) QI_FAIL(QKV_ERR_UNSUPPORTED, "isa: this machine cannot run %s", name);
    }
    if (name) QI_FAIL(QKV_ERR_UNSUPPORTED, "isa: expected a level of this build, got %s", name);
    QI_FAIL(QKV_ERR_UNSUPPORTED, "device: expected a CPU with at least %s",
            level_names[QI_NUM_CPU_LEVELS - 1]);
}

/* ---- fork --------------------------------------------------------------------------------- */

/* fork() copies none of a pool's threads, and whatever lock another thread held stays locked. So a
 * pool remembers this count, and one of another count is not used. */
static _Atomic uint32_t num_forks; /* between this process and the first one */

static void count_fork(void)
{
    atomic_fetch_add_explicit(&num_forks, 1, memory_order_relaxed);
}

/* 0 when out of memory. Two threads may both come here first: then a fork counts twice. */
static int watch_forks(void)
{
    static atomic_int watched;
    if (!atomic_load(&watched)) {
        if (pthread_atfork(NULL, NULL, count_fork) != 0) return 0;
        atomic_store(&watched, 1);
    }
    return 1;
}

/* ---- threads ------------------------------------------------------------------------------ */

/* Nanoseconds that an idle thread polls for the next launch before it sleeps. */
#define POLL_NS 50000

#define MAX_THREADS 4096

typedef struct launch {
    void (*task)(const void *arg, qi_task task);
    const void *arg;
    int32_t count;
} launch;

struct qi_threads {
    int32_t count;         /* including the caller */
    int32_t num_started;   /* pool threads */
    uint32_t num_forks;    /* when they were */
    qkv_parallel parallel; /* run NULL: the pool */
    qkv_allocator allocator;
    char *scratch;        /* [count][QI_TASK_SCRATCH_BYTES] */
    pthread_mutex_t turn; /* held for a whole launch */
    pthread_mutex_t lock; /* guards sleep and wake */
    pthread_cond_t wake;
    launch job;                  /* written by the caller before generation moves */
    _Atomic uint32_t generation; /* counts launches */
    _Atomic int32_t running;     /* pool threads that have not finished the launch */
    _Atomic int32_t sleeping;
    _Atomic int32_t stop;
    pthread_t *thread; /* [count - 1] */
};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield");
#endif
}

static qi_task make_task(const qi_threads *threads, int32_t index, int32_t count)
{
    return (qi_task){.index = index,
                     .count = count,
                     .scratch = threads->scratch + (size_t)index * QI_TASK_SCRATCH_BYTES};
}

/* Polls, then sleeps, until generation differs from seen. */
static uint32_t wait_for_job(qi_threads *threads, uint32_t seen)
{
    uint32_t now = atomic_load_explicit(&threads->generation, memory_order_acquire);
    const int64_t give_up = now == seen ? qi_now_ns() + POLL_NS : 0;
    for (int i = 0; now == seen; i++) {
        if (i % 64 == 63 && qi_now_ns() > give_up) break;
        relax();
        now = atomic_load_explicit(&threads->generation, memory_order_acquire);
    }
    if (now != seen) return now;

    /* The caller bumps generation before it reads sleeping, we do it the other way round, and both
     * in sequential order: one of us sees the other. */
    pthread_mutex_lock(&threads->lock);
    atomic_fetch_add(&threads->sleeping, 1);
    while ((now = atomic_load(&threads->generation)) == seen)
        pthread_cond_wait(&threads->wake, &threads->lock);
    atomic_fetch_sub(&threads->sleeping, 1);
    pthread_mutex_unlock(&threads->lock);
    return now;
}

typedef struct thread_start {
    qi_threads *threads;
    int32_t index;
} thread_start;

static void *thread_main(void *arg)
{
    const thread_start start = *(thread_start *)arg;
    qi_threads *threads = start.threads;
    atomic_fetch_sub(&threads->running, 1); /* start has been read */
    uint32_t seen = 0;
    for (;;) {
        seen = wait_for_job(threads, seen);
        if (atomic_load_explicit(&threads->stop, memory_order_relaxed)) return NULL;
        const launch *job = &threads->job;
        if (start.index < job->count)
            job->task(job->arg, make_task(threads, start.index, job->count));
        atomic_fetch_sub_explicit(&threads->running, 1, memory_order_release);
    }
}

static void wait_for_threads(qi_threads *threads)
{
    /* Tasks are equal shares, so the wait is short; on an oversubscribed machine let others run. */
    for (int i = 0; atomic_load_explicit(&threads->running, memory_order_acquire) > 0; i++) {
        if (i < 4096)
            relax();
        else
            sched_yield();
    }
}

static void publish(qi_threads *threads)
{
    atomic_store_explicit(&threads->running, threads->num_started, memory_order_relaxed);
    atomic_fetch_add(&threads->generation, 1);
    if (atomic_load(&threads->sleeping) > 0) {
        pthread_mutex_lock(&threads->lock);
        pthread_cond_broadcast(&threads->wake);
        pthread_mutex_unlock(&threads->lock);
    }
}

/* CPUs that this thread may run on, 0 when out of memory. The kernel refuses a set that is smaller
 * than its own. */
static int32_t available_cpus(void)
{
    int n = 0;
    for (int size = CPU_SETSIZE; n == 0 && size <= 1 << 20; size *= 2) {
        cpu_set_t *set = CPU_ALLOC((size_t)size);
        if (!set) return 0;
        const size_t bytes = CPU_ALLOC_SIZE((size_t)size);
        if (sched_getaffinity(0, bytes, set) == 0) n = CPU_COUNT_S(bytes, set);
        CPU_FREE(set);
    }
    return n < 1 ? 1 : n < MAX_THREADS ? n : MAX_THREADS;
}

/* Starts the pool's threads. */
static qkv_status start_threads(qi_threads *threads)
{
    for (; threads->num_started < threads->count - 1; threads->num_started++) {
        thread_start start = {.threads = threads, .index = threads->num_started + 1};
        atomic_store(&threads->running, 1);
        if (qi_thread_start(&threads->thread[threads->num_started], thread_main, &start))
            QI_FAIL(QKV_ERR_DEVICE, "num_threads: expected to start %d threads, got %d",
                    (int)threads->count - 1, (int)threads->num_started);
        wait_for_threads(threads);
    }
    return QKV_OK;
}

qkv_status qi_threads_create(int32_t count, const qkv_parallel *parallel,
                             const qkv_allocator *allocator, qi_threads **out)
{
    qkv_status status;
    *out = NULL;
    if (parallel->run)
        count = parallel->num_threads;
    else if (count == 0 && (count = available_cpus()) == 0)
        QI_FAIL(QKV_ERR_MEMORY, "context: out of memory");
    QI_REQUIRE(count > 0 && count <= MAX_THREADS, "%snum_threads: expected 1 to %d, got %d",
               parallel->run ? "parallel." : "", MAX_THREADS, (int)count);

    qi_threads *threads = allocator->alloc(allocator->user, sizeof *threads, 64);
    if (!threads || !watch_forks()) {
        if (threads) allocator->free(allocator->user, threads, sizeof *threads);
        QI_FAIL(QKV_ERR_MEMORY, "context: out of memory for the threads");
    }
    memset(threads, 0, sizeof *threads);
    threads->count = count;
    threads->num_forks = atomic_load_explicit(&num_forks, memory_order_relaxed);
    threads->parallel = *parallel;
    threads->allocator = *allocator;
    pthread_mutex_init(&threads->turn, NULL);
    pthread_mutex_init(&threads->lock, NULL);
    pthread_cond_init(&threads->wake, NULL);
    const size_t scratch_bytes = (size_t)count * QI_TASK_SCRATCH_BYTES;
    const size_t thread_bytes = (size_t)count * sizeof *threads->thread;
    threads->scratch = allocator->alloc(allocator->user, scratch_bytes, 4096);
    threads->thread = allocator->alloc(allocator->user, thread_bytes, 64);
    if (!threads->scratch || !threads->thread) {
        status = qi_fail(QKV_ERR_MEMORY, __FILE__, __LINE__,
                         "context: out of memory for the scratch of %d threads", (int)count);
        goto fail;
    }
    if (!parallel->run) QI_TRY_OR(start_threads(threads), fail);
    *out = threads;
    return QKV_OK;

fail:
    qi_threads_destroy(threads);
    return status;
}

void qi_threads_destroy(qi_threads *threads)
{
    if (!threads) return;
    if (qi_threads_are_here(threads)) { /* else there is nobody to wait for */
        atomic_store(&threads->stop, 1);
        if (threads->num_started > 0) publish(threads);
        for (int32_t i = 0; i < threads->num_started; i++) pthread_join(threads->thread[i], NULL);
        pthread_cond_destroy(&threads->wake);
        pthread_mutex_destroy(&threads->lock);
        pthread_mutex_destroy(&threads->turn);
    }
    const qkv_allocator a = threads->allocator;
    const size_t count = (size_t)threads->count;
    if (threads->thread) a.free(a.user, threads->thread, count * sizeof *threads->thread);
    if (threads->scratch) a.free(a.user, threads->scratch, count * QI_TASK_SCRATCH_BYTES);
    a.free(a.user, threads, sizeof *threads);
}

int32_t qi_threads_count(const qi_threads *threads)
{
    return threads->count;
}

int qi_threads_are_here(const qi_threads *threads)
{
    return threads->num_forks == atomic_load_explicit(&num_forks, memory_order_relaxed);
}

/* The engine's threads call this for each index. */
static void run_index(void *arg, int32_t index)
{
    qi_threads *threads = arg;
    threads->job.task(threads->job.arg, make_task(threads, index, threads->job.count));
}

void qi_parallel(qi_threads *threads, int32_t count, void (*task)(const void *arg, qi_task task),
                 const void *arg)
{
    pthread_mutex_lock(&threads->turn);
    if (count == 1) {
        task(arg, make_task(threads, 0, 1));
    } else {
        threads->job = (launch){.task = task, .arg = arg, .count = count};
        if (threads->parallel.run) {
            threads->parallel.run(threads->parallel.user, count, run_index, threads);
        } else {
            publish(threads);
            task(arg, make_task(threads, 0, count));
            wait_for_threads(threads);
        }
    }
    pthread_mutex_unlock(&threads->turn);
}
