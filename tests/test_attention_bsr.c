/* test_attention_bsr.c - attention over listed blocks of keys.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_case_random.h"

/* Each feature in so many, blocks always. */
static const any_features mixed = {.fp8 = 6,
                                   .custom_mask = 4,
                                   .alibi = 5,
                                   .sink = 5,
                                   .rope = 6,
                                   .scales = 5,
                                   .invariant = 5,
                                   .bsr = 1};

static void attention_takes_blocks_with_any_feature(void **state)
{
    (void)state;
    try_cases(case_count(3000), mixed, NULL);
}

/* Sizes as models use them, and their extremes. */
static void attention_takes_blocks_of_any_size(void **state)
{
    (void)state;
    static const struct {
        const char *why;
        int32_t page_size, bsr_rows, bsr_cols, qo_len, kv_len;
    } rows[] = {
        {"square blocks of a prompt", 16, 64, 64, 300, 300},
        {"blocks of several pages", 16, 32, 128, 100, 900},
        {"pages of several blocks", 64, 16, 16, 100, 500},
        {"blocks across pages", 10, 7, 33, 40, 700},
        {"decode over chosen pages", 16, 1, 16, 1, 3000},
        {"decode, one block for all keys", 16, 1, 4096, 1, 3000},
        {"drafts", 8, 4, 8, 7, 500},
        {"one block for all rows, a key each", 16, 1000, 1, 50, 200},
        {"a row and a key each", 1, 1, 1, 30, 100},
        {"ragged", 0, 24, 40, 90, 400},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        for (int repeat = 0; repeat < 6; repeat++) {
            qkv_attention_spec s = any_spec(&mixed);
            s.num_kv_heads = PICK(1, 2);
            s.num_qo_heads = s.num_kv_heads * PICK(1, 2, 4);
            s.head_dim_qk = s.head_dim_vo = PICK(16, 64);
            s.page_size = rows[i].page_size;
            case_config c = case_config_init(s);
            c.form = s.page_size == 0 ? CASE_RAGGED : PICK(CASE_CSR, CASE_TABLE);
            c.strided = chance(2);
            c.max_slope = 0.05;
            c.max_sink = 5;
            c.limits.max_workers = 1 + (int32_t)test_below(9);
            c.bsr_rows = rows[i].bsr_rows;
            c.bsr_cols = rows[i].bsr_cols;
            c.bsr_per_head = chance(2);
            c.bsr_masked = chance(2);
            for (int r = 0; r < 3; r++) case_add(&c, rows[i].qo_len, rows[i].kv_len);
            attn_case a;
            case_build(&a, &c);
            a.number = (int64_t)i;
            for (int level = 0; level < num_isa_levels; level++)
                case_try(&a, contexts[level][test_below(NUM_THREAD_COUNTS)]);
            case_free(&a);
        }
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_takes_blocks_with_any_feature),
        cmocka_unit_test(attention_takes_blocks_of_any_size),
    };
    return cmocka_run_group_tests_name("attention_bsr", tests, open_contexts, close_contexts);
}
