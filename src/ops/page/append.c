/* append.c - host side of qkv_kv_append and qkv_kv_append_slots: check, choose, launch. Every page
 * and slot that will be written is checked first, so the kernel cannot fail half way.
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/kv_index.h"
#include "base/rope_spec.h"
#include "base/scale_spec.h"
#include "core/launch.h"
#include "ops/page/append_params.h"
#include "qkv/page.h"

QI_CPU_DECLARE(append);

const qi_kernel qi_append_kernels[] = {
    QI_CPU_ROW("append.any", NULL, append),
    QI_CUDA_ROW("append.cuda", NULL, "ops/page/append.cu", "append",
                "K_FROM K_TO V_FROM V_TO Q_FROM Q_TO VEC LAYOUT SCALED GROUP THREADS"),
    {0},
};

/* The shape that k_cache and v_cache have in common. */
typedef struct pool_shape {
    i64 pages, page_size, num_heads;
} pool_shape;

/* Every float type and i8, which a cache (and q_out, but for i8) may have. */
static qkv_status expect_stored(const DLTensor *t, const char *name, int ndim, const i64 *shape,
                                int allow_i8)
{
    const i32 dtype = t ? (i32)qi_dtype_of(t->dtype) : -1;
    if (dtype == QI_E4M3 || dtype == QI_E5M2 || (dtype == QI_I8 && allow_i8))
        return qi_expect(t, name, t->dtype, ndim, shape);
    return qi_expect_float(t, name, ndim, shape);
}

/* A pool [pages, page_size, heads, head_dim] by layout. The first one read says the shape. */
static qkv_status read_cache(const DLTensor *cache, const char *name, i32 layout, pool_shape *shape,
                             append_tensor *t)
{
    const int slot = layout == QKV_NHD ? 1 : 2, head = 3 - slot;
    QI_TRY(expect_stored(cache, name,
                         QI_SHAPE(shape->pages,
                                  layout == QKV_NHD ? shape->page_size : shape->num_heads,
                                  layout == QKV_NHD ? shape->num_heads : shape->page_size, QI_ANY),
                         1));
    *shape = (pool_shape){cache->shape[0], cache->shape[slot], cache->shape[head]};
    *t = (append_tensor){
        .cache = qi_data(cache),
        .page_stride = qi_stride(cache, 0),
        .slot_stride = qi_stride(cache, slot),
        .head_stride = qi_stride(cache, head),
        .num_heads = shape->num_heads,
        .head_dim = cache->shape[3],
        .cache_dtype = (qi_dtype)qi_dtype_of(cache->dtype),
    };
    return QKV_OK;
}

/* One half of [pages, 2, ...] as if it were a tensor by itself. */
typedef struct half {
    DLTensor t;
    i64 shape[4], strides[4];
} half;

static const DLTensor *half_of(const DLTensor *kv, i64 which, half *h)
{
    for (int i = 0; i < 4; i++) {
        const int axis = i == 0 ? 0 : i + 1;
        h->shape[i] = kv->shape[axis];
        h->strides[i] = qi_stride(kv, axis);
    }
    h->t = *kv;
    h->t.ndim = 4;
    h->t.shape = h->shape;
    h->t.strides = h->strides;
    h->t.byte_offset += (u64)(which * qi_stride(kv, 1)) * (kv->dtype.bits / 8u);
    return &h->t;
}

/* The new rows of k or v, whose cache is known. */
static qkv_status read_rows(const DLTensor *rows, const char *name, i64 nnz, append_tensor *t)
{
    QI_TRY(qi_expect_float(rows, name, QI_SHAPE(nnz, t->num_heads, t->head_dim)));
    t->rows = qi_data(rows);
    t->row_stride = qi_stride(rows, 0);
    t->row_head_stride = qi_stride(rows, 1);
    t->dtype = (qi_dtype)qi_dtype_of(rows->dtype);
    return QKV_OK;
}

/* What is read while rows are written must not be among them. out: k_cache, v_cache, q_out or NULL. */
static qkv_status expect_unwritten(const DLTensor *t, const char *name,
                                   const DLTensor *const out[3])
{
    static const char *const names[] = {"k_cache", "v_cache", "q_out"};
    for (int i = 0; t && i < 3; i++)
        QI_REQUIRE(!out[i] || !qi_overlap(t, out[i]),
                   "%s: expected memory apart from %s, got an overlap", name, names[i]);
    return QKV_OK;
}

