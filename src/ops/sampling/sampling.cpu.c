/* sampling.cpu.c - a list of stages over each row. Tasks share the rows.
 *
 * Logits that at most temperature changes stay where they are: a first pass takes the maxima of chunks, from
 * which few chunks are looked at again if few tokens are asked for. Other rows are copied into the task's
 * memory as f32, with the stages that look at one logit alone. One more pass makes weights and masses, one finds
 * where a prefix ends that is no short one, half a one draws. What filters leave is remembered as a
 * bound; few tokens are made a list, which makes all that follows short.
 *
 * Bound: of 128256 f32, memory for the first pass; 30 instructions a vector, half of them for the polynomial
 * and 7 for the exact sum, for weights; 20 for a prefix's end.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/philox.h"
#include "ops/sampling/elementwise.cpu.h"
#include "ops/sampling/find.cpu.h"

/* What runs a row: a request of p. */
typedef struct engine {
    const sampling_params *p;
    i64 request;
    memory *m;
    row row;
    int can_list; /* no later stage asks for tokens by place */
} engine;

/* ---- filters that keep a prefix of the order ------------------------------------------------------- */

QI_INLINE span span_of(const row *r)
{
    const float scale = r->kind == ROW_WEIGHTS ? mass_scale(r->unit) : 0.f;
    return (span){r->values, r->values, r->count, r->chunk_max, scale};
}

/* The rank-th largest maximum of a chunk, of at least as many: so many values are at least that. */
static float chunk_rank(memory *m, const row *r, i64 rank)
{
    const i64 n = chunks_of(r->count);
    float *const max = m->part[0][0];
    for (i64 c = 0; c < chunks_of(n) * CHUNK; c++) max[c] = c < n ? r->chunk_max[c] : NO_LOGIT;
    const span s = {max, max, n, NULL, 0.f};
    const bracket b = {key_of(-LARGEST), key_of(r->max) + 1, (u64)rank, (u64)n, 0};
    return find_end(m, &s, b, 0, BY_COUNT).value;
}

/* Makes the row a list of at least its first `count` tokens by order, where chunk maxima say that few are
 * enough. */
static void shorten_by_count(engine *e, i64 count)
{
    row shorter = e->row;
    if (!e->can_list || shorter.index) return;
    bound_row(&shorter, chunk_rank(e->m, &e->row, count));
    if (list_row(e->m, &shorter)) e->row = shorter;
}

/* The same for a mass, where b says what is known of the prefix that has it; b learns more either way. */
static void shorten_by_mass(engine *e, bracket *b)
{
    static const i64 ranks[] = {64, 256};
    if (!e->can_list || e->row.index) return;
    for (int i = 0; i < 2 && ranks[i] < chunks_of(e->row.count); i++) {
        row shorter = e->row;
        const float floor = chunk_rank(e->m, &shorter, ranks[i]);
        bound_row(&shorter, floor);
        if (floor < e->row.floor || !list_row(e->m, &shorter)) return;
        weigh_row(&shorter);
        if (shorter.mass >= b->wish) {
            b->low = key_of(floor);
            b->upto = shorter.mass;
            e->row = shorter;
            return;
        }
        b->high = key_of(floor);
        b->above = shorter.mass;
        if (shorter.mass < b->wish / 2) return;
    }
}

static void keep_from(engine *e, float floor)
{
    bound_row(&e->row, floor);
    if (e->can_list) list_row(e->m, &e->row);
}

static void keep_prefix(engine *e, const cut *end)
{
    if (end->last < e->row.count) drop_after(&e->row, end->value, end->last);
    keep_from(e, end->value);
}

