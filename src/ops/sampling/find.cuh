/* find.cuh - where the shortest prefix of a row's order with a wished amount ends. The amount of a token is 1
 * (top_k) or its mass.
 *
 * A bracket of keys that holds the end is narrowed until few tokens are in it: those are gathered in the first
 * block of the row, sorted and added up. A bracket guessed well takes one pass over the row to be measured and
 * one to be gathered from; where too many tokens are in it, a histogram divides it by NUM_BINS, four times at
 * most. A bracket of one key is a tie, which the running sum by index decides.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_FIND_CUH
#define QI_SAMPLING_FIND_CUH

#include "ops/sampling/row.cuh"

#define SHARES_MAXIMA !LEAN
#include "ops/sampling/maxima.cuh"

enum {
    ALL_BINS = CLUSTER * THREADS < 1024 ? CLUSTER * THREADS : 1024,
    NUM_BINS = LEAN ? 128 : ALL_BINS,
    SLICE = NUM_BINS / CLUSTER,           /* bins that a block adds up, one a thread */
    ROOM = LEAN ? FEW : MOST_LISTED,      /* tokens that are sorted */
    OWN = (ROOM + THREADS - 1) / THREADS, /* of them, a thread's */
    SCATTERED = ROOM > FEW ? ROOM : 1,    /* to sort them, and buckets */
    BUCKETS = ROOM > FEW ? THREADS : 1
};

typedef struct histogram {
    u64 amount[NUM_BINS];
    u32 count[NUM_BINS];
} histogram;

/* Tokens: key << 32 | ~index, which puts them in order, largest first, and values. */
typedef struct token_list {
    u64 ranks[ROOM], scattered_ranks[SCATTERED];
    float values[ROOM], scattered_values[SCATTERED];
} token_list;

typedef struct finder {
    union {
        histogram bins;
        token_list list;
    };
    union {
        u32 count[BUCKETS]; /* of the list's */
        maxima most_of_lanes;
    };
    u32 next[BUCKETS];
    u64 room[WARPS];
    u32 gathered; /* in the first block: tokens that it was sent for the list; 0 before the next */
    u32 most, least, end;
    u64 end_amount;
} finder;

typedef struct bracket {
    u32 low, high; /* keys, inclusive */
} bracket;

/* The keys of finite values in the order of stage s; of weights, those above 0. */
QI_INLINE bracket all_keys(const int s)
{
    const int by_weight = kind_of(s) != STAGE_TYPICAL_P && row_kind(s) != ROW_LOGITS;
    return {by_weight ? 0x80800000u : 0x00800000u, 0xff7fffffu};
}

/* A bracket as values. */
typedef struct range {
    float low, high;
} range;

QI_INLINE range range_of(bracket b)
{
    return {value_of(b.low), value_of(b.high)};
}

QI_INLINE int inside(float value, range in)
{
    return value >= in.low && value <= in.high;
}

QI_INLINE u64 rank_at(u32 key, u32 token)
{
    return (u64)key << 32 | ~token;
}

/* ---- the list, by one block ------------------------------------------------------------------- */

/* The sum of the values of lower threads; in *all that of all. */
QI_INLINE u64 scan_block(u64 value, u64 *room, u64 *all)
{
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u64 sum = warp_scan_u64(value, lane) - value;
    __syncthreads();
    if (lane == WARP - 1) room[warp] = sum + value;
    __syncthreads();
    const u64 here = lane < WARPS ? room[lane] : 0;
    *all = warp_sum_u64(here);
    return sum + warp_sum_u64(lane < warp ? here : 0);
}

/* Sorts n tokens up to FEW: several threads count how many are before one of them. */
QI_INLINE void sort_few(finder *f, u32 n)
{
    const u32 t = threadIdx.x, each = threads_of_few(n), i = t / each;
    u32 before = 0;
    const u64 rank = i < n ? f->list.ranks[i] : 0;
    const float value = i < n ? f->list.values[i] : 0.f;
    for (u32 other = t % each; i < n && other < n; other += each)
        before += f->list.ranks[other] > rank;
    for (u32 step = 1; step < each; step *= 2) before += __shfl_xor_sync(ALL_LANES, before, step);
    __syncthreads();
    if (i < n && t % each == 0) f->list.ranks[before] = rank, f->list.values[before] = value;
    __syncthreads();
}

/* Sorts n tokens, largest rank first: into buckets by key, and within each by counting. Those with key 0 come last in
 * any order, in a bucket of their own. */
