/* kv_index.h - page tables on the host: one checked view over the three forms of qkv_kv_index.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_BASE_KV_INDEX_H
#define QI_BASE_KV_INDEX_H

#include "base/tensor.h"
#include "kern/kv_view.h"
#include "qkv/attention.h"

/*
 * Checks one level's index arrays but for the page numbers, and fills *out but for max_page.
 *
 *   page_size   tokens a page; 0 demands the ragged form, else a paged one
 *
 * O(requests). INVALID names the array, the request and the entry.
 */
qkv_status qi_kv_index_read(const qkv_kv_index *index, i64 page_size, qi_kv_view *out);

/*
 * qi_kv_index_read, and checks every page number in use: all of it.
 *
 *   pool_pages  page numbers must be below it; 0 = not known here
 */
qkv_status qi_kv_index_check(const qkv_kv_index *index, i64 page_size, i64 pool_pages,
                             qi_kv_view *out);

/* The pages [begin, end) of one request lie in [0, pool_pages), 0 = not known; *max (may be NULL)
 * is raised to the largest. */
qkv_status qi_kv_check_pages(const qi_kv_view *view, i64 request, i64 begin, i64 end,
                             i64 pool_pages, i64 *max);

#endif
