/* copy_pages.cpu.c - copy pages within their pools. Tasks share the (pool, page) pairs.
 * Bound: memory, one read and one write of every page.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/prelude.h"
#include "ops/page/copy_pages_params.h"

static void copy_page(const copy_pool *pool, char *out, const char *in)
{
    const i64 *n = pool->runs, *stride = pool->run_strides;
    for (i64 i = 0; i < n[0]; i++)
        for (i64 j = 0; j < n[1]; j++)
            for (i64 k = 0; k < n[2]; k++) {
                const i64 at = i * stride[0] + j * stride[1] + k * stride[2];
                memcpy(out + at, in + at, (size_t)pool->run_bytes);
            }
}

QI_CPU_KERNEL(copy_pages)
{
    const copy_pages_params *p = params;
    i64 begin, end;
    qi_task_share(task, p->num_pools * p->num_copies, 1, &begin, &end);
    for (i64 i = begin; i < end; i++) {
        const copy_pool *pool = &p->pools[i / p->num_copies];
        const i64 copy = i % p->num_copies;
        copy_page(pool, pool->data + p->dst[copy] * pool->page_stride,
                  pool->data + p->src[copy] * pool->page_stride);
    }
}
