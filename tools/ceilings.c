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
#include <stdio.h>
#include <string.h>

#include "data.h"
#include "tool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum {
    MIN_PASSES = 5,
    MAX_PASSES = 75,
    CHUNK = 16 << 20, /* bytes of a pass over memory */
    STEPS = 100000,   /* of a pass over registers */
    CHAINS = 12,      /* independent sums: more than latency x units of any core here */
};

/* One thread's share of a pass: memory, or STEPS of CHAINS vector operations. */
typedef struct share {
    char *to;
    const char *from;
    size_t bytes; /* a multiple of PART */
} share;
enum { PART = 1024 };

/* Returns something that depends on all of the work. */
typedef double (*loop)(const share *s);

/* ---- loops over memory --------------------------------------------------------------------- */

#if defined(__x86_64__)
__attribute__((target("avx2"))) static double read_memory(const share *s)
{
    __m256i sum[8];
    for (int j = 0; j < 8; j++) sum[j] = _mm256_setzero_si256();
    for (const char *p = s->from, *end = p + s->bytes; p < end; p += 256)
        for (int j = 0; j < 8; j++)
            sum[j] =
                _mm256_or_si256(sum[j], _mm256_load_si256((const __m256i *)(const void *)p + j));
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

/* ---- loops over registers ------------------------------------------------------------------ */

/* x[j] += a * a, which stays a normal number. */
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static double fma_256(const share *s)
{
    (void)s;
    const __m256 a = _mm256_set1_ps(0.001f);
    __m256 x[CHAINS];
    for (int j = 0; j < CHAINS; j++) x[j] = _mm256_set1_ps((float)j);
    for (int64_t i = 0; i < STEPS; i++)
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) x[j] = _mm256_fmadd_ps(a, a, x[j]);
    for (int j = 1; j < CHAINS; j++) x[0] = _mm256_add_ps(x[0], x[j]);
    return (double)_mm256_cvtss_f32(x[0]);
}

__attribute__((target("avx512f"))) static double fma_512(const share *s)
{
    (void)s;
    const __m512 a = _mm512_set1_ps(0.001f);
    __m512 x[CHAINS];
    for (int j = 0; j < CHAINS; j++) x[j] = _mm512_set1_ps((float)j);
    for (int64_t i = 0; i < STEPS; i++)
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) x[j] = _mm512_fmadd_ps(a, a, x[j]);
    for (int j = 1; j < CHAINS; j++) x[0] = _mm512_add_ps(x[0], x[j]);
    return (double)_mm512_cvtss_f32(x[0]);
}

__attribute__((target("avx512f,avx512bf16"))) static double dot_512(const share *s)
{
    (void)s;
    const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80); /* pairs of 1 */
    __m512 x[CHAINS];
    for (int j = 0; j < CHAINS; j++) x[j] = _mm512_set1_ps((float)j);
    for (int64_t i = 0; i < STEPS; i++)
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) x[j] = _mm512_dpbf16_ps(x[j], a, a);
    for (int j = 1; j < CHAINS; j++) x[0] = _mm512_add_ps(x[0], x[j]);
    return (double)_mm512_cvtss_f32(x[0]);
}

/* Two tiles by two, as a product of large matrices takes them from registers. */
__attribute__((target("amx-tile,amx-bf16"))) static double dot_amx(const share *s)
{
    (void)s;
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
    float c[16][16];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t i = 0; i < STEPS; i++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    _tile_release();
    return (double)c[0][0];
}
#else
static double fma_128(const share *s)
{
    (void)s;
    const float32x4_t a = vdupq_n_f32(0.001f);
    float32x4_t x[2 * CHAINS];
    for (int j = 0; j < 2 * CHAINS; j++) x[j] = vdupq_n_f32((float)j);
    for (int64_t i = 0; i < STEPS; i++)
#pragma GCC unroll 24
        for (int j = 0; j < 2 * CHAINS; j++) x[j] = vfmaq_f32(x[j], a, a);
    for (int j = 1; j < 2 * CHAINS; j++) x[0] = vaddq_f32(x[0], x[j]);
    return (double)vgetq_lane_f32(x[0], 0);
}
#endif

