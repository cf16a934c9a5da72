/* ceilings.c - measures the machine: threads of its own, pinned, that start each pass together.
 *
 * The loops for instruction sets beyond the compiler's base are functions of their own with target
 * attributes.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ceilings.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "data.h"
#include "tool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum {
    PASSES = 75,      /* an odd number has a median                                                */
    CHUNK = 16 << 20, /* bytes of a pass over memory: as short as the calls that are benched, since
                         busy neighbours hit long passes more                                      */
    STEPS = 100000,   /* of a pass over registers                                                  */
    CHAINS = 12,      /* independent sums: more than latency x units of any core here              */
};

/* One thread's share of a pass: bytes of memory, or steps of CHAINS vector operations. Returns
 * something that depends on all of it. */
typedef struct share {
    char *to;
    const char *from;
    size_t bytes; /* a multiple of 1024 */
    int64_t steps;
} share;
typedef double (*loop)(const share *s);

/* ---- loops over memory ------------------------------------------------------------------------ */

#if defined(__x86_64__)
__attribute__((target("avx2"))) static double read_memory(const share *s)
{
    __m256i sum[8];
    for (int j = 0; j < 8; j++) sum[j] = _mm256_setzero_si256();
    for (const char *p = s->from, *end = p + s->bytes; p < end; p += 256)
        for (int j = 0; j < 8; j++)
            sum[j] = _mm256_or_si256(sum[j], _mm256_load_si256((const __m256i *)(const void *)p + j));
    for (int j = 1; j < 8; j++) sum[0] = _mm256_or_si256(sum[0], sum[j]);
    return (double)_mm256_movemask_epi8(sum[0]);
}

__attribute__((target("avx2"))) static double read_ahead(const share *s)
{
    __m256i sum[8];
    for (int j = 0; j < 8; j++) sum[j] = _mm256_setzero_si256();
    for (const char *p = s->from, *end = p + s->bytes; p < end; p += 256) {
        for (int j = 0; j < 4; j++) _mm_prefetch(p + 4096 + j * 64, _MM_HINT_T0);
        for (int j = 0; j < 8; j++)
            sum[j] = _mm256_or_si256(sum[j], _mm256_load_si256((const __m256i *)(const void *)p + j));
    }
    for (int j = 1; j < 8; j++) sum[0] = _mm256_or_si256(sum[0], sum[j]);
    return (double)_mm256_movemask_epi8(sum[0]);
}

__attribute__((target("avx2"))) static double copy_streaming(const share *s)
{
    __m256i *to = (__m256i *)(void *)s->to;
    const __m256i *from = (const __m256i *)(const void *)s->from;
    for (size_t i = 0; i < s->bytes / sizeof *to; i++)
        _mm256_stream_si256(to + i, _mm256_load_si256(from + i));
    _mm_sfence();
    return (double)s->to[0];
}
#else
static double read_memory(const share *s)
{
    uint64_t sum[16] = {0};
    for (size_t i = 0; i < s->bytes; i += sizeof sum) {
        uint64_t word[16];
        memcpy(word, s->from + i, sizeof word);
        for (int j = 0; j < 16; j++) sum[j] |= word[j];
    }
    for (int j = 1; j < 16; j++) sum[0] |= sum[j];
    return (double)sum[0];
}
#endif

static double copy_plain(const share *s)
{
    memcpy(s->to, s->from, s->bytes);
    return (double)s->to[s->bytes - 1];
}

/* ---- loops over registers --------------------------------------------------------------------- */

/* x[j] = x[j] * a + b, with a and b such that x stays a normal number. */
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static double fma_256(const share *s)
{
    const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
    __m256 x[CHAINS];
    for (int j = 0; j < CHAINS; j++) x[j] = _mm256_set1_ps((float)j);
    for (int64_t i = 0; i < s->steps; i++)
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) x[j] = _mm256_fmadd_ps(x[j], a, b);
    for (int j = 1; j < CHAINS; j++) x[0] = _mm256_add_ps(x[0], x[j]);
    return (double)_mm256_cvtss_f32(x[0]);
}

