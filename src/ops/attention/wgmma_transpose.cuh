/* wgmma_transpose.cuh - the warps that turn values of 8 bits for the Hopper tile: products of e4m3 read the keys of a dim
 * side by side, while memory has the dims of a key so.
 *
 * A block of values becomes rows of keys, a row a dim. Of 16 neighbouring keys byte 4 c + b of a row is key
 * 8 (b / 2) + 2 c + b % 2: those of which lane c of a quad has the weights, as the product of keys leaves them.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_WGMMA_TRANSPOSE_CUH
#define QI_ATTENTION_WGMMA_TRANSPOSE_CUH

#include "ops/attention/wgmma_items.cuh"

/* A warp turns 32 keys of a block, of small blocks only some of the dims; 16 dims at a time, so many before it stores the
 * first of them. */
enum { KEY_UNITS = KEYS / 32, DIM_UNITS = COLUMNS / 16 * KEY_UNITS / 4, AT_ONCE = 2 };
_Static_assert(!FP8 || (TRANSPOSERS % KEY_UNITS == 0 && DIM_UNITS % AT_ONCE == 0),
               "all of a block");

/* The warp's part of a block of values v to `turned`; only keys [begin, end) of the block are the item's: the others
 * become zeros, since a weight of 0 times what lies there may be NaN.
 *
 * ldmatrix gives lane 4 g + c two neighbouring dims, 2 g and the next, of keys 2 c and the next. Bytes of two matrices
 * make four keys of one dim, which stmatrix stores, even dims as one matrix and odd ones as the other; in each of them the
 * upper lanes do the other kind, so that its eight rows are of dims that differ in their last three bits, which means
 * in their banks. */
QI_INLINE void transpose_keys(const char *v, char *turned, const uint4 *zeros, int number,
                              int begin, int end)
{
    const int lane = tid_x() % WARP, first_dims = number / KEY_UNITS * DIM_UNITS;
    const int key = number % KEY_UNITS * 32 + lane, seen = key >= begin && key < end;
    const u32 even = 0x6420, odd = 0x7531, first = lane < WARP / 2 ? even : odd;
    /* Lane 8 m + i stores row i of matrix m, of keys m / 2. */
    const int dim = lane % 8 * 2 + (lane / 8 % 2 ^ lane % 8 / 4), piece = key / 16;
    char *to = turned + (first_dims * 16 + dim) * 128 + ((piece ^ dim) & 7) * 16;
#pragma unroll
    for (int i = 0; i < DIM_UNITS; i += AT_ONCE) {
        u32 x[AT_ONCE][4], y[4];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int unit = first_dims + i + j;
            const char *row = v + unit / 8 * KV_CHUNK_BYTES + key * 128 + ((unit ^ lane) & 7) * 16;
            ldmatrix_x4_trans(x[j], seen ? (const void *)row : zeros);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
#pragma unroll
            for (int h = 0; h < 4; h += 2) {
                y[h] = __byte_perm(x[j][h], x[j][h + 1], first);
                y[h + 1] = __byte_perm(x[j][h], x[j][h + 1], first ^ even ^ odd);
            }
            stmatrix_x4(to + (i + j) * 16 * 128, y);
        }
    }
}

/* All items' values, as the warp `number` of TRANSPOSERS. */
QI_INLINE void transpose_items(const wgmma_params *p, char *shared, int number)
{
    tile_barriers *b = barriers_of(shared);
    ring note = {0, 0}, at = {0, 0}; /* a place of both rings */
#pragma unroll 1
    for (;; ring_next(&note, WGMMA_NOTES)) {
        const qi_work *w = &item_notes(shared, note.stage)->work;
        mbarrier_wait(&b->noted[note.stage], note.parity);
        if (w->num_rows == 0) return;
        const int begin = w->kv_begin, end = w->kv_end;
        forget_item(b, note.stage);
#pragma unroll 1
        for (int first = first_key(p, begin); first < end; first += KEYS) {
            const char *v = shared + V_AT + at.stage * V_BYTES;
            char *turned = shared + TURNED_AT + at.stage * TURNED_BYTES;
            mbarrier_wait(&b->v_full[at.stage], at.parity);
            mbarrier_wait(&b->turned_empty[at.stage], at.parity ^ 1);
            transpose_keys(v, turned, &b->zeros, number, begin - first, end - first);
            fence_proxy_async();
            __syncwarp();
            if (tid_x() % WARP == 0) {
                mbarrier_arrive(&b->v_empty[at.stage]);
                mbarrier_arrive(&b->turned_full[at.stage]);
            }
            ring_next(&at, STAGES);
        }
    }
}

#endif
