/* top_p.cuh - top_p, right after softmax or first on a row of weights, by one pass over the row once its largest
 * value is known.
 *
 * A sample says beforehand (guess.cuh) between which weights the prefix ends, or, where few tokens hold the mass, above
 * which weight they are. The pass that makes the weights also adds up what is above that range, and lists the tokens in
 * it. Every block gets all lists, and finds the end among them by itself; so it has each warp's share of the mass
 * that is kept, too, and a draw needs no pass. Of a short list the first block draws by itself. Where the guess was
 * wrong, find() looks at the row.
 *
 * Blocks meet twice, both times by messages: samples with the largest values, then sums with lists. Lists go to a place
 * and an mbarrier that nobody has used before.
 *
 * Where rows wait for room (CROWDED) and are drawn from, a block has only what three of them an SM can have (LEAN). Its list
 * stays with it until all have the sums, which say for sure whether the end is listed; then the first block takes the lists to
 * where its part of the row was, ends the row and draws alone, and the others leave.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_TOP_P_CUH
#define QI_SAMPLING_TOP_P_CUH

#include "ops/sampling/guess.cuh"

/* ---- the pass ---------------------------------------------------------------------------------- */

enum { GROUP = 32 / VEC }; /* pieces of a thread whose hits are in one word */

/* Lists this thread's hits: a bit for each token from piece `first` on. Returns their mass. */
QI_INLINE u64 list_hits(const row_view *r, finder *f, listing *l, int first, u32 hits)
{
    u64 *const list = LEAN ? l->own : lists_of(r, f) + r->at.rank * LISTED;
    u64 mass = 0;
    for (; hits; hits &= hits - 1) {
        const u32 at = (u32)__ffs((int)hits) - 1;
        const int i = first + (int)at / VEC, e = (int)at % VEC;
        float x[VEC];
        if (!RESIDENT) reread_piece(r, TOP_P_AT, i, x);
        const float w = RESIDENT ? r->x[i * (THREADS * VEC) + e] : x[e];
        const u32 to = atomicAdd(&l->listed, 1u);
        if (to < LISTED) list[to] = rank_at(key_of(w), token_at(r, i) + (u32)e);
        mass += mass_of(w, r->unit);
    }
    return mass;
}

/* ---- the search --------------------------------------------------------------------------------- */

/* What warps send to all blocks: the mass above the range, or, if nothing is there, in it; and all. Then how many tokens each
 * block lists, and of what mass where LEAN. */
enum { EDGE, TOTAL, SUMS };

/* Sends this warp's sums, and this block's list, unless LEAN. */
QI_INLINE void send_sums(const row_view *r, finder *f, listing *l, message m, u64 edge, u64 total)
{
    const u32 t = threadIdx.x, lane = r->at.lane, rank = r->at.rank;
    u64 *const list = lists_of(r, f) + rank * LISTED;
    expect(m.arrived, SUMS * ALL_WARPS + (1 + LEAN) * CLUSTER);
    if (lane < CLUSTER) {
        send(m.to + EDGE * ALL_WARPS + r->at.warp, edge, m.arrived, lane);
        send(m.to + TOTAL * ALL_WARPS + r->at.warp, total, m.arrived, lane);
    }
    __syncthreads();
    const u32 n = l->listed;
    if (t < CLUSTER) send(m.to + SUMS * ALL_WARPS + rank, n, m.arrived, t);
    if (LEAN && t < CLUSTER)
        send(m.to + SUMS * ALL_WARPS + CLUSTER + rank, l->within, m.arrived, t);
    for (u32 other = 1; !LEAN && other < CLUSTER; other++)
#pragma unroll 1
        for (u32 i = t; i < min(n, (u32)LISTED); i += THREADS)
            send(list + i, list[i], &r->at.box->listed, (rank + other) % CLUSTER);
    if (CLUSTER == 1) __syncthreads();
}

/* Warps take lists in turn; several of them one, where there are fewer lists. */
enum {
    OF_LIST = SEARCHING > CLUSTER ? SEARCHING / CLUSTER : 1,
    SEARCHERS = SEARCHING * WARP /* threads */
};
#define FOR_EACH_LISTED(l, of, i)                                                                  \
    for (u32 of = threadIdx.x / WARP % CLUSTER; of < CLUSTER; of += SEARCHING)                     \
    _Pragma("unroll 1") for (u32 i = threadIdx.x / WARP / CLUSTER * WARP + threadIdx.x % WARP;     \
                             i < (l)->counts[of]; i += OF_LIST * WARP)