static void top_k(engine *e, i64 k)
{
    row *r = &e->row;
    const float low = lowest_of(r->kind);
    i64 chunks = 0;
    for (i64 c = 0; c < chunks_of(r->count); c++) chunks += r->chunk_max[c] >= low;
    if (k <= chunks) shorten_by_count(e, k);
    copy_row(r);
    const span s = span_of(r);
    const bracket b = {key_of(low), key_of(r->max) + 1, (u64)k, amount_from(&s, low, BY_COUNT), 0};
    if (b.wish >= b.upto) return;
    const cut end = find_end(e->m, &s, b, 0, BY_COUNT);
    keep_prefix(e, &end);
}

static void top_p(engine *e, float p)
{
    row *r = &e->row;
    if (!(p < 1.f)) return;
    if (!r->mass_known) weigh_row(r);
    if (r->mass == 0) return;
    bracket b = {key_of(r->floor), key_of(r->max) + 1, wish_of(r->mass, p), r->mass, 0};
    shorten_by_mass(e, &b);
    const span s = span_of(r);
    const cut end = find_end(e->m, &s, b, r->unit, BY_MASS);
    keep_prefix(e, &end);
    r->mass = end.amount;
    r->mass_known = 1;
}

static void min_p(engine *e, float p)
{
    keep_from(e, min_p_threshold(p, e->row.max));
}

/* ---- filters of another order ------------------------------------------------------------------ */

static void top_n_sigma(engine *e, float n_sigma)
{
    row *r = &e->row;
    vf lowest = vf_set1(INFINITY);
    copy_row(r);
    for (i64 i = 0; i < chunks_of(r->count) * CHUNK; i += QI_VW) {
        const vf v = vf_load(r->values + i);
        lowest = vf_min(lowest, vf_select(v >= r->floor, v, vf_set1(INFINITY)));
    }
    const float range = r->max + vf_max_lane(-lowest);
    if (!(range >= 0.f)) return; /* nothing is there */
    const float scale = float_of((u32)(sigma_scale(range) + EXPONENT_BIAS) << 23);
    const vf max = vf_set1(r->max * scale);
    u64 n = 0, total = 0, total_sq = 0;
    for (i64 c = 0; c < chunks_of(r->count); c++) {
        exact_sum sum = {0}, sum_sq = {0};
        for (i64 i = c * CHUNK; i < (c + 1) * CHUNK; i += QI_VW) {
            const vf v = vf_load(r->values + i);
            const vi there = v >= r->floor;
            const vf d = vf_min(vf_fma(-v, vf_set1(scale), max), vf_set1(1048576.f));
            const vf q = vf_where(there, d + ROUND_MAGIC - ROUND_MAGIC);
            n += (u64)__builtin_popcount(vi_bits(there));
            exact_add(&sum, q);
            exact_add_products(&sum_sq, q, q);
        }
        total += exact_total(&sum);
        total_sq += exact_total(&sum_sq);
    }
    keep_from(e, sigma_threshold(r->max, range, n_sigma, n, total, total_sq));
}

