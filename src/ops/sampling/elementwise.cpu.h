/* elementwise.cpu.h - a row on its way into a task's memory, and the stages that take one logit to another,
 * chunk by chunk.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ELEMENTWISE_CPU_H
#define QI_ELEMENTWISE_CPU_H

#include "ops/sampling/row.cpu.h"

/* ---- stages ------------------------------------------------------------------------------- */

QI_INLINE int needs_tokens(const sampling_stage *s)
{
    return s->kind <= STAGE_USER;
}

/* Of a run of elementwise stages from s on. Temperature 0 is none. */
static i32 end_of_elementwise(const sampling_params *p, i32 s, i64 request)
{
    while (s < p->num_stages &&
           (needs_tokens(&p->stages[s]) || (p->stages[s].kind == STAGE_TEMPERATURE &&
                                            request_f32(&p->stages[s].value, request) != 0.f)))
        s++;
    return s;
}

/* Element i of n i32, and those after it; 0 for those that are not there. */
QI_INLINE vi load_i32(const i32 *from, i64 i, i64 n)
{
    return i + QI_VW <= n ? vi_load(from + i)
           : i < n        ? (vi)qi_load_n(from + i, QI_F32, n - i)
                          : (vi){0};
}

/* The mask of bits i and on; of word 0 for those at n and after it. */
QI_INLINE vi load_bits(const u32 *words, i64 i, i64 n)
{
    const vi bit = vi_set1(1) << (vi_iota() + (i32)(i % 32));
    return (vi_set1((i32)words[(i < n ? i : 0) / 32]) & bit) == bit;
}

/* A stage on the chunk of values from token `begin` on. */
static void apply_stage(const sampling_stage *s, i64 request, float *v, i64 begin, i64 n)
{
    const char *tensor = s->tensor;
    const qi_dtype t = s->kind == STAGE_BIAS || s->kind == STAGE_USER ? s->dtype : QI_I32;
    if (tensor) tensor += request * s->tensor_stride * (i64)qi_size_of(t);
    const i32 *counts = (const i32 *)tensor;
    const u32 *prompt = s->prompt ? s->prompt + request * s->prompt_stride : NULL;
    const float value = request_f32(&s->value, request);
    const vi none = {0};
    switch (s->kind) {
    case STAGE_REPETITION:
        for (i64 i = 0; i < CHUNK; i += QI_VW) {
            vi touched = counts ? (vi)(load_i32(counts, begin + i, n) > 0) : none;
            if (prompt) touched |= load_bits(prompt, begin + i, n);
            if (!vi_any(touched)) continue;
            const vf l = vf_load(v + i), after = vf_select(l > 0.f, l / value, l * value);
            vf_store(v + i, vf_select(touched, vf_clean_logit(after), l));
        }
        break;
    case STAGE_FREQUENCY:
        for (i64 i = 0; i < CHUNK; i += QI_VW) {
            const vf count = vf_from_i32(load_i32(counts, begin + i, n));
            vf_store(v + i, vf_clean_logit(vf_fma(vf_set1(-value), count, vf_load(v + i))));
        }
        break;
    case STAGE_PRESENCE:
        for (i64 i = 0; i < CHUNK; i += QI_VW) {
            const vi touched = load_i32(counts, begin + i, n) > 0;
            const vf l = vf_load(v + i);
            vf_store(v + i, vf_select(touched, vf_clean_logit(l - value), l));
        }
        break;
    case STAGE_BIAS:
        for (i64 i = 0; i < CHUNK; i += QI_VW)
            vf_store(v + i, vf_clean_logit(vf_load(v + i) + load_any(tensor, t, begin + i, n)));
        break;
    case STAGE_BITMASK:
        for (i64 i = 0; i < CHUNK; i += QI_VW) {
            const vi kept = load_bits((const u32 *)tensor, begin + i, n);
            vf_store(v + i, vf_select(kept, vf_load(v + i), vf_set1(NO_LOGIT)));
        }
        break;
    case STAGE_USER: {
        const i64 count = n - begin < CHUNK ? n - begin : CHUNK;
        float elements[CHUNK];
        if (tensor) qi_widen_any(elements, qi_at(tensor, t, begin), t, count);
        const stage_block block = {v,    tensor ? elements : NULL, count, (i32)begin, (i32)request,
                                   value};
        s->apply(&block, (qi_task){.count = 1});
        for (i64 i = 0; i < CHUNK; i += QI_VW) vf_store(v + i, vf_clean_logit(vf_load(v + i)));
        break;
    }
    default: { /* temperature */
        const float inverse = rn_div(1.f, value);
        QI_UNROLL(4)
        for (i64 i = 0; i < CHUNK; i += QI_VW)
            vf_store(v + i, vf_clean_logit(vf_load(v + i) * inverse));
    }
    }
}

