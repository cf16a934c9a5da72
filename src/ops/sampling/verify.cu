/* verify.cu - a cluster of blocks walks a request, all of its threads along together, as verify.h says.
 *
 * A warp has a run of tokens, of every row that the walk comes to. It reads a row twice for its sum: for the
 * largest value, and, out of L1, for the masses in that value's unit; the rows of a node and of its next child go
 * together, so that a test waits for two exchanges of the cluster, which are messages: its barriers would empty L1.
 * What is left of a target's row is nowhere: it is made anew, from the rows of the children that were rejected,
 * whenever it is read. The warps' masses of the last exchange say who finds the token drawn.
 *
 * JIT constants: DTYPE; ONE_HOT, without draft rows; VEC, elements of an access; THREADS; CLUSTER, blocks (1 before
 * sm_90).
 * Bound: HBM for the rows that a walk comes to; for few requests two exchanges of about 1 us a node.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/exchange.cuh"
#include "ops/sampling/mass.cuh"
#include "ops/sampling/verify.h"

enum {
    SPAN = WARP * VEC, /* tokens of a warp's access */
    EACH = 8,          /* tokens of a thread at a time */
    TIMES = EACH / VEC,
    WORDS = qi_words(DTYPE, VEC),
    ROWS = ONE_HOT ? 1 : 2, /* that are summed together: what is left, and a child's draft row */
};

/* A child that the node has rejected, and the shares of that test. */
typedef struct rejection {
    i32 child, token;
    float left_share, draft_share;
} rejection;

typedef struct shared_room {
    mailbox box;
    rejection rejected[MAX_NODES];
} shared_room;

/* What all threads of a request know, but for their own place. */
typedef struct walk {
    place at;
    const rejection *rejected;
    i64 request;
    const char *target, *draft; /* the node's row; its next child's, NULL: none */
    i32 num_rejected;
    u64 *masses; /* of what the warps' runs have left */
    u64 left_sum;
    int left_unit;
    float left_share, draft_share;
    u32 run, begin, end; /* tokens of a warp; this one's */
} walk;

QI_INLINE const char *target_row(const verify_params *p, i64 request, i32 node)
{
    return qi_at(p->target, DTYPE,
                 request * p->target_stride[0] + (node + 1) * p->target_stride[1]);
}

QI_INLINE const char *draft_row(const verify_params *p, i64 request, i32 child)
{
    return qi_at(p->draft, DTYPE, request * p->draft_stride[0] + child * p->draft_stride[1]);
}

/* ---- rows -------------------------------------------------------------------------------------- */

/* A thread's accesses of a row from token i on, in bits; 0 from `end` on. */
QI_INLINE void fetch(u32 words[TIMES][WORDS], const char *row, u32 i, u32 end)
{
#pragma unroll
    for (int n = 0; n < TIMES; n++) {
        for (int k = 0; k < WORDS; k++) words[n][k] = 0;
        if (i + n * SPAN < end)
            qi_load_words(words[n], qi_at(row, DTYPE, i + n * SPAN), DTYPE, VEC);
    }
}

QI_INLINE float element(const u32 words[TIMES][WORDS], int e)
{
    return clean_prob(qi_unpack(words[e / VEC], DTYPE, e % VEC));
}

/* The token of a thread's element e. */
QI_INLINE u32 token_of(u32 i, int e)
{
    return i + e / VEC * SPAN + e % VEC;
}

/* Takes from the elements of a target's row what rejections took. */
QI_INLINE void take_rejected(float x[EACH], const verify_params *p, const walk *w, u32 i)
{
#pragma unroll 1
    for (i32 k = 0; k < w->num_rejected; k++) {
        const rejection r = w->rejected[k];
#if ONE_HOT
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (token_of(i, e) == (u32)r.token) x[e] = 0.f;
#else
        u32 words[TIMES][WORDS];
        fetch(words, draft_row(p, w->request, r.child), i, w->end);
#pragma unroll
        for (int e = 0; e < EACH; e++)
            x[e] = left_of(x[e], r.left_share, element(words, e), r.draft_share);
#endif
    }
}

QI_INLINE float prob_at(const char *row, i32 token)
{
    return clean_prob(qi_load1(qi_at(row, DTYPE, token), DTYPE));
}

/* What is left of one token. */
QI_INLINE float left_at(const verify_params *p, const walk *w, i32 token)
{
    float x = prob_at(w->target, token);
    for (i32 k = 0; k < w->num_rejected; k++) {
        const rejection r = w->rejected[k];
#if ONE_HOT
        if (r.token == token) x = 0.f;
#else
        const float d = prob_at(draft_row(p, w->request, r.child), token);
        x = left_of(x, r.left_share, d, r.draft_share);
#endif
    }
    return x;
}

