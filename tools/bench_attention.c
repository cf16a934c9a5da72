/* bench_attention.c - decode, prefill and a mix of both: the attention operator over a pool of
 * pages in random order.
 *
 * Sets are layers of a model: each has its own pool, and all share one plan, as in serving.
 * Bytes: the keys and values that some row sees, once a request (shared ones once); q and o.
 * Flops: 2 (head_dim_qk + head_dim_vo) for each query head, row and key that it sees.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "attention_problem.h"
#include "bench.h"

enum { NUM_SAMPLES = 32 /* (row, head) pairs that are checked in double */ };

typedef struct state {
    attention_problem a;
    qkv_attention *op;
    int32_t *qo_indptr, *kv_indptr, *kv_indices, *last_page_len;
    char *q, *k, *v, *o; /* k, v: num_sets pools */
    float *lse;
    size_t k_bytes, v_bytes; /* of a pool */
    data_tensor q_t, o_t, lse_t;
} state;

/* Strides of a pool in elements. */
typedef struct pool_strides {
    int64_t page, slot, head;
} pool_strides;

static pool_strides strides_of(const attention_problem *a, int64_t dim)
{
    const int64_t heads = a->spec.num_kv_heads;
    const int64_t slots = a->spec.page_size ? a->spec.page_size : a->num_keys;
    if (a->spec.kv_layout == QKV_NHD) return (pool_strides){slots * heads * dim, heads * dim, dim};
    return (pool_strides){slots * heads * dim, dim, slots * dim};
}

/* ---- what a row sees ----------------------------------------------------------------------- */

typedef struct key_range {
    int64_t begin, end;
} key_range;

static key_range row_sees(const attention_problem *a, int64_t request, int64_t row)
{
    const int64_t kv_len = a->kv_len[request], p = row + kv_len - a->qo_len[request];
    key_range s = {0, kv_len};
    if (a->spec.mask == QKV_MASK_CAUSAL && s.end > p + 1) s.end = p + 1;
    if ((a->spec.features & QKV_FEATURE_WINDOW) && s.begin < p - a->spec.window_left)
        s.begin = p - a->spec.window_left;
    return s;
}

static void count_work(bench *b, const attention_problem *a)
{
    const qkv_attention_spec *s = &a->spec;
    double keys = 0, pairs = 0;
    for (int64_t r = 0; r < a->batch; r++) {
        for (int64_t i = 0; i < a->qo_len[r]; i++) {
            const key_range seen = row_sees(a, r, i);
            pairs += (double)(seen.end - seen.begin);
        }
        keys += (double)(row_sees(a, r, a->qo_len[r] - 1).end - row_sees(a, r, 0).begin);
    }
    keys -= (double)(a->batch - 1) * (double)a->shared;
    const int64_t dims = s->head_dim_qk + s->head_dim_vo;
    const size_t row =
        data_bytes(s->dtype_q, s->head_dim_qk) + data_bytes(s->dtype_o, s->head_dim_vo);
    b->bytes = keys * (double)data_bytes(s->dtype_kv, dims * s->num_kv_heads) +
               (double)a->num_tokens * s->num_qo_heads * (double)row;
    b->flops = 2.0 * (double)dims * s->num_qo_heads * pairs;
    b->bf16 = s->dtype_q.code == QKV_BF16.code &&
              (s->dtype_kv.code == QKV_BF16.code || s->dtype_kv.bits == 8);
}

/* ---- inputs -------------------------------------------------------------------------------- */

/* The first row of the table that runs. */
static void find_row(bench *b, const attention_problem *a)
{
    char reasons[2048];
    tool_check(qkv_attention_can_run(b->ctx, &a->spec, &a->limits, reasons, sizeof reasons),
               "qkv_attention_can_run");
    for (const char *line = reasons; *line; line += strcspn(line, "\n") + 1) {
        const size_t name = strcspn(line, ":"), len = strcspn(line, "\n");
        if (len != name + 6 || memcmp(line + name, ": runs", 6) != 0) continue;
        memcpy(b->row, line, name < sizeof b->row ? name : sizeof b->row - 1);
        return;
    }
    tool_die(EXIT_WRONG, "qkv_attention_can_run: expected a row that runs, got\n%s", reasons);
}

