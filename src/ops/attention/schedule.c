/* schedule.c - cut one line of tiles into equal strips; see schedule.h for the contract. Lanes take groups,
 * then strips, then tiles, each as many as any other. No libc, and C that NVRTC takes too: plan.cu includes
 * this file.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/strips.h"

/* ---- strips in their tiles ------------------------------------------------------------------ */

/* Finds the tile in which a strip begins, and where it would. */
static void find_tile(const strips *s, const qi_lengths *in, const qi_limits *limits, i32 w)
{
    qi_strip *strip = &in->strips[w];
    const qi_group *g = &in->groups[strip->group];
    const qi_span *span = &in->spans[strip->group];
    i64 into = begin_of(s, w) - span->position;
    i32 index = (i32)quotient(into, span->cost);
    into -= index * span->cost;
    if (!is_decode(limits, g)) {
        const i32 full = full_tiles(limits, g);
        i32 low = 0, high = full + 1;
        QI_ROLLED
        while (high - low > 1) {
            const i32 middle = (low + high) / 2;
            if (cost_before(limits, g, middle) <= into)
                low = middle;
            else
                high = middle;
        }
        into -= cost_before(limits, g, low);
        index = index * (full + 1) + low;
    }
    tile t;
    tile_at(in, limits, strip->group, index, &t);
    const int cut = may_cut(s, &t) && (!limits->fixed_cuts || span->pieces > 1);
    strip->index = index;
    strip->nearer = cut_key(limits, &t, into, 0);
    strip->key = !cut            ? strip->nearer
                 : s->pieces > 0 ? piece_key(limits, &t, (i32)into, s->pieces)
                                 : cut_key(limits, &t, into, 1);
    strip->inside = cut && strip->key > t.kv_begin && strip->key < t.kv_end;
    strip->at_end = strip->nearer > t.kv_begin;
    strip->slots = (i32)rows_of(limits, &t); /* for count_cut() */
}

static int same_tile(const qi_strip *a, const qi_strip *b)
{
    return a->group == b->group && a->index == b->index;
}

/* What a strip adds to the plan: a piece, if it is the first to begin at its key, and partial rows. */
static void count_cut(const qi_limits *limits, const qi_lengths *in, i32 w, i64 *sums)
{
    qi_strip *strip = &in->strips[w];
    const qi_strip *before = strip - 1;
    const int goes_on = w > 1 && strip->inside && same_tile(before, strip) && before->inside;
    const i32 rows = strip->slots;
    strip->work = strip->merges = strip->slots = 0;
    if (limits->fixed_cuts || !strip->inside || (goes_on && before->key == strip->key)) return;
    strip->work = 1;
    strip->merges = !goes_on && !in->spans[strip->group].partial;
    strip->slots = (1 + strip->merges) * rows;
    sums[WORK]++;
    sums[MERGES] += strip->merges;
    sums[SLOTS] += strip->slots;
}

/* Is the tile cut in which a strip begins? Those that begin at an end of theirs are few. */
static i32 is_cut(const qi_lengths *in, i32 last, i32 w)
{
    const qi_strip *strip = &in->strips[w];
    if (strip->inside) return 1;
    QI_ROLLED
    for (i32 v = w + 1; v < last && same_tile(&in->strips[v], strip); v++)
        if (in->strips[v].inside) return 1;
    QI_ROLLED
    for (i32 v = w - 1; v > 0 && same_tile(&in->strips[v], strip); v--)
        if (in->strips[v].inside) return 1;
    return 0;
}

/* Where partial rows run short, no strip cuts the tile that would pass what is spare, nor any later one.
 * Collective. */
QI_OUTLINED void drop_cuts(qi_lanes lanes, const strips *s, const qi_lengths *in, share own,
                           i64 spare, i64 *totals)
{
    i64 first = s->last;
    QI_ROLLED
    for (i32 w = own.begin + 1; w <= own.end && first == s->last; w++) {
        i32 next = w + 1;
        QI_ROLLED
        while (next < s->last && same_tile(&in->strips[next], &in->strips[w])) next++;
        if (in->strips[next].slots > spare) first = w;
    }
    first = lanes_min(lanes, first);
    const qi_strip at = in->strips[first];
    lanes_sync(lanes);
    QI_ROLLED
    for (i32 w = own.begin + 1; w <= own.end; w++) {
        qi_strip *strip = &in->strips[w];
        if (w < first) continue;
        strip->cut = 0;
        strip->work = at.work;
        strip->merges = at.merges;
        strip->slots = at.slots;
    }
    if (lanes.id == 0) {
        in->strips[s->last].work = at.work;
        in->strips[s->last].merges = at.merges;
        in->strips[s->last].slots = at.slots;
    }
    totals[WORK] = at.work;
    totals[MERGES] = at.merges;
    totals[SLOTS] = at.slots;
    lanes_sync(lanes);
}

