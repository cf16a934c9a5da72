/* schedule.c - cut one line of tiles into equal strips. No libc; see schedule.h for the contract.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/schedule.h"

/* The two primitives that lanes share, collectively. The host is one lane, with none below it; who
 * runs more lanes brings a scan_add() and max_all() of its own.
 * scan_add: the sum over lower lanes; *total: over all. */
#ifndef QI_SCHEDULE_LANES
static i64 scan_add(qi_lanes lanes, i64 value, i64 *total)
{
    (void)lanes;
    *total = value;
    return 0;
}

static i64 max_all(qi_lanes lanes, i64 value)
{
    (void)lanes;
    return value;
}
#endif

/* ---- tiles: a line of them, group by group, head by head ----------------------------------- */

typedef struct tile {
    const qi_group *of;
    i32 group, row_begin, num_rows, kv_head, num_kv_heads, flags;
    i32 kv_begin, kv_end;
    i64 cost;
} tile;

static i32 heads_of(const qi_limits *limits, const qi_group *g)
{
    return g->kv_head < 0 ? limits->num_kv_heads : 1;
}

static i32 tiles_of(const qi_limits *limits, const qi_group *g)
{
    if (g->num_rows == 0) return 0;
    if (g->num_rows <= limits->decode_rows) return limits->split_heads ? heads_of(limits, g) : 1;
    return heads_of(limits, g) * ((g->num_rows - 1) / limits->tile_rows + 1);
}

static i64 rows_of(const qi_limits *limits, const tile *t)
{
    return (i64)t->num_rows * limits->group_size * t->num_kv_heads;
}

/* Tile number `index` of a group. */
static tile make_tile(const qi_lengths *in, const qi_limits *limits, i32 group, i32 index)
{
    const qi_group *g = &in->groups[group];
    tile t = {.of = g,
              .group = group,
              .flags = QI_TILE_DECODE,
              .kv_head = g->kv_head < 0 ? 0 : g->kv_head,
              .num_kv_heads = heads_of(limits, g)};
    i32 row = 0;
    t.num_rows = g->num_rows;
    if (g->num_rows <= limits->decode_rows) {
        if (limits->split_heads) {
            t.kv_head += index;
            t.num_kv_heads = 1;
        }
    } else {
        const i32 per_head = (g->num_rows - 1) / limits->tile_rows + 1;
        row = index % per_head * limits->tile_rows;
        t.num_rows = g->num_rows - row < limits->tile_rows ? g->num_rows - row : limits->tile_rows;
        t.kv_head += index / per_head;
        t.num_kv_heads = 1;
        t.flags = QI_TILE_PREFILL;
    }
    t.row_begin = g->row_begin + row;
    if (g->flags & QI_GROUP_SPARSE) {
        t.kv_end = g->kv_len;
    } else {
        i64 first = g->pos_first, last = g->pos_last;
        if (!(g->flags & QI_GROUP_MIXED)) {
            first += row;
            last = first + t.num_rows - 1;
        }
        qi_visible(limits, g->kv_len, first - g->kv_offset, last - g->kv_offset, &t.kv_begin,
                   &t.kv_end);
    }
    t.cost = limits->cost_visit +
             (i64)t.num_kv_heads * (t.kv_end - t.kv_begin) *
                 (limits->cost_key + (i64)t.num_rows * limits->group_size * limits->cost_pair);
    return t;
}

/* A position in the line; lanes take every count-th tile from id on. */
typedef struct cursor {
    i32 group, index, tiles; /* the tile, and how many its group has */
} cursor;

/* Moves `steps` tiles on; 0 past the end. The first call starts from {-1, 0, 0}. */
static int advance(const qi_lengths *in, const qi_limits *limits, cursor *at, i32 steps)
{
    i64 index = (i64)at->index + steps;
    while (index >= at->tiles) {
        index -= at->tiles;
        if (++at->group >= in->num_groups) return 0;
        at->tiles = tiles_of(limits, &in->groups[at->group]);
    }
    at->index = (i32)index;
    return 1;
}