static void typical_p(engine *e, float p)
{
    row *r = &e->row;
    memory *m = e->m;
    if (!(p < 1.f)) return;
    settle_row(r);
    const vf scale = vf_set1(mass_scale(r->unit)), one = vf_set1(1 << LOWER_BITS);
    u64 upper = 0, lower = 0, mass = 0;
    for (i64 c = 0; c < chunks_of(r->count); c++) {
        exact_sum sum_upper = {0}, sum_lower = {0}, sum = {0};
        for (i64 i = c * CHUNK; i < (c + 1) * CHUNK; i += QI_VW) {
            const vf w = vf_load(r->values + i), all = vf_mass(w, scale);
            const vf part = vf_floor(all * (1.f / (1 << LOWER_BITS)));
            const vf q = vf_from_i32(vi_information(w, r->unit));
            exact_add(&sum, all);
            exact_add_products(&sum_upper, part, q);
            exact_add_products(&sum_lower, vf_fma(-part, one, all), q);
        }
        upper += exact_total(&sum_upper);
        lower += exact_total(&sum_lower);
        mass += exact_total(&sum);
    }
    if (mass == 0) return;
    const double mean = typical_mean(upper, lower, mass);
    for (i64 c = 0; c < chunks_of(r->count); c++) {
        for (i64 i = c * CHUNK; i < (c + 1) * CHUNK; i += QI_VW) {
            const vf w = vf_load(r->values + i);
            const vf v = vf_typical(vi_information(w, r->unit), mean);
            vf_store(m->order + i, vf_select(w > 0.f, v, vf_set1(NO_LOGIT)));
        }
        r->chunk_max[c] = chunk_largest(m->order + c * CHUNK);
    }
    r->chunk_known = 0;
    const span s = {m->order, r->values, r->count, r->chunk_max, mass_scale(r->unit)};
    row order = *r;
    order.values = m->order;
    order.kind = ROW_LOGITS;
    order.max = largest_of(r->chunk_max, r->count);
    const bracket b = {key_of(-LARGEST), key_of(order.max) + 1, wish_of(mass, p), mass, 0};
    const cut end = find_end(m, &s, b, r->unit, BY_OTHER_MASS);
    if (end.last < r->count) drop_after(&order, end.value, end.last);
    for (i64 c = 0; c < chunks_of(r->count); c++) {
        float *const w = r->values + c * CHUNK;
        for (i64 i = 0; i < CHUNK; i += QI_VW) {
            const vf v = vf_load(m->order + c * CHUNK + i);
            vf_store(w + i, vf_where(v >= end.value, vf_load(w + i)));
        }
        r->chunk_max[c] = chunk_largest(w);
    }
    r->max = largest_of(r->chunk_max, r->count);
    r->mass = end.amount;
    r->mass_known = 1;
    if (e->can_list) list_row(m, r);
}

/* ---- weights ------------------------------------------------------------------------------ */

/* From raw logits of a type, or from values; those below the floor have no weight. */
QI_INLINE void exponentiate(row *r, float least, const int is_raw, const qi_dtype t)
{
    const row before = *r; /* apart from what is stored */
    const vf max = vf_set1(r->max), scale = vf_set1(mass_scale(EXPONENT_BIAS));
    const int bounded = before.floor > -LARGEST, scales = before.factor != 1.f, drops = least > 0.f;
    u64 mass = 0;
    for (i64 c = 0; c < chunks_of(before.count); c++) {
        float *const v = before.values + c * CHUNK;
        const char *const raw = is_raw ? qi_at(before.raw, t, c * CHUNK) : NULL;
        const int whole = is_raw && length_of(&before, c) == CHUNK;
        exact_sum sum = {0};
        vf most = vf_set1(0.f);
        if (is_raw && !whole) load_raw(&before, c, v);
        for (i64 i = 0; i < CHUNK; i += WEIGHTS * QI_VW) {
            vf x[WEIGHTS];
            if (whole)
                FOR_EACH(j) x[j] = qi_load(qi_at(raw, t, i + j * QI_VW), t);
            else
                FOR_EACH(j) x[j] = vf_load(v + i + j * QI_VW);
            if (whole && scales) FOR_EACH(j) x[j] *= before.factor;
            if (!is_raw && bounded)
                FOR_EACH(j) x[j] = vf_select(x[j] >= before.floor, x[j], vf_set1(NO_LOGIT));
            vf_weigh(x, max);
            if (drops) FOR_EACH(j) x[j] = vf_where(x[j] >= least, x[j]);
            FOR_EACH(j)
            {
                vf_store(v + i + j * QI_VW, x[j]);
                most = vf_max(most, x[j]);
            }
            FOR_EACH(j) exact_add(&sum, vf_mass(x[j], scale));
        }
        before.chunk_max[c] = vf_max_lane(most);
        before.chunk_mass[c] = exact_total(&sum);
        mass += before.chunk_mass[c];
    }
    r->mass = mass;
}

