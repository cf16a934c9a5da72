/* wgmma.c - a warpgroup's products, a warp's 16 of the 64 rows at a time. They are performed as late as the program
 * allows, when a warp waits for them, all have issued them, and nobody can go on; operands and accumulators are read
 * then: what was released, or is read, before a wait gives wrong results. In random runs half of the groups are
 * performed when the last of the warps commits them.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "floats.h"
#include "grid.h"
#include "shared.h"

enum { M = 16, MAX_K = 32, MAX_N = 256, ROW = 128, ROWS = 8, WARPS_OF_GROUP = 4 };

/* A column of 16 rows: loops over n have no dependence, and need no transposition of b. */
typedef float column __attribute__((vector_size(M * sizeof(float))));

/* ---- tiles in shared memory ------------------------------------------------------------------ */

typedef struct tile {
    const char *window;          /* what addresses are offsets in */
    unsigned start, next, group; /* bytes: to the next tile, to the next 8 rows */
    emulator_type type;
} tile;

/* Of k in a product, 32 bytes of a row. */
static unsigned depth(emulator_type type)
{
    return type == EMULATOR_E4M3 ? 32 : 16;
}

static tile decode(unsigned long long descriptor, emulator_type type)
{
    const tile t = {.window = grid_window(),
                    .start = (unsigned)(descriptor & 0xffff) << 4,
                    .next = (unsigned)(descriptor >> 16 & 0x3fff) << 4,
                    .group = (unsigned)(descriptor >> 32 & 0x3fff) << 4,
                    .type = type};
    const unsigned long long other_bits = 0x3fffull << 16 | 0x3fffull << 32 | 0xffff;
    if ((descriptor & ~other_bits) != 1ull << 62)
        grid_fault("wgmma: descriptor %016llx is not of a tile with 128-byte swizzling",
                   descriptor);
    return t;
}

/* The 16 bytes at an address before swizzling; returns how many elements they are. */
static unsigned read_piece(float *to, const tile *t, unsigned address)
{
    const char *from = t->window + (address ^ (address >> 7 & 7) << 4);
    if (t->type == EMULATOR_E4M3) {
        for (int i = 0; i < 16; i++) to[i] = emulator_from_e4m3((uint8_t)from[i]);
        return 16;
    }
    uint16_t bits[8];
    memcpy(bits, from, sizeof bits);
    if (t->type == EMULATOR_BF16)
        for (int i = 0; i < 8; i++) to[i] = emulator_from_bf16(bits[i]);
    else
        for (int i = 0; i < 8; i++) to[i] = emulator_from_f16(bits[i]);
    return 8;
}

/* Where 8 rows begin, after a look at whether they are there. */
static unsigned rows_at(const tile *t, unsigned address)
{
    if (!grid_is_shared(t->window + address / ROW * ROW, ROWS * ROW))
        grid_fault("wgmma: rows at %u of the shared memory's window, of which the block has others",
                   address);
    return address;
}

/* to[row][depth] of K-major rows, whose first is a multiple of 8. */
static void read_k_major(float *to, const tile *t, unsigned first, unsigned count)
{
    if (t->start % ROW > ROW - 32) grid_fault("wgmma: 32 bytes of k that are not of one row");
    for (unsigned i = 0; i < count; i += ROWS) {
        unsigned at = rows_at(t, t->start + (first + i) / ROWS * t->group);
        for (unsigned row = 0; row < ROWS; row++, at += ROW) {
            to += read_piece(to, t, at);
            to += read_piece(to, t, at + 16);
        }
    }
}

/* to[depth][MAX_N] of MN-major rows, of 16 bits. */
static void read_mn_major(float *to, const tile *t, unsigned n)
{
    if (t->start % ROW) grid_fault("wgmma: rows of n that do not begin at a row of the tile");
    for (unsigned k = 0; k < depth(t->type); k += ROWS)
        for (unsigned i = 0; i < n; i += 64) {
            unsigned at = rows_at(t, t->start + i / 64 * t->next + k / ROWS * t->group);
            for (unsigned row = 0; row < ROWS; row++, at += ROW)
                for (unsigned j = 0; j < 64 && i + j < n; j += 8)
                    read_piece(to + (k + row) * MAX_N + i + j, t, at + 2 * j);
        }
}

/* ---- the warp's matrices ----------------------------------------------------------------------- */

static void read_a_shared(column a[MAX_K], const tile *t, unsigned first)
{
    const unsigned all = depth(t->type);
    float rows[M * MAX_K];
    read_k_major(rows, t, first, M);
    for (unsigned m = 0; m < M; m++)
        for (unsigned k = 0; k < all; k++) a[k][m] = rows[m * all + k];
}

