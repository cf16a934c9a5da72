/* attention_case_random.h - random attention cases, small but of every kind, and contexts of every
 * level to try them on.
 *
 * QKV_TEST_SEED and QKV_TEST_CASE=n, both printed with a failure, repeat case n of each test;
 * QKV_TEST_CASES=n runs so many random ones.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_ATTENTION_CASE_RANDOM_H
#define QKV_TESTS_ATTENTION_CASE_RANDOM_H

#include "attention_run.h"

#define PICK(...)                                                                                  \
    ((const int32_t[]){__VA_ARGS__}[test_below(                                                    \
        (int64_t)(sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t)))])

/* One chance in n; none for 0. */
static inline bool chance(int64_t n)
{
    return n > 0 && test_below(n) == 0;
}

/* What a case may have: each feature in one case of so many, 0 = never, 1 = always. */
typedef struct any_features {
    int32_t fp8, custom_mask, alibi, sink, rope, scales, invariant, levels, bsr, detect;
} any_features;

/* ---- the spec ----------------------------------------------------------------------------- */

static inline DLDataType any_dtype(bool fp8, bool i8)
{
    const DLDataType types[] = {QKV_F32, QKV_F16, QKV_BF16, QKV_E4M3, QKV_E5M2, QKV_I8};
    return types[fp8 ? test_below(i8 ? 6 : 5) : test_below(3)];
}

static inline int32_t any_head_dim(void)
{
    const int64_t kind = test_below(10);
    if (kind < 3) return 64;
    if (kind < 6) return 128;
    return 8 * (1 + (int32_t)test_below(1 + test_below(64)));
}

static inline void any_dtypes(qkv_attention_spec *s, const any_features *f)
{
    const bool fp8 = chance(f->fp8);
    s->dtype_q = any_dtype(fp8, false);
    s->dtype_kv = chance(2) && !fp8 ? s->dtype_q : any_dtype(fp8, true);
    s->dtype_o = chance(2) ? s->dtype_q : any_dtype(fp8, false);
}

static inline qkv_attention_spec any_spec(const any_features *f)
{
    qkv_attention_spec s = {QKV_ATTENTION_SPEC_INIT};
    const int32_t group_size = PICK(1, 2, 3, 4, 5, 7, 8, 16);
    s.num_kv_heads = 1 + (int32_t)test_below(group_size > 8 ? 2 : 4);
    s.num_qo_heads = s.num_kv_heads * group_size;
    s.head_dim_qk = any_head_dim();
    s.head_dim_vo = chance(3) ? any_head_dim() : s.head_dim_qk;
    s.page_size = f->detect != 1 && chance(4) ? 0 : PICK(1, 2, 3, 5, 8, 16, 16, 32, 64, 128);
    s.kv_layout = chance(2) ? QKV_NHD : QKV_HND;
    s.mask = chance(f->custom_mask) ? QKV_MASK_CUSTOM : chance(3) ? QKV_MASK_NONE : QKV_MASK_CAUSAL;
    any_dtypes(&s, f);
    s.sm_scale = chance(2) ? 0 : (float)(0.3 + test_uniform(0.29));
    if (chance(3)) s.flags |= QKV_ATTENTION_LSE_BASE_2;
    if (chance(f->sink)) s.flags |= QKV_ATTENTION_HAS_SINK;
    if (chance(2)) s.flags |= QKV_ATTENTION_ONLY_APPENDS;
    if (chance(f->invariant)) s.flags |= QKV_ATTENTION_BATCH_INVARIANT;
    if (chance(f->alibi)) s.features |= QKV_FEATURE_ALIBI;
    if (chance(f->rope)) s.features |= QKV_FEATURE_ROPE;
    if (chance(4)) {
        s.features |= QKV_FEATURE_SOFT_CAP;
        s.logits_soft_cap = (float)(25 + test_uniform(24.5));
    }
    if (chance(2)) {
        s.features |= QKV_FEATURE_WINDOW;
        s.window_left = PICK(-1, 0, 1, 7, 31, (int32_t)test_below(200));
        s.window_right = PICK(-1, -1, 0, 1, (int32_t)test_below(50));
    }
    return s;
}

/* ---- lengths ------------------------------------------------------------------------------ */

