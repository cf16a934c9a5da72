/* test_attention_edge.c - attention where sizes, strides and positions are extreme.
 * SPDX-License-Identifier: Apache-2.0 */

#include "attention_run.h"

/* Builds the case and tries it on every level. */
static void try_case(qkv_context *ctx, void *user)
{
    case_try(user, ctx);
}

static void try_everywhere(const case_config *config, int32_t num_threads)
{
    attn_case a;
    case_build(&a, config);
    test_every_level(num_threads, try_case, &a);
    case_free(&a);
}

static qkv_attention_spec spec_of(int32_t num_qo_heads, int32_t num_kv_heads, int32_t head_dim,
                                  int32_t page_size, DLDataType dtype)
{
    qkv_attention_spec s = case_spec(num_qo_heads, num_kv_heads, head_dim, page_size);
    s.dtype_q = s.dtype_kv = s.dtype_o = dtype;
    return s;
}

/* The same with unequal dims, keys of a type of their own, and a window unless window_left is -1. */
static qkv_attention_spec spec_of_keys(int32_t num_qo_heads, int32_t num_kv_heads, int32_t dim_qk,
                                       int32_t dim_vo, int32_t page_size, int32_t window_left,
                                       DLDataType dtype_kv)
{
    const DLDataType dtype = dtype_kv.bits >= 16 ? dtype_kv : QKV_BF16;
    qkv_attention_spec s = spec_of(num_qo_heads, num_kv_heads, dim_qk, page_size, dtype);
    s.head_dim_vo = dim_vo;
    s.dtype_kv = dtype_kv;
    s.window_left = window_left;
    s.window_right = -1;
    if (window_left >= 0) s.features |= QKV_FEATURE_WINDOW;
    return s;
}

/* ---- sizes -------------------------------------------------------------------------------- */

