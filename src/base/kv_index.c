/* kv_index.c - checking page tables. The loop over page numbers is a plain minimum and maximum,
 * which vectorises; the entry at fault is looked for only once one is known to be there.
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/kv_index.h"

/* An i32 vector of n entries (QI_ANY: any number). */
static qkv_status read_array(const DLTensor *t, const char *name, i64 n, const i32 **out)
{
    QI_TRY(qi_expect(t, name, QKV_I32, QI_SHAPE(n)));
    *out = qi_data(t);
    return QKV_OK;
}

/* Offsets must not fall, and begin at or above 0. */
static qkv_status check_indptr(const i32 *indptr, i64 requests, const char *name)
{
    if (!qi_host_reads()) return QKV_OK;
    QI_REQUIRE(indptr[0] >= 0, "%s: expected a first entry >= 0, got %d (entry 0)", name,
               (int)indptr[0]);
    for (i64 r = 0; r < requests; r++)
        QI_REQUIRE(
            indptr[r + 1] >= indptr[r],
            "%s: expected entries that do not fall, got %d after %d (request %lld, entry %lld)",
            name, (int)indptr[r + 1], (int)indptr[r], (long long)r, (long long)r + 1);
    return QKV_OK;
}

static qkv_status read_csr(const qkv_kv_index *index, qi_kv_view *v)
{
    QI_TRY(read_array(index->kv_indptr, "kv_indptr", v->num_requests + 1, &v->kv_indptr));
    QI_TRY(check_indptr(v->kv_indptr, v->num_requests, "kv_indptr"));
    if (v->page_size == 0) return QKV_OK;
    QI_TRY(read_array(index->kv_indices, "kv_indices", QI_ANY, &v->kv_indices));
    QI_TRY(read_array(index->kv_last_page_len, "kv_last_page_len", v->num_requests,
                      &v->kv_last_page_len));
    v->num_entries = index->kv_indices->shape[0];
    if (!qi_host_reads()) return QKV_OK;
    const i64 listed = v->num_entries, end = v->kv_indptr[v->num_requests];
    QI_REQUIRE(end <= listed,
               "kv_indices: expected at least %lld entries, as kv_indptr says, got %lld",
               (long long)end, (long long)listed);
    for (i64 r = 0; r < v->num_requests; r++) {
        const i64 pages = qi_kv_num_pages(v, r), last = v->kv_last_page_len[r];
        QI_REQUIRE(pages == 0 || (last >= 1 && last <= v->page_size),
                   "kv_last_page_len: expected 1 to page_size = %lld, got %lld (request %lld)",
                   (long long)v->page_size, (long long)last, (long long)r);
        QI_REQUIRE(
            qi_kv_len(v, r) <= INT32_MAX,
            "kv_indptr: expected fewer than 2^31 keys a request, got %lld pages (request %lld)",
            (long long)pages, (long long)r);
    }
    return QKV_OK;
}

static qkv_status read_block_table(const qkv_kv_index *index, qi_kv_view *v)
{
    const DLTensor *table = index->block_table;
    QI_TRY(qi_expect(table, "block_table", QKV_I32, QI_SHAPE(v->num_requests, QI_ANY)));
    QI_TRY(read_array(index->kv_lens, "kv_lens", v->num_requests, &v->kv_lens));
    static const i32 none; /* a table without columns may have no data, but marks the form */
    v->block_table = qi_data(table) ? qi_data(table) : &none;
    v->block_table_stride = qi_stride(table, 0);
    v->num_entries = table->shape[1];
    if (!qi_host_reads()) return QKV_OK;
    for (i64 r = 0; r < v->num_requests; r++) {
        QI_REQUIRE(v->kv_lens[r] >= 0, "kv_lens: expected >= 0, got %d (request %lld)",
                   (int)v->kv_lens[r], (long long)r);
        QI_REQUIRE(qi_kv_num_pages(v, r) <= table->shape[1],
                   "kv_lens: expected at most what the %lld columns of block_table hold, got %d "
                   "(request %lld)",
                   (long long)table->shape[1], (int)v->kv_lens[r], (long long)r);
    }
    return QKV_OK;
}

