/* test_attention_grid.c - thousands of small random attention problems, each on every CPU level;
 * and one axis at a time over all of its values, with the rest at random.
 *
 * QKV_TEST_SEED and QKV_TEST_CASE=n, both printed with a failure, repeat case n of each test;
 * QKV_TEST_CASES=n runs so many random ones.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_run.h"

#define PICK(...)                                                                                  \
    ((const int32_t[]){__VA_ARGS__}[test_below(                                                    \
        (int64_t)(sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t)))])

/* One chance in n. */
static bool chance(int64_t n)
{
    return test_below(n) == 0;
}

static DLDataType any_float(void)
{
    const DLDataType types[] = {QKV_F32, QKV_F16, QKV_BF16};
    return types[test_below(3)];
}

/* Mostly what models use, sometimes 8 bits. */
static DLDataType any_stored(bool allow_i8)
{
    const DLDataType types[] = {QKV_E4M3, QKV_E5M2, QKV_I8};
    return chance(3) ? types[test_below(allow_i8 ? 3 : 2)] : any_float();
}

static int32_t any_head_dim(void)
{
    const int64_t kind = test_below(10);
    if (kind < 3) return 64;
    if (kind < 6) return 128;
    return 8 * (1 + (int32_t)test_below(1 + test_below(64)));
}

