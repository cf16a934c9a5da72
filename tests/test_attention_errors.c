/* test_attention_errors.c - every wrong argument of attention is refused by its name, the outputs
 * stay untouched, and the operator goes on to work. SPDX-License-Identifier: Apache-2.0 */
#include "attention_case.h"

#define COUNT(rows) (sizeof(rows) / sizeof *(rows))

static qkv_context *ctx;

/* The message contains number n as a word of its own, before its (file:line). */
static bool message_has(const char *message, int64_t n)
{
    const char *end = strrchr(message, '(');
    char text[24];
    const int len = snprintf(text, sizeof text, "%lld", (long long)n);
    for (const char *p = message; (p = strstr(p, text)) && (!end || p < end); p++) {
        const bool starts = p == message || !strchr("0123456789-", p[-1]);
        if (starts && !strchr("0123456789", p[len])) return true;
    }
    return false;
}

/* Status and the argument's name at the beginning of the message. */
static void expect_refusal(const char *why, qkv_status got, qkv_status status, const char *name)
{
    if (got != status)
        fail_msg("%s: expected %s, got %s: %s", why, qkv_status_name(status), qkv_status_name(got),
                 qkv_last_error());
    if (!strstr(qkv_last_error(), name))
        fail_msg("%s: expected a message about %s, got: %s", why, name, qkv_last_error());
}

/* ---- specs and limits --------------------------------------------------------------------- */

/* One field of a struct set to a wrong value; the type says which kind of field. */
typedef struct wrong_field {
    const char *why, *name;
    size_t offset;
    char type; /* i: int32, u: uint32, l: int64, f: float */
    double value;
    int32_t features; /* of the spec */
} wrong_field;

static void set_field(void *s, const wrong_field *w)
{
    char *p = (char *)s + w->offset;
    if (w->type == 'i') memcpy(p, &(int32_t){(int32_t)w->value}, 4);
    if (w->type == 'u') memcpy(p, &(uint32_t){(uint32_t)w->value}, 4);
    if (w->type == 'l') memcpy(p, &(int64_t){(int64_t)w->value}, 8);
    if (w->type == 'f') memcpy(p, &(float){(float)w->value}, 4);
}

static const qkv_attention_limits plain_limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 4,
                                                  .max_tokens = 64, .max_kv_len = 256,
                                                  .max_pages = 64};

/* All three calls that take a spec say the same. */
static void expect_no_operator(const char *why, qkv_status status, const char *name,
                               const qkv_attention_spec *spec, const qkv_attention_limits *limits)
{
    qkv_workspace_size size = {1, 2, 3};
    expect_refusal(why, qkv_attention_workspace_size(ctx, spec, limits, &size), status, name);
    assert_true(size.plan_bytes == 1 && size.scratch_bytes == 2 && size.pinned_bytes == 3);
    expect_refusal(why, qkv_attention_can_run(ctx, spec, limits, NULL, 0), status, name);
    qkv_attention *op = (qkv_attention *)&size;
    expect_refusal(why, qkv_attention_create(ctx, spec, limits, NULL, &op), status, name);
    assert_null(op);
}

static void attention_names_the_wrong_field_of_a_spec(void **state)
{
    (void)state;
    enum { CAP = QKV_FEATURE_SOFT_CAP, WINDOW = QKV_FEATURE_WINDOW };
#define F(field) #field, offsetof(qkv_attention_spec, field)
    static const wrong_field rows[] = {
        {"no struct_size", F(struct_size), 'u', 0, 0},
        {"an unknown flag", F(flags), 'u', 1, 0},
        {"another", F(flags), 'u', 1 << 20, 0},
        {"no query heads", F(num_qo_heads), 'i', 0, 0},
        {"negative", F(num_qo_heads), 'i', -4, 0},
        {"not a multiple of the KV heads", F(num_qo_heads), 'i', 7, 0},
        {"fewer than the KV heads", F(num_qo_heads), 'i', 1, 0},
        {"no KV heads", F(num_kv_heads), 'i', 0, 0},
        {"negative", F(num_kv_heads), 'i', -2, 0},
        {"no dim", F(head_dim_qk), 'i', 0, 0},
        {"not a multiple of 8", F(head_dim_qk), 'i', 68, 0},
        {"too large", F(head_dim_qk), 'i', 520, 0},
        {"negative", F(head_dim_qk), 'i', -8, 0},
        {"no dim", F(head_dim_vo), 'i', 0, 0},
        {"not a multiple of 8", F(head_dim_vo), 'i', 4, 0},
        {"too large", F(head_dim_vo), 'i', 1024, 0},
        {"negative", F(head_dim_vo), 'i', -64, 0},
        {"negative", F(page_size), 'i', -1, 0},
        {"unknown layout", F(kv_layout), 'i', 2, 0},
        {"unknown layout", F(kv_layout), 'i', -1, 0},
        {"unknown mask", F(mask), 'i', 2, 0},
        {"unknown mask", F(mask), 'i', -1, 0},
        {"unknown feature", F(features), 'i', 2, 0},
        {"unknown feature", F(features), 'i', 1 << 30, 0},
        {"negative", F(sm_scale), 'f', -0.5, 0},
        {"not a number", F(sm_scale), 'f', NAN, 0},
        {"infinite", F(sm_scale), 'f', INFINITY, 0},
        {"a cap without the feature", F(logits_soft_cap), 'f', 30, 0},
        {"a window without the feature", F(window_left), 'i', 5, 0},
        {"a window without the feature", F(window_right), 'i', 5, 0},
        {"feature without a cap", F(logits_soft_cap), 'f', 0, CAP},
        {"negative", F(logits_soft_cap), 'f', -30, CAP},
        {"not a number", F(logits_soft_cap), 'f', NAN, CAP},
        {"infinite", F(logits_soft_cap), 'f', INFINITY, CAP},
        {"below -1", F(window_left), 'i', -2, WINDOW},
        {"below -1", F(window_right), 'i', -100, WINDOW},
    };
#undef F
    for (size_t i = 0; i < COUNT(rows); i++) {
        qkv_attention_spec s = case_spec(4, 2, 64, 16);
        s.features = rows[i].features;
        if (s.features & CAP) s.logits_soft_cap = 30;
        if (s.features & WINDOW) s.window_left = s.window_right = 5;
        set_field(&s, &rows[i]);
        expect_no_operator(rows[i].why, QKV_ERR_INVALID, rows[i].name, &s, &plain_limits);
    }
}

