/* gemm.cpu.c - out = x w^T as dot products of rows.
 *
 * k is cut into equal pieces of at most MAX_K. Within a piece, lane l of an output's accumulator sums
 * the products of k = l modulo QI_VW in ascending order, with zeros after the end; one tree adds the
 * lanes; the pieces are added in order. Every path below keeps to that, so an output's bits depend on
 * its two rows alone: not on m, the blocking, the threads, or its neighbours (batch invariance).
 *
 * A task owns a range of columns (rows of w), or of rows of x when those are the more. It walks blocks
 * of columns, of rows, and pieces of k. Per block, x is widened to f32 in scratch, then panels of
 * COLUMNS rows of w pass: the first row tile reads the panel as it is stored and leaves it widened for
 * the others.
 *
 * Bound: few rows of x, memory: n * k * size of w, so the tiles of a panel share the prefetch of the
 * next one; many, multiply-adds: 2 * m * n * k flops, 8 loads for 16 of them.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/simd.h"
#include "ops/gemm/gemm_params.h"

enum {
    COLUMNS = 4, /* a register tile: ROWS x COLUMNS accumulators */
    ROWS = QI_NUM_VREGS == 32 ? 4 : 2,
    STEP = 16,    /* of k: a cache line of f32 */
    MAX_K = 1024, /* of a piece */
    MAX_M = 64,   /* rows of a block */
    MAX_X = MAX_M * (MAX_K + STEP),
    MAX_SUMS = MAX_M * 512,
};

/* Task scratch, 411 KB. */
typedef struct scratch {
    float sums[MAX_SUMS];              /* [m, n] of the block, over the pieces so far     */
    float x[MAX_X];                    /* [m, k] of the block, `stride` apart             */
    float w[COLUMNS * (MAX_K + STEP)]; /* [COLUMNS, piece] of the panel, `stride` apart   */
} scratch;
_Static_assert(sizeof(scratch) <= QI_TASK_SCRATCH_BYTES, "blocks live in task scratch");

/* The part of the problem at hand: rows [m0, m0 + m) by columns [n0, n0 + n) over [k0, k0 + k), where
 * k is some pieces: the more, the fewer rows, since w is read best in long runs. */
typedef struct block {
    i64 m0, m, n0, n, k0, k;
    i64 piece;      /* of k, whole steps */
    i64 x_stride;   /* k and a line, so that rows do not meet in the same sets of the cache */
    i64 sum_stride; /* n in whole tiles */
} block;

QI_INLINE i64 round_up(i64 n, i64 grain)
{
    return (n + grain - 1) / grain * grain;
}

/* The size of equal parts of n > 0, multiples of grain, none above max (itself such a multiple). */
QI_INLINE i64 even_part(i64 n, i64 max, i64 grain)
{
    const i64 parts = (n + max - 1) / max;
    return round_up((n + parts - 1) / parts, grain);
}

/* One step of k: acc += x rows times w rows. copy: where w goes widened, or NULL. */
QI_INLINE void multiply_step(vf acc[ROWS][COLUMNS], const float *x, i64 x_stride,
                             const char *const w[COLUMNS], i64 i, float *copy, i64 copy_stride,
                             const int rows, const qi_dtype wt)
{
    QI_UNROLL(4)
    for (int v = 0; v < STEP; v += QI_VW) {
        vf b[COLUMNS];
        QI_UNROLL(4)
        for (int c = 0; c < COLUMNS; c++) {
            b[c] = qi_load(qi_at(w[c], wt, i + v), wt);
            if (copy) vf_store(copy + c * copy_stride + v, b[c]);
        }
        QI_UNROLL(4)
        for (int r = 0; r < rows; r++) {
            const vf a = vf_load(x + r * x_stride + v);
            QI_UNROLL(4)
            for (int c = 0; c < COLUMNS; c++) acc[r][c] = acc[r][c] + a * b[c];
        }
    }
}