/* Weights below `least` of the largest are dropped. */
static void softmax(engine *e, float least)
{
    row *r = &e->row;
    if (!r->raw)
        exponentiate(r, least, 0, QI_F32);
    else if (r->dtype == QI_F32)
        exponentiate(r, least, 1, QI_F32);
    else if (r->dtype == QI_F16)
        exponentiate(r, least, 1, QI_F16);
    else
        exponentiate(r, least, 1, QI_BF16);
    r->raw = NULL;
    r->max = r->max > NO_LOGIT ? 1.f : 0.f;
    r->kind = ROW_WEIGHTS;
    r->unit = EXPONENT_BIAS;
    r->floor = LEAST_NORMAL;
    r->mass_known = r->chunk_known = 1;
}

/* ---- what comes out ------------------------------------------------------------------------ */

static i32 draw(engine *e)
{
    const sampling_params *p = e->p;
    row *r = &e->row;
    if (!r->mass_known) weigh_row(r);
    if (r->mass == 0) return 0;
    const u64 random =
        qi_philox_u64(request_u64(&p->seed, e->request), request_u64(&p->offset, e->request));
    const u64 target = high_product(random, r->mass);
    const vf scale = vf_set1(mass_scale(r->unit));
    u64 sum = 0;
    for (i64 c = 0; c < chunks_of(r->count); c++) {
        u64 here = 0;
        if (r->chunk_known) {
            here = r->chunk_mass[c];
        } else if (r->chunk_max[c] >= r->floor) {
            exact_sum exact = {0};
            for (i64 i = c * CHUNK; i < (c + 1) * CHUNK; i += QI_VW) {
                const vf w = vf_load(r->values + i);
                exact_add(&exact, vf_mass(vf_where(w >= r->floor, w), scale));
            }
            here = exact_total(&exact);
        }
        if (sum + here <= target) {
            sum += here;
            continue;
        }
        for (i64 i = c * CHUNK; i < (c + 1) * CHUNK; i++) {
            const float w = r->values[i];
            if (w < r->floor) continue;
            sum += mass_of(w, r->unit);
            if (sum > target) return r->index ? r->index[i] : (i32)i;
        }
    }
    return 0; /* not reached: the target is below the mass */
}

/* A row's values as they go out: logits, or weights times two factors. */
QI_INLINE void write_values(const row *r, const float factor[2], char *out, const qi_dtype t)
{
    const vf nothing = vf_set1(nothing_of(r->kind));
    const i64 vocab = r->count;
    for (i64 i = 0; i < vocab; i += QI_VW) {
        const vf v = vf_load(r->values + i);
        const vf x = vf_select(v >= r->floor, v * factor[0] * factor[1], nothing);
        char *const to = out + i * (i64)qi_size_of(t);
        if (i + QI_VW <= vocab)
            qi_store(to, t, x);
        else
            qi_store_n(to, t, x, vocab - i);
    }
}

/* Those of a list, among what is not there. */
QI_INLINE void write_list(const row *r, const float factor[2], char *out, i64 vocab,
                          const qi_dtype t)
{
    const vf nothing = vf_set1(nothing_of(r->kind));
    i64 i = 0;
    for (; i + QI_VW <= vocab; i += QI_VW) qi_store(out + i * (i64)qi_size_of(t), t, nothing);
    if (i < vocab) qi_store_n(out + i * (i64)qi_size_of(t), t, nothing, vocab - i);
    for (i = 0; i < r->count; i++)
        if (r->values[i] >= r->floor)
            qi_store_n(out + r->index[i] * (i64)qi_size_of(t), t,
                       vf_set1(r->values[i] * factor[0] * factor[1]), 1);
}