qkv_status qi_kv_index_read(const qkv_kv_index *index, i64 page_size, qi_kv_view *out)
{
    qkv_kv_index in;
    QI_TRY(qi_read_struct(&in, sizeof in, index, "index"));
    QI_REQUIRE(in.reserved == 0, "index.reserved: expected 0, got %u", (unsigned)in.reserved);
    qi_kv_view v = {.page_size = page_size, .max_page = -1};
    QI_TRY(read_array(in.qo_indptr, "qo_indptr", QI_ANY, &v.qo_indptr));
    v.num_requests = in.qo_indptr->shape[0] - 1;
    QI_REQUIRE(v.num_requests >= 0, "qo_indptr: expected at least 1 entry, got 0");
    QI_TRY(check_indptr(v.qo_indptr, v.num_requests, "qo_indptr"));
    QI_REQUIRE(!qi_host_reads() || v.qo_indptr[0] == 0,
               "qo_indptr: expected a first entry of 0, got %d (entry 0)", (int)v.qo_indptr[0]);

    const int csr = in.kv_indptr || in.kv_indices || in.kv_last_page_len;
    const int dense = in.block_table || in.kv_lens;
    QI_REQUIRE(csr + dense == 1,
               "kv_indptr, block_table: expected exactly one form of page table, got %s",
               csr ? "both" : "neither");
    if (page_size == 0)
        QI_REQUIRE(csr && !in.kv_indices && !in.kv_last_page_len,
                   "%s: expected NULL, since ragged keys (page_size 0) have kv_indptr alone",
                   dense           ? "block_table"
                   : in.kv_indices ? "kv_indices"
                                   : "kv_last_page_len");
    if (csr)
        QI_TRY(read_csr(&in, &v));
    else
        QI_TRY(read_block_table(&in, &v));
    const i64 reads = qi_host_reads() ? v.num_requests : 0;
    for (i64 r = 0; r < reads; r++) v.num_pages_listed += qi_kv_num_pages(&v, r);
    *out = v;
    return QKV_OK;
}

qkv_status qi_kv_check_pages(const qi_kv_view *view, i64 request, i64 begin, i64 end,
                             i64 pool_pages, i64 *max)
{
    if (begin >= end) return QKV_OK;
    const i32 *pages = qi_kv_pages(view, request);
    i32 low = 0, high = -1;
    for (i64 i = begin; i < end; i++) {
        low = pages[i] < low ? pages[i] : low;
        high = pages[i] > high ? pages[i] : high;
    }
    if (max && high > *max) *max = high;
    if (low >= 0 && (pool_pages == 0 || high < pool_pages)) return QKV_OK;

    const char *name = view->block_table ? "block_table" : "kv_indices";
    i64 i = begin;
    while (pages[i] >= 0 && (pool_pages == 0 || pages[i] < pool_pages)) i++;
    QI_REQUIRE(pages[i] < 0, "%s: expected a page below %lld, got %d (request %lld, entry %lld)",
               name, (long long)pool_pages, (int)pages[i], (long long)request, (long long)i);
    QI_FAIL(QKV_ERR_INVALID, "%s: expected a page >= 0, got %d (request %lld, entry %lld)", name,
            (int)pages[i], (long long)request, (long long)i);
}

/* The largest page of a CSR table, whose lists follow each other; 0 where a page is wrong. */
static int find_max_page(qi_kv_view *v, i64 pool_pages)
{
    enum { BLOCK = 1024 };
    const i32 *pages = v->kv_indices;
    const i64 end = v->kv_indptr[v->num_requests], most = pool_pages ? pool_pages - 1 : INT32_MAX;
    i64 found = 0;
    for (i64 block = v->kv_indptr[0]; block < end; block += BLOCK) {
        const i64 past = end - block < BLOCK ? end : block + BLOCK;
        i32 bits = 0, high = -1;
        for (i64 i = block; i < past; i++) {
            bits |= pages[i];
            high = pages[i] > high ? pages[i] : high;
        }
        if (bits < 0 || high > most) return 0;
        if (high <= v->max_page) continue;
        v->max_page = high;
        found = block;
    }
    if (v->max_page < 0) return 1;
    while (pages[found] != v->max_page) found++;
    while (v->kv_indptr[v->max_page_request + 1] <= found) v->max_page_request++;
    v->max_page_entry = found - v->kv_indptr[v->max_page_request];
    return 1;
}

qkv_status qi_kv_index_check(const qkv_kv_index *index, i64 page_size, i64 pool_pages,
                             qi_kv_view *out)
{
    qi_kv_view v;
    QI_TRY(qi_kv_index_read(index, page_size, &v));
    qi_kv_view whole = v;
    if (v.kv_indices && find_max_page(&whole, pool_pages)) {
        *out = whole;
        return QKV_OK;
    }
    for (i64 r = 0; r < v.num_requests; r++) {
        const i64 before = v.max_page;
        QI_TRY(qi_kv_check_pages(&v, r, 0, qi_kv_num_pages(&v, r), pool_pages, &v.max_page));
        if (v.max_page > before) v.max_page_request = r;
    }
    if (v.max_page >= 0)
        while (qi_kv_pages(&v, v.max_page_request)[v.max_page_entry] != v.max_page)
            v.max_page_entry++;
    *out = v;
    return QKV_OK;
}