/* ---- sums -------------------------------------------------------------------------------------- */

/* A thread's elements of the rows that are summed together, from token i on. */
QI_INLINE void load_rows(float x[ROWS][EACH], const verify_params *p, const walk *w, u32 i)
{
    u32 words[ROWS][TIMES][WORDS];
    fetch(words[0], w->target, i, w->end);
    if (!ONE_HOT) fetch(words[ROWS - 1], w->draft, i, w->draft ? w->end : 0);
#pragma unroll
    for (int row = 0; row < ROWS; row++)
        for (int e = 0; e < EACH; e++) x[row][e] = element(words[row], e);
    take_rejected(x[0], p, w, i);
}

#define FOR_EACH_TRIP(w, i)                                                                        \
    _Pragma("unroll 1") for (u32 i = (w)->begin + (w)->at.lane * VEC; i < (w)->end;                \
                             i += EACH * WARP)

/* The units of the rows. */
QI_INLINE void find_units(int unit[ROWS], const verify_params *p, walk *w)
{
    float largest[ROWS] = {};
    u64 values[ROWS];
    FOR_EACH_TRIP(w, i)
    {
        float x[ROWS][EACH];
        load_rows(x, p, w, i);
#pragma unroll
        for (int row = 0; row < ROWS; row++)
            for (int e = 0; e < EACH; e++) largest[row] = fmaxf(largest[row], x[row][e]);
    }
    for (int row = 0; row < ROWS; row++)
        values[row] = __reduce_max_sync(ALL_LANES, bits_of(largest[row]));
    const u64 *const sent = swap(&w->at, values, ROWS);
    for (int row = 0; row < ROWS; row++)
        unit[row] = (int)(max_sent(&w->at, sent + row * ALL_WARPS) >> 23);
}

/* Unit, sum and share of what is left, and the share of the next child's draft row. */
QI_INLINE void measure(const verify_params *p, walk *w)
{
    int unit[ROWS];
    float to_unit[ROWS];
    u64 sums[ROWS] = {};
    find_units(unit, p, w);
    for (int row = 0; row < ROWS; row++) to_unit[row] = to_unit_of(unit[row]);
    FOR_EACH_TRIP(w, i)
    {
        float x[ROWS][EACH];
        mass_sum some[ROWS] = {};
        load_rows(x, p, w, i);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            for (int e = 0; e < EACH; e++) add_mass(&some[row], rn_mul(x[row][e], to_unit[row]));
            sums[row] += whole_mass(some[row], EACH);
        }
    }
    for (int row = 0; row < ROWS; row++) sums[row] = warp_sum_u64(sums[row]);
    w->masses = (u64 *)swap(&w->at, sums, ROWS);
    w->left_unit = unit[0];
    w->left_sum = sum_sent(&w->at, w->masses);
    w->left_share = share_of(w->left_sum, unit[0]);
    if (!ONE_HOT)
        w->draft_share = share_of(sum_sent(&w->at, w->masses + ALL_WARPS), unit[ROWS - 1]);
}

/* ---- walks ------------------------------------------------------------------------------------- */

/* The node's first child from `from` on; p->nodes if there is none. */
QI_INLINE i32 next_child(const verify_params *p, walk *w, i32 node, i32 from)
{
    i32 child = p->nodes;
    for (; from < p->nodes; from += WARP) {
        const i32 mine = from + (i32)w->at.lane;
        const u32 found =
            __ballot_sync(ALL_LANES, mine < p->nodes && is_child(p, w->request, mine, node));
        if (found == 0) continue;
        child = from + __ffs((int)found) - 1;
        break;
    }
    w->draft = ONE_HOT || child == p->nodes ? nullptr : draft_row(p, w->request, child);
    return child;
}

/* x: what is left of the token. One-hot, its warp's masses lose it here. */
QI_INLINE void reject(walk *w, rejection *rejected, i32 child, i32 token, float x)
{
    const u64 mass = ONE_HOT ? mass_of(x, w->left_unit) : 0;
    __syncthreads(); /* everybody has read the masses */
    if (threadIdx.x == 0) {
        rejection *r = &rejected[w->num_rejected];
        r->child = child;
        r->token = token;
        r->left_share = w->left_share;
        r->draft_share = w->draft_share;
        w->masses[(u32)token / w->run] -= mass;
    }
    __syncthreads();
    w->num_rejected++;
    if (!ONE_HOT) return;
    w->left_sum -= mass;
    w->left_share = share_of(w->left_sum, w->left_unit);
}

