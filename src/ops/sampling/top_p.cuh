/* top_p.cuh - top_p, right after softmax or first on a row of weights, by one pass over a row that stays.
 *
 * A sample says beforehand between which weights the prefix ends, or, where few tokens hold the mass, above which
 * weight they are. The pass that makes the weights also adds up what is above that range, and lists the tokens in
 * it. Where the guess was right, the rest is about the lists; else find() looks at the row.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_TOP_P_CUH
#define QI_SAMPLING_TOP_P_CUH

#include "ops/sampling/list.cuh"

/* The stage whose pass lists tokens; MAX_STAGES: none. Beside a top_k before it there are too few registers for it. */
QI_INLINE constexpr int find_front()
{
    if (EACH == 0 || EACH * VEC > 64) return MAX_STAGES;
    if (SOFTMAX_AT == NUM_EARLY && kind_of(SOFTMAX_AT + 1) == STAGE_TOP_P) return SOFTMAX_AT;
    return IN != ROW_LOGITS && kind_of(0) == STAGE_TOP_P ? 0 : MAX_STAGES;
}

enum {
    FRONT_AT = find_front(),
    FRONT = (FRONT_AT < MAX_STAGES),
    TOP_P_AT = FRONT_AT + (kind_of(FRONT_AT) == STAGE_SOFTMAX),
    PIECES = (EACH > 0) ? EACH : 1,
    SAMPLES = EACH < 4 ? 1 : 2,    /* pieces of a thread in the sample */
    TOP = 512,                     /* tokens that are listed where few hold the mass, about */
    WIDE = CLUSTER * ROOM * 3 / 4, /* and at most where the sample asks for more of the largest */
    MINE = (ROOM + THREADS - 1) / THREADS /* tokens of a list that a thread has */
};

/* What the pass found. */
typedef struct front {
    bracket b; /* of the tokens that are listed */
    measure m;
    u64 total; /* mass */
    u32 base;  /* tokens listed by lower blocks */
    int fits;  /* every block had room */
} front;

/* No weight is that large: +inf. */
#define ABOVE_ALL value_of(0xff800000u)

/* Pieces that warps have at different places. */
QI_INLINE int sample_at(const row_view *r, const int n)
{
    return (int)((r->at.warp + (u32)n * (PIECES / SAMPLES)) % PIECES);
}

/* A token's logit, or, up to a constant, that of a weight. */
QI_INLINE float logit_at(const row_view *r, const int s, float x)
{
    if (kind_of(s) == STAGE_SOFTMAX) return x;
    return (float)-information_of(x, r->unit) * (1.f / (16384.f * QI_LOG2E));
}

/* Counts the sample in f->count: a bin's share of nats is `width`, from the largest logit down. */
QI_INLINE void count_sample(const row_view *r, const int s, finder *f, float largest, float width)
{
#pragma unroll
    for (int n = 0; n < SAMPLES; n++) {
        float x[VEC];
        piece(r, s, sample_at(r, n), x);
        for (int e = 0; e < VEC; e++) {
            const float below = (largest - logit_at(r, s, x[e])) * (1.f / width);
            if (x[e] > absent(row_kind(s)))
                atomicAdd(&f->count[(u32)fminf(fmaxf(below, 0.f), (float)(THREADS - 1))], 1u);
        }
    }
}

/* The sums of lower threads' three values; in all[] those of all. */
QI_INLINE void scan_three(finder *f, const u32 *values, u32 *before, u32 *all)
{
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 *const room = f->next;
    for (int i = 0; i < 3; i++) {
        before[i] = warp_scan(values[i], lane) - values[i];
        if (lane == WARP - 1) room[i * WARPS + warp] = before[i] + values[i];
    }
    __syncthreads();
    for (int i = 0; i < 3; i++) {
        const u32 here = lane < WARPS ? room[i * WARPS + lane] : 0;
        all[i] = __reduce_add_sync(ALL_LANES, here);
        before[i] += __reduce_add_sync(ALL_LANES, lane < warp ? here : 0);
    }
}