static inline void add_any_request(case_config *c)
{
    int32_t qo_len = 1, kv_len = 1 + (int32_t)test_below(1 + test_below(500));
    switch (test_below(10)) {
    case 0: kv_len = 0; break;
    case 1: qo_len = 0; break;
    case 2: qo_len = 0, kv_len = 0; break;
    case 3: qo_len = 2 + (int32_t)test_below(19); break;
    case 4: qo_len = kv_len; break; /* a prompt */
    case 5: qo_len = 1 + (int32_t)test_below(300), kv_len += qo_len; break;
    case 6: qo_len = kv_len + 1 + (int32_t)test_below(20); break; /* first rows see no key */
    default: break;                                               /* decode */
    }
    case_add(c, qo_len, kv_len);
}

/* Multiplications of qo_len rows over kv_len keys, and what reading them costs. */
static inline int64_t cost_of(const qkv_attention_spec *s, int64_t qo_len, int64_t kv_len)
{
    const int64_t dims = s->head_dim_qk + s->head_dim_vo;
    return dims * s->num_qo_heads * (qo_len + kv_len / 8 + qo_len * kv_len);
}

/* Halves lengths until each request is at most its share of multiplications. */
static inline void shrink(case_config *c, int64_t budget)
{
    const int64_t share = budget / (c->num_requests + 1);
    for (int32_t r = 0; r < c->num_requests; r++)
        while (cost_of(&c->spec, c->qo_len[r], c->kv_len[r]) > share &&
               (c->qo_len[r] > 1 || c->kv_len[r] > 1)) {
            if (c->qo_len[r] > 1) c->qo_len[r] = (c->qo_len[r] + 1) / 2;
            c->kv_len[r] = (c->kv_len[r] + 1) / 2;
        }
}

/* Within the keys, near their end, and on either side of them. */
static inline void any_positions(case_config *c)
{
    c->use_qo_pos = true;
    for (int32_t r = 0; r < c->num_requests; r++) {
        const int32_t len = case_kv_len(c, r), end = len - c->qo_len[r];
        switch (test_below(6)) {
        case 0: c->qo_pos[r] = -1 - (int32_t)test_below(30); break;
        case 1: c->qo_pos[r] = len + (int32_t)test_below(100); break;
        case 2: c->qo_pos[r] = (int32_t)test_below(len + 4); break;
        default: c->qo_pos[r] = end + PICK(-2, -1, 0, 1, 5); break;
        }
    }
}

/* ---- features ----------------------------------------------------------------------------- */

/* Cuts n groups into runs, some of none: the members of the level above. */
static inline void any_level(case_shared_level *l, int32_t n, int64_t max_len)
{
    const int32_t most = PICK(1, 2, 3, 6, 100);
    while (n > 0 && l->num_groups < CASE_MAX_REQUESTS - 2) {
        int32_t members = (int32_t)test_below(1 + most);
        if (members > n || chance(20)) members = n;
        l->num_members[l->num_groups++] = members;
        n -= members;
    }
    l->num_members[l->num_groups++] = n;
    for (int32_t g = 0; g < l->num_groups; g++)
        l->kv_len[g] = chance(4) ? 0 : 1 + (int32_t)test_below(1 + test_below(max_len));
}

/* As many keys as the rows allow. */
static inline void any_levels(case_config *c, int64_t budget)
{
    const int32_t num_levels = 1 + (int32_t)test_below(CASE_MAX_LEVELS - 1);
    int64_t tokens = 1, max_len = 300;
    for (int32_t r = 0; r < c->num_requests; r++) tokens += c->qo_len[r];
    while (max_len > 1 && cost_of(&c->spec, tokens, max_len) * num_levels > budget) max_len /= 2;
    c->num_shared_levels = num_levels;
    for (int32_t level = num_levels - 1, n = c->num_requests; level >= 0; level--) {
        any_level(&c->shared[level], n, max_len);
        c->shared[level].form = c->form == CASE_RAGGED ? CASE_RAGGED : PICK(CASE_CSR, CASE_TABLE);
        n = c->shared[level].num_groups;
    }
}

static inline void any_bsr(case_config *c)
{
    c->bsr_rows = PICK(1, 2, 16, 1 + (int32_t)test_below(40));
    c->bsr_cols = PICK(1, 2, 16, 1 + (int32_t)test_below(40));
    c->bsr_per_head = chance(2);
    c->bsr_masked = chance(2);
}

static inline void any_rope(case_config *c)
{
    qkv_rope_spec *r = &c->rope;
    if (chance(2)) r->rotary_dim = 2 * (1 + (int32_t)test_below(c->spec.head_dim_qk / 2));
    r->interleaved = chance(2);
    r->theta = chance(2) ? 0 : (float)PICK(1, 100, 10000, 500000);
    r->scale = chance(2) ? 0 : (float)PICK(1, 4, 8);
    if (chance(3)) { /* wavelengths of all three kinds in small dims too */
        r->low_freq = (float)PICK(1, 2);
        r->high_freq = r->low_freq * 4;
        r->old_context = (float)PICK(64, 512, 8192);
    }
}

