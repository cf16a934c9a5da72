/* row.cpu.h - a row between two stages: f32 values in a task's memory, what is known of each chunk of them,
 * and which prefix of the order is still there.
 *
 * A row begins dense: value i is token i's. Where few tokens are left it becomes a list of them, by index. All
 * code but what needs a token's number takes both for an array whose last chunk is filled up with values
 * that are not there. Logits may stay where the caller has them, and weights need not be stored: those of a chunk
 * are made from its logits whenever they are asked for.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ROW_CPU_H
#define QI_ROW_CPU_H

#include "ops/sampling/load.cpu.h"
#include "ops/sampling/team.h"

enum {
    LIST_MAX = 1024,  /* tokens of a list */
    PART_MAX = 65536, /* values that a find looks at closely */
    SAMPLE = 512,     /* values that a find guesses from */
};

typedef struct row {
    const char *raw;   /* where the logits are still, not copied to values yet; NULL: they are */
    const char *ahead; /* the row that the task may have next, to be brought closer; NULL: none */
    qi_dtype dtype;    /* of raw */
    float factor;      /* for raw logits */
    float *values;
    const i32 *index; /* [count] tokens, ascending; NULL: dense */
    float *chunk_max; /* of the values, or of the logits that are to become weights */
    u64 *chunk_mass;
    i64 count;
    i32 kind;        /* ROW_LOGITS or ROW_WEIGHTS */
    int unit;        /* of weights: see weights.h */
    float floor;     /* the tokens of the row are those whose value is at least this */
    float max;       /* of all values */
    u64 mass;        /* of what is there, where it is known */
    int mass_known;  /* of weights */
    int chunk_known; /* chunk_mass is that of what is there */

    int keeps; /* weights are stored when they are made for the first time */

    /* Weights that are not stored: raw or values are logits, of which they are made. */
    int unmade;
    float largest, lowest; /* logits: the row's largest; those below lowest have no weight */
    i64 last; /* of the tokens whose weight is the floor, those up to this place are there */
} row;

