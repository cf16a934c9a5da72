/* list.cuh - the rest of a list of stages where top_k or top_p has left few tokens, and one of them is drawn: by the first
 * block alone, on the tokens themselves. The row is not looked at again.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_LIST_CUH
#define QI_SAMPLING_LIST_CUH

#include "ops/sampling/find.cuh"

/* Takes n sorted tokens through a stage that changes values, and sorts them again if it made some equal. */
QI_INLINE void change_list(const row_view *r, const int s, finder *f, u32 n)
{
    int disorder = 0;
    for (u32 i = threadIdx.x; i < n; i += THREADS) {
        const float x = f->list.values[i], by = r->stages[s].value;
        const float y = kind_of(s) == STAGE_SOFTMAX ? weight_of(x, by) : temperature_of(x, by);
        f->list.values[i] = y;
        f->list.ranks[i] = rank_at(key_of(y), ~(u32)f->list.ranks[i]);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i + 1 < n; i += THREADS)
        disorder |= f->list.ranks[i] < f->list.ranks[i + 1];
    if (__syncthreads_or(disorder)) sort_list(f, n);
}

/* How many of n sorted tokens stage s keeps. */
QI_INLINE u32 run_list_stage(row_view *r, const int s, finder *f, u32 n)
{
    const int kind = kind_of(s);
    const float value = number_of(r, s), largest = f->list.values[0];
    if (kind == STAGE_TEMPERATURE && value == 0.f) return 1;
    if (kind == STAGE_TEMPERATURE || kind == STAGE_SOFTMAX) {
        r->stages[s].value = kind == STAGE_SOFTMAX ? largest : rn_div(1.f, value);
        __syncthreads(); /* all have read the largest */
        change_list(r, s, f, n);
    } else if (kind == STAGE_TOP_K) {
        const i32 k = whole_of(r, s);
        return k > 0 && (u32)k < n ? (u32)k : n;
    } else if (kind == STAGE_TOP_P) {
        const list_scan scan = scan_list(r, f, n);
        u64 mass;
        if (value >= 1.f || scan.all == 0) return n;
        return end_of_scan(f, &scan, wish_of(scan.all, value), &mass) + 1;
    } else if (kind == STAGE_MIN_P) {
        const float least = min_p_threshold(value, largest);
        u32 kept = 0;
        for (u32 first = 0; first < n; first += THREADS) {
            const u32 i = first + threadIdx.x;
            kept += (u32)__syncthreads_count(i < n && f->list.values[i] >= least);
        }
        return kept;
    }
    return n;
}

/* Draws one of n tokens. Returns their mass. */
QI_INLINE u64 draw_from_list(const row_view *r, finder *f, u32 n)
{
    i32 *const to = (i32 *)r->p->out + r->request;
    const u64 random = random_of(r);
    for (u32 i = threadIdx.x; i < n; i += THREADS) /* by index */
        f->list.ranks[i] = (u64)(u32)f->list.ranks[i] << 32 | (u32)f->list.ranks[i];
    __syncthreads();
    sort_list(f, n);
    const list_scan scan = scan_list(r, f, n);
    const u64 target = high_product(random, scan.all);
    u64 sum = scan.before;
    if (scan.all == 0 && threadIdx.x == 0) *to = 0;
    for (u32 j = 0; j < OWN; j++) {
        const u32 i = threadIdx.x * OWN + j;
        if (sum <= target && sum + scan.masses[j] > target) *to = (i32) ~(u32)f->list.ranks[i];
        sum += scan.masses[j];
    }
    return scan.all;
}

/* The stages after s on n sorted tokens, and the draw: in the first block. Returns whether there was mass to draw from. */
QI_INLINE int finish_list(row_view *r, const int s, finder *f, u32 n)
{
#define RUN(next)                                                                                  \
    if (s < next && next < NUM_STAGES && n > 0) n = run_list_stage(r, next, f, n);
    FOR_EACH_STAGE(RUN)
#undef RUN
    return draw_from_list(r, f, n) > 0;
}

/* Stage s, top_k. Returns whether all that follows is done too: then *left says, in the first block, whether there was
 * mass to draw from. */
QI_INLINE int run_top_k(row_view *r, const int s, finder *f, u32 k, int *left)
{
    const bracket b = guess_top_k(r, s, f, k);
    const measure m = {.count = k <= MOST_BOUNDED ? gather_from(r, s, f, b.low) : ROOM + 1};
    if (m.count > ROOM) {
        r->stages[s].last = find(r, s, f, b, k);
    } else if (ends_in_list(s)) {
        if (r->at.rank != 0) return 1;
        sort_list(f, (u32)m.count);
        *left = finish_list(r, s, f, min(k, (u32)m.count));
        return 1;
    } else if (m.count >= k) {
        r->stages[s].last = end_of_gathered(r, s, f, m, k);
    }
    return 0;
}

#endif