/* Of the size that the dtype's range asks for. */
static inline void any_scales(case_config *c)
{
    const double sizes[CASE_NUM_SCALES] = {c->q_scale, 1, c->v_scale, c->v_scale};
    for (int i = 0; i < CASE_NUM_SCALES; i++) {
        const bool i8 = c->spec.dtype_kv.code == 0 && (i == CASE_K || i == CASE_V);
        c->scales[i].kind = (int32_t)test_below(4);
        c->scales[i].value = i8 ? sizes[i] / 127 : exp2(test_uniform(3));
    }
    if (chance(2) && c->spec.dtype_o.bits == 8) /* some, and many, saturate */
        c->scales[CASE_O].value = c->v_scale / PICK(100, 1000, 100000);
}

/* ---- limits ------------------------------------------------------------------------------- */

/* A window inside the spec's, on one side. */
static inline int32_t any_narrower(int32_t window)
{
    return window < 0 ? (int32_t)test_below(60) - 1 : (int32_t)test_below(window + 1);
}

static inline void any_overrides(case_config *c)
{
    const qkv_attention_spec *s = &c->spec;
    if (chance(4)) c->io_sm_scale = (float)(0.2 + test_uniform(0.19));
    if ((s->features & QKV_FEATURE_SOFT_CAP) && chance(3))
        c->io_soft_cap = (float)(10 + test_uniform(9));
    if ((s->features & QKV_FEATURE_WINDOW) && chance(2)) {
        c->set_window = 1;
        c->io_window_left = any_narrower(s->window_left);
        c->io_window_right = any_narrower(s->window_right);
    }
}

/* Exactly as needed, or more. Partial rows cost memory: with levels, tokens; with fixed cuts, keys. */
static inline void any_limits(case_config *c)
{
    const bool invariant = c->spec.flags & QKV_ATTENTION_BATCH_INVARIANT;
    int64_t tokens = 0, pages = 0, row_blocks = 0;
    int32_t max_qo_len = 1, max_kv_len = 1, max_groups = 1;
    for (int32_t r = 0; r < c->num_requests; r++) {
        tokens += c->qo_len[r];
        if (c->bsr_rows) row_blocks += (c->qo_len[r] + c->bsr_rows - 1) / c->bsr_rows;
        if (c->qo_len[r] > max_qo_len) max_qo_len = c->qo_len[r];
        if (case_kv_len(c, r) > max_kv_len) max_kv_len = case_kv_len(c, r);
    }
    for (int32_t level = 0; level <= c->num_shared_levels; level++) {
        const int32_t n = case_num_groups(c, level);
        if (n > max_groups) max_groups = n;
        for (int32_t g = 0; g < n; g++) {
            pages += case_group_pages(c, level, g);
            if (case_group_len(c, level, g) > max_kv_len) max_kv_len = case_group_len(c, level, g);
        }
    }
    qkv_attention_limits *l = &c->limits;
    l->max_workers = (int32_t)test_below(10);
    l->max_qo_len = chance(3) ? 0 : max_qo_len;
    l->max_levels = c->num_shared_levels ? PICK(0, 1 + c->num_shared_levels, CASE_MAX_LEVELS)
                    : c->detect          ? PICK(0, 1, 2, 3, CASE_MAX_LEVELS)
                                         : 0;
    l->max_split_rows = PICK(0, 1, 1 + (int32_t)test_below(300), 100000);
    if (c->num_shared_levels || invariant) l->max_split_rows = 0;
    if (chance(2)) return; /* the others exactly as needed */
    l->max_requests = max_groups + 1 + (int32_t)test_below(20);
    l->max_tokens = tokens + 1 + test_below(c->num_shared_levels || c->detect ? 10 : 1000);
    l->max_kv_len = max_kv_len + test_below(invariant ? 2000 : 100000);
    l->max_pages = pages + 1 + test_below(1000);
    if (c->bsr_rows || chance(10))
        l->max_row_blocks = (int32_t)(row_blocks * c->spec.num_kv_heads + test_below(20));
}

/* ---- a case ------------------------------------------------------------------------------- */

