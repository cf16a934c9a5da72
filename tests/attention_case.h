/* attention_case.h - what the attention tests share: a configuration becomes tensors, index arrays
 * and reference results. attention_run.h runs and judges it.
 *
 * Inputs lie between NaNs: unused pages, slots past a request's end, padding of strides, rows past
 * the last request. Outputs are all NaN.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_ATTENTION_CASE_H
#define QKV_TESTS_ATTENTION_CASE_H

#include <stdbool.h>

#include "ref/attention_ref.h"
#include "support.h"

enum { CASE_CSR, CASE_TABLE, CASE_RAGGED };
enum { CASE_MAX_REQUESTS = 512 };

/* A tensor in a block of its own, NaN wherever nothing was put. */
typedef struct case_view {
    test_tensor x;
    size_t bytes;
} case_view;

/* ---- views -------------------------------------------------------------------------------- */

static inline void *case_alloc(size_t n, size_t bytes)
{
    void *p = calloc(n ? n : 1, bytes);
    assert_non_null(p);
    return p;
}

/* strided: outer axes in any order, gaps after each, a byte_offset; free_last: the last one too.
 * Contiguous tensors come with and without strides. */
static inline void case_view_new(case_view *view, DLDataType dtype, int ndim, const int64_t *shape,
                                 bool strided, bool free_last)
{
    test_tensor_init(&view->x, NULL, dtype, ndim, shape);
    int64_t span = 1, offset = 0;
    int order[8];
    for (int i = 0; i < ndim; i++) order[i] = ndim - 1 - i; /* innermost first */
    if (strided) {
        for (int i = ndim - 1; i > (free_last ? 0 : 1); i--) {
            const int low = free_last ? 0 : 1, j = low + (int)test_below(i - low + 1);
            const int swap = order[i];
            order[i] = order[j];
            order[j] = swap;
        }
        offset = test_below(9);
    }
    bool empty = false;
    int64_t end = 1; /* one past the last element */
    for (int i = 0; i < ndim; i++) {
        const int axis = order[i];
        view->x.strides[axis] = span;
        end += (shape[axis] - 1) * span;
        empty = empty || shape[axis] == 0;
        span *= shape[axis] > 0 ? shape[axis] : 1;
        if (strided) span += test_below(2) * test_below(20);
    }
    view->bytes = (size_t)(offset + (empty ? 0 : end)) * test_bytes(dtype);
    view->x.owned = case_alloc(view->bytes, 1);
    memset(view->x.owned, 0xff, view->bytes);
    view->x.t.data = view->x.owned;
    view->x.t.byte_offset = (uint64_t)offset * test_bytes(dtype);
    if (!strided && test_below(2)) view->x.t.strides = NULL;
}

static inline void *case_data(const case_view *view)
{
    return (char *)view->x.owned + view->x.t.byte_offset;
}

static inline int32_t *case_ints(const case_view *view)
{
    return case_data(view);
}

/* An i32 index array that is contiguous but for its rows, full of nonsense. */
static inline int32_t *case_ints_new(case_view *view, int ndim, const int64_t *shape, bool strided)
{
    case_view_new(view, QKV_I32, ndim, shape, strided && ndim == 1, false);
    if (strided && ndim == 2) { /* rows with a gap: wider storage, seen in part */
        const int64_t wide[] = {shape[0], shape[1] + test_below(5)};
        free(view->x.owned);
        case_view_new(view, QKV_I32, 2, wide, false, false);
        view->x.shape[1] = shape[1];
        view->x.t.strides = view->x.strides;
    }
    for (size_t i = 0; i < view->bytes / 4; i++)
        ((int32_t *)view->x.owned)[i] = (int32_t)(uint32_t)test_u64();
    return case_ints(view);
}

#include "attention_features.h"