/* Element i of a register. */
static float element(unsigned word, unsigned i, emulator_type type)
{
    if (type == EMULATOR_E4M3) return emulator_from_e4m3(word >> (8 * i) & 0xff);
    const unsigned bits = word >> (16 * i) & 0xffff;
    return type == EMULATOR_BF16 ? emulator_from_bf16(bits) : emulator_from_f16(bits);
}

static void read_a_lane(column a[MAX_K], unsigned lane, const unsigned r[4], emulator_type type)
{
    const unsigned half = depth(type) / 2, of_word = half / 4;
    const unsigned row = lane / 4, k = lane % 4 * of_word;
    for (unsigned i = 0; i < 4; i++)
        for (unsigned j = 0; j < of_word; j++)
            a[k + i / 2 * half + j][row + i % 2 * 8] = element(r[i], j, type);
}

/* Accumulators, kept from one product to the next while their registers are the same. */
static struct {
    column d[MAX_N];
    float *registers[LANES];
    unsigned n; /* 0: none */
} kept;

#define EACH_REGISTER(lane, i, column_, row)                                                       \
    for (unsigned lane = 0; lane < LANES; lane++)                                                  \
        for (unsigned i = 0, row, column_;                                                         \
             i < kept.n / 2 &&                                                                     \
             (row = lane / 4 + i / 2 % 2 * 8, column_ = i / 4 * 8 + lane % 4 * 2 + i % 2, true);   \
             i++)

static void store(void)
{
    EACH_REGISTER(lane, i, n, m) kept.registers[lane][i] = kept.d[n][m];
    kept.n = 0;
}

static void keep(float *const registers[LANES], unsigned n)
{
    if (kept.n == n && memcmp(kept.registers, registers, sizeof kept.registers) == 0) return;
    if (kept.n) store();
    kept.n = n;
    memcpy(kept.registers, registers, sizeof kept.registers);
    EACH_REGISTER(lane, i, column_, m) kept.d[column_][m] = registers[lane][i];
}

/* d += a b; b[n step_n + k step_k]. */
static inline void multiply(const column *a, unsigned depth_, const float *b, unsigned step_n,
                            unsigned step_k)
{
    for (unsigned n = 0; n < kept.n; n += 4) {
        column *d = &kept.d[n];
        column d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
        for (unsigned k = 0; k < depth_; k++) {
            const float *from = b + n * step_n + k * step_k;
            d0 += a[k] * from[0];
            d1 += a[k] * from[step_n];
            d2 += a[k] * from[2 * step_n];
            d3 += a[k] * from[3 * step_n];
        }
        d[0] = d0, d[1] = d1, d[2] = d2, d[3] = d3;
    }
}

/* ---- products --------------------------------------------------------------------------------- */

typedef struct product {
    emulator_wgmma what;
    unsigned group;
} product;

/* Of a thread. */
typedef struct products {
    product *list; /* oldest first */
    unsigned count, room;
    unsigned group; /* the open one */
} products;

static products all[MAX_CLUSTER * MAX_WARPS][LANES];
enum { NUM_WARPGROUPS = MAX_CLUSTER * MAX_WARPS / WARPS_OF_GROUP };
static unsigned performed[NUM_WARPGROUPS]; /* groups */
static unsigned wanted[NUM_WARPGROUPS];    /* by who waits */

static bool same(const emulator_wgmma *x, const emulator_wgmma *y)
{
    return x->n == y->n && x->type == y->type && x->accumulate == y->accumulate &&
           x->registers == y->registers && x->a == y->a && x->b == y->b;
}

/* The i-th product of a warp's lanes. */
static void perform(unsigned warp, unsigned i)
{
    const emulator_wgmma *w = &all[warp][0].list[i].what;
    float *registers[LANES];
    const unsigned k = depth(w->type);
    column a[MAX_K] = {0};
    float b[MAX_K * MAX_N];
    for (unsigned l = 0; l < LANES; l++) {
        const emulator_wgmma *of_lane = &all[warp][l].list[i].what;
        registers[l] = of_lane->d;
        if (w->registers) read_a_lane(a, l, of_lane->a_registers, w->type);
    }
    keep(registers, w->n);
    if (!w->accumulate) memset(kept.d, 0, w->n * sizeof kept.d[0]);
    const tile of_b = decode(w->b, w->type);
    if (!w->registers) {
        const tile of_a = decode(w->a, w->type);
        read_a_shared(a, &of_a, warp % WARPS_OF_GROUP * M);
    }
    if (w->registers && w->type != EMULATOR_E4M3) {
        read_mn_major(b, &of_b, w->n);
        multiply(a, k, b, 1, MAX_N);
    } else {
        read_k_major(b, &of_b, 0, w->n);
        multiply(a, k, b, k, 1);
    }
}

/* How many of a thread's products are of the first `groups` groups. */
static unsigned count_until(const products *p, unsigned groups)
{
    unsigned n = 0;
    while (n < p->count && p->list[n].group < groups) n++;
    return n;
}

