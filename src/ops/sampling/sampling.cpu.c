/* sampling.cpu.c - a list of stages over each row. Tasks share the rows, and a row where there are more of them.
 *
 * Logits that at most temperature changes stay where they are: a first pass takes the maxima of chunks, from
 * which few chunks are looked at again if few tokens are asked for. Other rows are copied into the task's
 * memory as f32, with the stages that look at one logit alone. Weights are not stored for a token: a pass over the
 * logits adds up the masses of chunks, and, where top_p comes next, takes out the tokens among which its prefix ends;
 * a draw makes the weights of one chunk. What filters leave is remembered as a bound; few tokens are made a list,
 * which makes all that follows short.
 *
 * Bound: memory for the first pass; 30 instructions a vector for masses, 50 with top_p.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/philox.h"
#include "ops/sampling/elementwise.cpu.h"
#include "ops/sampling/top_p.cpu.h"

/* What runs a row: a request of p. */
typedef struct engine {
    const sampling_params *p;
    i64 request;
    memory *m;
    row row;
    i32 tasks;    /* of the launch */
    int can_list; /* no later stage asks for tokens by place */
} engine;

/* ---- filters that keep a prefix of the order ------------------------------------------------------- */

QI_INLINE span span_of(const row *r)
{
    const float scale = r->kind == ROW_WEIGHTS ? mass_scale(r->unit) : 0.f;
    return (span){r->values, r->values, r->count, r->chunk_max, scale};
}

/* Makes the row a list of at least its first `count` tokens by order, where chunk maxima say that few are
 * enough. */
static void shorten_by_count(engine *e, i64 count)
{
    row shorter = e->row;
    if (!e->can_list || shorter.index) return;
    amounts_of_maxima(e->m, &shorter, BY_COUNT);
    bound_row(&shorter, bound_of_maxima(e->m, &shorter, (float)count));
    if (list_row(e->m, &shorter)) e->row = shorter;
}

/* Unmade weights of at least the returned one have logits of at least `lowest`: computed ones differ from exp() by
 * less than 2^-20 of it. */
static float weight_above(const row *r, float lowest)
{
    return rn_mul(weight_of(lowest, r->largest), 1.f + 0x1p-18f);
}

/* The same for a mass, where b says what is known of the prefix that has it; b learns more either way. The largest of
 * chunks have a part of the mass, and as much of the prefix's, or somewhat more. */