QI_INLINE u64 rank_listed(const row_view *r, finder *f, u32 of, u32 i)
{
    return lists_of(r, f)[of * LISTED + i];
}

QI_INLINE u64 mass_of_rank(const row_view *r, u64 rank)
{
    return mass_of(value_of((u32)(rank >> 32)), r->unit);
}

QI_INLINE void sync_searchers()
{
    bar_sync(1, SEARCHERS);
}

/* The last rank of the prefix, if it is among those listed, and the mass up to it: sums by ranges of ranks say in which of
 * them it is, which is then divided, until few tokens are there. Whether it is. */
QI_INLINE int find_listed(const row_view *r, finder *f, listing *l, bracket b, u64 above, u64 wish,
                          u64 *end, u64 *mass)
{
    const u32 t = threadIdx.x, lane = r->at.lane, warp = t / WARP;
    u64 *const sums = (u64 *)sums_of(r, f);
    u64 high = (u64)b.high << 32 | ~0u, width = high - ((u64)b.low << 32);
    u32 n;
    do {
        const int shift = max(64 - __clzll((long long)width) - (31 - __clz(SEARCHERS)), 0);
        sums[t] = 0;
        sync_searchers();
        FOR_EACH_LISTED(l, of, i)
        {
            const u64 rank = rank_listed(r, f, of, i), below = high - rank;
            if (below <= width) add_shared(&sums[below >> shift], mass_of_rank(r, rank));
        }
        sync_searchers();
        if (t == 0) l->num_few = 0;
        const u64 here = sums[t], up_to = warp_scan_u64(here, lane);
        if (lane == WARP - 1) l->room[warp] = up_to;
        sync_searchers();
        u64 before = above + up_to - here, all = above;
        for (u32 i = 0; i < SEARCHING; i++) {
            all += l->room[i];
            if (i < warp) before += l->room[i];
        }
        if (all < wish) return 0;
        if (before < wish && before + here >= wish) f->end = t, f->end_amount = before;
        sync_searchers();
        const u64 skipped = (u64)f->end << shift;
        above = f->end_amount;
        high -= skipped;
        width = min(width - skipped, ((u64)1 << shift) - 1);
        FOR_EACH_LISTED(l, of, i)
        {
            const u64 rank = rank_listed(r, f, of, i);
            if (high - rank > width) continue;
            const u32 to = atomicAdd(&l->num_few, 1u);
            if (to < WARP) l->few[to] = rank;
        }
        sync_searchers();
        n = l->num_few;
    } while (n > WARP);
    const u64 rank = lane < n ? l->few[lane] : 0, its = lane < n ? mass_of_rank(r, rank) : 0;
    u64 sum = above;
#pragma unroll 4
    for (u32 i = 0; i < n; i++) {
        const u64 other = __shfl_sync(ALL_LANES, its, (int)i);
        if (l->few[i] >= rank) sum += other;
    }
    const u32 is_end = __ballot_sync(ALL_LANES, lane < n && sum >= wish && sum - its < wish);
    const int source = __ffs((int)is_end) - 1;
    *end = __shfl_sync(ALL_LANES, rank, source);
    *mass = __shfl_sync(ALL_LANES, sum, source);
    return 1;
}

