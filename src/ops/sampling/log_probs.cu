/* log_probs.cu - log-probabilities and ranks of tokens, by the blocks of a cluster or by one: the row's largest
 * logit, the sum of its masses, and for each rank asked for a count of what comes before, TOGETHER of them in
 * the pass of the masses.
 *
 * JIT constants: DTYPE; VEC, elements of an access; THREADS; CLUSTER, blocks of a row; RESIDENT (pieces.cuh).
 * Bound: HBM, the row read once; few rows: latency, of the barriers of the cluster; a rank takes some 3
 * instructions for each element of a thread.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/log_probs_params.h"
#include "ops/sampling/mass.cuh"
#include "ops/sampling/pieces.cuh"

enum {
    CHUNK = 64,  /* tokens whose ranks are counted between two barriers of the row */
    TOGETHER = 8 /* and in one pass over a thread's elements */
};

typedef struct workplace {
    mailbox box;
    i32 tokens[CHUNK]; /* one that is not in the row: its end */
    float logits[CHUNK];
    u32 counts[CHUNK];
} workplace;

/* ---- passes over a thread's elements ------------------------------------------------------------- */

/* Returns their mass, if asked for, and counts those before each of n tokens: larger logits, and equal ones in pieces
 * that begin before the token. */
QI_INLINE u64 look(const pieces *r, workplace *w, int first, const int n, const int wants_mass,
                   float max)
{
    i32 tokens[TOGETHER];
    float logits[TOGETHER], above[TOGETHER]; /* the next larger float */
    u32 before[TOGETHER] = {};
    u64 mass = 0;
    for (int i = 0; i < n; i++) {
        tokens[i] = w->tokens[first + i];
        logits[i] = w->logits[first + i];
        above[i] = value_of(key_of(logits[i]) + 1);
    }
    FOR_EACH_PIECE(r, token)
    {
        mass_sum sum = {};
        float x[VEC];
        piece(r, token, x);
        for (int i = 0; i < n; i++) {
            const float least = (i32)token < tokens[i] ? logits[i] : above[i];
            for (int e = 0; e < VEC; e++) before[i] += x[e] >= least;
        }
        for (int e = 0; wants_mass && e < VEC; e++) add_mass(&sum, weight_of(x[e], max));
        mass += whole_mass(sum, wants_mass ? VEC : 0);
    }
    for (int i = 0; i < n; i++) {
        const u32 sum = __reduce_add_sync(ALL_LANES, before[i]);
        if (threadIdx.x % WARP == 0) atomicAdd(&w->counts[first + i], sum);
    }
    return mass;
}

/* The same for `count` tokens, in steps; the mass with the first of them. */
QI_INLINE u64 look_at(const pieces *r, workplace *w, int count, const int wants_mass, float max)
{
    u64 mass = 0;
    int n = 0;
    if (wants_mass)
        mass = count == 0   ? look(r, w, 0, 0, 1, max)
               : count == 1 ? look(r, w, 0, 1, 1, max)
                            : look(r, w, 0, TOGETHER, 1, max);
    for (n = wants_mass ? TOGETHER : 0; n < count; n += TOGETHER) look(r, w, n, TOGETHER, 0, max);
    return mass;
}

/* ---- ranks ------------------------------------------------------------------------------------- */

/* Sets up to CHUNK tokens for look_at(). */
QI_INLINE void open_chunk(const pieces *r, workplace *w, const i32 *tokens, i32 count)
{
    const int t = (int)threadIdx.x;
    if (t < CHUNK) {
        const i32 token = t < count ? tokens[t] : -1;
        const int inside = token >= 0 && token < (i32)r->vocab;
        w->tokens[t] = inside ? token : (i32)r->vocab;
        w->logits[t] = inside ? clean_element(r->row, token) : NO_LOGIT; /* all are before it */
        w->counts[t] = 0;
    }
    __syncthreads();
}

/* Once all blocks have counted. In a token's own piece the equal ones that are not before it are counted too. */
QI_INLINE void close_chunk(const pieces *r, const place *at, workplace *w, i32 *ranks, i32 count)
{
    const int t = (int)threadIdx.x;
    if (at->rank == 0 && t < count) {
        const i32 token = w->tokens[t], begin = token - token % VEC;
        u32 sum = 0;
        for (u32 rank = 0; rank < CLUSTER; rank++)
            sum += *(const u32 *)at_block(&w->counts[t], rank);
        if (begin < token && token < (i32)r->vocab) {
            float x[VEC];
            load_clean(x, qi_at(r->row, DTYPE, begin), VEC);
            for (int e = 1; e < VEC; e++) sum -= begin + e >= token && x[e] == w->logits[t];
        }
        ranks[t] = (i32)sum;
    }
    sync_row();
}

QI_KERNEL(log_probs, log_probs_params)
{
    __shared__ workplace w;
    pieces r;
    place at;
    const i64 request = blockIdx.x / CLUSTER;
    const char *const row = qi_at(p.logits, DTYPE, request * p.logits_stride);
    const i32 *const tokens = p.tokens + request * p.tokens_stride;
    open_place(&at, &w.box);
    griddepcontrol_wait();
    open_pieces(&r, &at, row, p.vocab);
    wait_for_row();

    const float max = value_of((u32)max_row(&at, key_of(largest_of(&r))));
    i32 *const ranks = p.ranks ? p.ranks + request * p.ranks_stride : 0;
    const i64 wanted = ranks ? p.n : 0;
    const i32 some = (i32)(wanted < CHUNK ? wanted : CHUNK);
    open_chunk(&r, &w, tokens, some);
    u64 mass = look_at(&r, &w, some, 1, max);
    sum_row(&at, &mass, 1, 1);
    const double log_total = mass > 0 ? log(ldexp((double)mass, -MASS_BITS)) : 0.;
    float *const log_probs = p.log_probs + request * p.log_probs_stride;
    for (i64 n = at.warp * WARP + at.lane; n < p.n; n += CLUSTER * THREADS) {
        const i32 token = tokens[n];
        const float x = token >= 0 && token < p.vocab ? clean_element(row, token) : NO_LOGIT;
        log_probs[n] = mass_of(weight_of(x, max), EXPONENT_BIAS) > 0
                           ? log_prob_of(x, max, log_total)
                           : NO_LOGIT;
    }
    if (some > 0) close_chunk(&r, &at, &w, ranks, some);
    for (i64 n = CHUNK; n < wanted; n += CHUNK) {
        const i32 count = (i32)(wanted - n < CHUNK ? wanted - n : CHUNK);
        open_chunk(&r, &w, tokens + n, count);
        look_at(&r, &w, count, 0, max);
        sync_row();
        close_chunk(&r, &at, &w, ranks + n, count);
    }
}
