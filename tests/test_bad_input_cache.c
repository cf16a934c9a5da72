/* test_bad_input_cache.c - every fault that a tensor can have, in every place of the calls that write
 * a paged cache; and what only they can be asked wrongly.
 * SPDX-License-Identifier: Apache-2.0 */
#include "bad_input.h"

static const qkv_rope_spec rope = {QKV_ROPE_SPEC_INIT};

/* Two requests of 3 and 5 keys on pages of 4, of which 1 and 2 are new. */
static const int32_t qo_indptr[] = {0, 1, 3}, kv_indptr[] = {0, 1, 3}, kv_indices[] = {2, 0, 1};
static const int32_t kv_last_page_len[] = {3, 1}, block_table[] = {2, -1, 0, 1}, kv_lens[] = {3, 5};
static const int32_t positions[] = {0, 4, 1}, slots[] = {5, -1, 11}, src[] = {0, 2}, dst[] = {1, 3};
static const int64_t slots64[] = {5, INT64_MIN, 11};
static const float scales[] = {1, 2, 1, 2};

/* ---- the calls ------------------------------------------------------------------------------ */

static qkv_status run_append(DLTensor *const *t)
{
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = t[4], .kv_indptr = t[5],
                                .kv_indices = t[6], .kv_last_page_len = t[7]};
    return qkv_kv_append(ctx, t[0], t[1], QKV_NHD, t[2], t[3], &index, t[8], NULL, NULL);
}

static qkv_status run_append_table(DLTensor *const *t)
{
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = t[3], .block_table = t[4],
                                .kv_lens = t[5]};
    const qkv_kv_append_options options = {
        QKV_KV_APPEND_OPTIONS_INIT,
        .rope = &rope,
        .q = t[6],
        .q_out = t[7],
        .k_scale = {.tensor = t[8]},
        .v_scale = {.tensor = t[9]},
        .q_scale = {.tensor = t[10]},
    };
    return qkv_kv_append(ctx, t[0], NULL, QKV_HND, t[1], t[2], &index, NULL, &options, NULL);
}

static qkv_status run_append_slots(DLTensor *const *t)
{
    const qkv_kv_append_options options = {QKV_KV_APPEND_OPTIONS_INIT, .rope = &rope, .q = t[5],
                                           .q_out = t[6], .positions = t[7]};
    return qkv_kv_append_slots(ctx, t[0], t[1], QKV_NHD, t[2], t[3], t[4], &options, NULL);
}

static qkv_status run_append_slots64(DLTensor *const *t)
{
    return qkv_kv_append_slots(ctx, t[0], t[1], QKV_NHD, t[2], t[3], t[4], NULL, NULL);
}

static qkv_status run_copy(DLTensor *const *t)
{
    return qkv_kv_copy_pages(ctx, t[0], t[1], t[2], t[3], NULL);
}

static qkv_status run_copy_both(DLTensor *const *t)
{
    return qkv_kv_copy_pages(ctx, t[0], NULL, t[1], t[2], NULL);
}

/* ---- entries -------------------------------------------------------------------------------- */

static const bad_entry csr_entries[] = {
    {"qo_indptr", 0, 1, NULL},
    {"qo_indptr", 0, -1, NULL},
    {"qo_indptr", 1, 4, NULL},
    {"qo_indptr", 1, INT32_MIN, NULL},
    {"qo_indptr", 2, 4, NULL},
    {"qo_indptr", 2, INT32_MAX, NULL},
    {"kv_indptr", 0, -1, NULL},
    {"kv_indptr", 1, 4, NULL},
    {"kv_indptr", 1, INT32_MIN, NULL},
    {"kv_indptr", 2, 4, "kv_indices"},
    {"kv_indptr", 2, INT32_MAX, "kv_indices"},
    {"kv_indices", 0, -1, NULL},
    {"kv_indices", 0, INT32_MIN, NULL},
    {"kv_indices", 1, 3, NULL},
    {"kv_indices", 2, INT32_MAX, NULL},
    {"kv_last_page_len", 0, 0, NULL},
    {"kv_last_page_len", 1, 5, NULL},
    {"kv_last_page_len", 1, INT32_MIN, NULL},
    {"kv_last_page_len", 1, INT32_MAX, NULL},
    {"positions", 0, 3, NULL},
    {"positions", 1, -1, NULL},
    {"positions", 1, INT32_MIN, NULL},
    {"positions", 2, INT32_MAX, NULL},
    {0},
};