static void make_index(bench *b, state *s)
{
    const attention_problem *a = &s->a;
    const int64_t page = a->spec.page_size;
    s->qo_indptr = bench_alloc(b, (double)a->batch + 1, sizeof(int32_t));
    s->kv_indptr = bench_alloc(b, (double)a->batch + 1, sizeof(int32_t));
    s->last_page_len = bench_alloc(b, (double)a->batch, sizeof(int32_t));
    s->kv_indices = bench_alloc(b, (double)a->num_pages + 1, sizeof(int32_t));
    for (int64_t r = 0; r < a->batch; r++) {
        const int32_t n = a->kv_len[r];
        s->qo_indptr[r + 1] = s->qo_indptr[r] + a->qo_len[r];
        s->kv_indptr[r + 1] = s->kv_indptr[r] + (int32_t)(page ? (n + page - 1) / page : n);
        s->last_page_len[r] = page ? (int32_t)((n - 1) % page + 1) : 0;
    }
    for (int64_t i = 0; i < a->num_pages; i++) s->kv_indices[i] = (int32_t)i;
    data_shuffle(&b->random, s->kv_indices, a->num_pages);
    for (int64_t r = 1; r < a->batch; r++)
        for (int64_t i = 0; page && i < a->shared / page; i++)
            s->kv_indices[s->kv_indptr[r] + i] = s->kv_indices[i];
}

/* The shared keys as a level of their own, the rest as the requests'. */
static void plan_levels(const state *s)
{
    const attention_problem *a = &s->a;
    const int64_t page = a->spec.page_size, shared = a->shared / page, batch = a->batch;
    int32_t all[2] = {0, (int32_t)a->num_tokens}, pages[2] = {0, (int32_t)shared};
    int32_t full = (int32_t)page;
    int32_t *indptr = data_alloc((double)batch + 1, sizeof *indptr);
    int32_t *indices = data_alloc((double)a->num_pages + 1, sizeof *indices);
    for (int64_t r = 0; r < batch; r++) {
        indptr[r + 1] = indptr[r];
        for (int64_t i = s->kv_indptr[r] + shared; i < s->kv_indptr[r + 1]; i++)
            indices[indptr[r + 1]++] = s->kv_indices[i];
    }
    data_tensor t[8];
    DATA_TENSOR(&t[0], all, QKV_I32, 2);
    DATA_TENSOR(&t[1], pages, QKV_I32, 2);
    DATA_TENSOR(&t[2], s->kv_indices, QKV_I32, shared);
    DATA_TENSOR(&t[3], &full, QKV_I32, 1);
    DATA_TENSOR(&t[4], s->qo_indptr, QKV_I32, batch + 1);
    DATA_TENSOR(&t[5], indptr, QKV_I32, batch + 1);
    DATA_TENSOR(&t[6], indices, QKV_I32, indptr[batch]);
    DATA_TENSOR(&t[7], s->last_page_len, QKV_I32, batch);
    const qkv_kv_index levels[] = {{QKV_KV_INDEX_INIT, .qo_indptr = &t[0].t, .kv_indptr = &t[1].t,
                                    .kv_indices = &t[2].t, .kv_last_page_len = &t[3].t},
                                   {QKV_KV_INDEX_INIT, .qo_indptr = &t[4].t, .kv_indptr = &t[5].t,
                                    .kv_indices = &t[6].t, .kv_last_page_len = &t[7].t}};
    const qkv_attention_batch levels_of = {QKV_ATTENTION_BATCH_INIT, .num_levels = 2,
                                           .levels = levels};
    tool_check(qkv_attention_plan(s->op, &levels_of, NULL), "qkv_attention_plan");
    data_free(indptr);
    data_free(indices);
}

static void plan(const state *s)
{
    const attention_problem *a = &s->a;
    if (a->form == FORM_LEVELS) {
        plan_levels(s);
        return;
    }
    data_tensor qo, kv, indices, last;
    DATA_TENSOR(&qo, s->qo_indptr, QKV_I32, a->batch + 1);
    DATA_TENSOR(&kv, s->kv_indptr, QKV_I32, a->batch + 1);
    DATA_TENSOR(&indices, s->kv_indices, QKV_I32, a->num_pages);
    DATA_TENSOR(&last, s->last_page_len, QKV_I32, a->batch);
    qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = &qo.t, .kv_indptr = &kv.t};
    if (a->spec.page_size) {
        index.kv_indices = &indices.t;
        index.kv_last_page_len = &last.t;
    }
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &index,
                                       .detect_shared_prefix = a->form == FORM_DETECT};
    tool_check(qkv_attention_plan(s->op, &batch, NULL), "qkv_attention_plan");
}