static qkv_attention_spec any_spec(void)
{
    qkv_attention_spec s = {QKV_ATTENTION_SPEC_INIT};
    const int32_t group_size = PICK(1, 2, 3, 4, 5, 7, 8, 16);
    s.num_kv_heads = 1 + (int32_t)test_below(group_size > 8 ? 2 : 4);
    s.num_qo_heads = s.num_kv_heads * group_size;
    s.head_dim_qk = any_head_dim();
    s.head_dim_vo = chance(3) ? any_head_dim() : s.head_dim_qk;
    s.page_size = chance(4) ? 0 : PICK(1, 2, 3, 5, 8, 16, 16, 32, 64, 128);
    s.kv_layout = chance(2) ? QKV_NHD : QKV_HND;
    s.mask = chance(3) ? QKV_MASK_NONE : chance(5) ? QKV_MASK_CUSTOM : QKV_MASK_CAUSAL;
    s.dtype_q = any_stored(false);
    s.dtype_kv = chance(2) ? s.dtype_q : any_stored(true);
    s.dtype_o = chance(2) ? s.dtype_q : any_stored(false);
    s.sm_scale = chance(2) ? 0 : (float)(0.3 + test_uniform(0.29));
    s.flags = (chance(3) ? QKV_ATTENTION_LSE_BASE_2 : 0) |
              (chance(6) ? QKV_ATTENTION_HAS_SINK : 0) |
              (chance(6) ? QKV_ATTENTION_BATCH_INVARIANT : 0);
    if (chance(6)) s.features |= QKV_FEATURE_ALIBI;
    if (chance(6)) s.features |= QKV_FEATURE_ROPE;
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

static void add_any_request(case_config *c)
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

/* Halves lengths until each request is at most its share of multiplications. */
static void shrink(case_config *c, int64_t budget)
{
    const qkv_attention_spec *s = &c->spec;
    const int64_t dims = s->head_dim_qk + s->head_dim_vo;
    for (int32_t r = 0; r < c->num_requests; r++) {
        while (dims * (c->qo_len[r] + c->kv_len[r] / 8) * s->num_qo_heads +
                       dims * c->qo_len[r] * c->kv_len[r] * s->num_qo_heads >
                   budget / c->num_requests &&
               (c->qo_len[r] > 1 || c->kv_len[r] > 1)) {
            if (c->qo_len[r] > 1) c->qo_len[r] = (c->qo_len[r] + 1) / 2;
            c->kv_len[r] = (c->kv_len[r] + 1) / 2;
        }
        const int32_t end = c->kv_len[r] - c->qo_len[r];
        c->qo_pos[r] = (int32_t)test_below(c->kv_len[r] + 4);
        if (chance(2) && end >= 2) c->qo_pos[r] = end + PICK(-2, -1, 0, 1, 5);
    }
}

/* Nested groups of requests, the outermost first. */
static void any_levels(case_config *c)
{
    case_features *f = &c->f;
    f->shared_levels = 1 + (int32_t)test_below(CASE_MAX_SHARED);
    for (int32_t l = f->shared_levels - 1; l >= 0; l--) { /* each joins groups of the one below */
        const bool last = l == f->shared_levels - 1;
        const int32_t below = last ? c->num_requests : f->num_groups[l + 1];
        f->num_groups[l] = 0;
        for (int32_t i = 0; i < below;) {
            i += 1 + (int32_t)test_below(below - i < 4 ? below - i : 4);
            const int32_t g = f->num_groups[l]++;
            f->group_end[l][g] = last ? i : f->group_end[l + 1][i - 1];
            f->group_len[l][g] = chance(5) ? 0 : (int32_t)test_below(1 + test_below(100));
        }
    }
}

/* What is not in the spec. */
static void any_features(case_config *c)
{
    const qkv_attention_spec *s = &c->spec;
    case_features *f = &c->f;
    const bool alone = s->flags & QKV_ATTENTION_BATCH_INVARIANT;
    f->mask_density = (int32_t)test_below(9);
    f->slope = chance(2) ? 0.5 : 0.01;
    f->sink = chance(2) ? 3 : 20;
    f->scales = chance(3);
    f->rope.struct_size = sizeof f->rope;
    if (chance(2)) f->rope.rotary_dim = 2 * (1 + (int32_t)test_below(s->head_dim_qk / 2));
    f->rope.interleaved = chance(2);
    if (chance(2)) f->rope.theta = 500000;
    if (chance(3)) f->rope.scale = 8;
    if (chance(3)) f->rope.low_freq = 1, f->rope.high_freq = 4, f->rope.old_context = 512;
    f->share_prefixes = chance(6) && s->page_size > 0;
    if (chance(6)) {
        f->bsr_rows = 1 + (int32_t)test_below(chance(2) ? 5 : 40);
        f->bsr_cols = 1 + (int32_t)test_below(chance(2) ? 5 : 40);
        f->bsr_density = (int32_t)test_below(9);
        f->bsr_per_head = chance(2);
        f->bsr_mask = chance(2);
    } else if (chance(4) && !alone && c->num_requests > 0 && c->num_requests <= CASE_MAX_GROUPS) {
        any_levels(c);
    } else if (f->share_prefixes && !alone) {
        f->detect = true;
    }
}

/* A window inside the spec's, on one side. */
static int32_t any_narrower(int32_t window)
{
    return window < 0 ? (int32_t)test_below(60) - 1 : (int32_t)test_below(window + 1);
}

static void any_overrides(case_config *c)
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

static void any_limits(case_config *c)
{
    int64_t tokens = 0, pages = 0;
    int32_t max_qo_len = 1, max_kv_len = 1;
    for (int32_t r = 0; r < c->num_requests; r++) {
        tokens += c->qo_len[r];
        pages += c->spec.page_size ? (c->kv_len[r] + c->spec.page_size - 1) / c->spec.page_size : 0;
        if (c->qo_len[r] > max_qo_len) max_qo_len = c->qo_len[r];
        if (c->kv_len[r] > max_kv_len) max_kv_len = c->kv_len[r];
    }
    qkv_attention_limits *l = &c->limits;
    l->max_workers = (int32_t)test_below(10);
    l->max_qo_len = chance(3) ? 0 : max_qo_len;
    const bool needs_rows = c->f.shared_levels > 0 || c->spec.flags & QKV_ATTENTION_BATCH_INVARIANT;
    switch (needs_rows ? 0 : test_below(4)) {
    case 0: l->max_split_rows = 0; break;
    case 1: l->max_split_rows = 1; break;
    case 2: l->max_split_rows = 1 + test_below(300); break;
    default: l->max_split_rows = 100000; break;
    }
    if (chance(2)) return; /* the others exactly as needed */
    l->max_requests = c->num_requests + 1 + (int32_t)test_below(20);
    l->max_tokens = tokens + 1 + test_below(1000);
    l->max_kv_len = max_kv_len + test_below(100000);
    l->max_pages = pages + 1 + test_below(1000);
    l->max_row_blocks = c->f.bsr_rows ? (int32_t)(tokens * c->spec.num_kv_heads) : 0;
    for (int32_t level = 0; level < c->f.shared_levels; level++)
        for (int32_t g = 0; g < c->f.num_groups[level]; g++) {
            const int32_t len = c->f.group_len[level][g];
            l->max_pages += case_pages_of(c->spec.page_size, len);
            l->max_kv_len += len;
        }
    if (c->f.shared_levels || c->f.detect)
        l->max_levels = 1 + c->f.shared_levels + (int32_t)test_below(3);
}

static case_config any_config(qkv_attention_spec spec)
{
    case_config c = case_config_init(spec);
    c.form = c.spec.page_size == 0 ? CASE_RAGGED : chance(2) ? CASE_CSR : CASE_TABLE;
    c.combined = c.spec.page_size > 0 && c.spec.head_dim_qk == c.spec.head_dim_vo && chance(4);
    c.strided = !chance(4);
    c.shared_pages = chance(3);
    c.use_qo_pos = chance(5);
    c.no_lse = chance(5);
    c.q_scale = (double)PICK(1, 1, 1, 4, 20, 100);
    c.k_bias = (double)PICK(0, 0, 0, 1, -1);
    c.v_scale = (double)PICK(1, 1, 100);
    const int64_t n = chance(8) ? test_below(60) : test_below(9);
    for (int64_t i = 0; i < n; i++) add_any_request(&c);
    shrink(&c, chance(10) ? 20000000 : 600000);
    any_features(&c);
    any_overrides(&c);
    any_limits(&c);
    return c;
}

enum { MAX_LEVELS = 8, NUM_THREAD_COUNTS = 3 };
static qkv_context *contexts[MAX_LEVELS][NUM_THREAD_COUNTS];
static int num_levels;

static int open_contexts(void **state)
{
    (void)state;
    const int32_t num_threads[NUM_THREAD_COUNTS] = {1, 2, 5};
    int32_t usable;
    const char *level;
    for (int32_t i = 0; (level = qkv_cpu_level(i, &usable)); i++) {
        if (!usable) {
            printf("skipped: this machine cannot run %s\n", level);
            continue;
        }
        for (int j = 0; j < NUM_THREAD_COUNTS; j++)
            EXPECT_OK(
                qkv_context_create(&(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .isa = level,
                                                          .num_threads = num_threads[j]},
                                   &contexts[num_levels][j]));
        num_levels++;
    }
    return num_levels > 0 ? 0 : -1;
}

static int close_contexts(void **state)
{
    (void)state;
    for (int i = 0; i < num_levels; i++)
        for (int j = 0; j < NUM_THREAD_COUNTS; j++) qkv_context_destroy(contexts[i][j]);
    return 0;
}

/* Cases 0 .. count-1: any spec, changed by change(spec, number). */
static void try_cases(int64_t count, void (*change)(qkv_attention_spec *s, int32_t number))
{
    const char *only = getenv("QKV_TEST_CASE");
    const uint64_t seed = test_state;
    const int64_t first = only ? strtoll(only, NULL, 0) : 0;
    for (int64_t i = first; i < (only && first < count ? first + 1 : count); i++) {
        test_state = seed + (uint64_t)i * 0x632be59bd9b4e019u;
        qkv_attention_spec spec = any_spec();
        if (change) change(&spec, (int32_t)i);
        const case_config config = any_config(spec);
        attn_case a;
        case_build(&a, &config);
        a.number = i;
        if (chance(2)) a.limits.pool_pages = config.spec.page_size ? a.k.x.shape[0] : 0;
        for (int level = 0; level < num_levels; level++)
            case_try(&a, contexts[level][test_below(NUM_THREAD_COUNTS)]);
        case_free(&a);
    }
    test_state = seed;
}

static void attention_agrees_with_the_reference(void **state)
{
    (void)state;
    try_cases(case_count(2500), NULL);
}

/* Each dim once for both, once for keys and once for values alone. */
static void set_head_dim(qkv_attention_spec *s, int32_t number)
{
    const int32_t dim = 8 * (1 + number / 3);
    if (number % 3 != 2) s->head_dim_qk = dim;
    if (number % 3 != 1) s->head_dim_vo = dim;
}

static void attention_takes_every_head_dim(void **state)
{
    (void)state;
    try_cases(3 * 64, set_head_dim);
}

static void set_dtypes(qkv_attention_spec *s, int32_t number)
{
    const DLDataType types[] = {QKV_F32, QKV_F16, QKV_BF16, QKV_E4M3, QKV_E5M2, QKV_I8};
    s->dtype_q = types[number % 5];
    s->dtype_kv = types[number / 5 % 6];
    s->dtype_o = types[number / 30 % 5];
}

/* Each mix several times, for decode and prefill tiles differ. */
static void attention_takes_every_mix_of_dtypes(void **state)
{
    (void)state;
    try_cases(5 * 6 * 5, set_dtypes);
}

static void set_group_size(qkv_attention_spec *s, int32_t number)
{
    const int32_t group_size = number < 64 ? number + 1 : 512 >> (number - 64);
    s->num_kv_heads = number < 20 ? 1 + number % 3 : 1;
    s->num_qo_heads = s->num_kv_heads * group_size;
}

static void attention_takes_every_group_size(void **state)
{
    (void)state;
    try_cases(64 + 3, set_group_size);
}

static void set_page_size(qkv_attention_spec *s, int32_t number)
{
    s->page_size = number + 1;
}

static void attention_takes_every_page_size(void **state)
{
    (void)state;
    try_cases(70, set_page_size);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_agrees_with_the_reference),
        cmocka_unit_test(attention_takes_every_head_dim),
        cmocka_unit_test(attention_takes_every_mix_of_dtypes),
        cmocka_unit_test(attention_takes_every_group_size),
        cmocka_unit_test(attention_takes_every_page_size),
    };
    return cmocka_run_group_tests_name("attention_grid", tests, open_contexts, close_contexts);
}
