/* copy_pages.c - host side of qkv_kv_copy_pages: check, choose, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "core/launch.h"
#include "ops/page/copy_pages_params.h"
#include "qkv/page.h"

QI_CPU_DECLARE(copy_pages);

const qi_kernel qi_copy_pages_kernels[] = {
    QI_CPU_ROW("copy_pages.any", NULL, copy_pages),
    QI_CUDA_ROW("copy_pages.cuda", NULL, "ops/page/copy_pages.cu", "copy_pages", "VEC THREADS"),
    {0},
};

/* A pool [pages, ...] of pages pages (QI_ANY: any number). */
static qkv_status read_pool(const DLTensor *cache, const char *name, i64 pages, copy_pool *pool)
{
    QI_REQUIRE(cache, "%s: expected a tensor, got NULL", name);
    QI_REQUIRE(qi_dtype_of(cache->dtype) >= 0,
               "%s: expected a dtype of this library, got code %d, %d bits", name,
               (int)cache->dtype.code, (int)cache->dtype.bits);
    if (cache->ndim == 5)
        QI_TRY(
            qi_expect(cache, name, cache->dtype, QI_SHAPE(pages, QI_ANY, QI_ANY, QI_ANY, QI_ANY)));
    else
        QI_TRY(qi_expect(cache, name, cache->dtype, QI_SHAPE(pages, QI_ANY, QI_ANY, QI_ANY)));

    QI_TRY(qi_expect_distinct(cache, name));
    const i64 size = (i64)qi_dtype_bytes((qi_dtype)qi_dtype_of(cache->dtype));
    *pool = (copy_pool){.data = qi_data(cache),
                        .page_stride = qi_stride(cache, 0) * size,
                        .runs = {1, 1, 1},
                        .run_bytes = size};
    /* From the last axis outwards: what adjoins joins the run, the rest become loops. */
    int loop = 3;
    for (int axis = cache->ndim - 1; axis > 0; axis--) {
        const i64 n = cache->shape[axis], stride = qi_stride(cache, axis) * size;
        if (n == 1) continue;
        if (loop == 3 && stride == pool->run_bytes) {
            pool->run_bytes *= n;
        } else {
            pool->runs[--loop] = n;
            pool->run_strides[loop] = stride;
        }
    }
    return QKV_OK;
}

static qkv_status check_range(const i32 *numbers, const char *name, i64 n, i64 pages)
{
    for (i64 i = 0; i < n; i++)
        QI_REQUIRE(numbers[i] >= 0 && numbers[i] < pages,
                   "%s: expected a page from 0 to %lld, got %d (entry %lld)", name,
                   (long long)pages - 1, (int)numbers[i], (long long)i);
    return QKV_OK;
}

enum { WINDOW = 1 << 16 }; /* pages whose marks fit the stack */

/* No page twice in dst, and none in both: one bit a page of dst, a window of the pool at a time. */
static qkv_status check_distinct(const i32 *src, const i32 *dst, i64 n)
{
    u64 marks[WINDOW / 64];
    i64 end = 0; /* of dst's pages: a pool may claim to have any number */
    for (i64 i = 0; i < n; i++) end = dst[i] >= end ? (i64)dst[i] + 1 : end;
    for (i64 base = 0; base < end; base += WINDOW) {
        memset(marks, 0, sizeof marks);
        for (i64 i = 0; i < n; i++) {
            const i64 page = dst[i] - base;
            if (page < 0 || page >= WINDOW) continue;
            QI_REQUIRE(!(marks[page / 64] >> page % 64 & 1),
                       "dst: expected no page twice, got %d again (entry %lld)", (int)dst[i],
                       (long long)i);
            marks[page / 64] |= (u64)1 << page % 64;
        }
        for (i64 i = 0; i < n; i++) {
            const i64 page = src[i] - base;
            QI_REQUIRE(page < 0 || page >= WINDOW || !(marks[page / 64] >> page % 64 & 1),
                       "src: expected no page that is in dst too, got %d (entry %lld)", (int)src[i],
                       (long long)i);
        }
    }
    return QKV_OK;
}

