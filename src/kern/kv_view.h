/* kv_view.h - one view over the three forms of page table, for host code and kernels; checked by
 * base/kv_index.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_KV_VIEW_H
#define QI_KERN_KV_VIEW_H

#include "kern/abi.h"

/* Borrowed arrays of one form; the pointers of the others are NULL. */
typedef struct qi_kv_view {
    i64 num_requests;
    const i32 *qo_indptr;                                 /* [num_requests + 1] */
    const i32 *kv_indptr, *kv_indices, *kv_last_page_len; /* CSR; ragged: kv_indptr alone */
    const i32 *block_table, *kv_lens;                     /* dense */
    i64 block_table_stride;
    i64 num_entries;                                /* of kv_indices; columns of block_table */
    i64 page_size;                                  /* 0 = ragged */
    i64 num_pages_listed;                           /* entries in use, all requests together */
    i64 max_page, max_page_request, max_page_entry; /* the largest page number in use; -1: none */
} qi_kv_view;

static inline i64 qi_kv_num_pages(const qi_kv_view *view, i64 request)
{
    if (view->page_size == 0) return 0;
    if (view->block_table) return (view->kv_lens[request] + view->page_size - 1) / view->page_size;
    return (i64)view->kv_indptr[request + 1] - view->kv_indptr[request];
}

static inline i64 qi_kv_len(const qi_kv_view *view, i64 request)
{
    if (view->block_table) return view->kv_lens[request];
    const i64 n = (i64)view->kv_indptr[request + 1] - view->kv_indptr[request];
    if (view->page_size == 0 || n == 0) return n;
    return (n - 1) * view->page_size + view->kv_last_page_len[request];
}

/* Page numbers of a request, [qi_kv_num_pages]; paged forms only. */
static inline const i32 *qi_kv_pages(const qi_kv_view *view, i64 request)
{
    return view->block_table ? view->block_table + request * view->block_table_stride
                             : view->kv_indices + view->kv_indptr[request];
}

#endif