__attribute__((target("avx512f"))) static double fma_512(const share *s)
{
    const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
    __m512 x[CHAINS];
    for (int j = 0; j < CHAINS; j++) x[j] = _mm512_set1_ps((float)j);
    for (int64_t i = 0; i < s->steps; i++)
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) x[j] = _mm512_fmadd_ps(x[j], a, b);
    for (int j = 1; j < CHAINS; j++) x[0] = _mm512_add_ps(x[0], x[j]);
    return (double)_mm512_cvtss_f32(x[0]);
}

__attribute__((target("avx512f,avx512bf16"))) static double dot_512(const share *s)
{
    const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80); /* pairs of 1 */
    __m512 x[CHAINS];
    for (int j = 0; j < CHAINS; j++) x[j] = _mm512_set1_ps((float)j);
    for (int64_t i = 0; i < s->steps; i++)
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) x[j] = _mm512_dpbf16_ps(x[j], a, a);
    for (int j = 1; j < CHAINS; j++) x[0] = _mm512_add_ps(x[0], x[j]);
    return (double)_mm512_cvtss_f32(x[0]);
}
#else
static double fma_128(const share *s)
{
    const float32x4_t a = vdupq_n_f32(0.999f), b = vdupq_n_f32(0.001f);
    float32x4_t x[2 * CHAINS];
    for (int j = 0; j < 2 * CHAINS; j++) x[j] = vdupq_n_f32((float)j);
    for (int64_t i = 0; i < s->steps; i++)
#pragma GCC unroll 24
        for (int j = 0; j < 2 * CHAINS; j++) x[j] = vfmaq_f32(b, x[j], a);
    for (int j = 1; j < 2 * CHAINS; j++) x[0] = vaddq_f32(x[0], x[j]);
    return (double)vgetq_lane_f32(x[0], 0);
}
#endif

/* What there is to try for each ceiling; the fastest usable one counts. level: the ISA level that it
 * needs, NULL for any. work: flops a step, or bytes counted a byte of a share. */
static const struct {
    ceiling what;
    const char *level, *name;
    loop run;
    double work;
} variants[] = {
#if defined(__x86_64__)
    {CEILING_READ, NULL, "dram_read", read_memory, 1},
    {CEILING_READ, NULL, "dram_read", read_ahead, 1},
    {CEILING_COPY, NULL, "dram_copy", copy_plain, 2},
    {CEILING_COPY, NULL, "dram_copy", copy_streaming, 2},
    {CEILING_FMA, "avx2", "fma_avx2", fma_256, CHAINS * 16.0},
    {CEILING_FMA, "avx512", "fma_avx512", fma_512, CHAINS * 32.0},
    {CEILING_DOT, "avx512_bf16", "bf16_dot_avx512", dot_512, CHAINS * 64.0},
#else
    {CEILING_READ, NULL, "dram_read", read_memory, 1},
    {CEILING_COPY, NULL, "dram_copy", copy_plain, 2},
    {CEILING_FMA, "neon", "fma_neon", fma_128, CHAINS * 16.0},
#endif
};

/* ---- threads ---------------------------------------------------------------------------------- */

struct ceilings {
    int32_t num_threads;
    const char *isa;
    char *memory;       /* [memory_bytes] */
    size_t memory_bytes;
};

/* One measurement. */
typedef struct race {
    loop run;
    bool copies;
    int32_t num_threads;
    atomic_int arrived; /* threads that came to the start of a pass, all passes together */
} race;

typedef struct runner {
    race *r;
    const ceilings *c;
    int32_t index;
    double start[PASSES], end[PASSES], sink;
} runner;

/* The index-th CPU that the process may run on; left to the system when there are fewer. */
static void pin(int32_t index)
{
    cpu_set_t allowed, one;
    CPU_ZERO(&allowed);
    CPU_ZERO(&one);
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || index >= CPU_COUNT(&allowed)) return;
    for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &allowed) || index-- > 0) continue;
        CPU_SET(cpu, &one);
        pthread_setaffinity_np(pthread_self(), sizeof one, &one); /* a wish: failing costs nothing */
        return;
    }
}

/* Polls until all threads have come, so that a pass of a millisecond starts on all at once. */
static void meet(race *r, int pass)
{
    atomic_fetch_add(&r->arrived, 1);
    for (int i = 0; atomic_load(&r->arrived) < (pass + 1) * r->num_threads; i++)
        if (i > 10000) sched_yield(); /* more threads than CPUs, or busy neighbours */
}