/* A task's memory; the arrays of a row have room for whole chunks. */
typedef struct memory {
    team *team; /* with whom the task shares passes over a row */
    i32 task;   /* its index */
    float dense[MAX_VOCAB], order[MAX_VOCAB + CHUNK];
    float chunk_max[MAX_VOCAB / CHUNK];
    u64 chunk_mass[MAX_VOCAB / CHUNK];
    /* of a window: see below */
    u64 chunk_above[MAX_VOCAB / CHUNK];
    i32 part_begin[MAX_VOCAB / CHUNK], part_count[MAX_VOCAB / CHUNK];
    float list[LIST_MAX + 2 * CHUNK], list_max[LIST_MAX / CHUNK + 1];
    i32 index[LIST_MAX + 2 * CHUNK];
    u64 list_mass[LIST_MAX / CHUNK + 1];
    float part[2][2][PART_MAX + CHUNK], sample[2][SAMPLE]; /* of find() */
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
    r->last = r->count;
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

/* Of a chunk's values, those of places after `last` that equal `value` become nothing. last counts from the chunk's
 * first. */
QI_INLINE void drop_equal(float *v, float value, i64 last, float nothing)
{
    for (i64 i = 0; i < CHUNK; i += QI_VW) {
        const vf x = vf_load(v + i);
        const vi after = vi_iota() > (i32)(last - i);
        vf_store(v + i, vf_select((vi)(x == value) & after, vf_set1(nothing), x));
    }
}

/* The same of a row. */
static void drop_after(row *r, float value, i64 last)
{
    for (i64 c = last / CHUNK; c < chunks_of(r->count); c++) {
        float *v = r->values + c * CHUNK;
        if (r->chunk_max[c] < value) continue;
        drop_equal(v, value, last - c * CHUNK, nothing_of(r->kind));
        r->chunk_max[c] = chunk_largest(v);
    }
    r->mass_known = r->chunk_known = 0;
}

/* ---- values that are not in place yet ----------------------------------------------------------- */

QI_INLINE void load_raw(const row *r, i64 c, float *to)
{
    load_chunk_any(to, qi_at(r->raw, r->dtype, c * CHUNK), length_of(r, c), r->factor, NULL,
                   r->dtype, 1);
}

enum { RAW, LOGITS, MADE }; /* what weights are made from; MADE: they are weights */

/* WEIGHTS vectors of logits or weights, lifted. */
QI_INLINE void lift(const row *r, vf x[WEIGHTS], const int from)
{
    if (from != MADE)
        vf_weigh_lifted(x, vf_set1(r->largest));
    else
        FOR_EACH(j) x[j] = vf_max(x[j] * mass_scale(r->unit), vf_set1(0x1p-60f));
}

QI_INLINE void lift_any(const row *r, vf x[WEIGHTS])
{
    if (r->unmade)
        lift(r, x, LOGITS);
    else
        lift(r, x, MADE);
}

/* A chunk's weights, lifted or those of what is there. In a loop of its own, since there are too few registers to keep
 * enough of a longer one under way. */
QI_INLINE void make_chunk(const row *r, i64 c, float *to, const int lifts, const int from,
                          const qi_dtype t)
{
    const int whole = from == RAW && length_of(r, c) == CHUNK, bounded = r->lowest > -LARGEST;
    const int drops = r->floor > LEAST_NORMAL, scales = whole && r->factor != 1.f;
    const char *const raw = from == RAW ? qi_at(r->raw, t, c * CHUNK) : NULL;
    const float *v = r->values + c * CHUNK;
    if (from == RAW && !whole) load_raw(r, c, to), v = to;
    if (from == RAW && r->ahead)
        qi_prefetch_row(qi_at(r->ahead, t, c * CHUNK), length_of(r, c) * (i64)qi_size_of(t));
    for (i64 i = 0; i < CHUNK; i += WEIGHTS * QI_VW) {
        vf x[WEIGHTS];
        if (whole)
            FOR_EACH(j) x[j] = qi_load(qi_at(raw, t, i + j * QI_VW), t);
        else
            FOR_EACH(j) x[j] = vf_load(v + i + j * QI_VW);
        if (scales) FOR_EACH(j) x[j] *= r->factor;
        if (from != MADE && bounded)
            FOR_EACH(j) x[j] = vf_select(x[j] >= r->lowest, x[j], vf_set1(NO_LOGIT));
        if (lifts) {
            lift(r, x, from);
        } else {
            vf_weigh(x, vf_set1(r->largest));
            if (drops) FOR_EACH(j) x[j] = vf_where(x[j] >= r->floor, x[j]);
        }
        FOR_EACH(j) vf_store(to + i + j * QI_VW, x[j]);
    }
}

static void make_any_chunk(const row *r, i64 c, float *to)
{
    if (!r->raw)
        make_chunk(r, c, to, 0, LOGITS, QI_F32);
    else if (r->dtype == QI_F32)
        make_chunk(r, c, to, 0, RAW, QI_F32);
    else if (r->dtype == QI_F16)
        make_chunk(r, c, to, 0, RAW, QI_F16);
    else
        make_chunk(r, c, to, 0, RAW, QI_BF16);
    if (r->last < (c + 1) * CHUNK) drop_equal(to, r->floor, r->last - c * CHUNK, 0.f);
}

/* The values of a chunk: where they are, or in room, which may be their place in the row. */
static const float *chunk_values(const row *r, i64 c, float room[CHUNK])
{
    if (r->unmade)
        make_any_chunk(r, c, room);
    else if (r->raw)
        load_raw(r, c, room);
    else
        return r->values + c * CHUNK;
    return room;
}

static void copy_chunks(void *arg, i64 begin, i64 end)
{
    const row *r = arg;
    for (i64 c = begin; c < end; c++) {
        chunk_values(r, c, r->values + c * CHUNK);
        if (r->unmade) r->chunk_max[c] = chunk_largest(r->values + c * CHUNK);
    }
}

/* All values come into place. */
static void copy_row(memory *m, row *r)
{
    if (!r->raw && !r->unmade) return;
    team_run(m->team, m->task, copy_chunks, r, chunks_of(r->count));
    r->raw = NULL;
    r->unmade = 0;
}

typedef struct scan {
    const row *r;
    int find_bad;
    _Atomic int bad;
} scan;

static void scan_chunks(void *arg, i64 begin, i64 end)
{
    scan *s = arg;
    const row *r = s->r;
    int bad = 0;
    for (i64 c = begin; c < end; c++)
        r->chunk_max[c] = scan_chunk_any(qi_at(r->raw, r->dtype, c * CHUNK), length_of(r, c),
                                         s->find_bad ? &bad : NULL, r->dtype);
    if (bad) atomic_store(&s->bad, 1);
}

/* Maxima of raw logits; returns whether they and their multiples are no larger than a number can be. */
static int scan_row(memory *m, row *r, int *is_bad)
{
    scan s = {.r = r, .find_bad = is_bad != NULL};
    team_run(m->team, m->task, scan_chunks, &s, chunks_of(r->count));
    if (is_bad) *is_bad |= s.bad;
    const float most = largest_of(r->chunk_max, r->count);
    for (i64 c = 0; c < chunks_of(r->count); c++)
        r->chunk_max[c] = temperature_of(r->chunk_max[c], r->factor);
    r->max = temperature_of(most, r->factor);
    return most <= LARGEST && r->factor <= LARGEST && rn_mul(most, r->factor) <= LARGEST;
}

/* ---- what is there ------------------------------------------------------------------------ */

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

/* Adds to n tokens of a list those of chunk c whose value, or logit, is at least the floor. */
QI_INLINE i64 list_chunk(memory *m, const row *r, i64 c, float floor, i64 n, const int from,
                         const qi_dtype t)
{
    for (i64 i = c * CHUNK; i < (c + 1) * CHUNK; i += WEIGHTS * QI_VW) {
        vf x[WEIGHTS];
        vi any = {0};
        FOR_EACH(j)
        {
            const i64 at = i + j * QI_VW;
            if (from == RAW)
                x[j] = qi_load(qi_at(r->raw, t, at), t) * r->factor;
            else
                x[j] = vf_load(r->values + at);
            any |= x[j] >= floor;
        }
        if (!vi_any(any)) continue;
        for (int j = 0; j < WEIGHTS; j++) {
            const i64 at = i + j * QI_VW;
            const u32 bits = vi_bits(x[j] >= floor);
            const vi token = r->index ? vi_load(r->index + at) : (vi)(vi_iota() + (i32)at);
            const vf packed = vf_pack((vf)token, bits);
            vf_store(m->list + n, vf_pack(x[j], bits));
            memcpy(m->index + n, &packed, sizeof packed);
            n += __builtin_popcount(bits);
        }
    }
    return n;
}

static i64 list_any_chunk(memory *m, const row *r, i64 c, float floor, i64 n)
{
    if (!r->raw) return list_chunk(m, r, c, floor, n, LOGITS, QI_F32);
    switch (r->dtype) {
    case QI_F32: return list_chunk(m, r, c, floor, n, RAW, QI_F32);
    case QI_F16: return list_chunk(m, r, c, floor, n, RAW, QI_F16);
    default: return list_chunk(m, r, c, floor, n, RAW, QI_BF16);
    }
}

/* Makes a row the list of its tokens, if they are few enough for one; returns whether they are. Of unmade weights it has
 * those whose logits are not below lowest. */
static int list_row(memory *m, row *r)
{
    if (r->unmade && r->last < r->count) return 0; /* by places in the dense row */
    const float floor = r->unmade ? r->lowest : r->floor;
    i32 visited[MAX_VOCAB / CHUNK];
    i64 chunks = 0, n = 0;
    for (i64 c = 0; c < chunks_of(r->count); c++) {
        visited[chunks] = (i32)c;
        chunks += r->chunk_max[c] >= floor;
    }
    for (i64 i = 0; i < chunks; i++) {
        const i64 c = visited[i], ahead = visited[i + 2 < chunks ? i + 2 : i];
        if (r->raw)
            qi_prefetch_row(qi_at(r->raw, r->dtype, ahead * CHUNK),
                            CHUNK * (i64)qi_size_of(r->dtype));
        if (!r->raw || length_of(r, c) == CHUNK) {
            n = list_any_chunk(m, r, c, floor, n);
        } else {
            load_raw(r, c, r->values + c * CHUNK);
            n = list_chunk(m, r, c, floor, n, LOGITS, QI_F32);
        }
        if (n > LIST_MAX) return 0; /* never of a list */
    }
    const float nothing = r->unmade ? NO_LOGIT : nothing_of(r->kind);
    if (n == 0) m->index[0] = 0, m->list[n++] = nothing; /* for a chunk at least */
    for (i64 i = n; i < chunks_of(n) * CHUNK; i++) m->list[i] = nothing;
    r->raw = NULL;
    r->values = m->list;
    r->index = m->index;
    r->chunk_max = m->list_max;
    r->chunk_mass = m->list_mass;
    r->count = r->last = n;
    r->chunk_known = 0;
    if (r->unmade) {
        copy_chunks(r, 0, chunks_of(n));
        r->unmade = 0;
    }
    r->floor = lowest_of(r->kind);
    for (i64 c = 0; c < chunks_of(n); c++) r->chunk_max[c] = chunk_largest(r->values + c * CHUNK);
    r->max = largest_of(r->chunk_max, n);
    return 1;
}

#endif
