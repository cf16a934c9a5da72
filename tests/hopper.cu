/* hopper.cu - kernels of test_hopper.c. JIT constants: TYPE (bf16 or f16), TILE (keys), HEAD_DIM, STAGES,
 * WRONG (hopper_params.h).
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/mma_sm90.cuh"
#include "kern/cuda/tma.cuh"

#define WGMMA_(n, kind, type) wgmma_m64n##n##k16_##kind##_##type
#define WGMMA(n, kind, type)  WGMMA_(n, kind, type)
#define MULTIPLY_QK           WGMMA(TILE, ss, TYPE)
#define MULTIPLY_SV           WGMMA(HEAD_DIM, rs, TYPE)
#define PACK_(type)           f32_to_##type##x2
#define PACK(type)            PACK_(type)

enum { CHUNKS = HEAD_DIM / 64, Q_BYTES = 64 * 128, KV_BYTES = TILE * 128 };
enum { STAGE_BYTES = 2 * CHUNKS * KV_BYTES, CONSUMERS = 2 };

/* ---- s = q k^T, o = s v ------------------------------------------------------------------------- */

/* Of shared memory: q [CONSUMERS][CHUNKS][64 rows], then stages of k and v [CHUNKS][TILE rows]. */
QI_INLINE char *stage_at(char *shared, int stage)
{
    return shared + CONSUMERS * CHUNKS * Q_BYTES + stage * STAGE_BYTES;
}

QI_INLINE void produce(const hopper_params *p, char *shared, u64 *ready, u64 *full, u64 *empty)
{
    tma_prefetch_map(&p->q);
    mbarrier_arrive_expect_tx(ready, CONSUMERS * CHUNKS * Q_BYTES);
    for (int i = 0; i < CONSUMERS * CHUNKS; i++)
        tma_load_4d(shared + i * Q_BYTES, &p->q, ready, i % CHUNKS * 64, p->head, i / CHUNKS * 64,
                    0);
    for (int t = 0; t < p->num_tiles; t++) {
        const int stage = t % STAGES, turn = t / STAGES;
        char *k = stage_at(shared, stage), *v = k + CHUNKS * KV_BYTES;
        if (WRONG != FORGETS_EMPTY) mbarrier_wait(&empty[stage], (turn & 1) ^ 1);
        mbarrier_arrive_expect_tx(&full[stage], STAGE_BYTES);
        for (int c = 0; c < CHUNKS; c++) {
            tma_load_4d(k + c * KV_BYTES, &p->k, &full[stage], c * 64, p->head, t * TILE, 0);
            tma_load_4d(v + c * KV_BYTES, &p->v, &full[stage], c * 64, p->head, t * TILE, 0);
        }
    }
}

QI_INLINE void multiply_qk(float *s, const char *q, const char *k)
{
    const u32 a = wgmma_tile(q, 0), b = wgmma_tile(k, 0);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4 * CHUNKS; i++)
        MULTIPLY_QK(s, wgmma_descriptor(a, i / 4 * Q_BYTES + i % 4 * 32),
                    wgmma_descriptor(b, i / 4 * KV_BYTES + i % 4 * 32), i > 0);
}

QI_INLINE void multiply_sv(float *o, const float *s, const char *v)
{
    const u32 b = wgmma_tile(v, KV_BYTES);
    u32 a[TILE / 16][4];
#pragma unroll
    for (int i = 0; i < TILE / 4; i++) a[i / 4][i % 4] = PACK(TYPE)(s[2 * i], s[2 * i + 1]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) MULTIPLY_SV(o, a[i], wgmma_descriptor(b, i * 2048));
}

/* A consumer's 64 rows to an array of rows of n. */
QI_INLINE void store(float *to, int n, const float *d, int count)
{
    const int warp = tid_x() / 32 % 4, row = 16 * warp + tid_x() % 32 / 4, column = tid_x() % 4 * 2;
#pragma unroll
    for (int i = 0; i < count; i++)
        to[(row + i / 2 % 2 * 8) * n + i / 4 * 8 + column + i % 2] = d[i];
}

QI_INLINE void consume(const hopper_params *p, char *shared, int me, u64 *ready, u64 *full,
                       u64 *empty)
{
    const char *q = shared + me * CHUNKS * Q_BYTES;
    const int num_keys = p->num_tiles * TILE;
    float o[HEAD_DIM / 2];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) o[i] = 0.f;
    mbarrier_wait(ready, 0);
    for (int t = 0; t < p->num_tiles; t++) {
        const int stage = t % STAGES, turn = t / STAGES;
        const char *k = stage_at(shared, stage), *v = k + CHUNKS * KV_BYTES;
        float s[TILE / 2];
        if (WRONG != FORGETS_FULL) mbarrier_wait(&full[stage], turn & 1);
        multiply_qk(s, q, k);
        if (WRONG != FORGETS_COMMIT) wgmma_commit_group();
        if (WRONG != FORGETS_WAIT) wgmma_wait_group(0);
#pragma unroll
        for (int i = 0; i < TILE / 2; i++) wgmma_hold(s[i]);
        store(p->s + 64 * me * num_keys + t * TILE, num_keys, s, TILE / 2);
        multiply_sv(o, s, v);
        wgmma_commit_group();
        if (WRONG == RELEASES_EARLY && tid_x() % 128 == 0) mbarrier_arrive(&empty[stage]);
        wgmma_wait_group(0);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) wgmma_hold(o[i]);
        if (WRONG != RELEASES_EARLY && tid_x() % 128 == 0) mbarrier_arrive(&empty[stage]);
    }
    store(p->o + 64 * me * HEAD_DIM, HEAD_DIM, o, HEAD_DIM / 2);
}

