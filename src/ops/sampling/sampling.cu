/* sampling.cu - a list of stages over rows of logits or probabilities, to tokens or rows (sampling.h says what
 * each does). CLUSTER blocks share a row; they meet in exchanges (exchange.cuh) and look for ends of prefixes
 * together (find.cuh).
 *
 * JIT constants: DTYPE, OUT_DTYPE (of rows); IN, OUT: ROW_...; VEC, elements of an access to rows, out and
 * tensors of stages; THREADS; CLUSTER, blocks of a row, a power of 2 up to 16, 1 before sm_90; EACH, pieces of VEC
 * values that a thread keeps in shared memory (EACH * VEC * THREADS * 4 bytes, dynamic), ceil(vocab / (VEC THREADS
 * CLUSTER)), or 0 for rows that are streamed (stream_row.cuh) or read again (then MOST_SAMPLED values); CROWDED, whether top_p at
 * the end leaves room for three blocks an SM; STAGES_0, STAGES_1, STAGES_2: the list, 4 bits a stage, its kind + 1.
 * Bound: HBM, one read of the rows; between 6 (streamed to top_k) and 50 (top_p) instructions a token beside it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/stream_row.cuh"
#include "ops/sampling/top_p.cuh"

/* ---- stages that look at the whole row -------------------------------------------------------- */

/* The index of the largest logit, the first of equals. */
QI_INLINE u32 index_of_largest(row_view *r, const int s)
{
    u64 best = 0;
    FOR_EACH_PIECE(r, i)
    {
        float x[VEC];
        piece(r, s, i, x);
        for (int e = 0; e < VEC; e++) {
            const u64 rank = (u64)key_of(x[e]) << 32 | ~(token_at(r, i) + e);
            if (x[e] > NO_LOGIT && rank > best) best = rank;
        }
    }
    return ~(u32)max_row(&r->at, best);
}

QI_INLINE float find_sigma(row_view *r, const int s, float n_sigma)
{
    float largest = NO_LOGIT, smallest = LARGEST;
    FOR_EACH_PIECE(r, i)
    {
        float x[VEC];
        piece(r, s, i, x);
        for (int e = 0; e < VEC; e++) {
            largest = fmaxf(largest, x[e]);
            if (x[e] > NO_LOGIT) smallest = fminf(smallest, x[e]);
        }
    }
    u64 keys[2] = {warp_max_u64(key_of(largest)), warp_max_u64(~key_of(smallest))};
    const u64 *const sent = swap(&r->at, keys, 2);
    largest = value_of((u32)max_sent(&r->at, sent));
    smallest = value_of(~(u32)max_sent(&r->at, sent + ALL_WARPS));
    if (largest == NO_LOGIT) return NO_LOGIT;

    const float range = rn_sub(largest, smallest);
    const float scale = float_of((u32)(sigma_scale(range) + EXPONENT_BIAS) << 23);
    u64 sums[3] = {};
    FOR_EACH_PIECE(r, i)
    {
        float x[VEC];
        piece(r, s, i, x);
        for (int e = 0; e < VEC; e++) {
            if (!(x[e] > NO_LOGIT)) continue;
            const u64 distance = sigma_distance(x[e], largest, scale);
            sums[0]++;
            sums[1] += distance;
            sums[2] += distance * distance;
        }
    }
    sum_row(&r->at, sums, 3, 0);
    return sigma_threshold(largest, range, n_sigma, sums[0], sums[1], sums[2]);
}

/* The row's mass. */
QI_INLINE u64 row_mass(row_view *r, const int s)
{
    const u64 mine = warp_sum_u64(thread_mass(r, s));
    return sum_sent(&r->at, swap(&r->at, &mine, 1));
}

QI_INLINE cut find_typical(row_view *r, const int s, finder *f, float p)
{
    u64 sums[3] = {};
    FOR_EACH_PIECE(r, i)
    {
        float x[VEC];
        piece(r, s, i, x);
        for (int e = 0; e < VEC; e++) {
            if (!(x[e] > 0.f)) continue;
            const u64 mass = mass_of(x[e], r->unit);
            const u64 information = (u64)information_of(x[e], r->unit);
            sums[0] += mass;
            sums[1] += (mass >> LOWER_BITS) * information;
            sums[2] += (mass & ((1u << LOWER_BITS) - 1)) * information;
        }
    }
    sum_row(&r->at, sums, 3, 0);
    if (sums[0] == 0 || p >= 1.f) return KEEP_ALL;
    r->stages[s].mean = typical_mean(sums[1], sums[2], sums[0]);
    const u64 wish = wish_of(sums[0], p);
    return find(r, s, f, guess_mass(r, s, f, sums[0], wish), wish);
}

/* Returns whether that was all: *left as of finish(). */
QI_INLINE int run_stage(row_view *r, const int s, finder *f, listing *l, int *left)
{
    const int kind = kind_of(s);
    stage_view *const v = &r->stages[s];
    const float value = number_of(r, s);
    if (s < NUM_EARLY && (kind != STAGE_TEMPERATURE || value != 0.f)) return 0;
    v->value = value;
    v->last = KEEP_ALL;
    if (kind == STAGE_TEMPERATURE) {
        if (value == 0.f)
            v->last.index = index_of_largest(r, s);
        else
            v->value = rn_div(1.f, value);
    } else if (kind == STAGE_TOP_N_SIGMA) {
        v->value = find_sigma(r, s, value);
    } else if (s == FRONT_AT && kind == STAGE_SOFTMAX) {
        list_tokens(r, s, f, l);
        return 0;
    } else if (kind == STAGE_SOFTMAX) {
        v->value = row_largest(r, s);
    } else if (kind == STAGE_TOP_K) {
        const i32 k = whole_of(r, s);
        if (k <= 0 || (u32)k >= r->vocab) return 0;
        if (run_top_k(r, s, f, (u32)k, left)) return 1;
    } else if (kind == STAGE_TOP_P) {
        if (FRONT && s == TOP_P_AT) {
            if (s == FRONT_AT) list_tokens(r, s, f, l);
            if (end_listing(r, s, f, l, left)) return 1;
        } else {
            const u64 mass = row_mass(r, s), wish = wish_of(mass, value);
            r->kept = mass;
            if (value >= 1.f || mass == 0) return 0;
            v->last = find(r, s, f, guess_mass(r, s, f, mass, wish), wish);
        }
    } else if (kind == STAGE_MIN_P) {
        const float largest = largest_is_one(s) ? 1.f : row_largest(r, s);
        v->value = min_p_threshold(value, largest);
    } else if (kind == STAGE_TYPICAL_P) {
        v->last = find_typical(r, s, f, value);
    }
    apply_to_row(r, s);
    return 0;
}

