/* test_kv_index.c - the three forms of page table read alike, and every bad entry is named.
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/kv_index.h"
#include "support.h"

enum { MAX_REQUESTS = 40, MAX_PAGES = 24, PAGE_SIZE = 5 };

/* One random batch in all three forms. */
typedef struct batch {
    int64_t requests, columns;
    int32_t qo_indptr[MAX_REQUESTS + 1], kv_lens[MAX_REQUESTS];
    int32_t kv_indptr[MAX_REQUESTS + 1], kv_last_page_len[MAX_REQUESTS];
    int32_t kv_indices[MAX_REQUESTS * MAX_PAGES], block_table[MAX_REQUESTS][MAX_PAGES];
    int32_t ragged_indptr[MAX_REQUESTS + 1];
    int32_t max_page;
    int64_t max_request, max_entry, listed;
} batch;

static void random_batch(batch *b)
{
    memset(b, 0x81, sizeof *b); /* negative numbers wherever nothing is to be read */
    b->requests = test_below(MAX_REQUESTS + 1);
    b->columns = MAX_PAGES - test_below(3);
    b->kv_indptr[0] = b->ragged_indptr[0] = (int32_t)test_below(4);
    b->qo_indptr[0] = 0;
    b->max_page = -1;
    b->listed = 0;
    for (int64_t r = 0; r < b->requests; r++) {
        const int32_t len = (int32_t)(test_below(4) ? test_below(b->columns * PAGE_SIZE + 1) : 0);
        const int32_t pages = (len + PAGE_SIZE - 1) / PAGE_SIZE;
        b->qo_indptr[r + 1] = b->qo_indptr[r] + (int32_t)test_below(3);
        b->kv_lens[r] = len;
        b->ragged_indptr[r + 1] = b->ragged_indptr[r] + len;
        b->kv_indptr[r + 1] = b->kv_indptr[r] + pages;
        if (pages) b->kv_last_page_len[r] = len - (pages - 1) * PAGE_SIZE;
        for (int32_t i = 0; i < pages; i++) {
            const int32_t page = (int32_t)test_below(1000000);
            b->kv_indices[b->kv_indptr[r] + i] = b->block_table[r][i] = page;
            if (page > b->max_page) {
                b->max_page = page;
                b->max_request = r;
                b->max_entry = i;
            }
        }
        b->listed += pages;
    }
}

static void check_view(const batch *b, const qi_kv_view *v, int paged)
{
    assert_int_equal(v->num_requests, b->requests);
    for (int64_t r = 0; r < b->requests; r++) {
        assert_int_equal(qi_kv_len(v, r), b->kv_lens[r]);
        const int64_t pages = paged ? (b->kv_lens[r] + PAGE_SIZE - 1) / PAGE_SIZE : 0;
        assert_int_equal(qi_kv_num_pages(v, r), pages);
        if (pages) assert_memory_equal(qi_kv_pages(v, r), b->block_table[r], (size_t)pages * 4);
    }
    assert_int_equal(v->num_pages_listed, paged ? b->listed : 0);
    assert_int_equal(v->max_page, paged ? b->max_page : -1);
    if (v->max_page >= 0) {
        assert_int_equal(v->max_page_request, b->max_request);
        assert_int_equal(v->max_page_entry, b->max_entry);
    }
}

static void kv_index_reads_every_form_alike(void **state)
{
    (void)state;
    for (int round = 0; round < 2000; round++) {
        batch b;
        random_batch(&b);
        const int64_t n = b.requests, pool = test_below(2) ? 0 : (int64_t)b.max_page + 1;
        qi_kv_view view;
        DLTensor *const qo = TENSOR(b.qo_indptr, QKV_I32, n + 1);
        const qkv_kv_index csr = {QKV_KV_INDEX_INIT, .qo_indptr = qo,
                                  .kv_indptr = TENSOR(b.kv_indptr, QKV_I32, n + 1),
                                  .kv_indices = TENSOR(b.kv_indices, QKV_I32, b.kv_indptr[n]),
                                  .kv_last_page_len = TENSOR(b.kv_last_page_len, QKV_I32, n)};
        EXPECT_OK(qi_kv_index_check(&csr, PAGE_SIZE, pool, &view));
        check_view(&b, &view, 1);
        DLTensor *const table = TENSOR(b.block_table, QKV_I32, n, b.columns);
        table->strides[0] = MAX_PAGES;
        const qkv_kv_index dense = {QKV_KV_INDEX_INIT, .qo_indptr = qo, .block_table = table,
                                    .kv_lens = TENSOR(b.kv_lens, QKV_I32, n)};
        EXPECT_OK(qi_kv_index_check(&dense, PAGE_SIZE, pool, &view));
        check_view(&b, &view, 1);
        const qkv_kv_index ragged = {QKV_KV_INDEX_INIT, .qo_indptr = qo,
                                     .kv_indptr = TENSOR(b.ragged_indptr, QKV_I32, n + 1)};
        EXPECT_OK(qi_kv_index_check(&ragged, 0, 0, &view));
        check_view(&b, &view, 0);
    }
}

