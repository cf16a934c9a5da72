/* attention_case_config.h - everything that is chosen about an attention case, and tensors between
 * NaNs to build it from. attention_case.h builds it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_ATTENTION_CASE_CONFIG_H
#define QKV_TESTS_ATTENTION_CASE_CONFIG_H

#include <stdbool.h>

#include "support.h"

enum { CASE_CSR, CASE_TABLE, CASE_RAGGED };
enum { CASE_MAX_REQUESTS = 512, CASE_MAX_LEVELS = 4 };
enum { CASE_NO_SCALE, CASE_NUMBER, CASE_TENSOR, CASE_PER_HEAD };
enum { CASE_Q, CASE_K, CASE_V, CASE_O, CASE_NUM_SCALES };
enum { CASE_RISES = 8, CASE_RISE = 64 };

/* How a scale is given; each head's is within a factor of two of `value`. */
typedef struct case_scale {
    int32_t kind; /* CASE_NO_SCALE, ... */
    double value;
} case_scale;

/* A level above the requests: its groups, in order. */
typedef struct case_shared_level {
    int32_t form, num_groups;
    int32_t num_members[CASE_MAX_REQUESTS]; /* groups of the next level */
    int32_t kv_len[CASE_MAX_REQUESTS];
} case_shared_level;

typedef struct case_config {
    qkv_attention_spec spec;     /* its rope is set from `rope` below                            */
    qkv_attention_limits limits; /* limits of 0 (but max_qo_len, ...) become what the case needs */
    int32_t form;                /* CASE_...; spec.page_size follows it for CASE_RAGGED          */
    bool combined;               /* K and V in one tensor                                        */
    bool strided;                /* tensors are views with gaps, permuted axes and byte_offset   */
    bool shared_pages;           /* some pages are listed by several requests                    */
    bool forgets;                /* keys before a request's first window are NaN (no levels)     */
    bool hides_first;            /* custom masks hide all keys before a row's own random one     */
    bool use_qo_pos, no_lse;
    int32_t num_requests;
    int32_t qo_len[CASE_MAX_REQUESTS], kv_len[CASE_MAX_REQUESTS], qo_pos[CASE_MAX_REQUESTS];
    float io_sm_scale, io_soft_cap;
    int32_t set_window, io_window_left, io_window_right;
    double q_scale, k_bias, v_scale; /* of the data as the formula sees them; 0 = 1, 0, 1 */
    const double *k_rises; /* [CASE_RISES]: added to k's bias, each for CASE_RISE keys; or NULL */
    case_scale scales[CASE_NUM_SCALES];
    double max_slope, max_sink; /* of ALiBi's slopes, and of sinks; some sinks are -inf */
    qkv_rope_spec rope;
    int32_t num_shared_levels;
    case_shared_level shared[CASE_MAX_LEVELS - 1]; /* outermost first */
    int32_t
        shared_prefixes; /* of 8 requests, how many have a page list that begins like another's */
    bool whole_prefixes; /* those share all pages that they can */
    bool detect;
    int32_t bsr_rows, bsr_cols; /* 0: not sparse */
    bool bsr_per_head, bsr_masked;
} case_config;

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
                         .rope = {QKV_ROPE_SPEC_INIT},
                         .form = spec.page_size ? CASE_CSR : CASE_RAGGED};
}

static inline void case_add(case_config *c, int32_t qo_len, int32_t kv_len)
{
    assert_true(c->num_requests < CASE_MAX_REQUESTS);
    c->qo_len[c->num_requests] = qo_len;
    c->kv_len[c->num_requests++] = kv_len;
}

/* The last level's groups are the requests. */
static inline int32_t case_num_groups(const case_config *c, int32_t level)
{
    return level == c->num_shared_levels ? c->num_requests : c->shared[level].num_groups;
}

static inline int32_t case_form(const case_config *c, int32_t level)
{
    return level == c->num_shared_levels ? c->form : c->shared[level].form;
}

static inline int32_t case_group_len(const case_config *c, int32_t level, int32_t group)
{
    return level == c->num_shared_levels ? c->kv_len[group] : c->shared[level].kv_len[group];
}

static inline int32_t case_group_pages(const case_config *c, int32_t level, int32_t group)
{
    const int32_t page_size = c->spec.page_size;
    return page_size ? (case_group_len(c, level, group) + page_size - 1) / page_size : 0;
}