extern "C" __global__ void __launch_bounds__(128 + 128 * CONSUMERS, 1)
    product(const __grid_constant__ hopper_params p)
{
    extern __shared__ __align__(1024) char shared[];
    __shared__ u64 ready, full[STAGES], empty[STAGES];
    __shared__ int arrived;
    const int group = (int)uniform((u32)tid_x() / 128);
    if (tid_x() == 0) {
        mbarrier_init(&ready, 1);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(&full[i], 1);
            mbarrier_init(&empty[i], CONSUMERS);
        }
        mbarrier_fence_init();
        arrived = 0;
    }
    __syncthreads();
    if (group == 0) {
        setmaxnreg_dec(40);
        if (tid_x() == 0) produce(&p, shared, &ready, full, empty);
        return;
    }
    setmaxnreg_inc(232);
    consume(&p, shared, group - 1, &ready, full, empty);
    atomicAdd(&arrived, 1);
    bar_sync(1, 128 * CONSUMERS);
    if (tid_x() == 128) *p.arrived = arrived;
}

/* ---- the same of e4m3 ----------------------------------------------------------------------------- */

enum { KEYS8 = 128, DIMS8 = 128, Q8_BYTES = 64 * DIMS8, KV8_BYTES = KEYS8 * DIMS8 };

/* A warp's 32 keys of v, rows of dims, to rows of keys, of which those of 16 change places so that s, as the first product
 * leaves it, is the left operand of the second. */
QI_INLINE void turn(const char *v, char *turned)
{
    const int lane = tid_x() % 32, key = tid_x(), piece = key / 16;
    const int dim = lane % 8 * 2 + lane / 8 % 2;
    for (int unit = 0; unit < DIMS8 / 16; unit++) {
        u32 x[4], y[4];
        ldmatrix_x4_trans(x, v + key * 128 + ((unit ^ key) & 7) * 16);
        for (int h = 0; h < 4; h++)
            y[h] = __byte_perm(x[h & 2], x[(h & 2) + 1], h % 2 ? 0x7531 : 0x6420);
        stmatrix_x4(turned + (unit * 16 + dim) * 128 + ((piece ^ dim) & 7) * 16, y);
    }
}

extern "C" __global__ void __launch_bounds__(128) product8(const __grid_constant__ hopper_params p)
{
    extern __shared__ __align__(1024) char shared[];
    __shared__ u64 barrier;
    char *q = shared, *k = q + Q8_BYTES, *v = k + KV8_BYTES, *turned = v + KV8_BYTES;
    float s[KEYS8 / 2], o[DIMS8 / 2];
    u32 a[KEYS8 / 32][4];
    if (tid_x() == 0) {
        mbarrier_init(&barrier, 1);
        mbarrier_fence_init();
        mbarrier_arrive_expect_tx(&barrier, Q8_BYTES + 2 * KV8_BYTES);
        tma_load_4d(q, &p.q, &barrier, 0, p.head, 0, 0);
        tma_load_4d(k, &p.k, &barrier, 0, p.head, 0, 0);
        tma_load_4d(v, &p.v, &barrier, 0, p.head, 0, 0);
    }
    __syncthreads();
    mbarrier_wait(&barrier, 0);
    turn(v, turned);
    fence_proxy_async();
    __syncthreads();
    const u32 of_q = wgmma_tile(q, 0), of_k = wgmma_tile(k, 0), of_v = wgmma_tile(turned, 0);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < DIMS8 / 32; i++)
        wgmma_m64n128k32_ss_e4m3(s, wgmma_descriptor(of_q, i * 32), wgmma_descriptor(of_k, i * 32),
                                 i > 0);
    wgmma_commit_group();
    wgmma_wait_group(0);
#pragma unroll
    for (int i = 0; i < KEYS8 / 2; i++) wgmma_hold(s[i]);
    store(p.s, KEYS8, s, KEYS8 / 2);
#pragma unroll
    for (int i = 0; i < KEYS8 / 8; i++) {
        const float *x = s + i / 2 * 8 + i % 2 * 2;
        a[i / 4][i % 4] = f32_to_e4m3x4(x[0], x[1], x[4], x[5]);
    }
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < DIMS8 / 32; part++)
#pragma unroll
        for (int i = 0; i < KEYS8 / 32; i++)
            wgmma_m64n32k32_rs_e4m3(o + 16 * part, a[i],
                                    wgmma_descriptor(of_v, part * 32 * 128 + i * 32), i > 0);
    wgmma_commit_group();
    wgmma_wait_group(0);
