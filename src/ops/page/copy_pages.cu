/* copy_pages.cu - copies of whole pages: a block for each CHUNK bytes of a run. Copies from or to pages
 * that the pool does not have are left out.
 *
 * JIT constants: VEC, bytes of an access; THREADS.
 * Bound: HBM, one read and one write of every page. A thread reads 4 words before it writes them: the compiler
 * may not, since it does not know that pages are apart.
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

QI_INLINE void copy_words(word *to, const word *from, int words)
{
    enum { TIMES = 4 };
    for (int i = (int)threadIdx.x; i < words; i += TIMES * THREADS) {
        word w[TIMES];
#pragma unroll
        for (int n = 0; n < TIMES; n++)
            if (i + n * THREADS < words) w[n] = from[i + n * THREADS];
#pragma unroll
        for (int n = 0; n < TIMES; n++)
            if (i + n * THREADS < words) to[i + n * THREADS] = w[n];
    }
}

QI_KERNEL(copy_pages, copy_pages_params)
{
    const copy_pool *pool = &p.pools[blockIdx.z];
    griddepcontrol_wait();
    const i64 src = p.src[blockIdx.y], dst = p.dst[blockIdx.y];
    if (src < 0 || dst < 0 || src >= p.num_pages || dst >= p.num_pages) return;
    const char *from = pool->data + src * pool->page_stride;
    char *to = pool->data + dst * pool->page_stride;
    const i64 chunks = (pool->run_bytes + COPY_CHUNK - 1) / COPY_CHUNK;
    const i64 runs = pool->runs[0] * pool->runs[1] * pool->runs[2];
    for (i64 i = blockIdx.x; i < runs * chunks; i += gridDim.x) {
        i64 run = chunks == 1 ? i : i / chunks, at = (i - run * chunks) * COPY_CHUNK;
        const i64 left = pool->run_bytes - at;
        for (int axis = 2; axis >= 0 && run > 0; axis--) {
            at += run % pool->runs[axis] * pool->run_strides[axis];
            run /= pool->runs[axis];
        }
        copy_words((word *)(to + at), (const word *)(from + at),
                   (int)(left < COPY_CHUNK ? left : COPY_CHUNK) / VEC);
    }
}