static __device__ __noinline__ void sort_list(finder *f, u32 n)
{
    if (ROOM <= FEW || n <= FEW) {
        sort_few(f, n);
        return;
    }
    const u32 t = threadIdx.x;
    u64 all;
    u32 most = 0, least = ~0u;
    f->count[t] = 0;
    if (t == 0) f->most = 0, f->least = ~0u;
    for (u32 i = t; i < n; i += THREADS) {
        const u32 key = (u32)(f->list.ranks[i] >> 32);
        most = max(most, key), least = min(least, key ? key : ~0u);
    }
    most = __reduce_max_sync(ALL_LANES, most), least = __reduce_min_sync(ALL_LANES, least);
    __syncthreads();
    if (t % WARP == 0) atomicMax(&f->most, most), atomicMin(&f->least, least);
    __syncthreads();
    most = f->most;
    const u32 width = most > f->least ? most - f->least : 0;
    const int bits = 32 - __clz((int)width), half = 30 - __clz(THREADS);
    const int shift = bits > half ? bits - half : 0; /* width >> shift < THREADS / 2 */
#define BUCKET(rank) ((rank) >> 32 ? (most - (u32)((rank) >> 32)) >> shift : THREADS - 1)
    for (u32 i = t; i < n; i += THREADS) atomicAdd(&f->count[BUCKET(f->list.ranks[i])], 1u);
    __syncthreads();
    f->next[t] = (u32)scan_block(f->count[t], f->room, &all);
    __syncthreads();
    for (u32 i = t; i < n; i += THREADS) {
        const u64 rank = f->list.ranks[i];
        const u32 to = atomicAdd(&f->next[BUCKET(rank)], 1u);
        f->list.scattered_ranks[to] = rank;
        f->list.scattered_values[to] = f->list.values[i];
    }
    __syncthreads();
    for (u32 i = t; i < n; i += THREADS) {
        const u64 rank = f->list.scattered_ranks[i];
        const u32 bucket = BUCKET(rank), end = f->next[bucket], begin = end - f->count[bucket];
        u32 to = rank >> 32 ? begin : i;
        for (u32 other = begin; rank >> 32 && other < end; other++)
            to += f->list.scattered_ranks[other] > rank;
        f->list.ranks[to] = rank;
        f->list.values[to] = f->list.scattered_values[i];
    }
    __syncthreads();
#undef BUCKET
}

/* Masses of a list's tokens: those of a thread, which are neighbours, the sum of those before them, and of all. */
typedef struct list_scan {
    u64 masses[OWN];
    u64 before, all;
} list_scan;

QI_INLINE list_scan scan_list(const row_view *r, finder *f, u32 n)
{
    list_scan scan;
    u64 mine = 0;
    for (u32 j = 0; j < OWN; j++) {
        const u32 i = threadIdx.x * OWN + j;
        scan.masses[j] = i < n ? mass_of(f->list.values[i], r->unit) : 0;
        mine += scan.masses[j];
    }
    scan.before = scan_block(mine, f->room, &scan.all);
    return scan;
}

/* The place at which the running sum reaches `wish`, above 0 and up to all; in *mass the sum there. */
QI_INLINE u32 end_of_scan(finder *f, const list_scan *scan, u64 wish, u64 *mass)
{
    u64 sum = scan->before;
    for (u32 j = 0; j < OWN; j++) {
        if (sum < wish && sum + scan->masses[j] >= wish)
            f->end = threadIdx.x * OWN + j, f->end_amount = sum + scan->masses[j];
        sum += scan->masses[j];
    }
    __syncthreads();
    *mass = f->end_amount;
    return f->end;
}

/* Of n sorted tokens, which hold the wish. */
QI_INLINE u32 end_of_prefix(const row_view *r, finder *f, u32 n, u64 wish, u64 *mass)
{
    const list_scan scan = scan_list(r, f, n);
    return end_of_scan(f, &scan, wish, mass);
}

/* ---- passes over the row ---------------------------------------------------------------------- */

typedef struct measure {
    u64 above, within; /* amounts */
    u64 count;         /* of tokens within */
    u32 mine;          /* of them, this thread's; ~0: not counted */
} measure;

/* The amount of a piece's tokens inside. */
QI_INLINE u64 piece_amount(const row_view *r, const int s, const float *x, range in)
{
    mass_sum sum = {};
    u32 count = 0;
    for (int e = 0; e < VEC; e++) {
        const int here = inside(order_value(r, s, x[e]), in);
        if (kind_of(s) == STAGE_TOP_K)
            count += here;
        else
            add_mass(&sum, in_unit(r, row_kind(s), here ? x[e] : 0.f));
    }
    return kind_of(s) == STAGE_TOP_K ? count : whole_mass(sum, VEC);
}

