/* emulator.h - CUDA C for a CPU: what NVRTC's compiler knows by itself, in plain C++, so that a kernel's
 * text compiles as it is. Included before it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMULATOR_EMULATOR_H
#define EMULATOR_EMULATOR_H

#include "floats.h"
#include "machine.h"

/* ---- words -------------------------------------------------------------------------------- */

#define __CUDACC_RTC__ 1
#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __constant__    static
#define __forceinline__ inline
#define __noinline__    __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n)         __attribute__((aligned(n)))
#define __builtin_assume(x)  ((void)0)
#define __builtin_align__(n) __attribute__((aligned(n)))

/* A block at a time runs on one OS thread, or each of a cluster in a copy of the object: its variables are static,
 * of one section that the machine poisons and checks. */
#define __shared__ static __attribute__((section("emulator_shared")))

extern "C" {
extern char __start_emulator_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emulator_shared[] __attribute__((weak, visibility("hidden")));
extern const unsigned __start_emulator_alignments[] __attribute__((weak, visibility("hidden")));
extern const unsigned __stop_emulator_alignments[] __attribute__((weak, visibility("hidden")));
static emulator_machine *emulator;
extern const emulator_module emulator_module_record;
const emulator_module emulator_module_record = {&emulator, __start_emulator_shared,
                                                __stop_emulator_shared, __start_emulator_alignments,
                                                __stop_emulator_alignments};
}

#define warpSize  32
#define threadIdx (*emulator->thread)
#define blockIdx  (emulator->block)
#define blockDim  (emulator->block_dim)
#define gridDim   (emulator->grid_dim)

/* nvrtc.c writes this where a text has `extern "C" __global__ void __launch_bounds__(threads) name(const
 * __grid_constant__ type p)`: the machine calls it through a pointer to its parameters. */
#define EMULATOR_KERNEL(name, type, p, threads, ...)                                               \
    static void emulator_body_of_##name(const type &p);                                            \
    static void emulator_run_##name(const void *params)                                            \
    {                                                                                              \
        emulator_body_of_##name(*(const type *)params);                                            \
    }                                                                                              \
    extern "C" const emulator_kernel name;                                                         \
    const emulator_kernel name = {emulator_run_##name, sizeof(type), threads};                     \
    static void emulator_body_of_##name(const type &p)

/* And this where it has `extern __shared__ type name[]`. */
#define EMULATOR_SHARED(type, name, alignment)                                                     \
    static const unsigned emulator_alignment_of_##name                                             \
        __attribute__((used, section("emulator_alignments"))) = alignment;                         \
    type *const name =                                                                             \
        (type *)emulator_shared(alignment > alignof(type) ? alignment : alignof(type))

static inline char *emulator_shared(unsigned long alignment)
{
    if ((unsigned long)emulator->shared % alignment)
        emulator->fault("dynamic shared memory is not aligned so");
    return emulator->shared;
}

/* ---- vectors ------------------------------------------------------------------------------ */

#define EMULATOR_VECTORS(type, name, unit)                                                         \
    struct alignas(2 * unit) name##2                                                               \
    {                                                                                              \
        type x, y;                                                                                 \
    };                                                                                             \
    struct name##3                                                                                 \
    {                                                                                              \
        type x, y, z;                                                                              \
    };                                                                                             \
    struct alignas(4 * unit > 16 ? 16 : 4 * unit) name##4                                          \
    {                                                                                              \
        type x, y, z, w;                                                                           \
    };                                                                                             \
    static inline name##2 make_##name##2(type x, type y)                                           \
    {                                                                                              \
        return {x, y};                                                                             \
    }                                                                                              \
    static inline name##3 make_##name##3(type x, type y, type z)                                   \
    {                                                                                              \
        return {x, y, z};                                                                          \
    }                                                                                              \
    static inline name##4 make_##name##4(type x, type y, type z, type w)                           \
    {                                                                                              \
        return {x, y, z, w};                                                                       \
    }
EMULATOR_VECTORS(signed char, char, 1)
EMULATOR_VECTORS(unsigned char, uchar, 1)
EMULATOR_VECTORS(short, short, 2)
EMULATOR_VECTORS(unsigned short, ushort, 2)
EMULATOR_VECTORS(int, int, 4)
EMULATOR_VECTORS(unsigned, uint, 4)
EMULATOR_VECTORS(float, float, 4)
EMULATOR_VECTORS(long long, longlong, 8)
EMULATOR_VECTORS(unsigned long long, ulonglong, 8)
EMULATOR_VECTORS(double, double, 8)
#undef EMULATOR_VECTORS

/* ---- blocks and warps --------------------------------------------------------------------- */

static inline void __syncthreads()
{
    emulator->sync_block(0, 0, 1);
}

static inline int __syncthreads_count(int predicate)
{
    return (int)emulator->count_block(predicate != 0);
}

static inline int __syncthreads_or(int predicate)
{
    return __syncthreads_count(predicate) != 0;
}
static inline int __syncthreads_and(int predicate)
{
    return __syncthreads_count(!predicate) == 0;
}

static inline void __syncwarp(unsigned mask = 0xffffffffu)
{
    emulator->sync_warp(mask, EMULATOR_SYNCWARP, nullptr);
}

static inline int emulator_lane()
{
    return (int)(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

template <class T> static inline T emulator_shuffle_from(unsigned mask, T value, int source)
{
    static_assert(sizeof(T) <= 8);
    emulator_shuffle s = {0, source, 0};
    __builtin_memcpy(&s.value, &value, sizeof value);
    emulator->sync_warp(mask, EMULATOR_SHUFFLE, &s);
    __builtin_memcpy(&value, &s.result, sizeof value);
    return value;
}

template <class T> static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32)
{
    return emulator_shuffle_from(mask, value, (emulator_lane() & -width) + (source & (width - 1)));
}

template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32)
{
    const int lane = emulator_lane(), source = lane ^ bits;
    return emulator_shuffle_from(mask, value, source < (lane & -width) + width ? source : lane);
}

template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32)
{
    const int lane = emulator_lane(), source = lane - (int)step;
    return emulator_shuffle_from(mask, value, source >= (lane & -width) ? source : lane);
}

