/* verify.cpu.c - a task walks whole requests, one after the other, as verify.h says.
 *
 * A row of probabilities is read twice for its sum: for the largest value, and, out of a cache, for the masses in
 * that value's unit, which are kept by blocks for the draw. What is left of a target's row is made in the task's
 * scratch when its first child is rejected, and changed there by the others.
 * Bound: memory for the rows that a walk comes to.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/verify.h"
#include "ops/sampling/weights.cpu.h"

enum {
    BLOCK = 1024,     /* tokens whose masses make an exact_sum */
    STEP = 4 * QI_VW, /* tokens of a loop's step */
};

typedef struct verify_scratch {
    float left[MAX_VOCAB];
    u64 sums[MAX_VOCAB / BLOCK], draft_sums[MAX_VOCAB / BLOCK]; /* masses of blocks */
} verify_scratch;

_Static_assert(sizeof(verify_scratch) <= QI_TASK_SCRATCH_BYTES, "a row fits a task's scratch");

typedef struct prob_row {
    const void *at;
    qi_dtype dtype;
    int unit;
    u64 sum;
    float share; /* of its sum that a value of 1 has */
} prob_row;

/* ---- rows ------------------------------------------------------------------------------------ */

/* QI_VW values from element i of n on, 0 past the end. */
QI_INLINE vf load_probs(const void *row, i64 i, i64 n, const qi_dtype t)
{
    const void *from = qi_at(row, t, i);
    return vf_clean_prob(i + QI_VW <= n ? qi_load(from, t) : qi_load_n(from, t, n - i));
}

static float prob_at(const prob_row *r, i64 i)
{
    const void *from = qi_at(r->at, r->dtype, i);
    switch (r->dtype) {
    case QI_F32: return clean_prob(qi_load1(from, QI_F32));
    case QI_F16: return clean_prob(qi_load1(from, QI_F16));
    default: return clean_prob(qi_load1(from, QI_BF16));
    }
}

QI_INLINE float largest_of(const void *row, i64 n, const qi_dtype t)
{
    vf largest[4] = {{0}};
    i64 i = 0;
    for (; i + STEP <= n; i += STEP) {
        QI_UNROLL(4)
        for (i64 c = 0; c < 4; c++)
            largest[c] = vf_max(largest[c], load_probs(row, i + c * QI_VW, INT64_MAX, t));
    }
    for (; i < n; i += QI_VW) largest[0] = vf_max(largest[0], load_probs(row, i, n, t));
    return vf_max_lane(vf_max(vf_max(largest[0], largest[1]), vf_max(largest[2], largest[3])));
}

/* The masses from token `begin` on, of a block at most. Rows of tiny values are raised to where the scale is a
 * number. */
QI_INLINE u64 sum_block(const void *row, i64 begin, i64 n, int unit, const qi_dtype t)
{
    const int raised = unit < 64 ? 64 : 0;
    const vf scale = vf_set1(mass_scale(unit + raised)), raise = vf_set1(raised ? 0x1p64f : 1.f);
    const i64 end = begin + BLOCK < n ? begin + BLOCK : n;
    exact_sum sums[4] = {{{0}, {0}}};
    i64 i = begin;
    for (; i + STEP <= end; i += STEP) {
        QI_UNROLL(4)
        for (i64 c = 0; c < 4; c++) {
            const vf w = load_probs(row, i + c * QI_VW, INT64_MAX, t);
            exact_add(&sums[c], vf_mass(w * raise, scale));
        }
    }
    for (; i < end; i += QI_VW)
        exact_add(&sums[0], vf_mass(load_probs(row, i, end, t) * raise, scale));
    for (int c = 1; c < 4; c++) {
        sums[0].lower += sums[c].lower;
        sums[0].upper += sums[c].upper;
    }
    return exact_total(&sums[0]);
}

QI_INLINE void measure(prob_row *r, i64 n, u64 *sums, const qi_dtype t)
{
    r->unit = (int)(bits_of(largest_of(r->at, n, t)) >> 23);
    r->sum = 0;
    for (i64 i = 0; i < n; i += BLOCK) {
        const u64 sum = sum_block(r->at, i, n, r->unit, t);
        sums[i / BLOCK] = sum;
        r->sum += sum;
    }
    r->share = share_of(r->sum, r->unit);
}

/* Unit and sum of a row; sums: of its blocks. */
static prob_row row_of(const void *at, qi_dtype dtype, i64 n, u64 *sums)
{
    prob_row r = {.at = at, .dtype = dtype};
    switch (dtype) {
    case QI_F32: measure(&r, n, sums, QI_F32); break;
    case QI_F16: measure(&r, n, sums, QI_F16); break;
    default: measure(&r, n, sums, QI_BF16); break;
    }
    return r;
}

