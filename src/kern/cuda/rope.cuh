/* rope.cuh - angles of rotary embedding in shared memory, and the rotation of a head on its way from one
 * place to another.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CUDA_ROPE_H
#define QI_KERN_CUDA_ROPE_H

#include "kern/cuda/prelude.cuh"
#include "kern/rope.h"

#define QI_TWO_PI 6.283185307179586476925

/* How pairs lie: not at all, (i, i + pairs), (2i, 2i + 1). */
enum { ROPE_NONE = 0, ROPE_HALVES = 1, ROPE_INTERLEAVED = 2 };

/* The frequency of a pair, in turns a position. Double precision: positions go to millions, and what
 * counts is the fraction of a turn. The formula is in qkv/rope.h. */
QI_INLINE double rope_turns(const qi_rope *r, int pair)
{
    const double freq = exp2(-(double)pair / r->num_pairs * log2(r->theta));
    double extended = freq / r->scale;
    if (r->low_freq != 0) {
        const double wavelength = QI_TWO_PI / freq;
        if (wavelength < r->old_context / r->high_freq) {
            extended = freq;
        } else if (wavelength <= r->old_context / r->low_freq) {
            const double smooth =
                (r->old_context / wavelength - r->low_freq) / (r->high_freq - r->low_freq);
            extended = (1 - smooth) * freq / r->scale + smooth * freq;
        }
    }
    return extended / QI_TWO_PI;
}

/* cosine and sine [num_pairs] of a position, by all threads of a block. */
QI_INLINE void rope_angles(const qi_rope *r, i64 position, float2 *angles)
{
    for (int i = (int)threadIdx.x; i < r->num_pairs; i += THREADS) {
        const double turns = (double)position * rope_turns(r, i);
        float2 a;
        sincospif(2.f * (float)(turns - rint(turns)), &a.y, &a.x);
        angles[i] = a;
    }
}

/* A head moves in pieces 0, 1, ...: VEC pairs in halves; where pairs adjoin, VEC elements, or a pair where
 * VEC is 1; else VEC elements. VEC divides the dims that rotate and those that do not. */
QI_INLINE constexpr int rope_width(const int layout, const int vec)
{
    return layout == ROPE_INTERLEAVED && vec == 1 ? 2 : vec;
}

QI_INLINE int rope_pieces(int head_dim, int pairs, const int layout, const int vec)
{
    const int width = rope_width(layout, vec);
    return ((layout == ROPE_HALVES ? head_dim - pairs : head_dim) + width - 1) / width;
}

/* n elements, in accesses of vec. */
QI_INLINE void rope_load(float *x, const char *in, const int t, int d, int n, const int vec)
{
    for (int e = 0; e < n; e += vec) qi_load(x + e, qi_at(in, t, d + e), t, vec);
}

QI_INLINE void rope_store(char *out, const float *x, const int t, int d, int n, const int vec)
{
    for (int e = 0; e < n; e += vec) qi_store(qi_to(out, t, d + e), x + e, t, vec);
}

/* Rotates and divides by scale; in and out may be one place. */
QI_INLINE void rope_piece(char *out, const int to, const char *in, const int from, int head_dim,
                          int piece, int pairs, const float2 *angles, float scale, const int layout,
                          const int vec)
{
    const int width = rope_width(layout, vec);
    float x[16], y[16];
    int d = piece * width;
    if (layout == ROPE_HALVES && d < pairs) {
        rope_load(x, in, from, d, vec, vec);
        rope_load(y, in, from, d + pairs, vec, vec);
        for (int e = 0; e < vec; e++) {
            const float2 a = angles[d + e];
            const float first = x[e] * a.x - y[e] * a.y, second = x[e] * a.y + y[e] * a.x;
            x[e] = scale == 1.f ? first : first / scale;
            y[e] = scale == 1.f ? second : second / scale;
        }
        rope_store(out, x, to, d, vec, vec);
        rope_store(out, y, to, d + pairs, vec, vec);
        return;
    }
    if (layout == ROPE_HALVES) d += pairs; /* past both halves */
    const int n = width > vec && d + width > head_dim ? head_dim - d : width;
    rope_load(x, in, from, d, n, vec);
    if (layout == ROPE_INTERLEAVED && d < 2 * pairs)
        for (int e = 0; e < width; e += 2) {
            const float2 a = angles[(d + e) / 2];
            const float first = x[e] * a.x - x[e + 1] * a.y;
            x[e + 1] = x[e] * a.y + x[e + 1] * a.x;
            x[e] = first;
        }
    if (scale != 1.f)
        for (int e = 0; e < width; e++) x[e] /= scale;
    rope_store(out, x, to, d, n, vec);
}

#endif