/* Cuts tiles where strips begin; totals: what that adds to the plan. Collective. */
static void cut_tiles(qi_lanes lanes, const strips *s, const qi_lengths *in,
                      const qi_limits *limits, i64 spare, i64 *totals)
{
    const share own = share_of(lanes, s->last - 1); /* and 1 more: strip 0 begins with the line */
    i64 sums[NUM_SUMS] = {0}, most[NUM_MOST] = {0};
    QI_ROLLED
    for (i32 w = own.begin + 1; w <= own.end; w++) find_tile(s, in, limits, w);
    lanes_sync(lanes);
    QI_ROLLED
    for (i32 w = own.begin + 1; w <= own.end; w++) {
        in->strips[w].cut = is_cut(in, s->last, w);
        count_cut(limits, in, w, sums);
    }
    lanes_add(lanes, sums, totals, most);
    i32 work = (i32)sums[WORK], merges = (i32)sums[MERGES], slots = (i32)sums[SLOTS];
    QI_ROLLED
    for (i32 w = own.begin + 1; w <= own.end; w++) {
        qi_strip *strip = &in->strips[w];
        const qi_strip adds = *strip;
        strip->work = work;
        strip->merges = merges;
        strip->slots = slots;
        work += adds.work;
        merges += adds.merges;
        slots += adds.slots;
    }
    if (lanes.id == 0) {
        in->strips[s->last].work = (i32)totals[WORK];
        in->strips[s->last].merges = (i32)totals[MERGES];
        in->strips[s->last].slots = (i32)totals[SLOTS];
    }
    lanes_sync(lanes);
    if (totals[SLOTS] > spare) drop_cuts(lanes, s, in, own, spare, totals);
}

/* ---- output ------------------------------------------------------------------------------- */

/* Writes the pieces `index`, index + step and so on below `until`, which differ in the KV head by as much. Returns
 * the next. */
static i32 put_pieces(qi_work *work, const qi_work *piece, i32 index, i32 until, i32 step)
{
    const u64 a = (u32)piece->group | (u64)(u32)piece->row_begin << 32;
    const u64 c = (u32)piece->kv_begin | (u64)(u32)piece->kv_end << 32;
    const u64 d = (u32)piece->slot | (u64)(u32)piece->merge << 32;
    u64 b = piece->num_rows | (u64)piece->flags << 16 | (u64)piece->kv_head << 32 |
            (u64)piece->num_kv_heads << 48;
    QI_ROLLED
    for (; index < until; index += step, b += (u64)step << 32) put_words(&work[index], a, b, c, d);
    return index;
}

/* Writes the pieces of a tile that end at or before key, but never the last; *w is the piece that
 * follows. parts: of each piece; 0: up to key is one. Returns where the piece that follows goes. */
static i32 emit_until(const qi_limits *limits, const tile *t, i32 parts, i32 key, i32 at,
                      qi_work *w, const qi_plan *out)
{
    const i32 rows = (i32)rows_of(limits, t), align = limits->cut_align;
    QI_ROLLED
    for (;;) {
        const i32 end = parts > 0 ? (w->kv_begin / align + parts) * align : key;
        if (end <= w->kv_begin || end > key || end >= t->kv_end) return at;
        w->kv_end = end;
        put_pieces(out->work, w, at, at + 1, 1);
        at++;
        w->kv_begin = end;
        w->slot += w->slot < 0 ? 0 : rows;
    }
}