#pragma unroll
    for (int i = 0; i < DIMS8 / 2; i++) wgmma_hold(o[i]);
    store(p.o, DIMS8, o, DIMS8 / 2);
}

/* ---- a copy, and back ------------------------------------------------------------------------ */

extern "C" __global__ void __launch_bounds__(128) copy(const __grid_constant__ hopper_params p)
{
    extern __shared__ __align__(1024) char shared[];
    __shared__ u64 barrier;
    if (tid_x() == 0) {
        mbarrier_init(&barrier, 1);
        mbarrier_fence_init();
    }
    for (int i = tid_x(); i < p.bytes + p.offset; i += 128) shared[i] = 0x55;
    fence_proxy_async();
    __syncthreads();
    if (tid_x() == 0) {
        mbarrier_arrive_expect_tx(&barrier, p.bytes);
        tma_load_4d(shared + p.offset, &p.k, &barrier, p.at[0], p.at[1], p.at[2], p.at[3]);
    }
    while (!mbarrier_test_wait(&barrier, 0)) continue;
    for (int i = tid_x(); i < p.bytes; i += 128) p.out[i] = shared[p.offset + i];
    if (tid_x() != 0 || !p.stores) return;
    tma_store_4d(&p.q, shared + p.offset, p.at[0], p.at[1], p.at[2], p.at[3]);
    tma_await_reads();
}

/* ---- what is wrong -------------------------------------------------------------------------------- */

QI_INLINE void wrong_barrier(int mode, u64 *barrier)
{
    const int first = tid_x() == 0;
    if (mode == FAULT_WAIT_FOR_EVER && first) mbarrier_wait(barrier, 0);
    if (mode == FAULT_SPIN_FOR_EVER)
        while (!mbarrier_test_wait(barrier, 0)) continue;
    if (mode == FAULT_TOO_MANY_ARRIVALS && first) {
        mbarrier_arrive_expect_tx(barrier, 16);
        mbarrier_arrive(barrier);
    }
    if (mode == FAULT_NO_BARRIER && first) mbarrier_arrive(barrier + 1);
    if (mode == FAULT_BARRIER_OVERWRITTEN && first) {
        *barrier = 0;
        mbarrier_arrive(barrier);
    }
    if (mode == FAULT_PARITY && first) mbarrier_wait(barrier, 2);
    if (mode == FAULT_TWO_PHASES) {
        if (tid_x() == 32) mbarrier_wait(barrier, 0);
        __syncwarp();
        if (tid_x() == 64) mbarrier_arrive(barrier), mbarrier_arrive(barrier);
    }
    if (mode == FAULT_NAMED_BARRIER) bar_sync(1, tid_x() < 64 ? 64 : 128);
    if (mode == FAULT_UNIFORM) uniform((u32)tid_x());
}

QI_INLINE void wrong_copy(const hopper_params *p, char *shared, u64 *barrier)
{
    const int mode = p->mode;
    if (tid_x() != 0) return;
    if (mode == FAULT_MISALIGNED) tma_load_4d(shared + 512, &p->k, barrier, 0, 0, 0, 0);
    if (mode == FAULT_PAST_SHARED) tma_load_4d(shared + p->bytes, &p->k, barrier, 0, 0, 0, 0);
    if (mode == FAULT_NO_MAP) tma_load_4d(shared, &p->q, barrier, 0, 0, 0, 0);
    if (mode == FAULT_COPY_NOT_AWAITED) tma_load_4d(shared, &p->k, barrier, 0, 0, 0, 0);
    if (mode == FAULT_STORE_NOT_AWAITED) tma_store_4d(&p->k, shared, 0, 0, 0, 0);
}

QI_INLINE void wrong_product(const hopper_params *p, char *shared)
{
    const int mode = p->mode;
    float d[32];
    u64 a = wgmma_descriptor(wgmma_tile(shared, 0), 0), b = a;
    if (mode == FAULT_OPERANDS_DIFFER && tid_x() % 32 == 7) b += 32 >> 4;
    if (mode == FAULT_OPERAND_OUTSIDE) b += (u32)p->bytes >> 4;
    if (mode == FAULT_THREE_WARPS && tid_x() >= 96) return;
    WGMMA(64, ss, bf16)(d, a, b, 0);
    wgmma_commit_group();
    if (mode != FAULT_PRODUCTS_NOT_AWAITED) wgmma_wait_group(0);
    p->o[tid_x()] = d[0];
}

extern "C" __global__ void __launch_bounds__(128) fault(const __grid_constant__ hopper_params p)
{
    extern __shared__ __align__(1024) char shared[];
    __shared__ u64 barrier[2];
    if (tid_x() == 0) {
        mbarrier_init(&barrier[0], 1);
        mbarrier_fence_init();
    }
    __syncthreads();
    wrong_barrier(p.mode, barrier);
    wrong_copy(&p, shared, barrier);
    if (p.mode == FAULT_NONE || p.mode >= FAULT_PRODUCTS_NOT_AWAITED) wrong_product(&p, shared);
}
