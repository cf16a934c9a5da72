/* schedule.c - cut one line of tiles into equal strips; see schedule.h for the contract. Each lane takes a
 * run of the line. No libc, and C that NVRTC takes too: plan.cu includes this file.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/schedule.h"

/* ---- tiles: a line of them, group by group, head by head ----------------------------------- */

typedef struct tile {
    const qi_group *of;
    i32 group, row_begin, num_rows, kv_head, num_kv_heads, flags;
    i32 kv_begin, kv_end;
    i64 cost, cost_key; /* of all of it; of each key */
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
static void make_tile(const qi_lengths *in, const qi_limits *limits, i32 group, i32 index, tile *t)
{
    const qi_group *g = &in->groups[group];
    const i32 first_head = g->kv_head < 0 ? 0 : g->kv_head;
    i32 row = 0, rows = g->num_rows;
    t->of = g;
    t->group = group;
    if (rows <= limits->decode_rows) {
        t->flags = QI_TILE_DECODE;
        t->kv_head = limits->split_heads ? first_head + index : first_head;
        t->num_kv_heads = limits->split_heads ? 1 : heads_of(limits, g);
    } else {
        const i32 per_head = (rows - 1) / limits->tile_rows + 1;
        row = index % per_head * limits->tile_rows;
        rows = rows - row < limits->tile_rows ? rows - row : limits->tile_rows;
        t->flags = QI_TILE_PREFILL;
        t->kv_head = first_head + index / per_head;
        t->num_kv_heads = 1;
    }
    t->num_rows = rows;
    t->row_begin = g->row_begin + row;
    if (g->flags & QI_GROUP_SPARSE) {
        t->kv_begin = 0;
        t->kv_end = g->kv_len;
    } else {
        i64 first = g->pos_first, last = g->pos_last;
        if (!(g->flags & QI_GROUP_MIXED)) {
            first += row;
            last = first + rows - 1;
        }
        qi_visible(limits, g->kv_len, first - g->kv_offset, last - g->kv_offset, &t->kv_begin,
                   &t->kv_end);
    }
    t->cost_key =
        t->num_kv_heads * (limits->cost_key + (i64)rows * limits->group_size * limits->cost_pair);
    t->cost = limits->cost_visit + (t->kv_end - t->kv_begin) * t->cost_key;
}

/* ---- strips ------------------------------------------------------------------------------- */

typedef struct strips {
    i64 total, size, longer;       /* the first `longer` strips cost size + 1, the others size */
    i32 count, cut_prefill, whole; /* whole: no tile is cut */
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
    i64 w;
    if (position <= split)
        w = (position + s->size) / (s->size + 1);
    else if (s->size == 0)
        w = s->count;
    else
        w = s->longer + (position - split + s->size - 1) / s->size;
    return w < 1 ? 1 : w;
}

static mark mark_from(const strips *s, i64 position)
{
    mark m = {.strip = strip_from(s, position), .at = NOWHERE};
    if (m.strip < s->count) m.at = m.strip * s->size + (m.strip < s->longer ? m.strip : s->longer);
    return m;
}

static void next_strip(const strips *s, mark *m)
{
    m->at += s->size + (m->strip < s->longer);
    if (++m->strip >= s->count) m->at = NOWHERE;
}

/* ---- walking along the line --------------------------------------------------------------- */

typedef struct walk {
    tile at;
    i32 index, tiles; /* which of its group's, of how many */
    i64 left;         /* tiles to go, this one with them */
    i64 position;     /* where it begins in the line */
    mark strip;       /* the first that begins there or after */
} walk;

/* Goes to tile `index` of a group, or to the first after it if it has none. */
static void enter(const qi_lengths *in, const qi_limits *limits, walk *w, i32 group, i32 index)
{
    QI_ROLLED
    for (; group < in->num_groups; group++, index = 0) {
        w->tiles = tiles_of(limits, &in->groups[group]);
        if (index >= w->tiles) continue;
        w->index = index;
        make_tile(in, limits, group, index, &w->at);
        return;
    }
    w->left = 0;
}

/* The whole line. */
static walk walk_all(const qi_lengths *in, const qi_limits *limits)
{
    walk w = {.left = NOWHERE};
    enter(in, limits, &w, 0, 0);
    return w;
}

/* How many tiles from this one on differ in the KV head at most. */
static i32 num_alike(const walk *w)
{
    if (w->at.flags == QI_TILE_PREFILL) return 1;
    const i32 n = w->tiles - w->index;
    return w->left < n ? (i32)w->left : n;
}

/* Leaves so many tiles, which are alike, behind. */
static void leave(const qi_lengths *in, const qi_limits *limits, walk *w, i32 n)
{
    w->left -= n;
    w->index += n;
    w->position += n * w->at.cost;
    if (w->left == 0) return;
    const i32 more = w->index < w->tiles;
    if (more && w->at.flags == QI_TILE_DECODE)
        w->at.kv_head += n;
    else
        enter(in, limits, w, more ? w->at.group : w->at.group + 1, more ? w->index : 0);
}

/* A lane's run of the line, as long as any other's. Collective. */
static walk walk_share(qi_lanes lanes, const qi_lengths *in, const qi_limits *limits)
{
    if (lanes.count == 1) return walk_all(in, limits);
    const i32 n = in->num_groups, groups = (n + lanes.count - 1) / lanes.count;
    const i32 first = lanes.id * groups < n ? lanes.id * groups : n;
    const i32 past = first + groups < n ? first + groups : n;
    i64 tiles = 0, total;
    QI_ROLLED
    for (i32 g = first; g < past; g++) tiles += tiles_of(limits, &in->groups[g]);
    lanes_add(lanes, &tiles, &total, 1);
    QI_ROLLED
    for (i32 g = first; g < past; g++) {
        in->first_tile[g] = (i32)tiles;
        tiles += tiles_of(limits, &in->groups[g]);
    }
    lanes_sync(lanes);

    const i32 share = ((i32)total + lanes.count - 1) / lanes.count;
    const i64 begin = (i64)lanes.id * share;
    walk w = {.left = total - begin < share ? total - begin : share};
    if (w.left <= 0) {
        w.left = 0;
        return w;
    }
    i32 low = 0, high = n; /* first_tile[low] <= begin, first_tile[high] is more */
    QI_ROLLED
    while (high - low > 1) {
        const i32 middle = (low + high) / 2;
        if (in->first_tile[middle] <= begin)
            low = middle;
        else
            high = middle;
    }
    enter(in, limits, &w, low, (i32)begin - in->first_tile[low]);
    return w;
}

/* ---- cuts --------------------------------------------------------------------------------- */

static int may_cut(const strips *s, const qi_limits *limits, const tile *t)
{
    if (s->whole) return 0;
    return t->flags == QI_TILE_DECODE || (s->cut_prefill && !limits->fixed_cuts);
}

/* The key at which a strip that begins `into` cost units into the tile takes over: the tile's begin
 * or end, or a multiple of cut_align well inside. */
static i32 cut_key(const qi_limits *limits, const tile *t, i64 into, int cut)
{
    const i32 keys = t->kv_end - t->kv_begin, align = limits->cut_align;
    if (into == 0) return t->kv_begin;
    const i32 nearer = into * 2 < t->cost ? t->kv_begin : t->kv_end;
    if (!cut || keys == 0) return nearer;
    const i64 offset = into <= limits->cost_visit ? 0 : (into - limits->cost_visit) / t->cost_key;
    const u32 middle = (u32)(t->kv_begin + offset + align / 2);
    const i64 key = (i64)(middle / (u32)align) * align;
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

/* Partial rows that a tile cannot do without. */
static i64 rows_needed(const qi_limits *limits, const tile *t)
{
    const i32 pieces = limits->fixed_cuts ? fixed_pieces(limits, t) : 1;
    return pieces > 1 || !(t->of->flags & QI_GROUP_ALONE) ? pieces * rows_of(limits, t) : 0;
}

static i32 count_pieces(const strips *s, const qi_limits *limits, const walk *w)
{
    const tile *t = &w->at;
    if (limits->fixed_cuts) return fixed_pieces(limits, t);
    if (!may_cut(s, limits, t)) return 1;
    i32 pieces = 1, from = t->kv_begin;
    QI_ROLLED
    for (mark m = w->strip; m.at < w->position + t->cost; next_strip(s, &m)) {
        const i32 key = cut_key(limits, t, m.at - w->position, 1);
        if (key > from && key < t->kv_end) {
            pieces++;
            from = key;
        }
    }
    return pieces;
}

/* What stands before a tile in the plan: partial rows that cuts asked for beyond what is needed, items,
 * tiles with partial rows, and partial rows. */
enum { ASKED, WORK, MERGES, SLOTS, NUM_COUNTS };
enum { COST, NEEDED, LARGEST, LARGEST_DECODE }; /* the same room, before */

/* How many tiles from this one on, alike, are a piece each since no strip begins in them. */
static i32 num_whole(const qi_limits *limits, const walk *w)
{
    const i32 n = limits->fixed_cuts ? 0 : num_alike(w);
    if (w->strip.at >= w->position + n * w->at.cost) return n;
    i32 whole = 0;
    QI_ROLLED
    for (i64 end = w->position + w->at.cost; w->strip.at >= end; end += w->at.cost) whole++;
    return whole;
}

/* Pieces of the tile at hand. One that would pass the spare partial rows is not cut, nor then is any later
 * one. */
static i32 choose_pieces(const strips *s, const qi_limits *limits, const walk *w, i64 spare,
                         i64 *asked)
{
    const i32 pieces = count_pieces(s, limits, w);
    if (pieces == 1) return 1;
    const i64 extra = pieces * rows_of(limits, &w->at) - rows_needed(limits, &w->at);
    *asked += extra;
    return extra > 0 && *asked > spare ? 1 : pieces;
}

/* ---- output ------------------------------------------------------------------------------- */

/* Writes the pieces of a tile that end at or before key, but never the last; *w is the piece that
 * follows. Returns where that one goes. */
static i32 emit_until(const qi_limits *limits, const tile *t, i32 key, i32 at, qi_work *w,
                      const qi_plan *out)
{
    const i32 rows = (i32)rows_of(limits, t), align = limits->cut_align;
    QI_ROLLED
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

static qi_work first_piece(const tile *t, i32 slot, i32 merge)
{
    const qi_work w = {.group = t->group,
                       .row_begin = t->row_begin,
                       .num_rows = (u16)t->num_rows,
                       .flags = (u16)t->flags,
                       .kv_head = (u16)t->kv_head,
                       .num_kv_heads = (u16)t->num_kv_heads,
                       .kv_begin = t->kv_begin,
                       .kv_end = t->kv_end,
                       .slot = slot,
                       .merge = merge};
    return w;
}

/* Writes the tile's pieces from work[at] on, and work_indptr of the strips that begin in it. */
static void emit(const strips *s, const qi_limits *limits, walk *w, int cut, i32 at, i32 slot,
                 i32 merge, const qi_plan *out)
{
    const tile *t = &w->at;
    const i64 end = w->position + t->cost;
    qi_work piece = first_piece(t, slot, merge);
    QI_ROLLED
    for (; w->strip.at < end; next_strip(s, &w->strip)) {
        const i32 key = cut_key(limits, t, w->strip.at - w->position, cut && may_cut(s, limits, t));
        at = emit_until(limits, t, key, at, &piece, out);
        out->work_indptr[w->strip.strip] = key == piece.kv_begin ? at : at + 1;
    }
    if (cut) at = emit_until(limits, t, t->kv_end, at, &piece, out);
    piece.kv_end = t->kv_end;
    out->work[at] = piece;
}

/* Notes a tile with partial rows, and tells its rows where they are. */
static void emit_merge(const qi_lengths *in, const qi_limits *limits, const tile *t, i32 pieces,
                       i32 slot, i32 merge, const qi_plan *out)
{
    const qi_merge m = {.row_begin = t->row_begin,
                        .num_rows = (u16)t->num_rows,
                        .kv_head = (u16)t->kv_head,
                        .num_kv_heads = (u16)t->num_kv_heads,
                        .reserved = 0,
                        .num_pieces = pieces,
                        .slot = slot,
                        .rows_per_piece = (i32)rows_of(limits, t)};
    out->merge[merge] = m;
    out->ticket[merge] = 0;
    if (in->num_levels == 1) return;
    i32 *row_merge = out->row_merge +
                     ((i64)t->of->level * out->max_tokens + t->row_begin) * limits->num_kv_heads;
    QI_ROLLED
    for (i32 r = 0; r < t->num_rows; r++) {
        QI_ROLLED
        for (i32 h = 0; h < t->num_kv_heads; h++)
            row_merge[(i64)r * limits->num_kv_heads + t->kv_head + h] = merge;
    }
}

/* n tiles alike that are a piece each, and final. */
static void emit_whole(const tile *t, i32 n, qi_work *work)
{
    const qi_work piece = first_piece(t, -1, -1);
    QI_ROLLED
    for (i32 i = 0; i < n; i++) {
        work[i] = piece;
        work[i].kv_head = (u16)(t->kv_head + i);
    }
}

/* What a walk along a lane's tiles is for. */
enum { SUM_COSTS, COUNT, COUNT_AGAIN, EMIT };

/* Counts, and maybe writes, the tile at hand, or if they are whole several alike; returns how many. */
static i32 take_tiles(i32 what, const strips *s, const qi_lengths *in, const qi_limits *limits,
                      walk *w, i64 spare, i64 *counts, const qi_plan *out)
{
    i32 n = num_whole(limits, w), pieces = 1;
    if (n == 0) {
        n = 1;
        pieces = choose_pieces(s, limits, w, spare, &counts[ASKED]);
    }
    const int partial = pieces > 1 || rows_needed(limits, &w->at) > 0;
    if (what == EMIT && !partial && w->strip.at >= w->position + n * w->at.cost) {
        emit_whole(&w->at, n, out->work + counts[WORK]);
    } else if (what == EMIT) {
        const i32 slot = partial ? (i32)counts[SLOTS] : -1;
        const i32 merge = partial ? (i32)counts[MERGES] : -1;
        n = 1;
        emit(s, limits, w, pieces > 1, (i32)counts[WORK], slot, merge, out);
        if (partial) emit_merge(in, limits, &w->at, pieces, slot, merge, out);
    } else {
        QI_ROLLED
        while (w->strip.at < w->position + n * w->at.cost) next_strip(s, &w->strip);
    }
    counts[WORK] += (i64)n * pieces;
    if (partial) {
        counts[MERGES] += n;
        counts[SLOTS] += (i64)n * pieces * rows_of(limits, &w->at);
    }
    return n;
}

/* Adds a lane's tiles to the counts. */
static void pass(i32 what, const strips *s, const qi_lengths *in, const qi_limits *limits, walk w,
                 i64 spare, i64 *counts, const qi_plan *out)
{
    QI_ROLLED
    while (w.left > 0) {
        i32 n;
        if (what == SUM_COSTS) {
            n = num_alike(&w);
            counts[COST] += n * w.at.cost;
            counts[NEEDED] += n * rows_needed(limits, &w.at);
            const int of = w.at.flags == QI_TILE_PREFILL ? LARGEST : LARGEST_DECODE;
            if (w.at.cost > counts[of]) counts[of] = w.at.cost;
        } else {
            n = take_tiles(what, s, in, limits, &w, spare, counts, out);
        }
        leave(in, limits, &w, n);
    }
}

/* Rows that a level has no tile for have nothing to merge there. */
static void clear_row_merge(qi_lanes lanes, const qi_lengths *in, const qi_limits *limits,
                            const qi_plan *out)
{
    const i64 n = (i64)in->num_tokens * limits->num_kv_heads;
    QI_ROLLED
    for (i32 l = 0; in->num_levels > 1 && l < in->num_levels; l++) {
        i32 *row_merge = out->row_merge + l * out->max_tokens * limits->num_kv_heads;
        QI_ROLLED
        for (i64 i = lanes.id; i < n; i += lanes.count) row_merge[i] = -1;
    }
}

/* ---- bounds ------------------------------------------------------------------------------- */

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

i64 qi_schedule_rows_needed(const qi_lengths *in, const qi_limits *limits)
{
    i64 rows = 0;
    QI_ROLLED
    for (walk w = walk_all(in, limits); w.left > 0;) {
        const i32 n = num_alike(&w);
        rows += n * rows_needed(limits, &w.at);
        leave(in, limits, &w, n);
    }
    return rows;
}

/* ---- the schedule ------------------------------------------------------------------------- */

void qi_schedule_nothing(qi_lanes lanes, const qi_limits *limits, i32 status, i32 request,
                         const qi_plan *out)
{
    QI_ROLLED
    for (i32 w = lanes.id; w <= limits->num_workers; w += lanes.count) out->work_indptr[w] = 0;
    const qi_plan_header header = {.status = status, .status_request = request, .num_levels = 1};
    if (lanes.id == 0) *out->header = header;
}

/* Strips of equal size, from the line's total cost. */
static strips make_strips(const qi_limits *limits, i64 total, i64 count)
{
    strips s = {.total = total, .count = (i32)count};
    if (limits->cost_strip > 0 && total / limits->cost_strip < s.count)
        s.count = (i32)(total / limits->cost_strip > 1 ? total / limits->cost_strip : 1);
    s.size = total / s.count;
    s.longer = total % s.count;
    return s;
}

/* How many strips of whole decode tiles, the largest of this cost, are little longer than equal ones; 0: they
 * are not. Tiles are about as large as the largest, or it is 0. Of no more of them than units each has a
 * unit to itself. */
static i64 whole_strips(const strips *s, const qi_limits *limits, i64 largest)
{
    const i64 tiles = largest > 0 ? (s->total + largest - 1) / largest : 0;
    const i64 longest = s->size + limits->cost_cut, workers = limits->num_workers;
    const i64 units = limits->num_units < workers ? limits->num_units : workers;
    if (tiles == 0 || (tiles * largest - s->total) * 8 > s->total) return 0;
    if (tiles <= units) return largest * units <= longest * workers ? tiles : 0;
    return largest * ((tiles + workers - 1) / workers) <= longest ? workers : 0;
}

static void finish(qi_lanes lanes, const strips *s, const qi_lengths *in, const qi_limits *limits,
                   const i64 *totals, const qi_plan *out)
{
    const i64 past = strip_from(s, s->total);
    QI_ROLLED
    for (i64 w = past + lanes.id; w <= limits->num_workers; w += lanes.count)
        out->work_indptr[w] = (i32)totals[WORK];
    if (lanes.id != 0) return;
    const qi_plan_header header = {.num_tokens = in->num_tokens,
                                   .num_requests = in->num_requests,
                                   .num_work = (i32)totals[WORK],
                                   .num_merges = (i32)totals[MERGES],
                                   .num_strips = s->count,
                                   .num_levels = in->num_levels,
                                   .num_split_rows = totals[SLOTS],
                                   .cost_per_worker = s->size + (s->longer > 0)};
    out->work_indptr[0] = 0;
    *out->header = header;
}

void qi_schedule(qi_lanes lanes, const qi_lengths *in, const qi_limits *limits, const qi_plan *out)
{
    clear_row_merge(lanes, in, limits, out);
    walk first = walk_share(lanes, in, limits);
    strips s = {.total = 0};
    i64 counts[NUM_COUNTS] = {0, 0, 0, 0}, totals[NUM_COUNTS], asked = 0, spare = NOWHERE;
    QI_ROLLED
    for (i32 what = SUM_COSTS;;) {
        pass(what, &s, in, limits, first, what == COUNT ? NOWHERE : spare, counts, out);
        if (what == EMIT) break;
        const i64 largest = counts[LARGEST], largest_decode = counts[LARGEST_DECODE];
        lanes_add(lanes, counts, totals, NUM_COUNTS);
        if (what == SUM_COSTS) {
            spare = limits->max_split_rows - totals[NEEDED];
            if (spare < 0) {
                qi_schedule_nothing(lanes, limits, QI_PLAN_SPLIT_ROWS * 256, -1, out);
                return;
            }
            s = make_strips(limits, totals[COST], limits->num_workers);
            if (limits->cost_cut > 0 && !limits->fixed_cuts && !lanes_any(lanes, largest > 0)) {
                const i64 count = whole_strips(&s, limits, -lanes_min(lanes, -largest_decode));
                if (count > 0) s = make_strips(limits, totals[COST], count);
                s.whole = count > 0;
            }
            s.cut_prefill = lanes_any(lanes, largest > s.size / 8);
            first.position = counts[COST];
            first.strip = mark_from(&s, first.position);
            what = lanes.count > 1 ? COUNT : EMIT; /* a single lane's output begins at 0 */
        } else {
            /* Only if partial rows run short does a lane need to know what those before it ask for. */
            if (what == COUNT) asked = counts[ASKED];
            what = what == COUNT && totals[ASKED] > spare ? COUNT_AGAIN : EMIT;
        }
        QI_ROLLED
        for (int i = 0; i < NUM_COUNTS && what != EMIT; i++) counts[i] = 0;
        if (lanes.count == 1) {
            QI_ROLLED
            for (int i = 0; i < NUM_COUNTS; i++) counts[i] = 0;
        }
        counts[ASKED] = asked;
    }
    finish(lanes, &s, in, limits, lanes.count == 1 ? counts : totals, out);
}
