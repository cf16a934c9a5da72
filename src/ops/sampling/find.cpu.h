/* find.cpu.h - where a prefix of the order ends that has so many tokens, or so much mass, exactly and
 * without sorting.
 *
 * Amounts are integers, so the amount of all values from a pivot on is one number however it is added up. Long
 * arrays are narrowed first: a few values of them give two pivots, between which the end most likely is; one pass
 * says what lies above them, and takes out what lies between. Few values are searched by halving
 * the range of the value's bits. That also ends where guesses have failed ROUNDS times, after 32 passes at
 * most; each guess that does not fail leaves one value less, or a part.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_FIND_CPU_H
#define QI_FIND_CPU_H

#include "ops/sampling/masses.cpu.h"

enum {
    CLOSE = 1024,    /* values that are searched by halving */
    CLOSEST = 128,   /* the same of a part of a short range */
    SHORT = 1 << 22, /* keys: half a power of 2, over which a part's values may be spread evenly */
    NEAR = 1 << 10,  /* keys: how exact a guess need be */
    ROUNDS = 8,
};

/* Values by which tokens are ordered, and the weights that their masses are of (NULL: each counts 1), in whole
 * chunks. */
typedef struct span {
    const float *v, *w;
    i64 count;
    const float *chunk_max; /* of v; NULL: not known */
    float mass_scale;
} span;

/* The end of a prefix: all above value, and what equals it up to place `last`; what they amount to. */
typedef struct cut {
    float value;
    i64 last;
    u64 amount;
} cut;

/* What values of a span amount to. */
enum { BY_COUNT, BY_MASS, BY_OTHER_MASS /* w is not v */ };

/* Value i's amount where the mask is set. */
QI_INLINE vf amount_at(const span *s, i64 i, vi mask, const int by)
{
    return by != BY_COUNT ? vf_where(mask, vf_mass(vf_load((by == BY_MASS ? s->v : s->w) + i),
                                                   vf_set1(s->mass_scale)))
                          : vf_where(mask, vf_set1(1.f));
}

/* The amount of chunk c's values of at least `from`. */
QI_INLINE u64 chunk_amount(const span *s, i64 c, float from, const int by)
{
    exact_sum sum = {0};
    vf n = vf_set1(0.f);
    QI_UNROLL(2)
    for (i64 i = c * CHUNK; i < (c + 1) * CHUNK; i += QI_VW) {
        const vf x = amount_at(s, i, vf_load(s->v + i) >= from, by);
        if (by != BY_COUNT)
            exact_add(&sum, x);
        else
            n += x;
    }
    return by != BY_COUNT ? exact_total(&sum) : (u64)vf_sum(n);
}

QI_INLINE u64 amount_from(const span *s, float from, const int by)
{
    u64 amount = 0;
    for (i64 c = 0; c < chunks_of(s->count); c++)
        if (!s->chunk_max || s->chunk_max[c] >= from) amount += chunk_amount(s, c, from, by);
    return amount;
}

/* What is known of where a prefix ends: at a value from low on, below high, as keys. The prefix is to have
 * `wish`; values from low on have at least that, from high on less. */
typedef struct bracket {
    u32 low, high;
    u64 wish, upto, above; /* wished for; from low on; from high on */
} bracket;

/* A key of the range from which on n values amount to a wish, about; up to `close` larger ones may do, too. n fills
 * pairs of vectors. */
static u32 guess(const float *value, const float *amount, i64 n, u32 low, u32 high, float wish,
                 u32 close)
{
    while (high - low > close) {
        const u32 middle = low + (high - low) / 2;
        const float pivot = value_of(middle);
        vf sum[2] = {vf_set1(0.f), vf_set1(0.f)};
        for (i64 i = 0; i < n; i += 2 * QI_VW) {
            QI_UNROLL(2)
            for (int j = 0; j < 2; j++) {
                const i64 at = i + j * QI_VW;
                sum[j] += vf_where(vf_load(value + at) >= pivot, vf_load(amount + at));
            }
        }
        *(vf_sum(sum[0] + sum[1]) >= wish ? &low : &high) = middle;
    }
    return low;
}

/* Two pivots, as keys of the range, between which a prefix most likely ends that has a part of what was sampled. exact:
 * what it most likely ends with. */
