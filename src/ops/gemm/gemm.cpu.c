/* gemm.cpu.c - out = x w^T as dot products of rows.
 *
 * Lane l of an output's one accumulator sums the products of k = l modulo QI_VW in ascending order, and
 * one tree adds the lanes at the end. Every path below keeps to that, so an output's bits depend on its
 * two rows alone: not on m, the blocking, or who its neighbours are (batch invariance).
 *
 * A task owns a range of columns (rows of w). It takes blocks of rows of x, of columns and of k; rows of
 * x are widened to f32 in scratch, rows of w too if several rows of x use them, else they are streamed
 * as they are. A register tile is ROWS x COLUMNS accumulators, whose vectors live on in `partial`
 * between blocks of k.
 *
 * Bound: few rows of x, memory: n * k * size of w; many, multiply-adds: 2 * m * n * k flops, 8 loads
 * for 16 of them.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/simd.h"
#include "ops/gemm/gemm_params.h"

enum {
    COLUMNS = 4,
    ROWS = QI_NUM_VREGS == 32 ? 4 : 2,
    BLOCK_N = 32,     /* columns of a block                                                       */
    FEW_M = ROWS,     /* up to this many rows w is streamed                                       */
    FEW_K = 16384,    /* k of a block then                                                        */
    MANY_M = 64,      /* rows of a block otherwise: w is widened once for all of them             */
    SUB_M = 8,        /* of which so many pass together, so that they and a tile's w stay in L1   */
    MANY_K = 512,     /* k of a block then: x and partial take 128 KB each, w 64 KB               */
};

/* Task scratch. Rows of the widened blocks are padded with zeros to whole vectors. */
typedef struct blocks {
    float partial[MANY_M * BLOCK_N * QI_VW]; /* [row][column] accumulators                        */
    float x[MANY_M * MANY_K > FEW_M * FEW_K ? MANY_M * MANY_K : FEW_M * FEW_K];
    float w[BLOCK_N * MANY_K];
} blocks;
_Static_assert(sizeof(blocks) <= QI_TASK_SCRATCH_BYTES, "blocks live in task scratch");

/* One block of k: [k0, k0 + k), `padded` floats between rows of widened blocks. */
typedef struct span {
    i64 k0, k, padded;
    int first, last;
} span;

/* rows x COLUMNS accumulators over the block of k: x and w point at the tile's rows, already at k0; rows
 * past the edge repeat the last one. */
QI_INLINE void multiply(vf acc[ROWS][COLUMNS], const float *const x[ROWS],
                        const char *const w[COLUMNS], i64 k, const int rows, const qi_dtype wt)
{
    i64 i = 0;
    for (; i + QI_VW <= k; i += QI_VW) {
        vf b[COLUMNS];
        QI_UNROLL(4)
        for (int c = 0; c < COLUMNS; c++) b[c] = qi_load(qi_at(w[c], wt, i), wt);
        QI_UNROLL(4)
        for (int r = 0; r < rows; r++) {
            const vf a = vf_load(x[r] + i);
            QI_UNROLL(4)
            for (int c = 0; c < COLUMNS; c++) acc[r][c] = acc[r][c] + a * b[c];
        }
    }
    if (i < k) {
        QI_UNROLL(4)
        for (int c = 0; c < COLUMNS; c++) {
            const vf b = qi_load_n(qi_at(w[c], wt, i), wt, k - i);
            QI_UNROLL(4)
            for (int r = 0; r < rows; r++) acc[r][c] = acc[r][c] + vf_load(x[r] + i) * b;
        }
    }
}

/* Sums the lanes of each accumulator and stores those of the tile's `rows` x `columns` that exist. */
QI_INLINE void store_tile(const gemm_params *p, vf acc[ROWS][COLUMNS], i64 row, i64 column, i64 rows,
                          i64 columns)
{
    float sums[ROWS * COLUMNS];
    QI_UNROLL(4)
    for (int i = 0; i < ROWS * COLUMNS; i += QI_VW) {
        vf each[QI_VW];
        QI_UNROLL(16)
        for (int j = 0; j < QI_VW; j++) each[j] = acc[(i + j) / COLUMNS][(i + j) % COLUMNS];
        vf_store(sums + i, vf_sum_each(each));
    }
    const i64 size = (i64)qi_size_of(p->dtype_out);
    for (i64 r = 0; r < rows; r++)
        qi_narrow((char *)p->out + ((row + r) * p->out_stride + column) * size, p->dtype_out,
                  sums + r * COLUMNS, columns);
}

/* All tiles of rows [begin, end) of the block of x that starts at row m0, by columns [n0, n0 + n).
 * widened: w is b->w, else streamed. */
