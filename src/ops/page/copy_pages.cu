/* copy_pages.cu - copies of whole pages: a block for each CHUNK bytes of a run. Copies from or to pages
 * that the pool does not have are left out.
 *
 * JIT constants: VEC, bytes of an access; THREADS.
 * Bound: HBM, one read and one write of every page.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/page/copy_pages_params.h"

#if VEC == 16
typedef uint4 word;
#elif VEC == 8
typedef uint2 word;
#elif VEC == 4
typedef u32 word;
#elif VEC == 2
typedef u16 word;
#else
typedef u8 word;
#endif

QI_KERNEL(copy_pages, copy_pages_params)
{
    const copy_pool *pool = &p.pools[blockIdx.z];
    const i64 src = p.src[blockIdx.y], dst = p.dst[blockIdx.y];
    if (src < 0 || dst < 0 || src >= p.num_pages || dst >= p.num_pages) return;
    const i64 chunks = (pool->run_bytes + COPY_CHUNK - 1) / COPY_CHUNK;
    const i64 runs = pool->runs[0] * pool->runs[1] * pool->runs[2];
    for (i64 i = blockIdx.x; i < runs * chunks; i += gridDim.x) {
        const i64 begin = i % chunks * COPY_CHUNK;
        i64 run = i / chunks, at = begin;
        for (int axis = 2; axis >= 0; axis--) {
            at += run % pool->runs[axis] * pool->run_strides[axis];
            run /= pool->runs[axis];
        }
        const i64 left = pool->run_bytes - begin;
        const int words = (int)(left < COPY_CHUNK ? left : COPY_CHUNK) / VEC;
        const word *from = (const word *)(pool->data + src * pool->page_stride + at);
        word *to = (word *)(pool->data + dst * pool->page_stride + at);
        for (int w = (int)threadIdx.x; w < words; w += THREADS) to[w] = from[w];
    }
}