/* Takes a normalised draft from a normalised row. */
QI_INLINE void subtract(float *left, float share, const prob_row *draft, i64 n, const qi_dtype t)
{
    const vf one = vf_set1(share), other = vf_set1(draft->share);
    for (i64 i = 0; i < n; i += QI_VW) {
        const vf w = load_probs(left, i, n, QI_F32), d = load_probs(draft->at, i, n, t);
        const vf rest = vf_clean_prob(w * one - d * other);
        if (i + QI_VW <= n)
            vf_store(left + i, rest);
        else
            qi_store_n(left + i, QI_F32, rest, n - i);
    }
}

/* The token at which the running sum of masses exceeds `mass`, which is below the row's. */
static i32 token_at(const prob_row *r, const u64 *sums, u64 mass)
{
    i64 i = 0;
    for (; mass >= sums[i / BLOCK]; i += BLOCK) mass -= sums[i / BLOCK];
    for (u64 here; mass >= (here = mass_of(prob_at(r, i), r->unit)); i++) mass -= here;
    return (i32)i;
}

/* ---- walks ----------------------------------------------------------------------------------- */

static prob_row target_of(const verify_params *p, i64 request, i32 node, verify_scratch *s)
{
    const i64 at = request * p->target_stride[0] + (node + 1) * p->target_stride[1];
    return row_of(qi_at(p->target, p->dtype, at), p->dtype, p->vocab, s->sums);
}

/* What is left of a row after a child was rejected. */
static prob_row reject(const verify_params *p, prob_row left, const prob_row *draft, i32 token,
                       verify_scratch *s)
{
    if (left.at != s->left) qi_widen_any(s->left, left.at, left.dtype, p->vocab);
    left.at = s->left;
    left.dtype = QI_F32;
    if (!p->draft) {
        const u64 mass = mass_of(prob_at(&left, token), left.unit);
        s->left[token] = 0;
        s->sums[token / BLOCK] -= mass;
        left.sum -= mass;
        left.share = share_of(left.sum, left.unit);
        return left;
    }
    switch (draft->dtype) {
    case QI_F32: subtract(s->left, left.share, draft, p->vocab, QI_F32); break;
    case QI_F16: subtract(s->left, left.share, draft, p->vocab, QI_F16); break;
    default: subtract(s->left, left.share, draft, p->vocab, QI_BF16); break;
    }
    return row_of(s->left, QI_F32, p->vocab, s->sums);
}

static void walk(const verify_params *p, i64 request, verify_scratch *s)
{
    i32 *accepted = p->accepted + request * p->accepted_stride;
    i32 *tokens = p->tokens + request * p->tokens_stride;
    i32 node = -1, num_accepted = 0, num_tests = 0;
    prob_row left = target_of(p, request, node, s);
    for (i32 child = 0; child < p->nodes && left.sum > 0; child++) {
        if (!is_child(p, request, child, node)) continue;
        const i32 token = token_of_node(p, request, child);
        prob_row draft = {0};
        float d = 1.f;
        if (p->draft) {
            const i64 at = request * p->draft_stride[0] + child * p->draft_stride[1];
            draft = row_of(qi_at(p->draft, p->dtype, at), p->dtype, p->vocab, s->draft_sums);
            d = prob_at(&draft, token) * draft.share;
        }
        const u64 random = random_at(p, request, num_tests++);
        if (accepts(random, d, prob_at(&left, token) * left.share)) {
            accepted[num_accepted] = node = child;
            tokens[num_accepted++] = token;
            left = target_of(p, request, node, s);
        } else {
            left = reject(p, left, &draft, token, s);
            if (left.sum > 0) continue;
            left = target_of(p, request, node, s);
            break;
        }
    }
    const u64 random = random_at(p, request, p->nodes);
    tokens[num_accepted] =
        left.sum > 0 ? token_at(&left, s->sums, high_product(random, left.sum)) : 0;
    accepted[num_accepted] = -1;
    for (i32 i = num_accepted + 1; i <= p->nodes; i++) accepted[i] = tokens[i] = -1;
    p->num_accepted[request] = num_accepted;
}

QI_CPU_KERNEL(verify)
{
    const verify_params *p = params;
    i64 begin, end;
    qi_task_share(task, p->batch, 1, &begin, &end);
    for (i64 request = begin; request < end; request++) walk(p, request, task.scratch);
}
