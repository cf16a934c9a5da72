/* attention_problem.c - SPDX-License-Identifier: Apache-2.0 */
#include "attention_problem.h"

#include <string.h>

static bool is(const problem *p, const char *op)
{
    return strcmp(p->op, op) == 0;
}

bool attention_problem_is(const problem *p)
{
    return is(p, "decode") || is(p, "prefill") || is(p, "mixed");
}

/* Key counts in an order of chance, the same each time for a problem: results of two runs can be
 * compared. Each is at least the request's rows. */
static void draw_lengths(const problem *p, attention_problem *a)
{
    const int64_t kv_len = p->value[KEY_KV_LEN].first, dist = p->value[KEY_DIST].first;
    data_random random = {(uint64_t)(kv_len * a->batch)};
    double harmonic = 0;
    for (int64_t r = 0; r < a->batch; r++) harmonic += 1 / (double)(r + 1);
    for (int64_t r = 0; r < a->batch; r++) {
        double n = (double)kv_len;
        if (dist == DIST_UNIFORM)
            n = (double)(kv_len - data_below(&random, kv_len - kv_len / 2 + 1));
        if (dist == DIST_ZIPF) n = (double)kv_len * (double)a->batch / harmonic / (double)(r + 1);
        a->kv_len[r] = n < 1 ? 1 : n > 0x7fffffff ? 0x7fffffff : (int32_t)n;
    }
    data_shuffle(&random, a->qo_len, a->batch);
    data_shuffle(&random, a->kv_len, a->batch);
    for (int64_t r = 0; r < a->batch; r++) {
        if (is(p, "prefill") && dist != DIST_FIXED) {
            const double rows = (double)a->kv_len[r] * (double)a->qo_len[r] / (double)kv_len;
            a->qo_len[r] = rows < 1 ? 1 : (int32_t)rows;
        }
        if (a->kv_len[r] < a->qo_len[r]) a->kv_len[r] = a->qo_len[r];
    }
}

static void add_up(attention_problem *a)
{
    const int64_t page = a->spec.page_size;
    qkv_attention_limits *l = &a->limits;
    *l = (qkv_attention_limits){QKV_ATTENTION_LIMITS_INIT, .max_requests = (int32_t)a->batch};
    for (int64_t r = 0; r < a->batch; r++) {
        a->num_tokens += a->qo_len[r];
        a->num_keys += a->kv_len[r];
        a->num_pages += page ? (a->kv_len[r] + page - 1) / page : 0;
        if (a->qo_len[r] > l->max_qo_len) l->max_qo_len = a->qo_len[r];
        if (a->kv_len[r] > l->max_kv_len) l->max_kv_len = a->kv_len[r];
    }
    l->max_tokens = a->num_tokens;
    a->pool_pages = page ? a->num_pages - (a->batch - 1) * (a->shared / page) : 0;
    l->max_pages = a->num_pages;
    l->pool_pages = a->pool_pages;
    l->max_levels = a->form == FORM_FLAT ? 1 : 2;
    a->pool_slots = page ? a->pool_pages * page : a->num_keys;
}

attention_problem attention_problem_create(const problem *p)
{
    const problem_value *v = p->value;
    attention_problem a = {
        .spec = {QKV_ATTENTION_SPEC_INIT, .num_qo_heads = (int32_t)v[KEY_HEADS].first,
                 .num_kv_heads = (int32_t)v[KEY_HEADS].second,
                 .head_dim_qk = (int32_t)v[KEY_HEAD_DIM].first,
                 .head_dim_vo = (int32_t)v[KEY_HEAD_DIM].second,
                 .page_size = (int32_t)v[KEY_PAGE].first, .kv_layout = (int32_t)v[KEY_LAYOUT].first,
                 .mask = (int32_t)v[KEY_MASK].first, .dtype_q = problem_dtype(p, KEY_Q),
                 .dtype_kv = problem_dtype(p, KEY_KV), .dtype_o = problem_dtype(p, KEY_O)},
        .batch = v[KEY_BATCH].first,
        .shared = v[KEY_SHARED].first,
        .form = v[KEY_FORM].first,
    };
    if (v[KEY_CAP].real > 0) {
        a.spec.features |= QKV_FEATURE_SOFT_CAP;
        a.spec.logits_soft_cap = (float)v[KEY_CAP].real;
    }
    if (v[KEY_WINDOW].first >= 0) {
        a.spec.features |= QKV_FEATURE_WINDOW;
        a.spec.window_left = (int32_t)v[KEY_WINDOW].first;
        a.spec.window_right = -1;
    }
    if (is(p, "decode") && v[KEY_WRITES].first == 0) a.spec.flags |= QKV_ATTENTION_ONLY_APPENDS;
    if (v[KEY_INVARIANT].first) a.spec.flags |= QKV_ATTENTION_BATCH_INVARIANT;
    a.qo_len = data_alloc((double)a.batch, sizeof *a.qo_len);
    a.kv_len = data_alloc((double)a.batch, sizeof *a.kv_len);
    for (int64_t r = 0; r < a.batch; r++) {
        const bool many = is(p, "prefill") || (is(p, "mixed") && r < v[KEY_PREFILLS].first);
        a.qo_len[r] = many ? (int32_t)v[KEY_QO_LEN].first : 1;
    }
    draw_lengths(p, &a);
    add_up(&a);
    return a;
}

void attention_problem_destroy(attention_problem *a)
{
    data_free(a->qo_len);
    data_free(a->kv_len);
}
