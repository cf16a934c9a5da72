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

/* ---- tiles: a line of them, request by request, head by head ------------------------------- */

typedef struct tile {
    i32 request, row_begin, num_rows, kv_head, num_kv_heads, flags;
    i32 kv_begin, kv_end;
    i64 cost;
} tile;

static i32 tiles_of(const qi_limits *limits, i32 qo_len)
{
    if (qo_len == 0) return 0;
    if (qo_len <= limits->decode_rows) return 1;
    return limits->num_kv_heads * ((qo_len + limits->tile_rows - 1) / limits->tile_rows);
}

static i64 rows_of(const qi_limits *limits, const tile *t)
{
    return (i64)t->num_rows * limits->group_size * t->num_kv_heads;
}

/* Tile number `index` of a request. */
static tile make_tile(const qi_lengths *in, const qi_limits *limits, i32 request, i32 index)
{
    const i32 first = in->qo_indptr[request], qo_len = in->qo_indptr[request + 1] - first;
    tile t = {.request = request, .flags = QI_TILE_DECODE, .num_kv_heads = limits->num_kv_heads};
    i32 row = 0;
    t.num_rows = qo_len;
    if (qo_len > limits->decode_rows) {
        const i32 per_head = (qo_len + limits->tile_rows - 1) / limits->tile_rows;
        row = index % per_head * limits->tile_rows;
        t.num_rows = qo_len - row < limits->tile_rows ? qo_len - row : limits->tile_rows;
        t.kv_head = index / per_head;
        t.num_kv_heads = 1;
        t.flags = QI_TILE_PREFILL;
    }
    t.row_begin = first + row;
    const i64 position = (i64)in->qo_pos[request] + row;
    qi_visible(limits, in->kv_len[request], position, position + t.num_rows - 1, &t.kv_begin,
               &t.kv_end);
    t.cost = limits->cost_visit +
             (i64)t.num_kv_heads * (t.kv_end - t.kv_begin) *
                 (limits->cost_key + (i64)t.num_rows * limits->group_size * limits->cost_pair);
    return t;
}

/* A position in the line; lanes take every count-th tile from id on. */
typedef struct cursor {
    i32 request, index, tiles; /* the tile, and how many its request has */
} cursor;

