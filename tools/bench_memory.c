/* bench_memory.c - where a bench's data is, on either device, and what is expected of results.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "bench.h"

enum {
    PERIOD = 16 * 65537, /* elements: so that neither pages nor heads repeat soon */
    MAX_SETS = 8192,     /* as many calls are captured into a graph */
    LOOK = 1 << 16,      /* elements that a look at a large output takes */
    MAX_LOOKS = 32,
};

static void keep(const bench *b, void **blocks, int *count, void *block)
{
    const int room = sizeof b->blocks / sizeof b->blocks[0];
    if (*count == room) tool_die(EXIT_WRONG, "%s: more than %d blocks", b->p->op, room);
    blocks[(*count)++] = block;
}

void *bench_alloc(bench *b, double count, size_t size)
{
    void *block = data_alloc(count, size);
    keep(b, b->blocks, &b->num_blocks, block);
    return block;
}

/* An address that no memory is at, as aligned as a GPU's. */
static void *made_up(double bytes)
{
    enum { ALIGN = 1 << 20 };
    static uintptr_t next = (uintptr_t)1 << 44;
    const uintptr_t address = next;
    next += ((uintptr_t)bytes / ALIGN + 1) * ALIGN;
    return (void *)address;
}

void *bench_memory(bench *b, double count, size_t size)
{
    if (b->only_compiles) return made_up(count * (double)size);
    if (!b->gpu) return bench_alloc(b, count, size);
    void *block = cuda_alloc(b->gpu, count * (double)size);
    keep(b, b->device_blocks, &b->num_device_blocks, block);
    return block;
}

void *bench_upload(bench *b, void *host, size_t bytes)
{
    if (!b->gpu) return host;
    void *block = bench_memory(b, (double)bytes, 1);
    cuda_copy(b->gpu, block, host, bytes);
    return block;
}

const void *bench_fetch(bench *b, const void *p, size_t bytes)
{
    if (!b->gpu) return p;
    if (bytes > b->fetched_bytes) {
        data_free(b->fetched);
        b->fetched = data_alloc((double)bytes, 1);
        b->fetched_bytes = bytes;
    }
    cuda_copy(b->gpu, b->fetched, p, bytes);
    return b->fetched;
}

typedef void fill_values(data_random *r, void *p, DLDataType dtype, int64_t n, double scale);

static bench_array filled(bench *b, DLDataType dtype, double n, double scale, fill_values *fill,
                          int64_t period)
{
    bench_array a = {.dtype = dtype, .data = bench_memory(b, n, data_bytes(dtype, 1))};
    if (b->only_compiles) return a;
    a.period = n < (double)period ? (int64_t)n : period;
    const size_t first_bytes = data_bytes(dtype, a.period);
    if (!b->gpu) {
        fill(&b->random, a.data, dtype, a.period, scale);
        for (int64_t i = a.period; i < (int64_t)n; i += a.period) {
            const int64_t more = (int64_t)n - i < a.period ? (int64_t)n - i : a.period;
            memcpy((char *)a.data + data_bytes(dtype, i), a.data, data_bytes(dtype, more));
        }
        return a;
    }
    void *host = data_alloc((double)first_bytes, 1);
    a.known = bench_alloc(b, (double)a.period, sizeof *a.known);
    fill(&b->random, host, dtype, a.period, scale);
    for (int64_t i = 0; i < a.period; i++) a.known[i] = (float)data_get(host, dtype, i);
    cuda_copy(b->gpu, a.data, host, first_bytes);
    cuda_repeat(b->gpu, a.data, first_bytes, data_bytes(dtype, (int64_t)n));
    data_free(host);
    return a;
}

bench_array bench_random(bench *b, DLDataType dtype, double n, double scale)
{
    return filled(b, dtype, n, scale, data_fill, b->gpu ? PERIOD : INT64_MAX);
}

bench_array bench_normal(bench *b, DLDataType dtype, double n, double spread)
{
    return filled(b, dtype, n, spread, data_fill_normal, PERIOD);
}

