/* fuzz_plan.c - libFuzzer: any index arrays are refused with a message, or planned and run without a
 * touch outside the tensors. Built and run by tools/fuzz.sh.
 *
 * The input chooses an operator and writes a batch that keeps the contract, twice. The first one must
 * be taken, unless a limit is in its way, and run. The second is spoiled here and there. If that is
 * refused, the first still runs and gives the same bits; if not, it runs. Values are all 1, so that
 * every output is 1, or 0 where lse is -inf. AddressSanitizer watches: each array and each part of
 * the workspace is an allocation of its own, of exactly its size, and gone when it is not borrowed.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "qkv/qkv.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { POOL = 12, MAX_REQUESTS = 6, MAX_LEVELS = 3, MAX_ARRAYS = 32 };

#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) abort();                                                                      \
    } while (0)

/* ---- input --------------------------------------------------------------------------------- */

typedef struct input {
    const uint8_t *at, *end;
} input;

static int32_t next(input *in)
{
    return in->at < in->end ? *in->at++ : 0;
}

static int32_t below(input *in, int32_t n)
{
    return next(in) % n;
}

/* Any number, mostly a small one. */
static int64_t number(input *in)
{
    const int32_t kind = next(in);
    if (kind < 240) return kind % 40 - 2;
    int64_t word = 0;
    for (int b = 0; b < (kind < 250 ? 4 : 8); b++)
        word = (int64_t)((uint64_t)word << 8 | (uint64_t)next(in));
    return kind < 250 ? (int32_t)word : word;
}

/* ---- memory -------------------------------------------------------------------------------- */

static void *block(int64_t bytes)
{
    void *p;
    CHECK(posix_memalign(&p, 64, bytes > 0 ? (size_t)bytes : 1) == 0);
    return p;
}

typedef struct array {
    DLTensor t;
    int64_t shape[4];
    int64_t num, bits; /* of elements, whatever the tensor says later */
} array;

static DLTensor *array_init(array *a, DLDataType dtype, int ndim, const int64_t *shape)
{
    *a = (array){.t = {.device = {kDLCPU, 0}, .ndim = ndim, .dtype = dtype}};
    a->num = 1;
    a->bits = dtype.bits;
    for (int i = 0; i < ndim; i++) a->num *= a->shape[i] = shape[i];
    a->t.shape = a->shape;
    a->t.data = block(a->num * a->bits / 8);
    return &a->t;
}

/* ---- an operator --------------------------------------------------------------------------- */

typedef struct op {
    qkv_attention_spec spec;
    qkv_attention_limits limits;
    int ample; /* the limits are in nobody's way */
    qkv_workspace workspace;
    qkv_attention *attention;
} op;

/* A context of one of the levels that this machine can run. */
static qkv_context *context(int32_t choice)
{
    static qkv_context *contexts[8];
    static int32_t num;
    const char *name;
    int32_t usable;
    if (num > 0) return contexts[choice % num];
    for (int32_t i = 0; (name = qkv_cpu_level(i, &usable)); i++)
        if (usable)
            CHECK(qkv_context_create(&(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT,
                                                            .num_threads = 2, .isa = name},
                                     &contexts[num++]) == QKV_OK);
    return contexts[choice % num];
}

static void choose_spec(input *in, qkv_attention_spec *s)
{
    static const int32_t dims[] = {8, 8, 16, 24, 64, 128};
    const DLDataType types[] = {QKV_F32, QKV_F32, QKV_BF16, QKV_F16, QKV_E4M3, QKV_I8};
    const int32_t kv_heads = 1 + below(in, 2), dim = dims[below(in, 6)], type = below(in, 6);
    *s = (qkv_attention_spec){QKV_ATTENTION_SPEC_INIT,
                              .num_kv_heads = kv_heads,
                              .num_qo_heads = kv_heads * (1 + below(in, 4)),
                              .head_dim_qk = dim,
                              .head_dim_vo = below(in, 4) ? dim : 8,
                              .page_size = below(in, 6),
                              .kv_layout = below(in, 2),
                              .mask = below(in, 3),
                              .dtype_q = type == 2 ? QKV_BF16 : QKV_F32,
                              .dtype_kv = types[type],
                              .dtype_o = QKV_F32};
    if (below(in, 4) == 0) {
        s->features = QKV_FEATURE_WINDOW;
        s->window_left = below(in, 20) - 1;
        s->window_right = below(in, 20) - 1;
    }
    if (below(in, 4) == 0) s->flags = QKV_ATTENTION_BATCH_INVARIANT;
}

