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

enum {
    NUM_SAMPLES = 32, /* (row, head) pairs that are checked in double, fewer of long rows */
    MIN_SAMPLES = 4,
    SAMPLE_WORK = 1 << 26 /* multiply-adds of all of them */
};

typedef struct state {
    attention_problem a;
    qkv_attention *op;
    int32_t *qo_indptr, *kv_indptr, *kv_indices, *last_page_len; /* the host's */
    int64_t
        io_sets; /* of q, o and lse: layers share them on the CPU, where they are hardly noticed */
    bench_array q, k, v; /* k, v: num_sets pools */
    char *o;
    float *lse;
    int64_t rows, k_elements, v_elements; /* of a set; a row of each head */
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
    b->bf16 = (s->dtype_q.code == QKV_BF16.code &&
               (s->dtype_kv.code == QKV_BF16.code || s->dtype_kv.bits == 8)) ||
              (b->gpu && s->dtype_q.bits == 16); /* f16 is as fast there */
}

/* ---- inputs -------------------------------------------------------------------------------- */

/* Is "NAME" in "A|B|C"? */
static bool is_listed(const char *list, const char *name, size_t bytes)
{
    for (const char *at = list;; at += strcspn(at, "|") + 1) {
        if (strcspn(at, "|") == bytes && memcmp(at, name, bytes) == 0) return true;
        if (!at[strcspn(at, "|")]) return false;
    }
}

/* The first row of the table that runs on the device. */
static void find_row(bench *b, const attention_problem *a)
{
    char reasons[4096], rows[1024] = "";
    bench_rows_of(b, "attention", rows, sizeof rows);
    tool_check(qkv_attention_can_run(b->ctx, &a->spec, &a->limits, reasons, sizeof reasons),
               "qkv_attention_can_run");
    for (const char *line = reasons; *line; line += strcspn(line, "\n") + 1) {
        const size_t name = strcspn(line, ":"), len = strcspn(line, "\n");
        if (len != name + 6 || memcmp(line + name, ": runs", 6) != 0) continue;
        if (!is_listed(rows, line, name)) continue;
        memcpy(b->row, line, name < sizeof b->row ? name : sizeof b->row - 1);
        return;
    }
    tool_die(EXIT_WRONG, "qkv_attention_can_run: expected a row that runs, got\n%s", reasons);
}

/* The pool's pages in random order; all requests begin with those that the first one begins with. */
static void list_pages(bench *b, state *s)
{
    const attention_problem *a = &s->a;
    const int64_t shared = a->shared / a->spec.page_size;
    int32_t *order = bench_alloc(b, (double)a->pool_pages, sizeof *order), next = 0;
    for (int64_t i = 0; i < a->pool_pages; i++) order[i] = (int32_t)i;
    data_shuffle(&b->random, order, a->pool_pages);
    for (int64_t r = 0; r < a->batch; r++) {
        int32_t *pages = s->kv_indices + s->kv_indptr[r];
        const int64_t n = s->kv_indptr[r + 1] - s->kv_indptr[r];
        for (int64_t i = 0; i < n; i++)
            pages[i] = r > 0 && i < shared ? s->kv_indices[i] : order[next++];
    }
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
    if (page) list_pages(b, s);
}

/* The shared keys as a level of their own, the rest as the requests'. */
static void plan_levels(const bench *b, const state *s)
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
    tool_check(qkv_attention_plan(s->op, &levels_of, b->stream), "qkv_attention_plan");
    data_free(indptr);
    data_free(indices);
}