static void write_row(engine *e)
{
    const sampling_params *p = e->p;
    row *r = &e->row;
    const qi_dtype t = p->out_dtype;
    char *const out = (char *)p->out + e->request * p->out_stride * (i64)qi_size_of(t);
    float factor[2] = {1.f, 1.f};
    copy_row(r);
    if (p->out_kind == ROW_WEIGHTS) factor[0] = ldexpf(1.f, EXPONENT_BIAS - r->unit);
    if (p->out_kind == ROW_PROBS) {
        if (!r->mass_known) weigh_row(r);
        factor[0] = shrink_of(r->unit);
        factor[1] = r->mass ? prob_scale(r->mass, shrunk_unit(r->unit)) : 0.f;
    }
#define WRITE(t)                                                                                   \
    (r->index ? write_list(r, factor, out, p->vocab, t) : write_values(r, factor, out, t))
    switch (t) {
    case QI_F32: WRITE(QI_F32); break;
    case QI_F16: WRITE(QI_F16); break;
    default: WRITE(QI_BF16);
    }
#undef WRITE
}

/* ---- a row's stages ------------------------------------------------------------------------- */

static void run_stage(engine *e, const sampling_stage *s)
{
    const i32 k = s->kind == STAGE_TOP_K ? request_i32(&s->value, e->request) : 0;
    const float x = s->kind != STAGE_TOP_K ? request_f32(&s->value, e->request) : 0.f;
    switch (s->kind) {
    case STAGE_TOP_K:
        if (k > 0) top_k(e, k);
        break;
    case STAGE_TEMPERATURE: top_k(e, 1); break; /* 0: others are elementwise */
    case STAGE_TOP_N_SIGMA: top_n_sigma(e, x); break;
    case STAGE_TOP_P: top_p(e, x); break;
    case STAGE_MIN_P: min_p(e, x); break;
    case STAGE_TYPICAL_P: typical_p(e, x); break;
    default: break; /* sample, which is last */
    }
}

/* Softmax that is followed by min_p, whose threshold is known then, leaves out what that drops. */
static i32 run_softmax(engine *e, i32 s)
{
    const sampling_stage *next = e->p->stages + s + 1;
    const int both = s + 1 < e->p->num_stages && next->kind == STAGE_MIN_P;
    softmax(e, both ? min_p_threshold(request_f32(&next->value, e->request), 1.f) : 0.f);
    if (both) keep_from(e, LEAST_NORMAL);
    return s + 1 + both;
}

static void run_row(engine *e)
{
    const sampling_params *p = e->p;
    const i64 number = p->indices ? p->indices[e->request] : e->request;
    const int is_row = number >= 0 && number < p->num_rows;
    int bad = 0;
    i32 s = load_row(e->m, &e->row, p, e->request, is_row ? number : -1, p->valid ? &bad : NULL);
    while (s < p->num_stages) {
        e->can_list = 1;
        for (i32 i = s; i < p->num_stages; i++) e->can_list &= !needs_tokens(&p->stages[i]);
        const i32 end = end_of_elementwise(p, s, e->request);
        if (end > s) {
            copy_row(&e->row);
            settle_row(&e->row);
            apply_stages(e->m, &e->row, p, s, end, e->request);
            s = end;
        } else if (p->stages[s].kind == STAGE_SOFTMAX) {
            s = run_softmax(e, s);
        } else {
            run_stage(e, &p->stages[s++]);
        }
    }
    if (e->row.kind == ROW_LOGITS && p->out_kind != ROW_LOGITS) softmax(e, 0.f);
    if (p->out_kind == ROW_TOKENS)
        ((i32 *)p->out)[e->request] = draw(e);
    else
        write_row(e);
    if (!p->valid) return;
    if (e->row.kind != ROW_LOGITS && !e->row.mass_known) weigh_row(&e->row);
    const int left = e->row.kind == ROW_LOGITS ? e->row.max >= e->row.floor : e->row.mass > 0;
    if (!p->valid_so_far) p->valid[e->request] = 1;
    p->valid[e->request] &= is_row && !bad && left;
}

QI_CPU_KERNEL(sampling)
{
    engine e = {.p = params, .m = task.scratch};
    i64 begin, end;
    qi_task_share(task, e.p->batch, 1, &begin, &end);
    for (e.request = begin; e.request < end; e.request++) run_row(&e);
}