/* What there is to try for each ceiling; the fastest usable one counts. level: the ISA level
 * that it needs, NULL for any. work: flops of a step, or bytes moved for a byte of a share. */
static const struct {
    ceiling what;
    const char *level, *name;
    loop run;
    double work;
} variants[] = {
    {CEILING_READ, NULL, "read", read_memory, 1},
    {CEILING_COPY, NULL, "copy", copy_plain, 2},
#if defined(__x86_64__)
    {CEILING_COPY, NULL, "copy", copy_streaming, 2},
    {CEILING_FMA, "avx2", "fma_avx2", fma_256, CHAINS * 16.0},
    {CEILING_FMA, "avx512", "fma_avx512", fma_512, CHAINS * 32.0},
    {CEILING_DOT, "avx512_bf16", "bf16_dot_avx512", dot_512, CHAINS * 64.0},
    {CEILING_DOT, "amx", "bf16_amx", dot_amx, 4 * 16384.0},
#else
    {CEILING_FMA, "neon", "fma_neon", fma_128, CHAINS * 16.0},
#endif
};

/* ---- threads ------------------------------------------------------------------------------- */

struct ceilings {
    int32_t num_threads;
    int num_passes;
    const char *level;
    char *memory; /* [memory_bytes] */
    size_t memory_bytes, touched_bytes;
};

/* One measurement. In a pass the threads take one part each of a span of the memory, again and
 * again; the next pass takes the next span. */
typedef struct race {
    loop run;
    const ceilings *c;
    size_t part, to_offset; /* bytes; a copy goes to_offset further */
    size_t num_spans, repeats;
    atomic_int arrived; /* threads that came to the start of a pass, all passes together */
} race;

typedef struct runner {
    race *r;
    int32_t index;
    double start[MAX_PASSES], end[MAX_PASSES], sink;
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
        pthread_setaffinity_np(pthread_self(), sizeof one,
                               &one); /* a wish: failing costs nothing */
        return;
    }
}

/* Polls until all threads have come, so that a pass of a millisecond starts on all at once. */
static void meet(race *r, int pass)
{
    atomic_fetch_add(&r->arrived, 1);
    for (int i = 0; atomic_load(&r->arrived) < (pass + 1) * r->c->num_threads; i++)
        if (i > 10000) sched_yield(); /* more threads than CPUs, or busy neighbours */
}

static void *run_passes(void *arg)
{
    runner *me = arg;
    race *r = me->r;
    pin(me->index);
    for (int i = 0; i < r->c->num_passes; i++) {
        const size_t span = (size_t)i % r->num_spans * (size_t)r->c->num_threads;
        char *from = r->c->memory + (span + (size_t)me->index) * r->part;
        const share s = {.from = from, .to = from + r->to_offset, .bytes = r->part};
        meet(r, i);
        me->start[i] = tool_seconds();
        for (size_t j = 0; j < r->repeats; j++) me->sink += r->run(&s);
        me->end[i] = tool_seconds();
    }
    return NULL;
}

/* Runs a loop on all threads. Returns the seconds of a pass, from the first thread's start to
 * the last one's end: those that a tenth of the passes stay below, for busy neighbours only ever
 * add to them. */
static double run_race(race *r)
{
    const int32_t n = r->c->num_threads;
    pthread_t *threads = data_alloc(n, sizeof *threads);
    runner *runners = data_alloc(n, sizeof *runners);
    for (int32_t i = 0; i < n; i++) {
        runners[i] = (runner){.r = r, .index = i};
        if (pthread_create(&threads[i], NULL, run_passes, &runners[i]) != 0)
            tool_die(EXIT_WRONG, "cannot start %d threads", (int)n);
    }
    for (int32_t i = 0; i < n; i++) pthread_join(threads[i], NULL);
    double seconds[MAX_PASSES];
    for (int pass = 0; pass < r->c->num_passes; pass++) {
        double start = runners[0].start[pass], end = runners[0].end[pass];
        for (int32_t i = 1; i < n; i++) {
            start = fmin(start, runners[i].start[pass]);
            end = fmax(end, runners[i].end[pass]);
        }
        seconds[pass] = end - start;
    }
    data_free(threads);
    data_free(runners);
    tool_sort(seconds, (size_t)r->c->num_passes);
    return seconds[r->c->num_passes / 10];
}

