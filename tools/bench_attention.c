/* bench_attention.c - decode, prefill and a mix of both: the attention operator over a pool of
 * pages in random order.
 *
 * Sets are layers of a model: each has its own pool, and all share one plan, as in serving.
 * Bytes: the keys and values that some row sees, once a request (shared ones once); q and o.
 * Flops: 2 (head_dim_qk + head_dim_vo) for each query head, row and key that it sees.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "bench_attention.h"

static void count_work(bench *b, const attention_problem *a)
{
    const qkv_attention_spec *s = &a->spec;
    double keys = 0, pairs = 0;
    for (int64_t r = 0; r < a->batch; r++) {
        for (int64_t i = 0; i < a->qo_len[r]; i++) {
            const bench_keys seen = bench_row_sees(a, r, i);
            pairs += (double)(seen.end - seen.begin);
        }
        keys +=
            (double)(bench_row_sees(a, r, a->qo_len[r] - 1).end - bench_row_sees(a, r, 0).begin);
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
static void list_pages(bench *b, bench_attention_state *s)
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

static void make_index(bench *b, bench_attention_state *s)
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
static qkv_status plan_levels(const bench *b, const bench_attention_state *s)
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
    const qkv_status status = qkv_attention_plan(s->op, &levels_of, b->stream);
    data_free(indptr);
    data_free(indices);
    return status;
}

/* From arrays where tensors of this device are. */
static qkv_status plan_from(const bench *b, int32_t *const index_arrays[4], DLDevice device)
{
    const bench_attention_state *s = b->state;
    const attention_problem *a = &s->a;
    const int64_t sizes[] = {a->batch + 1, a->batch + 1, a->num_pages, a->batch};
    data_tensor t[4];
    for (int i = 0; i < 4; i++) {
        DATA_TENSOR(&t[i], index_arrays[i], QKV_I32, sizes[i]);
        t[i].t.device = device;
    }
    qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = &t[0].t, .kv_indptr = &t[1].t};
    if (a->spec.page_size) {
        index.kv_indices = &t[2].t;
        index.kv_last_page_len = &t[3].t;
    }
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &index,
                                       .detect_shared_prefix = a->form == FORM_DETECT};
    return qkv_attention_plan(s->op, &batch, b->stream);
}

static qkv_status plan(bench *b, bool on_device)
{
    bench_attention_state *s = b->state;
    const attention_problem *a = &s->a;
    int32_t *const host[] = {s->qo_indptr, s->kv_indptr, s->kv_indices, s->last_page_len};
    const int64_t sizes[] = {a->batch + 1, a->batch + 1, a->num_pages, a->batch};
    if (!on_device && a->form == FORM_LEVELS) return plan_levels(b, s);
    if (!on_device) return plan_from(b, host, (DLDevice){kDLCPU, 0});
    for (int i = 0; i < 4 && !s->device_index[3]; i++)
        s->device_index[i] = bench_upload(b, host[i], (size_t)sizes[i] * sizeof(int32_t));
    return plan_from(b, s->device_index, b->device);
}

static void setup(bench *b)
{
    bench_attention_state *s = b->state = bench_alloc(b, 1, sizeof *s);
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
    tool_check(plan(b, false), "qkv_attention_plan");
}

static void pool_tensor(const bench *b, void *pool, int64_t dim, data_tensor *t)
{
    const attention_problem *a = &((const bench_attention_state *)b->state)->a;
    const int64_t heads = a->spec.num_kv_heads, page = a->spec.page_size;
    const int64_t slots = page ? page : a->num_keys;
    const bool hnd = a->spec.kv_layout == QKV_HND;
    const int64_t first = hnd ? heads : slots, second = hnd ? slots : heads;
    if (page)
        BENCH_TENSOR(b, t, pool, a->spec.dtype_kv, a->pool_pages, first, second, dim);
    else
        BENCH_TENSOR(b, t, pool, a->spec.dtype_kv, first, second, dim);
}

void bench_attention_run(bench *b, int64_t set)
{
    bench_attention_state *s = b->state;
    const qkv_attention_spec *spec = &s->a.spec;
    const int64_t qk = spec->head_dim_qk, vo = spec->head_dim_vo, row = bench_first_row(s, set);
    const int64_t tokens = s->a.num_tokens, heads = spec->num_qo_heads;
    data_tensor q, k, v, o, lse;
    BENCH_TENSOR(b, &q, bench_at(&s->q, row * qk), spec->dtype_q, tokens, heads, qk);
    BENCH_TENSOR(b, &o, bench_o_at(s, row), spec->dtype_o, tokens, heads, vo);
    BENCH_TENSOR(b, &lse, s->lse + row, QKV_F32, tokens, heads);
    pool_tensor(b, bench_at(&s->k, set * s->k_elements), qk, &k);
    pool_tensor(b, bench_at(&s->v, set * s->v_elements), vo, &v);
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .q = &q.t, .k = &k.t, .v = &v.t, .o = &o.t,
                                 .lse = &lse.t};
    tool_check(qkv_attention_run(s->op, &io, b->stream), "qkv_attention_run");
}

static void teardown(bench *b)
{
    bench_attention_state *s = b->state;
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

const bench_op bench_decode = {
    "decode", setup, bench_attention_run, bench_attention_verify, teardown, compile, plan};
const bench_op bench_prefill = {
    "prefill", setup, bench_attention_run, bench_attention_verify, teardown, compile, plan};
const bench_op bench_mixed = {"mixed", setup, bench_attention_run, bench_attention_verify, teardown,
                              compile, plan};
