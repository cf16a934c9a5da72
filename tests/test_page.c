/* test_page.c - writing into paged KV caches: every byte of the caches is compared.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdbool.h>

#include "view.h"

enum { MAX_REQUESTS = 6, MAX_LEN = 40, MAX_PAGES = MAX_REQUESTS * MAX_LEN + 8, MAX_ROWS = 300 };

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* 0 .. n-1 in random order. */
static void permutation(int32_t *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const int64_t j = test_below(i + 1);
        x[i] = x[j];
        x[j] = (int32_t)i;
    }
}

/* ---- a pool and rows to append ------------------------------------------------------------ */

/* What is chosen about a case, and its tensors; [0] is K, [1] V. */
typedef struct page_case {
    int64_t pages, page_size, heads, dim[2], nnz, pad;
    int32_t layout;
    bool combined;
    bool swapped; /* memory in the order of the other layout */
    DLDataType cache_dtype[2], dtype;
    view cache[2], rows[2]; /* combined: cache[0] is both */
    unsigned char *expected[2];
} page_case;

static DLDataType any_float(void)
{
    return float_dtypes[test_below(3)];
}

static void swap_axes(view *v, int a)
{
    const int64_t n = v->shape[a], stride = v->strides[a];
    v->shape[a] = v->shape[a + 1];
    v->strides[a] = v->strides[a + 1];
    v->shape[a + 1] = n;
    v->strides[a + 1] = stride;
}

/* Numbers that each dtype rounds, overflows on, or has a sign for. */
static void fill_rows(view *v)
{
    view_fill(v, 3);
    const double special[] = {0.0, -0.0, INFINITY, -INFINITY, 1e6, -65519, 65520, 3e-6, 1.00390625};
    for (size_t i = 0; i < sizeof special / sizeof *special; i++)
        if (view_numel(v) > 0) view_put(v, test_below(view_numel(v)), special[i]);
}

static page_case any_case(void)
{
    page_case c = {.page_size = test_below(3) ? 1 + test_below(9) : 16,
                   .heads = 1 + test_below(4),
                   .pad = test_below(2) * 7,
                   .layout = (int32_t)test_below(2),
                   .combined = test_below(3) == 0,
                   .swapped = test_below(3) == 0,
                   .dtype = any_float()};
    c.dim[0] = c.dim[1] = 1 + test_below(40);
    c.cache_dtype[0] = c.cache_dtype[1] = test_below(2) ? any_float() : c.dtype;
    if (!c.combined && test_below(2)) {
        c.dim[1] = 8 * (1 + test_below(16));
        c.cache_dtype[1] = any_float();
    }
    return c;
}

/* Makes the tensors, once pages and nnz are known. */
static void build(page_case *c)
{
    for (int i = 0; i < 2; i++) {
        const bool nhd = (c->layout == QKV_NHD) != c->swapped;
        const int64_t a = nhd ? c->page_size : c->heads, b = nhd ? c->heads : c->page_size;
        view_new(&c->rows[i], c->dtype, c->pad, TEST_SHAPE(c->nnz, c->heads, c->dim[i]));
        fill_rows(&c->rows[i]);
        if (c->combined)
            view_new(&c->cache[i], c->cache_dtype[i], c->pad,
                     TEST_SHAPE(c->pages, 2, a, b, c->dim[i]));
        else
            view_new(&c->cache[i], c->cache_dtype[i], c->pad,
                     TEST_SHAPE(c->pages, a, b, c->dim[i]));
        if (c->swapped) swap_axes(&c->cache[i], c->combined ? 2 : 1);
        c->expected[i] = malloc(c->cache[i].bytes);
        assert_non_null(c->expected[i]);
        memcpy(c->expected[i], c->cache[i].block, c->cache[i].bytes);
    }
}

static DLTensor *v_cache(page_case *c)
{
    return c->combined ? NULL : &c->cache[1].t;
}