/* Everything but where the rows go. */
static qkv_status read_tensors(DLTensor *k_cache, DLTensor *v_cache, i32 kv_layout,
                               const DLTensor *k, const DLTensor *v, pool_shape *shape,
                               append_params *p)
{
    QI_REQUIRE(kv_layout == QKV_NHD || kv_layout == QKV_HND,
               "kv_layout: expected QKV_NHD or QKV_HND, got %d", (int)kv_layout);
    half halves[2];
    const DLTensor *caches[2] = {k_cache, v_cache};
    if (!v_cache) {
        QI_TRY(expect_stored(k_cache, "k_cache", QI_SHAPE(QI_ANY, 2, QI_ANY, QI_ANY, QI_ANY), 1));
        for (int i = 0; i < 2; i++) caches[i] = half_of(k_cache, i, &halves[i]);
    }
    *shape = (pool_shape){QI_ANY, QI_ANY, QI_ANY};
    QI_TRY(read_cache(caches[0], "k_cache", kv_layout, shape, &p->k));
    QI_TRY(read_cache(caches[1], "v_cache", kv_layout, shape, &p->v));
    QI_REQUIRE(shape->page_size > 0 && shape->page_size <= 1 << 24,
               "k_cache: expected a page_size of 1 to 2^24, got %lld", (long long)shape->page_size);
    QI_TRY(read_rows(k, "k", QI_ANY, &p->k));
    QI_TRY(read_rows(v, "v", k->shape[0], &p->v));
    for (int i = 0; i < 2; i++)
        QI_REQUIRE(!qi_overlap(k, caches[i]) && !qi_overlap(v, caches[i]),
                   "k, v: expected memory apart from the caches");
    p->page_size = shape->page_size;
    p->inverse_page_size = 1. / (double)shape->page_size;
    p->num_pages = shape->pages;
    p->nnz = k->shape[0];
    return QKV_OK;
}

/* How a tensor's rows change on their way. Heads that do not, and adjoin on both sides, are one. */
static qkv_status set_changes(append_tensor *t, const char *name, int rotate)
{
    t->rotate = rotate;
    t->plain = !rotate && qi_scale_is_one(&t->scale) && qi_dtype_bytes(t->cache_dtype) > 1;
    QI_REQUIRE(t->plain || t->head_dim <= APPEND_MAX_DIM,
               "%s: expected a head_dim of at most %d with 8-bit types, a scale or rope, got %lld",
               name, APPEND_MAX_DIM, (long long)t->head_dim);
    if (t->plain && t->row_head_stride == t->head_dim && t->head_stride == t->head_dim) {
        t->head_dim *= t->num_heads;
        t->num_heads = 1;
    }
    return QKV_OK;
}

/* q and q_out, as a tensor whose cache has a page a row. */
static qkv_status read_queries(const qkv_kv_append_options *o, const DLTensor *const caches[2],
                               const DLTensor *k, const DLTensor *v, append_params *p)
{
    QI_REQUIRE(!o->q == !o->q_out, "q, q_out: expected both or neither, got one");
    if (!o->q) return QKV_OK;
    QI_REQUIRE(o->rope, "q: expected NULL without rope");
    QI_TRY(qi_expect_float(o->q, "q", QI_SHAPE(p->nnz, QI_ANY, p->k.head_dim)));
    const i64 heads = o->q->shape[1];
    QI_TRY(expect_stored(o->q_out, "q_out", QI_SHAPE(p->nnz, heads, p->k.head_dim), 0));
    QI_TRY(qi_expect_distinct(o->q_out, "q_out"));
    QI_REQUIRE(qi_same(o->q_out, o->q) || !qi_overlap(o->q_out, o->q),
               "q_out: expected q itself or memory apart from it");
    for (int i = 0; i < 2; i++)
        QI_REQUIRE(!qi_overlap(o->q_out, i ? v : k), "q_out: expected memory apart from k and v");
    QI_TRY(expect_unwritten(o->q, "q", (const DLTensor *[]){caches[0], caches[1], NULL}));
    QI_TRY(expect_unwritten(o->q_out, "q_out", (const DLTensor *[]){caches[0], caches[1], NULL}));
    p->q = (append_tensor){.rows = qi_data(o->q),
                           .row_stride = qi_stride(o->q, 0),
                           .row_head_stride = qi_stride(o->q, 1),
                           .cache = qi_data(o->q_out),
                           .page_stride = qi_stride(o->q_out, 0),
                           .head_stride = qi_stride(o->q_out, 1),
                           .num_heads = heads,
                           .head_dim = p->k.head_dim,
                           .dtype = (qi_dtype)qi_dtype_of(o->q->dtype),
                           .cache_dtype = (qi_dtype)qi_dtype_of(o->q_out->dtype)};
    return QKV_OK;
}

