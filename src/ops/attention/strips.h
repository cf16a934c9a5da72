/* strips.h - where the scheduler's strips begin in the line of tiles and which key they take over at, and what
 * a group takes of the line. Included by schedule.c.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_STRIPS_H
#define QI_ATTENTION_STRIPS_H

#include "ops/attention/tiles.h"

/* ---- strips ------------------------------------------------------------------------------- */

typedef struct strips {
    i64 total, size, longer;       /* the first `longer` strips cost size + 1, the others size */
    i32 count, cut_prefill, whole; /* whole: no tile is cut */
    i32 last;                      /* those from here on begin at the line's end; 1 or more */
    i32 pieces; /* each strip is one of so many equal pieces of a tile, which costs as many; 0: strips are equal in cost */
} strips;

/* Where a strip begins in the line; NOWHERE: past the last strip. */
typedef struct mark {
    i64 strip, at;
} mark;

#define NOWHERE 0x7fffffffffffffffLL

/* The first strip, from 1 on, that begins at or after a position; may be past the last. */
static i64 strip_from(const strips *s, i64 position)
{
    const i64 split = s->longer * (s->size + 1);
    const i64 w = position <= split ? quotient(position + s->size, s->size + 1)
                                    : s->longer + quotient(position - split + s->size - 1, s->size);
    return w < 1 ? 1 : w;
}

static i64 begin_of(const strips *s, i64 w)
{
    return w * s->size + (w < s->longer ? w : s->longer);
}

static mark mark_from(const strips *s, i64 position)
{
    mark m = {.strip = strip_from(s, position), .at = NOWHERE};
    if (m.strip < s->count) m.at = begin_of(s, m.strip);
    return m;
}

static void next_strip(const strips *s, mark *m)
{
    m->at += s->size + (m->strip < s->longer);
    if (++m->strip >= s->count) m->at = NOWHERE;
}

/* ---- cuts --------------------------------------------------------------------------------- */

static int may_cut(const strips *s, const tile *t)
{
    return !s->whole && (t->flags == QI_TILE_DECODE || s->cut_prefill);
}

/* The key at which a strip that begins `into` cost units into the tile takes over: the tile's begin
 * or end, or a multiple of cut_align well inside. */
static i32 cut_key(const qi_limits *limits, const tile *t, i64 into, int cut)
{
    const i32 keys = t->kv_end - t->kv_begin, align = limits->cut_align;
    if (into == 0) return t->kv_begin;
    const i32 nearer = into * 2 < t->cost ? t->kv_begin : t->kv_end;
    if (!cut || keys == 0) return nearer;
    const i64 offset =
        into <= limits->cost_visit ? 0 : quotient(into - limits->cost_visit, t->cost_key);
    const u32 middle = (u32)(t->kv_begin + offset + align / 2);
    const i64 key = (i64)(middle / (u32)align) * align;
    const i32 shortest = limits->fixed_cuts ? 0 : align;
    if (key - t->kv_begin <= shortest - 1 || key <= t->kv_begin) return t->kv_begin;
    if (t->kv_end - key <= shortest - 1 || key >= t->kv_end) return t->kv_end;
    return (i32)key;
}

/* Between multiples of cut_align, the parts that a tile's keys have. */
static i32 parts_of(const qi_limits *limits, const tile *t)
{
    const i32 align = limits->cut_align;
    return t->kv_begin == t->kv_end ? 1 : (t->kv_end - 1) / align - t->kv_begin / align + 1;
}

/* So many of them are in each of its pieces but the last, of all groups' that are not cut by strips. */
static i32 parts_of_piece(const qi_limits *limits, const tile *t, i32 pieces)
{
    return (i32)((u32)(parts_of(limits, t) + pieces - 1) / (u32)pieces);
}

/* The key at which piece `i` of a tile begins, of so many. */
static i32 piece_key(const qi_limits *limits, const tile *t, i32 i, i32 pieces)
{
    const i32 align = limits->cut_align;
    const i64 key = ((i64)t->kv_begin / align + (i64)i * parts_of_piece(limits, t, pieces)) * align;
    return i == 0 ? t->kv_begin : key < t->kv_end ? (i32)key : t->kv_end;
}

/* Pieces of a tile of this cost that each cost about as much as `piece`. */
static i32 equal_pieces(const qi_limits *limits, const tile *t, i64 cost, i64 piece)
{
    const i32 parts = parts_of(limits, t);
    const i64 n = quotient(4 * cost + piece, 4 * piece); /* down, but for a last quarter */
    const u32 each = (u32)parts_of_piece(limits, t, n < 1 ? 1 : n < parts ? (i32)n : parts);
    return (i32)(((u32)parts + each - 1) / each);
}

/* ---- groups along the line ------------------------------------------------------------------ */

/* Sums over groups: cost, and of the plan what there is without a cut at a strip's begin; tiles of shared levels, and
 * their cost. */