/* Row `row` belongs into this slot, as one value after another. */
static void expect_row(page_case *c, int64_t row, int64_t page, int64_t slot)
{
    for (int i = 0; i < 2; i++) {
        const int in = c->combined ? 0 : i;
        const view *cache = &c->cache[in];
        for (int64_t h = 0; h < c->heads; h++) {
            const int64_t x = c->layout == QKV_NHD ? slot * c->heads + h : h * c->page_size + slot;
            const int64_t tile = c->combined ? 2 * page + i : page;
            for (int64_t d = 0; d < c->dim[i]; d++)
                test_put(c->expected[in], c->cache_dtype[i],
                         view_index(cache, (tile * c->page_size * c->heads + x) * c->dim[i] + d),
                         view_get(&c->rows[i], (row * c->heads + h) * c->dim[i] + d));
        }
    }
}

/* Compares, and frees everything. */
static void check_and_free(page_case *c, const char *device, const char *what)
{
    for (int i = 0; i < 2; i++) {
        const view *v = &c->cache[i];
        for (size_t at = 0; at < v->bytes; at++)
            if (v->block[at] != c->expected[i][at])
                fail_msg("%s: %s: %s_cache differs at byte %zu of %zu: pages %lld of %lld, heads "
                         "%lld, dim %lld, %s%s%s, %d:%d from %d:%d",
                         device, what, i ? "v" : "k", at, v->bytes, (long long)c->pages,
                         (long long)c->page_size, (long long)c->heads, (long long)c->dim[i],
                         c->layout == QKV_NHD ? "NHD" : "HND", c->combined ? " combined" : "",
                         c->pad ? " strided" : "", c->cache_dtype[i].code, c->cache_dtype[i].bits,
                         c->dtype.code, c->dtype.bits);
        free(c->expected[i]);
        view_free(&c->cache[i]);
        view_free(&c->rows[i]);
    }
}

/* ---- by positions ------------------------------------------------------------------------- */

/* The index arrays of a batch, full of nonsense where nothing is to be read. */
typedef struct page_batch {
    int64_t requests, columns;
    int32_t qo_indptr[MAX_REQUESTS + 1], kv_lens[MAX_REQUESTS], positions[MAX_ROWS];
    int32_t kv_indptr[MAX_REQUESTS + 1], kv_last_page_len[MAX_REQUESTS];
    int32_t kv_indices[MAX_PAGES], block_table[MAX_REQUESTS][MAX_LEN + 2];
} page_batch;

/* Lengths and page lists over a pool with a few pages to spare; returns the pool's size. */
static int64_t any_batch(page_batch *b, int64_t page_size)
{
    memset(b, 0x81, sizeof *b); /* negative numbers */
    b->requests = test_below(MAX_REQUESTS + 1);
    b->columns = MAX_LEN + 1 - test_below(2);
    b->qo_indptr[0] = 0;
    b->kv_indptr[0] = (int32_t)test_below(4);
    for (int64_t r = 0; r < b->requests; r++) {
        const int32_t len = test_below(5) ? (int32_t)test_below(MAX_LEN + 1) : 0;
        const int32_t pages = (int32_t)((len + page_size - 1) / page_size);
        int32_t order[MAX_LEN];
        b->kv_lens[r] = len;
        b->qo_indptr[r + 1] = b->qo_indptr[r] + (int32_t)test_below(len + 1);
        permutation(order, len);
        for (int32_t row = b->qo_indptr[r], i = 0; row < b->qo_indptr[r + 1]; row++, i++)
            b->positions[row] = order[i];
        b->kv_indptr[r + 1] = b->kv_indptr[r] + pages;
        if (pages) b->kv_last_page_len[r] = len - (pages - 1) * (int32_t)page_size;
    }
    const int32_t first = b->kv_indptr[0], used = b->kv_indptr[b->requests] - first;
    const int64_t pool_pages = used + test_below(4);
    int32_t pool[MAX_PAGES];
    permutation(pool, pool_pages);
    for (int64_t r = 0; r < b->requests; r++)
        for (int32_t i = b->kv_indptr[r]; i < b->kv_indptr[r + 1]; i++)
            b->kv_indices[i] = b->block_table[r][i - b->kv_indptr[r]] = pool[i - first];
    return pool_pages;
}