/* Options of either call, once the tensors are known. out: the caches, and here q_out joins them. */
static qkv_status read_options(const qkv_kv_append_options *options, const DLTensor *k,
                               const DLTensor *v, append_params *p, const DLTensor **positions,
                               const DLTensor *out[3])
{
    qkv_kv_append_options o = {QKV_KV_APPEND_OPTIONS_INIT};
    if (options) QI_TRY(qi_read_struct(&o, sizeof o, options, "options"));
    QI_REQUIRE(o.reserved == 0, "options.reserved: expected 0, got %u", (unsigned)o.reserved);
    QI_TRY(qi_scale_read(&o.k_scale, "k_scale", p->k.num_heads, &p->k.scale));
    QI_TRY(qi_scale_read(&o.v_scale, "v_scale", p->v.num_heads, &p->v.scale));
    if (o.rope) QI_TRY(qi_rope_read(o.rope, "rope", p->k.head_dim, &p->rope));
    QI_TRY(read_queries(&o, out, k, v, p));
    QI_TRY(qi_scale_read(&o.q_scale, "q_scale", p->q.num_heads, &p->q.scale));
    QI_TRY(set_changes(&p->k, "k", o.rope != NULL));
    QI_TRY(set_changes(&p->v, "v", 0));
    if (p->q.rows) QI_TRY(set_changes(&p->q, "q", 1));
    out[2] = o.q_out;
    QI_TRY(expect_unwritten(o.k_scale.tensor, "k_scale", out));
    QI_TRY(expect_unwritten(o.v_scale.tensor, "v_scale", out));
    QI_TRY(expect_unwritten(o.q_scale.tensor, "q_scale", out));
    *positions = o.positions;
    return QKV_OK;
}

/* A page table, checked, in memory that stays as it is. */
static qkv_status read_index(const qkv_kv_index *index, i64 page_size, const DLTensor *const out[3],
                             qi_kv_view *view)
{
    QI_TRY(qi_kv_index_read(index, page_size, view));
    qkv_kv_index in;
    QI_TRY(qi_read_struct(&in, sizeof in, index, "index"));
    QI_TRY(expect_unwritten(in.qo_indptr, "qo_indptr", out));
    QI_TRY(expect_unwritten(in.kv_indptr, "kv_indptr", out));
    QI_TRY(expect_unwritten(in.kv_indices, "kv_indices", out));
    QI_TRY(expect_unwritten(in.kv_last_page_len, "kv_last_page_len", out));
    QI_TRY(expect_unwritten(in.block_table, "block_table", out));
    return expect_unwritten(in.kv_lens, "kv_lens", out);
}

/* Every new row has a position among its request's keys, and the page there is in the pool. */
static qkv_status check_destinations(const append_params *p, i64 pages)
{
    const qi_kv_view *view = &p->index;
    for (i64 r = 0; r < view->num_requests; r++) {
        const i64 begin = view->qo_indptr[r], end = view->qo_indptr[r + 1];
        if (begin == end) continue;
        QI_REQUIRE(pages > 0, "k_cache: expected at least 1 page, got 0");
        const i64 kv_len = qi_kv_len(view, r);
        if (!p->positions) {
            QI_REQUIRE(end - begin <= kv_len,
                       "qo_indptr: expected at most kv_len = %lld rows, got %lld (request %lld)",
                       (long long)kv_len, (long long)(end - begin), (long long)r);
            QI_TRY(qi_kv_check_pages(view, r, (kv_len - (end - begin)) / p->page_size,
                                     (kv_len - 1) / p->page_size + 1, pages, NULL));
            continue;
        }
        for (i64 row = begin; row < end; row++) {
            const i64 position = p->positions[row];
            QI_REQUIRE(position >= 0 && position < kv_len,
                       "positions: expected >= 0 and below kv_len = %lld, got %lld (request %lld, "
                       "entry %lld)",
                       (long long)kv_len, (long long)position, (long long)r, (long long)row);
            const i64 page = position / p->page_size;
            QI_TRY(qi_kv_check_pages(view, r, page, page + 1, pages, NULL));
        }
    }
    return QKV_OK;
}