static const bad_entry table_entries[] = {
    {"qo_indptr", 1, -1, NULL},
    {"qo_indptr", 2, 4, NULL},
    {"block_table", 0, 3, NULL},
    {"block_table", 0, INT32_MAX, NULL},
    {"block_table", 3, -1, NULL},
    {"block_table", 3, INT32_MIN, NULL},
    {"kv_lens", 0, -1, NULL},
    {"kv_lens", 0, 0, "qo_indptr"}, /* no room for the new row */
    {"kv_lens", 1, 9, NULL},
    {"kv_lens", 1, INT32_MAX, NULL},
    {"kv_lens", 1, INT32_MIN, NULL},
    {"k_scale", 0, 0, NULL},
    {"k_scale", 1, -1, NULL},
    {"v_scale", 0, NAN, NULL},
    {"v_scale", 1, INFINITY, NULL},
    {"q_scale", 3, -INFINITY, NULL},
    {0},
};

static const bad_entry slot_entries[] = {
    {"slot_mapping", 0, 12, NULL},
    {"slot_mapping", 2, INT32_MAX, NULL},
    {0},
};

static const bad_entry slot64_entries[] = {
    {"slot_mapping", 0, 12, NULL},
    {"slot_mapping", 1, 0x1p62, NULL},
    {0},
};

static const bad_entry copy_entries[] = {
    {"src", 0, -1, NULL},
    {"src", 1, 4, NULL},
    {"src", 1, 3, "dst"},
    {"src", 0, INT32_MIN, NULL},
    {"src", 1, INT32_MAX, NULL},
    {"dst", 0, -1, NULL},
    {"dst", 1, 4, NULL},
    {"dst", 1, 1, NULL},
    {"dst", 0, INT32_MIN, NULL},
    {"dst", 1, INT32_MAX, NULL},
    {0},
};

/* ---- tables --------------------------------------------------------------------------------- */

enum { AXIS_0 = 1, INNER_AXES = 30 }; /* bits */