static void pivots_of_sample(const memory *m, u32 low, u32 high, float part, int exact,
                             u32 pivot[2])
{
    const float *const v = m->sample[0], *const a = m->sample[1];
    vf sum = vf_set1(0.f), squares[2] = {vf_set1(0.f), vf_set1(0.f)};
    for (i64 i = 0; i < SAMPLE; i += QI_VW) sum += vf_load(a + i);
    const float total = vf_sum(sum), rest = 1.f - part, wish = part * total;
    const u32 middle = guess(v, a, SAMPLE, low, high, wish, exact ? 1 : NEAR);
    pivot[0] = middle;
    pivot[1] = middle + 1;
    if (exact) return;
    for (i64 i = 0; i < SAMPLE; i += QI_VW) {
        const vi is_above = vf_load(v + i) >= value_of(middle);
        const vf x = vf_load(a + i);
        squares[0] = vf_fma(x, vf_where(is_above, x), squares[0]);
        squares[1] = vf_fma(x, vf_where(~is_above, x), squares[1]);
    }
    /* Thrice the standard deviation of the part that is above, were each value drawn by itself. */
    const float error =
        3.f * sqrtf(rest * rest * vf_sum(squares[0]) + part * part * vf_sum(squares[1]));
    pivot[0] = low;
    if (wish + error < total) pivot[0] = guess(v, a, SAMPLE, low, middle + 1, wish + error, NEAR);
    pivot[1] = high;
    if (wish > error) pivot[1] = guess(v, a, SAMPLE, middle, high, wish - error, NEAR) + NEAR;
    if (pivot[1] > high) pivot[1] = high;
}

/* The same where values are spread evenly over the range, about, as they are over a short one. */
static void pivots_of_line(const bracket *r, i64 count, u32 pivot[2])
{
    const float part = (float)(r->wish - r->above) / (float)(r->upto - r->above);
    const float width = (float)(r->high - r->low), error = 0.03f + 2.f / sqrtf((float)count);
    const float from = width * (1.f - part - error), to = width * (1.f - part + error);
    pivot[0] = from > 0.f ? r->low + (u32)from : r->low;
    pivot[1] = to + 1.f < width ? r->low + (u32)to + 1 : r->high;
}

/* The same for what a span has in a bracket. */
QI_INLINE void guess_pivots(memory *m, const span *s, const bracket *r, int exact, u32 pivot[2],
                            const int by)
{
    const i64 vectors = SAMPLE / QI_VW, step = chunks_of(s->count) * (CHUNK / QI_VW) / vectors;
    const float low = value_of(r->low), high = value_of(r->high);
    for (i64 i = 0; i < vectors; i++) {
        const vf v = vf_load(s->v + i * step * QI_VW);
        vf_store(m->sample[0] + i * QI_VW, v);
        vf_store(m->sample[1] + i * QI_VW,
                 amount_at(s, i * step * QI_VW, (vi)(v >= low) & (vi)(v < high), by));
    }
    const float part = (float)(r->wish - r->above) / (float)(r->upto - r->above);
    pivots_of_sample(m, r->low, r->high, part, exact, pivot);
}

/* The amount of what is at least high. Copies the values from low on below that, and their weights if they are
 * others, where there is room (v is not NULL); *n: how many, -1 if they do not fit. */
QI_INLINE u64 part_between(const span *s, float low, float high, float *v, float *w, i64 *n,
                           const int by)
{
    const int weighs = by == BY_OTHER_MASS;
    u64 above = 0;
    i64 count = 0, c = 0;
    for (; v && c < chunks_of(s->count) && count <= PART_MAX; c++) {
        exact_sum sum = {0};
        vf ones = vf_set1(0.f);
        if (s->chunk_max && s->chunk_max[c] < low) continue;
        QI_UNROLL(2)
        for (i64 i = c * CHUNK; i < (c + 1) * CHUNK; i += QI_VW) {
            const vf x = vf_load(s->v + i);
            const vi is_above = x >= high;
            const vf a = amount_at(s, i, is_above, by);
            const u32 bits = vi_bits((vi)(x >= low) & ~is_above);
            if (by != BY_COUNT)
                exact_add(&sum, a);
            else
                ones += a;
            vf_store(v + count, vf_pack(x, bits));
            if (weighs) vf_store(w + count, vf_pack(vf_load(s->w + i), bits));
            count += __builtin_popcount(bits);
        }
        above += by != BY_COUNT ? exact_total(&sum) : (u64)vf_sum(ones);
    }
    *n = v && count <= PART_MAX ? count : -1;
    for (; c < chunks_of(s->count); c++)
        if (!s->chunk_max || s->chunk_max[c] >= high) above += chunk_amount(s, c, high, by);
    for (i64 i = count; i < chunks_of(*n) * CHUNK; i++) {
        if (weighs) w[i] = 0.f;
        v[i] = NO_LOGIT;
    }
    return above;
}