enum { COST, WORK, MERGES, SLOTS, SHARED, SHARED_COST };
enum { PREFILL, DECODE };

static i32 is_shared(const qi_lengths *in, const qi_group *g)
{
    return g->level + 1 < in->num_levels;
}

/* Fills the group's span, adds it to sums and raises most[] to the cost of its largest tile. piece: what a piece
 * should cost of tiles that strips do not cut; 0: they do. price: what each decode tile costs; 0: what it does. */
static void measure(const qi_lengths *in, const qi_limits *limits, const qi_group *g, i64 piece,
                    i64 price, qi_span *span, i64 *sums, i64 *most)
{
    const i32 tiles = tiles_of(limits, g), decode = is_decode(limits, g);
    i64 cost = 0, repeats = tiles, largest = 0;
    i32 pieces = 1;
    tile t = {.num_rows = 0};
    if (tiles > 0) {
        make_tile(limits, g, tiles - 1, &t);
        largest = cost = t.cost;
        if (decode) {
            if (limits->fixed_cuts) pieces = parts_of(limits, &t);
        } else if (full_tiles(limits, g) > 0) {
            const i64 full = largest_of(limits, g, full_tiles(limits, g));
            if (full > largest) largest = full;
            cost += cost_before(limits, g, full_tiles(limits, g));
        }
        if (piece > 0 && (decode || sees_alike(g))) {
            const i64 mean = decode ? cost : quotient(cost, full_tiles(limits, g) + 1);
            pieces = equal_pieces(limits, &t, mean, piece);
        }
        if (!decode) repeats = heads_of(limits, g);
        if (decode && price > 0) cost = price;
    }
    const i32 partial = pieces > 1 || !(g->flags & QI_GROUP_ALONE);
    span->position = repeats * cost;
    span->cost = cost;
    span->tiles = tiles;
    span->work = tiles * pieces;
    span->merges = partial ? tiles : 0;
    span->slots = partial ? pieces * g->num_rows * limits->group_size * heads_of(limits, g) : 0;
    span->pieces = pieces;
    span->partial = partial;
    span->kv_begin = t.kv_begin;
    span->kv_end = t.kv_end;
    sums[COST] += span->position;
    sums[WORK] += span->work;
    sums[MERGES] += span->merges;
    sums[SLOTS] += span->slots;
    if (is_shared(in, g)) {
        sums[SHARED] += tiles;
        sums[SHARED_COST] += span->position;
    }
    i64 *of_kind = &most[decode ? DECODE : PREFILL];
    if (largest > *of_kind) *of_kind = largest;
}

/* make_tile() of a group that was measured. */
static void tile_at(const qi_lengths *in, const qi_limits *limits, i32 group, i32 index, tile *t)
{
    const qi_group *g = &in->groups[group];
    const qi_span *span = &in->spans[group];
    if (!is_decode(limits, g)) {
        make_prefill_tile(limits, g, index, t);
        return;
    }
    t->flags = QI_TILE_DECODE;
    t->kv_head = (g->kv_head < 0 ? 0 : g->kv_head) + index;
    t->num_kv_heads = limits->split_heads ? 1 : heads_of(limits, g);
    t->num_rows = g->num_rows;
    t->row_begin = g->row_begin;
    t->kv_begin = span->kv_begin;
    t->kv_end = span->kv_end;
    t->cost_key = cost_of_key(limits, t->num_kv_heads, t->num_rows);
    t->cost = span->cost;
}

/* A lane's share of n things. */
typedef struct share {
    i32 begin, end;
} share;

static share share_of(qi_lanes lanes, i32 n)
{
    const i32 each = lanes.count == 1 ? n : (i32)((u32)(n + lanes.count - 1) / (u32)lanes.count);
    const i64 begin = (i64)lanes.id * each;
    share s = {.begin = begin < n ? (i32)begin : n};
    s.end = n - s.begin < each ? n : s.begin + each;
    return s;
}

/* Turns what a lane's spans hold into what stands before them, of which sums is told, and tells each strip in
 * which group it begins. */
static void place(const strips *s, const qi_lengths *in, share groups, const i64 *sums)
{
    i64 position = sums[COST];
    i32 work = (i32)sums[WORK], merges = (i32)sums[MERGES], slots = (i32)sums[SLOTS];
    if (groups.begin == groups.end) return;
    mark m = mark_from(s, position);
    QI_ROLLED
    for (i32 g = groups.begin; g < groups.end; g++) {
        qi_span *span = &in->spans[g];
        const i64 cost = span->position;
        const i32 own_work = span->work, own_merges = span->merges, own_slots = span->slots;
        span->position = position;
        span->work = work;
        span->merges = merges;
        span->slots = slots;
        position += cost;
        work += own_work;
        merges += own_merges;
        slots += own_slots;
        span->strip = m.strip < s->last ? (i32)m.strip : s->last;
        QI_ROLLED
        for (; m.at < position; next_strip(s, &m)) in->strips[m.strip].group = g;
    }
}

#endif