/* The first request of a group; of one past the last group, the number of requests. */
static inline int32_t case_first_request(const case_config *c, int32_t level, int32_t group)
{
    for (; level < c->num_shared_levels; level++) {
        int32_t member = 0;
        for (int32_t g = 0; g < group; g++) member += c->shared[level].num_members[g];
        group = member;
    }
    return group;
}

/* The group of a level that a request belongs to. */
static inline int32_t case_group_of(const case_config *c, int32_t level, int32_t request)
{
    int32_t group = 0;
    while (case_first_request(c, level, group + 1) <= request) group++;
    return group;
}

/* Keys of a request over all levels. */
static inline int32_t case_kv_len(const case_config *c, int32_t request)
{
    int32_t len = 0;
    for (int32_t level = 0; level <= c->num_shared_levels; level++)
        len += case_group_len(c, level, case_group_of(c, level, request));
    return len;
}

/* ---- messages ----------------------------------------------------------------------------- */

static inline void case_print_features(const case_config *c)
{
    const qkv_rope_spec *r = &c->rope;
    if (c->spec.features & QKV_FEATURE_ROPE)
        fprintf(stderr, " rope %d%s, theta %g, scale %g, %g..%g of %g;", r->rotary_dim,
                r->interleaved ? " interleaved" : "", (double)r->theta, (double)r->scale,
                (double)r->low_freq, (double)r->high_freq, (double)r->old_context);
    if (c->spec.features & QKV_FEATURE_ALIBI) fprintf(stderr, " slopes to %g;", c->max_slope);
    if (c->spec.flags & QKV_ATTENTION_HAS_SINK) fprintf(stderr, " sinks to %g;", c->max_sink);
    for (int i = 0; i < CASE_NUM_SCALES; i++)
        if (c->scales[i].kind)
            fprintf(
                stderr, " %c_scale %s %g;", "qkvo" [i],
                (const char *[]) { "", "number", "[1]", "[heads]" }[c->scales[i].kind],
                c->scales[i].value);
    if (c->shared_prefixes)
        fprintf(stderr, " prefixes %d/8%s;", c->shared_prefixes, c->whole_prefixes ? " whole" : "");
    if (c->detect) fprintf(stderr, " detect, %d levels;", c->limits.max_levels);
    if (c->bsr_rows)
        fprintf(stderr, " bsr %dx%d%s%s;", c->bsr_rows, c->bsr_cols,
                c->bsr_per_head ? " per head" : "", c->bsr_masked ? " masked" : "");
    for (int32_t l = 0; l < c->num_shared_levels; l++) {
        fprintf(stderr, " level %d, form %d:", l, c->shared[l].form);
        for (int32_t g = 0; g < c->shared[l].num_groups && g < 20; g++)
            fprintf(stderr, " %dx%d", c->shared[l].num_members[g], c->shared[l].kv_len[g]);
        fprintf(stderr, ";");
    }
}

static inline void case_print(int64_t number, const case_config *c)
{
    const qkv_attention_spec *s = &c->spec;
    fprintf(stderr,
            "QKV_TEST_CASE=%lld: heads %d/%d, dims %d/%d, page %d %s %s%s%s%s, q %d:%d kv %d:%d o "
            "%d:%d, mask %d, "
            "features %d, flags %u, sm_scale %g, cap %g, window %d/%d; layer: scale %g, cap %g, "
            "window %d: %d/%d; workers %d, split rows %lld, max_qo_len %d; data %g, %g, %g;",
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
    case_print_features(c);
    fprintf(stderr, "\n");
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
        const int on_gpu_ = test_synchronize();                                                    \
        if (on_gpu_ != 0) {                                                                        \
            case_print((a)->number, &(a)->config);                                                 \
            fail_msg("%s: the GPU ended with error %d", #expr, on_gpu_);                           \
        }                                                                                          \
    } while (0)

/* ---- views -------------------------------------------------------------------------------- */

/* A tensor in a block of its own, NaN wherever nothing was put. */
typedef struct case_view {
    test_tensor x;
    size_t bytes;
} case_view;

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

/* Bytes at random, for what is garbage wherever nothing is put. */
static inline void case_randomise(const case_view *view)
{
    for (size_t i = 0; i < view->bytes; i++) ((uint8_t *)view->x.owned)[i] = (uint8_t)test_u64();
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
    case_randomise(view);
    return case_ints(view);
}

#endif
