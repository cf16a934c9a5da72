/* gemm_quantized.cpu.c - out = x w^T with the weights as they lie in a GGUF file: blocks of 32 codes
 * and a scale. Lanes are columns of out, that is rows of w.
 *
 * Of QI_VW rows of w a block is loaded and transposed while it is still packed: 16 bytes of 4 rows
 * take 2 shuffles a row, for 16 or 32 weights each. A word then holds 4 bytes of a lane's row. How
 * these are multiplied by x is in gemm_quantized_float.cpu.h or, with integers,
 * gemm_quantized_vnni.cpu.h: each takes blocks of x to scratch in its own form.
 *
 * out = sum over blocks of d * (sum of code * x) + min * (sum of x), the outer sum one ascending chain
 * of multiply-adds. Thus the bits of an output depend on its row of x and its row of w alone.
 *
 * A task owns a range of columns, or of rows of x when those are the more. Bound: memory for few
 * rows, n * k * block bytes / 32; multiply-adds for many.
 * Format: the GGUF specification and ggml's block_q8_0, block_q4_0, block_q4_1.
 * SPDX-License-Identifier: Apache-2.0 */
#if defined(__AVX512VNNI__)
#include "ops/gemm/gemm_quantized_vnni.cpu.h"
#else
#include "ops/gemm/gemm_quantized_float.cpu.h"
#endif

enum {
    PIECE = 512, /* k between readings of scales; of w at hand, so that L1 and L2 hold it */
    MAX_M = 32,  /* rows of x in scratch */
    MAX_X = 64 * 1024,
    MAX_SUMS = 40 * 1024,
};

typedef struct scratch {
    float x[MAX_X];                    /* tiles of [k, rows] of the part at hand, scaled */
    float x_sums[MAX_X / BLOCK];       /* tiles of [k / BLOCK, rows], of x as it was */
    float sums[MAX_SUMS];              /* [padded_m, n] so far, sum_stride apart */
    char w[QI_VW][PIECE / BLOCK * 34]; /* a piece of the last rows of w */
    float d[PIECE / BLOCK][QI_VW], min[PIECE / BLOCK][QI_VW]; /* of a piece of rows of w */
} scratch;
_Static_assert(sizeof(scratch) <= QI_TASK_SCRATCH_BYTES, "parts live in task scratch");

/* Rows [m0, m0 + m) by columns [n0, n0 + n) over [k0, k0 + k). */
typedef struct part {
    i64 m0, m, n0, n, k0, k;
    i64 padded_m; /* with rows of zeros */
    i64 sum_stride;
} part;

QI_INLINE i64 round_up(i64 n, i64 grain)
{
    return (n + grain - 1) / grain * grain;
}

QI_INLINE i64 least(i64 a, i64 b)
{
    return a < b ? a : b;
}

/* Tiles are of ROWS rows, the last of 1, 2, 4 or ROWS. */
QI_INLINE i64 pad_rows(i64 m)
{
    const i64 rest = m % ROWS;
    return m - rest + (rest > 4 ? ROWS : rest > 2 ? 4 : rest);
}

/* ---- weights --------------------------------------------------------------------------------- */

/* QI_VW rows of w, a stride of bytes apart, at some k. */
typedef struct strip {
    const char *rows;
    i64 stride;
} strip;

/* What is to be read after a strip: bytes [at, row_bytes) of `row` and all of the rows after it. */
typedef struct fetch {
    strip w;
    i64 row_bytes, row, at;
} fetch;

/* Prefetches so many bytes more, row after row, the order that memory likes best. */
QI_INLINE void fetch_bytes(fetch *f, i64 bytes)
{
    for (; bytes > 0 && f->row < QI_VW; bytes -= 64) {
        qi_prefetch(f->w.rows + f->row * f->w.stride + f->at);
        f->at += 64;
        if (f->at >= f->row_bytes) f->at = 0, f->row++;
    }
}

/* 16 bytes at p, and of every fourth row from there. */
QI_INLINE vf load_lanes(const char *p, i64 stride)
{
#if QI_VW == 16
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const void *)p));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(p + 4 * stride)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(p + 8 * stride)), 2);
    return (vf)_mm512_inserti32x4(v, _mm_loadu_si128((const void *)(p + 12 * stride)), 3);
#elif QI_VW == 8
    const __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const void *)p));
    return (vf)_mm256_inserti128_si256(v, _mm_loadu_si128((const void *)(p + 4 * stride)), 1);
#else
    (void)stride;
    return vf_load((const void *)p);
#endif
}

/* 16 bytes of each row as words: lane i of words[j] is word j of row i. */
QI_INLINE void load_words(vf words[4], const char *p, i64 stride)
{
    QI_UNROLL(4)
    for (int i = 0; i < 4; i++) words[i] = load_lanes(p + i * stride, stride);
    vf_transpose_lanes(words);
}