/* The token at which the running sum of masses exceeds `mass`, by the warp whose run has it. */
QI_INLINE void draw(const verify_params *p, const walk *w, u64 mass, i32 *token)
{
    const u64 before = sum_before(&w->at, w->masses);
    if (mass < before || mass - before >= w->masses[w->at.warp]) return;
    mass -= before;
#pragma unroll 1
    for (u32 i = w->begin; i < w->end; i += SPAN) {
        u64 sum = 0, here[VEC];
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            const u32 t = i + w->at.lane * VEC + e;
            here[e] = t < w->end ? mass_of(left_at(p, w, (i32)t), w->left_unit) : 0;
            sum += here[e];
        }
        const u64 upto = warp_scan_u64(sum, w->at.lane);
        const u32 passed = __ballot_sync(ALL_LANES, upto > mass);
        if (passed == 0) {
            mass -= __shfl_sync(ALL_LANES, upto, WARP - 1);
            continue;
        }
        if ((int)w->at.lane != __ffs((int)passed) - 1) return;
        mass -= upto - sum;
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            if (mass < here[e]) {
                *token = (i32)(i + w->at.lane * VEC + e);
                return;
            }
            mass -= here[e];
        }
    }
}

QI_INLINE void begin_walk(walk *w, shared_room *room, u32 vocab)
{
    const u32 rank = blockIdx.x % CLUSTER;
    w->at = {&room->box, rank, rank * WARPS + threadIdx.x / WARP, threadIdx.x % WARP, 0};
    w->rejected = room->rejected;
    w->request = blockIdx.x / CLUSTER;
    w->run = (vocab + ALL_WARPS * SPAN - 1) / (ALL_WARPS * SPAN) * SPAN;
    w->begin = min(w->at.warp * w->run, vocab);
    w->end = min(w->begin + w->run, vocab);
}

/* All of them: two blocks a multiprocessor hide what an exchange waits for. */
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    verify(const __grid_constant__ verify_params p)
{
    __shared__ shared_room room;
    walk w = {};
    begin_walk(&w, &room, (u32)p.vocab);
    const int first = w.at.rank == 0 && threadIdx.x == 0;
    i32 *accepted = p.accepted + w.request * p.accepted_stride;
    i32 *tokens = p.tokens + w.request * p.tokens_stride;
#if CLUSTER > 1
    if (threadIdx.x == 0) open_mailbox(&room.box);
#endif
    sync_row(); /* the others' shared memory is there */
    griddepcontrol_wait();
    i32 num_accepted = 0, num_tests = 0, node = -1, child = next_child(&p, &w, node, 0);
    w.target = target_row(&p, w.request, node);
#pragma unroll 1
    while (1) { /* at most once a child, and twice at the end */
        if (!ONE_HOT || w.num_rejected == 0) measure(&p, &w);
        if (w.left_sum == 0 && w.num_rejected > 0) { /* the target's row again, untested */
            w.num_rejected = 0;
            w.draft = nullptr;
            child = p.nodes;
            continue;
        }
        if (child == p.nodes || w.left_sum == 0) break;
        const i32 token = token_of_node(&p, w.request, child);
        const float x = left_at(&p, &w, token);
        const float d = ONE_HOT ? 1.f : rn_mul(prob_at(w.draft, token), w.draft_share);
        const u64 random = random_at(&p, w.request, num_tests++);
        if (accepts(random, d, rn_mul(x, w.left_share))) {
            if (first) accepted[num_accepted] = child, tokens[num_accepted] = token;
            num_accepted++;
            node = child;
            w.target = target_row(&p, w.request, node);
            w.num_rejected = 0;
        } else {
            reject(&w, room.rejected, child, token, x);
        }
        child = next_child(&p, &w, node, child + 1);
    }
    const u64 random = random_at(&p, w.request, p.nodes);
    if (w.left_sum > 0)
        draw(&p, &w, high_product(random, w.left_sum), &tokens[num_accepted]);
    else if (first)
        tokens[num_accepted] = 0;
    if (first) p.num_accepted[w.request] = num_accepted;
    if (w.at.rank != 0) return;
    for (i32 i = num_accepted + (i32)threadIdx.x; i <= p.nodes; i += THREADS) {
        accepted[i] = -1;
        if (i > num_accepted) tokens[i] = -1;
    }
}
