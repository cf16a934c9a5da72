/* test_attention_form_errors.c - faulty levels, masks, sparse blocks and layer tensors are refused by
 * name, and the former plan stays in force.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_errors.h"

/* Two levels over three requests of 2, 1 and 3 rows: what a case may break before the plan. */
typedef struct forms {
    int32_t shared_qo[3], shared_len[2], shared_pages[2], qo[4], len[3], pages[6];
    int64_t mask_indptr[4];
    uint8_t mask[64];
    int32_t bsr_indptr[7], bsr_indices[8];
    qkv_kv_index levels[2];
    qkv_attention_batch batch;
} forms;

static const forms good = {.shared_qo = {0, 3, 6},
                           .shared_len = {16, 5},
                           .shared_pages = {0, 1},
                           .qo = {0, 2, 3, 6},
                           .len = {9, 20, 16},
                           .pages = {2, 9, 3, 4, 5, 9},
                           .mask_indptr = {0, 3, 6, 12},
                           .bsr_indptr = {0, 1, 3, 4, 5, 6, 8},
                           .bsr_indices = {0, 0, 1, 0, 0, 1, 0, 1}};

typedef void (*breaking)(forms *f);

static void break_nothing(forms *f)
{
    (void)f;
}
static void break_level_count(forms *f)
{
    f->batch.num_levels = 3;
}
static void break_nesting(forms *f)
{
    f->shared_qo[1] = 1;
}
static void break_rows(forms *f)
{
    f->shared_qo[2] = 3;
}
static void break_page(forms *f)
{
    f->shared_pages[1] = 77;
}
static void break_total(forms *f)
{
    f->shared_len[0] = 16, f->len[1] = 30;
}
static void break_mask_order(forms *f)
{
    f->mask_indptr[1] = 7;
}
static void break_mask_room(forms *f)
{
    f->mask_indptr[3] = 7;
}
static void break_mask_end(forms *f)
{
    f->mask_indptr[3] = 65;
}
static void break_mask_absent(forms *f)
{
    f->batch.mask_bits = NULL;
}
static void break_block_order(forms *f)
{
    f->bsr_indices[2] = 0;
}
static void break_block_range(forms *f)
{
    f->bsr_indices[0] = 2;
}
static void break_block_sign(forms *f)
{
    f->bsr_indices[3] = -1;
}
static void break_block_offsets(forms *f)
{
    f->bsr_indptr[2] = 0;
}
static void break_block_end(forms *f)
{
    f->bsr_indptr[6] = 9;
}
static void break_block_size(forms *f)
{
    f->levels[1].bsr_cols = 0;
}
static void break_detect(forms *f)
{
    f->batch.detect_shared_prefix = 2;
}
static void break_detect_levels(forms *f)
{
    f->batch.detect_shared_prefix = 1;
}

enum { LEVELS = 1, MASK = 2, BLOCKS = 4 };

static qkv_status plan(qkv_attention *op, int kind, breaking change)
{
    forms f = good;
    const int first = kind & LEVELS ? 0 : 1;
    test_tensor t[12];
#define INTS(i, x) &test_tensor_init(&t[i], x, QKV_I32, TEST_SHAPE(COUNT(x)))->t
#define TABLE(i, x, rows)                                                                          \
    &test_tensor_init(&t[i], x, QKV_I32, TEST_SHAPE(rows, (int64_t)COUNT(x) / (rows)))->t
    f.levels[0] = (qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = INTS(0, f.shared_qo),
                                 .block_table = TABLE(1, f.shared_pages, 2),
                                 .kv_lens = INTS(2, f.shared_len)};
    f.levels[1] = (qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = INTS(3, f.qo),
                                 .block_table = TABLE(4, f.pages, 3), .kv_lens = INTS(5, f.len)};
    f.batch = (qkv_attention_batch){QKV_ATTENTION_BATCH_INIT, .num_levels = 2 - first,
                                    .levels = &f.levels[first]};
    if (kind & MASK) {
        f.batch.mask_bits = &test_tensor_init(&t[6], f.mask, QKV_U8, TEST_SHAPE(64))->t;
        f.batch.mask_indptr = &test_tensor_init(&t[7], f.mask_indptr, QKV_I64, TEST_SHAPE(4))->t;
    }
    if (kind & BLOCKS) { /* a row block for each row, blocks of 8 keys */
        f.levels[1].bsr_rows = 1;
        f.levels[1].bsr_cols = 8;
        f.levels[1].bsr_indptr = TABLE(8, f.bsr_indptr, 1);
        f.levels[1].bsr_indices = INTS(9, f.bsr_indices);
    }
    change(&f);
    return qkv_attention_plan(op, &f.batch, NULL);
}

