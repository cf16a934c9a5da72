/* schedule.h - from lengths to equal strips of work: a pure function that knows neither devices nor
 * tensors, so that host and device planners run the same text.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_SCHEDULE_H
#define QI_ATTENTION_SCHEDULE_H

#include "kern/plan.h"
#include "ops/attention/lanes.h"

/* The scheduler's notes on a group: what stands before it in the line and in the plan, but for what cuts at the
 * begins of strips add. */
typedef struct qi_span {
    i64 position;
    i64 cost; /* of each tile; of a head's prefill tiles together */
    i32 tiles, work, merges, slots;
    i32 strip;            /* the first that begins in it or later */
    i32 pieces;           /* of each tile */
    i32 partial;          /* tiles have partial rows even if no strip cuts them */
    i32 kv_begin, kv_end; /* of decode tiles */
} qi_span;

/* Its notes on where a strip begins, and what cuts before it add to the plan. */
typedef struct qi_strip {
    i32 group, index; /* the tile */
    i32 key, nearer;  /* with a cut, without one */
    i32 inside;       /* is key neither end of the tile? */
    i32 at_end;       /* is nearer the end? */
    i32 cut;          /* some strip cuts the tile */
    i32 work, merges, slots;
} qi_strip;

typedef struct qi_lengths {
    const qi_group *groups; /* [num_groups] level by level */
    i32 num_groups, num_requests, num_tokens;
    i32 num_levels;   /* more than 1: every tile of a group that is not ALONE gets partial rows */
    qi_span *spans;   /* [num_groups + 1] room for notes */
    qi_strip *strips; /* [num_workers + 1] */
} qi_lengths;

/* Pieces that a worker takes at most of tiles that are cut equally. */
enum { ROUNDS = 4 };

/* What the operator's spec and limits fix. */
typedef struct qi_limits {
    i32 num_workers;
    i32 num_kv_heads, group_size;
    i32 decode_rows; /* a request of at most this many rows is a decode tile */
    i32 split_heads; /* 1: a decode tile has one KV head, 0: all heads of its group */
    i32 tile_rows;   /* rows of a prefill tile, <= 65535 */
    i32 causal, window_left, window_right; /* as in the spec; windows -1 = open */
    i32 cut_align;                         /* keys are cut at multiples of this */
    i32 fixed_cuts; /* 1: decode tiles at each of them and prefill tiles never, whatever the strips;
                       the strips then end between pieces */
    i32 cost_visit; /* cost units of starting a tile */
    i32 cost_key;   /* of one key of one KV head */
    i32 cost_pair;  /* of one (query row, key) pair of one query head */
    i64 cost_strip; /* a strip costs at least this, or it is not worth a worker; 0 = no minimum */
    i64 max_split_rows; /* capacity of partial rows */
    i64 cost_piece; /* of several levels, where workers take items as they come free: what a piece of a tile
                       costs beside its keys; 0: they do not */
    i64 cost_cut; /* what partial rows and their merge cost a strip; 0: as good as nothing */
    i64 cost_cut_prefill; /* the same of prefill tiles, where workers take items as they come free: a tile
                             stays whole unless it is longer than a strip by that; 0: they do not */
    i32 near_keys; /* where they do, prefill tiles of KV heads take turns that have no more keys together */
    i32 num_units; /* what workers share evenly: a worker alone on a unit is that much faster */
    i32 alone; /* beside idle ones, a unit is up to that many times as fast as with all at work; 0 as 1 */
} qi_limits;

/* The keys [*begin, *end), of kv_len, that rows at positions first to last, relative to key 0, see;
 * empty as begin == end. */
static inline void qi_visible(const qi_limits *limits, i32 kv_len, i64 first, i64 last, i32 *begin,
                              i32 *end)
{
    i64 lo = limits->window_left >= 0 ? first - limits->window_left : 0;
    i64 hi = limits->window_right >= 0 ? last + limits->window_right + 1 : kv_len;
    if (limits->causal && hi > last + 1) hi = last + 1;
    if (lo < 0) lo = 0;
    if (hi > kv_len) hi = kv_len;
    if (lo > kv_len) lo = kv_len;
    *begin = (i32)lo;
    *end = (i32)(hi > lo ? hi : lo);
}

/* An upper bound of header.num_work for batches of at most this many groups; tokens: the rows of all
 * groups together; max_rows: of one group. */
i64 qi_schedule_max_work(const qi_limits *limits, i64 max_tokens, i64 max_groups, i64 max_rows);

/* Partial rows that let every strip end anywhere, for groups of at most max_rows rows. */
i64 qi_schedule_split_rows(const qi_limits *limits, i64 max_rows);

/* Partial rows that a batch cannot do without: those of groups that are not ALONE, and of fixed
 * cuts. */
i64 qi_schedule_rows_needed(const qi_lengths *in, const qi_limits *limits);

/* A plan of no work, whose header says why. Collective. */
void qi_schedule_nothing(qi_lanes lanes, const qi_limits *limits, i32 status, i32 request,
                         const qi_plan *out);

/*
 * qi_schedule - fill header, work_indptr, work, merge, row_merge and clear the tickets of *out. Collective.
 *
 * A group of n rows is one decode tile over its KV heads if n <= decode_rows (with split_heads one for
 * each head), else for each head ceil(n / tile_rows) prefill tiles, head by head. The tiles, in that order,
 * form a line of integer costs
 *
 *   cost = cost_visit + heads * keys * (cost_key + rows * group_size * cost_pair)
 *
 * that is cut into n = min(num_workers, max(1, total / cost_strip)) strips of equal cost, the first
 * n workers'. A strip that would end inside a tile ends at a multiple of cut_align keys there, and
 * the tile's pieces are merged later; it ends at the nearer end of the tile instead if a piece
 * would be shorter than cut_align keys, if the partial rows do not suffice, or if no prefill tile
 * exceeds 1/8 of a strip (then cutting one gains less than its merge costs). At most num_workers -
 * 1 extra pieces and merges arise; no heap, O((groups + strips + tiles) / lanes), and log tiles for a strip
 * that begins in a prefill group.
 *
 * With cost_piece and several levels strips cut no tile. Each tile of a shared level, or of a few rows, is cut at
 * multiples of cut_align into equal pieces instead, of a cost such that shared levels have about as many as there are
 * workers, or up to ROUNDS times as many if those end sooner; but no more than ROUNDS * num_workers are added. Where
 * partial rows do not suffice for them, strips cut tiles as ever.
 *
 * With cost_cut_prefill, the header says whether workers are to take items as they come free. Prefill tiles of a causal
 * prompt that are not cut then stand in another order than in the line: of as many heads as near_keys allows the
 * first tiles, then their second ones, and so on, so that from the last to the first long ones come first.
 *
 * With cost_cut and no prefill tiles, tiles that are no more than the workers are a strip each, or equal pieces of theirs
 * are, where that ends sooner than equal strips do (pieces_of_tiles() has the reckoning).
 *
 * A batch that needs more than max_split_rows partial rows gets no work, and header.status says so.
 *
 * With S = ceil(total / n), u the cost of the largest tile that is left whole and a that of 3 *
 * cut_align keys of the largest cut tile: no strip costs more than S + max(u, a) + cost_visit.
 * Deterministic in its inputs. Capacity: work as qi_schedule_max_work; merge and ticket num_workers
 * - 1, but as many as work with several levels or fixed_cuts.
 */
void qi_schedule(qi_lanes lanes, const qi_lengths *in, const qi_limits *limits, const qi_plan *out);

#endif