static const bad_call calls[] = {
    {.what = "kv_append",
     .run = run_append,
     .entries = csr_entries,
     .args = {ARG("k_cache", F32, SHAPE(3, 4, 2, 8), .output = true, .also = "v_cache k"),
              ARG("v_cache", F32, SHAPE(3, 4, 2, 8), .output = true, .optional = true, .also = "v"),
              ARG("k", F32, SHAPE(3, 2, 8), .also = "v"), ARG("v", F32, SHAPE(3, 2, 8)),
              ARG("qo_indptr", I32, SHAPE(3), .init = qo_indptr, .also = "kv_indptr",
                  .longer = AXIS_0),
              ARG("kv_indptr", I32, SHAPE(3), .init = kv_indptr),
              ARG("kv_indices", I32, SHAPE(3), .init = kv_indices, .longer = AXIS_0),
              ARG("kv_last_page_len", I32, SHAPE(2), .init = kv_last_page_len),
              ARG("positions", I32, SHAPE(3), .init = positions, .optional = true)}},
    {.what = "kv_append with options", /* a combined cache, whose page size and pages are free */
     .run = run_append_table,
     .entries = table_entries,
     .args = {ARG("k_cache", F16, SHAPE(3, 2, 2, 4, 8), .output = true, .also = "k block_table",
                  .longer = AXIS_0 | 8, .shorter = 8),
              ARG("k", F32, SHAPE(3, 2, 8), .also = "v"), ARG("v", F32, SHAPE(3, 2, 8)),
              ARG("qo_indptr", I32, SHAPE(3), .init = qo_indptr, .also = "block_table",
                  .longer = AXIS_0),
              ARG("block_table", I32, SHAPE(2, 2), .init = block_table, .longer = 2,
                  .also = "kv_lens"),
              ARG("kv_lens", I32, SHAPE(2), .init = kv_lens),
              ARG("q", BF16, SHAPE(3, 4, 8), .also = "q_out"),
              ARG("q_out", F32, SHAPE(3, 4, 8), .output = true),
              ARG("k_scale", F32, SHAPE(2), .init = scales, .optional = true, .shorter = AXIS_0),
              ARG("v_scale", F32, SHAPE(2), .init = scales, .optional = true, .shorter = AXIS_0),
              ARG("q_scale", F32, SHAPE(4), .init = scales, .optional = true)}},
    {.what = "kv_append_slots",
     .run = run_append_slots,
     .entries = slot_entries,
     .args = {ARG("k_cache", E4M3, SHAPE(3, 4, 2, 8), .output = true, .also = "v_cache k"),
              ARG("v_cache", I8, SHAPE(3, 4, 2, 8), .output = true, .optional = true, .also = "v"),
              ARG("k", F16, SHAPE(3, 2, 8), .also = "v"), ARG("v", F32, SHAPE(3, 2, 8)),
              ARG("slot_mapping", I32, SHAPE(3), .init = slots),
              ARG("q", F32, SHAPE(3, 4, 8), .also = "q_out"),
              ARG("q_out", E4M3, SHAPE(3, 4, 8), .output = true),
              ARG("options.positions", I32, SHAPE(3), .init = positions)}},
    {.what = "kv_append_slots, 64 bits",
     .run = run_append_slots64,
     .entries = slot64_entries,
     .args = {ARG("k_cache", BF16, SHAPE(3, 4, 2, 8), .output = true, .also = "v_cache k"),
              ARG("v_cache", F32, SHAPE(3, 4, 2, 16), .output = true, .optional = true,
                  .also = "v"),
              ARG("k", BF16, SHAPE(3, 2, 8), .also = "v"), ARG("v", F32, SHAPE(3, 2, 16)),
              ARG("slot_mapping", I64, SHAPE(3), .init = slots64)}},
    {.what = "kv_copy_pages",
     .run = run_copy,
     .entries = copy_entries,
     .args = {ARG("k_cache", F32, SHAPE(4, 4, 2, 8), .output = true, .also = "v_cache",
                  .longer = INNER_AXES, .shorter = INNER_AXES, .four_or_five = true),
              ARG("v_cache", I8, SHAPE(4, 4, 2, 8), .output = true, .optional = true,
                  .longer = INNER_AXES, .shorter = INNER_AXES, .four_or_five = true),
              ARG("src", I32, SHAPE(2), .init = src, .also = "dst"),
              ARG("dst", I32, SHAPE(2), .init = dst)}},
    {.what = "kv_copy_pages, combined",
     .run = run_copy_both,
     .entries = copy_entries,
     .args = {ARG("k_cache", U64, SHAPE(4, 2, 4, 2, 8), .output = true, .also = "src dst",
                  .longer = AXIS_0 | INNER_AXES, .shorter = INNER_AXES, .four_or_five = true),
              ARG("src", I32, SHAPE(2), .init = src, .also = "dst"),
              ARG("dst", I32, SHAPE(2), .init = dst)}},
};

static void cache_calls_name_the_faulty_tensor(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(calls); i++) bad_check(&calls[i]);
}