/* That all threads of the warpgroup have the same `count` products to perform. */
static void check_same(unsigned first_warp, unsigned groups, unsigned count)
{
    for (unsigned t = 1; t < WARPS_OF_GROUP * LANES; t++) {
        const products *p = &all[first_warp + t / LANES][t % LANES], *of_first = all[first_warp];
        grid_blame(first_warp * LANES + t);
        if (count_until(p, groups) != count)
            grid_fault(
                "wgmma: threads 0 and %u of a warpgroup do not multiply the same number of times",
                t);
        for (unsigned i = 0; i < count; i++)
            if (!same(&p->list[i].what, &of_first->list[i].what))
                grid_fault("wgmma: threads 0 and %u of a warpgroup have different operands", t);
    }
}

/* Groups that all warps of a warpgroup have committed. */
static unsigned committed(unsigned first_warp)
{
    unsigned least = all[first_warp][0].group;
    for (unsigned w = 1; w < WARPS_OF_GROUP; w++)
        if (all[first_warp + w][0].group < least) least = all[first_warp + w][0].group;
    return least;
}

/* What the four warps read, and when it is ready, is one: it is done for all of them. */
static bool perform_groups(unsigned first_warp, unsigned groups)
{
    unsigned *done = &performed[first_warp / WARPS_OF_GROUP];
    if (*done >= groups) return true;
    if (committed(first_warp) < groups) return false;
    const unsigned count = count_until(all[first_warp], groups);
    check_same(first_warp, groups, count);
    for (unsigned w = first_warp; w < first_warp + WARPS_OF_GROUP; w++) {
        grid_blame(w * LANES);
        for (unsigned i = 0; i < count; i++) perform(w, i);
        if (kept.n) store();
        for (unsigned l = 0; l < LANES; l++) {
            products *p = &all[w][l];
            p->count -= count;
            memmove(p->list, p->list + count, p->count * sizeof *p->list);
        }
    }
    grid_blame(NOBODY);
    *done = groups;
    grid_wake(done);
    return true;
}

bool wgmma_perform_awaited(void)
{
    for (unsigned g = 0; g < NUM_WARPGROUPS; g++)
        if (wanted[g] > performed[g] && perform_groups(g * WARPS_OF_GROUP, wanted[g])) return true;
    return false;
}

/* ---- what a warp does ------------------------------------------------------------------------- */

/* Of the running thread's warpgroup. */
static unsigned first_warp_here(void)
{
    return grid_warp() / WARPS_OF_GROUP * WARPS_OF_GROUP;
}

static products *here(void)
{
    return &all[grid_warp()][grid_lane()];
}

void wgmma_add(const emulator_wgmma *what)
{
    products *p = here();
    if (device_arch() != 90) grid_fault("wgmma, which sm_%u has not", device_arch());
    if (p->count == p->room) {
        p->room = p->room ? 2 * p->room : 16;
        p->list = realloc(p->list, p->room * sizeof *p->list);
        if (!p->list) abort();
    }
    p->list[p->count++] = (product){.what = *what, .group = p->group};
}

void wgmma_commit(void)
{
    machine.sync_warp(0xffffffffu, EMULATOR_WGMMA_COMMIT, NULL);
}

void wgmma_collect_commit(unsigned lanes)
{
    const unsigned first_warp = first_warp_here();
    if (lanes != 0xffffffffu) grid_fault("wgmma: some lanes of the warp have ended");
    for (unsigned l = 0; l < LANES; l++) all[grid_warp()][l].group++;
    if (grid_is_random() && grid_random(2)) perform_groups(first_warp, committed(first_warp));
}

void wgmma_wait(unsigned n)
{
    const products *p = here();
    const unsigned first_warp = first_warp_here();
    for (unsigned i = 0; i < p->count; i++)
        if ((char *)p->list[i].what.d < (char *)__builtin_frame_address(0))
            grid_fault("wgmma: its function has returned, and with it the accumulators");
    machine.sync_warp(0xffffffffu, EMULATOR_WGMMA_WAIT, NULL);
    const unsigned g = first_warp / WARPS_OF_GROUP, groups = p->group > n ? p->group - n : 0;
    while (performed[g] < groups) {
        if (wanted[g] < groups) wanted[g] = groups;
        grid_sleep(&performed[g]);
    }
}

bool wgmma_is_awaited(const void *at)
{
    return (const char *)at >= (const char *)performed &&
           (const char *)at < (const char *)performed + sizeof performed;
}

void wgmma_end_thread(void)
{
    if (here()->count) grid_fault("ended before its products (wgmma) had been waited for");
}

void wgmma_begin(unsigned blocks)
{
    for (unsigned t = 0; t < blocks * MAX_THREADS; t++)
        all[t / LANES][t % LANES].count = all[t / LANES][t % LANES].group = 0;
    memset(performed, 0, sizeof performed);
    memset(wanted, 0, sizeof wanted);
    kept.n = 0;
}
