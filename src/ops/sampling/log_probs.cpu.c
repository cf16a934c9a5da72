/* log_probs.cpu.c - tasks share the rows: one read for the largest logit, one for the sum of the masses, one for each
 * rank asked for; or, where these are many, a sort that gives all ranks.
 *
 * Bound: memory, the row; then the exponential of each logit.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/argmax.cpu.h"
#include "ops/sampling/log_probs_params.h"
#include "ops/sampling/order.cpu.h"
#include "ops/sampling/sampling_params.h"
#include "ops/sampling/weights.cpu.h"

enum { SORT_FROM = 384 }; /* ranks of a row */

typedef struct scratch {
    i32 order[MAX_VOCAB], room[MAX_VOCAB];
} scratch;
_Static_assert(sizeof(scratch) <= QI_TASK_SCRATCH_BYTES, "lists live in task scratch");

/* ---- mass ------------------------------------------------------------------------------------- */

/* QI_VW elements of a row from i on, -inf behind its end. */
QI_INLINE vf clean_elements(const void *row, i64 i, i64 end, const qi_dtype t)
{
    if (end - i >= QI_VW) return vf_clean_logit(qi_load(qi_at(row, t, i), t));
    if (i >= end) return vf_set1(NO_LOGIT);
    const vf x = vf_clean_logit(qi_load_n(qi_at(row, t, i), t, end - i));
    return vf_select(vi_iota() < (i32)(end - i), x, vf_set1(NO_LOGIT));
}

/* The sum of all masses of a row whose largest logit, above -inf, is known. */
QI_INLINE u64 total_mass(const void *row, i64 vocab, float max, const qi_dtype t)
{
    enum { CHUNK = 1024 }; /* masses whose sum is exact */
    const vf scale = vf_set1(mass_scale(EXPONENT_BIAS));
    u64 total = 0;
    for (i64 begin = 0; begin < vocab; begin += CHUNK) {
        exact_sum sum = {0};
        for (i64 i = begin; i < begin + CHUNK; i += WEIGHTS * QI_VW) {
            vf x[WEIGHTS];
            FOR_EACH(j) x[j] = clean_elements(row, i + j * QI_VW, vocab, t);
            vf_weigh(x, vf_set1(max));
            FOR_EACH(j) exact_add(&sum, vf_mass(x[j], scale));
        }
        total += exact_total(&sum);
    }
    return total;
}

/* ---- ranks ------------------------------------------------------------------------------------ */

/* How many of the elements [begin, end) are above x, a clean logit, or as large where that counts. */
QI_INLINE i64 count_before(const void *row, i64 begin, i64 end, float x, const int or_equal,
                           const qi_dtype t)
{
    const float limit = !or_equal && x == LARGEST ? INFINITY : x; /* +inf is as large */
    vi counts = vi_set1(0);
    i64 i = begin, count = 0;
    if (or_equal && x == NO_LOGIT) return end - begin; /* NaN, too */
    for (; i + QI_VW <= end; i += QI_VW) {
        const vf e = qi_load(qi_at(row, t, i), t);
        counts -= or_equal ? e >= limit : e > limit;
    }
    const vf rest = qi_load_n(qi_at(row, t, i), t, end - i);
    counts -= (or_equal ? rest >= limit : rest > limit) & (vi_iota() < (i32)(end - i));
    for (int lane = 0; lane < QI_VW; lane++) count += counts[lane];
    return count;
}

QI_INLINE void rank_row(scratch *s, const log_probs_params *p, i64 r, const void *row,
                        const qi_dtype t)
{
    const i32 *tokens = p->tokens + r * p->tokens_stride;
    i32 *ranks = p->ranks + r * p->ranks_stride;
    if (p->n >= SORT_FROM) {
        for (i64 i = 0; i < p->vocab; i++) s->order[i] = (i32)i;
        order_sort(s->order, s->room, p->vocab, row, t);
        for (i64 i = 0; i < p->vocab; i++) s->room[s->order[i]] = (i32)i;
    }
    for (i64 i = 0; i < p->n; i++) {
        const i64 token = tokens[i];
        if (token < 0 || token >= p->vocab) {
            ranks[i] = (i32)p->vocab;
        } else if (p->n >= SORT_FROM) {
            ranks[i] = s->room[token];
        } else {
            const float x = clean_logit(qi_load1(qi_at(row, t, token), t));
            ranks[i] = (i32)(count_before(row, 0, token, x, 1, t) +
                             count_before(row, token + 1, p->vocab, x, 0, t));
        }
    }
}

/* ---- rows ------------------------------------------------------------------------------------- */

QI_INLINE void log_probs_row(const log_probs_params *p, i64 r, const void *row, const qi_dtype t)
{
    const i32 *tokens = p->tokens + r * p->tokens_stride;
    float *log_probs = p->log_probs + r * p->log_probs_stride;
    const float max = clean_logit(argmax_value(row, p->vocab, t));
    const double log_total =
        max > NO_LOGIT ? log(ldexp((double)total_mass(row, p->vocab, max, t), -MASS_BITS)) : 0;
    for (i64 i = 0; i < p->n; i++) {
        const int inside = tokens[i] >= 0 && tokens[i] < p->vocab;
        const float x = inside ? clean_logit(qi_load1(qi_at(row, t, tokens[i]), t)) : NO_LOGIT;
        log_probs[i] =
            mass_of(weight_of(x, max), EXPONENT_BIAS) ? log_prob_of(x, max, log_total) : -INFINITY;
    }
}

QI_INLINE void log_probs_rows(const log_probs_params *p, qi_task task, const qi_dtype t)
{
    i64 begin, end;
    qi_task_share(task, p->batch, 1, &begin, &end);
    for (i64 r = begin; r < end; r++) {
        const void *row = qi_at(p->logits, t, r * p->logits_stride);
        log_probs_row(p, r, row, t);
        if (p->ranks) rank_row(task.scratch, p, r, row, t);
    }
}

QI_CPU_KERNEL(log_probs)
{
    const log_probs_params *p = params;
    switch (p->dtype) {
    case QI_F32: log_probs_rows(p, task, QI_F32); break;
    case QI_F16: log_probs_rows(p, task, QI_F16); break;
    default: log_probs_rows(p, task, QI_BF16); break;
    }
}
