/* data.c - SPDX-License-Identifier: Apache-2.0 */
#include "data.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "tool.h"

/* ---- memory -------------------------------------------------------------------------------- */

/* Bytes that the kernel would give us without swapping. */
static double available_bytes(void)
{
    double kib = (double)sysconf(_SC_AVPHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / 1024;
    char line[128];
    FILE *f = fopen("/proc/meminfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %lf kB", &kib) == 1) break;
    if (f) fclose(f);
    return kib * 1024;
}

/* The largest cache that the system lists; 0 if it lists none. */
static double last_level_cache_bytes(void)
{
    double largest = 0;
    for (int i = 0; i < 8; i++) {
        char path[64], unit = 'K';
        double size = 0;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
        FILE *f = fopen(path, "r");
        if (!f) break;
        if (fscanf(f, "%lf%c", &size, &unit) >= 1)
            largest = fmax(largest, size * (unit == 'M' ? 0x1p20 : 0x1p10));
        fclose(f);
    }
    return largest;
}

size_t data_rotation_bytes(void)
{
    const double wanted = fmin(fmax(1.25 * last_level_cache_bytes(), 600e6), 4e9);
    return (size_t)fmin(wanted, available_bytes() / 4) & ~(size_t)0xffff;
}

/* In front of each block: its whole size. A block of its own is page-aligned, so a page goes
 * there. */
#define FRONT 4096

void *data_alloc(double count, size_t size)
{
    const double bytes = count * (double)size + FRONT;
    if (bytes > available_bytes() * 0.9)
        tool_die(EXIT_WRONG, "the problem needs %.1f GB more memory, %.1f GB are free",
                 bytes * 1e-9, available_bytes() * 1e-9);
    const size_t length = (size_t)bytes;
    char *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) tool_die(EXIT_WRONG, "out of memory for %.1f MB", bytes * 1e-6);
    madvise(p, length, MADV_HUGEPAGE);
    memcpy(p, &length, sizeof length);
    return p + FRONT;
}

void data_free(void *p)
{
    if (!p) return;
    char *front = (char *)p - FRONT;
    size_t length;
    memcpy(&length, front, sizeof length);
    munmap(front, length);
}

/* ---- random numbers ------------------------------------------------------------------------ */

data_random data_seed(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (data_random){(uint64_t)t.tv_sec * 1000000007u + (uint64_t)t.tv_nsec};
}

uint64_t data_u64(data_random *r)
{
    uint64_t z = (r->state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int64_t data_below(data_random *r, int64_t n)
{
    return (int64_t)(data_u64(r) % (uint64_t)n);
}

void data_shuffle(data_random *r, int32_t *x, int64_t n)
{
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = data_below(r, i + 1);
        const int32_t t = x[i];
        x[i] = x[j];
        x[j] = t;
    }
}

/* ---- elements ------------------------------------------------------------------------------ */

static double bf16_value(uint16_t h)
{
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return (double)f;
}

static double f16_value(uint16_t h)
{
    const int exponent = (h >> 10) & 31, mantissa = h & 1023;
    const double sign = h & 0x8000 ? -1 : 1;
    if (exponent == 31) return mantissa ? (double)NAN : sign * (double)INFINITY;
    return sign * (exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24));
}

/* x, |x| < 65504, rounded towards zero: random inputs need no more. */
static uint16_t f16_bits(double x)
{
    int e;
    frexp(x, &e);
    const int unit = e - 11 < -24 ? -24 : e - 11;
    const int n = (int)ldexp(fabs(x), -unit);
    return (uint16_t)((x < 0 ? 0x8000 : 0) | (unit == -24 ? n : n + (unit + 24) * 1024));
}

static int is_f32(DLDataType dtype)
{
    return dtype.bits == 32;
}

static int is_bf16(DLDataType dtype)
{
    return dtype.code == QKV_BF16.code && dtype.bits == 16;
}

/* An fp8 whose exponent has this bias is the upper part of a number of 10 mantissa bits; rounded
 * towards zero, subnormals to zero. */
static uint16_t fp8_bits(double x, int mantissa_bits, int bias)
{
    int e;
    const double m = frexp(fabs(x), &e) * 2 - 1; /* x = (1 + m) 2^(e - 1) */
    if (x == 0 || e - 1 + bias < 1) return x < 0 ? 0x80 : 0;
    const int n = (int)ldexp(m, mantissa_bits) | (e - 1 + bias) << mantissa_bits;
    return (uint16_t)(n | (x < 0 ? 0x80 : 0));
}

