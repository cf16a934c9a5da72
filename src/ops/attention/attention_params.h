/* attention_params.h - what qkv_attention_run hands to its kernels. Strides in elements.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_PARAMS_H
#define QI_ATTENTION_PARAMS_H

#include "kern/plan.h"
#include "kern/rope.h"
#include "kern/scale.h"

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
    i64 q_rows, kv_extent; /* tokens of q; pages, ragged: tokens, that k and v both have */
    i64 max_pages;         /* room of plan.pages */
    i32 num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo;
    i32 page_size; /* 0 = ragged */
    qi_dtype dtype_q, dtype_kv, dtype_o;
    const float *logit_scale;  /* [num_qo_heads] multiplies q.k: sm_scale and the scales of q, k */
    const float *value_scale;  /* [num_qo_heads] multiplies a sum of v */
    const float *output_scale; /* [num_qo_heads] 1 / the scale of o */
    const float *sink;         /* [num_qo_heads] natural units, NULL = none */
    const float *alibi_slopes; /* [num_qo_heads], NULL = none */
    float logits_soft_cap;     /* 0 = none */
    float lse_scale;           /* base 2 to the base that lse is wanted in */
    i32 causal, window_left, window_right;
    i32 general;              /* do scores need more than scale, soft cap, causal and window? */
    qi_rope rope;             /* num_pairs 0: none */
    const double *rope_turns; /* [num_pairs] */
    const u8 *mask_bits;      /* NULL = no custom mask */
    const i64 *mask_indptr;   /* [requests] byte at which a request's bits begin */
    const i32 *bsr_indices;   /* column blocks of sparse groups */
    const u8 *bsr_mask;       /* bits of each entry of bsr_indices, NULL = all set */
    i64 bsr_mask_stride;
    i32 bsr_rows, bsr_cols;
    i32 num_workers;
    const void *variant; /* variant_params of a JIT build */
    char *scratch;       /* [tasks][scratch_stride] private memory of a task */
    i64 scratch_stride;
} attention_params;

enum { MAX_ARG_WORDS = 160 }; /* 8 bytes each: 32 parameters, every one a tensor of 4 axes */

/* What a GPU's kernels take: a captured launch keeps its parameters, so all that is not a tensor's goes by
 * value. Of `at`, plan has device addresses, and the three scales, variant and scratch are NULL. */
typedef struct attention_cuda_params {
    attention_params at;
    qi_scale q_scale, k_scale, v_scale, o_scale;
    float sm_scale;
    i32 reserved;
    i64 args[MAX_ARG_WORDS]; /* variant_params */
} attention_cuda_params;
_Static_assert(sizeof(attention_cuda_params) <= 4096, "a kernel's parameters");

/* Shape of the tiles; the planner and the kernels must agree. M counts rows of one KV head: tokens
 * times query heads of the group. */
enum {
    MAX_GROUP = 512, /* query heads of a KV head */
    MAX_HEAD_DIM = 512,
    DECODE_M = 16,     /* up to this M (or one token) a request is a decode tile */
    PREFILL_M = 768,   /* M of a prefill tile, or one token */
    BLOCK_N = 256,     /* most keys that a prefill tile packs at a time */
    DECODE_BLOCK = 16, /* keys that a decode tile takes at a time */
    MAX_LEVELS = 16,
    MAX_VW = 16,
    MAX_TILE_M = 32,     /* largest vector and panel of rows of any level */
    MERGE_THREADS = 128, /* of a block that merges levels on a GPU, and its shared memory */
    MERGE_SHARED_BYTES = 1024,
    MERGE_BLOCKS = 8, /* of them at most, an SM: some wait while others end */
};

/* M of a prefill tile on a GPU: four warps of 32 rows, or of 16 where the sums of v take more registers. */
#define PREFILL_TILE_M(dim_vo) ((dim_vo) <= 128 ? 128 : 64)

/* Decode tiles on a GPU (decode_mma.cuh): keys of a tile; bytes of a row in shared memory, as it is where the copy
 * engine brings pieces of `piece` keys, else (0) an odd number of 16 bytes, so that eight rows are on different
 * banks; bytes of a slot of a warp's ring, which takes a tile or the sums of v of `rows` rows. */
#define DECODE_TILE(kv_bytes) ((kv_bytes) == 1 ? 32 : 16)
#define DECODE_PITCH(dim, kv_bytes, piece)                                                         \
    ((piece) > 0 ? (dim) * (kv_bytes) : (((dim) + 15) / 16 * (kv_bytes) | 1) * 16)
#define DECODE_TILE_BYTES(qk, vo, kv_bytes, piece)                                                 \
    (DECODE_TILE(kv_bytes) *                                                                       \
     (DECODE_PITCH(qk, kv_bytes, piece) + DECODE_PITCH(vo, kv_bytes, piece)))
#define DECODE_SUM_PITCH(vo)       (((vo) + 31) / 32 * 32) /* floats */
#define DECODE_SUM_BYTES(vo, rows) (4 * (rows)*DECODE_SUM_PITCH(vo))
#define DECODE_SLOT_BYTES(qk, vo, kv_bytes, rows, piece)                                           \
    (DECODE_TILE_BYTES(qk, vo, kv_bytes, piece) > DECODE_SUM_BYTES(vo, rows)                       \
         ? DECODE_TILE_BYTES(qk, vo, kv_bytes, piece)                                              \
         : DECODE_SUM_BYTES(vo, rows))
#define DECODE_Q_PITCH(dim)                  (((dim) + 15) / 16 * 32 + 16)
#define DECODE_SHARED_ROOM(dim, rows, warps) /* past the rings */                                  \
    (1536 + 384 * (warps) + (rows)*DECODE_Q_PITCH(dim))

