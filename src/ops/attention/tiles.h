/* tiles.h - the scheduler's tiles: a group's rows and keys as one line of pieces with costs, and what a line of
 * prefill tiles costs without a walk along it. Included by schedule.c.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_TILES_H
#define QI_ATTENTION_TILES_H

#include "ops/attention/schedule.h"

/* ---- tiles: a line of them, group by group, head by head ----------------------------------- */

typedef struct tile {
    i32 row_begin, num_rows, kv_head, num_kv_heads, flags;
    i32 kv_begin, kv_end;
    i64 cost, cost_key; /* of all of it; of each key */
} tile;

static i32 heads_of(const qi_limits *limits, const qi_group *g)
{
    return g->kv_head < 0 ? limits->num_kv_heads : 1;
}

static i32 is_decode(const qi_limits *limits, const qi_group *g)
{
    return g->num_rows <= limits->decode_rows;
}

/* Prefill tiles of a head before the last, which may have fewer rows. */
static i32 full_tiles(const qi_limits *limits, const qi_group *g)
{
    return (i32)((u32)(g->num_rows - 1) / (u32)limits->tile_rows);
}

static i32 tiles_of(const qi_limits *limits, const qi_group *g)
{
    if (g->num_rows == 0) return 0;
    if (is_decode(limits, g)) return limits->split_heads ? heads_of(limits, g) : 1;
    return heads_of(limits, g) * (full_tiles(limits, g) + 1);
}

static i64 rows_of(const qi_limits *limits, const tile *t)
{
    return (i64)t->num_rows * limits->group_size * t->num_kv_heads;
}

static i64 cost_of_key(const qi_limits *limits, i32 heads, i32 rows)
{
    return heads * (limits->cost_key + (i64)rows * limits->group_size * limits->cost_pair);
}

/* Tile number `index` of a group. */
static void make_tile(const qi_limits *limits, const qi_group *g, i32 index, tile *t)
{
    const i32 first_head = g->kv_head < 0 ? 0 : g->kv_head;
    i32 row = 0, rows = g->num_rows;
    if (is_decode(limits, g)) {
        t->flags = QI_TILE_DECODE;
        t->kv_head = limits->split_heads ? first_head + index : first_head;
        t->num_kv_heads = limits->split_heads ? 1 : heads_of(limits, g);
    } else {
        const u32 per_head = (u32)full_tiles(limits, g) + 1, head = (u32)index / per_head;
        row = (i32)((u32)index - head * per_head) * limits->tile_rows;
        rows = rows - row < limits->tile_rows ? rows - row : limits->tile_rows;
        t->flags = QI_TILE_PREFILL;
        t->kv_head = first_head + (i32)head;
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
    t->cost_key = cost_of_key(limits, t->num_kv_heads, rows);
    t->cost = limits->cost_visit + (t->kv_end - t->kv_begin) * t->cost_key;
}

QI_OUTLINED void make_prefill_tile(const qi_limits *limits, const qi_group *g, i32 index, tile *t)
{
    make_tile(limits, g, index, t);
}

/* ---- prefill tiles of a head, without a walk along them ------------------------------------- */

/* The first of n steps at which from + i * step is not below least; n: none. */
static i32 first_at_least(i64 from, i32 step, i32 n, i64 least)
{
    const i64 rise = least - from, most = (i64)n * step;
    if (rise <= 0) return 0;
    return rise >= most ? n : (i32)(((u32)rise + (u32)step - 1) / (u32)step);
}

/* The sum of n numbers from + i * step, each brought within [0, most]. */
static i64 sum_within(i64 from, i32 step, i32 n, i32 most)
{
    const i64 i = first_at_least(from, step, n, 0), j = first_at_least(from, step, n, most);
    return (j - i) * from + (j * (j - 1) - i * (i - 1)) / 2 * step + (n - j) * most;
}

/* Do all tiles of a head see the same keys? */
static i32 sees_alike(const qi_group *g)
{
    return (g->flags & (QI_GROUP_SPARSE | QI_GROUP_MIXED)) != 0;
}

/* Where keys end that full tile 0 sees, if they are not those of all: one tile on, tile_rows later. */
static i64 end_of_first(const qi_limits *limits, const qi_group *g)
{
    const i64 past = g->pos_first - g->kv_offset + limits->tile_rows;
    return limits->causal ? past : past + limits->window_right;
}

/* Cost of the first n tiles of a head, all full. */
QI_OUTLINED i64 cost_before(const qi_limits *limits, const qi_group *g, i32 n)
{
    const i32 rows = limits->tile_rows;
    i64 keys;
    if (n == 0) return 0;
    if (sees_alike(g)) {
        tile t;
        make_prefill_tile(limits, g, 0, &t);
        keys = (i64)n * (t.kv_end - t.kv_begin);
    } else {
        keys = (i64)n * g->kv_len;
        if (limits->causal || limits->window_right >= 0)
            keys = sum_within(end_of_first(limits, g), rows, n, g->kv_len);
        if (limits->window_left >= 0)
            keys -=
                sum_within(g->pos_first - g->kv_offset - limits->window_left, rows, n, g->kv_len);
    }
    return (i64)n * limits->cost_visit + keys * cost_of_key(limits, 1, rows);
}

/* Of n full tiles of a head the largest: what they see grows until the keys' end is seen, but maybe for that
 * step, and does not after it. */
QI_OUTLINED i64 largest_of(const qi_limits *limits, const qi_group *g, i32 n)
{
    i64 largest = 0;
    i32 i = 0;
    if (!sees_alike(g) && (limits->causal || limits->window_right >= 0))
        i = first_at_least(end_of_first(limits, g), limits->tile_rows, n - 1, g->kv_len);
    QI_ROLLED
    for (i32 k = i > 0 ? i - 1 : 0; k <= i; k++) {
        tile t;
        make_prefill_tile(limits, g, k, &t);
        if (t.cost > largest) largest = t.cost;
    }
    return largest;
}

/* Where tile `index` of a group stands among its tiles where workers take these from the last to the first. */
static i32 place_of(const qi_limits *limits, const qi_group *g, i32 index)
{
    const i32 heads = heads_of(limits, g), per_head = full_tiles(limits, g) + 1;
    if (!limits->causal || sees_alike(g) || g->kv_len == 0) return index;
    i32 together = (i32)((u32)limits->near_keys / (u32)g->kv_len);
    if (together > heads) together = heads;
    if (together <= 1) return index;
    const i32 head = (i32)((u32)index / (u32)per_head), t = index - head * per_head;
    const i32 first = head - (i32)((u32)head % (u32)together), left = heads - first;
    return first * per_head + t * (left < together ? left : together) + head - first;
}

#endif
