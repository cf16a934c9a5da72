/* list.cuh - the rest of a list of stages where top_k or top_p has left few tokens, and one of them is drawn: by the first
 * block alone, on the tokens themselves. The row is not looked at again.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_LIST_CUH
#define QI_SAMPLING_LIST_CUH

#include "kern/philox.h"
#include "ops/sampling/find.cuh"

/* Can all stages after s go on with a list? */
QI_INLINE constexpr int ends_in_list(const int s)
{
    if (OUT != ROW_TOKENS || (kind_of(s) != STAGE_TOP_K && kind_of(s) != STAGE_TOP_P)) return 0;
    for (int i = s + 1; i < NUM_STAGES; i++)
        if (!TAKES_LIST(kind_of(i))) return 0;
    return 1;
}

QI_INLINE u64 list_mass(const row_view *r, finder *f, u32 n)
{
    u64 sum = 0, all;
    for (u32 i = threadIdx.x; i < n; i += THREADS) sum += mass_of(f->list.values[i], r->unit);
    scan_block(sum, f->room, &all);
    return all;
}

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
    const request_values *const values = &r->p->stages[s].value;
    const float value = request_f32(values, r->request), largest = f->list.values[0];
    if (kind == STAGE_TEMPERATURE && value == 0.f) return 1;
    if (kind == STAGE_TEMPERATURE || kind == STAGE_SOFTMAX) {
        r->stages[s].value = kind == STAGE_SOFTMAX ? largest : rn_div(1.f, value);
        __syncthreads(); /* all have read the largest */
        change_list(r, s, f, n);
    } else if (kind == STAGE_TOP_K) {
        const i32 k = request_i32(values, r->request);
        return k > 0 && (u32)k < n ? (u32)k : n;
    } else if (kind == STAGE_TOP_P) {
        u64 mass;
        const u64 all = list_mass(r, f, n);
        return value >= 1.f || all == 0 ? n
                                        : end_of_prefix(r, f, n, wish_of(all, value), &mass) + 1;
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
    u64 before = 0, all;
    for (u32 i = threadIdx.x; i < n; i += THREADS) /* by index */
        f->list.ranks[i] = (u64)(u32)f->list.ranks[i] << 32 | (u32)f->list.ranks[i];
    __syncthreads();
    sort_list(f, n);
    const u64 mass = list_mass(r, f, n);
    const u64 random =
        qi_philox_u64(request_u64(&r->p->seed, r->request), request_u64(&r->p->offset, r->request));
    const u64 target = high_product(random, mass);
    if (mass == 0 && threadIdx.x == 0) *to = 0;
    for (u32 first = 0; first < n && mass > 0 && before <= target; first += THREADS) {
        const u32 i = first + threadIdx.x;
        const u64 here = i < n ? mass_of(f->list.values[i], r->unit) : 0;
        const u64 sum = before + scan_block(here, f->room, &all);
        if (sum <= target && sum + here > target) *to = (i32) ~(u32)f->list.ranks[i];
        before += all;
    }
    return mass;
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

/* Stage s, top_k, and all that follows, if the list has room for the k first tokens. Returns whether it had; in
 * *left whether there was mass to draw from, in the first block. */
QI_INLINE int finish_in_list(row_view *r, const int s, finder *f, u32 k, int *left)
{
    bracket b = guess_top_k(r, s, f, k);
    measure m;
    if (!find_bracket(r, s, f, &b, &m, k)) k = ROOM; /* fewer are there: all, if they fit */
    if (m.above + m.count > ROOM) return 0;
    if (m.above > 0) b.high = all_keys(s).high, m.mine = ~0u;
    gather(r, s, f, b, m.mine);
    if (r->at.rank != 0) return 1;
    u32 n = f->gathered;
    sort_list(f, n);
    *left = finish_list(r, s, f, k < n ? k : n);
    return 1;
}

#endif
