/* attention_case_index.h - a case's page lists, index arrays of every level, masks and sparse blocks.
 * What no part of the contract reads is random: entries of tables, bits past the end, gaps.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_ATTENTION_CASE_INDEX_H
#define QKV_TESTS_ATTENTION_CASE_INDEX_H

#include "attention_case_config.h"
#include "ref/attention_ref.h"

/* One level: its arrays, and where each group's page list begins in the case's pages. */
typedef struct case_level {
    case_view qo_indptr, kv_indptr, kv_indices, kv_last_page_len, block_table, kv_lens;
    int32_t *first_page;
} case_level;

typedef struct attn_case {
    int64_t number; /* in a random test: what repeats it */
    case_config config;
    case_view q, k, v, o, lse, qo_pos, mask_bits, mask_indptr;
    case_view bsr_indptr, bsr_indices, bsr_mask, sink, slopes, scales[CASE_NUM_SCALES];
    union { /* the last level's: also by their own names */
        case_level last;
        struct {
            case_view qo_indptr, kv_indptr, kv_indices, kv_last_page_len, block_table, kv_lens;
            int32_t *first_page;
        };
    };
    case_level shared[CASE_MAX_LEVELS - 1];
    qkv_attention_limits limits;
    qkv_kv_index index, levels[CASE_MAX_LEVELS]; /* the last level's; all, if there are several */
    qkv_attention_batch batch;
    qkv_attention_io io;
    int64_t tokens, rows; /* those of the requests; those of q */
    int64_t ragged_end;   /* keys in use of ragged k and v, and before them */
    int64_t num_row_blocks;
    int32_t num_pages, *pages; /* of all lists, the requests' first */
    double *ref_o;
    attention_ref_row *ref_rows;
    void *got_o;       /* [tokens, num_qo_heads, head_dim_vo] of dtype_o, contiguous */
    float *got_lse;    /* [tokens, num_qo_heads] */
    bool fp8_products; /* does the operator that was made last multiply e4m3? */
} attn_case;

static inline case_level *case_level_at(attn_case *a, int32_t level)
{
    return level == a->config.num_shared_levels ? &a->last : &a->shared[level];
}

/* ---- pages -------------------------------------------------------------------------------- */

static inline void case_shuffle(int32_t *x, int64_t n)
{
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = test_below(i + 1);
        const int32_t swap = x[i];
        x[i] = x[j];
        x[j] = swap;
    }
}

/* Requests in any order; each may take over the first pages of one before it. */
static inline void case_share_prefixes(attn_case *a)
{
    const case_config *c = &a->config;
    const int32_t last = c->num_shared_levels;
    int32_t order[CASE_MAX_REQUESTS];
    for (int32_t i = 0; i < c->num_requests; i++) order[i] = i;
    case_shuffle(order, c->num_requests);
    for (int32_t i = 1; i < c->num_requests; i++) {
        if (test_below(8) >= c->shared_prefixes) continue;
        const int32_t r = order[i], other = order[test_below(i)];
        int64_t most = case_group_pages(c, last, r);
        if (case_group_pages(c, last, other) < most) most = case_group_pages(c, last, other);
        const int64_t n = c->whole_prefixes ? most : test_below(most + 1);
        memcpy(a->pages + a->first_page[r], a->pages + a->first_page[other],
               (size_t)n * sizeof(int32_t));
    }
}

/* Page lists over a pool with some pages to spare, in random order. Returns the pool's size. */
static inline int64_t case_deal_pages(attn_case *a)
{
    const case_config *c = &a->config;
    for (int32_t level = c->num_shared_levels; level >= 0; level--) {
        const int32_t n = case_num_groups(c, level);
        int32_t *first = case_alloc((size_t)n + 1, sizeof(int32_t));
        case_level_at(a, level)->first_page = first;
        for (int32_t g = 0; g < n; g++) {
            first[g] = a->num_pages;
            a->num_pages += case_group_pages(c, level, g);
        }
        first[n] = a->num_pages;
    }
    const int32_t own = a->first_page[c->num_requests];
    const int64_t pool = a->num_pages + 1 + test_below(4);
    a->pages = case_alloc((size_t)pool, sizeof(int32_t));
    for (int32_t i = 0; i < pool; i++) a->pages[i] = i;
    case_shuffle(a->pages, pool);
    for (int32_t i = 1; i < own && c->shared_pages; i++)
        if (test_below(4) == 0) a->pages[i] = a->pages[test_below(i)];
    case_share_prefixes(a);
    return pool;
}

