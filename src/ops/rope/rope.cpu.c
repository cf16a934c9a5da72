/* rope.cpu.c - rotary embedding of q and k. Tasks share the tokens.
 *
 * A task makes the table of frequencies once, in turns a position and double precision. For each
 * token it reduces the angles to an eighth of a turn in double and evaluates sine and cosine by
 * polynomials (a plain loop, which vectorises); all heads of the token share them. Bound: memory, 2
 * x head_dim x size bytes a head; the angles cost about as much as two heads.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/rope.h"
#include "ops/rope/rope_params.h"

typedef struct rope_table {
    double turns[QI_ROPE_MAX_PAIRS];
    float cosine[2 * QI_ROPE_MAX_PAIRS], sine[2 * QI_ROPE_MAX_PAIRS]; /* of the token at hand */
} rope_table;
_Static_assert(sizeof(rope_table) <= QI_TASK_SCRATCH_BYTES, "the table lives in task scratch");

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
    const i64 rotated = 2 * p->rope.num_pairs * (i64)qi_size_of(t);
    for (i64 head = 0; head < x->heads; head++) {
        const char *in = qi_at(x->in, t, token * x->in_stride[0] + head * x->in_stride[1]);
        char *out = (char *)x->out +
                    (token * x->out_stride[0] + head * x->out_stride[1]) * (i64)qi_size_of(t);
        if (p->rope.interleaved)
            rotate_interleaved(out, in, table, p->rope.num_pairs, t);
        else
            rotate_halves(out, in, table, p->rope.num_pairs, t);
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
    qi_rope_turns(&p->rope, table->turns);
    for (i64 token = begin; token < end; token++) {
        i64 position;
        if (p->positions) {
            position = p->positions[token];
        } else {
            while (token >= p->indptr[request + 1]) request++;
            position = p->offsets[request] + token - p->indptr[request];
        }
        qi_rope_angles(&p->rope, table->turns, (double)position, table->cosine, table->sine);
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