/* Narrows a range over a span. A part that is taken out becomes the span; what is above it, out of the
 * range's amounts, is returned. */
QI_INLINE u64 narrow(memory *m, span *s, bracket *r, const int by)
{
    u64 outside = 0;
    int exact = 0, room = 0;
    for (int round = 0; round < ROUNDS && r->high - r->low > 1; round++) {
        const int even = !s->chunk_max && !exact && r->high - r->low < SHORT;
        u32 pivot[2];
        i64 n;
        if (s->count <= (even ? CLOSEST : CLOSE)) break;
        float *const v = m->part[room][0], *const w = m->part[room][1];
        if (even)
            pivots_of_line(r, s->count, pivot);
        else
            guess_pivots(m, s, r, exact, pivot, by);
        const float low = value_of(pivot[0]), high = value_of(pivot[1]);
        const int one = pivot[1] - pivot[0] == 1; /* value: none to choose from */
        const u64 above = part_between(s, low, high, one ? NULL : v, w, &n, by);
        const span part = {v, w, n, NULL, s->mass_scale};
        const u64 within = n < 0 ? amount_from(s, low, by) - above : amount_from(&part, low, by);
        exact = 0;
        if (above >= r->wish) {
            r->low = pivot[1];
            r->upto = above;
        } else if (above + within < r->wish) {
            r->high = pivot[0];
            r->above = above + within;
        } else {
            r->low = pivot[0];
            r->high = pivot[1];
            r->upto = above + within;
            r->above = above;
            exact = n < 0;
            if (exact) continue;
            *s = part;
            room = !room;
            outside += above;
            r->wish -= above;
            r->upto -= above;
            r->above = 0;
        }
    }
    return outside;
}

/* The place of the value at which values equal to it, from the first on, amount to a wish; the amount
 * then. */
QI_INLINE i64 place_of(const span *s, float value, u64 wish, int unit, u64 *amount, const int by)
{
    const float next = value_of(key_of(value) + 1);
    *amount = 0;
    for (i64 c = 0; c < chunks_of(s->count); c++) {
        if (s->chunk_max && s->chunk_max[c] < value) continue;
        const u64 here = chunk_amount(s, c, value, by) - chunk_amount(s, c, next, by);
        if (*amount + here < wish) {
            *amount += here;
            continue;
        }
        for (i64 i = c * CHUNK; i < (c + 1) * CHUNK; i++) {
            if (!(s->v[i] >= value && s->v[i] < next)) continue;
            *amount += by == BY_COUNT ? 1 : mass_of(s->w[i], unit);
            if (*amount >= wish) return i;
        }
    }
    return MAX_VOCAB; /* not reached: they amount to the wish */
}

/* The shortest prefix with an amount of at least r->wish, given what is known of where it ends. */
QI_INLINE cut find_end(memory *m, const span *all, bracket r, int unit, const int by)
{
    span s = *all;
    const u64 wish = r.wish;
    const u64 outside = narrow(m, &s, &r, by);
    while (r.high - r.low > 1) {
        const u32 middle = r.low + (r.high - r.low) / 2;
        const u64 amount = amount_from(&s, value_of(middle), by);
        if (amount >= r.wish)
            r.low = middle;
        else
            r.high = middle, r.above = amount;
    }
    cut end = {value_of(r.low), MAX_VOCAB, 0};
    const u64 above = outside + r.above;
    const u64 equal = amount_from(&s, end.value, by) - r.above;
    end.amount = above + equal;
    if (by == BY_OTHER_MASS) {
        end.last = place_of(all, end.value, wish - above, unit, &end.amount, by);
        end.amount += above;
        return end;
    }
    const u64 each = by == BY_COUNT ? 1 : mass_of(end.value, unit);
    const u64 rank = (wish - above + each - 1) / each;
    if (rank * each == equal) return end;
    u64 count;
    end.last = place_of(all, end.value, rank, unit, &count, BY_COUNT);
    end.amount = above + rank * each;
    return end;
}

#endif