QI_INLINE void multiply_block(const gemm_params *p, blocks *b, i64 m0, i64 begin, i64 end, i64 n0, i64 n,
                              const span *s, const int rows, const int widened, const qi_dtype wt)
{
    for (i64 c = 0; c < n; c += COLUMNS) {
        const char *w[COLUMNS];
        for (int i = 0; i < COLUMNS; i++) {
            const i64 column = c + i < n ? c + i : n - 1;
            w[i] = widened ? (const char *)(b->w + column * s->padded)
                           : qi_at(p->w, wt, (n0 + column) * p->w_stride + s->k0);
        }
        for (i64 r = begin; r < end; r += rows) {
            const float *x[ROWS];
            vf acc[ROWS][COLUMNS];
            QI_UNROLL(4)
            for (int i = 0; i < ROWS; i++) {
                x[i] = b->x + (r + i < end && i < rows ? r + i : end - 1) * s->padded;
                QI_UNROLL(4)
                for (int j = 0; j < COLUMNS; j++)
                    acc[i][j] = s->first || i >= rows
                                    ? vf_set1(0.f)
                                    : vf_load(b->partial + ((r + i) * BLOCK_N + c + j) * QI_VW);
            }
            if (widened) multiply(acc, x, w, s->padded, rows, QI_F32);
            else multiply(acc, x, w, s->k, rows, wt);
            if (s->last) {
                store_tile(p, acc, m0 + r, n0 + c, end - r < rows ? end - r : rows,
                           n - c < COLUMNS ? n - c : COLUMNS);
                continue;
            }
            QI_UNROLL(4)
            for (int i = 0; i < rows; i++)
                QI_UNROLL(4)
                for (int j = 0; j < COLUMNS; j++)
                    vf_store(b->partial + ((r + i) * BLOCK_N + c + j) * QI_VW, acc[i][j]);
        }
    }
}

/* Rows [first, first + count) of a matrix, columns of the span, as f32. */
QI_INLINE void widen_rows(float *out, const void *in, const qi_dtype t, i64 stride, i64 first, i64 count,
                          const span *s)
{
    for (i64 r = 0; r < count; r++) {
        float *row = out + r * s->padded;
        qi_widen(row, qi_at(in, t, (first + r) * stride + s->k0), t, s->k);
        for (i64 i = s->k; i < s->padded; i++) row[i] = 0.f;
    }
}

static void widen_x(const gemm_params *p, blocks *b, i64 m0, i64 m, const span *s)
{
    switch (p->dtype_x) {
    case QI_F32: widen_rows(b->x, p->x, QI_F32, p->x_stride, m0, m, s); break;
    case QI_F16: widen_rows(b->x, p->x, QI_F16, p->x_stride, m0, m, s); break;
    default: widen_rows(b->x, p->x, QI_BF16, p->x_stride, m0, m, s); break;
    }
}

/* Columns [begin, end) for the rows of one block of x. */
QI_INLINE void multiply_rows(const gemm_params *p, blocks *b, i64 m0, i64 m, i64 begin, i64 end,
                             const int rows, const int widened, const qi_dtype wt)
{
    const i64 block_k = widened ? MANY_K : FEW_K;
    for (i64 n0 = begin; n0 < end; n0 += BLOCK_N) {
        const i64 n = end - n0 < BLOCK_N ? end - n0 : BLOCK_N;
        i64 k0 = 0;
        do { /* once for k = 0 too: it stores zeros */
            const i64 k = p->k - k0 < block_k ? p->k - k0 : block_k;
            const span s = {.k0 = k0, .k = k, .padded = (k + QI_VW - 1) / QI_VW * QI_VW,
                            .first = k0 == 0, .last = k0 + k == p->k};
            if (n0 == begin || !s.first || !s.last) widen_x(p, b, m0, m, &s);
            if (widened) widen_rows(b->w, p->w, wt, p->w_stride, n0, n, &s);
            for (i64 r = 0; r < m; r += SUB_M)
                multiply_block(p, b, m0, r, m - r < SUB_M ? m : r + SUB_M, n0, n, &s, rows, widened, wt);
            k0 += k;
        } while (k0 < p->k);
    }
}

QI_INLINE void gemm_columns(const gemm_params *p, qi_task task, const qi_dtype wt)
{
    blocks *b = task.scratch;
    i64 begin, end;
    qi_task_share(task, p->n, COLUMNS, &begin, &end);
    if (p->m == 1) multiply_rows(p, b, 0, 1, begin, end, 1, 0, wt);
    else if (p->m <= FEW_M) multiply_rows(p, b, 0, p->m, begin, end, ROWS, 0, wt);
    else
        for (i64 m0 = 0; m0 < p->m; m0 += MANY_M)
            multiply_rows(p, b, m0, p->m - m0 < MANY_M ? p->m - m0 : MANY_M, begin, end, ROWS, 1, wt);
}

QI_CPU_KERNEL(gemm)
{
    const gemm_params *p = params;
    switch (p->dtype_w) {
    case QI_F32: gemm_columns(p, task, QI_F32); break;
    case QI_F16: gemm_columns(p, task, QI_F16); break;
    default: gemm_columns(p, task, QI_BF16); break;
    }
}