static void append_random(qkv_context *ctx, void *user)
{
    (void)user;
    for (int i = 0; i < 300; i++) {
        page_case c = any_case();
        page_batch b;
        c.pages = any_batch(&b, c.page_size);
        const int64_t n = b.requests, appended = b.qo_indptr[n];
        const bool use_positions = test_below(2), table = test_below(2);
        c.nnz = appended + test_below(3); /* rows past the last request are ignored */
        build(&c);
        DLTensor *const blocks = TENSOR(b.block_table, QKV_I32, n, b.columns);
        blocks->strides[0] = MAX_LEN + 2;
        const qkv_kv_index csr = {QKV_KV_INDEX_INIT,
                                  .qo_indptr = TENSOR(b.qo_indptr, QKV_I32, n + 1),
                                  .kv_indptr = TENSOR(b.kv_indptr, QKV_I32, n + 1),
                                  .kv_indices = TENSOR(b.kv_indices, QKV_I32, b.kv_indptr[n]),
                                  .kv_last_page_len = TENSOR(b.kv_last_page_len, QKV_I32, n)};
        const qkv_kv_index dense = {QKV_KV_INDEX_INIT, .qo_indptr = csr.qo_indptr,
                                    .block_table = blocks,
                                    .kv_lens = TENSOR(b.kv_lens, QKV_I32, n)};
        EXPECT_OK(qkv_kv_append(ctx, &c.cache[0].t, v_cache(&c), c.layout, &c.rows[0].t,
                                &c.rows[1].t, table ? &dense : &csr,
                                use_positions ? TENSOR(b.positions, QKV_I32, c.nnz) : NULL, NULL,
                                NULL));
        for (int64_t r = 0; r < n; r++)
            for (int64_t row = b.qo_indptr[r]; row < b.qo_indptr[r + 1]; row++) {
                const int64_t position =
                    use_positions ? b.positions[row] : b.kv_lens[r] + row - b.qo_indptr[r + 1];
                expect_row(&c, row, b.block_table[r][position / c.page_size],
                           position % c.page_size);
            }
        check_and_free(&c, qkv_context_device_name(ctx), "append");
    }
}

static void page_append_writes_rows_to_their_positions(void **state)
{
    (void)state;
    test_every_level(1, append_random, NULL);
    test_every_level(3, append_random, NULL);
}

/* ---- by slots ----------------------------------------------------------------------------- */

static void append_slots_random(qkv_context *ctx, void *user)
{
    (void)user;
    for (int i = 0; i < 150; i++) {
        page_case c = any_case();
        c.pages = 1 + test_below(20);
        if (i == 0) { /* enough for several tasks */
            c.pages = 64;
            c.heads = 8;
            c.dim[0] = c.dim[1] = 128;
        }
        const int64_t slots = c.pages * c.page_size;
        c.nnz = i == 0 ? MAX_ROWS : test_below(smaller(slots, MAX_ROWS) + 1);
        build(&c);
        int32_t order[64 * 16], slots32[MAX_ROWS];
        int64_t slots64[MAX_ROWS];
        permutation(order, slots);
        for (int64_t row = 0; row < c.nnz; row++) {
            slots64[row] = row < slots ? order[row] : -1;
            if (test_below(6) == 0) slots64[row] = test_below(2) ? -1 : INT32_MIN;
            slots32[row] = (int32_t)slots64[row];
            if (slots64[row] == INT32_MIN) slots64[row] = INT64_MIN;
            if (slots64[row] >= 0)
                expect_row(&c, row, slots64[row] / c.page_size, slots64[row] % c.page_size);
        }
        EXPECT_OK(qkv_kv_append_slots(
            ctx, &c.cache[0].t, v_cache(&c), c.layout, &c.rows[0].t, &c.rows[1].t,
            test_below(2) ? TENSOR(slots32, QKV_I32, c.nnz) : TENSOR(slots64, QKV_I64, c.nnz), NULL,
            NULL));
        check_and_free(&c, qkv_context_device_name(ctx), "append_slots");
    }
}

static void page_append_writes_rows_to_their_slots(void **state)
{
    (void)state;
    test_every_level(1, append_slots_random, NULL);
    test_every_level(3, append_slots_random, NULL);
}

/* ---- copying ------------------------------------------------------------------------------ */