/* ---- strips -------------------------------------------------------------------------------- */

typedef struct strips {
    i64 total, size, longer; /* the first `longer` strips cost size + 1, the others size */
    i32 count, cut_prefill;
} strips;

/* Where strip w begins in the line. */
static i64 strip_begin(const strips *s, i64 w)
{
    return w * s->size + (w < s->longer ? w : s->longer);
}

/* The first strip, from 1 on, that begins at or after a position; may be past the last. */
static i64 strip_from(const strips *s, i64 position)
{
    const i64 split = s->longer * (s->size + 1);
    i64 w;
    if (position <= split)
        w = (position + s->size) / (s->size + 1);
    else if (s->size == 0)
        w = s->count;
    else
        w = s->longer + (position - split + s->size - 1) / s->size;
    return w < 1 ? 1 : w;
}

static int may_cut(const strips *s, const qi_limits *limits, const tile *t)
{
    return t->flags == QI_TILE_DECODE || (s->cut_prefill && !limits->fixed_cuts);
}

/* The key at which a strip that begins `into` cost units into the tile takes over: the tile's begin
 * or end, or a multiple of cut_align well inside. */
static i32 cut_key(const qi_limits *limits, const tile *t, i64 into, int may_cut)
{
    const i32 keys = t->kv_end - t->kv_begin, align = limits->cut_align;
    if (into == 0) return t->kv_begin;
    const i32 nearer = into * 2 < t->cost ? t->kv_begin : t->kv_end;
    if (!may_cut || keys == 0) return nearer;
    const i64 per_key = (t->cost - limits->cost_visit) / keys;
    const i64 offset = into <= limits->cost_visit ? 0 : (into - limits->cost_visit) / per_key;
    const i64 key = (t->kv_begin + offset + align / 2) / align * align;
    const i32 shortest = limits->fixed_cuts ? 0 : align;
    if (key - t->kv_begin <= shortest - 1 || key <= t->kv_begin) return t->kv_begin;
    if (t->kv_end - key <= shortest - 1 || key >= t->kv_end) return t->kv_end;
    return (i32)key;
}

/* Pieces that fixed cuts make of a tile. */
static i32 fixed_pieces(const qi_limits *limits, const tile *t)
{
    const i32 align = limits->cut_align;
    if (t->flags != QI_TILE_DECODE || t->kv_begin == t->kv_end) return 1;
    return (t->kv_end - 1) / align - t->kv_begin / align + 1;
}

static i32 count_pieces(const strips *s, const qi_limits *limits, const tile *t, i64 position)
{
    if (limits->fixed_cuts) return fixed_pieces(limits, t);
    i32 pieces = 1, from = t->kv_begin;
    for (i64 w = strip_from(s, position); w < s->count && strip_begin(s, w) < position + t->cost;
         w++) {
        const i32 key = cut_key(limits, t, strip_begin(s, w) - position, may_cut(s, limits, t));
        if (key > from && key < t->kv_end) {
            pieces++;
            from = key;
        }
    }
    return pieces;
}

/* Writes the pieces of a tile that end at or before key, but never the last; *w is the piece that
 * follows. Returns where that one goes. */
static i32 emit_until(const qi_limits *limits, const tile *t, i32 key, i32 at, qi_work *w,
                      const qi_plan *out)
{
    const i32 rows = (i32)rows_of(limits, t), align = limits->cut_align;
    for (;;) {
        i32 end = key;
        if (limits->fixed_cuts)
            end = t->flags == QI_TILE_DECODE ? (w->kv_begin / align + 1) * align : t->kv_end;
        if (end <= w->kv_begin || end > key || end >= t->kv_end) return at;
        w->kv_end = end;
        out->work[at++] = *w;
        w->kv_begin = end;
        w->slot += w->slot < 0 ? 0 : rows;
    }
}