static inline case_config any_config(qkv_attention_spec spec, const any_features *f)
{
    case_config c = case_config_init(spec);
    const bool alone = spec.flags & QKV_ATTENTION_BATCH_INVARIANT;
    const int64_t budget = chance(10) ? 20000000 : 600000;
    c.form = c.spec.page_size == 0 ? CASE_RAGGED : chance(2) ? CASE_CSR : CASE_TABLE;
    c.combined = c.spec.page_size > 0 && c.spec.head_dim_qk == c.spec.head_dim_vo && chance(4);
    c.strided = !chance(4);
    c.shared_pages = chance(3);
    c.no_lse = chance(5);
    c.q_scale = (double)PICK(1, 1, 1, 4, 20, 100);
    c.k_bias = (double)PICK(0, 0, 0, 1, -1);
    c.v_scale = (double)PICK(1, 1, 100);
    c.max_slope = chance(3) ? 0.01 : 0.5;
    c.max_sink = (double)PICK(1, 5, 50);
    any_rope(&c);
    if (chance(f->scales)) any_scales(&c);
    const int64_t n = chance(8) ? test_below(60) : test_below(9);
    for (int64_t i = 0; i < n; i++) add_any_request(&c);
    shrink(&c, budget);
    if (chance(f->bsr))
        any_bsr(&c);
    else if (chance(f->levels) && !alone)
        any_levels(&c, budget);
    else if (chance(f->detect) && !alone && spec.page_size > 0)
        c.detect = true;
    if (c.detect || chance(8)) {
        c.shared_prefixes = PICK(0, 4, 7, 8);
        c.whole_prefixes = chance(3);
    }
    if (chance(5)) any_positions(&c);
    any_overrides(&c);
    any_limits(&c);
    return c;
}

/* ---- every level, with several numbers of threads ----------------------------------------- */

enum { MAX_ISA_LEVELS = 8, NUM_THREAD_COUNTS = 3 };
static qkv_context *contexts[MAX_ISA_LEVELS][NUM_THREAD_COUNTS];
static int num_isa_levels;
static qkv_log_fn contexts_log; /* of all of them, if a test sets it before */

static inline int open_contexts(void **state)
{
    (void)state;
    const int32_t num_threads[NUM_THREAD_COUNTS] = {1, 2, 5};
    int32_t usable;
    const char *level;
    for (int32_t i = 0; (level = test_level(i, &usable)); i++) {
        if (!usable) {
            printf("skipped: this machine cannot run %s\n", level);
            continue;
        }
        for (int j = 0; j < NUM_THREAD_COUNTS; j++)
            EXPECT_OK(qkv_context_create(&(qkv_context_options){TEST_CONTEXT_INIT, .isa = level,
                                                                .num_threads = num_threads[j],
                                                                .log = contexts_log},
                                         &contexts[num_isa_levels][j]));
        num_isa_levels++;
    }
    return num_isa_levels > 0 ? 0 : -1;
}

static inline int close_contexts(void **state)
{
    (void)state;
    for (int i = 0; i < num_isa_levels; i++)
        for (int j = 0; j < NUM_THREAD_COUNTS; j++) qkv_context_destroy(contexts[i][j]);
    return 0;
}

/* Cases first, first + step .. below count: any spec, changed by change(spec, number), with features of
 * these chances. */
static inline void try_some(int64_t first, int64_t step, int64_t count, any_features features,
                            void (*change)(qkv_attention_spec *s, int32_t number))
{
    const char *only = getenv("QKV_TEST_CASE");
    const uint64_t seed = test_state;
    if (only) first = strtoll(only, NULL, 0);
    for (int64_t i = first; i < (only && first < count ? first + 1 : count); i += step) {
        test_state = seed + (uint64_t)i * 0x632be59bd9b4e019u;
        qkv_attention_spec spec = any_spec(&features);
        if (change) change(&spec, (int32_t)i);
        const case_config config = any_config(spec, &features);
        attn_case a;
        case_build(&a, &config);
        a.number = i;
        if (chance(2)) a.limits.pool_pages = config.spec.page_size ? a.k.x.shape[0] : 0;
        for (int level = 0; level < num_isa_levels; level++)
            case_try(&a, contexts[level][test_below(NUM_THREAD_COUNTS)]);
        case_free(&a);
    }
    test_state = seed;
}

static inline void try_cases(int64_t count, any_features features,
                             void (*change)(qkv_attention_spec *s, int32_t number))
{
    try_some(0, 1, count, features, change);
}

/* A case for each of count values of an axis; the emulated GPU takes every fourth. */
static inline void try_axis(int64_t count, any_features features,
                            void (*change)(qkv_attention_spec *s, int32_t number))
{
    const int64_t step = test_is_emulated() ? 4 : 1;
    try_some(test_below(step), step, count, features, change);
}

#endif