static double fp8_value(uint8_t h, int mantissa_bits, int bias)
{
    const int exponent = (h & 0x7f) >> mantissa_bits, mantissa = h & ((1 << mantissa_bits) - 1);
    const double m = exponent ? mantissa + (1 << mantissa_bits) : mantissa;
    return (h & 0x80 ? -1 : 1) * ldexp(m, (exponent ? exponent : 1) - bias - mantissa_bits);
}

static int is_8bit(DLDataType dtype)
{
    return dtype.bits == 8;
}

/* The bits of a dtype of 8 or 16. */
static uint16_t narrow_bits(DLDataType dtype, double x)
{
    if (dtype.code == QKV_I8.code) return (uint8_t)(int8_t)lrint(x);
    if (dtype.code == QKV_E4M3.code) return fp8_bits(x, 3, 7);
    if (dtype.code == QKV_E5M2.code) return fp8_bits(x, 2, 15);
    const float f = (float)x;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return is_bf16(dtype) ? (uint16_t)(bits >> 16) : f16_bits(x);
}

double data_get(const void *p, DLDataType dtype, int64_t i)
{
    if (is_f32(dtype)) return (double)((const float *)p)[i];
    if (is_8bit(dtype)) {
        const uint8_t byte = ((const uint8_t *)p)[i];
        return dtype.code == QKV_I8.code     ? (int8_t)byte
               : dtype.code == QKV_E4M3.code ? fp8_value(byte, 3, 7)
                                             : fp8_value(byte, 2, 15);
    }
    const uint16_t h = ((const uint16_t *)p)[i];
    return is_bf16(dtype) ? bf16_value(h) : f16_value(h);
}

double data_eps(DLDataType dtype)
{
    return is_f32(dtype) ? 0x1p-24 : is_bf16(dtype) ? 0x1p-8 : 0x1p-11;
}

/* Elements are drawn from a table of random ones: gigabytes are filled at memory speed. */
void data_fill(data_random *r, void *p, DLDataType dtype, int64_t n, double scale)
{
    enum { TABLE = 1 << 12 };
    float wide[TABLE];
    uint16_t narrow[TABLE];
    for (int i = 0; i < TABLE; i++) {
        const double x = ((double)(data_u64(r) >> 11) * 0x1p-52 - 1) * scale;
        wide[i] = (float)x;
        narrow[i] = is_f32(dtype) ? 0 : narrow_bits(dtype, x);
    }
    for (int64_t i = 0; i < n;) {
        uint64_t bits = data_u64(r);
        for (int j = 0; j < 5 && i < n; j++, i++, bits >>= 12) {
            if (is_f32(dtype))
                ((float *)p)[i] = wide[bits % TABLE];
            else if (is_8bit(dtype))
                ((uint8_t *)p)[i] = (uint8_t)narrow[bits % TABLE];
            else
                ((uint16_t *)p)[i] = narrow[bits % TABLE];
        }
    }
}

void data_fill_normal(data_random *r, void *p, DLDataType dtype, int64_t n, double spread)
{
    for (int64_t i = 0; i < n; i++) { /* Box and Muller */
        const double u = ((double)(data_u64(r) >> 11) + 0.5) * 0x1p-53;
        const double turn = (double)(data_u64(r) >> 11) * 0x1p-53;
        const double x = sqrt(-2 * log(u)) * cos(6.283185307179586 * turn) * spread;
        if (is_f32(dtype))
            ((float *)p)[i] = (float)x;
        else
            ((uint16_t *)p)[i] = narrow_bits(dtype, x);
    }
}

void data_poison(void *p, DLDataType dtype, int64_t n)
{
    memset(p, 0xff, data_bytes(dtype, n)); /* all ones is a NaN in every float format */
}

void data_tensor_init(data_tensor *x, void *p, DLDataType dtype, int ndim, const int64_t *shape)
{
    memcpy(x->shape, shape, (size_t)ndim * sizeof *shape);
    x->t = (DLTensor){
        .data = p, .device = {kDLCPU, 0}, .ndim = ndim, .dtype = dtype, .shape = x->shape};
}
