/* variant_case.h - what the tests of variants share: contexts over a private cache folder, arguments
 * behind guard pages, small random batches and their judgement.
 *
 * Inputs lie between NaNs, outputs are NaN before the call.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_VARIANT_CASE_H
#define QKV_TESTS_VARIANT_CASE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <unistd.h>

#include "folder.h"
#include "ref/variants_ref.h"
#include "support.h"

/* ---- contexts ----------------------------------------------------------------------------- */

/* Calls of a progress callback. */
typedef struct progress {
    atomic_int begun, ended;
    atomic_int wrong; /* a kernel without a name, an end before its beginning */
    atomic_long ms;
} progress;

static void count_progress(void *user, const char *kernel, double seconds)
{
    progress *p = user;
    if (!kernel || !*kernel) p->wrong++;
    if (seconds < 0) {
        p->begun++;
    } else {
        p->ended++;
        p->ms += (long)(seconds * 1000);
        if (p->ended > p->begun) p->wrong++;
    }
}

static inline qkv_context *context_on(const char *isa, int32_t num_threads, const char *cache_dir,
                                      progress *counts)
{
    qkv_context *ctx;
    EXPECT_OK(qkv_context_create(
        &(qkv_context_options){TEST_CONTEXT_INIT, .isa = isa, .num_threads = num_threads,
                               .cache_dir = cache_dir,
                               .jit_progress = counts ? count_progress : NULL, .jit_user = counts},
        &ctx));
    return ctx;
}

/* ---- arguments ---------------------------------------------------------------------------- */

enum { MAX_PARAMS = 32 };

/* The table of a variant's parameters and the arguments of one layer, in order. */
typedef struct arguments {
    int32_t num;
    qkv_param params[MAX_PARAMS];
    qkv_arg args[MAX_PARAMS];
    test_tensor tensors[MAX_PARAMS];
    size_t mapped[MAX_PARAMS]; /* bytes at tensors[i].owned */
} arguments;

static inline void add_f32(arguments *a, const char *name, double value)
{
    a->params[a->num] = (qkv_param){.name = name, .type = QKV_PARAM_F32};
    a->args[a->num++].f32 = (float)value;
}

static inline void add_i32(arguments *a, const char *name, int64_t value)
{
    a->params[a->num] = (qkv_param){.name = name, .type = QKV_PARAM_I32};
    a->args[a->num++].i32 = (int32_t)value;
}

static inline void put_element(void *data, DLDataType t, int64_t i, double value)
{
    if (t.code == 2)
        ((float *)data)[i] = (float)value;
    else if (t.bits == 64)
        ((int64_t *)data)[i] = (int64_t)value;
    else if (t.bits == 32)
        ((int32_t *)data)[i] = (int32_t)value;
    else
        ((uint8_t *)data)[i] = (uint8_t)(int)value;
}

/* A tensor of any strides with the elements `data`, row by row. The page behind its last element may
 * not be touched. */