/* What is known from the sums, by one warp of each block: all find the same. */
QI_INLINE void judge(row_view *r, listing *l, const u64 *sent, bracket b, int some_above, float p)
{
    const u32 lane = r->at.lane;
    const u32 count = lane < CLUSTER ? (u32)sent[SUMS * ALL_WARPS + lane] : 0;
    const u32 there = min(count, (u32)LISTED), up_to = warp_scan(there, lane);
    const u64 edge = sum_sent(&r->at, sent + EDGE * ALL_WARPS);
    const u64 total = sum_sent(&r->at, sent + TOTAL * ALL_WARPS), wish = wish_of(total, p);
    const int fits = __reduce_max_sync(ALL_LANES, count) <= LISTED;
    const u32 n = __shfl_sync(ALL_LANES, up_to, WARP - 1);
    u64 reached = edge; /* by what is listed */
    if (LEAN && some_above)
        reached += warp_sum_u64(lane < CLUSTER ? sent[SUMS * ALL_WARPS + CLUSTER + lane] : 0);
    if (!LEAN) expect(&r->at.box->listed, n - __shfl_sync(ALL_LANES, there, (int)r->at.rank));
    if (lane < CLUSTER) l->counts[lane] = there, l->ends[lane] = up_to;
    if (lane > 0) return;
    l->total = total, l->above = some_above ? edge : 0, l->wish = wish, l->b = b, l->fits = fits;
    if (p >= 1.f || total == 0)
        l->found = NO_END;
    else if (!fits || (some_above ? edge >= wish || (LEAN && reached < wish) : edge < wish))
        l->found = NOT_LISTED;
    else
        l->found = DRAWS && !some_above && n <= FEW ? FEW_LISTED : LISTED_END;
    if (LEAN && r->at.rank == 0 && l->found != NOT_LISTED && l->found != NO_END)
        expect(&r->at.box->listed, n - there);
}

/* By the first warps of each block, if the end may be among those listed: all find the same. Where what is kept is drawn
 * from, sums of warps have it added. */
QI_INLINE void search(row_view *r, finder *f, listing *l, u64 *sent)
{
    u64 end = 0, mass = 0;
    const int found = find_listed(r, f, l, l->b, l->above, l->wish, &end, &mass);
    if (threadIdx.x == 0) {
        l->kept = mass, l->end = end;
        if (!found) l->found = NOT_LISTED;
    }
    if (!DRAWS || !found) return;
    const u32 run = (u32)r->pieces * PIECE; /* tokens of a warp */
    if (l->above == 0) {                    /* what was sent is of all that is listed, or nothing */
        for (u32 i = threadIdx.x; i < ALL_WARPS; i += SEARCHERS) sent[EDGE * ALL_WARPS + i] = 0;
        sync_searchers();
    }
    FOR_EACH_LISTED(l, of, i)
    {
        const u64 rank = rank_listed(r, f, of, i);
        if (rank >= end)
            add_shared(&sent[EDGE * ALL_WARPS + ~(u32)rank / run], mass_of_rank(r, rank));
    }
}

/* Makes stage s of the row, if that is softmax, and lists the tokens in the range. *edge: the mass of those above it, of
 * which there are some, or of those listed. */
QI_INLINE void look_through(const row_view *r, const int s, finder *f, listing *l, range in,
                            float largest, const int some_above, u64 *total, u64 *edge)
{
    const int makes = kind_of(s) == STAGE_SOFTMAX;
    u64 within = 0;
    *total = *edge = 0;
#pragma unroll 1
    for (int first = 0; first < r->pieces; first += GROUP) {
        const int group = min((int)GROUP, r->pieces - first);
        mass_sum all = {}, kept = {};
        u32 hits = 0;
#pragma unroll UNROLL
        for (int n = 0; n < group; n++) {
            float x[VEC];
            u32 bits = 0;
            piece(r, s, first + n, x);
            for (int e = 0; e < VEC; e++) {
                if (makes) x[e] = weight_of(x[e], largest);
                const mass_sum mass = split_mass(in_unit(r, row_kind(TOP_P_AT), x[e]));
                const int reaches = x[e] >= in.low;
                add_mass_if(&all, 1, mass);
                if (some_above) add_mass_if(&kept, reaches, mass);
                bits |= reaches && (!some_above || x[e] < in.high) ? 1u << e : 0;
            }
            hits |= bits << n * VEC;
            if (makes && RESIDENT) keep_piece(r, first + n, x);
        }
        *total += whole_mass(all, (u32)(group * VEC));
        const u64 listed = list_hits(r, f, l, first, hits);
        *edge += some_above ? whole_mass(kept, (u32)(group * VEC)) - listed : listed;
        within += listed;
    }
    if (LEAN && some_above && within > 0) add_shared(&l->within, within);
}

/* The first block takes what all have listed to where its part of the row was, and goes on alone: others make room. Whether
 * this is it. */
QI_INLINE int hand_over(const row_view *r, finder *f, const listing *l)
{
    const u32 rank = r->at.rank;
    u64 *const list = lists_of(r, f) + rank * LISTED;
    for (u32 i = threadIdx.x; i < l->counts[rank]; i += THREADS) {
        if (rank == 0)
            list[i] = l->own[i];
        else
            send(list + i, l->own[i], &r->at.box->listed, 0);
    }
    return rank == 0;
}