static void shorten_by_mass(engine *e, bracket *b)
{
    static const float more[] = {1.1f, 1.7f};
    const float part = (float)b->wish / (float)e->row.mass;
    if (!e->can_list || e->row.index) return;
    for (int i = 0; i < 2; i++) {
        row shorter = e->row;
        const float sum = amounts_of_maxima(e->m, &shorter, BY_MASS);
        float floor = bound_of_maxima(e->m, &shorter, fminf(more[i] * part, 1.f) * sum);
        if (floor < (shorter.unmade ? shorter.lowest : shorter.floor)) return;
        if (shorter.unmade) {
            shorter.lowest = floor;
            floor = weight_above(&shorter, floor);
        }
        bound_row(&shorter, floor);
        if (!list_row(e->m, &shorter)) return;
        weigh_row(e->m, &shorter, NULL);
        if (shorter.mass >= b->wish) {
            b->low = key_of(floor);
            b->upto = shorter.mass;
            e->row = shorter;
            return;
        }
        b->high = key_of(floor);
        b->above = shorter.mass;
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
    if (r->unmade) copy_row(e->m, r);
    for (i64 c = 0; c < chunks_of(r->count); c++) chunks += r->chunk_max[c] >= low;
    if (k <= chunks) shorten_by_count(e, k);
    copy_row(e->m, r);
    const span s = span_of(r);
    const bracket b = {key_of(low), key_of(r->max) + 1, (u64)k, amount_from(&s, low, BY_COUNT), 0};
    if (b.wish >= b.upto) return;
    const cut end = find_end(e->m, &s, b, 0, BY_COUNT);
    keep_prefix(e, &end);
}

static void top_p(engine *e, float p)
{
    row *r = &e->row;
    if (!(p < 1.f) || top_p_at_once(e->m, r, p)) return;
    if (!r->mass_known) weigh_row(e->m, r, NULL);
    if (r->mass == 0) return;
    bracket b = {key_of(r->floor), key_of(r->max) + 1, wish_of(r->mass, p), r->mass, 0};
    shorten_by_mass(e, &b);
    copy_row(e->m, r);
    const span s = span_of(r);
    const cut end = find_end(e->m, &s, b, r->unit, BY_MASS);
    keep_prefix(e, &end);
    r->mass = end.amount;
    r->mass_known = 1;
}

/* A logit below which no weight is min_p, so that few of them need be made. */
static void bound_logits(row *r, float p)
{
    const float lowest = r->largest + logf(p) - 0.01f;
    if (weight_above(r, lowest) <= p && lowest > r->lowest) r->lowest = lowest;
}

static void min_p(engine *e, float p)
{
    row *r = &e->row;
    const float floor = min_p_threshold(p, r->max);
    if (r->unmade && floor > r->floor) bound_logits(r, floor);
    keep_from(e, floor);
}

/* ---- filters of another order ------------------------------------------------------------------ */

static void top_n_sigma(engine *e, float n_sigma)
{
    row *r = &e->row;
    vf lowest = vf_set1(INFINITY);
    copy_row(e->m, r);
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
    copy_row(m, r);
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

/* ---- what comes out ------------------------------------------------------------------------ */

static i32 draw(engine *e)
{
    const sampling_params *p = e->p;
    row *r = &e->row;
    if (!r->chunk_known) weigh_row(e->m, r, NULL);
    if (r->mass == 0) return 0;
    const u64 random =
        qi_philox_u64(request_u64(&p->seed, e->request), request_u64(&p->offset, e->request));
    const u64 target = high_product(random, r->mass);
    u64 sum = 0;
    i64 c = 0;
    while (sum + r->chunk_mass[c] <= target)
        sum += r->chunk_mass[c++]; /* the target is below the mass */
    float room[CHUNK];
    const float *const w = chunk_values(r, c, room);
    i64 i = 0;
    for (;; i++) {
        if (w[i] >= r->floor) sum += mass_of(w[i], r->unit);
        if (sum > target) break;
    }
    return r->index ? r->index[c * CHUNK + i] : (i32)(c * CHUNK + i);
}

/* How a row's values go out: logits, or weights times two factors. */
typedef struct writing {
    const row *r;
    float factor[2];
    char *out;
    qi_dtype dtype;
} writing;

QI_INLINE void write_chunk(const writing *to, i64 c, const float *v, const qi_dtype t)
{
    const row *r = to->r;
    const vf nothing = vf_set1(nothing_of(r->kind));
    const i64 n = length_of(r, c);
    char *const out = to->out + c * CHUNK * (i64)qi_size_of(t);
    for (i64 i = 0; i < n; i += QI_VW) {
        const vf x = vf_load(v + i);
        const vf y = vf_select(x >= r->floor, x * to->factor[0] * to->factor[1], nothing);
        if (i + QI_VW <= n)
            qi_store(out + i * (i64)qi_size_of(t), t, y);
        else
            qi_store_n(out + i * (i64)qi_size_of(t), t, y, n - i);
    }
}

static void write_chunks(void *arg, i64 begin, i64 end)
{
    const writing *to = arg;
    for (i64 c = begin; c < end; c++) {
        float room[CHUNK];
        const float *const v = chunk_values(to->r, c, room);
        switch (to->dtype) {
        case QI_F32: write_chunk(to, c, v, QI_F32); break;
        case QI_F16: write_chunk(to, c, v, QI_F16); break;
        default: write_chunk(to, c, v, QI_BF16);
        }
    }
}

/* Those of a list, among what is not there. */
QI_INLINE void write_list(const writing *to, i64 vocab, const qi_dtype t)
{
    const row *r = to->r;
    const vf nothing = vf_set1(nothing_of(r->kind));
    const i64 size = (i64)qi_size_of(t);
    i64 i = 0;
    for (; i + QI_VW <= vocab; i += QI_VW) qi_store(to->out + i * size, t, nothing);
    if (i < vocab) qi_store_n(to->out + i * size, t, nothing, vocab - i);
    for (i = 0; i < r->count; i++)
        if (r->values[i] >= r->floor)
            qi_store_n(to->out + r->index[i] * size, t,
                       vf_set1(r->values[i] * to->factor[0] * to->factor[1]), 1);
}

static void write_row(engine *e)
{
    const sampling_params *p = e->p;
    row *r = &e->row;
    const qi_dtype t = p->out_dtype;
    writing to = {r, {1.f, 1.f}, NULL, t};
    to.out = (char *)p->out + e->request * p->out_stride * (i64)qi_size_of(t);
    if (p->out_kind == ROW_WEIGHTS) to.factor[0] = ldexpf(1.f, EXPONENT_BIAS - r->unit);
    if (p->out_kind == ROW_PROBS) {
        if (!r->mass_known) weigh_row(e->m, r, NULL);
        to.factor[0] = shrink_of(r->unit);
        to.factor[1] = r->mass ? prob_scale(r->mass, shrunk_unit(r->unit)) : 0.f;
    }
    if (!r->index) {
        team_run(e->m->team, e->m->task, write_chunks, &to, chunks_of(r->count));
        return;
    }
    switch (t) {
    case QI_F32: write_list(&to, p->vocab, QI_F32); break;
    case QI_F16: write_list(&to, p->vocab, QI_F16); break;
    default: write_list(&to, p->vocab, QI_BF16);
    }
}

/* ---- a row's stages ------------------------------------------------------------------------- */

static void run_stage(engine *e, const sampling_stage *s)
{
    const i32 k = s->kind == STAGE_TOP_K ? request_i32(&s->value, e->request) : 0;
    const float x = s->kind != STAGE_TOP_K ? request_f32(&s->value, e->request) : 0.f;
    switch (s->kind) {
    case STAGE_SOFTMAX: soften_row(&e->row); break;
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

static void run_row(engine *e)
{
    const sampling_params *p = e->p;
    const i64 number = p->indices ? p->indices[e->request] : e->request;
    const int is_row = number >= 0 && number < p->num_rows;
    int bad = 0;
    i32 s = load_row(e->m, &e->row, p, e->request, is_row ? number : -1, p->valid ? &bad : NULL);
    e->row.keeps = p->out_kind != ROW_TOKENS;
    if (!p->indices && e->request + e->tasks < p->batch)
        e->row.ahead = qi_at(p->rows, p->dtype, (e->request + e->tasks) * p->rows_stride);
    while (s < p->num_stages) {
        e->can_list = 1;
        for (i32 i = s; i < p->num_stages; i++) e->can_list &= !needs_tokens(&p->stages[i]);
        const i32 end = end_of_elementwise(p, s, e->request);
        if (end > s) {
            run_of_stages stages = {.p = p, .request = e->request, .first = s, .end = end};
            copy_row(e->m, &e->row);
            settle_row(&e->row);
            apply_stages(e->m, &e->row, &stages);
            s = end;
        } else {
            run_stage(e, &p->stages[s++]);
        }
    }
    if (e->row.kind == ROW_LOGITS && p->out_kind != ROW_LOGITS) soften_row(&e->row);
    if (p->valid) { /* before the result, which may be where the row is */
        if (e->row.kind != ROW_LOGITS && !e->row.mass_known) weigh_row(e->m, &e->row, NULL);
        const int left = e->row.kind == ROW_LOGITS ? e->row.max >= e->row.floor : e->row.mass > 0;
        if (!p->valid_so_far) p->valid[e->request] = 1;
        p->valid[e->request] &= is_row && !bad && left;
    }
    if (p->out_kind == ROW_TOKENS)
        ((i32 *)p->out)[e->request] = draw(e);
    else
        write_row(e);
}

QI_CPU_KERNEL(sampling)
{
    const team_launch *launch = params;
    team *const t = launch->team;
    engine e = {.p = launch->params, .m = task.scratch, .tasks = task.count};
    e.m->team = t;
    e.m->task = task.index;
    while ((e.request = atomic_fetch_add(&t->next_row, 1)) < t->rows) {
        run_row(&e);
        atomic_fetch_add(&t->done, 1);
    }
    team_help(t, task);
}