/* Every slot is in the pool; negative ones are fine. */
static qkv_status check_slots(const append_params *p, i64 pages)
{
    const i32 *slots32 = p->slots;
    const i64 *slots64 = p->slots;
    const int is32 = p->slots_dtype == QI_I32;
    for (i64 i = 0; i < p->nnz; i++) {
        const i64 slot = is32 ? slots32[i] : slots64[i];
        QI_REQUIRE(slot < 0 || slot / p->page_size < pages,
                   "slot_mapping: expected a slot below %lld pages of %lld, got %lld (row %lld)",
                   (long long)pages, (long long)p->page_size, (long long)slot, (long long)i);
    }
    return QKV_OK;
}

/* No element of the caches is another one too. */
static qkv_status expect_distinct(const DLTensor *k_cache, const DLTensor *v_cache)
{
    QI_TRY(qi_expect_distinct(k_cache, "k_cache"));
    if (!v_cache) return QKV_OK;
    QI_REQUIRE(!qi_overlap(v_cache, k_cache),
               "v_cache: expected memory apart from k_cache, got an overlap");
    return qi_expect_distinct(v_cache, "v_cache");
}

/* Elements of one access that a tensor's places allow. */
static i32 vector_of(const append_tensor *t, const qi_rope *rope, i32 most)
{
    if (!t->rows) return most;
    const i64 pairs = !t->rotate ? 0 : rope->interleaved ? 2 * rope->num_pairs : rope->num_pairs;
    return QI_VECTOR(most, t->head_dim, pairs, t->row_stride, t->row_head_stride, t->page_stride,
                     t->slot_stride, t->head_stride, QI_ADDRESS(t->rows, t->dtype),
                     QI_ADDRESS(t->cache, t->cache_dtype));
}

/* A row is a warp's, or as many as leave a thread 4 pieces of k and of v; where it rotates, and the block
 * shares its angles, a block's. */
static qkv_status launch_cuda(const qkv_context *ctx, const qi_kernel *row, const append_params *p,
                              void *stream)
{
    enum { WARP = 32, LEAST = 128, MOST = 256, NONE = 0, HALVES = 1, INTERLEAVED = 2 };
    const append_tensor *const tensors[] = {&p->k, &p->v, &p->q};
    i32 vec = 8;
    for (int i = 0; i < 3; i++) vec = vector_of(tensors[i], &p->rope, vec);
    i64 pieces = 0;
    i32 scaled = 0;
    for (int i = 0; i < 3; i++) {
        scaled |= tensors[i]->rows && !qi_scale_is_one(&tensors[i]->scale);
        const i64 of_row = tensors[i]->num_heads * tensors[i]->head_dim / vec;
        if (tensors[i]->rows && of_row > pieces) pieces = of_row;
    }
    const i32 layout = p->rope.num_pairs == 0 ? NONE : p->rope.interleaved ? INTERLEAVED : HALVES;
    i32 group = layout == NONE ? WARP : MOST;
    while (group < MOST && (i64)group * 4 < pieces) group *= 2;
    const i32 threads = group < LEAST ? LEAST : group;
    const i32 constants[] = {(i32)p->k.dtype,
                             (i32)p->k.cache_dtype,
                             (i32)p->v.dtype,
                             (i32)p->v.cache_dtype,
                             (i32)p->q.dtype,
                             (i32)p->q.cache_dtype,
                             vec,
                             layout,
                             scaled,
                             group,
                             threads};
    const qi_grid grid = {.x = qi_blocks(p->nnz, threads / group),
                          .threads = (u32)threads,
                          .shared_bytes = (u32)p->rope.num_pairs * 2 * (u32)sizeof(float),
                          .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

static qkv_status launch(const qkv_context *ctx, append_params *p, void *stream)
{
    if (p->nnz == 0) return QKV_OK;
    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_append_kernels, NULL, &row));
    if (row->device == kDLCUDA) return launch_cuda(ctx, row, p, stream);
    const append_tensor *k = &p->k, *v = &p->v, *q = &p->q;
    const i64 elements =
        k->num_heads * k->head_dim + v->num_heads * v->head_dim + q->num_heads * q->head_dim;
    const i64 written = p->nnz * elements * (i64)qi_dtype_bytes(k->cache_dtype);
    const i64 tasks = qi_tasks_for(written + p->nnz * elements * (i64)qi_dtype_bytes(k->dtype));
    p->streams = qi_streams(written);
    qi_launch(ctx, row, tasks < p->nnz ? tasks : p->nnz, p);
    return QKV_OK;
}