static void kv_index_reads_nothing_of_a_table_without_columns(void **state)
{
    (void)state;
    int32_t qo[] = {0, 0, 0}, lens[] = {0, 0};
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = TENSOR(qo, QKV_I32, 3),
                                .block_table = TENSOR(NULL, QKV_I32, 2, 0),
                                .kv_lens = TENSOR(lens, QKV_I32, 2)};
    qi_kv_view view;
    EXPECT_OK(qi_kv_index_check(&index, PAGE_SIZE, 10, &view));
    assert_int_equal(qi_kv_len(&view, 0) + qi_kv_num_pages(&view, 1), 0);
    assert_int_equal(view.max_page, -1);
}

/* ---- errors: two requests of 8 and 13 keys, one thing wrong ------------------------------------
 */

static int32_t qo_good[] = {0, 1, 3}, qo_late[] = {1, 1, 3}, qo_falling[] = {0, 2, 1};
static int32_t indptr_good[] = {2, 4, 7}, indptr_minus[] = {-1, 4, 7}, indptr_falling[] = {2, 4, 3};
static int32_t indices_good[] = {-7, 99, 3, 4, 5, 6, 9, 99, -7}; /* in use: entries 2 .. 6 */
static int32_t indices_minus[] = {0, 0, 3, 4, 5, -6, 9}, indices_far[] = {0, 0, 3, 4, 5, 6, 10};
static int32_t last_good[] = {3, 3}, last_zero[] = {3, 0}, last_long[] = {6, 3};
static int32_t table_good[] = {3, 4, -7, 5, 6, 9}, table_minus[] = {3, 4, -7, -5, 6, 9};
static int32_t table_far[] = {3, 10, -7, 5, 6, 9};
static int32_t lens_good[] = {8, 13}, lens_minus[] = {8, -1}, lens_long[] = {16, 13};