/* Page numbers are read while pages are written. */
static qkv_status expect_unwritten(const DLTensor *t, const char *name, const DLTensor *k_cache,
                                   const DLTensor *v_cache)
{
    QI_REQUIRE(!qi_overlap(t, k_cache), "%s: expected memory apart from k_cache, got an overlap",
               name);
    QI_REQUIRE(!v_cache || !qi_overlap(t, v_cache),
               "%s: expected memory apart from v_cache, got an overlap", name);
    return QKV_OK;
}

static qkv_status launch_cuda(const qkv_context *ctx, const qi_kernel *row,
                              const copy_pages_params *p, void *stream)
{
    enum { THREADS = 256, MAX_Y = 65535 };
    i32 vec = 16;
    i64 chunks = 1;
    for (i64 i = 0; i < p->num_pools; i++) {
        const copy_pool *pool = &p->pools[i];
        vec = QI_VECTOR(vec, (i64)(uintptr_t)pool->data, pool->page_stride, pool->run_bytes,
                        pool->run_strides[0], pool->run_strides[1], pool->run_strides[2]);
        const i64 of_pool =
            pool->runs[0] * pool->runs[1] * pool->runs[2] * qi_blocks(pool->run_bytes, COPY_CHUNK);
        chunks = of_pool > chunks ? of_pool : chunks;
    }
    const i32 constants[] = {vec, THREADS};
    for (i64 begin = 0; begin < p->num_copies; begin += MAX_Y) {
        copy_pages_params part = *p;
        part.src += begin;
        part.dst += begin;
        const i64 left = p->num_copies - begin;
        const qi_grid grid = {.x = (u32)(chunks < 1024 ? chunks : 1024),
                              .y = (u32)(left < MAX_Y ? left : MAX_Y),
                              .z = (u32)p->num_pools,
                              .threads = THREADS,
                              .overlaps_before = 1};
        QI_TRY(qi_launch_cuda(ctx, row, constants, &grid, &part, stream));
    }
    return QKV_OK;
}

qkv_status qkv_kv_copy_pages(qkv_context *ctx, DLTensor *k_cache, DLTensor *v_cache,
                             const DLTensor *src, const DLTensor *dst, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    copy_pages_params params = {.num_pools = v_cache ? 2 : 1};
    QI_TRY(read_pool(k_cache, "k_cache", QI_ANY, &params.pools[0]));
    const i64 pages = k_cache->shape[0];
    if (v_cache) {
        QI_TRY(read_pool(v_cache, "v_cache", pages, &params.pools[1]));
        QI_REQUIRE(!qi_overlap(v_cache, k_cache),
                   "v_cache: expected memory apart from k_cache, got an overlap");
    }
    QI_TRY(qi_expect(src, "src", QKV_I32, QI_SHAPE(QI_ANY)));
    const i64 n = params.num_copies = src->shape[0];
    QI_TRY(qi_expect(dst, "dst", QKV_I32, QI_SHAPE(n)));
    QI_TRY(expect_unwritten(src, "src", k_cache, v_cache));
    QI_TRY(expect_unwritten(dst, "dst", k_cache, v_cache));
    params.src = qi_data(src);
    params.dst = qi_data(dst);
    params.num_pages = pages;
    if (qi_host_reads()) {
        QI_TRY(check_range(params.src, "src", n, pages));
        QI_TRY(check_range(params.dst, "dst", n, pages));
        QI_TRY(check_distinct(params.src, params.dst, n));
    }
    if (n == 0) return QKV_OK;

    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_copy_pages_kernels, NULL, &row));
    i64 bytes = 0; /* of a page of every pool */
    for (i64 i = 0; i < params.num_pools; i++) {
        const copy_pool *pool = &params.pools[i];
        bytes += pool->runs[0] * pool->runs[1] * pool->runs[2] * pool->run_bytes;
    }
    if (bytes == 0) return QKV_OK;
    if (row->device == kDLCUDA) return launch_cuda(ctx, row, &params, stream);
    const i64 tasks = qi_tasks_for(n * bytes * 2), pieces = n * params.num_pools;
    qi_launch(ctx, row, tasks < pieces ? tasks : pieces, &params);
    return QKV_OK;
}