void bench_read(const bench_array *a, int64_t first, int64_t n, double *out)
{
    if (!a->known) {
        for (int64_t i = 0; i < n; i++) out[i] = data_get(a->data, a->dtype, first + i);
        return;
    }
    int64_t at = first % a->period;
    for (int64_t i = 0; i < n; i++) {
        out[i] = (double)a->known[at];
        if (++at == a->period) at = 0;
    }
}

void bench_repeat(bench *b, void *to, const void *host, size_t bytes, int64_t times)
{
    if (b->only_compiles) return;
    if (b->gpu) {
        cuda_copy(b->gpu, to, host, bytes);
        cuda_repeat(b->gpu, to, bytes, (size_t)times * bytes);
        return;
    }
    for (int64_t i = 0; i < times; i++) memcpy((char *)to + (size_t)i * bytes, host, bytes);
}

void bench_poison(bench *b, void *p, DLDataType dtype, int64_t n)
{
    if (b->only_compiles) return;
    if (b->gpu)
        cuda_set(b->gpu, p, 0xff, data_bytes(dtype, n));
    else
        data_poison(p, dtype, n);
}

void bench_results(bench *b, const void *p, DLDataType dtype, int64_t first, int64_t n, double *out)
{
    const char *at = (const char *)p + data_bytes(dtype, first);
    const void *host = bench_fetch(b, at, data_bytes(dtype, n));
    for (int64_t i = 0; i < n; i++) out[i] = data_get(host, dtype, i);
}

void bench_rotate(bench *b, double touched, double held)
{
    b->num_sets = 1;
    if (b->only_compiles) return;
    if (bench_int(b, KEY_DATA) == DATA_CACHE) {
        b->cached_bytes = touched;
        return;
    }
    const double l2 = b->gpu ? (double)cuda_l2_bytes(b->gpu) : 0;
    double sets = (double)data_rotation_bytes() / touched, room = 4e9;
    if (b->gpu) {
        sets = fmin(ceil(fmax(4 * l2, 150e6) / touched), MAX_SETS);
        room = fmin(16e9, 0.5 * (double)cuda_free_bytes(b->gpu));
    }
    b->num_sets = (int64_t)fmax(1, fmin(sets, room / held));
}

/* ---- what is expected ------------------------------------------------------------------------ */

void bench_expect(const bench *b, double got, double want, double tolerance, const char *where, ...)
{
    if (fabs(got - want) <= tolerance) return;
    char place[128];
    va_list args;
    va_start(args, where);
    vsnprintf(place, sizeof place, where, args);
    va_end(args);
    char text[PROBLEM_TEXT];
    problem_print(b->p, text);
    tool_die(EXIT_WRONG, "WRONG RESULT: %s %s: %s: expected %.9g within %.3g, got %.9g", b->p->op,
             text, place, want, tolerance, got);
}

static void expect_finite(bench *b, const void *p, DLDataType dtype, int64_t first, int64_t n)
{
    const void *host =
        bench_fetch(b, (const char *)p + data_bytes(dtype, first), data_bytes(dtype, n));
    for (int64_t i = 0; i < n; i++) {
        const long long place = first + i;
        if (!isfinite(data_get(host, dtype, i)))
            bench_expect(b, data_get(host, dtype, i), 0, 0, "output, element %lld", place);
    }
}

void bench_expect_finite(bench *b, const void *p, DLDataType dtype, int64_t n)
{
    if (!b->gpu || n <= MAX_LOOKS * LOOK) {
        expect_finite(b, p, dtype, 0, n);
        return;
    }
    expect_finite(b, p, dtype, 0, LOOK);
    expect_finite(b, p, dtype, n - LOOK, LOOK);
    for (int i = 2; i < MAX_LOOKS; i++)
        expect_finite(b, p, dtype, data_below(&b->random, n - LOOK), LOOK);
}