static void setup(bench *b)
{
    state *s = b->state = bench_alloc(b, 1, sizeof *s);
    s->a = attention_problem_create(b->p, &b->random);
    const attention_problem *a = &s->a;
    const qkv_attention_spec *spec = &a->spec;
    find_row(b, a);

    const int64_t rows = a->num_tokens * spec->num_qo_heads;
    const int64_t k_elements = a->pool_slots * spec->num_kv_heads * spec->head_dim_qk;
    const int64_t v_elements = a->pool_slots * spec->num_kv_heads * spec->head_dim_vo;
    s->k_bytes = data_bytes(spec->dtype_kv, k_elements);
    s->v_bytes = data_bytes(spec->dtype_kv, v_elements);
    s->q = bench_alloc(b, (double)rows * spec->head_dim_qk, data_bytes(spec->dtype_q, 1));
    s->o = bench_alloc(b, (double)rows * spec->head_dim_vo, data_bytes(spec->dtype_o, 1));
    s->lse = bench_alloc(b, (double)rows, sizeof *s->lse);
    count_work(b, a);
    bench_rotate(b, b->bytes, (double)s->k_bytes + (double)s->v_bytes);
    s->k = bench_alloc(b, (double)b->num_sets * (double)s->k_bytes, 1);
    s->v = bench_alloc(b, (double)b->num_sets * (double)s->v_bytes, 1);
    data_fill(&b->random, s->k, spec->dtype_kv, b->num_sets * k_elements, 1);
    data_fill(&b->random, s->v, spec->dtype_kv, b->num_sets * v_elements, 1);
    data_fill(&b->random, s->q, spec->dtype_q, rows * spec->head_dim_qk, 2);
    DATA_TENSOR(&s->q_t, s->q, spec->dtype_q, a->num_tokens, spec->num_qo_heads, spec->head_dim_qk);
    DATA_TENSOR(&s->o_t, s->o, spec->dtype_o, a->num_tokens, spec->num_qo_heads, spec->head_dim_vo);
    DATA_TENSOR(&s->lse_t, s->lse, QKV_F32, a->num_tokens, spec->num_qo_heads);

    make_index(b, s);
    tool_check(qkv_attention_create(b->ctx, spec, &a->limits, NULL, &s->op),
               "qkv_attention_create");
    plan(s);
}

static void pool_tensor(const attention_problem *a, void *pool, int64_t dim, data_tensor *t)
{
    const int64_t heads = a->spec.num_kv_heads, page = a->spec.page_size;
    const int64_t slots = page ? page : a->num_keys;
    const bool hnd = a->spec.kv_layout == QKV_HND;
    const int64_t first = hnd ? heads : slots, second = hnd ? slots : heads;
    if (page)
        DATA_TENSOR(t, pool, a->spec.dtype_kv, a->num_pages, first, second, dim);
    else
        DATA_TENSOR(t, pool, a->spec.dtype_kv, first, second, dim);
}

static void run(bench *b, int64_t set)
{
    state *s = b->state;
    data_tensor k, v;
    pool_tensor(&s->a, s->k + (size_t)set * s->k_bytes, s->a.spec.head_dim_qk, &k);
    pool_tensor(&s->a, s->v + (size_t)set * s->v_bytes, s->a.spec.head_dim_vo, &v);
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .q = &s->q_t.t,    .k = &k.t, .v = &v.t,
                                 .o = &s->o_t.t,        .lse = &s->lse_t.t};
    tool_check(qkv_attention_run(s->op, &io, NULL), "qkv_attention_run");
}

/* ---- check --------------------------------------------------------------------------------- */

/* Element offset of a request's key in the pool, for KV head h. */
static int64_t key_offset(const state *s, int64_t request, int64_t key, int64_t h, pool_strides st)
{
    const int64_t page = s->a.spec.page_size;
    if (!page) return (s->kv_indptr[request] + key) * st.slot + h * st.head;
    return s->kv_indices[s->kv_indptr[request] + key / page] * st.page + key % page * st.slot +
           h * st.head;
}

/* One row of one head in double, and what rounding scales with. */
typedef struct row_result {
    double o[512], lse;      /* no row of the table takes a larger head_dim_vo */
    double max_logit, max_v; /* the largest |logit| and |v| */
    double spread;           /* root of the sum of squares of the weights: 1 for a single key */
} row_result;

