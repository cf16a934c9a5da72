/* variants_ref.c - see variants_ref.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ref/variants_ref.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DIM = 512 };

/* ---- the examples ------------------------------------------------------------------------- */

static double sigmoid_logit(const ref_values *v, const ref_pos *pos, double x)
{
    (void)pos;
    return 1 / (1 + exp(-(x + v->bias)));
}

static double soft_cap_logit(const ref_values *v, const ref_pos *pos, double x)
{
    (void)pos;
    return v->cap * tanh(x / v->cap);
}

static double alibi_logit(const ref_values *v, const ref_pos *pos, double x)
{
    return x - v->slopes[pos->qo_head] * (double)(pos->qo_pos - pos->kv_pos);
}

static double sink_state(const ref_values *v, const ref_pos *pos)
{
    return v->sink[pos->qo_head];
}

static bool document_mask_mask(const ref_values *v, const ref_pos *pos)
{
    const double *documents = v->document + pos->request * v->positions;
    return documents[pos->kv_pos] == documents[pos->qo_pos];
}

static double relative_bias_logit(const ref_values *v, const ref_pos *pos, double x)
{
    const int64_t reach = v->max_distance, distance = pos->kv_pos - pos->qo_pos;
    const double *row = v->table + pos->qo_head * (2 * reach + 1);
    if (distance <= -reach) return x + row[0];
    if (distance >= reach) return x + row[2 * reach];
    return x + row[distance + reach];
}

static bool streaming_mask(const ref_values *v, const ref_pos *pos)
{
    if (pos->kv_pos < v->sink_tokens) return true;
    return pos->kv_pos > pos->qo_pos - v->window;
}

static bool tree_mask_mask(const ref_values *v, const ref_pos *pos)
{
    const int64_t first = pos->kv_len - pos->qo_len; /* the root's position */
    if (pos->kv_pos < first) return true;
    const int64_t node = pos->kv_pos - first;
    return v->tree[(pos->request * v->nodes + pos->qo_idx) * v->nodes + node] != 0;
}

/* Pairs (first(i), second(i)) turned by position * theta^(-2i / dim). */
static void rotate(const ref_values *v, double position, double *x, int64_t dim, bool interleaved)
{
    for (int64_t i = 0; i < dim / 2; i++) {
        const double angle = position * pow(v->theta, -2.0 * (double)i / (double)v->head_dim);
        double *a = interleaved ? x + 2 * i : x + i;
        double *b = interleaved ? a + 1 : a + dim / 2;
        const double re = *a * cos(angle) - *b * sin(angle);
        const double im = *a * sin(angle) + *b * cos(angle);
        *a = re, *b = im;
    }
}

static void rope_query(const ref_values *v, const ref_pos *pos, double *x, int64_t dim)
{
    rotate(v, (double)pos->qo_pos, x, dim, false);
}

static void rope_key(const ref_values *v, const ref_pos *pos, double *x, int64_t dim)
{
    rotate(v, (double)pos->kv_pos, x, dim, false);
}

static void rope_interleaved_query(const ref_values *v, const ref_pos *pos, double *x, int64_t dim)
{
    rotate(v, (double)pos->qo_pos, x, dim, true);
}

static void rope_interleaved_key(const ref_values *v, const ref_pos *pos, double *x, int64_t dim)
{
    rotate(v, (double)pos->kv_pos, x, dim, true);
}

static const ref_variant examples[] = {
    {.name = "sigmoid", .logit = sigmoid_logit, .no_softmax = true},
    {.name = "soft_cap", .logit = soft_cap_logit},
    {.name = "alibi", .logit = alibi_logit},
    {.name = "sink", .state = sink_state},
    {.name = "document_mask", .mask = document_mask_mask},
    {.name = "relative_bias", .logit = relative_bias_logit},
    {.name = "streaming", .mask = streaming_mask},
    {.name = "tree_mask", .mask = tree_mask_mask},
    {.name = "rope", .query = rope_query, .key = rope_key, .angles = true},
    {.name = "rope_interleaved",
     .query = rope_interleaved_query,
     .key = rope_interleaved_key,
     .angles = true},
};

const ref_variant *ref_variant_of(const char *name)
{
    for (size_t i = 0; i < sizeof examples / sizeof *examples; i++)
        if (!strcmp(examples[i].name, name)) return &examples[i];
    abort();
}

/* ---- attention ---------------------------------------------------------------------------- */

static void *allocate(int64_t n, size_t bytes)
{
    void *p = calloc((size_t)(n > 0 ? n : 1), bytes);
    if (!p) abort();
    return p;
}

static bool visible(const ref_problem *p, const ref_pos *pos)
{
    const qkv_attention_spec *s = p->spec;
    const bool window = s->features & QKV_FEATURE_WINDOW;
    if (s->mask == QKV_MASK_CAUSAL && pos->kv_pos > pos->qo_pos) return false;
    if (window && s->window_left >= 0 && pos->kv_pos < pos->qo_pos - s->window_left) return false;
    if (window && s->window_right >= 0 && pos->kv_pos > pos->qo_pos + s->window_right) return false;
    return !p->variant->mask || p->variant->mask(p->values, pos);
}