template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32)
{
    const int lane = emulator_lane(), source = lane + (int)step;
    return emulator_shuffle_from(mask, value, source < (lane & -width) + width ? source : lane);
}

static inline unsigned __ballot_sync(unsigned mask, int predicate)
{
    emulator_vote v = {predicate, 0};
    emulator->sync_warp(mask, EMULATOR_VOTE, &v);
    return v.ballot;
}

static inline int __any_sync(unsigned mask, int predicate)
{
    return __ballot_sync(mask, predicate) != 0;
}
static inline int __all_sync(unsigned mask, int predicate)
{
    return __ballot_sync(mask, !predicate) == 0;
}

template <class T> static inline unsigned __match_any_sync(unsigned mask, T value)
{
    emulator_match m = {0, 0};
    __builtin_memcpy(&m.value, &value, sizeof value);
    emulator->sync_warp(mask, EMULATOR_MATCH, &m);
    return m.lanes;
}

static inline unsigned emulator_reduce_by(unsigned mask, emulator_reduction by, unsigned value)
{
    emulator_reduce r = {by, value, 0};
    emulator->sync_warp(mask, EMULATOR_REDUCE, &r);
    return r.result;
}

static inline unsigned __reduce_add_sync(unsigned m, unsigned v)
{
    return emulator_reduce_by(m, EMULATOR_ADD, v);
}
static inline unsigned __reduce_min_sync(unsigned m, unsigned v)
{
    return emulator_reduce_by(m, EMULATOR_MIN, v);
}
static inline unsigned __reduce_max_sync(unsigned m, unsigned v)
{
    return emulator_reduce_by(m, EMULATOR_MAX, v);
}
static inline unsigned __reduce_and_sync(unsigned m, unsigned v)
{
    return emulator_reduce_by(m, EMULATOR_AND, v);
}
static inline unsigned __reduce_or_sync(unsigned m, unsigned v)
{
    return emulator_reduce_by(m, EMULATOR_OR, v);
}
static inline unsigned __reduce_xor_sync(unsigned m, unsigned v)
{
    return emulator_reduce_by(m, EMULATOR_XOR, v);
}
static inline int __reduce_add_sync(unsigned m, int v)
{
    return (int)emulator_reduce_by(m, EMULATOR_ADD, (unsigned)v);
}
static inline int __reduce_min_sync(unsigned m, int v)
{
    return (int)emulator_reduce_by(m, EMULATOR_MIN_SIGNED, (unsigned)v);
}
static inline int __reduce_max_sync(unsigned m, int v)
{
    return (int)emulator_reduce_by(m, EMULATOR_MAX_SIGNED, (unsigned)v);
}

/* ---- memory ------------------------------------------------------------------------------- */

#define EMULATOR_LOAD(name)                                                                        \
    template <class T> static inline T name(const T *p)                                            \
    {                                                                                              \
        return *p;                                                                                 \
    }
#define EMULATOR_STORE(name)                                                                       \
    template <class T, class V> static inline void name(T *p, V value)                             \
    {                                                                                              \
        *p = (T)value;                                                                             \
    }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldlu)
EMULATOR_LOAD(__ldcv)
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwt)
#undef EMULATOR_LOAD
#undef EMULATOR_STORE

static inline void __threadfence()
{
}
static inline void __threadfence_block()
{
}
static inline void __threadfence_system()
{
}
static inline void __nanosleep(unsigned)
{
    emulator->pause();
}
static inline void __trap()
{
    emulator->fault("__trap");
}
static inline unsigned long __cvta_generic_to_shared(const void *p)
{
    return (unsigned long)p;
}

/* One OS thread runs all of them, so that nothing comes between reading and writing. */
#define EMULATOR_ATOMIC(name, value_after)                                                         \
    template <class T, class V> static inline T name(T *p, V with)                                 \
    {                                                                                              \
        const T before = *p, v = (T)with;                                                          \
        *p = (value_after);                                                                        \
        return before;                                                                             \
    }                                                                                              \
    template <class T, class V> static inline T name##_block(T *p, V with)                         \
    {                                                                                              \
        return name(p, with);                                                                      \
    }
EMULATOR_ATOMIC(atomicAdd, before + v)
EMULATOR_ATOMIC(atomicSub, before - v)
EMULATOR_ATOMIC(atomicExch, v)
EMULATOR_ATOMIC(atomicMin, v < before ? v : before)
EMULATOR_ATOMIC(atomicMax, v > before ? v : before)
EMULATOR_ATOMIC(atomicAnd, before &v)
EMULATOR_ATOMIC(atomicOr, before | v)
EMULATOR_ATOMIC(atomicXor, before ^ v)
EMULATOR_ATOMIC(atomicInc, before >= v ? 0 : before + 1)
EMULATOR_ATOMIC(atomicDec, before == 0 || before > v ? v : before - 1)
#undef EMULATOR_ATOMIC

template <class T, class V, class W> static inline T atomicCAS(T *p, V compare, W value)
{
    const T before = *p;
    if (before == (T)compare) *p = (T)value;
    return before;
}

#include "arithmetic.h"

#endif
