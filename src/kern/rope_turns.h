/* rope_turns.h - the frequencies of rotary embedding, for hosts and kernels of the CPU.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_KERN_ROPE_TURNS_H
#define QI_KERN_ROPE_TURNS_H

#include <math.h>

#include "kern/rope.h"

#define QI_TWO_PI 6.283185307179586476925

/* The frequency after context extension: see qkv/rope.h. */
static inline double qi_rope_extend(const qi_rope *p, double freq)
{
    if (p->low_freq == 0) return freq / p->scale;
    const double wavelength = QI_TWO_PI / freq;
    if (wavelength < p->old_context / p->high_freq) return freq;
    if (wavelength > p->old_context / p->low_freq) return freq / p->scale;
    const double smooth =
        (p->old_context / wavelength - p->low_freq) / (p->high_freq - p->low_freq);
    return (1 - smooth) * freq / p->scale + smooth * freq;
}

/* Frequencies in turns a position, [num_pairs].
 * theta^(-i / num_pairs) is a product of the powers for the bits of i: log2(num_pairs) calls of
 * pow, which would cost more than the rotation of a token, and as many roundings at the slow end. */
static inline void qi_rope_turns(const qi_rope *p, double *turns)
{
    turns[0] = 1;
    for (i32 span = 1; span < p->num_pairs; span *= 2) {
        const double factor = pow(p->theta, -(double)span / p->num_pairs);
        for (i32 i = 0; i < span && span + i < p->num_pairs; i++)
            turns[span + i] = turns[i] * factor;
    }
    for (i32 i = 0; i < p->num_pairs; i++) turns[i] = qi_rope_extend(p, turns[i]) * (1 / QI_TWO_PI);
}

#endif