/* Adds the lanes of each accumulator to its output's sum. */
QI_INLINE void add_sums(float *sums, i64 sum_stride, vf acc[ROWS][COLUMNS], const int rows)
{
    float lanes[ROWS * COLUMNS];
    QI_UNROLL(4)
    for (int i = 0; i < rows * COLUMNS; i += QI_VW) {
        vf each[QI_VW];
        QI_UNROLL(16)
        for (int j = 0; j < QI_VW; j++)
            each[j] = i + j < rows * COLUMNS ? acc[(i + j) / COLUMNS][(i + j) % COLUMNS] : vf_set1(0.f);
        vf_store(lanes + i, vf_sum_each(each));
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < COLUMNS; c++) sums[r * sum_stride + c] += lanes[r * COLUMNS + c];
}

/* A tile over the first k of a piece. copy: where w goes widened, or NULL; ahead: rows of w to bring
 * closer meanwhile, or NULL. */
QI_INLINE void multiply_tile(const block *b, float *sums, const float *x, const char *const w[COLUMNS],
                             i64 k, float *copy, const char *const *ahead, const int rows,
                             const qi_dtype wt)
{
    const i64 x_stride = b->x_stride, copy_stride = b->piece + STEP;
    vf acc[ROWS][COLUMNS];
    QI_UNROLL(4)
    for (int r = 0; r < rows; r++) {
        QI_UNROLL(4)
        for (int c = 0; c < COLUMNS; c++) acc[r][c] = vf_set1(0.f);
    }
    i64 i = 0;
    for (; i + STEP <= k; i += STEP) {
        QI_UNROLL(4)
        for (int c = 0; ahead && c < COLUMNS; c++) qi_prefetch(qi_at(ahead[c], wt, i));
        multiply_step(acc, x + i, x_stride, w, i, copy ? copy + i : NULL, copy_stride, rows, wt);
    }
    if (i < k) {
        float last[COLUMNS][STEP] = {{0}};
        const char *lasts[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) {
            qi_widen(last[c], qi_at(w[c], wt, i), wt, k - i);
            lasts[c] = (const char *)last[c];
        }
        multiply_step(acc, x + i, x_stride, lasts, 0, copy ? copy + i : NULL, copy_stride, rows, QI_F32);
    }
    add_sums(sums, b->sum_stride, acc, rows);
}

/* A tile of a widened panel, whatever dtype w has. k is whole steps. */
static void multiply_widened(const block *b, float *sums, const float *x, const float *w, i64 k)
{
    const char *rows[COLUMNS];
    QI_UNROLL(4)
    for (int c = 0; c < COLUMNS; c++) rows[c] = (const char *)(w + c * (b->piece + STEP));
    multiply_tile(b, sums, x, rows, k, NULL, NULL, ROWS, QI_F32);
}

/* The row of w for a column of the block, at k. Columns past the end repeat the last. */
QI_INLINE const char *w_row(const gemm_params *p, const block *b, i64 column, i64 k, const qi_dtype wt)
{
    const i64 n = b->n0 + (column < b->n ? column : b->n - 1);
    return qi_at(p->w, wt, n * p->w_stride + b->k0 + k);
}

/* All row tiles of the panel of w that starts at a column of the block. The first one brings the next
 * panel closer: in rows as short as a few KB the hardware sees no stream to follow. */
QI_INLINE void multiply_panel(const gemm_params *p, const block *b, scratch *s, i64 column,
                              const int rows, const qi_dtype wt)
{
    float *sums = s->sums + column;
    for (i64 k0 = 0; k0 < b->k; k0 += b->piece) {
        const i64 k = b->k - k0 < b->piece ? b->k - k0 : b->piece;
        const char *w[COLUMNS], *next[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) {
            w[c] = w_row(p, b, column + c, k0, wt);
            next[c] = w_row(p, b, column + COLUMNS + c, k0, wt);
        }
        const float *x = s->x + k0;
        if (b->m <= rows) {
            multiply_tile(b, sums, x, w, k, NULL, next, rows, wt);
            continue;
        }
        multiply_tile(b, sums, x, w, k, s->w, next, ROWS, wt);
        for (i64 r = ROWS; r < b->m; r += ROWS)
            multiply_widened(b, sums + r * b->sum_stride, x + r * b->x_stride, s->w,
                             round_up(k, STEP));
    }
}