static qi_work first_piece(i32 group, const tile *t, i32 slot, i32 merge)
{
    const qi_work w = {.group = group,
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

/* Notes a tile with partial rows, and tells its rows where they are. */
static void emit_merge(const qi_lengths *in, const qi_limits *limits, const qi_group *g,
                       const tile *t, i32 pieces, i32 slot, i32 merge, const qi_plan *out)
{
    qi_merge *m = &out->merge[merge];
    m->row_begin = t->row_begin;
    m->num_rows = (u16)t->num_rows;
    m->kv_head = (u16)t->kv_head;
    m->num_kv_heads = (u16)t->num_kv_heads;
    m->reserved = 0;
    m->num_pieces = pieces;
    m->slot = slot;
    m->rows_per_piece = (i32)rows_of(limits, t);
    out->ticket[merge] = 0;
    if (in->num_levels == 1) return;
    i32 *row_merge =
        out->row_merge + ((i64)g->level * out->max_tokens + t->row_begin) * limits->num_kv_heads;
    QI_ROLLED
    for (i32 r = 0; r < t->num_rows; r++) {
        QI_ROLLED
        for (i32 h = 0; h < t->num_kv_heads; h++)
            row_merge[(i64)r * limits->num_kv_heads + t->kv_head + h] = merge;
    }
}

/* Does a strip begin between tiles, of which none is cut? */
static i32 is_between(const qi_strip *strip, const qi_span *span)
{
    return !strip->cut && span->pieces == 1;
}

/* Tells those strips where their work begins. */
static void emit_begins(qi_lanes lanes, const strips *s, const qi_lengths *in, const qi_plan *out)
{
    const share own = share_of(lanes, s->last - 1);
    QI_ROLLED
    for (i32 w = own.begin + 1; w <= own.end; w++) {
        const qi_strip *strip = &in->strips[w];
        const qi_span *span = &in->spans[strip->group];
        if (is_between(strip, span))
            out->work_indptr[w] = span->work + strip->index + strip->work + strip->at_end;
    }
}

/* Writes tile `index`, its pieces between the strips from *w on that begin in it, and their work_indptr. *w
 * becomes the first that does not. place: of the tile among those of its group. */
static void emit(const qi_lengths *in, const qi_limits *limits, i32 group, const tile *t, i32 index,
                 i32 place, i32 *w, const qi_plan *out)
{
    const qi_group *g = &in->groups[group];
    const qi_span *span = &in->spans[group];
    const qi_strip *first = &in->strips[*w];
    const i32 past = span[1].strip;
    i32 next = *w;
    QI_ROLLED
    while (next < past && in->strips[next].index == index) next++;
    const i32 pieces = span->pieces + in->strips[next].work - first->work;
    i32 at = span->work + place * span->pieces + first->work, slot = -1, merge = -1;
    if (span->partial || pieces > 1) {
        slot = span->slots + first->slots;
        merge = span->merges + first->merges;
    }
    if (span->partial) {
        const i32 head = t->kv_head - (g->kv_head < 0 ? 0 : g->kv_head);
        const i32 rows = head * g->num_rows + t->row_begin - g->row_begin;
        slot += rows * limits->group_size * span->pieces;
        merge += index;
    }
    qi_work piece = first_piece(group, t, slot, merge);
    const i32 parts = span->pieces > 1 ? parts_of_piece(limits, t, span->pieces) : 0;
    QI_ROLLED
    for (; *w < next; ++*w) {
        const i32 key = in->strips[*w].key;
        at = emit_until(limits, t, parts, key, at, &piece, out);
        out->work_indptr[*w] = key == piece.kv_begin ? at : at + 1;
    }
    if (pieces > 1) at = emit_until(limits, t, parts, t->kv_end, at, &piece, out);
    piece.kv_end = t->kv_end;
    put_pieces(out->work, &piece, at, at + 1, 1);
    if (merge >= 0) emit_merge(in, limits, g, t, pieces, slot, merge, out);
}

/* Writes tiles of a group: `index` and every step-th after it. turns: heads may take turns. */
static void emit_group(const qi_lengths *in, const qi_limits *limits, i32 turns, i32 group,
                       i32 index, i32 step, const qi_plan *out)
{
    const qi_group *g = &in->groups[group];
    const qi_span *span = &in->spans[group];
    const i32 past = span[1].strip, decode = is_decode(limits, g);
    i32 w = span->strip;
    if (index >= span->tiles) return;
    tile t;
    tile_at(in, limits, group, index, &t);
    const i32 first_head = t.kv_head - index;
    qi_work piece = first_piece(group, &t, -1, -1);
    QI_ROLLED
    while (index < span->tiles) {
        QI_ROLLED
        while (w < past && (in->strips[w].index < index || is_between(&in->strips[w], span))) w++;
        if (decode && !span->partial) { /* tiles alike up to the next strip, a piece each */
            const i32 until = w < past ? in->strips[w].index : span->tiles;
            piece.kv_head = (u16)(first_head + index);
            index =
                put_pieces(out->work + span->work + in->strips[w].work, &piece, index, until, step);
            if (index >= span->tiles) return;
            if (index > until) continue;
        }
        if (decode)
            t.kv_head = first_head + index;
        else
            make_prefill_tile(limits, g, index, &t);
        const i32 place = turns && !decode ? place_of(limits, g, index) : index;
        emit(in, limits, group, &t, index, place, &w, out);
        index += step;
    }
}

/* Writes the work list: so many lanes a group as groups have tiles. */
static void emit_all(qi_lanes lanes, const qi_lengths *in, const qi_limits *limits, i32 turns,
                     i64 work, const qi_plan *out)
{
    i32 team = 1;
    QI_ROLLED
    while (team * 2 <= lanes.count && (i64)team * in->num_groups < work) team *= 2;
    const i32 teams = lanes.count / team;
    if (lanes.id >= teams * team) return;
    QI_ROLLED
    for (i32 g = lanes.id / team; g < in->num_groups; g += teams)
        emit_group(in, limits, turns, g, lanes.id % team, team, out);
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

/* Pieces of tiles beside their first, of all tiles together. */
static i64 max_pieces(const qi_limits *limits)
{
    return limits->cost_piece > 0 ? (i64)ROUNDS * limits->num_workers : limits->num_workers - 1;
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
    return tiles + max_pieces(limits);
}

i64 qi_schedule_split_rows(const qi_limits *limits, i64 max_rows)
{
    const i64 decode = limits->decode_rows < max_rows ? limits->decode_rows : max_rows;
    i64 rows = decode * limits->group_size * (limits->split_heads ? 1 : limits->num_kv_heads);
    if (max_rows > limits->decode_rows && rows < (i64)limits->tile_rows * limits->group_size)
        rows = (i64)limits->tile_rows * limits->group_size;
    /* n cuts make at most 2 n pieces of cut tiles; with several levels a tile's first has its partial rows anyhow */
    return (limits->cost_piece > 0 ? 1 : 2) * max_pieces(limits) * rows;
}

i64 qi_schedule_rows_needed(const qi_lengths *in, const qi_limits *limits)
{
    i64 sums[NUM_SUMS] = {0}, most[NUM_MOST] = {0};
    qi_span span;
    QI_ROLLED
    for (i32 g = 0; g < in->num_groups; g++)
        measure(in, limits, &in->groups[g], 0, 0, &span, sums, most);
    return sums[SLOTS];
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
    const i64 worth = limits->cost_strip > 0 ? quotient(total, limits->cost_strip) : count;
    if (worth < s.count) s.count = (i32)(worth > 1 ? worth : 1);
    s.size = quotient(total, s.count);
    s.longer = total - s.size * s.count;
    s.last = s.size > 0 ? s.count : (i32)(s.longer > 1 ? s.longer : 1);
    return s;
}

/* Are so many decode tiles about as large as the largest? */
static i32 are_alike(const strips *s, i64 tiles, i64 largest)
{
    return (tiles * largest - s->total) * 8 <= s->total;
}

/* Are strips of whole tiles, alike and more than there are workers, little longer than equal ones? */
static i32 is_whole(const strips *s, const qi_limits *limits, i64 tiles, i64 largest)
{
    const i64 workers = limits->num_workers;
    return tiles > 0 && are_alike(s, tiles, largest) &&
           largest * quotient(tiles + workers - 1, workers) <= s->size + limits->cost_cut;
}

/* Into how many pieces each of a few decode tiles is best cut, a strip each; 0: better into equal strips. Tiles that are not
 * alike stay whole or are cut by strips.
 *
 * Times are what a unit does meanwhile with its even share of the memory's speed: none is shorter than what all take
 * together, nor than the longest strip takes by itself, and units that have to be faster because others are idle are a
 * little short of it. Whatever is cut is merged, which takes longer the more pieces there are; equal strips have parts of
 * two tiles. */
static i32 pieces_of_tiles(const strips *s, const qi_limits *limits, i64 tiles, i64 largest)
{
    const i64 workers = limits->num_workers, alone = limits->alone > 0 ? limits->alone : 1;
    const i64 units = limits->num_units < workers ? limits->num_units : workers;
    if (tiles == 0 || tiles > workers) return 0;
    const i64 all = quotient(s->total, units), cut = quotient(limits->cost_cut * workers, units);
    const i64 part = cost_of_key(limits, 1, 1) * limits->cut_align;
    const i64 parts = quotient(largest - limits->cost_visit + part - 1, part);
    const i64 choices[] = {1, quotient(units, 2 * tiles), quotient(units, tiles),
                           quotient(workers, tiles)};
    i64 least = all + cut + quotient(cut * (choices[3] + 8), 64), pieces = 0;
    QI_ROLLED
    for (int i = 0; i < (are_alike(s, tiles, largest) ? 4 : 1); i++) {
        const i64 wanted = choices[i] < parts ? choices[i] : parts;
        if (wanted < 1) continue;
        const i64 each = quotient(parts + wanted - 1, wanted), n = quotient(parts + each - 1, each);
        const i64 strip = n == 1 ? largest : quotient(largest * each, parts);
        const i64 busy = quotient(tiles * n + units - 1, units) * strip;
        const i64 fast = quotient(busy, alone);
        const i64 slow = busy > all ? all + quotient(busy - all, 4 * alone) : all;
        const i64 time = (fast > slow ? fast : slow) + (n == 1 ? 0 : cut + quotient(cut * n, 64));
        if (time > least || (time == least && pieces > 0)) continue;
        least = time;
        pieces = n;
    }
    return (i32)pieces;
}

/* What pieces of tiles should cost, where workers take items as they come free, those of shared levels first: so that
 * there are as many pieces of these as workers, or a few times as many where a worker's take less time then. No more
 * than ROUNDS pieces a worker of all tiles. 0: strips cut them. */
static i64 piece_cost(const qi_limits *limits, const i64 *totals)
{
    const i64 tiles = totals[SHARED], workers = limits->num_workers;
    if (limits->cost_piece == 0 || limits->fixed_cuts || tiles == 0) return 0;
    const i64 cost = quotient(totals[SHARED_COST], tiles);
    i64 pieces = 1, least = NOWHERE;
    QI_ROLLED
    for (i64 rounds = 1; rounds <= ROUNDS; rounds++) {
        const i64 n = quotient(rounds * workers, tiles);
        if (n == 0) continue;
        const i64 taken = quotient(tiles * n + workers - 1, workers);
        const i64 time = taken * (limits->cost_piece + quotient(cost, n));
        if (time >= least) continue;
        least = time;
        pieces = n;
    }
    const i64 piece = quotient(cost, pieces), smallest = quotient(totals[COST], ROUNDS * workers);
    return piece > smallest ? piece : smallest + 1;
}

/* Measures all groups; piece, price: see measure(). Collective. */
QI_OUTLINED void measure_all(qi_lanes lanes, const qi_lengths *in, const qi_limits *limits,
                             i64 piece, i64 price, i64 *sums, i64 *totals, i64 *most)
{
    const share own = share_of(lanes, in->num_groups);
    for (int k = 0; k < NUM_SUMS; k++) sums[k] = 0;
    for (int k = 0; k < NUM_MOST; k++) most[k] = 0;
    QI_ROLLED
    for (i32 g = own.begin; g < own.end; g++)
        measure(in, limits, &in->groups[g], piece, price, &in->spans[g], sums, most);
    lanes_add(lanes, sums, totals, most);
}

/* The same, of tiles in pieces where that is better and partial rows suffice. Returns whether they are. */
static i32 measure_pieces(qi_lanes lanes, const qi_lengths *in, const qi_limits *limits, i64 *sums,
                          i64 *totals, i64 *most)
{
    const i64 piece = piece_cost(limits, totals);
    if (piece == 0) return 0;
    measure_all(lanes, in, limits, piece, 0, sums, totals, most);
    if (totals[SLOTS] <= limits->max_split_rows) return 1;
    measure_all(lanes, in, limits, 0, 0, sums, totals, most);
    return 0;
}

/* Where the work of shared levels ends, or begins: groups of either kind stand together. */
static i32 border_of_shared(const qi_lengths *in, i32 work)
{
    i32 low = 0, high = in->num_groups;
    QI_ROLLED
    while (low < high) {
        const i32 middle = low + (high - low) / 2;
        if (is_shared(in, &in->groups[middle]) == is_shared(in, &in->groups[0]))
            low = middle + 1;
        else
            high = middle;
    }
    if (low == in->num_groups) return work;
    return in->spans[low].work + in->strips[in->spans[low].strip].work;
}

/* Are workers to take items as they come free? Unless there are few, made equal by cuts. */
static i32 is_claimed(const strips *s, const qi_limits *limits, i32 levels, i64 work, i64 merges,
                      i64 largest_prefill)
{
    enum { MANY = 4 }; /* for a worker */
    if (limits->cost_cut_prefill == 0) return 0;
    return levels > 1 || merges == 0 || work >= (i64)MANY * limits->num_workers ||
           (largest_prefill > 0 && !s->cut_prefill);
}

static void finish(qi_lanes lanes, const strips *s, const qi_lengths *in, const qi_limits *limits,
                   const i64 *totals, const i64 *cuts, const i64 *most, i64 cost_per_worker,
                   const qi_plan *out)
{
    const i32 work = (i32)(totals[WORK] + cuts[WORK]);
    QI_ROLLED
    for (i32 w = s->last + lanes.id; w <= limits->num_workers; w += lanes.count)
        out->work_indptr[w] = work;
    if (lanes.id != 0) return;
    qi_plan_header header = {.num_tokens = in->num_tokens,
                             .num_requests = in->num_requests,
                             .num_work = work,
                             .num_merges = (i32)(totals[MERGES] + cuts[MERGES]),
                             .num_strips = s->count,
                             .num_levels = in->num_levels,
                             .num_split_rows = totals[SLOTS] + cuts[SLOTS],
                             .cost_per_worker = cost_per_worker};
    header.claimed = is_claimed(s, limits, in->num_levels, work, header.num_merges, most[PREFILL]);
    if (in->num_levels > 1) {
        const i32 border = border_of_shared(in, work), first = is_shared(in, &in->groups[0]);
        header.shared_begin = first ? 0 : border;
        header.num_shared = first ? border : work - border;
    }
    out->work_indptr[0] = 0;
    *out->header = header;
}

void qi_schedule(qi_lanes lanes, const qi_lengths *in, const qi_limits *limits, const qi_plan *out)
{
    const share groups = share_of(lanes, in->num_groups);
    i64 sums[NUM_SUMS], totals[NUM_SUMS], cuts[NUM_SUMS], most[NUM_MOST];
    clear_row_merge(lanes, in, limits, out);
    measure_all(lanes, in, limits, 0, 0, sums, totals, most);
    if (totals[SLOTS] > limits->max_split_rows) {
        qi_schedule_nothing(lanes, limits, QI_PLAN_SPLIT_ROWS * 256, -1, out);
        return;
    }
    const i32 in_pieces = measure_pieces(lanes, in, limits, sums, totals, most);
    const i64 spare = limits->max_split_rows - totals[SLOTS];
    strips s = make_strips(limits, totals[COST], limits->num_workers);
    s.whole = in_pieces;
    const i64 cost_per_worker = s.size + (s.longer > 0);
    if (limits->cost_cut > 0 && !limits->fixed_cuts && !in_pieces && most[PREFILL] == 0) {
        const i64 tiles = totals[WORK];
        const i32 pieces = pieces_of_tiles(&s, limits, tiles, most[DECODE]);
        if (pieces > 0) {
            measure_all(lanes, in, limits, 0, pieces, sums, totals, most);
            s = make_strips(limits, totals[COST], tiles * pieces);
            s.pieces = pieces;
        } else {
            s.whole = is_whole(&s, limits, tiles, most[DECODE]);
        }
    }
    s.cut_prefill =
        !limits->fixed_cuts && !in_pieces &&
        most[PREFILL] >
            (limits->cost_cut_prefill > 0 ? s.size + limits->cost_cut_prefill : s.size / 8);
    place(&s, in, groups, sums);
    if (lanes.id == 0) in->spans[in->num_groups].strip = s.last;
    lanes_sync(lanes);
    cut_tiles(lanes, &s, in, limits, spare, cuts);
    emit_begins(lanes, &s, in, out);
    emit_all(lanes, in, limits, limits->near_keys > 0 && !s.cut_prefill, totals[WORK], out);
    finish(lanes, &s, in, limits, totals, cuts, most, cost_per_worker, out);
}