/* expected[dst] = expected[src], element by element. */
static void expect_copy(const view *v, unsigned char *expected, int64_t dst, int64_t src)
{
    const size_t size = test_bytes(v->t.dtype);
    const int64_t n = view_numel(v) / v->shape[0];
    for (int64_t i = 0; i < n; i++)
        memcpy(expected + (size_t)view_index(v, dst * n + i) * size,
               v->block + (size_t)view_index(v, src * n + i) * size, size);
}

static void copy_random(qkv_context *ctx, void *user)
{
    (void)user;
    const DLDataType dtypes[] = {QKV_F32, QKV_F16, QKV_BF16, QKV_E4M3, QKV_I8, QKV_I32};
    for (int i = 0; i < 200; i++) {
        const int64_t pages = 2 + test_below(i == 0 ? 200 : 12), pad = test_below(2) * 7;
        const int num_pools = 1 + (int)test_below(2);
        view pools[2];
        unsigned char *expected[2];
        for (int p = 0; p < num_pools; p++) {
            const int64_t a = 1 + test_below(5), b = 1 + test_below(5), d = 1 + test_below(70);
            const DLDataType dtype = dtypes[test_below(6)];
            if (test_below(3))
                view_new(&pools[p], dtype, pad, TEST_SHAPE(pages, a, b, d));
            else
                view_new(&pools[p], dtype, pad, TEST_SHAPE(pages, 2, a, b, d));
            if (test_below(3) == 0) swap_axes(&pools[p], pools[p].t.ndim - 3);
            for (size_t x = 0; x < pools[p].bytes; x++)
                pools[p].block[x] = (unsigned char)test_u64();
            expected[p] = malloc(pools[p].bytes);
            assert_non_null(expected[p]);
            memcpy(expected[p], pools[p].block, pools[p].bytes);
        }
        int32_t order[256], src[256];
        permutation(order, pages);
        const int64_t n = test_below(pages); /* into the first n, from any of the others */
        for (int64_t x = 0; x < n; x++) {
            src[x] = order[n + test_below(pages - n)];
            for (int p = 0; p < num_pools; p++)
                expect_copy(&pools[p], expected[p], order[x], src[x]);
        }
        EXPECT_OK(qkv_kv_copy_pages(ctx, &pools[0].t, num_pools > 1 ? &pools[1].t : NULL,
                                    TENSOR(src, QKV_I32, n), TENSOR(order, QKV_I32, n), NULL));
        for (int p = 0; p < num_pools; p++) {
            if (memcmp(pools[p].block, expected[p], pools[p].bytes) != 0)
                fail_msg("%s: %lld of %lld pages: pool %d of dtype %d:%d differs",
                         qkv_context_device_name(ctx), (long long)n, (long long)pages, p,
                         pools[p].t.dtype.code, pools[p].t.dtype.bits);
            free(expected[p]);
            view_free(&pools[p]);
        }
    }
}

static void page_copy_copies_whole_pages(void **state)
{
    (void)state;
    test_every_level(1, copy_random, NULL);
    test_every_level(3, copy_random, NULL);
}

/* ---- errors ------------------------------------------------------------------------------- */