/* The block's rows of x to scratch: whole tiles of whole steps, filled up with zeros. */
QI_INLINE void widen_rows(const gemm_params *p, const block *b, float *out, const int rows,
                          const qi_dtype t)
{
    const i64 padded = round_up(b->k, STEP);
    for (i64 r = 0; r < round_up(b->m, rows); r++, out += b->x_stride) {
        const i64 k = r < b->m ? b->k : 0;
        if (k) qi_widen(out, qi_at(p->x, t, (b->m0 + r) * p->x_stride + b->k0), t, k);
        for (i64 i = k; i < padded; i++) out[i] = 0.f;
    }
}

static void widen_x(const gemm_params *p, const block *b, float *out, const int rows)
{
    switch (p->dtype_x) {
    case QI_F32: widen_rows(p, b, out, rows, QI_F32); break;
    case QI_F16: widen_rows(p, b, out, rows, QI_F16); break;
    default: widen_rows(p, b, out, rows, QI_BF16); break;
    }
}

static void store_block(const gemm_params *p, const block *b, const float *sums)
{
    for (i64 r = 0; r < b->m; r++) {
        const i64 at = (b->m0 + r) * p->out_stride + b->n0;
        qi_narrow((char *)p->out + at * (i64)qi_size_of(p->dtype_out), p->dtype_out,
                  sums + r * b->sum_stride, b->n);
    }
}

/* Rows [m0, m1), at least one, by columns [n0, n1). */
QI_INLINE void multiply(const gemm_params *p, scratch *s, i64 m0, i64 m1, i64 n0, i64 n1,
                        const int rows, const qi_dtype wt)
{
    const i64 piece = p->k ? even_part(p->k, MAX_K, STEP) : STEP; /* of k alone: it decides the bits */
    const i64 block_m = even_part(m1 - m0, MAX_M, rows);
    const i64 block_n = MAX_SUMS / block_m / COLUMNS * COLUMNS;
    const i64 block_k = (MAX_X / block_m - STEP) / piece * piece;
    block b = {.piece = piece};
    i64 held_m = -1, held_k = -1; /* what s->x holds */
    for (b.n0 = n0; b.n0 < n1; b.n0 += block_n) {
        b.n = n1 - b.n0 < block_n ? n1 - b.n0 : block_n;
        b.sum_stride = round_up(b.n, COLUMNS);
        for (b.m0 = m0; b.m0 < m1; b.m0 += block_m) {
            b.m = m1 - b.m0 < block_m ? m1 - b.m0 : block_m;
            memset(s->sums, 0, (size_t)(round_up(b.m, rows) * b.sum_stride) * sizeof *s->sums);
            for (b.k0 = 0; b.k0 < p->k; b.k0 += block_k) {
                b.k = p->k - b.k0 < block_k ? p->k - b.k0 : block_k;
                b.x_stride = round_up(b.k, STEP) + STEP;
                if (b.m0 != held_m || b.k0 != held_k) widen_x(p, &b, s->x, rows);
                held_m = b.m0;
                held_k = b.k0;
                for (i64 c = 0; c < b.n; c += COLUMNS) multiply_panel(p, &b, s, c, rows, wt);
            }
            store_block(p, &b, s->sums);
        }
    }
}

QI_INLINE void gemm_share(const gemm_params *p, qi_task task, const qi_dtype wt)
{
    i64 m0 = 0, m1 = p->m, n0 = 0, n1 = p->n;
    if (p->m > p->n) qi_task_share(task, p->m, ROWS, &m0, &m1);
    else qi_task_share(task, p->n, COLUMNS, &n0, &n1);
    if (m1 - m0 == 1) multiply(p, task.scratch, m0, m1, n0, n1, 1, wt);
    else if (m0 < m1) multiply(p, task.scratch, m0, m1, n0, n1, ROWS, wt);
}

QI_CPU_KERNEL(gemm)
{
    const gemm_params *p = params;
    switch (p->dtype_w) {
    case QI_F32: gemm_share(p, task, QI_F32); break;
    case QI_F16: gemm_share(p, task, QI_F16); break;
    default: gemm_share(p, task, QI_BF16); break;
    }
}