QI_INLINE int bin_shift(bracket b)
{
    const int bits = 32 - __clz((int)(b.high - b.low)), bin_bits = 31 - __clz(NUM_BINS);
    return bits > bin_bits ? bits - bin_bits : 0;
}

/* One pass; also fills the histogram of the bracket where `fill`. */
QI_INLINE measure look_at(row_view *r, const int s, finder *f, bracket b, const int fill)
{
    const int by_count = kind_of(s) == STAGE_TOP_K, shift = bin_shift(b);
    const range in = range_of(b);
    u64 sums[3] = {};
    u32 above_count = 0, count = 0;
    if (fill) {
        for (u32 i = threadIdx.x; i < NUM_BINS; i += THREADS)
            f->bins.amount[i] = f->bins.count[i] = 0;
        __syncthreads();
    }
    FOR_EACH_PIECE(r, i)
    {
        mass_sum above = {}, within = {}, mass = {};
        float x[VEC];
        piece(r, s, i, x);
        for (int e = 0; e < VEC; e++) {
            const float y = order_value(r, s, x[e]);
            const int is_above = y > in.high, here = y >= in.low && !is_above;
            if (by_count) {
                above_count += is_above;
            } else {
                mass = split_mass(in_unit(r, row_kind(s), x[e]));
                add_mass_if(&above, is_above, mass);
                add_mass_if(&within, here, mass);
            }
            count += here;
            if (fill && here) {
                const u32 bin = (b.high - key_of(y)) >> shift;
                atomicAdd(&f->bins.count[bin], 1u);
                if (!by_count) add_shared(&f->bins.amount[bin], whole_mass(mass, 1));
            }
        }
        sums[0] += whole_mass(above, VEC);
        sums[1] += whole_mass(within, VEC);
    }
    if (by_count) sums[0] = above_count;
    sums[2] = count;
    sum_row(&r->at, sums, 3, fill);
    return {sums[0], by_count ? sums[2] : sums[1], sums[2], count};
}

/* Makes of the bracket that one of its bins in which the amount reaches the wish. */
QI_INLINE void narrow(row_view *r, const int s, finder *f, bracket *b, measure *m, u64 wish)
{
    const int by_count = kind_of(s) == STAGE_TOP_K, shift = bin_shift(*b);
    const u32 bin = r->at.rank * SLICE + threadIdx.x;
    u32 count = 0;
    u64 here = 0, before, last;
    if (threadIdx.x < SLICE)
        for (u32 rank = 0; rank < CLUSTER; rank++) {
            count += *(u32 *)at_block(&f->bins.count[bin], rank);
            here += *(u64 *)at_block(&f->bins.amount[bin], rank);
        }
    if (by_count) here = count;
    before = warp_scan_u64(here, r->at.lane);
    last = __shfl_sync(ALL_LANES, before, WARP - 1);
    before += m->above + sum_before(&r->at, exchange(&r->at, &last, 1)) - here;
    const notice mine = {.amount = before, .key = count, .index = bin};
    const notice n = announce(&r->at, before < wish && before + here >= wish, mine);
    const u32 width = (1u << shift) - 1;
    b->high -= n.index << shift;
    if (b->high - b->low > width) b->low = b->high - width;
    m->above = n.amount;
    m->count = n.key;
    m->mine = ~0u;
}

/* Copies the tokens of a bracket, at most ROOM, into the first block; count of them are this thread's, ~0: not known. */
QI_INLINE void gather(row_view *r, const int s, finder *f, bracket b, u32 count)
{
    const range in = range_of(b);
    if (count == ~0u) {
        count = 0;
        FOR_EACH_PIECE(r, i)
        {
            float x[VEC];
            piece(r, s, i, x);
            for (int e = 0; e < VEC; e++) count += inside(order_value(r, s, x[e]), in);
        }
    }
    const u32 lane = r->at.lane, up_to = warp_scan(count, lane);
    const u32 all = __shfl_sync(ALL_LANES, up_to, WARP - 1);
    u32 to = 0;
    if (all > 0) {
        if (lane == 0) to = atomicAdd((u32 *)at_block(&f->gathered, 0), all);
        to = __shfl_sync(ALL_LANES, to, 0) + up_to - count;
    }
    if (count > 0) {
        token_list *const list = (token_list *)at_block(&f->list, 0);
        FOR_EACH_PIECE(r, i)
        {
            float x[VEC];
            piece(r, s, i, x);
            for (int e = 0; e < VEC; e++) {
                const float y = order_value(r, s, x[e]);
                if (!inside(y, in)) continue;
                list->ranks[to] = rank_at(key_of(y), token_at(r, i) + (u32)e);
                list->values[to++] = x[e];
            }
        }
    }
    sync_row();
    if (threadIdx.x == 0) f->gathered = 0;
}