/* The scales, and minima, of some blocks of the rows: the first 2 bytes of each, or 4. */
QI_INLINE void read_scales(scratch *s, const strip *w, i64 num_blocks, const gemm_format format)
{
    const int size = format == GEMM_Q4_1 ? 4 : 2;
    char heads[PIECE / BLOCK * QI_VW * 4];
    for (int j = 0; j < QI_VW; j++) {
        const char *block = w->rows + j * w->stride;
        char *head = heads + j * size;
        i64 b = 0;
        for (; b + 8 <= num_blocks; b += 8) {
            QI_UNROLL(8)
            for (int i = 0; i < 8; i++, block += gemm_block_bytes(format), head += QI_VW * size)
                memcpy(head, block, (size_t)size);
        }
        for (; b < num_blocks; b++, block += gemm_block_bytes(format), head += QI_VW * size)
            memcpy(head, block, (size_t)size);
    }
    for (i64 b = 0; b < num_blocks; b++) {
        const char *head = heads + b * QI_VW * size;
        if (format == GEMM_Q4_1) {
            const vu both = (vu)vf_load((const float *)(const void *)head);
            vf_store(s->d[b], vf_from_f16(__builtin_convertvector(both, vu16)));
            vf_store(s->min[b], vf_from_f16(__builtin_convertvector(both >> 16, vu16)));
        } else {
            const vf d = qi_load(head, QI_F16);
            vf_store(s->d[b], d);
            if (has_min(format)) vf_store(s->min[b], d * -8.f);
        }
    }
}

/* ---- products -------------------------------------------------------------------------------- */

/* Rows of x in scratch, and what goes with them. */
typedef struct tile {
    const float *x, *x_sums;
    float *sums; /* [rows, QI_VW] */
    i64 sum_stride;
    fetch *fetch; /* to go on with meanwhile, or NULL */
} tile;

/* sums += x times blocks of the rows of w, whose scales are in s. */
QI_INLINE void multiply_tile(const scratch *s, const tile t, const strip *w, i64 num_blocks,
                             const int rows, const gemm_format format)
{
    const i64 bytes = gemm_block_bytes(format), codes = format == GEMM_Q4_1 ? 4 : 2;
    for (i64 b = 0; b < num_blocks; b++) {
        const char *block = w->rows + b * bytes;
        vf words[2][4], sum[ROWS];
        if (t.fetch) fetch_bytes(t.fetch, QI_VW * bytes);
        load_words(words[0], block + codes, w->stride);
        if (format == GEMM_Q8_0)
            load_words(words[1], block + codes + 16, w->stride);
        else
            memcpy(words[1], words[0], sizeof words[0]); /* the upper bits of the same bytes */
        multiply_block(sum, t.x, b, words, rows, format);
        const vf d = vf_load(s->d[b]), min = vf_load(s->min[b]);
        QI_UNROLL(8)
        for (int r = 0; r < rows; r++) {
            vf v = vf_load(t.sums + r * t.sum_stride) + sum[r] * d;
            if (has_min(format)) v = v + vf_set1(t.x_sums[b * rows + r]) * min;
            vf_store(t.sums + r * t.sum_stride, v);
        }
    }
}

/* All rows of x with blocks of the rows of w, at k. */
QI_INLINE void multiply_strip(const part *p, scratch *s, i64 column, const strip *w, i64 k,
                              i64 num_blocks, fetch *next, const gemm_format format)
{
    for (i64 m = 0; m < p->padded_m; m += ROWS) {
        const i64 rows = least(p->padded_m - m, ROWS), at = m * p->k + k * rows;
        const tile t = {s->x + at, s->x_sums + at / BLOCK, s->sums + m * p->sum_stride + column,
                        p->sum_stride, m == 0 ? next : NULL};
        switch (rows) {
        case 1: multiply_tile(s, t, w, num_blocks, 1, format); break;
        case 2: multiply_tile(s, t, w, num_blocks, 2, format); break;
        case 4: multiply_tile(s, t, w, num_blocks, 4, format); break;
        default: multiply_tile(s, t, w, num_blocks, ROWS, format); break;
        }
    }
}

/* Rows of w in scratch, the last of n in place of those past it. */
static strip repeat_last(scratch *s, const strip *w, i64 n, i64 bytes)
{
    for (i64 j = 0; j < QI_VW; j++)
        memcpy(s->w[j], w->rows + least(j, n - 1) * w->stride, (size_t)bytes);
    return (strip){s->w[0], sizeof s->w[0]};
}

