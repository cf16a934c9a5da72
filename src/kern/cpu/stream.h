/* stream.h - stores of large outputs past the caches: a line that is stored whole is then not read from
 * memory first, which is a third of the traffic of a copy. Worth it where the output is larger than
 * what the caches would keep until it is read; the host decides that (qi_streams in core/launch.h).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CPU_STREAM_H
#define QI_KERN_CPU_STREAM_H

#include "kern/cpu/simd.h"

/* Can vectors of t be streamed to p and every whole vector from there? */
QI_INLINE int qi_can_stream(const void *p, const qi_dtype t)
{
    return qi_size_of(t) >= 2 && (size_t)p % (QI_VW * qi_size_of(t)) == 0;
}

/* Streams 16 bytes or a power of 2 more, aligned to their size. Without such a store it is a plain one. */
QI_INLINE void qi_stream_bytes(void *p, const void *bytes, const size_t n)
{
#if defined(__AVX512F__)
    if (n == 64) _mm512_stream_si512(p, _mm512_loadu_si512(bytes));
#endif
#if defined(__AVX2__)
    if (n == 32) _mm256_stream_si256(p, _mm256_loadu_si256(bytes));
    if (n == 16) _mm_stream_si128(p, _mm_loadu_si128(bytes));
#else
    memcpy(p, bytes, n);
#endif
}

/* A vector as t (16 or 32 bits), rounded as qi_store does. */
QI_INLINE void qi_stream(void *p, const qi_dtype t, vf v)
{
    char bytes[sizeof v];
    qi_store(bytes, t, v);
    qi_stream_bytes(p, bytes, QI_VW * qi_size_of(t));
}

/* memcpy past the caches. */
QI_INLINE void qi_stream_copy(char *out, const char *in, i64 n)
{
    const i64 step = QI_VW * 4;
    i64 i = 0;
    if ((size_t)out % (size_t)step == 0)
        for (; i + step <= n; i += step) qi_stream_bytes(out + i, in + i, QI_VW * 4);
    memcpy(out + i, in + i, (size_t)(n - i));
}

/* Streamed stores come before whatever this thread stores from here on. */
QI_INLINE void qi_stream_end(void)
{
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

#endif
