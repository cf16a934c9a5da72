/* test_attention_levels.c - keys shared by several requests: as levels, and found in page lists.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_case_random.h"

/* Each feature in so many, levels always. */
static const any_features mixed = {
    .fp8 = 6, .custom_mask = 4, .alibi = 5, .sink = 5, .rope = 6, .scales = 5, .levels = 1};

static void attention_takes_levels_with_any_feature(void **state)
{
    (void)state;
    try_cases(case_count(3000), mixed, NULL);
}

static void try_everywhere(const case_config *c, int64_t number)
{
    attn_case a;
    case_build(&a, c);
    a.number = number;
    for (int level = 0; level < num_isa_levels; level++)
        case_try(&a, contexts[level][test_below(NUM_THREAD_COUNTS)]);
    case_free(&a);
}

static case_config small_heads(any_features f, int32_t page_size)
{
    qkv_attention_spec s = any_spec(&f);
    s.num_kv_heads = PICK(1, 2);
    s.num_qo_heads = s.num_kv_heads * PICK(1, 2, 4);
    s.head_dim_qk = s.head_dim_vo = PICK(16, 64);
    s.page_size = page_size;
    case_config c = case_config_init(s);
    c.form = page_size == 0 ? CASE_RAGGED : PICK(CASE_CSR, CASE_TABLE);
    c.strided = chance(2);
    c.max_slope = 0.05;
    c.max_sink = 5;
    c.limits.max_workers = 1 + (int32_t)test_below(9);
    return c;
}

/* Long parts that few and many rows share, in trees of every depth. */
static void attention_reads_long_shared_parts(void **state)
{
    (void)state;
    static const struct {
        const char *why;
        int32_t page_size, num_requests, qo_len, kv_len, num_levels, members, shared_len;
    } rows[] = {
        {"one prompt, many answers", 16, 40, 1, 60, 2, 40, 2000},
        {"few answers: decode tiles of shared rows", 16, 3, 1, 60, 2, 3, 2000},
        {"a tree: 2 x 2 x 3", 16, 12, 1, 40, 4, 2, 700},
        {"drafts of several tokens", 8, 6, 5, 50, 2, 3, 1500},
        {"prompts behind a system prompt", 16, 3, 80, 80, 2, 3, 500},
        {"a partial last page in the middle of a request", 16, 8, 1, 33, 3, 4, 1001},
        {"ragged", 0, 8, 2, 30, 3, 4, 900},
        {"nothing of its own", 16, 6, 1, 0, 2, 6, 1200},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        for (int repeat = 0; repeat < 3; repeat++) {
            case_config c = small_heads(mixed, rows[i].page_size);
            for (int32_t r = 0; r < rows[i].num_requests; r++)
                case_add(&c, rows[i].qo_len, rows[i].kv_len);
            c.num_shared_levels = rows[i].num_levels - 1;
            int32_t below = rows[i].num_requests;
            for (int32_t level = c.num_shared_levels - 1; level >= 0; level--) {
                case_shared_level *l = &c.shared[level];
                l->form = rows[i].page_size ? PICK(CASE_CSR, CASE_TABLE) : CASE_RAGGED;
                for (int32_t left = below; left > 0; left -= rows[i].members) {
                    l->num_members[l->num_groups] = left < rows[i].members ? left : rows[i].members;
                    l->kv_len[l->num_groups++] = rows[i].shared_len;
                }
                below = l->num_groups;
            }
            try_everywhere(&c, (int64_t)i);
        }
    }
}

/* ---- detection ---------------------------------------------------------------------------- */

static int num_plans, num_plans_of_levels;

/* "qkv,plan,...,levels=N,..." */
static void count_plans(void *user, const char *line)
{
    (void)user;
    const char *levels = strstr(line, ",levels=");
    if (!levels) return;
    num_plans++;
    if (atoi(levels + strlen(",levels=")) > 1) num_plans_of_levels++;
}

static void attention_finds_shared_prefixes(void **state)
{
    (void)state;
    any_features f = mixed;
    f.levels = 0;
    num_plans = num_plans_of_levels = 0;
    /* About half the cases have levels. A few may happen to have none: then some more are drawn. */
    for (int64_t i = case_count(120); i > 0 || (i > -60 && !num_plans_of_levels); i--) {
        case_config c = small_heads(f, PICK(1, 3, 8, 16, 64));
        const int32_t n = 2 + (int32_t)test_below(20), longest = PICK(100, 600, 2000);
        for (int32_t r = 0; r < n; r++) {
            const int32_t kv_len = (int32_t)test_below(2) ? longest : (int32_t)test_below(longest);
            case_add(&c, chance(4) ? (int32_t)test_below(6) : 1, kv_len);
        }
        c.detect = true;
        c.limits.max_levels = PICK(1, 2, 3, 4);
        c.limits.max_split_rows = PICK(0, 0, 0, 1, 500);
        c.shared_prefixes = PICK(4, 7, 8);
        c.whole_prefixes = chance(2);
        if (chance(4)) any_positions(&c);
        try_everywhere(&c, i);
    }
    printf("%d of %d plans have levels\n", num_plans_of_levels, num_plans);
    assert_true(num_plans_of_levels > 0);
}

/* Without anything shared nothing is to be found; with one list for all, everything. */
static void attention_detects_none_and_all(void **state)
{
    (void)state;
    for (int32_t shared = 0; shared <= 8; shared += 8) {
        case_config c = case_config_init(case_spec(4, 1, 64, 16));
        for (int32_t r = 0; r < 12; r++) case_add(&c, 1, 1024);
        c.detect = true;
        c.shared_prefixes = shared;
        c.whole_prefixes = true;
        num_plans = num_plans_of_levels = 0;
        try_everywhere(&c, shared);
        assert_int_equal(num_plans_of_levels, shared ? num_plans : 0);
    }
}

int main(void)
{
    test_seed();
    setenv("QKV_VERBOSE", "plan", 1);
    contexts_log = count_plans;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_takes_levels_with_any_feature),
        cmocka_unit_test(attention_reads_long_shared_parts),
        cmocka_unit_test(attention_finds_shared_prefixes),
        cmocka_unit_test(attention_detects_none_and_all),
    };
    return cmocka_run_group_tests_name("attention_levels", tests, open_contexts, close_contexts);
}
