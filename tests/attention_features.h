/* attention_features.h - what a case may have beyond lengths and a page table: shared levels and
 * prefixes, sparse blocks, custom masks, biases, sinks, scales. Included by attention_case.h.
 *
 * Unused bits, entries of tables and list are random, unused slots NaN.
 * SPDX-License-Identifier: Apache-2.0 */

enum { CASE_MAX_SHARED = 3, CASE_MAX_GROUPS = 64 };

/* Switches; all zero is a case as it always was. */
typedef struct case_features {
    int32_t shared_levels; /* above the requests' own */
    int32_t num_groups[CASE_MAX_SHARED];
    int32_t group_end[CASE_MAX_SHARED][CASE_MAX_GROUPS]; /* first request beyond */
    int32_t group_len[CASE_MAX_SHARED][CASE_MAX_GROUPS]; /* keys */
    bool share_prefixes;                                 /* page lists begin alike */
    bool detect;
    int32_t bsr_rows, bsr_cols, bsr_density; /* rows 0: not sparse; density in 8ths */
    bool bsr_per_head, bsr_mask;
    int32_t mask_density; /* of custom masks, in 8ths */
    double slope, sink;   /* largest of the random ones; 0: none */
    bool scales;
    qkv_rope_spec rope; /* with QKV_FEATURE_ROPE */
} case_features;

typedef struct case_shared {
    case_view qo_indptr, kv_indptr, kv_indices, kv_last_page_len, block_table, kv_lens;
    int32_t first_page[CASE_MAX_GROUPS + 1]; /* of each group, in the case's pages */
    int64_t first_token;                     /* ragged */
} case_shared;

typedef struct case_extra {
    case_shared shared[CASE_MAX_SHARED];
    qkv_kv_index levels[CASE_MAX_SHARED + 1];
    case_view bsr_indptr, bsr_indices, bsr_bits, mask_bits, mask_indptr, slopes, sink, scale[4];
} case_extra;

static inline int32_t case_pages_of(int32_t page_size, int32_t len)
{
    return page_size ? (len + page_size - 1) / page_size : 0;
}

/* The index arrays of one shared level; form as the case's. */
static inline void case_build_level(case_shared *s, const case_features *f, int32_t level,
                                    int32_t form, int32_t page_size, const int32_t *pages,
                                    const int32_t *qo_indptr, bool strided, qkv_kv_index *index)
{
    const int64_t n = f->num_groups[level];
    const int32_t *len = f->group_len[level];
    *index = (qkv_kv_index){QKV_KV_INDEX_INIT, .qo_indptr = &s->qo_indptr.x.t};
    int32_t *rows = case_ints_new(&s->qo_indptr, 1, (int64_t[]){n + 1}, strided);
    rows[0] = 0;
    for (int64_t g = 0; g < n; g++) rows[g + 1] = qo_indptr[f->group_end[level][g]];
    if (form == CASE_TABLE) {
        int32_t columns = 0;
        for (int64_t g = 0; g < n; g++)
            if (case_pages_of(page_size, len[g]) > columns)
                columns = case_pages_of(page_size, len[g]);
        int32_t *table = case_ints_new(&s->block_table, 2, (int64_t[]){n, columns + 1}, strided);
        int32_t *lens = case_ints_new(&s->kv_lens, 1, (int64_t[]){n}, strided);
        for (int64_t g = 0; g < n; g++) {
            lens[g] = len[g];
            for (int32_t i = 0; i < case_pages_of(page_size, len[g]); i++)
                table[g * s->block_table.x.strides[0] + i] = pages[s->first_page[g] + i];
        }
        index->block_table = &s->block_table.x.t;
        index->kv_lens = &s->kv_lens.x.t;
        return;
    }
    int32_t *indptr = case_ints_new(&s->kv_indptr, 1, (int64_t[]){n + 1}, strided);
    indptr[0] = form == CASE_CSR ? 0 : (int32_t)s->first_token;
    for (int64_t g = 0; g < n; g++)
        indptr[g + 1] = indptr[g] + (form == CASE_CSR ? case_pages_of(page_size, len[g]) : len[g]);
    index->kv_indptr = &s->kv_indptr.x.t;
    if (form != CASE_CSR) return;
    int32_t *indices = case_ints_new(&s->kv_indices, 1, (int64_t[]){indptr[n] + 1}, strided);
    int32_t *last = case_ints_new(&s->kv_last_page_len, 1, (int64_t[]){n}, strided);
    for (int32_t i = 0; i < indptr[n]; i++) indices[i] = pages[s->first_page[0] + i];
    for (int64_t g = 0; g < n; g++)
        if (len[g]) last[g] = (len[g] - 1) % page_size + 1;
    index->kv_indices = &s->kv_indices.x.t;
    index->kv_last_page_len = &s->kv_last_page_len.x.t;
}