static void choose_limits(input *in, op *o)
{
    o->ample = below(in, 4) > 0;
    o->limits = (qkv_attention_limits){QKV_ATTENTION_LIMITS_INIT,
                                       .max_requests = MAX_REQUESTS,
                                       .max_tokens = 64,
                                       .max_workers = 1 + below(in, 5),
                                       .max_kv_len = 8192,
                                       .max_pages = 16384,
                                       .pool_pages = below(in, 3) ? POOL : 0,
                                       .max_row_blocks = 128,
                                       .max_levels = o->spec.flags & QKV_ATTENTION_BATCH_INVARIANT
                                                         ? 1
                                                         : 1 + below(in, MAX_LEVELS)};
    if (o->ample) return;
    o->limits.max_requests = 1 + below(in, MAX_REQUESTS);
    o->limits.max_tokens = 1 + next(in);
    o->limits.max_qo_len = below(in, 12);
    o->limits.max_kv_len = 1 + next(in);
    o->limits.max_pages = 1 + next(in);
    o->limits.max_split_rows = next(in);
    o->limits.max_row_blocks = next(in);
}

static void open_op(input *in, op *o)
{
    qkv_context *ctx = context(next(in));
    qkv_workspace_size size;
    choose_spec(in, &o->spec);
    choose_limits(in, o);
    CHECK(qkv_attention_workspace_size(ctx, &o->spec, &o->limits, &size) == QKV_OK);
    o->workspace = (qkv_workspace){
        QKV_WORKSPACE_INIT, .plan = block((int64_t)size.plan_bytes), .plan_bytes = size.plan_bytes,
        .scratch = block((int64_t)size.scratch_bytes), .scratch_bytes = size.scratch_bytes};
    CHECK(qkv_attention_create(ctx, &o->spec, &o->limits, &o->workspace, &o->attention) == QKV_OK);
}

static void close_op(op *o)
{
    qkv_attention_destroy(o->attention);
    free(o->workspace.plan);
    free(o->workspace.scratch);
}

/* ---- a batch that keeps the contract -------------------------------------------------------- */

typedef struct batch {
    array arrays[MAX_ARRAYS];
    int num_arrays;
    qkv_kv_index index[MAX_LEVELS];
    qkv_attention_batch b;
    int64_t num_groups[MAX_LEVELS], rows[MAX_LEVELS][MAX_REQUESTS], keys[MAX_LEVELS][MAX_REQUESTS];
} batch;

static int32_t *add(batch *b, DLDataType dtype, int64_t rows, int64_t columns, const DLTensor **out)
{
    array *a = &b->arrays[b->num_arrays++];
    *out = array_init(a, dtype, columns < 0 ? 1 : 2, (int64_t[]){rows, columns});
    memset(a->t.data, 0, (size_t)(a->num * a->bits / 8));
    return a->t.data;
}

static void choose_lengths(input *in, const op *o, batch *b)
{
    const int32_t last = b->b.num_levels - 1;
    b->num_groups[last] = below(in, MAX_REQUESTS + 1);
    for (int64_t r = 0; r < b->num_groups[last]; r++)
        b->rows[last][r] = below(in, 3) ? below(in, 3) : below(in, 11);
    for (int32_t l = last - 1; l >= 0; l--) { /* runs of the groups below */
        for (int64_t r = 0; r < b->num_groups[l + 1]; r++) {
            if (r == 0 || below(in, 2)) b->rows[l][b->num_groups[l]++] = 0;
            b->rows[l][b->num_groups[l] - 1] += b->rows[l + 1][r];
        }
    }
    for (int32_t l = 0; l <= last; l++)
        for (int64_t g = 0; g < b->num_groups[l]; g++) {
            const int32_t kind = next(in);
            b->keys[l][g] = kind < 200 ? kind % 40 : kind < 254 ? next(in) : 2 * next(in);
            if (kind == 255 && o->spec.flags & QKV_ATTENTION_BATCH_INVARIANT)
                b->keys[l][g] += 2040; /* as long as pieces are */
        }
}

/* Page lists begin alike, often. */
static void choose_pages(input *in, int32_t *pages, int64_t n)
{
    const int32_t salt = below(in, 2) ? next(in) : 0, from = next(in);
    for (int64_t i = 0; i < n; i++) pages[i] = (int32_t)((i * 5 + (i >= from ? salt : 0)) % POOL);
}