static void attention_names_the_bad_form(void **state)
{
    (void)state;
    static const struct {
        const char *why, *name;
        int kind;
        breaking change;
    } rows[] = {
        {"nothing", NULL, LEVELS, break_nothing},
        {"nothing", NULL, LEVELS | MASK, break_nothing},
        {"nothing", NULL, BLOCKS, break_nothing},
        {"more levels than limits say", "num_levels", LEVELS, break_level_count},
        {"a group ends inside a request", "qo_indptr", LEVELS, break_nesting},
        {"fewer rows in a level", "qo_indptr", LEVELS, break_rows},
        {"a page beyond the pool", "levels[0]: block_table", LEVELS, break_page},
        {"more keys over all levels than max_kv_len", "levels", LEVELS, break_total},
        {"mask offsets that fall", "mask_indptr", MASK, break_mask_order},
        {"too few mask bytes", "mask_indptr", MASK, break_mask_room},
        {"mask bytes beyond the end", "mask_bits", MASK, break_mask_end},
        {"no mask", "mask_bits", MASK, break_mask_absent},
        {"blocks twice", "bsr_indices", BLOCKS, break_block_order},
        {"a block beyond the keys", "bsr_indices", BLOCKS, break_block_range},
        {"a negative block", "bsr_indices", BLOCKS, break_block_sign},
        {"offsets that fall", "bsr_indptr", BLOCKS, break_block_offsets},
        {"more entries than there are", "bsr_indptr", BLOCKS, break_block_end},
        {"blocks without columns", "bsr_cols", BLOCKS, break_block_size},
        {"a strange switch", "detect_shared_prefix", 0, break_detect},
        {"detection with levels", "detect_shared_prefix", LEVELS, break_detect_levels},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        qkv_attention_spec spec = case_spec(4, 2, 64, 16);
        if (rows[i].kind & MASK) spec.mask = QKV_MASK_CUSTOM;
        const qkv_attention_limits limits = {
            QKV_ATTENTION_LIMITS_INIT, .max_requests = 3,  .max_tokens = 6,
            .max_kv_len = 40,          .max_pages = 8,     .max_levels = 2,
            .pool_pages = 10,          .max_row_blocks = 6};
        qkv_attention *op;
        EXPECT_OK(qkv_attention_create(ctx, &spec, &limits, NULL, &op));
        const qkv_status status = plan(op, rows[i].kind, rows[i].change);
        if (rows[i].name)
            expect_refusal(rows[i].why, status, QKV_ERR_INVALID, rows[i].name);
        else
            EXPECT_OK(status);
        EXPECT_OK(plan(op, rows[i].kind, break_nothing));
        qkv_attention_destroy(op);
    }
}

/* Tensors and scales that a layer must, or must not, have. */
static void attention_names_the_bad_extra_of_a_layer(void **state)
{
    (void)state;
    float slopes[4] = {0}, zero[2] = {1, 0};
    const DLTensor *per_head = TENSOR(slopes, QKV_F32, 4), *short_one = TENSOR(slopes, QKV_F32, 3);
    attn_case a;
    case_config c = case_config_init(case_spec(4, 2, 64, 16));
    case_add(&c, 1, 20);
    case_build(&a, &c);
    const struct {
        const char *name;
        int32_t features;
        uint32_t flags;
        const DLTensor *slopes, *sink;
        qkv_scale k_scale;
    } rows[] = {
        {"alibi_slopes", 0, 0, per_head, NULL, {0, NULL}},
        {"alibi_slopes", QKV_FEATURE_ALIBI, 0, NULL, NULL, {0, NULL}},
        {"alibi_slopes", QKV_FEATURE_ALIBI, 0, short_one, NULL, {0, NULL}},
        {"sink", 0, 0, NULL, per_head, {0, NULL}},
        {"sink", 0, QKV_ATTENTION_HAS_SINK, NULL, NULL, {0, NULL}},
        {"sink", 0, QKV_ATTENTION_HAS_SINK, NULL, short_one, {0, NULL}},
        {"k_scale", 0, 0, NULL, NULL, {-1, NULL}},
        {"k_scale", 0, 0, NULL, NULL, {INFINITY, NULL}},
        {"k_scale: expected [1] or [2], got [4]", 0, 0, NULL, NULL, {0, per_head}},
        {"k_scale: expected > 0, got 0 (head 1)", 0, 0, NULL, NULL, {0, TENSOR(zero, QKV_F32, 2)}},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        a.config.spec.features = rows[i].features;
        a.config.spec.flags = rows[i].flags;
        case_op op = case_op_new(ctx, &a);
        EXPECT_OK(qkv_attention_plan(op.op, &a.batch, NULL));
        qkv_attention_io io = a.io;
        io.alibi_slopes = rows[i].slopes;
        io.sink = rows[i].sink;
        io.k_scale = rows[i].k_scale;
        expect_refusal("layer", qkv_attention_run(op.op, &io, NULL), QKV_ERR_INVALID, rows[i].name);
        case_expect_poison(&a.o, "o");
        case_op_free(&op);
    }
    a.config.spec.features = 0;
    a.config.spec.flags = 0;
    case_op op = case_op_new(ctx, &a);
    EXPECT_OK(qkv_attention_plan(op.op, &a.batch, NULL));
    test_tensor o = a.o.x; /* all heads in one place */
    o.t.shape = o.shape, o.t.strides = o.strides;
    o.strides[1] = 0;
    qkv_attention_io io = a.io;
    io.o = &o.t;
    expect_refusal("overlap", qkv_attention_run(op.op, &io, NULL), QKV_ERR_INVALID, "o: expected");
    case_op_free(&op);
    case_free(&a);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_names_the_bad_form),
        cmocka_unit_test(attention_names_the_bad_extra_of_a_layer),
    };
    return cmocka_run_group_tests(tests, open_context, close_context);
}