/* Everything that is chosen about a case. */
typedef struct case_config {
    qkv_attention_spec spec;
    qkv_attention_limits limits; /* limits of 0 (but max_qo_len, ...) become what the case needs */
    int32_t form;                /* CASE_...; spec.page_size follows it for CASE_RAGGED          */
    bool combined;               /* K and V in one tensor                                        */
    bool strided;                /* tensors are views with gaps, permuted axes and byte_offset   */
    bool shared_pages;           /* some pages are listed by several requests                    */
    bool use_qo_pos, no_lse;
    int32_t num_requests;
    int32_t qo_len[CASE_MAX_REQUESTS], kv_len[CASE_MAX_REQUESTS], qo_pos[CASE_MAX_REQUESTS];
    float io_sm_scale, io_soft_cap;
    int32_t set_window, io_window_left, io_window_right;
    double q_scale, k_bias, v_scale; /* 0 = 1, 0, 1 */
    case_features f;
} case_config;

typedef struct attn_case {
    int64_t number; /* in a random test: what repeats it */
    case_config config;
    case_view q, k, v, o, lse;
    case_view qo_indptr, kv_indptr, kv_indices, kv_last_page_len, block_table, kv_lens, qo_pos;
    qkv_attention_limits limits;
    qkv_kv_index index; /* of the last level */
    case_extra extra;
    qkv_attention_batch batch;
    qkv_attention_io io;
    int64_t tokens, rows;        /* those of the requests; those of q */
    int64_t num_ragged;          /* tokens that ragged k and v must have                        */
    int32_t *pages, *first_page; /* all page lists, one after another; where each begins */
    double *ref_o;
    attention_ref_row *ref_rows;
    void *got_o;    /* [tokens, num_qo_heads, head_dim_vo] of dtype_o, contiguous */
    float *got_lse; /* [tokens, num_qo_heads] */
} attn_case;

/* ---- configurations ----------------------------------------------------------------------- */

/* A plain f32 spec that the tests change from. */
static inline qkv_attention_spec case_spec(int32_t num_qo_heads, int32_t num_kv_heads,
                                           int32_t head_dim, int32_t page_size)
{
    return (qkv_attention_spec){QKV_ATTENTION_SPEC_INIT,
                                .num_qo_heads = num_qo_heads,
                                .num_kv_heads = num_kv_heads,
                                .head_dim_qk = head_dim,
                                .head_dim_vo = head_dim,
                                .page_size = page_size,
                                .kv_layout = QKV_NHD,
                                .mask = QKV_MASK_CAUSAL,
                                .dtype_q = QKV_F32,
                                .dtype_kv = QKV_F32,
                                .dtype_o = QKV_F32};
}

static inline case_config case_config_init(qkv_attention_spec spec)
{
    return (case_config){.spec = spec,
                         .limits = {QKV_ATTENTION_LIMITS_INIT},
                         .form = spec.page_size ? CASE_CSR : CASE_RAGGED};
}

static inline void case_add(case_config *c, int32_t qo_len, int32_t kv_len)
{
    assert_true(c->num_requests < CASE_MAX_REQUESTS);
    c->qo_len[c->num_requests] = qo_len;
    c->kv_len[c->num_requests++] = kv_len;
}

static inline void case_print(int64_t number, const case_config *c)
{
    const qkv_attention_spec *s = &c->spec;
    fprintf(stderr,
            "QKV_TEST_CASE=%lld: heads %d/%d, dims %d/%d, page %d %s %s%s%s%s, q %d:%d kv %d:%d o "
            "%d:%d, mask %d, "
            "features %d, flags %u, sm_scale %g, cap %g, window %d/%d; layer: scale %g, cap %g, "
            "window %d: %d/%d; workers %d, split rows %lld, max_qo_len %d; data %g, %g, %g\n",
            (long long)number, s->num_qo_heads, s->num_kv_heads, s->head_dim_qk, s->head_dim_vo,
            s->page_size, s->kv_layout ? "HND" : "NHD",
            c->form == CASE_CSR     ? "csr"
            : c->form == CASE_TABLE ? "table"
                                    : "ragged",
            c->combined ? " combined" : "", c->strided ? " strided" : "",
            c->shared_pages ? " shared" : "", s->dtype_q.code, s->dtype_q.bits, s->dtype_kv.code,
            s->dtype_kv.bits, s->dtype_o.code, s->dtype_o.bits, s->mask, s->features, s->flags,
            (double)s->sm_scale, (double)s->logits_soft_cap, s->window_left, s->window_right,
            (double)c->io_sm_scale, (double)c->io_soft_cap, c->set_window, c->io_window_left,
            c->io_window_right, c->limits.max_workers, (long long)c->limits.max_split_rows,
            c->limits.max_qo_len, c->q_scale, c->k_bias, c->v_scale);
    const case_features *f = &c->f;
    fprintf(stderr,
            " levels %d, prefixes %d, detect %d, bsr %dx%d/%d%s%s, mask/%d, slope %g, sink %g, "
            "scales %d, rope %d%s\n",
            f->shared_levels + 1, f->share_prefixes, f->detect, f->bsr_rows, f->bsr_cols,
            f->bsr_density, f->bsr_per_head ? " per head" : "", f->bsr_mask ? " masked" : "",
            f->mask_density, f->slope, f->sink, f->scales, f->rope.rotary_dim,
            f->rope.interleaved ? " interleaved" : "");
    for (int32_t l = 0; l < f->shared_levels; l++)
        for (int32_t g = 0; g < f->num_groups[l]; g++)
            fprintf(stderr, " [%d: ..%d: %d]", l, f->group_end[l][g], f->group_len[l][g]);
    for (int32_t r = 0; r < c->num_requests && r < 40; r++) {
        fprintf(stderr, " %d:%d", c->qo_len[r], c->kv_len[r]);
        if (c->use_qo_pos) fprintf(stderr, "@%d", c->qo_pos[r]);
    }
    fprintf(stderr, "%s\n", c->num_requests > 40 ? " ..." : "");
}