/* ---- where keys are ----------------------------------------------------------------------- */

static inline void case_build_table(attn_case *a, int32_t level, qkv_kv_index *index)
{
    const case_config *c = &a->config;
    case_level *l = case_level_at(a, level);
    const int64_t n = case_num_groups(c, level);
    int32_t columns = 0;
    for (int32_t g = 0; g < n; g++)
        if (case_group_pages(c, level, g) > columns) columns = case_group_pages(c, level, g);
    columns += (int32_t)test_below(3);
    int32_t *table = case_ints_new(&l->block_table, 2, (int64_t[]){n, columns}, c->strided);
    int32_t *lens = case_ints_new(&l->kv_lens, 1, (int64_t[]){n}, c->strided);
    for (int32_t g = 0; g < n; g++) {
        lens[g] = case_group_len(c, level, g);
        memcpy(table + g * l->block_table.x.strides[0], a->pages + l->first_page[g],
               (size_t)case_group_pages(c, level, g) * sizeof *table);
    }
    index->block_table = &l->block_table.x.t;
    index->kv_lens = &l->kv_lens.x.t;
}

static inline void case_build_csr(attn_case *a, int32_t level, qkv_kv_index *index)
{
    const case_config *c = &a->config;
    case_level *l = case_level_at(a, level);
    const int64_t n = case_num_groups(c, level);
    const int32_t first = c->strided ? (int32_t)test_below(4) : 0; /* skipped in front */
    int32_t *indptr = case_ints_new(&l->kv_indptr, 1, (int64_t[]){n + 1}, c->strided);
    for (int32_t g = 0; g <= n; g++) indptr[g] = first + l->first_page[g] - l->first_page[0];
    const int64_t num_indices = indptr[n] + (c->strided ? test_below(4) : 0);
    int32_t *indices = case_ints_new(&l->kv_indices, 1, (int64_t[]){num_indices}, c->strided);
    int32_t *last_len = case_ints_new(&l->kv_last_page_len, 1, (int64_t[]){n}, c->strided);
    memcpy(indices + first, a->pages + l->first_page[0],
           (size_t)(indptr[n] - first) * sizeof *indices);
    for (int32_t g = 0; g < n; g++) {
        const int32_t len = case_group_len(c, level, g);
        if (len) last_len[g] = (len - 1) % c->spec.page_size + 1;
    }
    index->kv_indptr = &l->kv_indptr.x.t;
    index->kv_indices = &l->kv_indices.x.t;
    index->kv_last_page_len = &l->kv_last_page_len.x.t;
}

/* Levels lie one after another in k and v, with gaps. */
static inline void case_build_ragged(attn_case *a, int32_t level, qkv_kv_index *index)
{
    const case_config *c = &a->config;
    case_level *l = case_level_at(a, level);
    const int64_t n = case_num_groups(c, level);
    int32_t *indptr = case_ints_new(&l->kv_indptr, 1, (int64_t[]){n + 1}, c->strided);
    indptr[0] = (int32_t)a->ragged_end + (c->strided ? (int32_t)test_below(4) : 0);
    for (int32_t g = 0; g < n; g++) indptr[g + 1] = indptr[g] + case_group_len(c, level, g);
    a->ragged_end = indptr[n];
    index->kv_indptr = &l->kv_indptr.x.t;
}

static inline void case_build_level(attn_case *a, int32_t level, qkv_kv_index *index)
{
    const case_config *c = &a->config;
    case_level *l = case_level_at(a, level);
    const int64_t n = case_num_groups(c, level);
    *index = (qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = &l->qo_indptr.x.t};
    int32_t *qo_indptr = case_ints_new(&l->qo_indptr, 1, (int64_t[]){n + 1}, c->strided);
    for (int32_t g = 0, r = 0, row = 0; g <= n; g++) {
        while (r < case_first_request(c, level, g)) row += c->qo_len[r++];
        qo_indptr[g] = row;
    }
    switch (case_form(c, level)) {
    case CASE_TABLE: case_build_table(a, level, index); break;
    case CASE_CSR: case_build_csr(a, level, index); break;
    default: case_build_ragged(a, level, index); break;
    }
}

/* ---- what rows see ------------------------------------------------------------------------ */

/* Hides keys from each row of a request up to a random one. */
static inline void case_hide_first(uint8_t *bits, int64_t qo_len, int64_t kv_len)
{
    for (int64_t row = 0; row < qo_len; row++) {
        const int64_t hidden = test_below(kv_len + 1);
        for (int64_t i = row * kv_len; i < row * kv_len + hidden; i++)
            bits[i / 8] &= (uint8_t) ~(1u << i % 8);
    }
}