/* ---- public calls -------------------------------------------------------------------------- */

/* Has the context this level's instructions? Levels are listed best first; each includes the
 * next. */
static bool has_level(const ceilings *c, const char *level)
{
    bool reached = false;
    const char *name;
    for (int32_t i = 0; level && (name = qkv_cpu_level(i, NULL)); i++) {
        reached = reached || strcmp(name, c->level) == 0;
        if (strcmp(name, level) == 0) return reached;
    }
    return !level;
}

ceilings *ceilings_create(const qkv_context *ctx, double seconds)
{
    ceilings *c = data_alloc(1, sizeof *c);
    const double passes = MAX_PASSES * seconds;
    *c = (ceilings){
        .num_threads = qkv_context_num_threads(ctx),
        .num_passes = (int)fmax(MIN_PASSES, fmin(passes, MAX_PASSES)),
        .level = strchr(qkv_context_device_name(ctx), ':') + 1, /* "cpu:LEVEL" */
        .memory_bytes = data_rotation_bytes() & ~((size_t)2 * CHUNK - 1),
    };
    if (c->memory_bytes == 0)
        tool_die(EXIT_WRONG, "too little memory is free to measure its speed");
    c->memory = data_alloc((double)c->memory_bytes, 1);
    return c;
}

void ceilings_destroy(ceilings *c)
{
    if (!c) return;
    data_free(c->memory);
    data_free(c);
}

/* Pages that nobody wrote to are one and the same: reading them tells nothing. */
static void touch(ceilings *c, size_t bytes)
{
    if (bytes <= c->touched_bytes) return;
    memset(c->memory + c->touched_bytes, 1, bytes - c->touched_bytes);
    c->touched_bytes = bytes;
}

ceiling_value ceilings_measure(ceilings *c, ceiling which, double cached_bytes)
{
    const size_t n = (size_t)c->num_threads;
    const bool copies = which == CEILING_COPY, memory = copies || which == CEILING_READ;
    const bool cached = cached_bytes > 0;
    const size_t room = copies ? c->memory_bytes / 2 : c->memory_bytes;
    const double span =
        cached ? fmin(copies ? cached_bytes / 2 : cached_bytes, (double)room) : CHUNK;
    const size_t parts = (size_t)span / (n * PART), part = (parts ? parts : 1) * PART;
    const size_t repeats = memory && cached && part * n < CHUNK ? CHUNK / (part * n) : 1;
    if (memory) touch(c, cached ? part * n * (copies ? 2 : 1) : c->memory_bytes);
    ceiling_value best = {0};
    for (size_t i = 0; i < sizeof variants / sizeof variants[0]; i++) {
        if (variants[i].what != which || !has_level(c, variants[i].level)) continue;
        race r = {.run = variants[i].run,
                  .c = c,
                  .part = part,
                  .to_offset = !copies  ? 0
                               : cached ? part * n
                                        : room,
                  .num_spans = cached ? 1 : room / (part * n),
                  .repeats = repeats};
        const double seconds = run_race(&r);
        const double work = (double)n * (memory ? (double)(part * repeats) : STEPS);
        const double rate = variants[i].work * work / seconds * 1e-9;
        if (rate <= best.rate) continue;
        best.rate = rate;
        snprintf(best.name, sizeof best.name, "%s%s",
                 !memory  ? ""
                 : cached ? "cache_"
                          : "dram_",
                 variants[i].name);
    }
    return best;
}