static void attention_names_the_wrong_dtype_of_a_spec(void **state)
{
    (void)state;
    const struct {
        DLDataType dtype;
        qkv_status status; /* a dtype that other operators take is not wrong, but has no kernel */
    } rows[] = {
        {QKV_I32, QKV_ERR_UNSUPPORTED},        {QKV_E4M3, QKV_ERR_UNSUPPORTED},
        {{kDLFloat, 64, 1}, QKV_ERR_INVALID},  {{kDLFloat, 32, 2}, QKV_ERR_INVALID},
        {{kDLBfloat, 16, 0}, QKV_ERR_INVALID}, {{0, 0, 0}, QKV_ERR_INVALID},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        qkv_attention_spec s[3];
        for (int j = 0; j < 3; j++) s[j] = case_spec(4, 2, 64, 16);
        s[0].dtype_q = s[1].dtype_kv = s[2].dtype_o = rows[i].dtype;
        expect_no_operator("dtype", rows[i].status, "dtype_q", &s[0], &plain_limits);
        expect_no_operator("dtype", rows[i].status, "dtype_kv", &s[1], &plain_limits);
        expect_no_operator("dtype", rows[i].status, "dtype_o", &s[2], &plain_limits);
    }
}

static void attention_names_the_wrong_field_of_limits(void **state)
{
    (void)state;
#define F(field) #field, offsetof(qkv_attention_limits, field)
    static const wrong_field rows[] = {
        {"no struct_size", F(struct_size), 'u', 0, 0},
        {"no request", F(max_requests), 'i', 0, 0},
        {"negative", F(max_requests), 'i', -1, 0},
        {"no token", F(max_tokens), 'l', 0, 0},
        {"negative", F(max_tokens), 'l', -1, 0},
        {"past 32-bit offsets", F(max_tokens), 'l', 3e9, 0},
        {"negative", F(max_qo_len), 'i', -1, 0},
        {"negative", F(max_workers), 'i', -1, 0},
        {"no key", F(max_kv_len), 'l', 0, 0},
        {"negative", F(max_kv_len), 'l', -1, 0},
        {"past 32-bit lengths", F(max_kv_len), 'l', 3e9, 0},
        {"no page", F(max_pages), 'l', 0, 0},
        {"negative", F(max_pages), 'l', -1, 0},
        {"past 32-bit offsets", F(max_pages), 'l', 3e9, 0},
        {"negative", F(max_split_rows), 'l', -1, 0},
        {"negative", F(pool_pages), 'l', -1, 0},
    };
#undef F
    const qkv_attention_spec s = case_spec(4, 2, 64, 16);
    for (size_t i = 0; i < COUNT(rows); i++) {
        qkv_attention_limits l = plain_limits;
        set_field(&l, &rows[i]);
        expect_no_operator(rows[i].why, QKV_ERR_INVALID, rows[i].name, &s, &l);
    }
}

/* Sizes that no memory holds come out as errors or as they are, never wrapped around. */
static void attention_sizes_do_not_wrap(void **state)
{
    (void)state;
    const qkv_attention_spec s = case_spec(1 << 20, 1 << 20, 512, 16);
    for (int shift = 20; shift < 63; shift++) {
        qkv_attention_limits l = plain_limits;
        l.max_workers = shift < 31 ? 1 << shift : INT32_MAX;
        l.max_requests = shift < 31 ? 1 << shift : INT32_MAX;
        l.max_tokens = l.max_requests;
        l.max_pages = l.max_requests;
        l.max_split_rows = (int64_t)1 << shift;
        qkv_workspace_size size;
        const qkv_status status = qkv_attention_workspace_size(ctx, &s, &l, &size);
        if (status == QKV_OK)
            assert_true(size.plan_bytes > (uint64_t)l.max_requests &&
                        size.scratch_bytes / 2048 >= (uint64_t)1 << shift);
        else
            assert_true(status == QKV_ERR_INVALID || status == QKV_ERR_MEMORY);
    }
}