/* Two requests of 3 and 5 keys on pages of 4; 1 and 2 rows are new. */
static void page_append_names_the_bad_argument(void **state)
{
    (void)state;
    enum { PAGES = 5, SIZE = 4, HEADS = 2, DIM = 8, NNZ = 3, CACHE = PAGES * SIZE * HEADS * DIM };
    qkv_context *ctx;
    EXPECT_OK(test_context_create(&ctx));
    static float k_data[2 * CACHE], v_data[CACHE], rows[2][(NNZ + 1) * HEADS * (DIM + 8)];
    memset(k_data, VIEW_POISON, sizeof k_data);
    memset(v_data, VIEW_POISON, sizeof v_data);
    DLTensor *const kc = TENSOR(k_data, QKV_F32, PAGES, SIZE, HEADS, DIM);
    DLTensor *const vc = TENSOR(v_data, QKV_F32, PAGES, SIZE, HEADS, DIM);
    DLTensor *const both = TENSOR(k_data, QKV_F32, PAGES, 2, SIZE, HEADS, DIM);
    DLTensor *const k = TENSOR(rows[0], QKV_F32, NNZ, HEADS, DIM);
    DLTensor *const v = TENSOR(rows[1], QKV_F32, NNZ, HEADS, DIM);
    DLTensor *const inside = TENSOR(k_data + 40, QKV_F32, NNZ, HEADS, DIM);
    int32_t qo[] = {0, 1, 3}, lens[] = {3, 5}, table[] = {4, -9, 0, 3}, far[] = {4, -9, 0, 5};
    int32_t minus[] = {-1, -9, 0, 3}, falls[] = {0, 2, 1}, many[] = {0, 1, 4}, more[] = {0, 1, 8};
    int32_t at[] = {2, 4, 0}, beyond[] = {2, 5, 0}, before[] = {2, 4, -1};
    DLTensor *const q = TENSOR(qo, QKV_I32, 3), *const n = TENSOR(lens, QKV_I32, 2);
    DLTensor *const t = TENSOR(table, QKV_I32, 2, 2), *const p = TENSOR(at, QKV_I32, NNZ);
#define INDEX(qo_indptr_, table_)                                                                  \
    &(qkv_kv_index)                                                                                \
    {                                                                                              \
        QKV_KV_INDEX_INIT, .qo_indptr = qo_indptr_, .block_table = table_, .kv_lens = n            \
    }
    const qkv_kv_index *const good = INDEX(q, t);
    DLTensor *const wide_rows = TENSOR(rows[0], QKV_F32, NNZ, HEADS, DIM + 8);
    DLTensor *const more_rows = TENSOR(rows[1], QKV_F32, NNZ + 1, HEADS, DIM);
    DLTensor *const narrow = TENSOR(k_data, QKV_F32, PAGES, SIZE, 1, DIM);
    DLTensor *const slim = TENSOR(rows[0], QKV_F32, 8, 1, DIM);
    DLTensor *const other_heads = TENSOR(v_data, QKV_F32, PAGES, SIZE, HEADS - 1, DIM);
    const struct {
        const char *why;
        DLTensor *k_cache, *v_cache;
        const DLTensor *k, *v;
        const qkv_kv_index *index;
        const DLTensor *positions;
        int32_t layout;
    } cases[] = {
        {"kv_layout: expected", kc, vc, k, v, good, p, 2},
        {"kv_layout: expected", kc, vc, k, v, good, p, -1},
        {"k_cache: expected a tensor, got NULL", NULL, vc, k, v, good, p, 0},
        {"k_cache: expected a tensor, got NULL", NULL, NULL, k, v, good, p, 0},
        {"k_cache: expected shape [*, 2, *, *, *]", kc, NULL, k, v, good, p, 0},
        {"k_cache: expected shape", both, vc, k, v, good, p, 0},
        {"k_cache: expected dtype", TENSOR(k_data, QKV_I32, 5, 4, 2, 8), vc, k, v, good, p, 0},
        {"v_cache: expected shape", kc, other_heads, k, v, good, p, 0},
        {"v_cache: expected dtype", kc, TENSOR(v_data, QKV_I32, 5, 4, 2, 8), k, v, good, p, 0},
        {"v_cache: expected shape", kc, TENSOR(v_data, QKV_F32, 4, 4, 2, 8), k, v, good, p, 0},
        {"k: expected a tensor, got NULL", kc, vc, NULL, v, good, p, 0},
        {"k: expected shape", kc, vc, wide_rows, v, good, p, 0},
        {"k: expected dtype", kc, vc, TENSOR(rows[0], QKV_I8, 3, 2, 8), v, good, p, 0},
        {"k: expected shape", kc, vc, k, v, good, p, QKV_HND},
        {"v: expected a tensor, got NULL", kc, vc, k, NULL, good, p, 0},
        {"v: expected shape", kc, vc, k, wide_rows, good, p, 0},
        {"v: expected shape", kc, vc, k, more_rows, good, p, 0},
        {"k, v: expected memory apart", kc, vc, inside, v, good, p, 0},
        {"k, v: expected memory apart", kc, vc, k, inside, good, p, 0},
        {"k, v: expected memory apart", both, NULL, k, inside, good, p, 0},
        {"index: expected", kc, vc, k, v, NULL, p, 0},
        {"qo_indptr: expected a tensor, got NULL", kc, vc, k, v, INDEX(NULL, t), p, 0},
        {"block_table: expected a tensor, got NULL", kc, vc, k, v, INDEX(q, NULL), p, 0},
        {"qo_indptr: expected entries that do not fall, got 1 after 2 (request 1, entry 2)", kc, vc,
         k, v, INDEX(TENSOR(falls, QKV_I32, 3), t), p, 0},
        {"qo_indptr: expected at most the 3 rows of k, got 4", kc, vc, k, v,
         INDEX(TENSOR(many, QKV_I32, 3), t), p, 0},
        {"qo_indptr: expected at most kv_len = 5 rows, got 7 (request 1)", narrow, narrow, slim,
         slim, INDEX(TENSOR(more, QKV_I32, 3), t), NULL, 0},
        {"block_table: expected a page >= 0, got -1 (request 0, entry 0)", kc, vc, k, v,
         INDEX(q, TENSOR(minus, QKV_I32, 2, 2)), NULL, 0},
        {"block_table: expected a page below 5, got 5 (request 1, entry 1)", kc, vc, k, v,
         INDEX(q, TENSOR(far, QKV_I32, 2, 2)), NULL, 0},
        {"block_table: expected a page below 5, got 5 (request 1, entry 1)", kc, vc, k, v,
         INDEX(q, TENSOR(far, QKV_I32, 2, 2)), p, 0},
        {"positions: expected shape [3], got [2]", kc, vc, k, v, good, TENSOR(at, QKV_I32, 2), 0},
        {"positions: expected dtype i32", kc, vc, k, v, good, TENSOR(at, QKV_F32, 3), 0},
        {"positions: expected >= 0 and below kv_len = 5, got 5 (request 1, entry 1)", kc, vc, k, v,
         good, TENSOR(beyond, QKV_I32, 3), 0},
        {"positions: expected >= 0 and below kv_len = 5, got -1 (request 1, entry 2)", kc, vc, k, v,
         good, TENSOR(before, QKV_I32, 3), 0},
    };
#undef INDEX
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (test_unchecked(cases[i].why)) continue;
        EXPECT_FAIL(QKV_ERR_INVALID, cases[i].why,
                    qkv_kv_append(ctx, cases[i].k_cache, cases[i].v_cache, cases[i].layout,
                                  cases[i].k, cases[i].v, cases[i].index, cases[i].positions, NULL,
                                  NULL));
    }
    EXPECT_FAIL(QKV_ERR_INVALID, "ctx: expected",
                qkv_kv_append(NULL, kc, vc, 0, k, v, good, p, NULL, NULL));

    int32_t slots[] = {19, -1, 20};
    int64_t slots64[] = {(int64_t)1 << 40, 0, 1};
    const struct {
        const char *why;
        const DLTensor *slots;
    } slot_cases[] = {
        {"slot_mapping: expected a tensor, got NULL", NULL},
        {"slot_mapping: expected shape [3], got [2]", TENSOR(slots, QKV_I32, 2)},
        {"slot_mapping: expected dtype i32", TENSOR(slots, QKV_F32, 3)},
        {"slot_mapping: expected a slot below 5 pages of 4, got 20 (row 2)",
         TENSOR(slots, QKV_I32, 3)},
        {"slot_mapping: expected a slot below 5 pages of 4, got 1099511627776 (row 0)",
         TENSOR(slots64, QKV_I64, 3)},
    };
    for (size_t i = 0; i < sizeof slot_cases / sizeof *slot_cases; i++) {
        if (test_unchecked(slot_cases[i].why)) continue;
        EXPECT_FAIL(QKV_ERR_INVALID, slot_cases[i].why,
                    qkv_kv_append_slots(ctx, kc, vc, 0, k, v, slot_cases[i].slots, NULL, NULL));
    }
    EXPECT_FAIL(QKV_ERR_INVALID, "k, v: expected memory apart",
                qkv_kv_append_slots(ctx, kc, vc, 0, inside, v, TENSOR(at, QKV_I32, 3), NULL, NULL));
    for (size_t i = 0; i < sizeof k_data; i++) /* untouched */
        assert_int_equal(((unsigned char *)k_data)[i], VIEW_POISON);
    for (size_t i = 0; i < sizeof v_data; i++)
        assert_int_equal(((unsigned char *)v_data)[i], VIEW_POISON);
    qkv_context_destroy(ctx);
}