static inline void add_tensor(arguments *a, const char *name, DLDataType dtype, int ndim,
                              const int64_t *shape, const double *data)
{
    test_tensor *x = test_tensor_init(&a->tensors[a->num], NULL, dtype, ndim, shape);
    int order[4] = {0, 1, 2, 3};
    int64_t span = 1, count = 1;
    for (int i = ndim - 1; i >= 0; i--) { /* axes in any order, with gaps */
        const int j = (int)test_below(i + 1), axis = order[j];
        order[j] = order[i];
        x->strides[axis] = span;
        span = span * shape[axis] + test_below(2) * test_below(3);
        count *= shape[axis];
    }
    int64_t end = 1; /* one past the last element */
    for (int i = 0; i < ndim; i++) end += (shape[i] - 1) * x->strides[i];

    const size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = (size_t)end * test_bytes(dtype);
    const size_t used = (bytes + page - 1) / page * page;
    char *memory =
        test_on_cuda() /* a GPU sees the heap, and no guard pages */
            ? aligned_alloc(page, used)
            : mmap(NULL, used + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(memory && memory != MAP_FAILED);
    if (!test_on_cuda()) assert_int_equal(mprotect(memory + used, page, PROT_NONE), 0);
    memset(memory, 0xff, used);
    x->owned = memory;
    a->mapped[a->num] = used + page;
    x->t.data = memory;
    x->t.byte_offset = used - bytes;
    for (int64_t i = 0; i < count; i++) {
        int64_t at = 0, rest = i;
        for (int axis = ndim - 1; axis >= 0; rest /= shape[axis--])
            at += rest % shape[axis] * x->strides[axis];
        put_element(memory + used - bytes, dtype, at, data[i]);
    }
    a->params[a->num] =
        (qkv_param){.name = name, .type = QKV_PARAM_TENSOR, .ndim = ndim, .dtype = dtype};
    a->args[a->num++].tensor = &x->t;
}

static inline void arguments_free(arguments *a)
{
    for (int32_t i = 0; i < a->num; i++)
        if (test_on_cuda())
            free(a->tensors[i].owned);
        else if (a->tensors[i].owned)
            munmap(a->tensors[i].owned, a->mapped[i]);
    memset(a, 0, sizeof *a);
}

static inline qkv_variant variant_with(const char *name, const char *source, const arguments *a)
{
    return (qkv_variant){QKV_VARIANT_INIT, .name = name, .source = source, .params = a->params,
                         .num_params = a->num};
}

/* ---- batches ------------------------------------------------------------------------------ */

enum {
    MAX_REQUESTS = 5,
    MAX_QO_LEN = 60,
    MAX_KV_LEN = 400,
    MAX_KEYS = 2 * MAX_REQUESTS * MAX_KV_LEN
};

typedef enum batch_kind { DECODE, PREFILL, MIXED } batch_kind;

/* Pages (or tokens) of one run of keys: a group's, or a request's own. */
typedef struct key_run {
    int32_t first, len; /* keys [first, first + len) of k and v */
} key_run;

typedef struct level_index {
    int32_t qo_indptr[MAX_REQUESTS + 1], kv_indptr[MAX_REQUESTS + 1], last_page_len[MAX_REQUESTS];
    int32_t indices[MAX_KEYS];
    test_tensor tensors[4];
    key_run run[MAX_REQUESTS];
    int32_t num_runs;
} level_index;

typedef struct variant_case {
    qkv_attention_spec spec;
    batch_kind kind;
    int32_t num_requests, qo_len[MAX_REQUESTS], kv_len[MAX_REQUESTS], qo_pos[MAX_REQUESTS];
    int32_t tokens, num_keys;
    int32_t *keys[MAX_REQUESTS]; /* of each request in k and v */
    level_index level[2];
    int32_t num_levels;
    float q_scale, k_scale, v_scale, o_scale; /* 0 = none */
    double *q, *k, *v;                        /* what is stored, times its scale */
    test_tensor q_tensor, k_tensor, v_tensor, o_tensor, lse_tensor, qo_pos_tensor;
    size_t o_bytes, lse_bytes;
    qkv_kv_index index[2];
    qkv_attention_batch batch;
    qkv_attention_io io;
    double *ref_o;
    ref_row *ref_rows;
} variant_case;

static inline void *case_memory(int64_t n, size_t bytes)
{
    void *p = malloc((size_t)(n > 0 ? n : 1) * bytes);
    assert_non_null(p);
    memset(p, 0xff, (size_t)(n > 0 ? n : 1) * bytes);
    return p;
}

static inline float any_scale(void)
{
    return test_below(2) ? (float)(1 + test_uniform(0.5)) : 0.f;
}

/* Lengths of one request. strange: rows before the first key, no keys, positions anywhere. */
static inline void any_lengths(variant_case *c, int32_t r, int32_t shared, bool strange)
{
    const int64_t kind = c->kind == DECODE ? 0 : c->kind == PREFILL ? 1 : test_below(3);
    int32_t qo = 1, own = 1 + (int32_t)test_below(200);
    if (kind == 1) qo = own = 1 + (int32_t)test_below(MAX_QO_LEN);
    if (kind == 2) qo = 1 + (int32_t)test_below(20), own = qo + (int32_t)test_below(150);
    if (strange && test_below(4) == 0) own = (int32_t)test_below(qo);
    c->qo_len[r] = qo;
    c->kv_len[r] = shared + own;
    c->qo_pos[r] = c->kv_len[r] - qo;
    if (strange && test_below(2)) c->qo_pos[r] = (int32_t)test_below(300) - 20;
}

/* Requests, in groups that share keys if there are two levels; their runs of keys, a level's one
 * after another. */
static inline void choose_requests(variant_case *c, bool strange)
{
    level_index *own = &c->level[c->num_levels - 1], *shared = &c->level[0];
    int32_t group_of[MAX_REQUESTS] = {0};
    c->num_requests = 1 + (int32_t)test_below(MAX_REQUESTS);
    for (int32_t r = 0; r < c->num_requests; r++) {
        if (c->num_levels == 2 && (r == 0 || test_below(2))) { /* a new group */
            shared->run[shared->num_runs].len = (int32_t)test_below(150);
            shared->qo_indptr[shared->num_runs++] = c->tokens;
        }
        group_of[r] = shared->num_runs - 1;
        any_lengths(c, r, c->num_levels == 2 ? shared->run[group_of[r]].len : 0, strange);
        own->qo_indptr[r] = c->tokens;
        c->tokens += c->qo_len[r];
    }
    for (int32_t g = 0; c->num_levels == 2 && g < shared->num_runs; g++) {
        shared->run[g].first = c->num_keys;
        c->num_keys += shared->run[g].len;
    }
    for (int32_t r = 0; r < c->num_requests; r++) {
        const key_run group = c->num_levels == 2 ? shared->run[group_of[r]] : (key_run){0, 0};
        own->run[r] = (key_run){c->num_keys, c->kv_len[r] - group.len};
        c->num_keys += own->run[r].len;
        c->keys[r] = case_memory(c->kv_len[r], sizeof(int32_t));
        for (int32_t j = 0; j < c->kv_len[r]; j++)
            c->keys[r][j] = j < group.len ? group.first + j : own->run[r].first + j - group.len;
    }
    own->num_runs = c->num_requests;
    for (int32_t l = 0; l < c->num_levels; l++)
        c->level[l].qo_indptr[c->level[l].num_runs] = c->tokens;
}

/* The index of a level. slot[key]: where each key lies, page * page_size + its place there. pages:
 * a random order of all of them; used up from *next_page. */
static inline void build_level(variant_case *c, int32_t l, const int32_t *pages, int32_t *next_page,
                               int32_t *slot)
{
    level_index *x = &c->level[l];
    const int32_t page_size = c->spec.page_size, n = x->num_runs;
    x->kv_indptr[0] = page_size ? 0 : x->run[0].first;
    for (int32_t r = 0; r < n; r++) {
        const key_run run = x->run[r];
        const int32_t num_pages = page_size ? (run.len + page_size - 1) / page_size : run.len;
        int32_t *list = x->indices + x->kv_indptr[r];
        for (int32_t i = 0; page_size && i < num_pages; i++) list[i] = pages[(*next_page)++];
        for (int32_t j = 0; j < run.len; j++)
            slot[run.first + j] =
                page_size ? list[j / page_size] * page_size + j % page_size : run.first + j;
        x->kv_indptr[r + 1] = x->kv_indptr[r] + num_pages;
        x->last_page_len[r] = page_size && run.len ? (run.len - 1) % page_size + 1 : 1;
    }
    test_tensor_init(&x->tensors[0], x->qo_indptr, QKV_I32, 1, (int64_t[]){n + 1});
    test_tensor_init(&x->tensors[1], x->kv_indptr, QKV_I32, 1, (int64_t[]){n + 1});
    test_tensor_init(&x->tensors[2], x->indices, QKV_I32, 1, (int64_t[]){MAX_KEYS});
    test_tensor_init(&x->tensors[3], x->last_page_len, QKV_I32, 1, (int64_t[]){n});
    c->index[l] = (qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = &x->tensors[0].t,
                                 .kv_indptr = &x->tensors[1].t,
                                 .kv_indices = page_size ? &x->tensors[2].t : NULL,
                                 .kv_last_page_len = page_size ? &x->tensors[3].t : NULL};
}

/* Random elements, scaled for the reference: K or V. Slots without a key are NaN. */
static inline double *build_kv(const variant_case *c, int64_t num_slots, int32_t dim, float scale,
                               const int32_t *slot, test_tensor *x)
{
    const qkv_attention_spec *s = &c->spec;
    const int64_t heads = s->num_kv_heads, page_size = s->page_size ? s->page_size : num_slots;
    const bool hnd = s->kv_layout == QKV_HND;
    const int64_t shape[] = {num_slots / page_size, hnd ? heads : page_size,
                             hnd ? page_size : heads, dim};
    void *data = case_memory(num_slots * heads * dim, test_bytes(s->dtype_kv));
    test_tensor_init(x, data, s->dtype_kv, s->page_size ? 4 : 3, s->page_size ? shape : shape + 1);
    x->owned = data;
    double *values = case_memory(c->num_keys * heads * dim, sizeof *values);
    for (int64_t i = 0; i < c->num_keys * heads * dim; i++) {
        const int64_t at = slot[i / dim / heads], h = i / dim % heads, d = i % dim;
        const int64_t page = at / page_size, token = at % page_size;
        const int64_t row = hnd ? (page * heads + h) * page_size + token : at * heads + h;
        test_put(data, s->dtype_kv, row * dim + d, test_uniform(1));
        values[i] = test_get(data, s->dtype_kv, row * dim + d) * (scale > 0 ? (double)scale : 1.0);
    }
    return values;
}

static inline void build_rows(variant_case *c)
{
    const qkv_attention_spec *s = &c->spec;
    const int64_t heads = s->num_qo_heads, rows = c->tokens + 2, qk = s->head_dim_qk;
    const int64_t count = c->tokens * heads * qk;
    void *q = case_memory(rows * heads * qk, test_bytes(s->dtype_q));
    c->q = case_memory(count, sizeof *c->q);
    for (int64_t i = 0; i < count; i++) {
        test_put(q, s->dtype_q, i, test_uniform(2));
        c->q[i] = test_get(q, s->dtype_q, i) * (c->q_scale > 0 ? (double)c->q_scale : 1.0);
    }
    c->o_bytes = (size_t)(rows * heads * s->head_dim_vo) * test_bytes(s->dtype_o);
    c->lse_bytes = (size_t)(rows * heads) * sizeof(float);
    test_tensor_init(&c->q_tensor, q, s->dtype_q, 3, (int64_t[]){rows, heads, qk})->owned = q;
    void *o = case_memory((int64_t)c->o_bytes, 1), *lse = case_memory((int64_t)c->lse_bytes, 1);
    test_tensor_init(&c->o_tensor, o, s->dtype_o, 3, (int64_t[]){rows, heads, s->head_dim_vo})
        ->owned = o;
    test_tensor_init(&c->lse_tensor, lse, QKV_F32, 2, (int64_t[]){rows, heads})->owned = lse;
    c->ref_o = case_memory(c->tokens * heads * s->head_dim_vo, sizeof(double));
    c->ref_rows = case_memory(c->tokens * heads, sizeof(ref_row));
}

/* A random batch; built in place, for its parts point at each other. */
static inline void case_build(variant_case *c, const qkv_attention_spec *spec, batch_kind kind,
                              int32_t num_levels, bool strange)
{
    memset(c, 0, sizeof *c);
    c->spec = *spec;
    c->kind = kind;
    c->num_levels = num_levels;
    c->q_scale = any_scale(), c->k_scale = any_scale();
    c->v_scale = any_scale(), c->o_scale = any_scale();
    choose_requests(c, strange);

    const int32_t page_size = spec->page_size ? spec->page_size : 1;
    const int32_t num_pages = c->num_keys / page_size + 2 * MAX_REQUESTS + 3;
    int32_t *pages = case_memory(num_pages, sizeof *pages), next_page = 0;
    int32_t *slot = case_memory(c->num_keys, sizeof *slot);
    for (int32_t i = 0; i < num_pages; i++) {
        const int32_t j = (int32_t)test_below(i + 1);
        pages[i] = pages[j];
        pages[j] = i;
    }
    for (int32_t l = 0; l < num_levels; l++) build_level(c, l, pages, &next_page, slot);
    const int64_t num_slots = (int64_t)num_pages * page_size;
    c->k = build_kv(c, num_slots, spec->head_dim_qk, c->k_scale, slot, &c->k_tensor);
    c->v = build_kv(c, num_slots, spec->head_dim_vo, c->v_scale, slot, &c->v_tensor);
    free(pages), free(slot);
    build_rows(c);

    test_tensor_init(&c->qo_pos_tensor, c->qo_pos, QKV_I32, 1, (int64_t[]){c->num_requests});
    c->batch =
        (qkv_attention_batch){QKV_ATTENTION_BATCH_INIT, .num_levels = num_levels,
                              .levels = c->index, .qo_pos = strange ? &c->qo_pos_tensor.t : NULL};
    c->io = (qkv_attention_io){QKV_ATTENTION_IO_INIT,
                               .q = &c->q_tensor.t,
                               .k = &c->k_tensor.t,
                               .v = &c->v_tensor.t,
                               .o = &c->o_tensor.t,
                               .lse = &c->lse_tensor.t,
                               .q_scale = {.value = c->q_scale},
                               .k_scale = {.value = c->k_scale},
                               .v_scale = {.value = c->v_scale},
                               .o_scale = {.value = c->o_scale}};
}

static inline void case_free(variant_case *c)
{
    for (int32_t r = 0; r < c->num_requests; r++) free(c->keys[r]);
    free(c->q), free(c->k), free(c->v), free(c->ref_o), free(c->ref_rows);
    free(c->q_tensor.owned), free(c->k_tensor.owned), free(c->v_tensor.owned);
    free(c->o_tensor.owned), free(c->lse_tensor.owned);
}

static inline void case_refer(variant_case *c, const ref_variant *variant, const ref_values *values)
{
    const int32_t *keys[MAX_REQUESTS];
    for (int32_t r = 0; r < c->num_requests; r++) keys[r] = c->keys[r];
    const ref_problem problem = {.spec = &c->spec,
                                 .variant = variant,
                                 .values = values,
                                 .num_requests = c->num_requests,
                                 .qo_len = c->qo_len,
                                 .kv_len = c->kv_len,
                                 .qo_pos = c->qo_pos,
                                 .q = c->q,
                                 .k = c->k,
                                 .v = c->v,
                                 .keys = keys};
    variants_ref(&problem, c->ref_o, c->ref_rows);
}

/* Limits that all batches of a spec fit in. */
static inline qkv_attention_limits case_limits(void)
{
    return (qkv_attention_limits){QKV_ATTENTION_LIMITS_INIT,
                                  .max_requests = MAX_REQUESTS,
                                  .max_tokens = MAX_REQUESTS * MAX_QO_LEN,
                                  .max_kv_len = MAX_KV_LEN,
                                  .max_pages = MAX_KEYS,
                                  .max_workers = (int32_t)test_below(10),
                                  .max_levels = 2};
}

/* ---- judgement ---------------------------------------------------------------------------- */

static inline void case_describe(const variant_case *c, const char *what)
{
    const qkv_attention_spec *s = &c->spec;
    fprintf(stderr,
            "%s: heads %d/%d, dims %d/%d, page %d %s, q %d:%d kv %d:%d o %d:%d, mask %d, "
            "features %d, levels %d, scales %g %g %g %g, kind %d:",
            what, s->num_qo_heads, s->num_kv_heads, s->head_dim_qk, s->head_dim_vo, s->page_size,
            s->kv_layout ? "HND" : "NHD", s->dtype_q.code, s->dtype_q.bits, s->dtype_kv.code,
            s->dtype_kv.bits, s->dtype_o.code, s->dtype_o.bits, s->mask, s->features, c->num_levels,
            (double)c->q_scale, (double)c->k_scale, (double)c->v_scale, (double)c->o_scale,
            c->kind);
    for (int32_t r = 0; r < c->num_requests; r++)
        fprintf(stderr, " %d:%d@%d", c->qo_len[r], c->kv_len[r], c->qo_pos[r]);
    fprintf(stderr, "\n");
}

static inline void case_judge(const variant_case *c, const char *who, const char *what, int64_t row,
                              double got, double want, double allowed)
{
    if (fabs(got - want) <= allowed || got == want) return; /* a NaN fails */
    case_describe(c, who);
    const int64_t heads = c->spec.num_qo_heads;
    fail_msg("%s: %s of token %lld, head %lld: got %.9g, expected %.9g +- %.3g", who, what,
             (long long)(row / heads), (long long)(row % heads), got, want, allowed);
}

/* Adding up n terms in f32 errs by no more than this times the sum of their magnitudes, but once in
 * 10^10 sums (Higham and Mary 2019). */
static inline double sum_error(int64_t n)
{
    return 0x1p-24 * fmin((double)n, 7 * sqrt((double)n));
}

/*
 * What f32 rounding can do, with e = 2^-24:
 *   logit   adding up head_dim terms; some roundings of scales, caps, hooks and the change of base;
 *           angles of positions, each off by a few e of itself
 *   o       with a softmax: its weights' relative errors; without: each weight's own, which are
 *           independent. Adding up num_keys terms; weights rounded (test_weight_eps)
 */
static inline void case_check(const variant_case *c, const ref_variant *variant, const char *who,
                              const char *device)
{
    const qkv_attention_spec *s = &c->spec;
    const double weight_eps = test_weight_eps(device, s->dtype_q, s->dtype_kv);
    const double e = 0x1p-24, o_eps = test_eps(s->dtype_o), gain = fmax(variant->gain, 1);
    const double tiny = test_tiny(s->dtype_o);
    const double o_scale = c->o_scale > 0 ? (double)c->o_scale : 1;
    for (int64_t i = 0; i < (int64_t)c->tokens * s->num_qo_heads; i++) {
        const ref_row *row = &c->ref_rows[i];
        const double cap = s->features & QKV_FEATURE_SOFT_CAP ? (double)s->logits_soft_cap : 0;
        const double logit = sum_error(s->head_dim_qk) * row->max_dot +
                             e * (12 * row->max_logit + 4 * cap) +
                             (variant->angles ? 8 * e * row->max_angle : 0);
        const double sum = sum_error(row->num_keys) + 16 * e;
        const double rounded = weight_eps * fmin(row->mean_v, 7 * row->rms_v);
        const double weights = variant->no_softmax ? logit * row->norm_v : 2 * logit * row->mean_v;
        const double o_error = gain * (weights + (2 * sum + e) * row->mean_v + rounded);
        for (int64_t d = 0; d < s->head_dim_vo; d++) {
            const double want = c->ref_o[i * s->head_dim_vo + d];
            const double allowed = o_error + (o_eps + 4 * e) * (fabs(want) + o_error);
            case_judge(c, who, "o", i,
                       test_get(c->o_tensor.owned, s->dtype_o, i * s->head_dim_vo + d),
                       want / o_scale, allowed / o_scale + tiny);
        }
        if (!c->io.lse) continue;
        case_judge(c, who, "lse", i, (double)((const float *)c->lse_tensor.owned)[i], row->lse,
                   logit + sum + 2 * e * fabs(row->lse));
    }
}

static inline void expect_poison(const void *data, size_t from, size_t to, const char *name)
{
    const unsigned char *p = data;
    for (size_t i = from; i < to; i++)
        if (p[i] != 0xff) fail_msg("%s: byte %zu is no result and was written", name, i);
}

/* Plans and runs, judges, and poisons the outputs again. */
static inline void case_try(variant_case *c, qkv_attention *op, const ref_variant *variant,
                            const char *who, const char *device)
{
    EXPECT_OK(qkv_attention_plan(op, &c->batch, NULL));
    EXPECT_OK(qkv_attention_run(op, &c->io, NULL));
    case_check(c, variant, who, device);
    const size_t rows = (size_t)c->tokens + 2, used = (size_t)c->tokens;
    expect_poison(c->o_tensor.owned, c->o_bytes / rows * used, c->o_bytes, "o");
    expect_poison(c->lse_tensor.owned, c->io.lse ? c->lse_bytes / rows * used : 0, c->lse_bytes,
                  "lse");
    memset(c->o_tensor.owned, 0xff, c->o_bytes);
    memset(c->lse_tensor.owned, 0xff, c->lse_bytes);
}

#endif