static void attention_refuses_null_and_newer_structs(void **state)
{
    (void)state;
    const qkv_attention_spec s = case_spec(4, 2, 64, 16);
    qkv_attention *op;
    qkv_workspace_size size;
    EXPECT_FAIL(QKV_ERR_INVALID, "ctx", qkv_attention_create(NULL, &s, &plain_limits, NULL, &op));
    EXPECT_FAIL(QKV_ERR_INVALID, "spec", qkv_attention_create(ctx, NULL, &plain_limits, NULL, &op));
    EXPECT_FAIL(QKV_ERR_INVALID, "limits", qkv_attention_create(ctx, &s, NULL, NULL, &op));
    EXPECT_FAIL(QKV_ERR_INVALID, "out", qkv_attention_create(ctx, &s, &plain_limits, NULL, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "ctx",
                qkv_attention_workspace_size(NULL, &s, &plain_limits, &size));
    EXPECT_FAIL(QKV_ERR_INVALID, "out", qkv_attention_workspace_size(ctx, &s, &plain_limits, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "attention", qkv_attention_plan(NULL, NULL, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "attention", qkv_attention_run(NULL, NULL, NULL));
    qkv_attention_destroy(NULL);

    struct {
        qkv_attention_spec known;
        int64_t newer;
    } tail = {.known = s};
    tail.known.struct_size = sizeof tail;
    EXPECT_OK(qkv_attention_workspace_size(ctx, &tail.known, &plain_limits, &size));
    tail.newer = 1;
    expect_no_operator("a newer field is set", QKV_ERR_INVALID, "spec", &tail.known, &plain_limits);
    struct {
        qkv_attention_limits known;
        int64_t newer;
    } limits = {.known = plain_limits, .newer = 1};
    limits.known.struct_size = sizeof limits;
    expect_no_operator("a newer field is set", QKV_ERR_INVALID, "limits", &s, &limits.known);
}

static void attention_can_run_lists_every_row(void **state)
{
    (void)state;
    const qkv_attention_spec s = case_spec(4, 2, 128, 16);
    char reasons[4096] = "", cut[12];
    EXPECT_OK(qkv_attention_can_run(ctx, &s, &plain_limits, reasons, sizeof reasons));
    if (!strstr(reasons, "attention.") || !strstr(reasons, "runs"))
        fail_msg("expected a line for each row and one that runs, got: %s", reasons);
    memset(cut, 'x', sizeof cut);
    EXPECT_OK(qkv_attention_can_run(ctx, &s, &plain_limits, cut, sizeof cut - 1));
    assert_int_equal(cut[sizeof cut - 2], 0);
    assert_int_equal(cut[sizeof cut - 1], 'x');
    assert_memory_equal(cut, reasons, sizeof cut - 2);
}

/* ---- batches ------------------------------------------------------------------------------ */

/* Five requests over pages of 16: the third has no row, the fourth no key. */
static void build(attn_case *a, int32_t form)
{
    case_config c = case_config_init(case_spec(4, 2, 64, form == CASE_RAGGED ? 0 : 16));
    c.form = form;
    c.limits.max_requests = 5;
    c.limits.max_tokens = 30;
    c.limits.max_qo_len = 12;
    c.limits.max_kv_len = 100;
    c.limits.max_pages = 13;
    case_add(&c, 1, 40);
    case_add(&c, 7, 90);
    case_add(&c, 0, 5);
    case_add(&c, 2, 0);
    case_add(&c, 3, 33);
    case_build(a, &c);
    a->limits.pool_pages = a->config.spec.page_size ? a->k.x.shape[0] : 0;
}

/* Plans and runs as if nothing had happened. */
static void expect_still_works(attn_case *a, qkv_attention *op)
{
    case_expect_poison(&a->o, "o");
    case_expect_poison(&a->lse, "lse");
    EXPECT_OK(qkv_attention_plan(op, &a->batch, NULL));
    case_run(a, op);
    case_check(a, qkv_context_device_name(ctx));
}

/* The arrays by the names that messages use. */
static case_view *array_of(attn_case *a, const char *name)
{
    return strcmp(name, "qo_indptr") == 0          ? &a->qo_indptr
           : strcmp(name, "kv_indptr") == 0        ? &a->kv_indptr
           : strcmp(name, "kv_indices") == 0       ? &a->kv_indices
           : strcmp(name, "kv_last_page_len") == 0 ? &a->kv_last_page_len
           : strcmp(name, "block_table") == 0      ? &a->block_table
           : strcmp(name, "kv_lens") == 0          ? &a->kv_lens
                                                   : &a->qo_pos;
}

/* One entry of an index array set to a wrong value. */
static void attention_plan_names_array_request_and_entry(void **state)
{
    (void)state;
    enum { POOL = -1000 }; /* value: the number of pages in the pool */
    static const struct {
        const char *why;
        int32_t form;
        const char *name;
        int64_t at;
        int32_t value, request, entry; /* request, entry: -1 = need not be named */
    } rows[] = {
        {"first not 0", CASE_CSR, "qo_indptr", 0, 1, -1, 0},
        {"first not 0", CASE_CSR, "qo_indptr", 0, -1, -1, 0},
        {"falls", CASE_CSR, "qo_indptr", 3, 7, 2, -1},
        {"negative", CASE_CSR, "qo_indptr", 2, -1, 1, -1},
        {"more rows than max_qo_len", CASE_CSR, "qo_indptr", 5, 23, 4, -1},
        {"more rows than max_tokens", CASE_CSR, "qo_indptr", 5, 31, -1, -1},
        {"far too many rows", CASE_CSR, "qo_indptr", 5, INT32_MAX, 4, -1},
        {"negative first", CASE_CSR, "kv_indptr", 0, -1, -1, 0},
        {"falls", CASE_CSR, "kv_indptr", 2, 2, 1, -1},
        {"far below", CASE_CSR, "kv_indptr", 4, INT32_MIN, 3, -1},
        {"past the end of kv_indices", CASE_CSR, "kv_indptr", 5, 13, 4, -1},
        {"far past it", CASE_CSR, "kv_indptr", 5, INT32_MAX, 4, -1},
        {"negative page", CASE_CSR, "kv_indices", 4, -1, 1, 4},
        {"page beyond the pool", CASE_CSR, "kv_indices", 4, POOL, 1, 4},
        {"page far beyond the pool", CASE_CSR, "kv_indices", 12, INT32_MAX, 4, 12},
        {"the first page", CASE_CSR, "kv_indices", 0, INT32_MIN, 0, 0},
        {"last page empty", CASE_CSR, "kv_last_page_len", 1, 0, 1, -1},
        {"last page negative", CASE_CSR, "kv_last_page_len", 2, -5, 2, -1},
        {"last page too full", CASE_CSR, "kv_last_page_len", 4, 17, 4, -1},
        {"far too full", CASE_CSR, "kv_last_page_len", 0, INT32_MAX, 0, -1},
        {"negative page", CASE_TABLE, "block_table", -1, -1, 1, 2},
        {"page beyond the pool", CASE_TABLE, "block_table", -1, POOL, 1, 2},
        {"negative length", CASE_TABLE, "kv_lens", 3, -1, 3, -1},
        {"longer than its row of the table", CASE_TABLE, "kv_lens", 2, 1000, 2, -1},
        {"longer than max_kv_len", CASE_TABLE, "kv_lens", 2, 101, 2, -1},
        {"the longest length", CASE_TABLE, "kv_lens", 2, INT32_MAX, 2, -1},
        {"negative first", CASE_RAGGED, "kv_indptr", 0, -1, -1, 0},
        {"falls", CASE_RAGGED, "kv_indptr", 2, 39, 1, -1},
        {"longer than max_kv_len", CASE_RAGGED, "kv_indptr", 5, 300, 4, -1},
        {"far below", CASE_RAGGED, "kv_indptr", 1, INT32_MIN, 0, -1},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        attn_case a;
        build(&a, rows[i].form);
        if (strcmp(rows[i].name, "kv_lens") == 0) a.limits.max_pages = 100;
        case_op op = case_op_new(ctx, &a);
        int32_t *x = case_ints(array_of(&a, rows[i].name));
        if (rows[i].form == CASE_TABLE && rows[i].at < 0)
            x += rows[i].request * a.block_table.x.strides[0] + rows[i].entry;
        else
            x += rows[i].at;
        const int32_t saved = *x;
        *x = rows[i].value == POOL ? (int32_t)a.k.x.shape[0] : rows[i].value;
        expect_refusal(rows[i].why, qkv_attention_plan(op.op, &a.batch, NULL), QKV_ERR_INVALID,
                       rows[i].name);
        if (rows[i].request >= 0 && !message_has(qkv_last_error(), rows[i].request))
            fail_msg("%s: expected request %d in: %s", rows[i].why, rows[i].request,
                     qkv_last_error());
        if (rows[i].entry >= 0 && !message_has(qkv_last_error(), rows[i].entry))
            fail_msg("%s: expected entry %d in: %s", rows[i].why, rows[i].entry, qkv_last_error());
        *x = saved;
        expect_still_works(&a, op.op);
        case_op_free(&op);
        case_free(&a);
    }
}

/* What can be wrong with a tensor that its content does not show. */
typedef enum fault {
    ABSENT,
    DTYPE,
    LANES,
    NDIM_LESS,
    NDIM_MORE,
    AXIS_0,
    AXIS_1,
    AXIS_2,
    AXIS_3,
    DEVICE,
    NO_DATA,
    STRIDE_LAST,
    MISALIGNED
} fault;

/* A changed copy that shares shape and strides with nobody. */
typedef struct faulty {
    test_tensor x;
    DLTensor *t; /* NULL = ABSENT */
} faulty;

static void break_tensor(faulty *f, const test_tensor *from, fault what, int64_t by)
{
    f->x = *from;
    f->x.t.shape = f->x.shape;
    f->x.t.strides = f->x.strides;
    f->t = what == ABSENT ? NULL : &f->x.t;
    const int ndim = f->x.t.ndim;
    if (what == DTYPE)
        f->x.t.dtype = from->t.dtype.code == 0    ? QKV_I64
                       : from->t.dtype.bits == 32 ? QKV_F16
                                                  : QKV_F32;
    if (what == LANES) f->x.t.dtype.lanes = 2;
    if (what == NDIM_LESS) f->x.t.ndim--;
    if (what == NDIM_MORE) {
        f->x.shape[ndim] = f->x.strides[ndim] = 1;
        f->x.t.ndim++;
    }
    if (what >= AXIS_0 && what <= AXIS_3) f->x.shape[what - AXIS_0] += by;
    if (what == DEVICE) f->x.t.device = (DLDevice){kDLCUDA, 0};
    if (what == NO_DATA) f->x.t.data = NULL;
    if (what == STRIDE_LAST) f->x.strides[ndim - 1] = 2;
    if (what == MISALIGNED) f->x.t.byte_offset = 1;
}

static const DLTensor **slot_of(qkv_kv_index *index, qkv_attention_batch *batch, const char *name)
{
    return strcmp(name, "qo_indptr") == 0          ? &index->qo_indptr
           : strcmp(name, "kv_indptr") == 0        ? &index->kv_indptr
           : strcmp(name, "kv_indices") == 0       ? &index->kv_indices
           : strcmp(name, "kv_last_page_len") == 0 ? &index->kv_last_page_len
           : strcmp(name, "block_table") == 0      ? &index->block_table
           : strcmp(name, "kv_lens") == 0          ? &index->kv_lens
                                                   : &batch->qo_pos;
}

static void attention_plan_names_the_wrong_array(void **state)
{
    (void)state;
    static const struct {
        int32_t form;
        const char *name;
        fault what;
        int64_t by;
    } rows[] = {
        {CASE_CSR, "qo_indptr", ABSENT, 0},
        {CASE_CSR, "qo_indptr", AXIS_0, -6}, /* not even the first entry */
        {CASE_CSR, "kv_indptr", ABSENT, 0},
        {CASE_CSR, "kv_indptr", AXIS_0, -1},
        {CASE_CSR, "kv_indptr", AXIS_0, 1},
        {CASE_CSR, "kv_indices", AXIS_0, -1},
        {CASE_CSR, "kv_last_page_len", AXIS_0, -1},
        {CASE_CSR, "kv_last_page_len", AXIS_0, 1},
        {CASE_CSR, "kv_last_page_len", ABSENT, 0},
        {CASE_CSR, "qo_pos", AXIS_0, -1},
        {CASE_CSR, "qo_pos", AXIS_0, 1},
        {CASE_TABLE, "kv_lens", ABSENT, 0},
        {CASE_TABLE, "kv_lens", AXIS_0, -1},
        {CASE_TABLE, "kv_lens", AXIS_0, 1},
        {CASE_TABLE, "block_table", AXIS_0, -1},
        {CASE_TABLE, "block_table", AXIS_0, 1},
        {CASE_RAGGED, "kv_indptr", ABSENT, 0},
        {CASE_RAGGED, "kv_indptr", AXIS_0, -1},
    };
    static const fault any[] = {DTYPE,  LANES,   NDIM_LESS,   NDIM_MORE,
                                DEVICE, NO_DATA, STRIDE_LAST, MISALIGNED};
    static const struct {
        int32_t form;
        const char *name;
    } arrays[] = {{CASE_CSR, "qo_indptr"},  {CASE_CSR, "kv_indptr"},
                  {CASE_CSR, "kv_indices"}, {CASE_CSR, "kv_last_page_len"},
                  {CASE_CSR, "qo_pos"},     {CASE_TABLE, "block_table"},
                  {CASE_TABLE, "kv_lens"},  {CASE_RAGGED, "kv_indptr"}};
    for (size_t i = 0; i < COUNT(rows) + COUNT(arrays) * COUNT(any); i++) {
        const size_t j = i - COUNT(rows);
        const bool listed = i < COUNT(rows);
        const char *name = listed ? rows[i].name : arrays[j / COUNT(any)].name;
        const fault what = listed ? rows[i].what : any[j % COUNT(any)];
        attn_case a;
        build(&a, listed ? rows[i].form : arrays[j / COUNT(any)].form);
        for (int32_t *qo_pos = case_ints_new(&a.qo_pos, 1, (int64_t[]){5}, false), r = 0; r < 5;
             r++)
            qo_pos[r] = 0;
        case_op op = case_op_new(ctx, &a);
        qkv_kv_index index = a.index;
        qkv_attention_batch batch = a.batch;
        batch.levels = &index;
        faulty f;
        break_tensor(&f, &array_of(&a, name)->x, what, listed ? rows[i].by : 0);
        *slot_of(&index, &batch, name) = f.t;
        char why[64];
        snprintf(why, sizeof why, "%s, fault %d", name, (int)what);
        expect_refusal(why, qkv_attention_plan(op.op, &batch, NULL), QKV_ERR_INVALID, name);
        expect_still_works(&a, op.op);
        case_op_free(&op);
        case_free(&a);
    }
}

static void attention_plan_refuses_batches_beyond_the_limits(void **state)
{
    (void)state;
    attn_case a;
    build(&a, CASE_CSR);
#define F(field) #field, offsetof(qkv_attention_limits, field)
    static const wrong_field rows[] = {
        {"one request too many", F(max_requests), 'i', 4, 0},
        {"one token too many", F(max_tokens), 'l', 12, 0},
        {"one row too many in a request", F(max_qo_len), 'i', 6, 0},
        {"one key too many in a request", F(max_kv_len), 'l', 89, 0},
        {"one page too many", F(max_pages), 'l', 12, 0},
        {"one page fewer in the pool", F(pool_pages), 'l', 12, 0},
    };
#undef F
    for (size_t i = 0; i < COUNT(rows); i++) {
        attn_case tight = a;
        set_field(&tight.limits, &rows[i]);
        if (strcmp(rows[i].name, "max_tokens") == 0) tight.limits.max_qo_len = 0;
        case_op op = case_op_new(ctx, &tight);
        /* the message tells the limit's name or that of the array, and the limit */
        EXPECT_FAIL(QKV_ERR_INVALID, "", qkv_attention_plan(op.op, &a.batch, NULL));
        if (!message_has(qkv_last_error(), (int64_t)rows[i].value) &&
            !message_has(qkv_last_error(), (int64_t)rows[i].value - 1))
            fail_msg("%s: expected the limit %g in: %s", rows[i].why, rows[i].value,
                     qkv_last_error());
        EXPECT_FAIL(QKV_ERR_INVALID, "plan", qkv_attention_run(op.op, &a.io, NULL));
        case_op_free(&op);
    }
    case_free(&a);
}

static void attention_plan_wants_exactly_one_form(void **state)
{
    (void)state;
    attn_case csr, table, ragged;
    build(&csr, CASE_CSR);
    build(&table, CASE_TABLE);
    build(&ragged, CASE_RAGGED);
    case_op paged = case_op_new(ctx, &csr), flat = case_op_new(ctx, &ragged);
    qkv_kv_index index = csr.index;
    qkv_attention_batch batch = csr.batch;
    batch.levels = &index;
    index.block_table = table.index.block_table;
    EXPECT_FAIL(QKV_ERR_INVALID, "block_table", qkv_attention_plan(paged.op, &batch, NULL));
    index.kv_lens = table.index.kv_lens;
    EXPECT_FAIL(QKV_ERR_INVALID, "block_table", qkv_attention_plan(paged.op, &batch, NULL));
    index = ragged.index;
    EXPECT_FAIL(QKV_ERR_INVALID, "kv_in", qkv_attention_plan(paged.op, &batch, NULL));
    index = csr.index;
    EXPECT_FAIL(QKV_ERR_INVALID, "kv_", qkv_attention_plan(flat.op, &batch, NULL));
    index = table.index;
    EXPECT_FAIL(QKV_ERR_INVALID, "block_table", qkv_attention_plan(flat.op, &batch, NULL));
    index = (qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = csr.index.qo_indptr};
    EXPECT_FAIL(QKV_ERR_INVALID, "kv_", qkv_attention_plan(paged.op, &batch, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "kv_", qkv_attention_plan(flat.op, &batch, NULL));

    index = csr.index;
    EXPECT_FAIL(QKV_ERR_INVALID, "batch", qkv_attention_plan(paged.op, NULL, NULL));
    batch.levels = NULL;
    EXPECT_FAIL(QKV_ERR_INVALID, "levels", qkv_attention_plan(paged.op, &batch, NULL));
    batch.levels = &index;
    batch.num_levels = 0;
    EXPECT_FAIL(QKV_ERR_INVALID, "levels", qkv_attention_plan(paged.op, &batch, NULL));
    batch.num_levels = 2;
    EXPECT_FAIL(QKV_ERR_INVALID, "levels", qkv_attention_plan(paged.op, &batch, NULL));
    batch.num_levels = 1;
    batch.struct_size = 0;
    EXPECT_FAIL(QKV_ERR_INVALID, "struct_size", qkv_attention_plan(paged.op, &batch, NULL));
    batch.struct_size = sizeof batch;
    index.struct_size = 0;
    EXPECT_FAIL(QKV_ERR_INVALID, "struct_size", qkv_attention_plan(paged.op, &batch, NULL));
    expect_still_works(&csr, paged.op);
    expect_still_works(&ragged, flat.op);
    case_op_free(&paged), case_op_free(&flat);
    case_free(&csr), case_free(&table), case_free(&ragged);
}

/* ---- layers ------------------------------------------------------------------------------- */

/* The call fails about name, and nothing was written. */
static void expect_run_refusal(attn_case *a, qkv_attention *op, const qkv_attention_io *io,
                               const char *why, const char *name)
{
    expect_refusal(why, qkv_attention_run(op, io, NULL), QKV_ERR_INVALID, name);
    case_expect_poison(&a->o, "o");
    case_expect_poison(&a->lse, "lse");
}

static void attention_run_names_the_wrong_tensor(void **state)
{
    (void)state;
    static const struct {
        char tensor; /* q k v o, l for lse */
        fault what;
        int64_t by;
    } rows[] = {
        {'q', ABSENT, 0},  {'q', AXIS_0, -1}, {'q', AXIS_0, -13}, {'q', AXIS_1, -1},
        {'q', AXIS_1, 1},  {'q', AXIS_2, -8}, {'q', AXIS_2, 8},   {'k', ABSENT, 0},
        {'k', AXIS_0, -9}, {'k', AXIS_1, -1}, {'k', AXIS_1, 1},   {'k', AXIS_2, -1},
        {'k', AXIS_2, 2},  {'k', AXIS_3, -8}, {'k', AXIS_3, 8},   {'v', AXIS_0, -9},
        {'v', AXIS_1, -1}, {'v', AXIS_2, 1},  {'v', AXIS_3, -8},  {'v', AXIS_3, 8},
        {'o', ABSENT, 0},  {'o', AXIS_0, -1}, {'o', AXIS_1, -1},  {'o', AXIS_1, 1},
        {'o', AXIS_2, -8}, {'o', AXIS_2, 8},  {'l', AXIS_0, -1},  {'l', AXIS_1, -1},
        {'l', AXIS_1, 1},
    };
    static const fault any[] = {DTYPE,  LANES,   NDIM_LESS,   NDIM_MORE,
                                DEVICE, NO_DATA, STRIDE_LAST, MISALIGNED};
    static const char tensors[] = "qkvol";
    attn_case a;
    build(&a, CASE_CSR);
    case_op op = case_op_new(ctx, &a);
    expect_run_refusal(&a, op.op, &a.io, "no plan yet", "plan");
    EXPECT_OK(qkv_attention_plan(op.op, &a.batch, NULL));
    for (size_t i = 0; i < COUNT(rows) + 5 * COUNT(any); i++) {
        const size_t j = i - COUNT(rows);
        const bool listed = i < COUNT(rows);
        const char tensor = listed ? rows[i].tensor : tensors[j / COUNT(any)];
        const fault what = listed ? rows[i].what : any[j % COUNT(any)];
        if (tensor == 'l' && what == STRIDE_LAST) continue; /* any strides */
        const case_view *view = tensor == 'q'   ? &a.q
                                : tensor == 'k' ? &a.k
                                : tensor == 'v' ? &a.v
                                : tensor == 'o' ? &a.o
                                                : &a.lse;
        faulty f;
        break_tensor(&f, &view->x, what, listed ? rows[i].by : 0);
        qkv_attention_io io = a.io;
        if (tensor == 'q') io.q = f.t;
        if (tensor == 'k') io.k = f.t;
        if (tensor == 'v') io.v = f.t;
        if (tensor == 'o') io.o = f.t;
        if (tensor == 'l') io.lse = f.t;
        char why[64], name[8];
        snprintf(why, sizeof why, "%c, fault %d by %d", tensor, (int)what,
                 listed ? (int)rows[i].by : 0);
        snprintf(name, sizeof name, "%s:", tensor == 'l' ? "lse" : (char[]){tensor, 0});
        expect_run_refusal(&a, op.op, &io, why, name);
    }
    qkv_attention_io io = a.io;
    io.v = NULL; /* then k must hold both */
    expect_run_refusal(&a, op.op, &io, "v missing", "k:");
    expect_still_works(&a, op.op);
    case_op_free(&op);
    case_free(&a);
}

static void attention_run_wants_all_pages_of_the_plan(void **state)
{
    (void)state;
    for (int32_t form = CASE_CSR; form <= CASE_RAGGED; form++) {
        attn_case a;
        build(&a, form);
        a.limits.pool_pages = 0; /* so that plan cannot know */
        int64_t needed = form == CASE_RAGGED ? case_ints(&a.kv_indptr)[5] : 0;
        for (int32_t i = 0; form != CASE_RAGGED && i < a.first_page[5]; i++)
            if (a.pages[i] >= needed) needed = a.pages[i] + 1;
        case_op op = case_op_new(ctx, &a);
        EXPECT_OK(qkv_attention_plan(op.op, &a.batch, NULL));
        for (int which = 0; which < 2; which++) {
            faulty f;
            const case_view *view = which ? &a.v : &a.k;
            break_tensor(&f, &view->x, AXIS_0, needed - view->x.shape[0]);
            qkv_attention_io io = a.io;
            *(which ? &io.v : &io.k) = f.t;
            EXPECT_OK(qkv_attention_run(op.op, &io, NULL));
            case_collect(&a);
            case_check(&a, qkv_context_device_name(ctx));
            f.x.shape[0]--;
            expect_run_refusal(&a, op.op, &io, "one page short", which ? "v:" : "k:");
        }
        case_op_free(&op);
        case_free(&a);
    }
}

static void attention_run_refuses_overlap(void **state)
{
    (void)state;
    attn_case a;
    build(&a, CASE_CSR);
    case_op op = case_op_new(ctx, &a);
    EXPECT_OK(qkv_attention_plan(op.op, &a.batch, NULL));
    const case_view *inputs[] = {&a.q, &a.k, &a.v};
    const char *names[] = {"q", "k", "v"};
    for (int i = 0; i < 3; i++) {
        test_tensor o;
        test_tensor_init(&o, inputs[i]->x.owned, QKV_F32, 3, a.o.x.shape);
        qkv_attention_io io = a.io;
        io.o = &o.t;
        expect_run_refusal(&a, op.op, &io, names[i], "o:");
        /* by one element, at either end */
        o.t.data = (char *)inputs[i]->x.owned + inputs[i]->bytes - 4;
        expect_run_refusal(&a, op.op, &io, "the last element", "o:");
        o.t.data = (char *)inputs[i]->x.owned - a.o.bytes + 4;
        expect_run_refusal(&a, op.op, &io, "the first element", "o:");
    }
    expect_still_works(&a, op.op);
    case_op_free(&op);
    case_free(&a);
}

static void attention_run_names_the_wrong_parameter(void **state)
{
    (void)state;
#define F(field) #field, offsetof(qkv_attention_io, field)
    enum { CAP = QKV_FEATURE_SOFT_CAP, WINDOW = QKV_FEATURE_WINDOW };
    static const wrong_field rows[] = {
        {"no struct_size", F(struct_size), 'u', 0, 0},
        {"negative", F(sm_scale), 'f', -1, 0},
        {"not a number", F(sm_scale), 'f', NAN, 0},
        {"infinite", F(sm_scale), 'f', INFINITY, 0},
        {"a cap without the feature", F(logits_soft_cap), 'f', 30, 0},
        {"negative", F(logits_soft_cap), 'f', -30, CAP},
        {"not a number", F(logits_soft_cap), 'f', NAN, CAP},
        {"infinite", F(logits_soft_cap), 'f', INFINITY, CAP},
        {"a window without the feature", F(set_window), 'i', 1, 0},
        {"neither 0 nor 1", F(set_window), 'i', 2, WINDOW},
        {"wider to the left", F(window_left), 'i', 6, WINDOW},
        {"open to the left", F(window_left), 'i', -1, WINDOW},
        {"below -1", F(window_left), 'i', -2, WINDOW},
        {"wider to the right", F(window_right), 'i', 4, WINDOW},
        {"open to the right", F(window_right), 'i', -1, WINDOW},
    };
#undef F
    for (size_t i = 0; i < COUNT(rows); i++) {
        attn_case a;
        build(&a, CASE_CSR);
        qkv_attention_spec *s = &a.config.spec;
        s->features = rows[i].features;
        s->logits_soft_cap = s->features & CAP ? 20 : 0;
        s->window_left = s->features & WINDOW ? 5 : 0;
        s->window_right = s->features & WINDOW ? 3 : 0;
        attention_ref(s, &a.batch, &a.io, a.ref_o, a.ref_rows);
        case_op op = case_op_new(ctx, &a);
        EXPECT_OK(qkv_attention_plan(op.op, &a.batch, NULL));
        qkv_attention_io io = a.io;
        if (strncmp(rows[i].name, "window", 6) == 0) io.set_window = 1;
        set_field(&io, &rows[i]);
        expect_run_refusal(&a, op.op, &io, rows[i].why, rows[i].name);
        expect_still_works(&a, op.op);
        case_op_free(&op);
        case_free(&a);
    }
    attn_case a;
    build(&a, CASE_CSR);
    case_op op = case_op_new(ctx, &a);
    EXPECT_OK(qkv_attention_plan(op.op, &a.batch, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "io", qkv_attention_run(op.op, NULL, NULL));
    case_op_free(&op);
    case_free(&a);
}

static int open_context(void **state)
{
    (void)state;
    return qkv_context_create(&(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .num_threads = 2},
                              &ctx) == QKV_OK
               ? 0
               : -1;
}

static int close_context(void **state)
{
    (void)state;
    qkv_context_destroy(ctx);
    return 0;
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_names_the_wrong_field_of_a_spec),
        cmocka_unit_test(attention_names_the_wrong_dtype_of_a_spec),
        cmocka_unit_test(attention_names_the_wrong_field_of_limits),
        cmocka_unit_test(attention_sizes_do_not_wrap),
        cmocka_unit_test(attention_refuses_null_and_newer_structs),
        cmocka_unit_test(attention_can_run_lists_every_row),
        cmocka_unit_test(attention_plan_names_array_request_and_entry),
        cmocka_unit_test(attention_plan_names_the_wrong_array),
        cmocka_unit_test(attention_plan_refuses_batches_beyond_the_limits),
        cmocka_unit_test(attention_plan_wants_exactly_one_form),
        cmocka_unit_test(attention_run_names_the_wrong_tensor),
        cmocka_unit_test(attention_run_wants_all_pages_of_the_plan),
        cmocka_unit_test(attention_run_refuses_overlap),
        cmocka_unit_test(attention_run_names_the_wrong_parameter),
    };
    return cmocka_run_group_tests_name("attention_errors", tests, open_context, close_context);
}