/* ---- results -------------------------------------------------------------------------------- */

/* Draws a token from a row of weights or probabilities. Returns the mass that it is drawn from. */
QI_INLINE u64 draw(row_view *r, const int s, finder *f, const listing *l)
{
    i32 *const tokens = (i32 *)r->p->out;
    const u64 *sent = TOP_P_IS_LAST ? r->sent : 0;
    u64 mine, mass = r->kept;
    u32 token;
    if (LEAN && sent && mass > 0) {
        draw_alone(r, f, l);
        return mass;
    }
    if (sent) {
        mine = sent[r->at.warp];
    } else {
        mine = warp_sum_u64(thread_mass(r, s));
        sent = swap(&r->at, &mine, 1);
        mass = sum_sent(&r->at, sent);
    }
    const u64 random = FRONT ? l->random : random_of(r);
    if (mass == 0) {
        if (r->at.warp == 0 && r->at.lane == 0) tokens[r->request] = 0;
    } else if (locate(r, s, all_keys(s), high_product(random, mass), sent, mine, &token)) {
        tokens[r->request] = (i32)token;
    }
    return mass;
}

/* Writes the row out; probabilities times scale. */
QI_INLINE void store_row(const row_view *r, const int s, float scale)
{
    char *const to = qi_to(r->p->out, OUT_DTYPE, r->request * r->p->out_stride);
    FOR_EACH_PIECE(r, i)
    {
        const u32 token = token_at(r, i);
        float x[VEC];
        if (token >= r->vocab) continue;
        piece(r, s, i, x);
        if (OUT == ROW_PROBS)
            for (int e = 0; e < VEC; e++) x[e] = prob_of(rn_mul(x[e], shrink_of(r->unit)), scale);
        qi_store(qi_to(to, OUT_DTYPE, token), x, OUT_DTYPE, VEC);
    }
}

/* Whether anything is left of the row. */
QI_INLINE int finish(row_view *r, const int s, finder *f, const listing *l)
{
    if (OUT == ROW_TOKENS) return draw(r, s, f, l) > 0;
    if (OUT == ROW_PROBS) {
        const int known = NUM_STAGES > 0 && kind_of(NUM_STAGES - 1) == STAGE_TOP_P && r->kept > 0;
        const u64 mass = known ? r->kept : row_mass(r, s);
        store_row(r, s, mass > 0 ? prob_scale(mass, shrunk_unit(r->unit)) : 0.f);
        return mass > 0;
    }
    const int left = !r->p->valid || row_largest(r, s) > absent(OUT);
    store_row(r, s, 1.f);
    return left;
}

/* Blocks that an SM is to have room for: as many as its shared memory has. */
enum {
    ALONE = EACH * VEC * THREADS > 18 * 1024,
    BLOCKS = ALONE                    ? 1
             : LEAN                   ? 3
             : FINDS || THREADS > 512 ? 1024 / THREADS
                                      : 1536 / THREADS
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    sampling(const __grid_constant__ sampling_params p)
{
    extern __shared__ __align__(16) float values[]; /* [EACH * VEC * THREADS] */
    __shared__ mailbox box;
    __shared__ finder f; /* not there where no stage finds */
    __shared__ listing l;
    __shared__ request_numbers numbers;
    row_view r;
    if (FINDS && threadIdx.x == 0)
        f.gathered = 0; /* others look at it when they have a message of this thread */
#if CLUSTER > 1
    if (threadIdx.x == 0) open_mailbox(&box);
    cluster_arrive_relaxed();
    const u32 rank = cluster_rank();
#else
    const u32 rank = 0;
#endif
    griddepcontrol_wait();
    open_row(&r, &p, &box, &numbers, rank, values);
    const u64 asked = ask_numbers(&r);
    const u32 k = stream_k(&r);
    const int streamed = STREAMS && k > 0;
    int bad = !r.from, left = 0, done = streamed;
    if (streamed) {
        left = run_streamed(&r, &f, k, &bad);
    } else {
        bad = read_row(&r, asked);
        if (ASKS) __syncthreads();
#if CLUSTER > 1
        cluster_wait();
#endif
        if (IN == ROW_PROBS) set_unit(&r, row_largest(&r, 0));
    }
#define RUN(s)                                                                                     \
    if (s < NUM_STAGES && !done) done = run_stage(&r, s, &f, &l, &left);
    FOR_EACH_STAGE(RUN)
#undef RUN
    if (!done) left = finish(&r, NUM_STAGES, &f, &l);
    if (streamed) wait_for_lists();
    if (p.valid) {
        const u64 any = max_row(&r.at, (u64)bad);
        if (r.at.warp == 0 && r.at.lane == 0)
            p.valid[r.request] = left && !any && (!p.valid_so_far || p.valid[r.request]);
    }
}
