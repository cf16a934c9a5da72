/* attention_params.h - what qkv_attention_run hands to its kernels. Strides in elements.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_PARAMS_H
#define QI_ATTENTION_PARAMS_H

#include "kern/plan.h"

typedef struct attention_params {
    qi_plan plan;
    const void *q; /* dtype_q  [tokens, num_qo_heads, head_dim_qk] */
    const void *k; /* dtype_kv [pages, page_size, num_kv_heads, head_dim_qk] by stride; ragged:
                      one page of all tokens */
    const void *v; /* dtype_kv the same with head_dim_vo */
    void *o;       /* dtype_o  [tokens, num_qo_heads, head_dim_vo] */
    float *lse;    /* f32      [tokens, num_qo_heads], NULL = not wanted */
    i64 q_stride[2], o_stride[2], lse_stride[2]; /* token, head */
    i64 k_stride[3], v_stride[3];                /* page, token, head */
    i32 num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo;
    i32 page_size; /* 0 = ragged */
    qi_dtype dtype_q, dtype_kv, dtype_o;
    float sm_scale;        /* multiplies q.k */
    float logits_soft_cap; /* 0 = none */
    float lse_scale;       /* base 2 to the base that lse is wanted in */
    i32 causal, window_left, window_right;
    i32 num_workers;
    char *scratch; /* [tasks][scratch_stride] private memory of a task */
    i64 scratch_stride;
} attention_params;

/* Shape of the tiles; the planner and the kernels must agree. M counts rows of one KV head: tokens
 * times query heads of the group. */
enum {
    DECODE_M = 16,   /* up to this M (or one token) a request is a decode tile */
    PREFILL_M = 192, /* M of a prefill tile, or one token */
    BLOCK_N = 256,   /* most keys that a prefill tile packs at a time */
    MAX_VW = 16,
    MAX_TILE_M = 12, /* largest vector and micro-tile of any level */
};

static inline i32 decode_rows(i32 group_size)
{
    return group_size < DECODE_M ? DECODE_M / group_size : 1;
}

static inline i32 prefill_rows(i32 group_size)
{
    return group_size < PREFILL_M ? PREFILL_M / group_size : 1;
}

static inline i64 round_up(i64 n, i64 unit)
{
    return (n + unit - 1) / unit * unit;
}

/* Keys packed at a time: fewer for large heads, so that K and V panels stay within half of a 1-MB
 * L2. */
static inline i32 block_keys(i32 head_dim_qk, i32 head_dim_vo)
{
    const i32 fit = 128 * 1024 / (head_dim_qk + head_dim_vo) / 64 * 64;
    return fit < BLOCK_N ? fit : BLOCK_N;
}

/* Floats of scratch that one task needs, for any level: an upper bound of what decode_tile.h and
 * prefill_tile.h lay out. */
static inline i64 decode_scratch_floats(i32 group_size, i32 num_kv_heads, i32 dim_qk, i32 dim_vo)
{
    const i64 m = round_up((i64)decode_rows(group_size) * group_size, 4);
    return num_kv_heads *
           (m * (round_up(dim_qk, MAX_VW) + round_up(dim_vo, MAX_VW)) + m / 4 * 2 * MAX_VW);
}

static inline i64 prefill_scratch_floats(i32 group_size, i32 dim_qk, i32 dim_vo)
{
    const i64 m = round_up((i64)prefill_rows(group_size) * group_size, MAX_TILE_M);
    const i64 keys = block_keys(dim_qk, dim_vo), vo = round_up(dim_vo, 2 * MAX_VW);
    return m * (dim_qk + vo + 2) + keys * (dim_qk + vo) + MAX_TILE_M * (keys + MAX_VW) + 8 * MAX_VW;
}

#endif