/* Random ascending column blocks for every row block (and KV head). Returns how many row blocks. */
static inline int64_t case_build_bsr(case_extra *x, const case_features *f, int32_t num_kv_heads,
                                     int32_t num_requests, const int32_t *qo_len,
                                     const int32_t *kv_len, qkv_kv_index *index)
{
    const int64_t lists = f->bsr_per_head ? num_kv_heads : 1;
    int64_t blocks = 0, most = 0;
    for (int32_t r = 0; r < num_requests; r++) {
        const int64_t rows = (qo_len[r] + f->bsr_rows - 1) / f->bsr_rows;
        blocks += rows;
        most += rows * ((kv_len[r] + f->bsr_cols - 1) / f->bsr_cols);
    }
    int32_t *indptr = case_ints_new(&x->bsr_indptr, 2, (int64_t[]){lists, blocks + 1}, true);
    int32_t *indices = case_ints_new(&x->bsr_indices, 1, (int64_t[]){lists * most + 3}, true);
    const int64_t stride = x->bsr_indptr.x.strides[0];
    int32_t used = (int32_t)test_below(3);
    for (int64_t list = 0; list < lists; list++) {
        int64_t block = 0;
        indptr[list * stride] = used;
        for (int32_t r = 0; r < num_requests; r++)
            for (int32_t row = 0; row < qo_len[r]; row += f->bsr_rows) {
                for (int32_t c = 0; c * f->bsr_cols < kv_len[r]; c++)
                    if (test_below(8) < f->bsr_density) indices[used++] = c;
                indptr[list * stride + ++block] = used;
            }
    }
    index->bsr_rows = f->bsr_rows;
    index->bsr_cols = f->bsr_cols;
    index->bsr_indptr = &x->bsr_indptr.x.t;
    index->bsr_indices = &x->bsr_indices.x.t;
    if (f->bsr_mask) {
        const int64_t bytes = (f->bsr_rows * f->bsr_cols + 7) / 8;
        const int64_t shape[] = {x->bsr_indices.x.shape[0], bytes};
        case_view_new(&x->bsr_bits, QKV_U8, 2, shape, true, false);
        for (size_t i = 0; i < x->bsr_bits.bytes; i++)
            ((uint8_t *)x->bsr_bits.x.owned)[i] = (uint8_t)test_u64();
        index->bsr_mask = &x->bsr_bits.x.t;
    }
    return blocks * lists;
}

/* Random bits for the keys of the last level, gaps between requests. */
static inline void case_build_mask(case_extra *x, const case_features *f, int32_t num_requests,
                                   const int32_t *qo_len, const int32_t *kv_len,
                                   qkv_attention_batch *batch)
{
    const int64_t shape[] = {num_requests + 1};
    case_view_new(&x->mask_indptr, QKV_I64, 1, shape, true, false);
    int64_t *indptr = case_data(&x->mask_indptr);
    indptr[0] = test_below(3);
    for (int32_t r = 0; r < num_requests; r++)
        indptr[r + 1] = indptr[r] + ((int64_t)qo_len[r] * kv_len[r] + 7) / 8 + test_below(3);
    case_view_new(&x->mask_bits, QKV_U8, 1, (int64_t[]){indptr[num_requests]}, true, false);
    uint8_t *bits = case_data(&x->mask_bits);
    for (int64_t i = 0; i < indptr[num_requests]; i++) {
        bits[i] = 0;
        for (int b = 0; b < 8; b++) bits[i] |= (uint8_t)((test_below(8) < f->mask_density) << b);
    }
    batch->mask_bits = &x->mask_bits.x.t;
    batch->mask_indptr = &x->mask_indptr.x.t;
}

static inline const DLTensor *case_per_head(case_view *view, int64_t heads, double low, double high)
{
    case_view_new(view, QKV_F32, 1, &heads, true, false);
    float *x = case_data(view);
    for (int64_t h = 0; h < heads; h++)
        x[h] = (float)((low + high) / 2 + test_uniform((high - low) / 2));
    return &view->x.t;
}

/* A number, one for all heads, or one a head; or nothing. */
static inline qkv_scale case_any_scale(case_view *view, int64_t heads, double low, double high)
{
    switch (test_below(4)) {
    case 0: return (qkv_scale){.value = 0};
    case 1: return (qkv_scale){.value = (float)((low + high) / 2 + test_uniform((high - low) / 2))};
    case 2: return (qkv_scale){.value = 77, .tensor = case_per_head(view, 1, low, high)};
    default: return (qkv_scale){.tensor = case_per_head(view, heads, low, high)};
    }
}

static inline void case_build_extras(case_extra *x, const case_features *f,
                                     const qkv_attention_spec *s, qkv_attention_io *io)
{
    if (s->features & QKV_FEATURE_ALIBI)
        io->alibi_slopes = case_per_head(&x->slopes, s->num_qo_heads, -f->slope, f->slope);
    if (s->flags & QKV_ATTENTION_HAS_SINK) {
        io->sink = case_per_head(&x->sink, s->num_qo_heads, -f->sink, f->sink);
        if (test_below(3) == 0) ((float *)case_data(&x->sink))[0] = -INFINITY;
    }
    if (!f->scales) return;
    io->q_scale = case_any_scale(&x->scale[0], s->num_qo_heads, 0.3, 1.5);
    io->k_scale = case_any_scale(&x->scale[1], s->num_kv_heads, 0.3, 1.5);
    io->v_scale = case_any_scale(&x->scale[2], s->num_kv_heads, 0.1, 20);
    io->o_scale = case_any_scale(&x->scale[3], s->num_qo_heads, 0.05, 3);
}

static inline void case_free_extra(case_extra *x)
{
    for (int l = 0; l < CASE_MAX_SHARED; l++) {
        case_shared *s = &x->shared[l];
        case_view *views[] = {&s->qo_indptr,        &s->kv_indptr,   &s->kv_indices,
                              &s->kv_last_page_len, &s->block_table, &s->kv_lens};
        for (size_t i = 0; i < sizeof views / sizeof *views; i++) free(views[i]->x.owned);
    }
    case_view *views[] = {&x->bsr_indptr,  &x->bsr_indices, &x->bsr_bits, &x->mask_bits,
                          &x->mask_indptr, &x->slopes,      &x->sink};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) free(views[i]->x.owned);
    for (int i = 0; i < 4; i++) free(x->scale[i].x.owned);
}