/* Writes the tile's pieces from work[at] on, and work_indptr of the strips that begin in it. */
static void emit(const strips *s, const qi_limits *limits, const tile *t, i64 position, int cut,
                 i32 at, i32 slot, i32 merge, const qi_plan *out)
{
    qi_work w = {.group = t->group,
                 .row_begin = t->row_begin,
                 .num_rows = (u16)t->num_rows,
                 .flags = (u16)t->flags,
                 .kv_head = (u16)t->kv_head,
                 .num_kv_heads = (u16)t->num_kv_heads,
                 .kv_begin = t->kv_begin,
                 .slot = slot,
                 .merge = merge};
    i64 strip = strip_from(s, position);
    for (; strip < s->count && strip_begin(s, strip) < position + t->cost; strip++) {
        const i32 key =
            cut_key(limits, t, strip_begin(s, strip) - position, cut && may_cut(s, limits, t));
        at = emit_until(limits, t, key, at, &w, out);
        out->work_indptr[strip] = key == w.kv_begin ? at : at + 1;
    }
    at = emit_until(limits, t, t->kv_end, at, &w, out);
    w.kv_end = t->kv_end;
    out->work[at] = w;
}

/* Notes a tile with partial rows, and tells its rows where they are. */
static void emit_merge(const qi_lengths *in, const qi_limits *limits, const tile *t, i32 pieces,
                       i32 slot, i32 merge, const qi_plan *out)
{
    if (merge >= 0) {
        out->merge[merge] = (qi_merge){.row_begin = t->row_begin,
                                       .num_rows = (u16)t->num_rows,
                                       .kv_head = (u16)t->kv_head,
                                       .num_kv_heads = (u16)t->num_kv_heads,
                                       .num_pieces = pieces,
                                       .slot = slot,
                                       .rows_per_piece = (i32)rows_of(limits, t)};
        out->ticket[merge] = 0;
    }
    if (in->num_levels == 1) return;
    i32 *row_merge = out->row_merge +
                     ((i64)t->of->level * out->max_tokens + t->row_begin) * limits->num_kv_heads;
    for (i32 r = 0; r < t->num_rows; r++)
        for (i32 h = 0; h < t->num_kv_heads; h++)
            row_merge[(i64)r * limits->num_kv_heads + t->kv_head + h] = merge;
}

i64 qi_schedule_max_work(const qi_limits *limits, i64 max_tokens, i64 max_groups, i64 max_rows)
{
    i64 tiles = max_groups < max_tokens ? max_groups : max_tokens;
    if (limits->split_heads) tiles *= limits->num_kv_heads;
    if (max_rows > limits->decode_rows) {
        const i64 long_groups = max_tokens / (limits->decode_rows + 1);
        tiles += limits->num_kv_heads * (max_tokens / limits->tile_rows +
                                         (long_groups < max_groups ? long_groups : max_groups));
    }
    return tiles + limits->num_workers - 1;
}

i64 qi_schedule_split_rows(const qi_limits *limits, i64 max_rows)
{
    const i64 decode = limits->decode_rows < max_rows ? limits->decode_rows : max_rows;
    i64 rows = decode * limits->group_size * (limits->split_heads ? 1 : limits->num_kv_heads);
    if (max_rows > limits->decode_rows && rows < (i64)limits->tile_rows * limits->group_size)
        rows = (i64)limits->tile_rows * limits->group_size;
    return 2 * (i64)(limits->num_workers - 1) *
           rows; /* n cuts make at most 2 n pieces of cut tiles */
}

/* Partial rows that a tile cannot do without. */
static i64 rows_needed(const qi_limits *limits, const tile *t)
{
    const i32 pieces = limits->fixed_cuts ? fixed_pieces(limits, t) : 1;
    return pieces > 1 || !(t->of->flags & QI_GROUP_ALONE) ? pieces * rows_of(limits, t) : 0;
}