/* EXPECT_OK that says which case it was. */
#define CASE_OK(a, expr)                                                                           \
    do {                                                                                           \
        const qkv_status case_ = (expr);                                                           \
        if (case_ != QKV_OK) {                                                                     \
            case_print((a)->number, &(a)->config);                                                 \
            fail_msg("%s: %s: %s", #expr, qkv_status_name(case_), qkv_last_error());               \
        }                                                                                          \
    } while (0)

/* ---- building ----------------------------------------------------------------------------- */

static inline int32_t case_num_pages(const case_config *c, int32_t request)
{
    const int32_t page_size = c->spec.page_size;
    return page_size ? (c->kv_len[request] + page_size - 1) / page_size : 0;
}

/* Page lists over a pool with some pages to spare, in random order. Returns the pool's size. */
static inline int64_t case_deal_pages(attn_case *a)
{
    const case_config *c = &a->config;
    a->first_page = case_alloc((size_t)c->num_requests + 1, sizeof(int32_t));
    for (int32_t r = 0; r < c->num_requests; r++)
        a->first_page[r + 1] = a->first_page[r] + case_num_pages(c, r);
    int32_t used = a->first_page[c->num_requests];
    const int32_t own = used;
    for (int32_t l = 0; l < c->f.shared_levels; l++)
        for (int32_t g = 0; g < c->f.num_groups[l]; g++) {
            a->extra.shared[l].first_page[g] = used;
            used += case_pages_of(c->spec.page_size, c->f.group_len[l][g]);
        }
    const int64_t pool = used + 1 + test_below(4);
    a->pages = case_alloc((size_t)pool, sizeof(int32_t));
    for (int32_t i = 0; i < pool; i++) a->pages[i] = i;
    for (int64_t i = pool - 1; i > 0; i--) {
        const int64_t j = test_below(i + 1);
        const int32_t swap = a->pages[i];
        a->pages[i] = a->pages[j];
        a->pages[j] = swap;
    }
    for (int32_t i = 1; i < own && c->shared_pages; i++)
        if (test_below(4) == 0) a->pages[i] = a->pages[test_below(i)];
    for (int32_t r = 1; r < c->num_requests && c->f.share_prefixes; r++) {
        const int32_t other = (int32_t)test_below(r);
        const int32_t most = case_num_pages(c, r) < case_num_pages(c, other)
                                 ? case_num_pages(c, r)
                                 : case_num_pages(c, other);
        const int32_t n = test_below(4) ? (int32_t)test_below(most + 1) : most;
        for (int32_t i = 0; i < n; i++)
            a->pages[a->first_page[r] + i] = a->pages[a->first_page[other] + i];
    }
    return pool;
}

static inline void case_build_index(attn_case *a)
{
    const case_config *c = &a->config;
    const int64_t n = c->num_requests;
    const bool strided = c->strided;
    a->index = (qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = &a->qo_indptr.x.t};
    int32_t *qo_indptr = case_ints_new(&a->qo_indptr, 1, (int64_t[]){n + 1}, strided);
    qo_indptr[0] = 0;
    for (int32_t r = 0; r < n; r++) qo_indptr[r + 1] = qo_indptr[r] + c->qo_len[r];

    if (c->form == CASE_TABLE) {
        int32_t columns = 0;
        for (int32_t r = 0; r < n; r++)
            if (case_num_pages(c, r) > columns) columns = case_num_pages(c, r);
        columns += (int32_t)test_below(3);
        int32_t *table = case_ints_new(&a->block_table, 2, (int64_t[]){n, columns}, strided);
        int32_t *lens = case_ints_new(&a->kv_lens, 1, (int64_t[]){n}, strided);
        for (int32_t r = 0; r < n; r++) {
            lens[r] = c->kv_len[r];
            for (int32_t i = 0; i < case_num_pages(c, r); i++)
                table[r * a->block_table.x.strides[0] + i] = a->pages[a->first_page[r] + i];
        }
        a->index.block_table = &a->block_table.x.t;
        a->index.kv_lens = &a->kv_lens.x.t;
    } else {
        const int32_t first = strided ? (int32_t)test_below(4) : 0; /* skipped in front */
        int32_t *indptr = case_ints_new(&a->kv_indptr, 1, (int64_t[]){n + 1}, strided);
        indptr[0] = first;
        for (int32_t r = 0; r < n; r++)
            indptr[r + 1] = indptr[r] + (c->form == CASE_CSR ? case_num_pages(c, r) : c->kv_len[r]);
        a->index.kv_indptr = &a->kv_indptr.x.t;
        if (c->form == CASE_CSR) {
            const int64_t num_indices = indptr[n] + (strided ? test_below(4) : 0);
            int32_t *indices = case_ints_new(&a->kv_indices, 1, (int64_t[]){num_indices}, strided);
            int32_t *last = case_ints_new(&a->kv_last_page_len, 1, (int64_t[]){n}, strided);
            for (int32_t i = 0; i < a->first_page[n]; i++) indices[first + i] = a->pages[i];
            for (int32_t r = 0; r < n; r++)
                if (c->kv_len[r]) last[r] = (c->kv_len[r] - 1) % c->spec.page_size + 1;
            a->index.kv_indices = &a->kv_indices.x.t;
            a->index.kv_last_page_len = &a->kv_last_page_len.x.t;
        }
    }
    if (c->f.bsr_rows) {
        const int64_t blocks = case_build_bsr(&a->extra, &c->f, c->spec.num_kv_heads,
                                              c->num_requests, c->qo_len, c->kv_len, &a->index);
        if (!a->limits.max_row_blocks) a->limits.max_row_blocks = (int32_t)blocks;
    }
    int64_t token = c->form == CASE_RAGGED ? case_ints(&a->kv_indptr)[n] : 0;
    for (int32_t l = 0; l < c->f.shared_levels; l++) {
        case_shared *level = &a->extra.shared[l];
        level->first_token = token;
        for (int32_t g = 0; g < c->f.num_groups[l]; g++) token += c->f.group_len[l][g];
        case_build_level(level, &c->f, l, c->form, c->spec.page_size, a->pages, qo_indptr, strided,
                         &a->extra.levels[l]);
    }
    a->extra.levels[c->f.shared_levels] = a->index;
    a->num_ragged = token;
    a->batch = (qkv_attention_batch){QKV_ATTENTION_BATCH_INIT, .num_levels = 1 + c->f.shared_levels,
                                     .levels = c->f.shared_levels ? a->extra.levels : &a->index,
                                     .detect_shared_prefix = c->f.detect};
    if (c->spec.mask == QKV_MASK_CUSTOM)
        case_build_mask(&a->extra, &c->f, c->num_requests, c->qo_len, c->kv_len, &a->batch);
    if (c->use_qo_pos) {
        int32_t *qo_pos = case_ints_new(&a->qo_pos, 1, (int64_t[]){n}, strided);
        for (int32_t r = 0; r < n; r++) qo_pos[r] = c->qo_pos[r];
        a->batch.qo_pos = &a->qo_pos.x.t;
    }
}

/* K or V with its axes in the layout's order; second: the V half of K. */
typedef struct case_fill {
    const case_view *view;
    int64_t page_stride, slot_stride, head_stride, base, dim;
    double scale, bias;
} case_fill;

/* Keys of one list: pages, or tokens from `token` on. */
static inline void case_fill_list(const case_config *c, const case_fill *f, int32_t len,
                                  const int32_t *pages, int64_t token)
{
    const int64_t page_size = c->spec.page_size;
    for (int64_t j = 0; j < len; j++) {
        const int64_t at =
            page_size == 0 ? (token + j) * f->slot_stride
                           : pages[j / page_size] * f->page_stride + j % page_size * f->slot_stride;
        for (int64_t h = 0; h < c->spec.num_kv_heads; h++)
            for (int64_t d = 0; d < f->dim; d++)
                test_put(case_data(f->view), c->spec.dtype_kv,
                         at + f->base + h * f->head_stride + d, f->bias + test_uniform(f->scale));
    }
}

static inline void case_fill_kv(attn_case *a, const case_view *view, bool second, int64_t dim,
                                double scale, double bias)
{
    const case_config *c = &a->config;
    const int64_t *strides = view->x.strides;
    const int inner = c->spec.page_size == 0 ? 0 : c->combined ? 2 : 1;
    const bool nhd = c->spec.kv_layout == QKV_NHD;
    const bool i8 = c->spec.dtype_kv.code == 0; /* numbers of any use in integers */
    const case_fill f = {.view = view,
                         .page_stride = strides[0],
                         .slot_stride = strides[nhd ? inner : inner + 1],
                         .head_stride = strides[nhd ? inner + 1 : inner],
                         .base = second ? strides[1] : 0,
                         .dim = dim,
                         .scale = i8 ? 5 * scale : scale,
                         .bias = bias};
    int64_t token = c->form == CASE_RAGGED ? case_ints(&a->kv_indptr)[0] : 0;
    for (int32_t r = 0; r < c->num_requests; r++) {
        case_fill_list(c, &f, c->kv_len[r], a->pages + a->first_page[r], token);
        token += c->kv_len[r];
    }
    for (int32_t l = 0; l < c->f.shared_levels; l++) {
        const case_shared *level = &a->extra.shared[l];
        token = level->first_token;
        for (int32_t g = 0; g < c->f.num_groups[l]; g++) {
            case_fill_list(c, &f, c->f.group_len[l][g], a->pages + level->first_page[g], token);
            token += c->f.group_len[l][g];
        }
    }
}

static inline void case_build_kv(attn_case *a, int64_t pool)
{
    const case_config *c = &a->config;
    const qkv_attention_spec *s = &c->spec;
    const bool nhd = s->kv_layout == QKV_NHD;
    case_view *views[] = {&a->k, &a->v};
    for (int i = 0; i < (c->combined ? 1 : 2); i++) {
        int64_t shape[5];
        int ndim = 0;
        int64_t tokens = s->page_size;
        if (s->page_size == 0)
            tokens = a->num_ragged + test_below(4);
        else
            shape[ndim++] = pool;
        if (c->combined) shape[ndim++] = 2;
        shape[ndim++] = nhd ? tokens : s->num_kv_heads;
        shape[ndim++] = nhd ? s->num_kv_heads : tokens;
        shape[ndim++] = i ? s->head_dim_vo : s->head_dim_qk;
        case_view_new(views[i], s->dtype_kv, ndim, shape, c->strided, false);
    }
    const double v_scale = c->v_scale > 0 ? c->v_scale : 1;
    case_fill_kv(a, &a->k, false, s->head_dim_qk, 1, c->k_bias);
    case_fill_kv(a, c->combined ? &a->k : &a->v, c->combined, s->head_dim_vo, v_scale, 0);
}

/* Limits that are 0 and must not be: exactly what the case needs. */
static inline void case_complete_limits(attn_case *a)
{
    const case_config *c = &a->config;
    qkv_attention_limits *l = &a->limits;
    *l = c->limits;
    int64_t max_kv_len = 1, num_pages = 1;
    for (int32_t r = 0; r < c->num_requests; r++)
        if (c->kv_len[r] > max_kv_len) max_kv_len = c->kv_len[r];
    num_pages = a->first_page[c->num_requests];
    for (int32_t level = 0; level < c->f.shared_levels; level++) {
        int32_t most = 0;
        for (int32_t g = 0; g < c->f.num_groups[level]; g++) {
            const int32_t len = c->f.group_len[level][g];
            num_pages += case_pages_of(c->spec.page_size, len);
            most = len > most ? len : most;
        }
        max_kv_len += most;
    }
    if (num_pages < 1) num_pages = 1;
    if (!l->max_levels) l->max_levels = c->f.detect ? 4 : 1 + c->f.shared_levels;
    if (!l->max_requests) l->max_requests = c->num_requests ? c->num_requests : 1;
    if (!l->max_tokens) l->max_tokens = a->tokens ? a->tokens : 1;
    if (!l->max_kv_len) l->max_kv_len = max_kv_len;
    if (!l->max_pages) l->max_pages = num_pages;
}

/* Built in place: its parts point at each other. */
static inline void case_build(attn_case *a, const case_config *config)
{
    memset(a, 0, sizeof *a);
    a->config = *config;
    const case_config *c = &a->config;
    if (c->spec.features & QKV_FEATURE_ROPE) a->config.spec.rope = &a->config.f.rope;
    const qkv_attention_spec *s = &c->spec;
    const int64_t heads = s->num_qo_heads;
    for (int32_t r = 0; r < c->num_requests; r++) a->tokens += c->qo_len[r];
    a->rows = a->tokens + (c->strided ? test_below(4) : 0);

    const int64_t pool = case_deal_pages(a);
    case_complete_limits(a);
    case_build_index(a);
    case_build_kv(a, pool);
    case_view_new(&a->q, s->dtype_q, 3, (int64_t[]){a->rows, heads, s->head_dim_qk}, c->strided,
                  false);
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t d = 0; d < s->head_dim_qk; d++)
                test_put(case_data(&a->q), s->dtype_q,
                         t * a->q.x.strides[0] + h * a->q.x.strides[1] + d,
                         test_uniform(c->q_scale > 0 ? c->q_scale : 1) + c->k_bias);
    case_view_new(&a->o, s->dtype_o, 3, (int64_t[]){a->rows, heads, s->head_dim_vo}, c->strided,
                  false);
    case_view_new(&a->lse, QKV_F32, 2, (int64_t[]){a->rows, heads}, c->strided, true);
    a->io = (qkv_attention_io){QKV_ATTENTION_IO_INIT,
                               .q = &a->q.x.t,
                               .k = &a->k.x.t,
                               .v = c->combined ? NULL : &a->v.x.t,
                               .o = &a->o.x.t,
                               .lse = c->no_lse ? NULL : &a->lse.x.t,
                               .sm_scale = c->io_sm_scale,
                               .logits_soft_cap = c->io_soft_cap,
                               .set_window = c->set_window,
                               .window_left = c->io_window_left,
                               .window_right = c->io_window_right};
    case_build_extras(&a->extra, &c->f, s, &a->io);
    const size_t n = (size_t)(a->tokens * heads);
    a->ref_o = case_alloc(n * (size_t)s->head_dim_vo, sizeof(double));
    a->ref_rows = case_alloc(n, sizeof *a->ref_rows);
    a->got_o = case_alloc(n * (size_t)s->head_dim_vo, test_bytes(s->dtype_o));
    a->got_lse = case_alloc(n, sizeof(float));
    attention_ref(s, &a->batch, &a->io, a->ref_o, a->ref_rows);
}

static inline void case_free(attn_case *a)
{
    case_view *views[] = {&a->q,           &a->k,          &a->v,
                          &a->o,           &a->lse,        &a->qo_indptr,
                          &a->kv_indptr,   &a->kv_indices, &a->kv_last_page_len,
                          &a->block_table, &a->kv_lens,    &a->qo_pos};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) free(views[i]->x.owned);
    case_free_extra(&a->extra);
    free(a->pages), free(a->first_page), free(a->ref_o), free(a->ref_rows);
    free(a->got_o), free(a->got_lse);
}

#endif