/* Sizes that no memory has, of pools without an element. */
static void cache_calls_take_no_time_for_pages_of_nothing(void **state)
{
    (void)state;
    int32_t from[] = {0, INT32_MAX}, to[] = {1, INT32_MAX - 1}, slot[] = {0};
    float row[8] = {0};
    DLTensor *const pool = TENSOR(NULL, QKV_F32, INT64_C(1) << 58, 1, 0, 1);
    EXPECT_OK(
        qkv_kv_copy_pages(ctx, pool, NULL, TENSOR(from, QKV_I32, 2), TENSOR(to, QKV_I32, 2), NULL));
    DLTensor *const slots_of = TENSOR(NULL, QKV_F32, 0, INT64_C(1) << 40, 1, 8);
    EXPECT_FAIL(QKV_ERR_INVALID, "k_cache: expected a page_size of 1 to 2^24",
                qkv_kv_append_slots(ctx, slots_of, slots_of, QKV_NHD, TENSOR(row, QKV_F32, 1, 1, 8),
                                    TENSOR(row, QKV_F32, 1, 1, 8), TENSOR(slot, QKV_I32, 1), NULL,
                                    NULL));
    DLTensor *const none = TENSOR(NULL, QKV_F32, 0, 16, 1, 8);
    EXPECT_FAIL(QKV_ERR_INVALID, "slot_mapping: expected a slot below 0 pages",
                qkv_kv_append_slots(ctx, none, none, QKV_NHD, TENSOR(row, QKV_F32, 1, 1, 8),
                                    TENSOR(row, QKV_F32, 1, 1, 8), TENSOR(slot, QKV_I32, 1), NULL,
                                    NULL));
}

/* The two that share a page table's struct read the same of it. */
static void cache_calls_name_the_wrong_field(void **state)
{
    (void)state;
    float cache[2][64], row[2][8] = {{0}};
    int32_t qo[] = {0, 1}, len[] = {1}, page[] = {0};
    DLTensor *const kc = TENSOR(cache[0], QKV_F32, 1, 8, 1, 8);
    DLTensor *const vc = TENSOR(cache[1], QKV_F32, 1, 8, 1, 8);
    DLTensor *const k = TENSOR(row[0], QKV_F32, 1, 1, 8), *const v =
                                                              TENSOR(row[1], QKV_F32, 1, 1, 8);
    memset(cache, BAD_POISON, sizeof cache);
    const qkv_kv_index good = {QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(qo, QKV_I32, 2),
                               .block_table = TENSOR(page, QKV_I32, 1, 1),
                               .kv_lens = TENSOR(len, QKV_I32, 1)};
    qkv_kv_index index = good;
    index.reserved = 7;
    EXPECT_FAIL(QKV_ERR_INVALID, "index.reserved: expected 0, got 7",
                qkv_kv_append(ctx, kc, vc, QKV_NHD, k, v, &index, NULL, NULL, NULL));
    index = good;
    index.kv_indptr = good.qo_indptr;
    EXPECT_FAIL(QKV_ERR_INVALID, "kv_indptr, block_table: expected exactly one form",
                qkv_kv_append(ctx, kc, vc, QKV_NHD, k, v, &index, NULL, NULL, NULL));
    for (int32_t layout = -1; layout < 3; layout += 3)
        EXPECT_FAIL(QKV_ERR_INVALID, "kv_layout: expected",
                    qkv_kv_append(ctx, kc, vc, layout, k, v, &good, NULL, NULL, NULL));
    const unsigned char *byte = (const unsigned char *)cache;
    for (size_t i = 0; i < sizeof cache; i++) assert_int_equal(byte[i], BAD_POISON);
    EXPECT_OK(qkv_kv_append(ctx, kc, vc, QKV_NHD, k, v, &good, NULL, NULL, NULL));
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cache_calls_name_the_faulty_tensor),
        cmocka_unit_test(cache_calls_take_no_time_for_pages_of_nothing),
        cmocka_unit_test(cache_calls_name_the_wrong_field),
    };
    return cmocka_run_group_tests_name("bad_input_cache", tests, bad_open, bad_close);
}