/* The pass, and the search: stage s is a softmax before top_p, or top_p itself, which this goes before. */
QI_INLINE void list_tokens(row_view *r, const int s, finder *f, listing *l)
{
    const int makes = kind_of(s) == STAGE_SOFTMAX;
    const float p = number_of(r, TOP_P_AT);
    float largest;
    u64 total, edge;
    const range in = guess(r, s, l, p, &largest);
    const int some_above = in.high < ABOVE_ALL;
    if (makes) r->stages[s].value = largest;
    if (some_above)
        look_through(r, s, f, l, in, largest, 1, &total, &edge);
    else
        look_through(r, s, f, l, in, largest, 0, &total, &edge);
    const message m = next_message(&r->at);
    send_sums(r, f, l, m, warp_sum_u64(edge), warp_sum_u64(total));
    r->sent = m.to;
    if (threadIdx.x < WARP) {
        const bracket b = {key_of(in.low), min(key_of(in.high) - 1, key_of(makes ? 1.f : largest))};
        if (CLUSTER > 1) await(m.arrived, m.parity);
        judge(r, l, m.to, b, some_above, p);
    }
    if (OUT == ROW_TOKENS && threadIdx.x / WARP == WARPS - 1) /* which has nothing to do */
        l->random = random_of(r);
    __syncthreads();
    if (LEAN && (l->found == NOT_LISTED || l->found == NO_END || !hand_over(r, f, l))) return;
    if (LEAN) __syncthreads();
    if (CLUSTER > 1) await(&r->at.box->listed, r->at.turns >> LISTED_TURN & 1);
    r->at.turns ^= 1u << LISTED_TURN; /* of box->listed */
    if (l->found != LISTED_END) return;
    if (threadIdx.x < SEARCHERS) search(r, f, l, m.to);
    __syncthreads();
}

/* ---- what follows --------------------------------------------------------------------------------- */

typedef struct listed_token {
    u64 rank, mass;
} listed_token;
_Static_assert(FEW * sizeof(listed_token) <= THREADS * sizeof(u32),
               "they are where a finder counts");

/* The masses of those of n tokens whose ranks are at least `least`, and their lower halves, which are of lower indices the
 * larger, at least `low`. Of `each` lanes with the same bounds this is that number `part`. */
