/* plan_bytes.h - comparing what two planners made of the same batch, byte for byte.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_PLAN_BYTES_H
#define QKV_TESTS_PLAN_BYTES_H

#include "ops/attention/attention.h"
#include "support.h"

#define SAME(field, count)                                                                         \
    if (memcmp(want->field, got->field, (size_t)(count) * sizeof *(want->field)) != 0)             \
    fail_msg("case %lld: " #field " of the two plans differ", (long long)number)

/* kv_begin aside, which counts from other places: the pages there are the same. */
static inline void expect_same_groups(const qi_plan *want, const qi_plan *got, i32 num_groups,
                                      i32 page_size, i64 number)
{
    for (i32 i = 0; i < num_groups; i++) {
        qi_group g = want->groups[i], h = got->groups[i];
        const i32 pages = page_size ? (g.kv_len + page_size - 1) / page_size : 0;
        if (memcmp(want->pages + g.kv_begin, got->pages + h.kv_begin, (size_t)pages * 4) != 0)
            fail_msg("case %lld: pages of group %d differ", (long long)number, (int)i);
        if (page_size) g.kv_begin = h.kv_begin = 0;
        if (memcmp(&g, &h, sizeof g) != 0)
            fail_msg("case %lld: group %d differs", (long long)number, (int)i);
    }
}

static inline void expect_same_plan(const qkv_attention *a, const qi_plan *want, const qi_plan *got,
                                    i32 num_groups, i64 number)
{
    const qi_plan_header *h = want->header;
    SAME(header, 1);
    SAME(work_indptr, a->limits.max_workers + 1);
    SAME(work, h->num_work);
    SAME(merge, h->num_merges);
    SAME(ticket, h->num_merges);
    SAME(token_request, h->num_tokens);
    SAME(qo_indptr, h->num_requests + 1);
    SAME(kv_len, h->num_requests);
    SAME(qo_pos, h->num_requests);
    SAME(mask_first, h->num_requests);
    expect_same_groups(want, got, num_groups, a->spec.page_size, number);
    if (h->num_levels == 1) return;
    SAME(rows, h->num_tokens);
    const i64 pitch = a->limits.max_tokens * a->spec.num_kv_heads;
    for (i32 l = 0; l < h->num_levels; l++)
        SAME(row_merge + l * pitch, h->num_tokens * a->spec.num_kv_heads);
}

/* Groups of a batch's levels. */
static inline i32 num_groups_of(const qkv_attention_batch *b)
{
    i32 n = 0;
    for (i32 l = 0; l < b->num_levels; l++) n += (i32)b->levels[l].qo_indptr->shape[0] - 1;
    return n;
}

#endif
