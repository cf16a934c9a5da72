/* test_attention_grid.c - thousands of small random attention problems, each on every CPU level;
 * and one axis at a time over all of its values, with the rest at random.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_case_random.h"

/* Each feature in so many. */
static const any_features mixed = {.fp8 = 4,
                                   .custom_mask = 5,
                                   .alibi = 5,
                                   .sink = 5,
                                   .rope = 5,
                                   .scales = 3,
                                   .invariant = 8,
                                   .levels = 5,
                                   .bsr = 5,
                                   .detect = 5};

static void attention_agrees_with_the_reference(void **state)
{
    (void)state;
    try_cases(case_count(6000), (any_features){.fp8 = 0}, NULL);
}

static void attention_agrees_in_any_mix_of_features(void **state)
{
    (void)state;
    try_cases(case_count(6000), mixed, NULL);
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
    try_axis(3 * 64, mixed, set_head_dim);
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
    try_axis(64 + 3, mixed, set_group_size);
}

static void set_page_size(qkv_attention_spec *s, int32_t number)
{
    s->page_size = number + 1;
}

static void attention_takes_every_page_size(void **state)
{
    (void)state;
    try_axis(70, mixed, set_page_size);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_agrees_with_the_reference),
        cmocka_unit_test(attention_agrees_in_any_mix_of_features),
        cmocka_unit_test(attention_takes_every_head_dim),
        cmocka_unit_test(attention_takes_every_group_size),
        cmocka_unit_test(attention_takes_every_page_size),
    };
    return cmocka_run_group_tests_name("attention_grid", tests, open_contexts, close_contexts);
}
