/* load.cpu.h - chunks of a row's elements, of any type, as values in f32.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_LOAD_CPU_H
#define QI_LOAD_CPU_H

#include "ops/sampling/sampling_params.h"
#include "ops/sampling/weights.cpu.h"

/* Values of which maximum and mass are known: fewer than 2^10, so that a double holds the sum of their masses. */
enum { CHUNK = 256 };

/* The value of what is not there. */
QI_INLINE float nothing_of(i32 kind)
{
    return kind == ROW_LOGITS ? NO_LOGIT : 0.f;
}

QI_INLINE vf clean(vf x, const int is_logits)
{
    return is_logits ? vf_clean_logit(x) : vf_clean_prob(x);
}

QI_INLINE vi bad(vf x, const int is_logits)
{
    return is_logits ? vi_bad_logit(x) : vi_bad_prob(x);
}

/* Element i of n, and those after it; 0 for those that are not there. */
QI_INLINE vf load_any(const void *from, qi_dtype t, i64 i, i64 n)
{
    if (i >= n) return vf_set1(0.f);
    const char *at = qi_at(from, t, i);
    return i + QI_VW > n  ? qi_load_n(at, t, n - i)
           : t == QI_F32  ? qi_load(at, QI_F32)
           : t == QI_BF16 ? qi_load(at, QI_BF16)
                          : qi_load(at, QI_F16);
}

/* n elements as a chunk of values, times a factor (1, or of logits what temperature makes it); with
 * find_bad, sets *is_bad if one makes the row invalid. Returns the largest. */
QI_INLINE float load_chunk(float *to, const void *from, i64 n, float factor, int *is_bad,
                           const qi_dtype t, const int is_logits, const int find_bad)
{
    vi found = {0};
    vf most = vf_set1(nothing_of(is_logits ? ROW_LOGITS : ROW_WEIGHTS));
    const vf nothing = most;
    i64 i = 0;
    QI_UNROLL(4)
    for (; i + QI_VW <= n; i += QI_VW) {
        const vf raw = qi_load(qi_at(from, t, i), t), x = clean(raw, is_logits);
        const vf v = is_logits ? vf_clean_logit(x * factor) : x;
        if (find_bad) found |= bad(raw, is_logits);
        most = vf_max(most, v);
        vf_store(to + i, v);
    }
    for (; i < CHUNK; i += QI_VW) {
        const vi there = vi_iota() < (i32)(n - i);
        const vf raw = i < n ? qi_load_n(qi_at(from, t, i), t, n - i) : nothing;
        const vf x = vf_select(there, clean(raw, is_logits), nothing);
        const vf v = is_logits ? vf_clean_logit(x * factor) : x;
        if (find_bad) found |= there & bad(raw, is_logits);
        most = vf_max(most, v);
        vf_store(to + i, v);
    }
    if (find_bad) *is_bad |= vi_any(found);
    return vf_max_lane(most);
}

static float load_chunk_any(float *to, const void *from, i64 n, float factor, int *is_bad,
                            qi_dtype t, int is_logits)
{
#define LOAD(t, is_logits)                                                                         \
    (is_bad ? load_chunk(to, from, n, factor, is_bad, t, is_logits, 1)                             \
            : load_chunk(to, from, n, factor, is_bad, t, is_logits, 0))
    switch (t) {
    case QI_F32: return is_logits ? LOAD(QI_F32, 1) : LOAD(QI_F32, 0);
    case QI_F16: return is_logits ? LOAD(QI_F16, 1) : LOAD(QI_F16, 0);
    default: return is_logits ? LOAD(QI_BF16, 1) : LOAD(QI_BF16, 0);
    }
#undef LOAD
}

/* The largest of n logits, -inf if there is none; with find_bad, sets *is_bad if one makes the row invalid. */
QI_INLINE float scan_chunk(const void *from, i64 n, int *is_bad, const qi_dtype t,
                           const int find_bad)
{
    vi found = {0};
    vf most[2] = {vf_set1(NO_LOGIT), vf_set1(NO_LOGIT)};
    i64 i = 0;
    QI_UNROLL(2)
    for (; i + 2 * QI_VW <= n; i += 2 * QI_VW) {
        QI_UNROLL(2)
        for (int j = 0; j < 2; j++) {
            const vf x = qi_load(qi_at(from, t, i + j * QI_VW), t);
            if (find_bad) found |= vi_bad_logit(x);
            most[j] = vf_max_number(x, most[j]);
        }
    }
    for (; i < n; i++) {
        const vf x = vf_set1(qi_load1(qi_at(from, t, i), t));
        if (find_bad) found |= vi_bad_logit(x);
        most[0] = vf_max_number(x, most[0]);
    }
    if (find_bad) *is_bad |= vi_any(found);
    return vf_max_lane(vf_max(most[0], most[1]));
}

static float scan_chunk_any(const void *from, i64 n, int *is_bad, qi_dtype t)
{
#define SCAN(t) (is_bad ? scan_chunk(from, n, is_bad, t, 1) : scan_chunk(from, n, is_bad, t, 0))
    switch (t) {
    case QI_F32: return SCAN(QI_F32);
    case QI_F16: return SCAN(QI_F16);
    default: return SCAN(QI_BF16);
    }
#undef SCAN
}

#endif
