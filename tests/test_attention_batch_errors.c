/* test_attention_batch_errors.c - plan names the array, the request and the entry that is wrong,
 * and the operator goes on to work.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_errors.h"

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
        int32_t value, request, entry; /* of that request; -1 = need not be named */
    } rows[] = {
        {"first not 0", CASE_CSR, "qo_indptr", 0, 1, -1, 0},
        {"first not 0", CASE_CSR, "qo_indptr", 0, -1, -1, 0},
        {"falls", CASE_CSR, "qo_indptr", 3, 7, 2, -1},
        {"negative", CASE_CSR, "qo_indptr", 2, -1, 1, -1},
        {"more rows than max_qo_len", CASE_CSR, "qo_indptr", 5, 23, 4, -1},
        {"more rows than max_tokens", CASE_CSR, "qo_indptr", 5, 31, -1, -1},
        {"far too many rows", CASE_CSR, "qo_indptr", 5, INT32_MAX, -1, -1},
        {"negative first", CASE_CSR, "kv_indptr", 0, -1, -1, 0},
        {"falls", CASE_CSR, "kv_indptr", 2, 2, 1, -1},
        {"far below", CASE_CSR, "kv_indptr", 4, INT32_MIN, 3, -1},
        {"past the end of kv_indices", CASE_CSR, "kv_indptr", 5, 14, -1, -1},
        {"far past it", CASE_CSR, "kv_indptr", 5, INT32_MAX, -1, -1},
        {"negative page", CASE_CSR, "kv_indices", 4, -1, 1, 1},
        {"page beyond the pool", CASE_CSR, "kv_indices", 4, POOL, 1, 1},
        {"page far beyond the pool", CASE_CSR, "kv_indices", 12, INT32_MAX, 4, 2},
        {"the first page", CASE_CSR, "kv_indices", 0, INT32_MIN, 0, 0},
        {"last page empty", CASE_CSR, "kv_last_page_len", 1, 0, 1, -1},
        {"last page negative", CASE_CSR, "kv_last_page_len", 2, -5, 2, -1},
        {"last page too full", CASE_CSR, "kv_last_page_len", 4, 17, 4, -1},
        {"far too full", CASE_CSR, "kv_last_page_len", 0, INT32_MAX, 0, -1},
        {"negative page", CASE_TABLE, "block_table", -1, -1, 1, 2},
        {"page beyond the pool", CASE_TABLE, "block_table", -1, POOL, 1, 2},
        {"negative length", CASE_TABLE, "kv_lens", 3, -1, 3, -1},
        {"longer than its row of the table", CASE_TABLE, "kv_lens", 2, 1000, 2, -1},
        {"longer than max_kv_len", CASE_TABLE, "kv_lens", 1, 95, 1, -1},
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

/* Of the arrays that a batch has, one must be named; and of those it has not, none. */
static void expect_own_arrays(const attn_case *a, const char *why)
{
    const char *message = qkv_last_error();
    const bool csr = strstr(message, "kv_indptr") || strstr(message, "kv_indices") ||
                     strstr(message, "kv_last_page_len");
    const bool table = strstr(message, "kv_lens") || strstr(message, "block_table");
    const bool own = a->config.form == CASE_TABLE ? table : csr;
    const bool other = a->config.form == CASE_TABLE ? csr : table;
    if (other || !(own || strstr(message, "qo_indptr")))
        fail_msg("%s: expected the name of an array of this form, got: %s", why, message);
}

static void attention_plan_refuses_batches_beyond_the_limits(void **state)
{
    (void)state;
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
    for (size_t i = 0; i < 2 * COUNT(rows); i++) {
        const wrong_field *row = &rows[i / 2];
        attn_case a;
        build(&a, i % 2 ? CASE_TABLE : CASE_CSR);
        const qkv_attention_limits enough = a.limits;
        if (strcmp(row->name, "max_tokens") == 0) a.limits.max_qo_len = 0;
        set_field(&a.limits, row);
        case_op op = case_op_new(ctx, &a);
        EXPECT_FAIL(QKV_ERR_INVALID, "", qkv_attention_plan(op.op, &a.batch, NULL));
        expect_own_arrays(&a, row->why);
        const int64_t limit = (int64_t)row->value;
        if (!message_has(qkv_last_error(), limit) && !message_has(qkv_last_error(), limit - 1))
            fail_msg("%s: expected the limit in: %s", row->why, qkv_last_error());
        EXPECT_FAIL(QKV_ERR_INVALID, "plan", qkv_attention_run(op.op, &a.io, NULL));
        case_op_free(&op);
        a.limits = enough;
        case_try(&a, ctx);
        case_free(&a);
    }
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

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_plan_names_array_request_and_entry),
        cmocka_unit_test(attention_plan_names_the_wrong_array),
        cmocka_unit_test(attention_plan_refuses_batches_beyond_the_limits),
        cmocka_unit_test(attention_plan_wants_exactly_one_form),
    };
    return cmocka_run_group_tests_name("attention_batch_errors", tests, open_context,
                                       close_context);
}