/* Every byte at random, then more or fewer bits of each request. */
static inline void case_build_mask(attn_case *a)
{
    const case_config *c = &a->config;
    const int32_t n = c->num_requests;
    case_view_new(&a->mask_indptr, QKV_I64, 1, (int64_t[]){n + 1}, c->strided, false);
    int64_t *indptr = case_data(&a->mask_indptr);
    indptr[0] = test_below(4);
    for (int32_t r = 0; r < n; r++) {
        const int64_t bits = (int64_t)c->qo_len[r] * c->kv_len[r];
        indptr[r + 1] = indptr[r] + (bits + 7) / 8 + test_below(2) * test_below(4);
    }
    case_view_new(&a->mask_bits, QKV_U8, 1, (int64_t[]){indptr[n] + test_below(3)}, c->strided,
                  false);
    case_randomise(&a->mask_bits);
    uint8_t *bits = case_data(&a->mask_bits);
    for (int32_t r = 0; r < n; r++) {
        const int64_t kind = test_below(8);
        for (int64_t i = indptr[r]; i < indptr[r + 1]; i++)
            bits[i] = kind == 0   ? 0
                      : kind == 1 ? 0xff
                      : kind < 4  ? bits[i] & (uint8_t)test_u64() & (uint8_t)test_u64()
                      : kind < 6  ? bits[i] | (uint8_t)test_u64()
                                  : bits[i];
        if (c->hides_first) case_hide_first(bits + indptr[r], c->qo_len[r], c->kv_len[r]);
    }
    a->batch.mask_bits = &a->mask_bits.x.t;
    a->batch.mask_indptr = &a->mask_indptr.x.t;
}

/* Ascending column blocks of one row block. Returns how many. */
static inline int64_t case_choose_blocks(int64_t num_columns, int32_t *out)
{
    const int64_t kind = test_below(8);
    int64_t n = 0;
    for (int64_t i = 0; i < num_columns; i++)
        if (kind > 0 && (kind == 1 || test_below(kind < 5 ? 2 : 8) == 0)) out[n++] = (int32_t)i;
    return n;
}

static inline void case_build_bsr(attn_case *a)
{
    const case_config *c = &a->config;
    const int64_t num_lists = c->bsr_per_head ? c->spec.num_kv_heads : 1;
    int64_t num_blocks = 0, most = 0; /* row blocks; entries */
    for (int32_t r = 0; r < c->num_requests; r++) {
        const int64_t row_blocks = (c->qo_len[r] + c->bsr_rows - 1) / c->bsr_rows;
        num_blocks += row_blocks;
        most += row_blocks * ((c->kv_len[r] + c->bsr_cols - 1) / c->bsr_cols);
    }
    a->num_row_blocks = num_lists * num_blocks;
    int32_t *indptr =
        case_ints_new(&a->bsr_indptr, 2, (int64_t[]){num_lists, num_blocks + 1}, c->strided);
    int32_t *chosen = case_alloc((size_t)((most + 4) * num_lists), sizeof *chosen);
    int64_t used = 0;
    for (int64_t list = 0; list < num_lists; list++) {
        for (int64_t gap = test_below(4); gap > 0; gap--) chosen[used++] = (int32_t)test_u64();
        int32_t *at = indptr + list * a->bsr_indptr.x.strides[0];
        *at++ = (int32_t)used;
        for (int32_t r = 0; r < c->num_requests; r++) {
            const int64_t columns = (c->kv_len[r] + c->bsr_cols - 1) / c->bsr_cols;
            for (int64_t row = 0; row < c->qo_len[r]; row += c->bsr_rows) {
                used += case_choose_blocks(columns, chosen + used);
                *at++ = (int32_t)used;
            }
        }
    }
    const int64_t num_indices = used + test_below(3);
    memcpy(case_ints_new(&a->bsr_indices, 1, (int64_t[]){num_indices}, c->strided), chosen,
           (size_t)used * sizeof *chosen);
    free(chosen);
    a->index.bsr_rows = c->bsr_rows;
    a->index.bsr_cols = c->bsr_cols;
    a->index.bsr_indptr = &a->bsr_indptr.x.t;
    a->index.bsr_indices = &a->bsr_indices.x.t;
    if (!c->bsr_masked) return;
    const int64_t bytes = ((int64_t)c->bsr_rows * c->bsr_cols + 7) / 8;
    case_view_new(&a->bsr_mask, QKV_U8, 2, (int64_t[]){num_indices, bytes}, c->strided, false);
    case_randomise(&a->bsr_mask);
    a->index.bsr_mask = &a->bsr_mask.x.t;
}