static void kv_index_names_the_bad_entry(void **state)
{
    (void)state;
    DLTensor *const qo = TENSOR(qo_good, QKV_I32, 3), *const ptr = TENSOR(indptr_good, QKV_I32, 3);
    DLTensor *const ind = TENSOR(indices_good, QKV_I32, 9), *const last =
                                                                TENSOR(last_good, QKV_I32, 2);
    DLTensor *const table = TENSOR(table_good, QKV_I32, 2, 3), *const lens =
                                                                   TENSOR(lens_good, QKV_I32, 2);
    const struct {
        const char *why; /* NULL: fine */
        DLTensor *qo, *indptr, *indices, *last, *table, *lens;
        int64_t page_size, pool;
    } cases[] = {
        {NULL, qo, ptr, ind, last, .page_size = 5, .pool = 10},
        {NULL, qo, .table = table, .lens = lens, .page_size = 5, .pool = 10},
        {NULL, qo, ptr, .page_size = 0},
        {"qo_indptr: expected a tensor, got NULL", NULL, ptr, ind, last, .page_size = 5},
        {"qo_indptr: expected at least 1 entry, got 0", TENSOR(qo_good, QKV_I32, 0), ptr, ind, last,
         .page_size = 5},
        {"qo_indptr: expected dtype i32, got i64", TENSOR(qo_good, QKV_I64, 3), ptr, ind, last,
         .page_size = 5},
        {"qo_indptr: expected a first entry of 0, got 1", TENSOR(qo_late, QKV_I32, 3), ptr, ind,
         last, .page_size = 5},
        {"qo_indptr: expected entries that do not fall, got 1 after 2 (request 1, entry 2)",
         TENSOR(qo_falling, QKV_I32, 3), ptr, ind, last, .page_size = 5},
        {"kv_indptr, block_table: expected exactly one form of page table, got neither", qo,
         .page_size = 5},
        {"kv_indptr, block_table: expected exactly one form of page table, got both", qo, ptr, ind,
         last, table, lens, 5, 0},
        {"kv_indptr, block_table: expected exactly one form of page table, got both", qo,
         .last = last, .table = table, .lens = lens, .page_size = 5},
        {"kv_indptr: expected a tensor, got NULL", qo, NULL, ind, last, .page_size = 5},
        {"kv_indptr: expected shape [3], got [2]", qo, TENSOR(indptr_good, QKV_I32, 2), ind, last,
         .page_size = 5},
        {"kv_indptr: expected a first entry >= 0, got -1 (entry 0)", qo,
         TENSOR(indptr_minus, QKV_I32, 3), ind, last, .page_size = 5},
        {"kv_indptr: expected entries that do not fall, got 3 after 4 (request 1, entry 2)", qo,
         TENSOR(indptr_falling, QKV_I32, 3), ind, last, .page_size = 5},
        {"kv_indptr: expected fewer than 2^31 keys a request, got 2 pages (request 0)", qo, ptr,
         ind, last, .page_size = INT32_MAX},
        {"kv_indices: expected a tensor, got NULL", qo, ptr, NULL, last, .page_size = 5},
        {"kv_indices: expected at least 7 entries, as kv_indptr says, got 6", qo, ptr,
         TENSOR(indices_good, QKV_I32, 6), last, .page_size = 5},
        {"kv_indices: expected a page >= 0, got -6 (request 1, entry 1)", qo, ptr,
         TENSOR(indices_minus, QKV_I32, 7), last, .page_size = 5},
        {"kv_indices: expected a page below 10, got 10 (request 1, entry 2)", qo, ptr,
         TENSOR(indices_far, QKV_I32, 7), last, .page_size = 5, .pool = 10},
        {NULL, qo, ptr, TENSOR(indices_far, QKV_I32, 7), last, .page_size = 5},
        {"kv_last_page_len: expected a tensor, got NULL", qo, ptr, ind, NULL, .page_size = 5},
        {"kv_last_page_len: expected shape [2], got [1]", qo, ptr, ind,
         TENSOR(last_good, QKV_I32, 1), .page_size = 5},
        {"kv_last_page_len: expected 1 to page_size = 5, got 0 (request 1)", qo, ptr, ind,
         TENSOR(last_zero, QKV_I32, 2), .page_size = 5},
        {"kv_last_page_len: expected 1 to page_size = 5, got 6 (request 0)", qo, ptr, ind,
         TENSOR(last_long, QKV_I32, 2), .page_size = 5},
        {"block_table: expected a tensor, got NULL", qo, .lens = lens, .page_size = 5},
        {"block_table: expected shape [2, *], got [3, 2]", qo,
         .table = TENSOR(table_good, QKV_I32, 3, 2), .lens = lens, .page_size = 5},
        {"block_table: expected a page >= 0, got -5 (request 1, entry 0)", qo,
         .table = TENSOR(table_minus, QKV_I32, 2, 3), .lens = lens, .page_size = 5},
        {"block_table: expected a page below 10, got 10 (request 0, entry 1)", qo,
         .table = TENSOR(table_far, QKV_I32, 2, 3), .lens = lens, .page_size = 5, .pool = 10},
        {"kv_lens: expected a tensor, got NULL", qo, .table = table, .page_size = 5},
        {"kv_lens: expected >= 0, got -1 (request 1)", qo, .table = table,
         .lens = TENSOR(lens_minus, QKV_I32, 2), .page_size = 5},
        {"kv_lens: expected at most what the 3 columns of block_table hold, got 16 (request 0)", qo,
         .table = table, .lens = TENSOR(lens_long, QKV_I32, 2), .page_size = 5},
        {"kv_indices: expected NULL, since ragged keys", qo, ptr, ind, .page_size = 0},
        {"kv_last_page_len: expected NULL, since ragged keys", qo, ptr, NULL, last, .page_size = 0},
        {"block_table: expected NULL, since ragged keys", qo, .table = table, .lens = lens,
         .page_size = 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const qkv_kv_index index = {QKV_KV_INDEX_INIT,
                                    .qo_indptr = cases[i].qo,
                                    .kv_indptr = cases[i].indptr,
                                    .kv_indices = cases[i].indices,
                                    .kv_last_page_len = cases[i].last,
                                    .block_table = cases[i].table,
                                    .kv_lens = cases[i].lens};
        qi_kv_view view = {.num_requests = -5}, before = view;
        if (!cases[i].why) {
            EXPECT_OK(qi_kv_index_check(&index, cases[i].page_size, cases[i].pool, &view));
            continue;
        }
        EXPECT_FAIL(QKV_ERR_INVALID, cases[i].why,
                    qi_kv_index_check(&index, cases[i].page_size, cases[i].pool, &view));
        assert_memory_equal(&view, &before, sizeof view); /* untouched */
    }
    qi_kv_view view;
    EXPECT_FAIL(QKV_ERR_INVALID, "index: expected", qi_kv_index_check(NULL, 5, 0, &view));
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(kv_index_reads_every_form_alike),
        cmocka_unit_test(kv_index_reads_nothing_of_a_table_without_columns),
        cmocka_unit_test(kv_index_names_the_bad_entry),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