/* Copies the tokens whose values are at least that of a key into the first block, in one pass. Returns how many there
 * are; of more than ROOM some are missing. */
QI_INLINE u32 gather_from(row_view *r, const int s, finder *f, u32 key)
{
    const float least = value_of(key);
    u32 *const gathered = (u32 *)at_block(&f->gathered, 0);
    u64 *const arrived = &r->at.box->listed;
    u32 to = 0, here = 0, claimed = 0;
    FOR_EACH_PIECE(r, i)
    {
        float x[VEC];
        u32 count = 0;
        piece(r, s, i, x);
        for (int e = 0; e < VEC; e++) count += x[e] >= least;
        here += count;
        if (count == 0 || to >= ROOM) continue; /* no more room, and none is asked for */
        to = atomicAdd(gathered, count);
        claimed += count;
        for (int e = 0; e < VEC; e++)
            if (x[e] >= least && to < ROOM)
                send(&f->list.ranks[to++], rank_at(key_of(x[e]), token_at(r, i) + (u32)e), arrived,
                     0);
    }
    u64 all = (u64)__reduce_add_sync(ALL_LANES, claimed) << 32;
    all |= __reduce_add_sync(ALL_LANES, here);
    all = sum_sent(&r->at, swap(&r->at, &all, 1));
    claimed = (u32)(all >> 32);
    const u32 listed = min(claimed, (u32)ROOM);
    if (r->at.rank == 0) {
        expect(arrived, listed);
        await(arrived, r->at.turns >> LISTED_TURN & 1);
        r->at.turns ^= 1u << LISTED_TURN;
        for (u32 i = threadIdx.x; i < listed; i += THREADS)
            f->list.values[i] = value_of((u32)(f->list.ranks[i] >> 32));
        __syncthreads();
    }
    if (threadIdx.x == 0) f->gathered = 0;
    return (u32)all;
}

/* The token at which the running sum by index, of amounts in a bracket, exceeds target: in the one thread that has
 * it, which is told so. Every warp has sent its amount, `mine`. */
QI_INLINE int locate(row_view *r, const int s, bracket b, u64 target, const u64 *sent, u64 mine,
                     u32 *token)
{
    const u64 before = sum_before(&r->at, sent);
    const range in = range_of(b);
    int here = 0;
    if (target < before || target - before >= mine) return 0;
    target -= before;
#pragma unroll 1
    for (int i = 0; i < r->pieces; i++) {
        float x[VEC];
        piece(r, s, i, x);
        const u64 amount = piece_amount(r, s, x, in), all = warp_sum_u64(amount);
        if (target >= all) {
            target -= all;
            continue;
        }
        u64 sum = warp_scan_u64(amount, r->at.lane) - amount;
        here = target >= sum && target - sum < amount;
        for (int e = VEC - 1; here && e >= 0;
             e--) { /* from the end: the first e with sum up to it > target */
            u64 up_to = sum;
            for (int j = 0; j <= e; j++) {
                const int counts = inside(order_value(r, s, x[j]), in);
                up_to += !counts ? 0 : kind_of(s) == STAGE_TOP_K ? 1 : mass_of(x[j], r->unit);
            }
            if (up_to > target) *token = token_at(r, i) + (u32)e;
        }
        break;
    }
    return here;
}

/* ---- guesses -------------------------------------------------------------------------------- */

/* A bracket for the k-th token: the k-th largest of some lanes' maxima is not above it. */
QI_INLINE bracket guess_top_k(row_view *r, const int s, finder *f, u32 k)
{
    bracket b = all_keys(s);
    if (k > MOST_BOUNDED) return b;
    share_maxima(&r->at, &f->most_of_lanes, key_of(thread_largest(r, s)));
    b.low = max(b.low, bound_of_maxima(&f->most_of_lanes, k));
    return b;
}

/* A bracket for where a mass is met, by samples of THREADS tokens in each of the blocks, from all of them: the
 * mass of what is not kept varies least, so each block estimates that. */