static void add_csr(input *in, const op *o, batch *b, int32_t level)
{
    qkv_kv_index *index = &b->index[level];
    const int64_t n = b->num_groups[level], size = o->spec.page_size;
    int32_t *indptr = add(b, QKV_I32, n + 1, -1, &index->kv_indptr);
    indptr[0] = below(in, 3);
    for (int64_t g = 0; g < n; g++) {
        const int64_t keys = b->keys[level][g], pages = size ? (keys + size - 1) / size : keys;
        indptr[g + 1] = indptr[g] + (int32_t)pages;
    }
    if (size == 0) return;
    int32_t *indices = add(b, QKV_I32, indptr[n] + below(in, 3), -1, &index->kv_indices);
    int32_t *len = add(b, QKV_I32, n, -1, &index->kv_last_page_len);
    for (int64_t g = 0; g < n; g++) {
        const int64_t keys = b->keys[level][g];
        choose_pages(in, indices + indptr[g], indptr[g + 1] - indptr[g]);
        len[g] = keys ? (int32_t)((keys - 1) % size + 1) : (int32_t)number(in);
    }
}

static void add_table(input *in, const op *o, batch *b, int32_t level)
{
    qkv_kv_index *index = &b->index[level];
    const int64_t n = b->num_groups[level], size = o->spec.page_size;
    int64_t columns = 0;
    for (int64_t g = 0; g < n; g++) {
        const int64_t pages = (b->keys[level][g] + size - 1) / size;
        columns = columns > pages ? columns : pages;
    }
    columns += below(in, 3);
    int32_t *table = add(b, QKV_I32, n, columns, &index->block_table);
    int32_t *lens = add(b, QKV_I32, n, -1, &index->kv_lens);
    for (int64_t g = 0; g < n; g++) {
        lens[g] = (int32_t)b->keys[level][g];
        choose_pages(in, table + g * columns, columns);
    }
}

/* Gives the last array the length that it turned out to need. */
static void cut_last(batch *b, int64_t n)
{
    array *a = &b->arrays[b->num_arrays - 1];
    void *all = a->t.data;
    a->t.data = block(n * a->bits / 8);
    if (n > 0) memcpy(a->t.data, all, (size_t)(n * a->bits / 8));
    a->num = a->shape[0] = n;
    free(all);
}

static void add_blocks(input *in, const op *o, batch *b)
{
    qkv_kv_index *index = &b->index[0];
    const int32_t rows = 1 + below(in, 4), cols = 1 + below(in, 9);
    const int64_t lists = below(in, 2) ? o->spec.num_kv_heads : 1;
    int64_t blocks = 0, columns = 0;
    for (int64_t r = 0; r < b->num_groups[0]; r++) {
        const int64_t n = (b->rows[0][r] + rows - 1) / rows;
        blocks += n;
        columns += n * ((b->keys[0][r] + cols - 1) / cols);
    }
    index->bsr_rows = rows;
    index->bsr_cols = cols;
    int32_t *indptr = add(b, QKV_I32, lists, blocks + 1, &index->bsr_indptr);
    int32_t *indices = add(b, QKV_I32, lists * columns, -1, &index->bsr_indices);
    int32_t listed = 0;
    for (int64_t list = 0; list < lists; list++) {
        *indptr++ = listed;
        for (int64_t r = 0; r < b->num_groups[0]; r++)
            for (int64_t row = 0; row < b->rows[0][r]; row += rows) {
                const int32_t step = 1 + below(in, 4);
                for (int32_t c = below(in, 3); c * (int64_t)cols < b->keys[0][r]; c += step)
                    indices[listed++] = c;
                *indptr++ = listed;
            }
    }
    cut_last(b, listed);
    if (below(in, 2)) return;
    const int32_t block_bytes = (rows * cols + 7) / 8;
    uint8_t *mask = (uint8_t *)add(b, QKV_U8, listed, block_bytes, &index->bsr_mask);
    const int64_t bytes = (int64_t)listed * block_bytes;
    const int32_t salt = next(in);
    for (int64_t i = 0; i < bytes; i++) mask[i] = (uint8_t)(i * 37 ^ salt);
}

