/* row.cpu.h - a row between two stages: f32 values in a task's memory, what is known of each chunk of them,
 * and which prefix of the order is still there.
 *
 * A row begins dense: value i is token i's. Where few tokens are left it becomes a list of them, by index. All
 * code but what needs a token's number takes both for an array whose last chunk is filled up with values
 * that are not there.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ROW_CPU_H
#define QI_ROW_CPU_H

#include "ops/sampling/load.cpu.h"

enum {
    LIST_MAX = 1024,  /* tokens of a list */
    PART_MAX = 65536, /* values that a find looks at closely */
    SAMPLE = 512,     /* values that a find guesses from */
};

typedef struct row {
    const char *raw; /* where the logits are still, not copied to values yet; NULL: they are */
    qi_dtype dtype;  /* of raw */
    float factor;    /* for raw logits */
    float *values;
    const i32 *index; /* [count] tokens, ascending; NULL: dense */
    float *chunk_max;
    u64 *chunk_mass;
    i64 count;
    i32 kind;        /* ROW_LOGITS or ROW_WEIGHTS */
    int unit;        /* of weights: see weights.h */
    float floor;     /* the tokens of the row are those whose value is at least this */
    float max;       /* of all values */
    u64 mass;        /* of what is there, where it is known */
    int mass_known;  /* of weights */
    int chunk_known; /* chunk_mass is that of what is there */
} row;

/* A task's memory; the arrays of a row have room for whole chunks. */
typedef struct memory {
    float dense[MAX_VOCAB], order[MAX_VOCAB];
    float chunk_max[MAX_VOCAB / CHUNK];
    u64 chunk_mass[MAX_VOCAB / CHUNK];
    float list[LIST_MAX + 2 * CHUNK], list_max[LIST_MAX / CHUNK + 1];
    i32 index[LIST_MAX + 2 * CHUNK];
    u64 list_mass[LIST_MAX / CHUNK + 1];
    float part[2][2][PART_MAX + CHUNK], sample[2][SAMPLE]; /* of find() */
    float elements[CHUNK];
} memory;

_Static_assert(sizeof(memory) <= QI_TASK_SCRATCH_BYTES, "rows live in task scratch");

QI_INLINE i64 chunks_of(i64 count)
{
    return (count + CHUNK - 1) / CHUNK;
}

/* The tokens of chunk c of a dense row. */
QI_INLINE i64 length_of(const row *r, i64 c)
{
    return r->count - c * CHUNK < CHUNK ? r->count - c * CHUNK : CHUNK;
}

/* Below all values of tokens. */
QI_INLINE float lowest_of(i32 kind)
{
    return kind == ROW_LOGITS ? -LARGEST : LEAST_NORMAL;
}

/* Keeps what is at least a value. */
static void bound_row(row *r, float floor)
{
    if (floor <= r->floor) return;
    r->floor = floor;
    r->mass_known = r->chunk_known = 0;
}

static float largest_of(const float *chunk_max, i64 count)
{
    float max = chunk_max[0];
    for (i64 c = 1; c < chunks_of(count); c++) max = chunk_max[c] > max ? chunk_max[c] : max;
    return max;
}

/* The maximum of a chunk of values. */
QI_INLINE float chunk_largest(const float *v)
{
    vf max[4];
    QI_UNROLL(4)
    for (int i = 0; i < 4; i++) max[i] = vf_load(v + i * QI_VW);
    for (i64 i = 4 * QI_VW; i < CHUNK; i += 4 * QI_VW) {
        QI_UNROLL(4)
        for (int j = 0; j < 4; j++) max[j] = vf_max(max[j], vf_load(v + i + j * QI_VW));
    }
    return vf_max_lane(vf_max(vf_max(max[0], max[1]), vf_max(max[2], max[3])));
}

/* The values after place `last` that equal `value` become nothing. */
static void drop_after(row *r, float value, i64 last)
{
    const vf nothing = vf_set1(nothing_of(r->kind));
    for (i64 c = last / CHUNK; c < chunks_of(r->count); c++) {
        float *v = r->values + c * CHUNK;
        if (r->chunk_max[c] < value) continue;
        for (i64 i = 0; i < CHUNK; i += QI_VW) {
            const vf x = vf_load(v + i);
            const vi after = vi_iota() > (i32)(last - c * CHUNK - i);
            vf_store(v + i, vf_select((vi)(x == value) & after, nothing, x));
        }
        r->chunk_max[c] = chunk_largest(v);
    }
    r->mass_known = r->chunk_known = 0;
}

