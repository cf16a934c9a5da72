/* warp.c - what the lanes of a warp do together, from the operands of all of them.
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "floats.h"
#include "grid.h"

#define EACH_LANE(l, lanes)                                                                        \
    for (unsigned rest_of_##l = (lanes), l;                                                        \
         rest_of_##l && (l = (unsigned)__builtin_ctz(rest_of_##l), 1);                             \
         rest_of_##l &= rest_of_##l - 1)

static void shuffle(void *const operands[LANES], unsigned lanes)
{
    EACH_LANE(l, lanes)
    {
        emulator_shuffle *s = operands[l];
        if (s->source < 0 || s->source >= LANES || !(lanes >> s->source & 1))
            grid_fault("shuffle: lane %u reads lane %d, which is not there (lanes %08x)", l,
                       s->source, lanes);
        s->result = ((const emulator_shuffle *)operands[s->source])->value;
    }
}

static void vote(void *const operands[LANES], unsigned lanes)
{
    unsigned ballot = 0;
    EACH_LANE(l, lanes) ballot |= (unsigned)(((emulator_vote *)operands[l])->predicate != 0) << l;
    EACH_LANE(l, lanes)((emulator_vote *)operands[l])->ballot = ballot;
}

static void match(void *const operands[LANES], unsigned lanes)
{
    EACH_LANE(l, lanes)
    {
        emulator_match *m = operands[l];
        m->lanes = 0;
        EACH_LANE(other, lanes)
        m->lanes |= (unsigned)(((emulator_match *)operands[other])->value == m->value) << other;
    }
}

static unsigned combine(emulator_reduction by, unsigned a, unsigned b)
{
    switch (by) {
    case EMULATOR_ADD: return a + b;
    case EMULATOR_MIN: return a < b ? a : b;
    case EMULATOR_MAX: return a > b ? a : b;
    case EMULATOR_MIN_SIGNED: return (int)a < (int)b ? a : b;
    case EMULATOR_MAX_SIGNED: return (int)a > (int)b ? a : b;
    case EMULATOR_AND: return a & b;
    case EMULATOR_OR: return a | b;
    default: return a ^ b;
    }
}

static void reduce(void *const operands[LANES], unsigned lanes)
{
    const emulator_reduce *first = operands[__builtin_ctz(lanes)];
    unsigned result = first->value;
    EACH_LANE(l, lanes & (lanes - 1))
    {
        const emulator_reduce *r = operands[l];
        if (r->by != first->by) grid_fault("__reduce_sync: lanes ask for different reductions");
        result = combine(first->by, result, r->value);
    }
    EACH_LANE(l, lanes)((emulator_reduce *)operands[l])->result = result;
}

/* ---- 8x8 matrices of 16-bit elements ----------------------------------------------------------- */

enum { SIDE = 8 };

static void all_lanes(unsigned lanes, const char *what)
{
    if (lanes != 0xffffffffu) grid_fault("%s: some lanes are not there (lanes %08x)", what, lanes);
}

/* Lane l of a matrix has elements 2 (l % 4) and the next of row l / 4. */
static unsigned fragment(uint16_t m[SIDE][SIDE], unsigned lane, bool trans)
{
    const unsigned row = lane / 4, column = lane % 4 * 2;
    return trans ? m[column][row] | (unsigned)m[column + 1][row] << 16
                 : m[row][column] | (unsigned)m[row][column + 1] << 16;
}

static void ldmatrix(void *const operands[LANES], unsigned lanes, bool trans)
{
    all_lanes(lanes, "ldmatrix");
    const int count = ((const emulator_ldmatrix *)operands[0])->count;
    for (int i = 0; i < count; i++) {
        uint16_t m[SIDE][SIDE];
        for (int row = 0; row < SIDE; row++) {
            const void *from = ((const emulator_ldmatrix *)operands[i * SIDE + row])->row;
            if ((uintptr_t)from % sizeof m[0] || !grid_is_shared(from, sizeof m[0]))
                grid_fault("ldmatrix: lane %d's row at %p is not 16 aligned bytes of shared memory",
                           i * SIDE + row, from);
            memcpy(m[row], from, sizeof m[row]);
        }
        for (unsigned l = 0; l < LANES; l++)
            ((emulator_ldmatrix *)operands[l])->r[i] = fragment(m, l, trans);
    }
}

