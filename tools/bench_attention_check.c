/* bench_attention_check.c - attention in double precision, and what rounding may change of it.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "bench_attention.h"

enum {
    NUM_SAMPLES = 32, /* (row, head) pairs that are checked in double, fewer of long rows */
    MIN_SAMPLES = 4,
    SAMPLE_WORK = 1 << 26 /* multiply-adds of all of them */
};

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

bench_keys bench_row_sees(const attention_problem *a, int64_t request, int64_t row)
{
    const int64_t kv_len = a->kv_len[request], p = row + kv_len - a->qo_len[request];
    bench_keys s = {0, kv_len};
    if (a->spec.mask == QKV_MASK_CAUSAL && s.end > p + 1) s.end = p + 1;
    if ((a->spec.features & QKV_FEATURE_WINDOW) && s.begin < p - a->spec.window_left)
        s.begin = p - a->spec.window_left;
    return s;
}

/* ---- the reference ------------------------------------------------------------------------- */

/* Element offset of a request's key in the pool, for KV head h. */
static int64_t key_offset(const bench_attention_state *s, int64_t request, int64_t key, int64_t h,
                          pool_strides st)
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
static int64_t row_of(const bench_attention_state *s, int64_t request, int64_t row, int64_t head)
{
    return (s->qo_indptr[request] + row) * s->a.spec.num_qo_heads + head;
}

/* What rounding weights to what multiplies them by v may change of one. */
static double weight_error(const bench *b, const qkv_attention_spec *spec)
{
    const char *device = qkv_context_device_name(b->ctx);
    if (b->gpu) {
        if (spec->dtype_q.bits == 8 && spec->dtype_kv.code == QKV_E4M3.code) return 0x1p-4;
        if (spec->dtype_kv.code == QKV_F16.code && spec->dtype_kv.bits == 16) return 0x1p-11;
        return spec->dtype_kv.bits == 32 ? 0 : 0x1p-8;
    }
    return b->bf16 && (strstr(device, "bf16") || strstr(device, "amx")) ? 0x1p-8 : 0;
}

/* x: room for a logit a key. */
static row_result reference(const bench_attention_state *s, int64_t set, int64_t request,
                            int64_t row, int64_t head, double *x)
{
    const attention_problem *a = &s->a;
    const qkv_attention_spec *spec = &a->spec;
    const int64_t qk = spec->head_dim_qk, vo = spec->head_dim_vo;
    const int64_t kv_head = head / (spec->num_qo_heads / spec->num_kv_heads);
    double q[MAX_DIM], at_key[MAX_DIM];
    bench_read(&s->q, (bench_first_row(s, set) + row_of(s, request, row, head)) * qk, qk, q);
    const pool_strides k_strides = strides_of(a, qk), v_strides = strides_of(a, vo);
    const bench_keys seen = bench_row_sees(a, request, row);
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
    const bench_attention_state *s = b->state;
    const qkv_attention_spec *spec = &s->a.spec;
    const row_result want = reference(s, set, request, row, head, x);
    const int64_t vo = spec->head_dim_vo;
    const int64_t at = bench_first_row(s, set) + row_of(s, request, row, head);
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

/* ---- the check ----------------------------------------------------------------------------- */

void bench_attention_verify(bench *b)
{
    bench_attention_state *s = b->state;
    const attention_problem *a = &s->a;
    const qkv_attention_spec *spec = &a->spec;
    const int64_t dim = spec->head_dim_vo, set = data_below(&b->random, b->num_sets);
    const int64_t first = bench_first_row(s, set);
    char *o = bench_o_at(s, first);
    bench_poison(b, o, spec->dtype_o, s->rows * dim);
    bench_poison(b, s->lse + first, QKV_F32, s->rows);
    bench_attention_run(b, set);
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