/* ---- logits that are not copied yet ------------------------------------------------------------ */

QI_INLINE void load_raw(const row *r, i64 c, float *to)
{
    load_chunk_any(to, qi_at(r->raw, r->dtype, c * CHUNK), length_of(r, c), r->factor, NULL,
                   r->dtype, 1);
}

/* Maxima of raw logits; returns whether they and their multiples are no larger than a number can be. */
static int scan_row(row *r, int *is_bad)
{
    float most = NO_LOGIT;
    for (i64 c = 0; c < chunks_of(r->count); c++) {
        const float max =
            scan_chunk_any(qi_at(r->raw, r->dtype, c * CHUNK), length_of(r, c), is_bad, r->dtype);
        most = max > most ? max : most;
        r->chunk_max[c] = temperature_of(max, r->factor);
    }
    r->max = temperature_of(most, r->factor);
    return most <= LARGEST && r->factor <= LARGEST && rn_mul(most, r->factor) <= LARGEST;
}

static void copy_row(row *r)
{
    if (!r->raw) return;
    for (i64 c = 0; c < chunks_of(r->count); c++) load_raw(r, c, r->values + c * CHUNK);
    r->raw = NULL;
}

/* ---- what is there ------------------------------------------------------------------------ */

/* The mass of each chunk, and of the row. */
static void weigh_row(row *r)
{
    const row this = *r; /* apart from what is stored */
    const vf scale = vf_set1(mass_scale(r->unit));
    u64 mass = 0;
    for (i64 c = 0; c < chunks_of(this.count); c++) {
        exact_sum sum = {0};
        if (this.chunk_max[c] >= this.floor)
            for (i64 i = c * CHUNK; i < (c + 1) * CHUNK; i += QI_VW) {
                const vf v = vf_load(this.values + i);
                exact_add(&sum, vf_mass(vf_where(v >= this.floor, v), scale));
            }
        this.chunk_mass[c] = exact_total(&sum);
        mass += this.chunk_mass[c];
    }
    r->mass = mass;
    r->mass_known = r->chunk_known = 1;
}

/* Values below the floor become nothing. */
static void settle_row(row *r)
{
    const vf nothing = vf_set1(nothing_of(r->kind));
    if (r->floor == lowest_of(r->kind)) return;
    for (i64 c = 0; c < chunks_of(r->count); c++) {
        float *v = r->values + c * CHUNK;
        for (i64 i = 0; i < CHUNK; i += QI_VW) {
            const vf x = vf_load(v + i);
            vf_store(v + i, vf_select(x >= r->floor, x, nothing));
        }
        r->chunk_max[c] = chunk_largest(v);
    }
    r->floor = lowest_of(r->kind);
}

/* Makes the row a list of its tokens, if they are few enough for one; returns whether they are. */
static int list_row(memory *m, row *r)
{
    const float floor = r->floor;
    i64 n = 0;
    for (i64 c = 0; c < chunks_of(r->count); c++) {
        if (r->chunk_max[c] < floor) continue;
        const i64 begin = c * CHUNK;
        const float *v = r->values + begin;
        if (r->raw) load_raw(r, c, m->elements), v = m->elements;
        for (i64 i = 0; i < CHUNK; i += QI_VW) {
            const vf x = vf_load(v + i);
            const u32 bits = vi_bits(x >= floor);
            if (!bits) continue;
            const vi token =
                r->index ? vi_load(r->index + begin + i) : (vi)(vi_iota() + (i32)(begin + i));
            const vf packed = vf_pack((vf)token, bits);
            vf_store(m->list + n, vf_pack(x, bits));
            memcpy(m->index + n, &packed, sizeof packed);
            n += __builtin_popcount(bits);
        }
        if (n > LIST_MAX) return 0; /* never of a list */
    }
    const float nothing = nothing_of(r->kind);
    if (n == 0) m->index[0] = 0, m->list[n++] = nothing; /* for a chunk at least */
    for (i64 i = n; i < chunks_of(n) * CHUNK; i++) m->list[i] = nothing;
    r->raw = NULL;
    r->values = m->list;
    r->index = m->index;
    r->count = n;
    r->chunk_max = m->list_max;
    r->chunk_mass = m->list_mass;
    r->chunk_known = 0;
    r->floor = lowest_of(r->kind);
    for (i64 c = 0; c < chunks_of(n); c++) r->chunk_max[c] = chunk_largest(r->values + c * CHUNK);
    r->max = largest_of(r->chunk_max, n);
    return 1;
}

#endif