/* A logit after all hooks. k: the key's row, which the hook may change in this copy. */
static double logit_of(const ref_problem *p, const ref_pos *pos, const double *q, const double *k,
                       ref_row *row)
{
    const qkv_attention_spec *s = p->spec;
    double changed[MAX_DIM], sum = 0, sum_abs = 0, q_norm = 0, k_norm = 0;
    memcpy(changed, k, (size_t)s->head_dim_qk * sizeof *k);
    if (p->variant->key) p->variant->key(p->values, pos, changed, s->head_dim_qk);
    for (int32_t d = 0; d < s->head_dim_qk; d++) {
        sum += q[d] * changed[d];
        sum_abs += fabs(q[d] * changed[d]);
        q_norm += q[d] * q[d];
        k_norm += changed[d] * changed[d];
    }
    const double sm_scale = (double)s->sm_scale;
    const double far = fabs((double)pos->qo_pos) + fabs((double)pos->kv_pos);
    double x = sum * sm_scale;
    row->max_dot = fmax(row->max_dot, sum_abs * sm_scale);
    row->max_angle = fmax(row->max_angle, sqrt(q_norm * k_norm) * sm_scale * far);
    row->max_logit = fmax(row->max_logit, fabs(x));
    if (s->features & QKV_FEATURE_SOFT_CAP) {
        const double cap = (double)s->logits_soft_cap;
        x = cap * tanh(x / cap);
    }
    if (p->variant->logit) x = p->variant->logit(p->values, pos, x);
    row->max_logit = fmax(row->max_logit, fabs(x));
    return x;
}

/* Weights of the keys from logits x[0, n), NaN where invisible: in place, 0 where invisible. */
static void weigh(const ref_problem *p, const ref_pos *pos, double *x, int64_t n, ref_row *row)
{
    const bool softmax = !p->variant->no_softmax, state = softmax && p->variant->state;
    const double extra = state ? p->variant->state(p->values, pos) : -INFINITY;
    double max = extra, sum = 0;
    for (int64_t j = 0; j < n; j++)
        if (!isnan(x[j])) max = fmax(max, x[j]);
    for (int64_t j = 0; j < n; j++) {
        if (isnan(x[j])) {
            x[j] = 0;
            continue;
        }
        row->num_keys++;
        if (softmax) sum += x[j] = exp(x[j] - max);
    }
    if (!softmax) return;
    if (state) {
        sum += exp(extra - max);
        row->max_logit = fmax(row->max_logit, fabs(extra));
    }
    for (int64_t j = 0; j < n && sum > 0; j++) x[j] /= sum;
    row->lse = sum > 0 ? max + log(sum) : -INFINITY;
}

/* One row of one head. x: room for a number a key. */
static ref_row attend(const ref_problem *p, ref_pos pos, const double *q, double *x, double *o)
{
    const qkv_attention_spec *s = p->spec;
    const int32_t *keys = p->keys[pos.request];
    const int64_t qk = s->head_dim_qk, vo = s->head_dim_vo;
    ref_row row = {.lse = -INFINITY};
    double changed[MAX_DIM];
    memcpy(changed, q, (size_t)qk * sizeof *q);
    if (p->variant->query) p->variant->query(p->values, &pos, changed, qk);
    for (int64_t j = 0; j < pos.kv_len; j++) {
        ref_pos at = pos;
        at.kv_pos = j;
        const double *k = p->k + (keys[j] * s->num_kv_heads + pos.kv_head) * qk;
        x[j] = visible(p, &at) ? logit_of(p, &at, changed, k, &row) : NAN;
    }
    weigh(p, &pos, x, pos.kv_len, &row);
    for (int64_t d = 0; d < vo; d++) {
        double sum = 0, sum_abs = 0, squares = 0, plain = 0;
        for (int64_t j = 0; j < pos.kv_len; j++) {
            const double v = p->v[(keys[j] * s->num_kv_heads + pos.kv_head) * vo + d];
            sum += x[j] * v;
            sum_abs += fabs(x[j] * v);
            squares += x[j] * v * x[j] * v;
            plain += v * v;
        }
        row.mean_v = fmax(row.mean_v, sum_abs);
        row.rms_v = fmax(row.rms_v, sqrt(squares));
        row.norm_v = fmax(row.norm_v, sqrt(plain));
        o[d] = p->variant->output ? p->variant->output(p->values, &pos, d, sum) : sum;
    }
    return row;
}

void variants_ref(const ref_problem *problem, double *o, ref_row *rows)
{
    const qkv_attention_spec *s = problem->spec;
    int64_t row = 0;
    for (int32_t r = 0; r < problem->num_requests; r++) {
        double *x = allocate(problem->kv_len[r], sizeof *x);
        for (int64_t i = 0; i < problem->qo_len[r]; i++) {
            for (int64_t h = 0; h < s->num_qo_heads; h++, row++) {
                const ref_pos pos = {.request = r,
                                     .qo_head = h,
                                     .kv_head = h / (s->num_qo_heads / s->num_kv_heads),
                                     .qo_pos = problem->qo_pos[r] + i,
                                     .qo_idx = i,
                                     .qo_len = problem->qo_len[r],
                                     .kv_len = problem->kv_len[r]};
                rows[row] = attend(problem, pos, problem->q + row * s->head_dim_qk, x,
                                   o + row * s->head_dim_vo);
            }
        }
        free(x);
    }
}