/* The logits between which the prefix ends, or that and nothing above. All blocks find the same. */
QI_INLINE range guess_range(row_view *r, const int s, finder *f, float largest, float lowest,
                            float p)
{
    const u32 t = threadIdx.x;
    const float nats = fmaxf(fminf(1.25f * (largest - lowest), 24.f), 1e-30f); /* of all bins */
    const float width = nats / (float)THREADS;
    f->count[t] = 0;
    if (t < 3) f->edges[t] = t == 1 ? LARGEST : NO_LOGIT; /* low, high, of the largest */
    if (t == 0) f->wide = 1;
    __syncthreads();
    count_sample(r, s, f, largest, width);
    sync_row();

    /* masses and their squares in 1 / one, so that sums fit */
    const float one = 4294967296.f / (2 * CLUSTER * THREADS * VEC * SAMPLES);
    const float w = ex2(((float)t + .5f) * width * -QI_LOG2E);
    u32 count = 0, before[3], all[3];
#pragma unroll
    for (u32 rank = 0; rank < CLUSTER; rank++) count += *(u32 *)at_block(&f->count[t], rank);
    const u32 mass = (u32)((float)count * w * one), square = (u32)((float)count * w * w * one);
    const u32 values[3] = {mass, square, count};
    scan_three(f, values, before, all);
    const u32 wish = min((u32)((float)all[0] * p), all[0]), up_to = before[0] + mass;
    if (before[0] < wish && up_to >= wish) {
        const float above = (float)before[1], rest = (float)(all[1] - before[1]);
        const float unseen = 1.f - (float)SAMPLES / (float)PIECES;
        const float variance = ((1.f - p) * (1.f - p) * above + p * p * rest) * unseen;
        const u32 far = (u32)(3.f * sqrtf(variance * one)); /* three times the error */
        f->wishes[0] = wish > far ? wish - far : 0;
        f->wishes[1] = wish + far;
    }
    __syncthreads();
    const float edge = largest - (float)t * width; /* of the bin: its largest */
    const u32 top = TOP * SAMPLES / PIECES, wide = WIDE * SAMPLES / PIECES;
    if (wish > 0) {
        const u32 few = f->wishes[0], many = f->wishes[1];
        if (before[0] < few && up_to >= few) f->edges[1] = edge;
        if (before[0] < many && up_to >= many && t < THREADS - 1)
            f->edges[0] = edge - width, f->wide = before[2] + count > wide;
    }
    if (before[2] <= top && before[2] + count > top) f->edges[2] = edge;
    __syncthreads();
    const float low = f->edges[0], high = f->edges[1], of_top = f->edges[2];
    if (high < of_top) return {low, high};
    return {f->wide ? of_top : fminf(low, of_top), LARGEST};
}

/* The pass: stage s, a softmax before top_p, or top_p itself, which it goes before. */
QI_INLINE void list_tokens(row_view *r, const int s, finder *f, front *out)
{
    const int makes = kind_of(s) == STAGE_SOFTMAX; /* weights */
    const float p = request_f32(&r->p->stages[TOP_P_AT].value, r->request);
    const u32 lane = r->at.lane;
    float x[VEC], lowest = 0.f;
    u32 least = ~0u, n = 0;
    piece(r, s, sample_at(r, 0), x);
    for (int e = 0; e < VEC; e++)
        if (x[e] > absent(row_kind(s))) least = min(least, key_of(x[e]));
    least = __reduce_min_sync(ALL_LANES, least);
    const u32 most = __reduce_max_sync(ALL_LANES, key_of(thread_largest(r, s)));
    const u64 keys = (u64)most << 32 | (least < ~0u ? least : 0u);
    const u64 *const sent = swap(&r->at, &keys, 1);
    const float largest = value_of((u32)(max_sent(&r->at, sent) >> 32));
    for (u32 i = lane; i < ALL_WARPS; i += WARP) /* the mean of the warps' lowest */
        if ((u32)sent[i]) lowest += logit_at(r, s, value_of((u32)sent[i])), n++;
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) lowest += __shfl_xor_sync(ALL_LANES, lowest, step);
    lowest /= (float)__reduce_add_sync(ALL_LANES, n);

    range in = {ABOVE_ALL, ABOVE_ALL};
    if (p < 1.f && largest > absent(row_kind(s))) {
        const float most_likely = logit_at(r, s, largest), unit = makes ? 1.f : largest;
        const range logits = guess_range(r, s, f, most_likely, lowest, p);
        in.low = fmaxf(weight_of(logits.low, most_likely) * unit, LEAST_NORMAL);
        if (logits.high < LARGEST) in.high = weight_of(logits.high, most_likely) * unit;
    }
    mass_sum total = {}, above = {};
    u64 within = 0, listed = 0; /* this thread's tokens, a bit each */
    FOR_EACH_PIECE(r, i)
    {
        u32 bits = 0;
        piece(r, s, i, x);
        for (int e = 0; e < VEC; e++) {
            if (makes) x[e] = weight_of(x[e], largest);
            const mass_sum mass = split_mass(in_unit(r, row_kind(TOP_P_AT), x[e]));
            const int is_above = x[e] >= in.high;
            add_mass_if(&total, 1, mass);
            add_mass_if(&above, is_above, mass);
            if (x[e] >= in.low && !is_above) bits |= 1u << e;
        }
        if (makes) keep_piece(r, i, x);
        listed |= (u64)bits << i * VEC;
    }
    r->mass = whole_mass(total);

    const u32 count = (u32)__popcll(listed), up_to = warp_scan(count, lane);
    const u32 all = __shfl_sync(ALL_LANES, up_to, WARP - 1);
    u32 to = 0;
    if (lane < CLUSTER && all > 0) /* lane 0 has this block's own */
        to = atomicAdd((u32 *)at_block(&f->listed[r->at.rank], (r->at.rank + lane) % CLUSTER), all);
    to = __shfl_sync(ALL_LANES, to, 0) + up_to - count;
    for (; to < ROOM && listed; listed &= listed - 1, to++) {
        const int at = __ffsll((long long)listed) - 1, i = at / VEC, e = at % VEC;
        const float w = r->x[i * (THREADS * VEC) + e];
        f->list.ranks[to] = rank_at(key_of(w), token_at(r, i) + (u32)e);
        f->list.values[to] = w;
        within += mass_of(w, r->unit);
    }
    u64 sums[3] = {r->mass, whole_mass(above), within};
    sum_row(&r->at, sums, 3);
    out->total = sums[0];
    out->m = {sums[1], sums[2], 0, 0};
    out->b = {key_of(in.low), key_of(in.high) - 1};
    out->base = 0, out->fits = 1;
    for (u32 rank = 0; rank < CLUSTER; rank++) {
        if (rank < r->at.rank) out->base += f->listed[rank];
        out->m.count += f->listed[rank];
        if (f->listed[rank] > ROOM) out->fits = 0;
    }
}

