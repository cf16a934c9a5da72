/* masses.cpu.h - softmax, and what each chunk of a row of weights amounts to, whether these are stored or not.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_MASSES_CPU_H
#define QI_MASSES_CPU_H

#include "ops/sampling/row.cpu.h"

/* Softmax of a row; a list's weights are made now. */
static void soften_row(row *r)
{
    r->largest = r->max;
    r->lowest = r->floor;
    r->last = r->count;
    r->kind = ROW_WEIGHTS;
    r->unit = EXPONENT_BIAS;
    r->floor = LEAST_NORMAL;
    r->max = r->largest > NO_LOGIT ? 1.f : 0.f;
    r->mass_known = r->chunk_known = 0;
    r->unmade = 1;
    if (!r->index) return;
    copy_chunks(r, 0, chunks_of(r->count));
    r->unmade = 0;
}

/* A closer look at some of a row's weights: those lifted ones from low on below high. */
typedef struct window {
    float low, high;
    float *values;      /* room for as many as the row's */
    i32 *begin, *count; /* where those of each chunk begin, and how many they are */
    u64 *above;         /* the mass that each chunk has above them */
} window;

typedef struct weighing {
    row *r;
    const window *window; /* NULL: none */
} weighing;

QI_INLINE u64 sum_chunk(const float *x)
{
    mass_sum sum = {{0}, {0}};
    QI_UNROLL(4)
    for (i64 i = 0; i < CHUNK; i += QI_VW) {
        const mass_sum mass = mass_parts(vf_load(x + i));
        sum.upper += mass.upper;
        sum.lower += mass.lower;
    }
    return mass_total(&sum);
}

/* The same, and what it has above a window and in it; that goes to w->values from `at` on, and no further than as many
 * values as there were. */
QI_INLINE u64 split_chunk(const float *x, const window *w, i64 c, i64 at)
{
    mass_sum sum = {{0}, {0}}, above = {{0}, {0}};
    float *const to = w->values + at;
    i64 n = 0;
    QI_UNROLL(4)
    for (i64 i = 0; i < CHUNK; i += QI_VW) {
        const vf v = vf_load(x + i);
        const mass_sum mass = mass_parts(v);
        const vi is_above = v >= w->high;
        const u32 bits = vi_bits((vi)(v >= w->low) ^ is_above); /* one is part of the other */
        sum.upper += mass.upper;
        sum.lower += mass.lower;
        above.upper += mass.upper & is_above;
        above.lower += mass.lower & is_above;
        vf_store(to + n, vf_pack(v, bits));
        n += __builtin_popcount(bits);
    }
    w->begin[c] = (i32)at;
    w->count[c] = (i32)n;
    w->above[c] = mass_total(&above);
    return mass_total(&sum);
}

/* The masses of chunks. */
QI_INLINE void weigh_chunks(const row *row_, const window *w, i64 begin, i64 end, const int from,
                            const qi_dtype t)
{
    const row r = *row_; /* apart from what is stored */
    const vf floor = vf_set1(r.floor * mass_scale(r.unit));
    i64 at = begin * CHUNK;
    for (i64 c = begin; c < end; c++) {
        float x[CHUNK];
        r.chunk_mass[c] = 0;
        if (w) w->above[c] = 0, w->begin[c] = (i32)at, w->count[c] = 0;
        if (r.chunk_max[c] < (from == MADE ? r.floor : r.lowest)) continue;
        make_chunk(&r, c, x, 1, from, t);
        if (r.floor > LEAST_NORMAL)
            for (i64 i = 0; i < CHUNK; i += QI_VW) {
                const vf v = vf_load(x + i);
                vf_store(x + i, vf_select(v >= floor, v, vf_set1(0x1p-60f)));
            }
        r.chunk_mass[c] = w ? split_chunk(x, w, c, at) : sum_chunk(x);
        if (w) at += w->count[c];
    }
}

static void weigh_any_chunks(void *arg, i64 begin, i64 end)
{
    row *r = ((weighing *)arg)->r;
    const window *w = ((weighing *)arg)->window;
    if (r->unmade && r->keeps) {
        row made = *r;
        made.raw = NULL;
        made.unmade = 0;
        for (i64 c = begin; c < end; c++) {
            copy_chunks(r, c, c + 1);
            weigh_chunks(&made, w, c, c + 1, MADE, QI_F32);
        }
        return;
    }
#define WEIGH(from, t)                                                                             \
    (w ? weigh_chunks(r, w, begin, end, from, t) : weigh_chunks(r, NULL, begin, end, from, t))
    if (!r->unmade)
        WEIGH(MADE, QI_F32);
    else if (!r->raw)
        WEIGH(LOGITS, QI_F32);
    else if (r->dtype == QI_F32)
        WEIGH(RAW, QI_F32);
    else if (r->dtype == QI_F16)
        WEIGH(RAW, QI_F16);
    else
        WEIGH(RAW, QI_BF16);
#undef WEIGH
}

/* The mass of each chunk, and of the row; a closer look at what is in a window, if there is one. */
static void weigh_row(memory *m, row *r, const window *w)
{
    if (r->unmade && r->last < r->count) copy_row(m, r);
    weighing all = {r, w};
    team_run(m->team, m->task, weigh_any_chunks, &all, chunks_of(r->count));
    if (r->keeps) r->raw = NULL, r->unmade = 0;
    r->mass = 0;
    for (i64 c = 0; c < chunks_of(r->count); c++) r->mass += r->chunk_mass[c];
    r->mass_known = r->chunk_known = 1;
}

#endif