static void stmatrix(void *const operands[LANES], unsigned lanes)
{
    all_lanes(lanes, "stmatrix");
    const int count = ((const emulator_stmatrix *)operands[0])->count;
    for (int i = 0; i < count; i++)
        for (int row = 0; row < SIDE; row++) {
            unsigned words[SIDE / 2];
            void *to = ((const emulator_stmatrix *)operands[i * SIDE + row])->row;
            if ((uintptr_t)to % sizeof words || !grid_is_shared(to, sizeof words))
                grid_fault("stmatrix: lane %d's row at %p is not 16 aligned bytes of shared memory",
                           i * SIDE + row, to);
            for (int l = 0; l < SIDE / 2; l++)
                words[l] = ((const emulator_stmatrix *)operands[row * SIDE / 2 + l])->r[i];
            memcpy(to, words, sizeof words);
        }
}

static void movmatrix(void *const operands[LANES], unsigned lanes)
{
    all_lanes(lanes, "movmatrix");
    uint16_t m[SIDE][SIDE];
    for (int l = 0; l < LANES; l++) {
        const unsigned value = ((const emulator_movmatrix *)operands[l])->value;
        m[l / 4][l % 4 * 2] = (uint16_t)value;
        m[l / 4][l % 4 * 2 + 1] = (uint16_t)(value >> 16);
    }
    for (unsigned l = 0; l < LANES; l++)
        ((emulator_movmatrix *)operands[l])->result = fragment(m, l, true);
}

/* ---- m16n8k16 ---------------------------------------------------------------------------------- */

enum { M = 16, N = 8, K = 16 };

static void unpack(float *low, float *high, unsigned pair, bool bf16)
{
    *low = bf16 ? emulator_from_bf16(pair & 0xffff) : emulator_from_f16(pair & 0xffff);
    *high = bf16 ? emulator_from_bf16(pair >> 16) : emulator_from_f16(pair >> 16);
}

/* Products are exact in f32; the sums, which tensor cores form in an order and a width of their own, are
 * f32's in the order of k. */
static void mma(void *const operands[LANES], unsigned lanes, bool bf16)
{
    all_lanes(lanes, "mma");
    float a[M][K], b[K][N], d[M][N];
    for (int l = 0; l < LANES; l++) {
        const emulator_mma *o = operands[l];
        const int g = l / 4, c = l % 4 * 2;
        for (int i = 0; i < 4; i++) {
            float *at = &a[g + i % 2 * 8][c + i / 2 * 8];
            unpack(at, at + 1, o->a[i], bf16);
            d[g + i / 2 * 8][c + i % 2] = o->d[i];
        }
        for (int i = 0; i < 2; i++) unpack(&b[c + i * 8][g], &b[c + i * 8 + 1][g], o->b[i], bf16);
    }
    for (int m = 0; m < M; m++)
        for (int k = 0; k < K; k++)
            for (int n = 0; n < N; n++) d[m][n] += a[m][k] * b[k][n];
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < 4; i++)
            ((emulator_mma *)operands[l])->d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

const char *const warp_op_names[EMULATOR_NUM_OPS] = {
    "__syncwarp", "__shfl_sync",        "__ballot_sync",   "__match_any_sync", "__reduce_sync",
    "ldmatrix",   "ldmatrix.trans",     "stmatrix",        "movmatrix",        "mma (f16)",
    "mma (bf16)", "wgmma.commit_group", "wgmma.wait_group"};

void warp_perform(emulator_op op, void *const operands[LANES], unsigned lanes)
{
    switch (op) {
    case EMULATOR_SHUFFLE: shuffle(operands, lanes); break;
    case EMULATOR_VOTE: vote(operands, lanes); break;
    case EMULATOR_MATCH: match(operands, lanes); break;
    case EMULATOR_REDUCE: reduce(operands, lanes); break;
    case EMULATOR_LDMATRIX: ldmatrix(operands, lanes, false); break;
    case EMULATOR_LDMATRIX_TRANS: ldmatrix(operands, lanes, true); break;
    case EMULATOR_STMATRIX: stmatrix(operands, lanes); break;
    case EMULATOR_MOVMATRIX: movmatrix(operands, lanes); break;
    case EMULATOR_MMA_F16: mma(operands, lanes, false); break;
    case EMULATOR_MMA_BF16: mma(operands, lanes, true); break;
    case EMULATOR_WGMMA_COMMIT: wgmma_collect_commit(lanes); break;
    default: break;
    }
}
