/* top_k.cpu.c - tasks share the rows. The maxima of chunks give a lower bound of a row's k-th value, tight as long
 * as there are several chunks for each of the k; the few tokens that reach it, from chunks whose maximum does, are
 * listed by index, cut to exactly k, and sorted.
 *
 * Bound: memory, the row read once, for a small k; then the list. Sorting the whole row is a hundred times
 * slower.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/argmax.cpu.h"
#include "ops/sampling/order.cpu.h"
#include "ops/sampling/sampling_params.h"
#include "ops/sampling/top_k_params.h"

typedef struct scratch {
    i32 list[MAX_VOCAB]; /* tokens */
    i32 room[MAX_VOCAB]; /* for sorting; before that, keys of chunks, and of the list */
} scratch;
_Static_assert(sizeof(scratch) <= QI_TASK_SCRATCH_BYTES, "lists live in task scratch");

/* ---- candidates ------------------------------------------------------------------------------- */

/* Floats as integers of the same order; its own inverse. */
QI_INLINE vi ordered(vi bits)
{
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

/* A number that k keys reach, of which none is INT32_MIN: the largest one, or one that at most `more` others
 * reach. Halves the range 32 times. */
QI_INLINE i32 find_bound(const i32 *keys, i64 num_vectors, i64 k, i64 more)
{
    i64 low = (i64)INT32_MIN + 1, high = (i64)INT32_MAX + 1;
    while (high - low > 1) {
        const i64 middle = low + (high - low) / 2;
        vi reached = vi_set1(0);
        for (i64 v = 0; v < num_vectors; v++) reached -= vi_load(keys + v * QI_VW) >= (i32)middle;
        i64 count = 0;
        for (int lane = 0; lane < QI_VW; lane++) count += reached[lane];
        if (count < k) {
            high = middle;
            continue;
        }
        low = middle;
        if (count <= k + more) break;
    }
    return (i32)low;
}

/* A chunk is one lane of `span` consecutive vectors: a group of these has QI_VW chunks. -0 counts as +0. */
QI_INLINE void chunk_maxima(i32 *maxima, i64 num_groups, const int span, const void *row,
                            const qi_dtype t)
{
    for (i64 g = 0; g < num_groups; g++) {
        const char *group = qi_at(row, t, g * span * QI_VW);
        vf best = vf_set1(-INFINITY);
        for (int v = 0; v < span; v++)
            best = vf_max(best, argmax_ordered(qi_load(qi_at(group, t, v * QI_VW), t)));
        const vi keys = ordered((vi)(best + 0.f));
        memcpy(maxima + g * QI_VW, &keys, sizeof keys);
    }
}

/* Adds to n tokens those of a vector's first lanes that reach the bound. */
QI_INLINE i64 list_lanes(i32 *list, i64 n, vf x, float bound, i64 first, int lanes)
{
    u32 reaches = vi_bits(x >= bound) & ((1u << lanes) - 1);
    for (; reaches; reaches &= reaches - 1) list[n++] = (i32)first + __builtin_ctz(reaches);
    return n;
}

QI_INLINE i64 list_all(i32 *list, i64 vocab)
{
    for (i64 i = 0; i < vocab; i++) list[i] = (i32)i;
    return vocab;
}

/* Lists, by index, at least the k first tokens of the order, and few more. Returns how many. */
QI_INLINE i64 list_candidates(scratch *s, const top_k_params *p, const void *row, const int span,
                              const qi_dtype t)
{
    const i64 num_groups = p->vocab / (span * QI_VW);
    chunk_maxima(s->room, num_groups, span, row, t);
    const i32 found = find_bound(s->room, num_groups, p->k, p->k / 8 + 8);
    const i32 bound_key = found > 0x7f7fffff ? 0x7f7fffff : found; /* +inf is the largest number */
    const float bound = ((vf)ordered(vi_set1(bound_key)))[0];
    i64 n = 0, i = 0;
    if (bound > -INFINITY) { /* not NaN, the key of none */
        for (i64 g = 0; g < num_groups; g++) {
            if (!vi_any(vi_load(s->room + g * QI_VW) >= bound_key)) continue;
            for (i = g * span * QI_VW; i < (g + 1) * span * QI_VW; i += QI_VW)
                n = list_lanes(s->list, n, qi_load(qi_at(row, t, i), t), bound, i, QI_VW);
        }
        for (i = num_groups * span * QI_VW; i + QI_VW <= p->vocab; i += QI_VW)
            n = list_lanes(s->list, n, qi_load(qi_at(row, t, i), t), bound, i, QI_VW);
        const int rest = (int)(p->vocab - i);
        return list_lanes(s->list, n, qi_load_n(qi_at(row, t, i), t, rest), bound, i, rest);
    }
    return list_all(s->list, p->vocab);
}

/* ---- exactly k -------------------------------------------------------------------------------- */

/* Cuts a list of n tokens to its k first of the order; it stays by index. */
QI_INLINE void cut(scratch *s, i64 n, i64 k, const void *row, const qi_dtype t)
{
    i32 *const keys = s->room, *const list = s->list;
    const i64 num_vectors = (n + QI_VW - 1) / QI_VW;
    for (i64 i = 0; i < n; i++) keys[i] = (i32)(order_key(row, list[i], t) ^ 0x80000000u);
    for (i64 i = n; i < num_vectors * QI_VW; i++) keys[i] = INT32_MIN;
    const i32 last = find_bound(keys, num_vectors, k, 0);
    i64 ties = k, kept = 0;
    for (i64 i = 0; i < n; i++) ties -= keys[i] > last;
    for (i64 i = 0; i < n; i++) { /* without branches: who is kept is anybody's guess */
        const int tie = keys[i] == last;
        list[kept] = list[i];
        kept += (keys[i] > last) | (tie & (ties > 0));
        ties -= tie;
    }
}

QI_INLINE void top_k_row(scratch *s, const top_k_params *p, i64 r, const qi_dtype t)
{
    const void *row = qi_at(p->rows, t, r * p->rows_stride);
    i64 n;
    if (p->k <= p->vocab / 32)
        n = list_candidates(s, p, row, 16, t);
    else if (p->k <= p->vocab / 8)
        n = list_candidates(s, p, row, 4, t);
    else if (p->k < p->vocab)
        n = list_candidates(s, p, row, 1, t);
    else
        n = list_all(s->list, p->vocab);
    if (p->k < n) cut(s, n, p->k, row, t);
    if (p->sorted) order_sort(s->list, s->room, p->k, row, t);
    memcpy(p->indices + r * p->indices_stride, s->list, (size_t)p->k * sizeof *s->list);
    if (!p->values) return;
    char *values = (char *)p->values + r * p->values_stride * (i64)qi_size_of(t);
    for (i64 i = 0; i < p->k; i++) {
        const u32 bits = order_bits(row, s->list[i], t);
        memcpy(values + i * (i64)qi_size_of(t), &bits, qi_size_of(t)); /* little-endian */
    }
}

QI_INLINE void top_k_rows(const top_k_params *p, qi_task task, const qi_dtype t)
{
    i64 begin, end;
    qi_task_share(task, p->batch, 1, &begin, &end);
    for (i64 r = begin; r < end; r++) top_k_row(task.scratch, p, r, t);
}

QI_CPU_KERNEL(top_k)
{
    const top_k_params *p = params;
    switch (p->dtype) {
    case QI_F32: top_k_rows(p, task, QI_F32); break;
    case QI_F16: top_k_rows(p, task, QI_F16); break;
    default: top_k_rows(p, task, QI_BF16); break;
    }
}