/* A thread's part of a pass: of each CHUNK of the memory, in turn. */
static share part_of(const runner *me, int pass)
{
    const size_t room = me->r->copies ? me->c->memory_bytes / 2 : me->c->memory_bytes;
    const size_t part = CHUNK / (size_t)me->r->num_threads & ~(size_t)1023;
    const size_t chunk = (size_t)pass % (room / CHUNK);
    char *from = me->c->memory + chunk * CHUNK + (size_t)me->index * part;
    return (share){.from = from, .to = from + room, .bytes = part, .steps = STEPS};
}

static void *run_passes(void *arg)
{
    runner *me = arg;
    pin(me->index);
    for (int i = 0; i < PASSES; i++) {
        const share s = part_of(me, i);
        meet(me->r, i);
        me->start[i] = tool_seconds();
        me->sink += me->r->run(&s);
        me->end[i] = tool_seconds();
    }
    return NULL;
}

/* Runs a loop on all threads. seconds: of the passes, from the first thread's start to the last one's
 * end, ascending. */
static void run_race(const ceilings *c, race *r, double seconds[PASSES])
{
    const int32_t n = r->num_threads;
    pthread_t *threads = calloc((size_t)n, sizeof *threads);
    runner *runners = calloc((size_t)n, sizeof *runners);
    if (!threads || !runners) tool_die(EXIT_WRONG, "out of memory");
    for (int32_t i = 0; i < n; i++) {
        runners[i] = (runner){.r = r, .c = c, .index = i};
        if (pthread_create(&threads[i], NULL, run_passes, &runners[i]) != 0)
            tool_die(EXIT_WRONG, "cannot start %d threads", (int)n);
    }
    for (int32_t i = 0; i < n; i++) pthread_join(threads[i], NULL);
    for (int pass = 0; pass < PASSES; pass++) {
        double start = runners[0].start[pass], end = runners[0].end[pass];
        for (int32_t i = 1; i < n; i++) {
            start = fmin(start, runners[i].start[pass]);
            end = fmax(end, runners[i].end[pass]);
        }
        seconds[pass] = end - start;
    }
    free(threads);
    free(runners);
    tool_sort(seconds, PASSES);
}

/* ---- public calls ----------------------------------------------------------------------------- */

/* May instructions of this level count? Levels are listed best first, and each includes the next. */
static bool counts(const ceilings *c, const char *level)
{
    if (!level) return true;
    bool reached = !c->isa;
    const char *name;
    int32_t usable;
    for (int32_t i = 0; (name = qkv_cpu_level(i, &usable)); i++) {
        if (c->isa && strcmp(name, c->isa) == 0) reached = true;
        if (strcmp(name, level) == 0) return reached && usable;
    }
    return false;
}

ceilings *ceilings_create(int32_t num_threads, const char *isa)
{
    ceilings *c = calloc(1, sizeof *c);
    if (!c) tool_die(EXIT_WRONG, "out of memory");
    c->num_threads = num_threads;
    c->isa = isa;
    c->memory_bytes = data_rotation_bytes() & ~((size_t)2 * CHUNK - 1);
    if (c->memory_bytes == 0) tool_die(EXIT_WRONG, "too little memory is free to measure its speed");
    c->memory = data_alloc((double)c->memory_bytes, 1);
    memset(c->memory, 1, c->memory_bytes);
    return c;
}

void ceilings_destroy(ceilings *c)
{
    if (!c) return;
    data_free(c->memory);
    free(c);
}

ceiling_value ceilings_measure(ceilings *c, ceiling which)
{
    ceiling_value best = {0};
    const bool copies = which == CEILING_COPY, memory = copies || which == CEILING_READ;
    for (size_t i = 0; i < sizeof variants / sizeof variants[0]; i++) {
        if (variants[i].what != which || !counts(c, variants[i].level)) continue;
        race r = {.run = variants[i].run, .copies = copies, .num_threads = c->num_threads};
        double seconds[PASSES];
        run_race(c, &r, seconds);
        const double work = variants[i].work * (memory ? CHUNK : (double)STEPS * c->num_threads);
        const double median = work / seconds[PASSES / 2] * 1e-9;
        if (median > best.median)
            best = (ceiling_value){median, work / seconds[0] * 1e-9, variants[i].name};
    }
    return best;
}