static void add_mask(input *in, batch *b)
{
    const int32_t last = b->b.num_levels - 1;
    const int64_t n = b->num_groups[last];
    int64_t *indptr = (int64_t *)(void *)add(b, QKV_I64, n + 1, -1, &b->b.mask_indptr);
    indptr[0] = below(in, 3);
    for (int64_t r = 0; r < n; r++)
        indptr[r + 1] = indptr[r] + (b->rows[last][r] * b->keys[last][r] + 7) / 8 + below(in, 2);
    uint8_t *bits = (uint8_t *)add(b, QKV_U8, indptr[n], -1, &b->b.mask_bits);
    const int32_t salt = next(in);
    for (int64_t i = 0; i < indptr[n]; i++) bits[i] = (uint8_t)(i * 37 ^ salt);
}

static void build(input *in, const op *o, batch *b)
{
    memset(b, 0, sizeof *b);
    const int sparse = below(in, 3) == 0;
    const int32_t levels = sparse ? 1 : 1 + below(in, o->limits.max_levels);
    b->b =
        (qkv_attention_batch){QKV_ATTENTION_BATCH_INIT, .num_levels = levels, .levels = b->index};
    choose_lengths(in, o, b);
    for (int32_t l = 0; l < levels; l++) {
        b->index[l] = (qkv_kv_index){QKV_KV_INDEX_INIT};
        int32_t *qo = add(b, QKV_I32, b->num_groups[l] + 1, -1, &b->index[l].qo_indptr);
        for (int64_t g = 0; g < b->num_groups[l]; g++) qo[g + 1] = qo[g] + (int32_t)b->rows[l][g];
        if (o->spec.page_size == 0 || below(in, 2))
            add_csr(in, o, b, l);
        else
            add_table(in, o, b, l);
    }
    if (sparse) add_blocks(in, o, b);
    if (o->spec.mask == QKV_MASK_CUSTOM) add_mask(in, b);
    if (below(in, 4) == 0) {
        const int64_t n = b->num_groups[levels - 1];
        int32_t *pos = add(b, QKV_I32, n, -1, &b->b.qo_pos);
        for (int64_t r = 0; r < n; r++) pos[r] = (int32_t)number(in);
    }
    b->b.detect_shared_prefix = levels == 1 && !sparse && o->spec.page_size > 0 &&
                                !(o->spec.flags & QKV_ATTENTION_BATCH_INVARIANT) && below(in, 2);
}

/* A number elsewhere, a shorter tensor (a longer one would be a lie that no check can see), a field. */
static void spoil(input *in, batch *b)
{
    array *a = &b->arrays[below(in, b->num_arrays)];
    const int64_t value = number(in), at = a->num > 0 ? (next(in) << 8 | next(in)) % a->num : 0;
    switch (below(in, 8)) {
    case 0: a->shape[below(in, 2)] -= 1 + below(in, 2); break;
    case 1: a->t.ndim += below(in, 2) ? -1 : 1; break;
    case 2: a->t.dtype = below(in, 2) ? QKV_F32 : QKV_U8; break;
    case 3:
        if (below(in, 2))
            b->b.num_levels = (int32_t)(value < b->b.num_levels ? value : 0);
        else
            b->b.detect_shared_prefix = (int32_t)value;
        break;
    case 4: *(below(in, 2) ? &b->index[0].bsr_rows : &b->index[0].bsr_cols) = (int32_t)value; break;
    default:
        if (a->num > 0 && a->bits == 64)
            ((int64_t *)a->t.data)[at] = value;
        else if (a->num > 0 && a->bits == 32)
            ((int32_t *)a->t.data)[at] = (int32_t)value;
    }
}

static void free_batch(batch *b)
{
    for (int i = 0; i < b->num_arrays; i++) free(b->arrays[i].t.data);
}

/* ---- a layer ------------------------------------------------------------------------------- */

static void fill_ones(array *a, int alternate)
{
    const int bits = a->t.dtype.bits, code = a->t.dtype.code;
    for (int64_t i = 0; i < a->num; i++) {
        const int minus = alternate && i % 3 == 0;
        if (bits == 32)
            ((float *)a->t.data)[i] = minus ? -1.f : 1.f;
        else if (bits == 16)
            ((uint16_t *)a->t.data)[i] = (uint16_t)((code == 4 ? 0x3f80 : 0x3c00) | minus << 15);
        else
            ((uint8_t *)a->t.data)[i] =
                (uint8_t)(code == 0 ? (minus ? 0xff : 1) : 0x38 | minus << 7);
    }
}