/* Brings all lists to the first block. */
QI_INLINE void join_lists(row_view *r, finder *f, const front *from)
{
    token_list *const list = (token_list *)at_block(&f->list, 0);
    const u32 count = r->at.rank > 0 ? f->listed[r->at.rank] : 0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        list->ranks[from->base + i] = f->list.ranks[i];
        list->values[from->base + i] = f->list.values[i];
    }
    sync_row();
}

/* Brings those tokens of all lists to the first block among which the prefix ends, by histograms. Returns whether they
 * are few enough. */
QI_INLINE int narrow_lists(row_view *r, const int s, finder *f, front *from, u64 wish)
{
    u64 ranks[MINE];
    float values[MINE];
    const u32 count = f->listed[r->at.rank];
#pragma unroll
    for (u32 n = 0; n < MINE; n++) {
        const u32 i = threadIdx.x + n * THREADS;
        ranks[n] = i < count ? f->list.ranks[i] : 0;
        values[n] = i < count ? f->list.values[i] : 0.f;
    }
    __syncthreads(); /* bins are where the list was */
    while (from->m.count > ROOM && from->b.low < from->b.high) {
        const bracket b = from->b;
        const int shift = bin_shift(b);
        for (u32 i = threadIdx.x; i < NUM_BINS; i += THREADS)
            f->bins.amount[i] = f->bins.count[i] = 0;
        __syncthreads();
#pragma unroll
        for (u32 n = 0; n < MINE; n++) {
            const u32 key = (u32)(ranks[n] >> 32), bin = (b.high - key) >> shift;
            if (key < b.low || key > b.high) continue;
            atomicAdd(&f->bins.count[bin], 1u);
            atomicAdd(&f->bins.amount[bin], mass_of(values[n], r->unit));
        }
        sync_row();
        narrow(r, s, f, &from->b, &from->m, wish);
    }
    if (from->m.count > ROOM) return 0;
    token_list *const list = (token_list *)at_block(&f->list, 0);
#pragma unroll
    for (u32 n = 0; n < MINE; n++) {
        const u32 key = (u32)(ranks[n] >> 32);
        if (key < from->b.low || key > from->b.high) continue;
        const u32 to = atomicAdd((u32 *)at_block(&f->gathered, 0), 1u) - r->gathered;
        list->ranks[to] = ranks[n];
        list->values[to] = values[n];
    }
    sync_row();
    r->gathered += (u32)from->m.count;
    return 1;
}

/* Stage s, top_p, with a wish to meet. Returns whether all that follows is done too: *left as of finish(). */
QI_INLINE int end_listing(row_view *r, const int s, finder *f, front *from, u64 wish, int *left)
{
    measure *const m = &from->m;
    const int found = from->fits && m->above < wish && m->above + m->within >= wish;
    const int ends = found && ends_in_list(s) && m->above == 0 && m->count <= ROOM;
    if (found && m->count <= ROOM) {
        join_lists(r, f, from);
    } else if (!found || !narrow_lists(r, s, f, from, wish)) {
        const bracket b =
            !from->fits && m->above < wish ? from->b : guess_mass(r, s, f, from->total, wish);
        r->stages[s].last = find(r, s, f, b, wish);
        return 0;
    }
    if (!ends) {
        r->stages[s].last = end_of_gathered(r, s, f, *m, wish);
        return 0;
    }
    if (r->at.rank == 0) {
        u64 mass;
        const u32 n = (u32)m->count;
        sort_list(f, n);
        *left = finish_list(r, s, f, end_of_prefix(r, f, n, wish, &mass) + 1);
    }
    return 1;
}

#endif