QI_INLINE u64 add_few(const listed_token *tokens, u32 n, u64 least, u32 low, u32 part, u32 each)
{
    u64 sum = 0;
#pragma unroll 4
    for (u32 i = part; i < n; i += each) {
        const listed_token it = tokens[i];
        if (it.rank >= least && (u32)it.rank >= low) sum += it.mass;
    }
    for (u32 step = 1; step < each; step *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    return sum;
}

/* Finds the end among the few tokens that are listed, and draws: several threads add up what comes before one token. */
QI_INLINE void draw_few(const row_view *r, finder *f, listing *l)
{
    const u32 t = threadIdx.x, n = l->ends[CLUSTER - 1], each = threads_of_few(n);
    listed_token *const tokens = (listed_token *)sums_of(r, f);
    if (t < n) {
        u32 of = 0;
        while (t >= l->ends[of]) of++;
        const u64 rank = lists_of(r, f)[of * LISTED + t - (l->ends[of] - l->counts[of])];
        tokens[t] = {rank, mass_of_rank(r, rank)};
    }
    __syncthreads();
    const u32 part = t % each, i = t / each;
    const listed_token mine = tokens[min(i, n - 1)];
    u64 sum = add_few(tokens, n, mine.rank, 0, part, each);
    if (sum >= l->wish && sum - mine.mass < l->wish) l->end = mine.rank, l->kept = sum;
    __syncthreads();
    const u64 target = high_product(l->random, l->kept);
    sum = add_few(tokens, n, l->end, (u32)mine.rank, part, each);
    if (mine.rank >= l->end && sum > target && sum - mine.mass <= target)
        ((i32 *)r->p->out)[r->request] = (i32) ~(u32)mine.rank;
}

/* All stages after s on the tokens listed down to the end, the only ones left, if they are few enough: *left as of
 * finish(), in the first block. Returns whether they are. */
QI_INLINE int finish_listed(row_view *r, const int s, finder *f, listing *l, int *left)
{
    enum { MINE = CLUSTER * LISTED / THREADS };
    const u32 t = threadIdx.x;
    u64 mine[MINE];
#pragma unroll
    for (u32 n = 0; n < MINE; n++) {
        const u32 i = t + n * THREADS;
        const u64 rank = i % LISTED < l->counts[i / LISTED] ? lists_of(r, f)[i] : 0;
        mine[n] = rank >= l->end ? rank : 0;
    }
    if (t == 0) l->listed = 0;
    __syncthreads();
#pragma unroll
    for (u32 n = 0; n < MINE; n++) {
        const u32 to = mine[n] ? atomicAdd(&l->listed, 1u) : ROOM;
        if (to >= ROOM) continue;
        f->list.ranks[to] = mine[n];
        f->list.values[to] = value_of((u32)(mine[n] >> 32));
    }
    __syncthreads();
    const u32 n = l->listed;
    if (n > ROOM) return 0;
    if (r->at.rank == 0) {
        sort_list(f, n);
        *left = finish_list(r, s, f, n);
    }
    return 1;
}

/* Draws, in the first block of a LEAN row alone, from what is kept: a warp's run of tokens is read again. */
QI_INLINE void draw_alone(const row_view *r, finder *f, const listing *l)
{
    enum { OF_LANE = ALL_WARPS / WARP };
    const u32 lane = r->at.lane;
    const u64 target = high_product(l->random, r->kept), *const sent = r->sent + lane * OF_LANE;
    row_view run = *r;
    u64 mine = 0, rest = 0;
    i32 found = -1;
    for (u32 j = 0; j < OF_LANE; j++) mine += sent[j];
    u64 before = warp_scan_u64(mine, lane) - mine;
    for (u32 j = 0; j < OF_LANE; j++) {
        if (target >= before && target - before < sent[j])
            found = (i32)(lane * OF_LANE + j), rest = target - before;
        before += sent[j];
    }
    const int source = __ffs((int)__ballot_sync(ALL_LANES, found >= 0)) - 1;
    rest = __shfl_sync(ALL_LANES, rest, source);
    run.at.warp = (u32)__shfl_sync(ALL_LANES, found, source);
    for (int first = 0; first < EACH; first += WARPS) {
        const int i = first + (int)(threadIdx.x / WARP);
        float x[VEC] = {};
        u32 words[WORDS] = {};
        int bad = 0;
        if (i < EACH) {
            load_piece(&run, i, words);
            open_piece(&run, i, words, x, &bad);
            apply_all(&run, 0, NUM_STAGES, i, x);
        }
        u64 all, sum = scan_block(piece_mass(r, NUM_STAGES, x), f->room, &all);
        for (int e = 0; e < VEC; e++) {
            const u64 its = mass_of(x[e], r->unit);
            if (rest >= sum && rest - sum < its)
                ((i32 *)r->p->out)[r->request] = (i32)(token_at(&run, i) + (u32)e);
            sum += its;
        }
        if (rest < all) return;
        rest -= all;
    }
}

/* Stage s, top_p, after the pass. Returns whether all that follows is done too: *left as of finish(). */
QI_INLINE int end_listing(row_view *r, const int s, finder *f, listing *l, int *left)
{
    if (LEAN && r->at.rank > 0 && l->found != NOT_LISTED) return 1;
    if (l->found == NO_END) {
        r->kept = l->total;
        r->sent += TOTAL * ALL_WARPS;
        return 0;
    }
    if (l->found == FEW_LISTED) {
        *left = 1;
        if (r->at.rank == 0) draw_few(r, f, l);
        return 1;
    }
    if (l->found == LISTED_END) {
        r->kept = l->kept;
        r->stages[s].last = {value_of((u32)(l->end >> 32)), ~(u32)l->end};
        if (TOP_P_IS_LAST) return 0;
        if (ends_in_list(s) && l->above == 0 && finish_listed(r, s, f, l, left)) return 1;
    }
    sync_row(); /* nobody looks at lists any more */
    if (l->found == LISTED_END) return 0;
    const bracket b =
        !l->fits && l->above < l->wish ? l->b : guess_mass(r, s, f, l->total, l->wish);
    r->stages[s].last = find(r, s, f, b, l->wish);
    r->sent = 0;
    return 0;
}

#endif