QI_INLINE bracket guess_mass(row_view *r, const int s, finder *f, u64 total, u64 wish)
{
    if (CLUSTER < 4 || LEAN) return all_keys(s); /* no room for samples */
    const u32 t = threadIdx.x, to = r->at.rank * (THREADS / CLUSTER) + t / CLUSTER;
    float x[VEC];
    piece(r, s, (int)((t + r->at.warp) % (u32)r->pieces), x);
    token_list *const list = (token_list *)at_block(&f->list, t % CLUSTER);
    list->ranks[to] = rank_at(x[0] > 0.f ? key_of(order_value(r, s, x[0])) : 0, to);
    list->values[to] = x[0];
    sync_row();
    sort_list(f, THREADS);
    const double share = (double)THREADS / ((double)r->pieces * (ALL_WARPS * PIECE));
    const u64 rest = (u64)((double)(total - wish) * share); /* of the sample not kept */
    const u32 i = THREADS - 1 - t;                          /* from the smallest on */
    u64 all;
    const u64 here = mass_of(f->list.values[i], r->unit);
    const u64 sum = scan_block(here, f->room, &all);
    if (t == THREADS - 1) f->end = 0;
    __syncthreads();
    if (sum <= rest && sum + here > rest) f->end = i;
    __syncthreads();
    const u32 key = max((u32)(f->list.ranks[f->end] >> 32), all_keys(s).low);
    const u64 keys[2] = {key, ~key};
    const u64 *const sent = exchange(&r->at, keys, 2);
    return {~(u32)max_sent(&r->at, sent + ALL_WARPS), (u32)max_sent(&r->at, sent)};
}

/* ---- all of it ------------------------------------------------------------------------------ */

/* Makes of a guess a bracket that holds the wish and at most ROOM tokens, or one key. 0: the whole row holds less
 * than the wish. */
QI_INLINE int find_bracket(row_view *r, const int s, finder *f, bracket *b, measure *m, u64 wish)
{
    const bracket all = all_keys(s);
    const int fill = kind_of(s) != STAGE_TOP_K; /* a guess by samples has more than ROOM, often */
    for (;;) {
        *m = look_at(r, s, f, *b, fill);
        if (m->above >= wish)
            *b = {b->high + 1, all.high};
        else if (m->above + m->within >= wish)
            break;
        else if (b->low == all.low)
            return 0;
        else
            *b = {all.low, b->low - 1};
    }
    for (int filled = fill; m->count > ROOM && b->low < b->high; filled = 0) {
        if (!filled) look_at(r, s, f, *b, 1);
        narrow(r, s, f, b, m, wish);
    }
    return 1;
}

/* The end of the prefix, which is among the tokens gathered in the first block; m.above is above them. */
QI_INLINE cut end_of_gathered(row_view *r, const int s, finder *f, measure m, u64 wish)
{
    const int sender = r->at.rank == 0 && threadIdx.x == 0;
    notice n = {};
    if (r->at.rank == 0) {
        u32 end = (u32)(wish - m.above) - 1;
        const u32 count = (u32)m.count;
        sort_list(f, count);
        if (kind_of(s) != STAGE_TOP_K) end = end_of_prefix(r, f, count, wish - m.above, &n.amount);
        n.key = (u32)(f->list.ranks[end] >> 32);
        n.index = ~(u32)f->list.ranks[end];
    }
    n = announce(&r->at, sender, n);
    r->kept = m.above + n.amount;
    return {value_of(n.key), n.index};
}

/* The end of the prefix. b is a guess; where the whole row holds less than the wish, all is kept. */
QI_INLINE cut find(row_view *r, const int s, finder *f, bracket b, u64 wish)
{
    measure m;
    if (!find_bracket(r, s, f, &b, &m, wish)) return KEEP_ALL;
    if (m.count <= ROOM) {
        gather(r, s, f, b, m.mine);
        return end_of_gathered(r, s, f, m, wish);
    }
    u64 mine = 0;
    FOR_EACH_PIECE(r, i)
    {
        float x[VEC];
        piece(r, s, i, x);
        mine += piece_amount(r, s, x, range_of(b));
    }
    mine = warp_sum_u64(mine);
    const u64 *const sent = exchange(&r->at, &mine, 1);
    notice n = {.key = b.high};
    const int sender = locate(r, s, b, wish - m.above - 1, sent, mine, &n.index);
    n = announce(&r->at, sender, n);
    r->kept = 0;
    return {value_of(n.key), n.index};
}

#endif
