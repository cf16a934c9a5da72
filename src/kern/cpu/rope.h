/* rope.h - angles of rotary embedding, and the rotation of a row of f32.
 *
 * Angles are computed in turns and double precision, reduced to an eighth of a turn and evaluated by
 * polynomials in a plain loop, which vectorises.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_CPU_ROPE_H
#define QI_KERN_CPU_ROPE_H

#include "kern/cpu/simd.h"
#include "kern/rope_turns.h"

/* Cosines and sines of the pairs at a position; interleaved: each cosine twice, the sines as -sin,
 * sin. Taylor series on [-pi/4, pi/4], error below 1e-11. turns: of qi_rope_turns. */
static inline void qi_rope_angles(const qi_rope *p, const double *restrict turns_of,
                                  double position, float *restrict cosines, float *restrict sines)
{
    const i32 n = p->num_pairs;
    for (i32 i = 0; i < n; i++) {
        const double turns = position * turns_of[i];
        /* adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits */
        const double shifted = turns * 4 + 6755399441055744.0;
        const double x = (turns - (shifted - 6755399441055744.0) * 0.25) * QI_TWO_PI, s = x * x;
        double sine = -1.0 / 39916800, cosine = 1.0 / 479001600;
        sine = sine * s + 1.0 / 362880;
        sine = sine * s - 1.0 / 5040;
        sine = sine * s + 1.0 / 120;
        sine = sine * s - 1.0 / 6;
        sine = sine * s * x + x;
        cosine = cosine * s - 1.0 / 3628800;
        cosine = cosine * s + 1.0 / 40320;
        cosine = cosine * s - 1.0 / 720;
        cosine = cosine * s + 1.0 / 24;
        cosine = cosine * s - 1.0 / 2;
        cosine = cosine * s + 1;
        i64 quarter;
        memcpy(&quarter, &shifted, sizeof quarter);
        const double c = quarter & 1 ? sine : cosine, z = quarter & 1 ? cosine : sine;
        cosines[i] = (float)((quarter + 1) & 2 ? -c : c);
        sines[i] = (float)(quarter & 2 ? -z : z);
    }
    if (!p->interleaved) return;
    for (i32 i = n - 1; i >= 0; i--) { /* spread in place, from the back */
        const float c = cosines[i], s = sines[i];
        cosines[2 * i] = cosines[2 * i + 1] = c;
        sines[2 * i] = -s;
        sines[2 * i + 1] = s;
    }
}

/* Rotates a row in place by the angles of its position. */
static inline void qi_rope_rotate(const qi_rope *p, float *restrict row,
                                  const float *restrict cosines, const float *restrict sines)
{
    const i32 n = p->num_pairs;
    if (p->interleaved) {
        for (i32 i = 0; i < n; i++) {
            const float x = row[2 * i], y = row[2 * i + 1];
            row[2 * i] = x * cosines[2 * i] + y * sines[2 * i];
            row[2 * i + 1] = y * cosines[2 * i + 1] + x * sines[2 * i + 1];
        }
        return;
    }
    for (i32 i = 0; i < n; i++) {
        const float x = row[i], y = row[i + n];
        row[i] = x * cosines[i] - y * sines[i];
        row[i + n] = x * sines[i] + y * cosines[i];
    }
}

#endif
