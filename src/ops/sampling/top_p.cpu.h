/* top_p.cpu.h - top_p in the pass that weighs a row: a sample says beforehand between which two weights the prefix
 * most likely ends, and whether few tokens hold the mass, which are better looked for by the maxima of chunks.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_TOP_P_CPU_H
#define QI_TOP_P_CPU_H

#include "ops/sampling/find.cpu.h"

/* ---- maxima of chunks ------------------------------------------------------------------------- */

/* Brings the maxima of chunks, and what each amounts to, to find()'s memory, up to whole chunks; returns the sum. */
static float amounts_of_maxima(memory *m, const row *r, const int by)
{
    const i64 n = chunks_of(r->count);
    float *const max = m->part[0][0], *const amount = m->part[0][1];
    vf sum = vf_set1(0.f);
    for (i64 c = 0; c < chunks_of(n) * CHUNK; c++) max[c] = c < n ? r->chunk_max[c] : NO_LOGIT;
    for (i64 i = 0; i < chunks_of(n) * CHUNK; i += WEIGHTS * QI_VW) {
        vf x[WEIGHTS];
        FOR_EACH(j) x[j] = vf_load(max + i + j * QI_VW);
        if (by == BY_COUNT)
            FOR_EACH(j) x[j] = vf_where(x[j] > NO_LOGIT, vf_set1(1.f));
        else
            lift_any(r, x);
        FOR_EACH(j)
        {
            vf_store(amount + i + j * QI_VW, x[j]);
            sum += x[j];
        }
    }
    return vf_sum(sum);
}

/* A value that the largest of some chunks reach, which amount to a wish, about, or are at least so many. */
static float bound_of_maxima(memory *m, const row *r, float wish)
{
    const float most = r->unmade ? r->largest : r->max;
    return value_of(guess(m->part[0][0], m->part[0][1], chunks_of(chunks_of(r->count)) * CHUNK,
                          key_of(-LARGEST), key_of(most) + 1, wish, NEAR));
}

/* ---- a sample, and a window ------------------------------------------------------------------- */

/* A sample of a row's weights, lifted. */
static void sample_row(memory *m, const row *r)
{
    const i64 step = r->count / SAMPLE;
    const vf floor = vf_set1(r->floor * mass_scale(r->unit));
    for (i64 i = 0; i < SAMPLE; i += WEIGHTS * QI_VW) {
        vf x[WEIGHTS];
        FOR_EACH(j)
        {
            const i64 at = (i + j * QI_VW) * step;
            if (r->raw)
                x[j] = load_any(r->raw, r->dtype, at, r->count) * r->factor;
            else
                x[j] = vf_load(r->values + at);
            if (r->unmade) x[j] = vf_select(x[j] >= r->lowest, x[j], vf_set1(NO_LOGIT));
        }
        lift_any(r, x);
        FOR_EACH(j)
        {
            vf_store(m->sample[0] + i + j * QI_VW, x[j]);
            vf_store(m->sample[1] + i + j * QI_VW, vf_where(x[j] >= floor, x[j]));
        }
    }
}

/* Whether tokens that fit a list seem to hold a part of the mass: the largest of each chunk, and what a sample says of
 * those far below these. */
static int few_hold(memory *m, const row *r, float part)
{
    const float few = amounts_of_maxima(m, r, BY_MASS), each = (float)r->count / SAMPLE;
    const float far = few / (16.f * (float)chunks_of(r->count));
    vf below = vf_set1(0.f);
    i64 heavy = 0;
    for (i64 i = 0; i < SAMPLE; i += QI_VW) {
        const vf x = vf_load(m->sample[1] + i);
        heavy += __builtin_popcount(vi_bits(x >= far));
        below += vf_where(x < far, x);
    }
    return (float)heavy * each <= LIST_MAX && few >= part * (few + vf_sum(below) * each);
}

/* Brings the values of a window together; returns how many they are. */
static i64 join_window(const window *w, i64 chunks)
{
    i64 n = 0;
    for (i64 c = 0; c < chunks; c++) {
        if (w->begin[c] > n)
            memmove(w->values + n, w->values + w->begin[c], (size_t)w->count[c] * sizeof(float));
        w->begin[c] = (i32)n;
        n += w->count[c];
    }
    for (i64 i = n; i < chunks_of(n) * CHUNK; i++) w->values[i] = NO_LOGIT;
    return n;
}

/* The token of the nth value of a chunk that equals x. */
static i64 token_of(const row *r, i64 c, float x, i64 nth)
{
    float room[CHUNK];
    const float *const v = chunk_values(r, c, room);
    i64 i = 0;
    while ((nth -= v[i] == x) > 0) i++;
    return c * CHUNK + i;
}

/* Of the tokens in a window keeps those of the prefix that ends there. */
static void keep_window(row *r, const window *w, const cut *end)
{
    const float floor = ldexpf(end->value, r->unit - LIFTED);
    i64 last = r->count;
    for (i64 c = 0; c < chunks_of(r->count); c++) {
        const float *const v = w->values + w->begin[c];
        const i64 n = w->count[c], last_here = end->last - w->begin[c];
        const i64 equal_end = last_here < n ? last_here + 1 : n;
        mass_sum sum = {{0}, {0}};
        for (i64 i = 0; i < n; i += QI_VW) {
            const vf x = vf_load(v + i);
            const vi kept = ((vi)(x > end->value) & (vi_iota() < (i32)(n - i))) |
                            ((vi)(x == end->value) & (vi_iota() < (i32)(equal_end - i)));
            const mass_sum mass = mass_parts(x);
            sum.upper += mass.upper & kept;
            sum.lower += mass.lower & kept;
        }
        r->chunk_mass[c] = w->above[c] + mass_total(&sum);
        if (last_here < 0 || last_here >= n) continue;
        i64 equal = 0;
        for (i64 i = 0; i <= last_here; i++) equal += v[i] == end->value;
        last = token_of(r, c, floor, equal);
    }
    if (!r->unmade && last < r->count) drop_after(r, floor, last);
    r->floor = floor;
    r->last = last;
    r->mass_known = r->chunk_known = 1;
}

/* top_p in the pass that weighs the row, which takes out tokens of weights between two that a sample gives. Returns
 * whether the prefix ends among them; the row is weighed either way, unless few tokens hold its mass. */
static int top_p_at_once(memory *m, row *r, float p)
{
    enum { LONG = 16 * SAMPLE };
    u32 pivot[2];
    if (r->count < LONG || r->mass_known) return 0;
    sample_row(m, r);
    if (few_hold(m, r, p)) {
        r->keeps = 0; /* few are asked for again */
        return 0;
    }
    pivots_of_sample(m, key_of(1.f), key_of(0x1p43f), p, 0, pivot);
    const window w = {value_of(pivot[0]), value_of(pivot[1]), m->order,
                      m->part_begin,      m->part_count,      m->chunk_above};
    weigh_row(m, r, &w);
    if (r->mass == 0) return 0;
    u64 above = 0;
    for (i64 c = 0; c < chunks_of(r->count); c++) above += w.above[c];
    const u64 wish = wish_of(r->mass, p);
    const i64 n = join_window(&w, chunks_of(r->count));
    const span s = {w.values, w.values, n, NULL, mass_scale(LIFTED)};
    const u64 within = amount_from(&s, w.low, BY_MASS);
    if (above >= wish || above + within < wish) return 0;
    const bracket b = {pivot[0], pivot[1], wish - above, within, 0};
    const cut end = find_end(m, &s, b, LIFTED, BY_MASS);
    keep_window(r, &w, &end);
    r->mass = above + end.amount;
    return 1;
}

#endif