static void attention_runs_batches_without_work(void **state)
{
    (void)state;
    static const struct {
        const char *why;
        int32_t num_requests, qo_len, kv_len;
    } rows[] = {
        {"no request at all", 0, 0, 0},
        {"requests of no rows and no keys", 3, 0, 0},
        {"keys, but no rows", 3, 0, 40},
        {"rows, but no keys: zeros and -inf", 3, 2, 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        for (int32_t form = CASE_CSR; form <= CASE_RAGGED; form++) {
            case_config c =
                case_config_init(spec_of(4, 2, 64, form == CASE_RAGGED ? 0 : 16, QKV_F32));
            c.form = form;
            for (int32_t r = 0; r < rows[i].num_requests; r++)
                case_add(&c, rows[i].qo_len, rows[i].kv_len);
            try_everywhere(&c, 2);
        }
    }
}

static void null_data(qkv_context *ctx, void *user)
{
    attn_case *a = user;
    case_op op = case_op_new(ctx, a);
    CASE_OK(a, qkv_attention_plan(op.op, &a->batch, NULL));
    CASE_OK(a, qkv_attention_run(op.op, &a->io, NULL));
    case_op_free(&op);
}

/* What frameworks hand over for tensors of no elements. */
static void attention_takes_null_data_of_empty_tensors(void **state)
{
    (void)state;
    attn_case a;
    case_config c = case_config_init(spec_of(4, 2, 64, 16, QKV_F32));
    case_add(&c, 0, 0);
    case_build(&a, &c);
    a.q.x.t.data = a.o.x.t.data = a.lse.x.t.data = a.kv_indices.x.t.data = NULL;
    test_every_level(2, null_data, &a);
    case_free(&a);
}

static void attention_decodes_one_long_request(void **state)
{
    (void)state;
    static const struct {
        const char *why;
        int32_t num_qo_heads, num_kv_heads, head_dim, page_size, max_workers;
        int64_t max_split_rows;
    } rows[] = {
        {"one KV head, cut for seven workers", 8, 1, 128, 16, 7, 0},
        {"the same, left whole for want of partial rows", 8, 1, 128, 16, 7, 1},
        {"two KV heads, pages of three tokens", 4, 2, 64, 3, 9, 0},
        {"ragged, any dim", 3, 1, 40, 0, 5, 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const DLDataType types[] = {QKV_F32, QKV_BF16};
        for (int t = 0; t < 2; t++) {
            case_config c =
                case_config_init(spec_of(rows[i].num_qo_heads, rows[i].num_kv_heads,
                                         rows[i].head_dim, rows[i].page_size, types[t]));
            c.limits.max_workers = rows[i].max_workers;
            c.limits.max_split_rows = rows[i].max_split_rows;
            case_add(&c, 1, CASE_SANITIZED ? 20000 : 70000);
            try_everywhere(&c, 2);
        }
    }
}

/* What lies past a request's last key, and before a window's first, is NaN. */
static void attention_decodes_from_pages_of_any_size(void **state)
{
    (void)state;
    const struct {
        const char *why;
        int32_t num_qo_heads, num_kv_heads, dim_qk, dim_vo, page_size, window_left;
        DLDataType dtype_kv;
    } rows[] = {
        {"as many keys as a tile of GPUs has", 4, 2, 128, 128, 16, -1, QKV_BF16},
        {"half as many", 8, 1, 128, 128, 8, -1, QKV_BF16},
        {"twice as many, windows that begin within a page", 8, 2, 64, 64, 32, 37, QKV_F16},
        {"neither", 2, 2, 256, 64, 24, 30, QKV_BF16},
        {"too few to copy at once", 4, 2, 128, 128, 4, 21, QKV_BF16},
        {"ragged, a window", 4, 2, 192, 128, 0, 21, QKV_BF16},
        {"8 bits, half as many as a tile has", 8, 2, 128, 128, 16, 50, QKV_E4M3},
        {"8 bits, a quarter, more than 8 rows", 16, 1, 256, 128, 8, -1, QKV_E5M2},
        {"8 bits, more than a tile has", 4, 4, 128, 256, 96, 77, QKV_E4M3},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (int strided = 0; strided < 2; strided++) {
            qkv_attention_spec s = spec_of_keys(rows[i].num_qo_heads, rows[i].num_kv_heads,
                                                rows[i].dim_qk, rows[i].dim_vo, rows[i].page_size,
                                                rows[i].window_left, rows[i].dtype_kv);
            s.kv_layout = test_below(2) ? QKV_NHD : QKV_HND;
            case_config c = case_config_init(s);
            c.strided = strided;
            c.forgets = s.window_left >= 0;
            c.limits.max_qo_len = 1;
            c.limits.max_workers = 5;
            for (int32_t len = 1; len < 600; len += 1 + len / 4) case_add(&c, 1, len);
            try_everywhere(&c, 2);
        }
}

/* Rows of a tile that see nothing of its first keys, a whole block of any kernel's and more. */
static void attention_hides_first_blocks_from_rows(void **state)
{
    (void)state;
    const struct {
        const char *why;
        int32_t num_qo_heads, num_kv_heads, dim_qk, dim_vo, page_size, window_left; /* -1: a mask */
        DLDataType dtype_kv;
    } rows[] = {
        {"each row its own key", 2, 2, 64, 64, 16, 0, QKV_BF16},
        {"a few keys, in pages that begin before them", 2, 2, 128, 128, 64, 3, QKV_BF16},
        {"a few keys, pages of 1", 2, 2, 128, 128, 1, 2, QKV_F16},
        {"a mask", 4, 2, 64, 64, 16, -1, QKV_BF16},
        {"a mask, ragged", 2, 2, 128, 128, 0, -1, QKV_F16},
        {"a mask, fewer keys a block", 2, 1, 256, 256, 16, -1, QKV_BF16},
        {"a mask, unequal dims", 2, 2, 192, 128, 16, -1, QKV_BF16},
        {"a mask, 8 bits", 2, 2, 128, 128, 16, -1, QKV_E4M3},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qkv_attention_spec s =
            spec_of_keys(rows[i].num_qo_heads, rows[i].num_kv_heads, rows[i].dim_qk, rows[i].dim_vo,
                         rows[i].page_size, rows[i].window_left, rows[i].dtype_kv);
        s.mask = rows[i].window_left < 0 ? QKV_MASK_CUSTOM : QKV_MASK_CAUSAL;
        case_config c = case_config_init(s);
        c.hides_first = true;
        c.limits.max_workers = 3;
        case_add(&c, 250, 250);
        case_add(&c, 40, 700);
        try_everywhere(&c, 2);
    }
}

static void attention_runs_one_giant_among_many_tiny(void **state)
{
    (void)state;
    for (int32_t qo_len = 1; qo_len <= 7; qo_len += 6) { /* the giant decodes, or appends */
        case_config c = case_config_init(spec_of(8, 2, 64, 16, QKV_F16));
        c.limits.max_workers = 5;
        c.strided = true;
        for (int i = 0; i < 400; i++) {
            if (i == 170) case_add(&c, qo_len, 30000);
            case_add(&c, (int32_t)test_below(3), (int32_t)test_below(20));
        }
        try_everywhere(&c, 2);
    }
}

static void attention_prefills_a_long_prompt(void **state)
{
    (void)state;
    const int32_t len = CASE_SANITIZED ? 700 : 1500;
    const DLDataType types[] = {QKV_F32, QKV_BF16};
    for (int t = 0; t < 2; t++) {
        case_config c = case_config_init(spec_of(2, 1, 128, 16, types[t]));
        c.limits.max_workers = 3;
        case_add(&c, len, len);
        try_everywhere(&c, 2);
    }
}

static void attention_takes_extreme_sizes(void **state)
{
    (void)state;
    static const struct {
        const char *why;
        int32_t num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, qo_len, kv_len;
    } rows[] = {
        {"as many heads as keys", 300, 300, 8, 8, 4, 2, 300},
        {"one KV head for 71", 71, 1, 64, 64, 16, 1, 100},
        {"one KV head for 128, many rows", 128, 1, 64, 64, 16, 9, 30},
        {"the largest dims", 2, 1, 512, 512, 16, 20, 70},
        {"the smallest", 1, 1, 8, 8, 1, 3, 5},
        {"a wide key and a narrow value", 2, 2, 512, 8, 16, 5, 40},
        {"a narrow key and a wide value", 2, 2, 8, 512, 16, 5, 40},
        {"more rows than 16 bits count", 1, 1, 8, 8, 16, 70000, 20},
        {"a page of more tokens than there are", 2, 1, 64, 64, 65536, 3, 40},
        {"a page for each of many tokens", 2, 1, 64, 64, 1, 1, 20000},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qkv_attention_spec s = spec_of(rows[i].num_qo_heads, rows[i].num_kv_heads,
                                       rows[i].head_dim_qk, rows[i].page_size, QKV_F32);
        s.head_dim_vo = rows[i].head_dim_vo;
        s.mask = rows[i].qo_len > rows[i].kv_len ? QKV_MASK_NONE : QKV_MASK_CAUSAL;
        case_config c = case_config_init(s);
        case_add(&c, rows[i].qo_len, rows[i].kv_len);
        try_everywhere(&c, 2);
    }
}

/* ---- positions ---------------------------------------------------------------------------- */

static void attention_computes_positions_without_overflow(void **state)
{
    (void)state;
    static const struct {
        const char *why;
        int32_t mask, window_left, window_right, qo_pos;
    } rows[] = {
        {"a window wider than any position", QKV_MASK_NONE, INT32_MAX, INT32_MAX, 30},
        {"far behind the keys, sees all", QKV_MASK_CAUSAL, -1, -1, INT32_MAX - 10},
        {"far behind the keys, window reaches back", QKV_MASK_CAUSAL, INT32_MAX - 15, -1,
         INT32_MAX - 10},
        {"far behind the keys, sees none", QKV_MASK_CAUSAL, 100, -1, INT32_MAX - 10},
        {"right edge past the largest number", QKV_MASK_NONE, -1, INT32_MAX, INT32_MAX - 10},
        {"before all keys but the first", QKV_MASK_CAUSAL, -1, -1, 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        for (int32_t qo_len = 1; qo_len <= 10; qo_len += 3) {
            case_config c = case_config_init(spec_of(2, 1, 64, 16, QKV_F32));
            c.spec.mask = rows[i].mask;
            c.spec.features = QKV_FEATURE_WINDOW;
            c.spec.window_left = rows[i].window_left;
            c.spec.window_right = rows[i].window_right;
            c.use_qo_pos = true;
            case_add(&c, qo_len, 40);
            c.qo_pos[0] = rows[i].qo_pos;
            try_everywhere(&c, 1);
        }
    }
}

/* ---- logits ------------------------------------------------------------------------------- */

/* x = -3e4 and lower, or up to 3e4: a maximum that starts at zero, or an exp without one, fails. */
static void attention_takes_logits_far_from_zero(void **state)
{
    (void)state;
    const DLDataType types[] = {QKV_F32, QKV_F16, QKV_BF16};
    for (int i = 0; i < 12; i++) {
        attn_case a;
        case_config c = case_config_init(spec_of(4, 2, 64, 16, types[i % 3]));
        c.q_scale = i % 2 ? 1e-3 : 10;
        c.io_sm_scale = 100;
        c.k_bias = 2;
        case_add(&c, 1, 300);
        case_add(&c, 40, 60);
        case_build(&a, &c);
        if (i >= 6) /* turn q around: all logits become negative */
            for (int64_t j = 0; j < a.q.x.shape[0] * 4 * 64; j++)
                test_put(case_data(&a.q), types[i % 3], j,
                         -test_get(case_data(&a.q), types[i % 3], j));
        attention_ref(&c.spec, &a.batch, &a.io, a.ref_o, a.ref_rows);
        test_every_level(2, try_case, &a);
        case_free(&a);
    }
}

/* Logits of which the largest so far is passed again and again, by a little, by more than any type's weights hold, or by more
 * than f32's do; other rows' fall as far. */
static void attention_takes_logits_that_rise(void **state)
{
    (void)state;
    static const double rises[CASE_RISES] = {0, 5, 8, 10, 40, 12, 300, 280};
    const struct {
        int32_t dim_qk, dim_vo, page_size;
        DLDataType dtype_kv;
    } rows[] = {
        {128, 128, 16, QKV_BF16}, {128, 128, 0, QKV_F16},   {64, 64, 16, QKV_BF16},
        {256, 256, 16, QKV_BF16}, {192, 128, 16, QKV_BF16}, {128, 128, 1, QKV_BF16},
        {128, 128, 16, QKV_E4M3}, {128, 128, 16, QKV_F32},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qkv_attention_spec s = spec_of_keys(4, 2, rows[i].dim_qk, rows[i].dim_vo, rows[i].page_size,
                                            -1, rows[i].dtype_kv);
        case_config c = case_config_init(s);
        c.k_rises = rises;
        c.limits.max_workers = 3;
        case_add(&c, 70, 700);
        case_add(&c, 1, 600);
        case_add(&c, 200, 200);
        try_everywhere(&c, 2);
    }
}

/* ---- strides ------------------------------------------------------------------------------ */

/* A copy with one axis' stride set and the others packed. Only touched pages of the block count, so
 * strides of gigabytes are fine. */
typedef struct spread {
    test_tensor x;
    char *block;
    size_t bytes;
} spread;

static void spread_copy(const spread *to, const case_view *from, bool back)
{
    const size_t size = test_bytes(from->x.t.dtype);
    const int64_t *shape = from->x.shape, ndim = from->x.t.ndim;
    int64_t count = 1;
    for (int i = 0; i < ndim; i++) count *= shape[i];
    for (int64_t n = 0; n < count; n++) {
        int64_t rest = n, a = 0, b = 0;
        for (int64_t i = ndim - 1; i >= 0; i--) {
            a += rest % shape[i] * from->x.strides[i];
            b += rest % shape[i] * to->x.strides[i];
            rest /= shape[i];
        }
        char *p = (char *)case_data(from) + a * (int64_t)size;
        char *q = (char *)to->x.t.data + b * (int64_t)size;
        memcpy(back ? p : q, back ? q : p, size);
    }
}

/* False where the system refuses so large a mapping. */
static bool spread_new(spread *to, const case_view *from, int axis, int64_t stride)
{
    const int64_t size = (int64_t)test_bytes(from->x.t.dtype), n = from->x.shape[axis];
    int64_t packed = 1;
    test_tensor_init(&to->x, NULL, from->x.t.dtype, from->x.t.ndim, from->x.shape);
    for (int i = from->x.t.ndim - 1; i >= 0; i--) {
        to->x.strides[i] = i == axis ? stride : packed;
        if (i != axis) packed *= from->x.shape[i];
    }
    to->bytes = (size_t)(((n - 1) * stride + packed) * size);
    to->block = test_map(to->bytes);
    if (!to->block) {
        printf("skipped: no mapping of %zu bytes\n", to->bytes);
        return false;
    }
    to->x.t.data = to->block;
    spread_copy(to, from, false);
    return true;
}

enum { SPREAD_Q, SPREAD_K, SPREAD_V, SPREAD_O, SPREAD_LSE };
typedef struct spread_case {
    attn_case *a;
    int which;
    const spread *to;
} spread_case;

/* Runs with the one tensor replaced; o and lse are then read back and judged as always. */
static void run_spread(qkv_context *ctx, void *user)
{
    const spread_case *s = user;
    attn_case *a = s->a;
    qkv_attention_io io = a->io;
    DLTensor t = s->to->x.t;
    if (s->which == SPREAD_Q) io.q = &t;
    if (s->which == SPREAD_K) io.k = &t;
    if (s->which == SPREAD_V) io.v = &t;
    if (s->which == SPREAD_O) io.o = &t;
    if (s->which == SPREAD_LSE) io.lse = &t;
    case_op op = case_op_new(ctx, a);
    CASE_OK(a, qkv_attention_plan(op.op, &a->batch, NULL));
    CASE_OK(a, qkv_attention_run(op.op, &io, NULL));
    if (s->which == SPREAD_O) spread_copy(s->to, &a->o, true);
    if (s->which == SPREAD_LSE) spread_copy(s->to, &a->lse, true);
    case_collect(a);
    case_check(a, qkv_context_device_name(ctx));
    case_op_free(&op);
}

static void attention_honours_every_stride(void **state)
{
    (void)state;
    const int64_t huge = ((int64_t)1 << 31) + 24;
    const struct {
        const char *why;
        int which, axis;
        int64_t stride;
    } rows[] = {
        {"q rows further apart than 32 bits reach", SPREAD_Q, 0, huge},
        {"q heads", SPREAD_Q, 1, huge},
        {"pages of k", SPREAD_K, 0, huge},
        {"tokens of k", SPREAD_K, 1, huge},
        {"heads of k", SPREAD_K, 2, huge},
        {"pages of v", SPREAD_V, 0, huge},
        {"tokens of v", SPREAD_V, 1, huge},
        {"heads of v", SPREAD_V, 2, huge},
        {"rows of o", SPREAD_O, 0, huge},
        {"heads of o", SPREAD_O, 1, huge},
        {"rows of lse", SPREAD_LSE, 0, huge},
        {"heads of lse", SPREAD_LSE, 1, huge},
    };
    for (int32_t qo_len = 1; qo_len <= 7; qo_len += 6) { /* decode and prefill */
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
            attn_case a;
            case_config c = case_config_init(spec_of(4, 2, 64, 5, qo_len > 1 ? QKV_BF16 : QKV_F32));
            case_add(&c, 1, 4);
            case_add(&c, qo_len, 8);
            case_build(&a, &c);
            const case_view *views[] = {&a.q, &a.k, &a.v, &a.o, &a.lse};
            spread to;
            if (spread_new(&to, views[rows[i].which], rows[i].axis, rows[i].stride)) {
                test_every_level(2, run_spread,
                                 &(spread_case){.a = &a, .which = rows[i].which, .to = &to});
                test_unmap(to.block, to.bytes);
            }
            case_free(&a);
        }
    }
}

/* Broadcast axes have stride 0; an axis of one element may have any. */
static void attention_takes_broadcast_and_idle_strides(void **state)
{
    (void)state;
    for (int32_t qo_len = 1; qo_len <= 20; qo_len += 19) {
        attn_case a;
        case_config c = case_config_init(spec_of(4, 2, 64, 16, QKV_F32));
        case_add(&c, qo_len, 50);
        case_build(&a, &c);
        a.q.x.t.strides = a.q.x.strides;
        a.k.x.t.strides = a.k.x.strides;
        a.v.x.t.strides = a.v.x.strides;
        a.q.x.strides[1] = 0;
        a.k.x.strides[2] = 0;
        a.v.x.strides[1] = 0;
        attention_ref(&c.spec, &a.batch, &a.io, a.ref_o, a.ref_rows);
        test_every_level(2, try_case, &a);
        case_free(&a);

        c.spec.num_qo_heads = c.spec.num_kv_heads = 1;
        c.qo_len[0] = 1;
        case_build(&a, &c);
        const int64_t far = (int64_t)1 << 60;
        a.q.x.t.strides = (int64_t[]){far, far, 1};
        a.k.x.t.strides = (int64_t[]){a.k.x.strides[0], a.k.x.strides[1], far, 1};
        a.v.x.t.strides = (int64_t[]){a.v.x.strides[0], a.v.x.strides[1], far, 1};
        a.o.x.t.strides = (int64_t[]){far, far, 1};
        a.lse.x.t.strides = (int64_t[]){far, far};
        test_every_level(2, try_case, &a);
        case_free(&a);
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_runs_batches_without_work),
        cmocka_unit_test(attention_takes_null_data_of_empty_tensors),
        cmocka_unit_test(attention_decodes_one_long_request),
        cmocka_unit_test(attention_decodes_from_pages_of_any_size),
        cmocka_unit_test(attention_hides_first_blocks_from_rows),
        cmocka_unit_test(attention_runs_one_giant_among_many_tiny),
        cmocka_unit_test(attention_prefills_a_long_prompt),
        cmocka_unit_test(attention_takes_extreme_sizes),
        cmocka_unit_test(attention_computes_positions_without_overflow),
        cmocka_unit_test(attention_takes_logits_far_from_zero),
        cmocka_unit_test(attention_takes_logits_that_rise),
        cmocka_unit_test(attention_honours_every_stride),
        cmocka_unit_test(attention_takes_broadcast_and_idle_strides),
    };
    return cmocka_run_group_tests_name("attention_edge", tests, NULL, NULL);
}