static void plan(const bench *b, const state *s)
{
    const attention_problem *a = &s->a;
    if (a->form == FORM_LEVELS) {
        plan_levels(b, s);
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
    tool_check(qkv_attention_plan(s->op, &batch, b->stream), "qkv_attention_plan");
}

static void setup(bench *b)
{
    state *s = b->state = bench_alloc(b, 1, sizeof *s);
    s->a = attention_problem_create(b->p);
    const attention_problem *a = &s->a;
    const qkv_attention_spec *spec = &a->spec;
    find_row(b, a);

    s->rows = a->num_tokens * spec->num_qo_heads;
    s->k_elements = a->pool_slots * spec->num_kv_heads * spec->head_dim_qk;
    s->v_elements = a->pool_slots * spec->num_kv_heads * spec->head_dim_vo;
    const double pools = (double)data_bytes(spec->dtype_kv, s->k_elements + s->v_elements);
    const double io = (double)data_bytes(spec->dtype_q, s->rows * spec->head_dim_qk) +
                      (double)data_bytes(spec->dtype_o, s->rows * spec->head_dim_vo);
    count_work(b, a);
    bench_rotate(b, b->bytes, pools + (b->gpu ? io : 0));
    s->io_sets = b->gpu ? b->num_sets : 1;
    const double sets = (double)b->num_sets, rows = (double)s->io_sets * (double)s->rows;
    s->k = bench_random(b, spec->dtype_kv, sets * (double)s->k_elements, 1);
    s->v = bench_random(b, spec->dtype_kv, sets * (double)s->v_elements, 1);
    s->q = bench_random(b, spec->dtype_q, rows * spec->head_dim_qk, 2);
    s->o = bench_memory(b, rows * spec->head_dim_vo, data_bytes(spec->dtype_o, 1));
    s->lse = bench_memory(b, rows, sizeof *s->lse);

    make_index(b, s);
    tool_check(qkv_attention_create(b->ctx, spec, &a->limits, NULL, &s->op),
               "qkv_attention_create");
    plan(b, s);
}

static void pool_tensor(const bench *b, void *pool, int64_t dim, data_tensor *t)
{
    const attention_problem *a = &((const state *)b->state)->a;
    const int64_t heads = a->spec.num_kv_heads, page = a->spec.page_size;
    const int64_t slots = page ? page : a->num_keys;
    const bool hnd = a->spec.kv_layout == QKV_HND;
    const int64_t first = hnd ? heads : slots, second = hnd ? slots : heads;
    if (page)
        BENCH_TENSOR(b, t, pool, a->spec.dtype_kv, a->pool_pages, first, second, dim);
    else
        BENCH_TENSOR(b, t, pool, a->spec.dtype_kv, first, second, dim);
}

/* The first row of a set. */
static int64_t first_row(const state *s, int64_t set)
{
    return set % s->io_sets * s->rows;
}

static char *o_at(const state *s, int64_t row)
{
    return s->o + data_bytes(s->a.spec.dtype_o, row * s->a.spec.head_dim_vo);
}

static void run(bench *b, int64_t set)
{
    state *s = b->state;
    const qkv_attention_spec *spec = &s->a.spec;
    const int64_t qk = spec->head_dim_qk, vo = spec->head_dim_vo, row = first_row(s, set);
    const int64_t tokens = s->a.num_tokens, heads = spec->num_qo_heads;
    data_tensor q, k, v, o, lse;
    BENCH_TENSOR(b, &q, bench_at(&s->q, row * qk), spec->dtype_q, tokens, heads, qk);
    BENCH_TENSOR(b, &o, o_at(s, row), spec->dtype_o, tokens, heads, vo);
    BENCH_TENSOR(b, &lse, s->lse + row, QKV_F32, tokens, heads);
    pool_tensor(b, bench_at(&s->k, set * s->k_elements), qk, &k);
    pool_tensor(b, bench_at(&s->v, set * s->v_elements), vo, &v);
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .q = &q.t, .k = &k.t, .v = &v.t, .o = &o.t,
                                 .lse = &lse.t};
    tool_check(qkv_attention_run(s->op, &io, b->stream), "qkv_attention_run");
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
enum { MAX_DIM = 512 /* no row of the table takes a larger head_dim */ };
typedef struct row_result {
    double o[MAX_DIM], lse;
    double max_logit, max_v; /* the largest |logit| and |v| */
    double spread;           /* root of the sum of squares of the weights: 1 for a single key */
} row_result;

/* Of all rows and heads of a set. */
static int64_t row_of(const state *s, int64_t request, int64_t row, int64_t head)
{
    return (s->qo_indptr[request] + row) * s->a.spec.num_qo_heads + head;
}

/* What rounding weights to what multiplies them by v may change of one. */
static double weight_error(const bench *b, const qkv_attention_spec *spec)
{
    const char *device = qkv_context_device_name(b->ctx);
    if (b->gpu) {
        if (spec->dtype_kv.code == QKV_F16.code && spec->dtype_kv.bits == 16) return 0x1p-11;
        return spec->dtype_kv.bits == 32 ? 0 : 0x1p-8;
    }
    return b->bf16 && (strstr(device, "bf16") || strstr(device, "amx")) ? 0x1p-8 : 0;
}

/* x: room for a logit a key. */
static row_result reference(const state *s, int64_t set, int64_t request, int64_t row, int64_t head,
                            double *x)
{
    const attention_problem *a = &s->a;
    const qkv_attention_spec *spec = &a->spec;
    const int64_t qk = spec->head_dim_qk, vo = spec->head_dim_vo;
    const int64_t kv_head = head / (spec->num_qo_heads / spec->num_kv_heads);
    double q[MAX_DIM], at_key[MAX_DIM];
    bench_read(&s->q, (first_row(s, set) + row_of(s, request, row, head)) * qk, qk, q);
    const pool_strides k_strides = strides_of(a, qk), v_strides = strides_of(a, vo);
    const key_range seen = row_sees(a, request, row);
    row_result r = {.lse = 0};
    double max = -INFINITY, sum = 0, squares = 0;
    for (int64_t j = seen.begin; j < seen.end; j++) {
        const int64_t at = key_offset(s, request, j, kv_head, k_strides);
        double dot = 0;
        bench_read(&s->k, set * s->k_elements + at, qk, at_key);
        for (int64_t d = 0; d < qk; d++) dot += q[d] * at_key[d];
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
        bench_read(&s->v, set * s->v_elements + at, vo, at_key);
        for (int64_t d = 0; d < vo; d++) {
            r.o[d] += p * at_key[d];
            r.max_v = fmax(r.max_v, fabs(at_key[d]));
        }
    }
    for (int64_t d = 0; d < vo; d++) r.o[d] /= sum;
    r.lse = max + log(sum);
    r.spread = sqrt(squares) / sum;
    return r;
}

static void verify_row(bench *b, int64_t set, int64_t request, int64_t row, int64_t head, double *x)
{
    const state *s = b->state;
    const qkv_attention_spec *spec = &s->a.spec;
    const row_result want = reference(s, set, request, row, head, x);
    const int64_t vo = spec->head_dim_vo;
    const int64_t at = first_row(s, set) + row_of(s, request, row, head);
    double lse, o[MAX_DIM];
    bench_results(b, s->lse, QKV_F32, at, 1, &lse);
    bench_results(b, s->o, spec->dtype_o, at * vo, vo, o);
    /* Weights are off by their logits, sums of f32 products, and by rounding to what multiplies them
     * by v: each key's by itself, so that the errors of many add up like a random walk. */
    const double logit_error =
        16 * 0x1p-24 * (sqrt((double)spec->head_dim_qk) + want.max_logit + 4);
    const double error = 2 * (logit_error + weight_error(b, spec)) * want.spread + 0x1p-20;
    bench_expect(b, lse, want.lse, error + 0x1p-22 * fabs(want.lse),
                 "lse of request %lld, row %lld, head %lld", (long long)request, (long long)row,
                 (long long)head);
    for (int64_t d = 0; d < vo; d++)
        bench_expect(b, o[d], want.o[d],
                     data_eps(spec->dtype_o) * fabs(want.o[d]) + error * want.max_v,
                     "o of request %lld, row %lld, head %lld, dim %lld", (long long)request,
                     (long long)row, (long long)head, (long long)d);
}

static void verify(bench *b)
{
    state *s = b->state;
    const attention_problem *a = &s->a;
    const qkv_attention_spec *spec = &a->spec;
    const int64_t dim = spec->head_dim_vo, set = data_below(&b->random, b->num_sets);
    const int64_t first = first_row(s, set);
    char *o = o_at(s, first);
    bench_poison(b, o, spec->dtype_o, s->rows * dim);
    bench_poison(b, s->lse + first, QKV_F32, s->rows);
    run(b, set);
    bench_expect_finite(b, o, spec->dtype_o, s->rows * dim);
    bench_expect_finite(b, s->lse + first, QKV_F32, s->rows);
    double *x = data_alloc((double)a->limits.max_kv_len, sizeof *x);
    double work = 0;
    for (int i = 0; i < NUM_SAMPLES && (i < MIN_SAMPLES || work < SAMPLE_WORK); i++) {
        const int64_t request = data_below(&b->random, a->batch);
        verify_row(b, set, request, data_below(&b->random, a->qo_len[request]),
                   data_below(&b->random, spec->num_qo_heads), x);
        work += (double)a->kv_len[request] * (double)(spec->head_dim_qk + dim);
    }
    verify_row(b, set, a->batch - 1, a->qo_len[a->batch - 1] - 1, spec->num_qo_heads - 1, x);
    data_free(x);
}

static void teardown(bench *b)
{
    state *s = b->state;
    qkv_attention_destroy(s->op);
    attention_problem_destroy(&s->a);
}

/* What is created from a spec and limits, and no batch, says which kernels there are. */
static void compile(bench *b)
{
    attention_problem a = attention_problem_create(b->p);
    tool_check(qkv_attention_warm_up(b->ctx, &a.spec, &a.limits), "qkv_attention_warm_up");
    attention_problem_destroy(&a);
}

const bench_op bench_decode = {"decode", setup, run, verify, teardown, compile};
const bench_op bench_prefill = {"prefill", setup, run, verify, teardown, compile};
const bench_op bench_mixed = {"mixed", setup, run, verify, teardown, compile};
