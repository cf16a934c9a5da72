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
 * counts is the fraction of a turn. The formula is in qkv/rope.h, here with old_context / wavelength. */
QI_INLINE double rope_turns(const qi_rope *r, int pair)
{
    const double freq = exp2(-pair * r->octaves) * (1 / QI_TWO_PI), slow = freq * r->inverse_scale;
    const double turns = r->old_context * freq; /* in the context trained on */
    if (r->low_freq == 0 || turns < r->low_freq) return slow;
    if (turns > r->high_freq) return freq;
    const double smooth = (turns - r->low_freq) * r->inverse_range;
    return (1 - smooth) * slow + smooth * freq;
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

/* Elements of a head at which a piece's accesses begin; second -1: there is one only. */
typedef struct rope_place {
    int first, second;
} rope_place;

QI_INLINE rope_place rope_place_of(int piece, int head_dim, int pairs, const int layout,
                                   const int vec)
{
    const int d = piece * rope_width(layout, vec);
    rope_place at = {d, -1};
    if (layout == ROPE_HALVES && d < pairs)
        at.second = d + pairs;
    else if (layout == ROPE_HALVES)
        at.first = d + pairs; /* past both halves */
    else if (rope_width(layout, vec) > vec && d + 1 < head_dim)
        at.second = d + 1;
    return at;
}

/* A piece as it is, in words [2 * qi_words(t, vec)]. */
QI_INLINE void rope_fetch(u32 *words, const char *in, const int t, rope_place at, const int vec)
{
    qi_load_words(words, qi_at(in, t, at.first), t, vec);
    if (at.second >= 0) qi_load_words(words + qi_words(t, vec), qi_at(in, t, at.second), t, vec);
}

QI_INLINE void rope_rotate(float *x, float *y, float2 a)
{
    const float first = *x * a.x - *y * a.y;
    *y = *x * a.y + *y * a.x;
    *x = first;
}

/* Rotates a fetched piece, divides it by scale and stores it, which may be where it came from. */
QI_INLINE void rope_put(char *out, const int to, const u32 *words, const int from, rope_place at,
                        int pairs, const float2 *angles, float scale, const int layout,
                        const int vec)
{
    float x[16], y[16];
    qi_unpack_all(x, words, from, vec);
    if (at.second >= 0) qi_unpack_all(y, words + qi_words(from, vec), from, vec);
    if (layout == ROPE_HALVES && at.second >= 0)
        for (int e = 0; e < vec; e++) rope_rotate(x + e, y + e, angles[at.first + e]);
    if (layout == ROPE_INTERLEAVED && at.first < 2 * pairs) {
        if (vec == 1)
            rope_rotate(x, y, angles[at.first / 2]);
        else
            for (int e = 0; e < vec; e += 2)
                rope_rotate(x + e, x + e + 1, angles[(at.first + e) / 2]);
    }
    if (scale != 1.f)
        for (int e = 0; e < vec; e++) x[e] /= scale, y[e] /= scale;
    qi_store(qi_to(out, to, at.first), x, to, vec);
    if (at.second >= 0) qi_store(qi_to(out, to, at.second), y, to, vec);
}

#endif