static void page_copy_names_the_bad_argument(void **state)
{
    (void)state;
    enum { PAGES = 4, CACHE = PAGES * 3 * 2 * 8 };
    qkv_context *ctx;
    EXPECT_OK(test_context_create(&ctx));
    float k_data[CACHE], v_data[CACHE], saved[CACHE];
    for (int i = 0; i < CACHE; i++) k_data[i] = v_data[i] = saved[i] = (float)i;
    DLTensor *const kc = TENSOR(k_data, QKV_F32, PAGES, 3, 2, 8);
    DLTensor *const vc = TENSOR(v_data, QKV_F32, PAGES, 3, 2, 8);
    int32_t one[] = {0, 1}, two[] = {2, 3}, same[] = {3, 3}, minus[] = {2, -1}, far[] = {4, 3};
    DLTensor *const src = TENSOR(one, QKV_I32, 2), *const dst = TENSOR(two, QKV_I32, 2);
    int32_t chain[] = {1, 2};
    const struct {
        const char *why;
        DLTensor *k_cache, *v_cache;
        const DLTensor *src, *dst;
    } cases[] = {
        {"k_cache: expected a tensor, got NULL", NULL, vc, src, dst},
        {"k_cache: expected", TENSOR(k_data, QKV_F32, 4, 6, 8), vc, src, dst},
        {"k_cache: expected a dtype", TENSOR(k_data, QKV_DTYPE(7, 24), 4, 3, 2, 8), vc, src, dst},
        {"v_cache: expected shape [4, *, *, *], got [3, 3, 2, 8]", kc,
         TENSOR(v_data, QKV_F32, 3, 3, 2, 8), src, dst},
        {"src: expected a tensor, got NULL", kc, vc, NULL, dst},
        {"src: expected dtype i32", kc, vc, TENSOR(one, QKV_F32, 2), dst},
        {"dst: expected a tensor, got NULL", kc, vc, src, NULL},
        {"dst: expected shape [2], got [1]", kc, vc, src, TENSOR(two, QKV_I32, 1)},
        {"src: expected a page from 0 to 3, got -1 (entry 1)", kc, vc, TENSOR(minus, QKV_I32, 2),
         TENSOR(one, QKV_I32, 2)},
        {"src: expected a page from 0 to 3, got 4 (entry 0)", kc, NULL, TENSOR(far, QKV_I32, 2),
         src},
        {"dst: expected a page from 0 to 3, got 4 (entry 0)", kc, vc, src, TENSOR(far, QKV_I32, 2)},
        {"dst: expected no page twice, got 3 again (entry 1)", kc, vc, src,
         TENSOR(same, QKV_I32, 2)},
        {"src: expected no page that is in dst too, got 1 (entry 1)", kc, vc, src,
         TENSOR(chain, QKV_I32, 2)},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (test_unchecked(cases[i].why)) continue;
        EXPECT_FAIL(QKV_ERR_INVALID, cases[i].why,
                    qkv_kv_copy_pages(ctx, cases[i].k_cache, cases[i].v_cache, cases[i].src,
                                      cases[i].dst, NULL));
    }
    EXPECT_FAIL(QKV_ERR_INVALID, "ctx: expected", qkv_kv_copy_pages(NULL, kc, vc, src, dst, NULL));
    assert_memory_equal(k_data, saved, sizeof saved);
    assert_memory_equal(v_data, saved, sizeof saved);
    qkv_context_destroy(ctx);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(page_append_writes_rows_to_their_positions),
        cmocka_unit_test(page_append_writes_rows_to_their_slots),
        cmocka_unit_test(page_copy_copies_whole_pages),
        cmocka_unit_test(page_append_names_the_bad_argument),
        cmocka_unit_test(page_copy_names_the_bad_argument),
    };
    return cmocka_run_group_tests_name("page", tests, NULL, NULL);
}