/* The reference kernel of GPUs: query rows and keys that a block has in shared memory at a time. */
#define ATTENTION_CHUNK        16
#define ATTENTION_KEYS(qk, vo) ((qk) + (vo) <= 512 ? 32 : 16)
#define ATTENTION_SHARED_BYTES(qk, vo)                                                             \
    (4 * (ATTENTION_CHUNK * ((qk) + ATTENTION_KEYS(qk, vo)) +                                      \
          ATTENTION_KEYS(qk, vo) * ((qk) + 1 + (vo))) +                                            \
     ATTENTION_TILE_BYTES)
#define ATTENTION_TILE_BYTES 4096

/* The prefill tile of GPUs with mma.sync: query rows and keys that a block of 4 warps has at a time, and its
 * shared memory. Rows there are an odd number of 16-byte chunks long, so that 8 rows at one chunk lie in
 * different banks; a head dim is padded to 16. Two tiles of keys, the next on its way, where two blocks
 * still fit an SM. */
#define PREFILL_SHARED_ROOM       16 /* in front of it: is this the last piece? */
#define PREFILL_PITCH(dim, bytes) ((((dim) + 15) / 16 * (bytes) | 1) * 16)
#define PREFILL_ITEM_BYTES        128 /* what is noted of an item, of a row, of a key */
#define PREFILL_ROW_BYTES         16
#define PREFILL_KEY_BYTES         24
#define PREFILL_NOTES(vo)                                                                          \
    (PREFILL_ITEM_BYTES + PREFILL_TILE_M(vo) * PREFILL_ROW_BYTES + 2 * 64 * PREFILL_KEY_BYTES)
#define PREFILL_FIXED(qk, vo) (PREFILL_NOTES(vo) + PREFILL_TILE_M(vo) * PREFILL_PITCH(qk, 2))
#define PREFILL_STAGE(qk, vo, kv_bytes, keys)                                                      \
    ((keys) * (PREFILL_PITCH(qk, kv_bytes) + PREFILL_PITCH(vo, kv_bytes)))
#define PREFILL_MOST_SHARED (111 * 1024)
#define PREFILL_FITS(qk, vo, kv_bytes, keys, stages)                                               \
    (PREFILL_FIXED(qk, vo) + (stages)*PREFILL_STAGE(qk, vo, kv_bytes, keys) + 16 <=                \
     PREFILL_MOST_SHARED)
#define PREFILL_KEYS(qk, vo, kv_bytes)   (PREFILL_FITS(qk, vo, kv_bytes, 64, 1) ? 64 : 48)
#define PREFILL_STAGES(qk, vo, kv_bytes) (PREFILL_FITS(qk, vo, kv_bytes, 64, 2) ? 2 : 1)
#define PREFILL_STAGED_PITCH(vo)         (((vo) + 15) / 16 * 64 + 32) /* of o in f32 */
#define PREFILL_LOADED(qk, vo, kv_bytes) /* and 16 bytes that are read, not used */                \
    (PREFILL_FIXED(qk, vo) + 16 +                                                                  \
     PREFILL_STAGES(qk, vo, kv_bytes) *                                                            \
         PREFILL_STAGE(qk, vo, kv_bytes, PREFILL_KEYS(qk, vo, kv_bytes)))
#define PREFILL_STAGED(vo) (PREFILL_NOTES(vo) + 64 * PREFILL_STAGED_PITCH(vo))
#define PREFILL_SHARED_BYTES(qk, vo, kv_bytes)                                                     \
    (PREFILL_LOADED(qk, vo, kv_bytes) > PREFILL_STAGED(vo) ? PREFILL_LOADED(qk, vo, kv_bytes)      \
                                                           : PREFILL_STAGED(vo))

static inline i32 decode_rows(i32 group_size)
{
    return group_size < DECODE_M ? DECODE_M / group_size : 1;
}

/* On a GPU more heads than that are a prefill tile. */
static inline i32 cuda_decode_rows(i32 group_size)
{
    return group_size <= DECODE_M ? decode_rows(group_size) : 0;
}

/* tile_m: PREFILL_M or PREFILL_TILE_M(). */
static inline i32 prefill_rows(i32 group_size, i32 tile_m)
{
    return group_size < tile_m ? tile_m / group_size : 1;
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
 * prefill_tile.h lay out. own_rows: keys and values are widened into scratch. */
static inline i64 decode_scratch_floats(i32 group_size, i32 num_kv_heads, i32 dim_qk, i32 dim_vo,
                                        int own_rows)
{
    const i64 m = round_up((i64)decode_rows(group_size) * group_size, 4);
    const i64 row = round_up(dim_qk, MAX_VW) + round_up(dim_vo, MAX_VW);
    return num_kv_heads * (m * row + m / 4 * 3 * MAX_VW + (own_rows ? DECODE_BLOCK * row : 0)) +
           2 * (i64)dim_qk + round_up(dim_qk, MAX_VW);
}

static inline i64 prefill_scratch_floats(i32 group_size, i32 dim_qk, i32 dim_vo)
{
    const i64 m = (i64)prefill_rows(group_size, PREFILL_M) * group_size + MAX_TILE_M;
    const i64 keys = block_keys(dim_qk, dim_vo), vo = round_up(dim_vo, 2 * MAX_VW);
    const i64 qk = round_up(dim_qk, MAX_VW);
    return m * (qk + vo + 2) + keys * (qk + vo) + MAX_TILE_M * (keys + MAX_VW) + 8 * MAX_VW +
           (MAX_VW + 3) * qk;
}

#endif