i64 qi_schedule_rows_needed(const qi_lengths *in, const qi_limits *limits)
{
    i64 rows = 0;
    for (cursor at = {.group = -1}; advance(in, limits, &at, at.group < 0 ? 0 : 1);) {
        const tile t = make_tile(in, limits, at.group, at.index);
        rows += rows_needed(limits, &t);
    }
    return rows;
}

void qi_schedule(qi_lanes lanes, const qi_lengths *in, const qi_limits *limits, const qi_plan *out)
{
    /* The strips' size, from the line's total cost. */
    strips s = {.count = limits->num_workers};
    i64 sum = 0, largest_prefill = 0, needed_here = 0, needed;
    cursor at = {.group = -1};
    for (int more = advance(in, limits, &at, lanes.id); more;
         more = advance(in, limits, &at, lanes.count)) {
        const tile t = make_tile(in, limits, at.group, at.index);
        sum += t.cost;
        needed_here += rows_needed(limits, &t);
        if (t.flags == QI_TILE_PREFILL && t.cost > largest_prefill) largest_prefill = t.cost;
    }
    scan_add(lanes, sum, &s.total);
    scan_add(lanes, needed_here, &needed);
    if (limits->cost_strip > 0 && s.total / limits->cost_strip < s.count)
        s.count = (i32)(s.total / limits->cost_strip > 1 ? s.total / limits->cost_strip : 1);
    s.size = s.total / s.count;
    s.longer = s.total % s.count;
    s.cut_prefill = max_all(lanes, largest_prefill) > s.size / 8;

    /* Lay the tiles along the line again, one a lane, and cut them. What stands before this round
     * of tiles: its cost, the pieces and merges emitted, the partial rows given, and those that
     * cuts asked for beyond what is needed. A tile that would pass the capacity is not cut, nor
     * then is any later one. */
    const i64 spare = limits->max_split_rows - needed;
    i64 position = 0, work = 0, merges = 0, slots = 0, asked = 0, sum_more, sums[5];
    at = (cursor){.group = -1};
    for (i32 step = lanes.id;; step = lanes.count) {
        const int more = advance(in, limits, &at, step);
        scan_add(lanes, more, &sum_more);
        if (sum_more == 0) break;
        const tile t = more ? make_tile(in, limits, at.group, at.index) : (tile){.cost = 0};
        const i64 begin = position + scan_add(lanes, t.cost, &sums[0]);
        i32 pieces = more ? count_pieces(&s, limits, &t, begin) : 0;
        const i64 rows = rows_of(limits, &t), base = more ? rows_needed(limits, &t) : 0;
        const i64 extra = pieces > 1 ? pieces * rows - base : 0;
        const i64 before = asked + scan_add(lanes, extra, &sums[1]);
        if (more && before + extra > spare && extra > 0) pieces = 1;
        const int cut = pieces > 1, partial = cut || base > 0;
        const i64 first = work + scan_add(lanes, pieces, &sums[2]);
        const i64 merge = merges + scan_add(lanes, partial, &sums[3]);
        const i64 slot = slots + scan_add(lanes, partial ? pieces * rows : 0, &sums[4]);
        if (more) {
            emit(&s, limits, &t, begin, cut, (i32)first, partial ? (i32)slot : -1,
                 partial ? (i32)merge : -1, out);
            emit_merge(in, limits, &t, pieces, (i32)slot, partial ? (i32)merge : -1, out);
        }
        position += sums[0];
        asked += sums[1];
        work += sums[2];
        merges += sums[3];
        slots += sums[4];
    }

    if (lanes.id == 0) {
        out->work_indptr[0] = 0;
        for (i64 w = strip_from(&s, s.total); w <= limits->num_workers; w++)
            out->work_indptr[w] = (i32)work;
        *out->header = (qi_plan_header){.num_tokens = in->num_tokens,
                                        .num_requests = in->num_requests,
                                        .num_levels = in->num_levels,
                                        .num_work = (i32)work,
                                        .num_merges = (i32)merges,
                                        .num_strips = s.count,
                                        .num_split_rows = slots,
                                        .cost_per_worker = s.size + (s.longer > 0)};
    }
}