/* x: room for a logit a key. */
static row_result reference(const state *s, int64_t set, int64_t request, int64_t row, int64_t head,
                            double *x)
{
    const attention_problem *a = &s->a;
    const qkv_attention_spec *spec = &a->spec;
    const int64_t qk = spec->head_dim_qk, vo = spec->head_dim_vo;
    const int64_t kv_head = head / (spec->num_qo_heads / spec->num_kv_heads);
    const char *k = s->k + (size_t)set * s->k_bytes, *v = s->v + (size_t)set * s->v_bytes;
    const int64_t q_at = ((s->qo_indptr[request] + row) * spec->num_qo_heads + head) * qk;
    const pool_strides k_strides = strides_of(a, qk), v_strides = strides_of(a, vo);
    const key_range seen = row_sees(a, request, row);
    row_result r = {.lse = 0};
    double max = -INFINITY, sum = 0, squares = 0;
    for (int64_t j = seen.begin; j < seen.end; j++) {
        const int64_t at = key_offset(s, request, j, kv_head, k_strides);
        double dot = 0;
        for (int64_t d = 0; d < qk; d++)
            dot += data_get(s->q, spec->dtype_q, q_at + d) * data_get(k, spec->dtype_kv, at + d);
        x[j] = dot / sqrt((double)qk);
        r.max_logit = fmax(r.max_logit, fabs(x[j]));
        if (spec->logits_soft_cap > 0)
            x[j] = (double)spec->logits_soft_cap * tanh(x[j] / (double)spec->logits_soft_cap);
        max = fmax(max, x[j]);
    }
    for (int64_t j = seen.begin; j < seen.end; j++) {
        const int64_t at = key_offset(s, request, j, kv_head, v_strides);
        const double p = exp(x[j] - max);
        sum += p;
        squares += p * p;
        for (int64_t d = 0; d < vo; d++) {
            const double value = data_get(v, spec->dtype_kv, at + d);
            r.o[d] += p * value;
            r.max_v = fmax(r.max_v, fabs(value));
        }
    }
    for (int64_t d = 0; d < vo; d++) r.o[d] /= sum;
    r.lse = max + log(sum);
    r.spread = sqrt(squares) / sum;
    return r;
}

static void verify_row(const bench *b, int64_t set, int64_t request, int64_t row, int64_t head,
                       double *x)
{
    const state *s = b->state;
    const qkv_attention_spec *spec = &s->a.spec;
    const row_result want = reference(s, set, request, row, head, x);
    const int64_t at = (s->qo_indptr[request] + row) * spec->num_qo_heads + head;
    /* Weights are off by their logits, sums of f32 products, and by rounding to bf16 where bf16
     * dot products multiply them by v: each key's by itself, so that the errors of many add up
     * like a random walk. */
    const char *device = qkv_context_device_name(b->ctx);
    const bool bf16_dot = b->bf16 && (strstr(device, "bf16") || strstr(device, "amx"));
    const double logit_error =
        16 * 0x1p-24 * (sqrt((double)spec->head_dim_qk) + want.max_logit + 4);
    const double error = 2 * (logit_error + (bf16_dot ? 0x1p-8 : 0)) * want.spread + 0x1p-20;
    bench_expect(b, (double)s->lse[at], want.lse, error + 0x1p-22 * fabs(want.lse),
                 "lse of request %lld, row %lld, head %lld", (long long)request, (long long)row,
                 (long long)head);
    for (int64_t d = 0; d < spec->head_dim_vo; d++)
        bench_expect(b, data_get(s->o, spec->dtype_o, at * spec->head_dim_vo + d), want.o[d],
                     data_eps(spec->dtype_o) * fabs(want.o[d]) + error * want.max_v,
                     "o of request %lld, row %lld, head %lld, dim %lld", (long long)request,
                     (long long)row, (long long)head, (long long)d);
}

static void verify(bench *b)
{
    state *s = b->state;
    const attention_problem *a = &s->a;
    const int64_t rows = a->num_tokens * a->spec.num_qo_heads, dim = a->spec.head_dim_vo;
    const int64_t set = data_below(&b->random, b->num_sets);
    data_poison(s->o, a->spec.dtype_o, rows * dim);
    data_poison(s->lse, QKV_F32, rows);
    run(b, set);
    bench_expect_finite(b, s->o, a->spec.dtype_o, rows * dim);
    bench_expect_finite(b, s->lse, QKV_F32, rows);
    double *x = data_alloc((double)a->limits.max_kv_len, sizeof *x);
    for (int i = 0; i < NUM_SAMPLES; i++) {
        const int64_t request = data_below(&b->random, a->batch);
        verify_row(b, set, request, data_below(&b->random, a->qo_len[request]),
                   data_below(&b->random, a->spec.num_qo_heads), x);
    }
    verify_row(b, set, a->batch - 1, a->qo_len[a->batch - 1] - 1, a->spec.num_qo_heads - 1, x);
    data_free(x);
}

static void teardown(bench *b)
{
    state *s = b->state;
    qkv_attention_destroy(s->op);
    attention_problem_destroy(&s->a);
}

const bench_op bench_decode = {"decode", setup, run, verify, teardown};
const bench_op bench_prefill = {"prefill", setup, run, verify, teardown};
const bench_op bench_mixed = {"mixed", setup, run, verify, teardown};