qkv_status qkv_kv_append(qkv_context *ctx, DLTensor *k_cache, DLTensor *v_cache, int32_t kv_layout,
                         const DLTensor *k, const DLTensor *v, const qkv_kv_index *index,
                         const DLTensor *positions, const qkv_kv_append_options *options,
                         void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    append_params params = {.slots = NULL};
    pool_shape shape;
    QI_TRY(read_tensors(k_cache, v_cache, kv_layout, k, v, &shape, &params));
    const DLTensor *of_slots, *out[3] = {k_cache, v_cache, NULL};
    QI_TRY(read_options(options, k, v, &params, &of_slots, out));
    QI_REQUIRE(!of_slots, "options.positions: expected NULL, since positions are an argument");
    QI_TRY(read_index(index, shape.page_size, out, &params.index));
    if (positions) {
        QI_TRY(qi_expect(positions, "positions", QKV_I32, QI_SHAPE(params.nnz)));
        QI_TRY(expect_unwritten(positions, "positions", out));
        params.positions = qi_data(positions);
    }
    if (qi_host_reads()) {
        const i64 appended = params.index.qo_indptr[params.index.num_requests];
        QI_REQUIRE(appended <= params.nnz,
                   "qo_indptr: expected at most the %lld rows of k, got %lld",
                   (long long)params.nnz, (long long)appended);
        params.nnz = appended;
        QI_TRY(check_destinations(&params, shape.pages));
    }
    QI_TRY(expect_distinct(k_cache, v_cache));
    return launch(ctx, &params, stream);
}

qkv_status qkv_kv_append_slots(qkv_context *ctx, DLTensor *k_cache, DLTensor *v_cache,
                               int32_t kv_layout, const DLTensor *k, const DLTensor *v,
                               const DLTensor *slot_mapping, const qkv_kv_append_options *options,
                               void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    append_params params = {.nnz = 0};
    pool_shape shape;
    QI_TRY(read_tensors(k_cache, v_cache, kv_layout, k, v, &shape, &params));
    const DLTensor *positions, *out[3] = {k_cache, v_cache, NULL};
    QI_TRY(read_options(options, k, v, &params, &positions, out));
    QI_REQUIRE(!positions == (params.rope.num_pairs == 0),
               "options.positions: expected a tensor with rope, and only then");
    if (positions) {
        QI_TRY(qi_expect(positions, "options.positions", QKV_I32, QI_SHAPE(params.nnz)));
        QI_TRY(expect_unwritten(positions, "options.positions", out));
        params.positions = qi_data(positions);
    }
    const int is64 = slot_mapping && qi_dtype_of(slot_mapping->dtype) == QI_I64;
    QI_TRY(qi_expect(slot_mapping, "slot_mapping", is64 ? QKV_I64 : QKV_I32, QI_SHAPE(params.nnz)));
    QI_TRY(expect_unwritten(slot_mapping, "slot_mapping", out));
    params.slots = qi_data(slot_mapping);
    params.slots_dtype = is64 ? QI_I64 : QI_I32;
    if (qi_host_reads()) QI_TRY(check_slots(&params, shape.pages));
    QI_TRY(expect_distinct(k_cache, v_cache));
    return launch(ctx, &params, stream);
}