/* Columns [column, column + QI_VW) of the part; those past its end repeat the last. */
QI_INLINE void multiply_columns(const gemm_quantized_params *g, const part *p, scratch *s,
                                i64 column, const gemm_format format)
{
    const i64 block_bytes = gemm_block_bytes(format), row_bytes = p->k / BLOCK * block_bytes;
    const char *w_at = g->w + (p->n0 + column) * g->w_stride + p->k0 / BLOCK * block_bytes;
    fetch next = {{w_at + QI_VW * g->w_stride, g->w_stride}, row_bytes, 0, 0};
    for (i64 k = 0; k < p->k; k += PIECE) {
        const i64 at = k / BLOCK * block_bytes, num_blocks = least(p->k - k, PIECE) / BLOCK;
        strip w = {w_at + at, g->w_stride};
        if (column + QI_VW > p->n) w = repeat_last(s, &w, p->n - column, num_blocks * block_bytes);
        read_scales(s, &w, num_blocks, format);
        multiply_strip(p, s, column, &w, k, num_blocks, &next, format);
    }
}

/* ---- parts ----------------------------------------------------------------------------------- */

QI_INLINE float sum_of_block(const float *row)
{
    vf all = vf_set1(0.f);
    for (int i = 0; i < BLOCK; i += QI_VW) all = all + vf_load(row + i);
    return vf_sum(all);
}

/* Row r of the part's x to its tile. */
QI_INLINE void take_row(const gemm_quantized_params *g, const part *p, scratch *s, i64 r,
                        const gemm_format format)
{
    const i64 first = r / ROWS * ROWS, rows = least(p->padded_m - first, ROWS);
    float *x = s->x + first * p->k, *sums = s->x_sums + first * p->k / BLOCK, row[PIECE];
    for (i64 k = 0; k < p->k; k += PIECE) {
        const i64 at = (p->m0 + r) * g->x_stride + p->k0 + k, n = least(p->k - k, PIECE);
        qi_widen_any(row, qi_at(g->x, g->dtype_x, at), g->dtype_x, n);
        for (i64 i = 0; i < n; i += BLOCK) {
            const i64 b = (k + i) / BLOCK;
            take_block(x, b, r % ROWS, rows, row + i, format);
            if (has_min(format)) sums[b * rows + r % ROWS] = sum_of_block(row + i);
        }
    }
}

QI_INLINE void take_x(const gemm_quantized_params *g, const part *p, scratch *s,
                      const gemm_format format)
{
    memset(s->x, 0, (size_t)(p->padded_m * p->k) * sizeof *s->x);
    memset(s->x_sums, 0, (size_t)(p->padded_m * p->k / BLOCK) * sizeof *s->x_sums);
    for (i64 r = 0; r < p->m; r++) take_row(g, p, s, r, format);
}

static void store_part(const gemm_quantized_params *g, const part *p, const float *sums)
{
    for (i64 r = 0; r < p->m; r++) {
        const i64 at = (p->m0 + r) * g->out_stride + p->n0;
        qi_narrow_any((char *)g->out + at * (i64)qi_size_of(g->dtype_out), g->dtype_out,
                      sums + r * p->sum_stride, p->n);
    }
}

/* Rows [m0, m1), at least one, by columns [n0, n1). The fewer the rows, the more of k is in a
 * part, since w is read best in long runs. */
QI_INLINE void multiply(const gemm_quantized_params *g, scratch *s, i64 m0, i64 m1, i64 n0, i64 n1,
                        const gemm_format format)
{
    const i64 part_m = least(pad_rows(m1 - m0), MAX_M);
    const i64 part_n = MAX_SUMS / part_m / QI_VW * QI_VW;
    const i64 part_k = MAX_X / part_m / PIECE * PIECE;
    part p = {0};
    for (p.n0 = n0; p.n0 < n1; p.n0 += part_n) {
        p.n = least(n1 - p.n0, part_n);
        p.sum_stride = round_up(p.n, QI_VW);
        for (p.m0 = m0; p.m0 < m1; p.m0 += part_m) {
            p.m = least(m1 - p.m0, part_m);
            p.padded_m = pad_rows(p.m);
            memset(s->sums, 0, (size_t)(p.padded_m * p.sum_stride) * sizeof *s->sums);
            for (p.k0 = 0; p.k0 < g->k; p.k0 += part_k) {
                p.k = least(g->k - p.k0, part_k);
                take_x(g, &p, s, format);
                for (i64 c = 0; c < p.n; c += QI_VW) multiply_columns(g, &p, s, c, format);
            }
            store_part(g, &p, s->sums);
        }
    }
}

QI_CPU_KERNEL(gemm_quantized)
{
    const gemm_quantized_params *g = params;
    i64 m0 = 0, m1 = g->m, n0 = 0, n1 = g->n;
    if (g->m > g->n)
        qi_task_share(task, g->m, ROWS, &m0, &m1);
    else
        qi_task_share(task, g->n, QI_VW, &n0, &n1);
    if (m0 == m1 || n0 == n1) return;
    switch (g->format) {
    case GEMM_Q8_0: multiply(g, task.scratch, m0, m1, n0, n1, GEMM_Q8_0); break;
    case GEMM_Q4_0: multiply(g, task.scratch, m0, m1, n0, n1, GEMM_Q4_0); break;
    default: multiply(g, task.scratch, m0, m1, n0, n1, GEMM_Q4_1); break;
    }
}