/* Moves `steps` tiles on; 0 past the end. The first call starts from {-1, 0, 0}. */
static int advance(const qi_lengths *in, const qi_limits *limits, cursor *at, i32 steps)
{
    i64 index = (i64)at->index + steps;
    while (index >= at->tiles) {
        index -= at->tiles;
        if (++at->request >= in->num_requests) return 0;
        at->tiles = tiles_of(limits, in->qo_indptr[at->request + 1] - in->qo_indptr[at->request]);
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
    if (key - t->kv_begin < align) return t->kv_begin;
    if (t->kv_end - key < align) return t->kv_end;
    return (i32)key;
}

static int may_cut(const strips *s, const tile *t)
{
    return t->flags == QI_TILE_DECODE || s->cut_prefill;
}

static i32 count_pieces(const strips *s, const qi_limits *limits, const tile *t, i64 position)
{
    i32 pieces = 1, from = t->kv_begin;
    for (i64 w = strip_from(s, position); w < s->count && strip_begin(s, w) < position + t->cost;
         w++) {
        const i32 key = cut_key(limits, t, strip_begin(s, w) - position, may_cut(s, t));
        if (key > from && key < t->kv_end) {
            pieces++;
            from = key;
        }
    }
    return pieces;
}

/* Writes the tile's pieces from work[at] on, and work_indptr of the strips that begin in it. */
static void emit(const strips *s, const qi_limits *limits, const tile *t, i64 position, int cut,
                 i32 at, i32 slot, const qi_plan *out)
{
    const i32 rows = (i32)rows_of(limits, t);
    qi_work w = {.group = t->request,
                 .row_begin = t->row_begin,
                 .num_rows = (u16)t->num_rows,
                 .flags = (u8)t->flags,
                 .kv_head = (u16)t->kv_head,
                 .num_kv_heads = (u16)t->num_kv_heads,
                 .kv_begin = t->kv_begin,
                 .slot = slot};
    i64 strip = strip_from(s, position);
    for (; strip < s->count && strip_begin(s, strip) < position + t->cost; strip++) {
        const i32 key = cut_key(limits, t, strip_begin(s, strip) - position, cut && may_cut(s, t));
        if (key > w.kv_begin && key < t->kv_end) {
            w.kv_end = key;
            out->work[at++] = w;
            w.kv_begin = key;
            w.slot += slot < 0 ? 0 : rows;
        }
        out->work_indptr[strip] = key == w.kv_begin ? at : at + 1;
    }
    w.kv_end = t->kv_end;
    out->work[at] = w;
}

i64 qi_schedule_max_work(const qi_limits *limits, i64 max_tokens, i64 max_requests, i64 max_qo_len)
{
    i64 tiles = max_requests < max_tokens ? max_requests : max_tokens;
    if (max_qo_len > limits->decode_rows) {
        const i64 long_requests = max_tokens / (limits->decode_rows + 1);
        tiles +=
            limits->num_kv_heads * (max_tokens / limits->tile_rows +
                                    (long_requests < max_requests ? long_requests : max_requests));
    }
    return tiles + limits->num_workers - 1;
}

i64 qi_schedule_split_rows(const qi_limits *limits, i64 max_qo_len)
{
    const i64 decode = limits->decode_rows < max_qo_len ? limits->decode_rows : max_qo_len;
    i64 rows = decode * limits->group_size * limits->num_kv_heads;
    if (max_qo_len > limits->decode_rows && rows < (i64)limits->tile_rows * limits->group_size)
        rows = (i64)limits->tile_rows * limits->group_size;
    return 2 * (i64)(limits->num_workers - 1) *
           rows; /* n cuts make at most 2 n pieces of cut tiles */
}

void qi_schedule(qi_lanes lanes, const qi_lengths *in, const qi_limits *limits, const qi_plan *out)
{
    /* The strips' size, from the line's total cost. */
    strips s = {.count = limits->num_workers};
    i64 sum = 0, largest_prefill = 0;
    cursor at = {.request = -1};
    for (int more = advance(in, limits, &at, lanes.id); more;
         more = advance(in, limits, &at, lanes.count)) {
        const tile t = make_tile(in, limits, at.request, at.index);
        sum += t.cost;
        if (t.flags == QI_TILE_PREFILL && t.cost > largest_prefill) largest_prefill = t.cost;
    }
    scan_add(lanes, sum, &s.total);
    if (limits->cost_strip > 0 && s.total / limits->cost_strip < s.count)
        s.count = (i32)(s.total / limits->cost_strip > 1 ? s.total / limits->cost_strip : 1);
    s.size = s.total / s.count;
    s.longer = s.total % s.count;
    s.cut_prefill = max_all(lanes, largest_prefill) > s.size / 8;

    /* Lay the tiles along the line again, one a lane, and cut them. What stands before this round
     * of tiles: its cost, the pieces and merges emitted, the partial rows that cuts asked for. A
     * tile that would pass the capacity is not cut, nor then is any later one. */
    i64 position = 0, work = 0, merges = 0, slots = 0, rows_used = 0, sum_more, sums[5];
    at = (cursor){.request = -1};
    for (i32 step = lanes.id;; step = lanes.count) {
        const int more = advance(in, limits, &at, step);
        scan_add(lanes, more, &sum_more);
        if (sum_more == 0) break;
        const tile t = more ? make_tile(in, limits, at.request, at.index) : (tile){.cost = 0};
        const i64 begin = position + scan_add(lanes, t.cost, &sums[0]);
        i32 pieces = more ? count_pieces(&s, limits, &t, begin) : 0;
        const i64 rows = rows_of(limits, &t), wanted = pieces > 1 ? pieces * rows : 0;
        const i64 slot = slots + scan_add(lanes, wanted, &sums[1]);
        const int cut = pieces > 1 && slot + wanted <= limits->max_split_rows;
        if (more && !cut) pieces = 1;
        const i64 first = work + scan_add(lanes, pieces, &sums[2]);
        const i64 merge = merges + scan_add(lanes, cut, &sums[3]);
        scan_add(lanes, cut ? wanted : 0, &sums[4]);
        if (more) emit(&s, limits, &t, begin, cut, (i32)first, cut ? (i32)slot : -1, out);
        if (cut) {
            out->merge[merge] = (qi_merge){.row_begin = t.row_begin,
                                           .num_rows = (u16)t.num_rows,
                                           .kv_head = (u16)t.kv_head,
                                           .num_kv_heads = (u16)t.num_kv_heads,
                                           .num_pieces = pieces,
                                           .slot = (i32)slot,
                                           .rows_per_piece = (i32)rows};
            out->ticket[merge] = 0;
        }
        position += sums[0];
        slots += sums[1];
        work += sums[2];
        merges += sums[3];
        rows_used += sums[4];
    }

    if (lanes.id == 0) {
        out->work_indptr[0] = 0;
        for (i64 w = strip_from(&s, s.total); w <= limits->num_workers; w++)
            out->work_indptr[w] = (i32)work;
        *out->header = (qi_plan_header){.num_tokens = in->qo_indptr[in->num_requests],
                                        .num_requests = in->num_requests,
                                        .num_work = (i32)work,
                                        .num_merges = (i32)merges,
                                        .num_strips = s.count,
                                        .num_split_rows = rows_used,
                                        .cost_per_worker = s.size + (s.longer > 0)};
    }
}
