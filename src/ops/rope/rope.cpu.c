/* rope.cpu.c - rotary embedding of q and k. Tasks share the tokens.
 *
 * A task makes the table of frequencies once, in turns a position and double precision. For each
 * token it reduces the angles to an eighth of a turn in double and evaluates sine and cosine by
 * polynomials (a plain loop, which vectorises); all heads of the token share them. Bound: memory, 2
 * x head_dim x size bytes a head; the angles cost about as much as two heads.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/simd.h"
#include "ops/rope/rope_params.h"

#define TWO_PI 6.283185307179586476925

typedef struct rope_table {
    double turns[ROPE_MAX_PAIRS];     /* of a pair, a position */
    float cosine[2 * ROPE_MAX_PAIRS]; /* of the token at hand; interleaved: each twice */
    float sine[2 * ROPE_MAX_PAIRS];   /* interleaved: -sin, sin */
} rope_table;
_Static_assert(sizeof(rope_table) <= QI_TASK_SCRATCH_BYTES, "the table lives in task scratch");

/* The frequency after context extension: see qkv/rope.h. */
static double extend(const rope_params *p, double freq)
{
    if (p->low_freq == 0) return freq / p->scale;
    const double wavelength = TWO_PI / freq;
    if (wavelength < p->old_context / p->high_freq) return freq;
    if (wavelength > p->old_context / p->low_freq) return freq / p->scale;
    const double smooth =
        (p->old_context / wavelength - p->low_freq) / (p->high_freq - p->low_freq);
    return (1 - smooth) * freq / p->scale + smooth * freq;
}

/* theta^(-i / num_pairs) is a product of the powers for the bits of i: log2(num_pairs) calls of
 * pow, which would cost more than the rotation of a token, and as many roundings at the slow end. */
static void frequencies(const rope_params *p, double *turns)
{
    turns[0] = 1;
    for (i32 span = 1; span < p->num_pairs; span *= 2) {
        const double factor = pow(p->theta, -(double)span / p->num_pairs);
        for (i32 i = 0; i < span && span + i < p->num_pairs; i++)
            turns[span + i] = turns[i] * factor;
    }
    for (i32 i = 0; i < p->num_pairs; i++) turns[i] = extend(p, turns[i]) * (1 / TWO_PI);
}

/* Cosines and sines of the pairs at a position. Taylor series on [-pi/4, pi/4], error below 1e-11. */
static void angles(const rope_params *p, rope_table *table, double position)
{
    const i32 n = p->num_pairs;
    double *restrict turns_of = table->turns;
    float *restrict cosines = table->cosine, *restrict sines = table->sine;
    for (i32 i = 0; i < n; i++) {
        const double turns = position * turns_of[i];
        /* adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits */
        const double shifted = turns * 4 + 6755399441055744.0;
        const double x = (turns - (shifted - 6755399441055744.0) * 0.25) * TWO_PI, s = x * x;
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

QI_INLINE vf load_some(const char *p, const qi_dtype t, i64 n)
{
    return n >= QI_VW ? qi_load(p, t) : qi_load_n(p, t, n);
}

QI_INLINE void store_some(char *p, const qi_dtype t, vf v, i64 n)
{
    if (n >= QI_VW)
        qi_store(p, t, v);
    else
        qi_store_n(p, t, v, n);
}

/* Pairs (2i, 2i + 1). */
QI_INLINE void rotate_interleaved(char *out, const char *in, const rope_table *table, i32 pairs,
                                  const qi_dtype t)
{
    for (i32 d = 0; d < 2 * pairs; d += QI_VW) {
        const i32 n = 2 * pairs - d;
        const vf v = load_some(qi_at(in, t, d), t, n);
        const vf c = load_some((const char *)(table->cosine + d), QI_F32, n);
        const vf s = load_some((const char *)(table->sine + d), QI_F32, n);
        store_some(out + d * (i64)qi_size_of(t), t, v * c + vf_swap_pairs(v) * s, n);
    }
}

/* Pairs (i, i + pairs). */
QI_INLINE void rotate_halves(char *out, const char *in, const rope_table *table, i32 pairs,
                             const qi_dtype t)
{
    for (i32 d = 0; d < pairs; d += QI_VW) {
        const i32 n = pairs - d;
        const vf x = load_some(qi_at(in, t, d), t, n), y = load_some(qi_at(in, t, d + pairs), t, n);
        const vf c = load_some((const char *)(table->cosine + d), QI_F32, n);
        const vf s = load_some((const char *)(table->sine + d), QI_F32, n);
        store_some(out + d * (i64)qi_size_of(t), t, x * c - y * s, n);
        store_some(out + (d + pairs) * (i64)qi_size_of(t), t, x * s + y * c, n);
    }
}

QI_INLINE void rotate_heads(const rope_params *p, const rope_tensor *x, const rope_table *table,
                            i64 token, const qi_dtype t)
{
    const i64 rotated = 2 * p->num_pairs * (i64)qi_size_of(t);
    for (i64 head = 0; head < x->heads; head++) {
        const char *in = qi_at(x->in, t, token * x->in_stride[0] + head * x->in_stride[1]);
        char *out = (char *)x->out +
                    (token * x->out_stride[0] + head * x->out_stride[1]) * (i64)qi_size_of(t);
        if (p->interleaved)
            rotate_interleaved(out, in, table, p->num_pairs, t);
        else
            rotate_halves(out, in, table, p->num_pairs, t);
        if (out != in)
            memcpy(out + rotated, in + rotated,
                   (size_t)(p->head_dim * (i64)qi_size_of(t) - rotated));
    }
}

QI_INLINE void rope_tokens(const rope_params *p, qi_task task, const qi_dtype t)
{
    rope_table *table = task.scratch;
    i64 begin, end, request = 0;
    qi_task_share(task, p->nnz, 1, &begin, &end);
    if (begin == end) return;
    frequencies(p, table->turns);
    for (i64 token = begin; token < end; token++) {
        i64 position;
        if (p->positions) {
            position = p->positions[token];
        } else {
            while (token >= p->indptr[request + 1]) request++;
            position = p->offsets[request] + token - p->indptr[request];
        }
        angles(p, table, (double)position);
        rotate_heads(p, &p->q, table, token, t);
        if (p->k.in) rotate_heads(p, &p->k, table, token, t);
    }
}

QI_CPU_KERNEL(rope)
{
    const rope_params *p = params;
    switch (p->dtype) {
    case QI_F32: rope_tokens(p, task, QI_F32); break;
    case QI_F16: rope_tokens(p, task, QI_F16); break;
    default: rope_tokens(p, task, QI_BF16); break;
    }
}