/* Elementwise stages [first, end) of a request, chunk by chunk. */
typedef struct run_of_stages {
    const sampling_params *p;
    const row *r;
    i64 request;
    i32 first, end;
    int loads;       /* elements are loaded before, */
    const char *raw; /* of this row; NULL: there are none */
    int find_bad;
    _Atomic int bad;
} run_of_stages;

static void apply_chunks(void *arg, i64 begin, i64 end)
{
    run_of_stages *a = arg;
    const row *r = a->r;
    int bad = 0;
    for (i64 c = begin; c < end; c++) {
        float *v = r->values + c * CHUNK;
        if (a->loads)
            r->chunk_max[c] = load_chunk_any(
                v, a->raw ? qi_at(a->raw, r->dtype, c * CHUNK) : NULL, a->raw ? length_of(r, c) : 0,
                r->factor, a->find_bad ? &bad : NULL, r->dtype, r->kind == ROW_LOGITS);
        for (i32 s = a->first; s < a->end; s++)
            apply_stage(&a->p->stages[s], a->request, v, c * CHUNK, r->count);
        if (a->end > a->first) r->chunk_max[c] = chunk_largest(v);
    }
    if (bad) atomic_store(&a->bad, 1);
}

static void apply_stages(memory *m, row *r, run_of_stages *a)
{
    a->r = r;
    team_run(m->team, m->task, apply_chunks, a, chunks_of(r->count));
    r->max = largest_of(r->chunk_max, r->count);
}

/* The unit of probabilities. Scales of masses are too large a number for those below 2^-63: all else is the
 * same for a multiple of them. */
static void set_unit(row *r)
{
    r->unit = (int)(bits_of(r->max) >> 23);
    if (r->max == 0.f) r->unit = EXPONENT_BIAS;
    if (r->unit >= 64) return;
    for (i64 i = 0; i < chunks_of(r->count) * CHUNK; i += QI_VW)
        vf_store(r->values + i, vf_load(r->values + i) * 0x1p64f);
    for (i64 c = 0; c < chunks_of(r->count); c++) r->chunk_max[c] *= 0x1p64f;
    r->max *= 0x1p64f;
    r->unit += 64;
}

/* Row `number` of p as request's row, -1: one without tokens; after its first stages, as many as are
 * elementwise: returns how many. Logits that only temperature changes stay where they are, if no number
 * overflows. Sets *is_bad, if it is asked for, where an element is. */
static i32 load_row(memory *m, row *r, const sampling_params *p, i64 request, i64 number,
                    int *is_bad)
{
    const int is_logits = p->in == ROW_LOGITS;
    const i32 stages = end_of_elementwise(p, 0, request);
    const i32 first =
        stages > 0 && !needs_tokens(&p->stages[0]); /* temperature comes with loading */
    const char *const raw = number < 0 ? NULL : qi_at(p->rows, p->dtype, number * p->rows_stride);
    *r = (row){.raw = raw,
               .dtype = p->dtype,
               .factor = first ? rn_div(1.f, request_f32(&p->stages[0].value, request)) : 1.f,
               .values = m->dense,
               .chunk_max = m->chunk_max,
               .chunk_mass = m->chunk_mass,
               .count = p->vocab,
               .kind = is_logits ? ROW_LOGITS : ROW_WEIGHTS,
               .floor = lowest_of(is_logits ? ROW_LOGITS : ROW_WEIGHTS),
               .unit = EXPONENT_BIAS};
    if (is_logits && stages == first && raw && scan_row(m, r, is_bad)) return stages;
    run_of_stages load = {.p = p,
                          .request = request,
                          .first = first,
                          .end = stages,
                          .loads = 1,
                          .raw = raw,
                          .find_bad = is_bad != NULL};
    r->raw = NULL;
    apply_stages(m, r, &load);
    if (is_bad) *is_bad |= load.bad;
    if (p->in == ROW_PROBS) set_unit(r);
    return stages;
}

#endif