/* ---- the batch ---------------------------------------------------------------------------- */

static inline void case_build_batch(attn_case *a)
{
    const case_config *c = &a->config;
    const int32_t last = c->num_shared_levels;
    for (int32_t level = 0; level < last; level++) case_build_level(a, level, &a->levels[level]);
    case_build_level(a, last, &a->index);
    if (c->bsr_rows) case_build_bsr(a);
    a->levels[last] = a->index;
    a->batch = (qkv_attention_batch){QKV_ATTENTION_BATCH_INIT, .num_levels = 1 + last,
                                     .levels = last ? a->levels : &a->index,
                                     .detect_shared_prefix = c->detect};
    if (c->spec.mask == QKV_MASK_CUSTOM) case_build_mask(a);
    if (!c->use_qo_pos) return;
    int32_t *qo_pos = case_ints_new(&a->qo_pos, 1, (int64_t[]){c->num_requests}, c->strided);
    for (int32_t r = 0; r < c->num_requests; r++) qo_pos[r] = c->qo_pos[r];
    a->batch.qo_pos = &a->qo_pos.x.t;
}

/* Limits that are 0 and must not be: exactly what the case needs. */
static inline void case_complete_limits(attn_case *a)
{
    const case_config *c = &a->config;
    qkv_attention_limits *l = &a->limits;
    *l = c->limits;
    int64_t max_kv_len = 1;
    int32_t max_groups = 1;
    for (int32_t level = 0; level <= c->num_shared_levels; level++) {
        const int32_t n = case_num_groups(c, level);
        if (n > max_groups) max_groups = n;
        for (int32_t g = 0; g < n; g++)
            if (case_group_len(c, level, g) > max_kv_len) max_kv_len = case_group_len(c, level, g);
    }
    for (int32_t r = 0; r < c->num_requests; r++)
        if (case_kv_len(c, r) > max_kv_len) max_kv_len = case_kv_len(c, r);
    if (!l->max_requests) l->max_requests = max_groups;
    if (!l->max_tokens) l->max_tokens = a->tokens ? a->tokens : 1;
    if (!l->max_kv_len) l->max_kv_len = max_kv_len;
    if (!l->max_pages) l->max_pages = a->num_pages ? a->num_pages : 1;
    if (!l->max_levels) l->max_levels = c->detect ? CASE_MAX_LEVELS : 1 + c->num_shared_levels;
    if (!l->max_row_blocks && c->bsr_rows)
        l->max_row_blocks = a->num_row_blocks ? (int32_t)a->num_row_blocks : 1;
}

/* Index arrays alone, of a case that is planned and not run. */
static inline void case_build_index(attn_case *a, const case_config *config)
{
    memset(a, 0, sizeof *a);
    a->config = *config;
    if (config->spec.features & QKV_FEATURE_ROPE) a->config.spec.rope = &a->config.rope;
    for (int32_t r = 0; r < config->num_requests; r++) a->tokens += config->qo_len[r];
    case_deal_pages(a);
    case_build_batch(a);
    case_complete_limits(a);
}

/* Says where the index arrays are. */
static inline void case_arrays_on(attn_case *a, DLDevice device)
{
    a->qo_pos.x.t.device = a->mask_bits.x.t.device = a->mask_indptr.x.t.device = device;
    for (int32_t level = 0; level <= a->config.num_shared_levels; level++) {
        case_level *l = case_level_at(a, level);
        case_view *arrays[] = {&l->qo_indptr,        &l->kv_indptr,   &l->kv_indices,
                               &l->kv_last_page_len, &l->block_table, &l->kv_lens};
        for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) arrays[i]->x.t.device = device;
    }
}

static inline void case_free_index(attn_case *a)
{
    case_view *views[] = {&a->qo_pos,     &a->mask_bits,   &a->mask_indptr,
                          &a->bsr_indptr, &a->bsr_indices, &a->bsr_mask};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) free(views[i]->x.owned);
    for (int32_t level = 0; level <= a->config.num_shared_levels; level++) {
        case_level *l = case_level_at(a, level);
        case_view *arrays[] = {&l->qo_indptr,        &l->kv_indptr,   &l->kv_indices,
                               &l->kv_last_page_len, &l->block_table, &l->kv_lens};
        for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]->x.owned);
        free(l->first_page);
    }
    free(a->pages);
}

#endif