/* k or v of a batch of so many ragged tokens. */
static void fill_kv(const op *o, int64_t ragged, int32_t dim, int alternate, array *out)
{
    const int nhd = o->spec.kv_layout == QKV_NHD;
    const int64_t heads = o->spec.num_kv_heads,
                  tokens = o->spec.page_size ? o->spec.page_size : ragged;
    const int64_t shape[] = {POOL, nhd ? tokens : heads, nhd ? heads : tokens, dim};
    const int paged = o->spec.page_size > 0;
    array_init(out, o->spec.dtype_kv, paged ? 4 : 3, paged ? shape : shape + 1);
    fill_ones(out, alternate);
}

/* Runs into *out and *lse, and judges them. */
static qkv_status run(const op *o, int64_t tokens, int64_t ragged, array *out, array *lse)
{
    const qkv_attention_spec *s = &o->spec;
    array q, k, v;
    array_init(&q, s->dtype_q, 3, (int64_t[]){tokens, s->num_qo_heads, s->head_dim_qk});
    array_init(out, QKV_F32, 3, (int64_t[]){tokens, s->num_qo_heads, s->head_dim_vo});
    array_init(lse, QKV_F32, 2, (int64_t[]){tokens, s->num_qo_heads});
    fill_ones(&q, 0);
    fill_kv(o, ragged, s->head_dim_qk, 1, &k);
    fill_kv(o, ragged, s->head_dim_vo, 0, &v);
    memset(out->t.data, 0xff, (size_t)out->num * sizeof(float));
    memset(lse->t.data, 0xff, (size_t)lse->num * sizeof(float));
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .q = &q.t,     .k = &k.t, .v = &v.t,
                                 .o = &out->t,          .lse = &lse->t};
    const qkv_status status = qkv_attention_run(o->attention, &io, NULL);
    for (int64_t i = 0; status == QKV_OK && i < out->num; i++) {
        const float x = ((float *)out->t.data)[i], l = ((float *)lse->t.data)[i / s->head_dim_vo];
        CHECK(isinf(l) ? l < 0 && x == 0 : fabsf(x - 1) < 0.01f && !isnan(l));
    }
    free(q.t.data);
    free(k.t.data);
    free(v.t.data);
    return status;
}

static int64_t last_of(const DLTensor *indptr)
{
    return ((const int32_t *)indptr->data)[indptr->shape[0] - 1];
}

/* Runs a batch that was planned. */
static qkv_status run_batch(const op *o, const batch *b, array *out, array *lse)
{
    int64_t ragged = 0;
    for (int32_t l = 0; o->spec.page_size == 0 && l < b->b.num_levels; l++)
        if (last_of(b->index[l].kv_indptr) > ragged) ragged = last_of(b->index[l].kv_indptr);
    if (ragged > 1 << 16) ragged = 1 << 16; /* keys of requests without rows, perhaps */
    return run(o, last_of(b->index[b->b.num_levels - 1].qo_indptr), ragged, out, lse);
}

static void free_outputs(array *out, array *lse)
{
    free(out->t.data);
    free(lse->t.data);
}

static int is_refused(qkv_status status)
{
    CHECK(status == QKV_OK || (status == QKV_ERR_INVALID && qkv_last_error()[0]));
    return status != QKV_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, data + size};
    op o;
    static batch good, bad;
    array out, lse, out2, lse2;
    open_op(&in, &o);
    input again = in;
    build(&in, &o, &good);
    build(&again, &o, &bad);
    for (int i = 0; i == 0 || (i < 4 && in.at < in.end); i++) spoil(&in, &bad);

    const int taken = !is_refused(qkv_attention_plan(o.attention, &good.b, NULL));
    CHECK(taken || !o.ample);
    if (taken) CHECK(run_batch(&o, &good, &out, &lse) == QKV_OK);
    if (is_refused(qkv_attention_plan(o.attention, &bad.b, NULL))) {
        free_batch(&bad);
        if (taken) {
            CHECK(run_batch(&o, &good, &out2, &lse2) == QKV_OK);
            CHECK(memcmp(out.t.data, out2.t.data, (size_t)out.num * sizeof(float)) == 0);
            CHECK(memcmp(lse.t.data, lse2.t.data, (size_t)lse.num * sizeof(float)) == 0);
            free_outputs(&out2, &lse2);
        }
        free_batch(&good);
    } else {
        free_batch(&good);
        is_refused(run_batch(&o, &bad, &out2, &lse2)); /* its pages may lie outside the pool */
        free_outputs(&out2, &lse2);
        free_batch(&bad);
    }
    if (taken) free_outputs(&out, &lse);
    close_op(&o);
    return 0;
}
