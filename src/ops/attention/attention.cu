/* attention.cu - the reference kernel of GPUs: every feature, dtype and head dim, in f32 on the CUDA
 * cores. Each block walks its strip of the plan; of a work item it takes one KV head and CHUNK query rows
 * at a time, and of their keys KEYS at a time, all in shared memory. The last piece of a cut tile to
 * finish merges it, in key order, so the result does not depend on who that is; with several levels all
 * partial rows are merged by a launch of their own.
 *
 * Head dims and dtypes are read at run time, so that one compilation serves all of them.
 * JIT constants: THREADS; QI_VARIANT.
 * Bound: FMA and shared memory; keys are read once a CHUNK of rows.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cuda/prelude.cuh"
#include "ops/attention/merge_rows.cuh"

enum {
    CHUNK = ATTENTION_CHUNK,
    MAX_KEYS = 32,                                    /* a lane each */
    OUTPUTS = (MAX_HEAD_DIM + THREADS - 1) / THREADS, /* dims of a thread */
    WARPS = THREADS / WARP,
};

typedef struct tile {
    int dim_qk, dim_vo, pitch,
        keys;         /* pitch odd: lanes on neighbouring keys are on different banks */
    float *q, *k, *v; /* [CHUNK][dim_qk], [keys][pitch], [keys][dim_vo] */
    float weight[CHUNK][MAX_KEYS];
    float max[CHUNK], sum[CHUNK], shrink[CHUNK];
    tile_row row[CHUNK];
    int qo_head[CHUNK];
    i64 k_at[MAX_KEYS], v_at[MAX_KEYS];
    int kv_pos[MAX_KEYS];
    int is_last;
} tile;
_Static_assert(sizeof(tile) <= ATTENTION_TILE_BYTES, "as launched");

QI_INLINE tile *make_tile(const attention_params *p, char *shared)
{
    tile *t = (tile *)shared;
    if (threadIdx.x == 0) {
        t->dim_qk = p->head_dim_qk;
        t->dim_vo = p->head_dim_vo;
        t->pitch = p->head_dim_qk + 1;
        t->keys = ATTENTION_KEYS(p->head_dim_qk, p->head_dim_vo);
        t->q = (float *)(shared + ATTENTION_TILE_BYTES);
        t->k = t->q + CHUNK * t->dim_qk;
        t->v = t->k + t->keys * t->pitch;
    }
    __syncthreads();
    return t;
}

/* ---- loading ------------------------------------------------------------------------------ */

/* Rotates a row by its position: pair i, in turns a position by p->rope_turns. */
QI_INLINE void rotate_pair(const attention_params *p, float *row, int i, int position)
{
    const int first = p->rope.interleaved ? 2 * i : i;
    const int second = p->rope.interleaved ? 2 * i + 1 : i + p->rope.num_pairs;
    const double turns = (double)position * p->rope_turns[i];
    float sine, cosine;
    sincospif(2.f * (float)(turns - rint(turns)), &sine, &cosine);
    const float x = row[first], y = row[second];
    row[first] = x * cosine - y * sine;
    row[second] = x * sine + y * cosine;
}

/* Query rows m, m + 1, ... of the item's KV head: (row, query head of the group), heads fastest. */
QI_INLINE void load_queries(const attention_cuda_params *c, const qi_work *w, int kv_head, int m,
                            int n, tile *t)
{
    const attention_params *p = &c->at;
    const int group = p->num_qo_heads / p->num_kv_heads, tid = (int)threadIdx.x;
    if (tid < n) {
        t->row[tid] = row_at(p, w->row_begin + (m + tid) / group);
        t->qo_head[tid] = kv_head * group + (m + tid) % group;
        t->max[tid] = -QI_INFINITY;
        t->sum[tid] = 0.f;
    }
    __syncthreads();
    const int dim = t->dim_qk, pairs = dim / 2;
    for (int i = tid; i < n * dim; i += THREADS) {
        const int r = i / dim, d = i % dim;
        const i64 at = t->row[r].token * p->q_stride[0] + t->qo_head[r] * p->q_stride[1] + d;
        t->q[r * dim + d] = qi_load1(qi_at(p->q, p->dtype_q, at), p->dtype_q);
    }
    if (p->rope.num_pairs > 0) {
        __syncthreads();
        for (int i = tid; i < n * p->rope.num_pairs; i += THREADS) {
            const int r = i / p->rope.num_pairs;
            rotate_pair(p, t->q + r * dim, i % p->rope.num_pairs, t->row[r].position);
        }
    }
    if (CHANGES_QUERIES) {
        __syncthreads();
        for (int i = tid; i < n * pairs; i += THREADS) {
            const int r = i / pairs;
            hook_pair(c, hook_pos(p, t->row[r], t->qo_head[r]), t->q + r * dim, i % pairs, dim, 0);
        }
    }
    __syncthreads();
}

/* Keys [first, first + n) of the group's list. */
QI_INLINE void load_keys(const attention_cuda_params *c, const qi_group *g, int kv_head, int first,
                         int n, tile *t)
{
    const attention_params *p = &c->at;
    const int tid = (int)threadIdx.x;
    if (tid < n) {
        const key_place at = key_at(p, g, first + tid);
        t->k_at[tid] = at.k + kv_head * p->k_stride[2];
        t->v_at[tid] = at.v + kv_head * p->v_stride[2];
        t->kv_pos[tid] = at.position;
    }
    __syncthreads();
    const int dim = t->dim_qk, pairs = dim / 2;
    for (int i = tid; i < n * dim; i += THREADS) {
        const int j = i / dim, d = i % dim;
        t->k[j * t->pitch + d] = qi_load1(qi_at(p->k, p->dtype_kv, t->k_at[j] + d), p->dtype_kv);
    }
    for (int i = tid; i < n * t->dim_vo; i += THREADS) {
        const int j = i / t->dim_vo, d = i % t->dim_vo;
        t->v[i] = qi_load1(qi_at(p->v, p->dtype_kv, t->v_at[j] + d), p->dtype_kv);
    }
    if (p->rope.num_pairs > 0) {
        __syncthreads();
        for (int i = tid; i < n * p->rope.num_pairs; i += THREADS) {
            const int j = i / p->rope.num_pairs;
            rotate_pair(p, t->k + j * t->pitch, i % p->rope.num_pairs, t->kv_pos[j]);
        }
    }
    if (CHANGES_KEYS) {
        __syncthreads();
        for (int i = tid; i < n * pairs; i += THREADS) {
            const int j = i / pairs;
            qi_pos pos = {};
            pos.kv_head = kv_head;
            pos.kv_pos = t->kv_pos[j];
            hook_pair(c, pos, t->k + j * t->pitch, i % pairs, dim, 1);
        }
    }
    __syncthreads();
}

/* ---- computing ---------------------------------------------------------------------------- */

/* Weights of the rows' keys relative to their running maxima, which move; a warp a row at a time. */
QI_INLINE void weigh(const attention_cuda_params *c, const qi_group *g, int first, int rows, int n,
                     tile *t)
{
    const attention_params *p = &c->at;
    const int group = p->num_qo_heads / p->num_kv_heads;
    const int lane = threadIdx.x % WARP;
    for (int r = (int)threadIdx.x / WARP; r < rows; r += WARPS) {
        const int head = t->qo_head[r];
        const float scale =
            c->sm_scale * qi_scale_at(&c->q_scale, head) * qi_scale_at(&c->k_scale, head / group);
        float s = SOFTMAX ? -QI_INFINITY : 0.f;
        if (lane < n) {
            float product = 0.f;
            const float *q = t->q + r * t->dim_qk, *k = t->k + lane * t->pitch;
            for (int d = 0; d < t->dim_qk; d++) product += q[d] * k[d];
            s = score(c, g, t->row[r], head, first + lane, t->kv_pos[lane], product, scale);
        }
        float shrink = 1.f;
        if (SOFTMAX) {
            const float before = t->max[r], max = fmaxf(before, warp_max(s));
            shrink = before == -QI_INFINITY ? 0.f : exp2f(before - max);
            s = s == -QI_INFINITY ? 0.f : exp2f(s - max);
            const float sum = warp_sum(s);
            __syncwarp();
            if (lane == 0) {
                t->max[r] = max;
                t->sum[r] = t->sum[r] * shrink + sum;
            }
        }
        if (lane == 0) t->shrink[r] = shrink;
        t->weight[r][lane] = s;
    }
    __syncthreads();
}

/* acc[r][i]: dim i * THREADS + thread of row r. */
QI_INLINE void accumulate(float acc[CHUNK][OUTPUTS], int rows, int n, const tile *t)
{
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) {
        const int d = i * THREADS + (int)threadIdx.x;
        if (d >= t->dim_vo) break;
#pragma unroll
        for (int r = 0; r < CHUNK; r++) acc[r][i] *= r < rows ? t->shrink[r] : 0.f;
        for (int j = 0; j < n; j++) {
            const float v = t->v[j * t->dim_vo + d];
#pragma unroll
            for (int r = 0; r < CHUNK; r++) acc[r][i] += r < rows ? t->weight[r][j] * v : 0.f;
        }
    }
    __syncthreads();
}

/* Results of the chunk's rows: to o, or to partial rows from slot on. Sums pass through t->v, since a thread
 * has every THREADS-th dim of a row, and four neighbours are stored together. */
QI_INLINE void store_rows(const attention_cuda_params *c, float acc[CHUNK][OUTPUTS], int rows,
                          i64 slot, const tile *t)
{
    const attention_params *p = &c->at;
    const int dim = t->dim_vo, quads = dim / 4;
#pragma unroll
    for (int r = 0; r < CHUNK; r++) {
        if (r >= rows) break;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) {
            const int d = i * THREADS + (int)threadIdx.x;
            if (d < dim) t->v[d] = acc[r][i];
        }
        __syncthreads();
        const float sum = t->sum[r];
        const int first = threadIdx.x == 0;
        float norm = norm_of(sum);
        if (slot < 0) norm = finish_row(c, t->row[r], t->qo_head[r], t->max[r], sum, first);
        for (int i = (int)threadIdx.x; i < quads; i += THREADS) {
            float o[4];
            for (int j = 0; j < 4; j++) o[j] = t->v[4 * i + j] * norm;
            if (slot < 0)
                store_outputs(c, t->row[r], t->qo_head[r], 4 * i, o);
            else
                *(float4 *)(p->plan.o_partial + (slot + r) * dim + 4 * i) =
                    make_float4(o[0], o[1], o[2], o[3]);
        }
        if (slot >= 0 && first) p->plan.lse_partial[slot + r] = lse_of(t->max[r], sum);
    }
    __syncthreads();
}

/* Rows [m, m + CHUNK) of one KV head of an item. */
QI_INLINE void do_chunk(const attention_cuda_params *c, const qi_work *w, int kv_head, int m,
                        tile *t)
{
    const attention_params *p = &c->at;
    const qi_group *g = &p->plan.groups[w->group];
    const int group = p->num_qo_heads / p->num_kv_heads, all = w->num_rows * group;
    const int rows = all - m < CHUNK ? all - m : CHUNK;
    float acc[CHUNK][OUTPUTS] = {};
    load_queries(c, w, kv_head, m, rows, t);
    for (int first = w->kv_begin; first < w->kv_end; first += t->keys) {
        const int n = w->kv_end - first < t->keys ? w->kv_end - first : t->keys;
        load_keys(c, g, kv_head, first, n, t);
        weigh(c, g, first, rows, n, t);
        accumulate(acc, rows, n, t);
    }
    const i64 slot = w->slot < 0 ? -1 : w->slot + (i64)(kv_head - w->kv_head) * all + m;
    store_rows(c, acc, rows, slot, t);
}

/* ---- entries ------------------------------------------------------------------------------ */

QI_KERNEL(attention, attention_cuda_params)
{
    extern __shared__ __align__(16) char shared[];
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const attention_params *a = &p.at;
    tile *t = make_tile(a, shared);
    const int one_level = a->plan.header->num_levels == 1;
    const int begin = a->plan.work_indptr[blockIdx.x], end = a->plan.work_indptr[blockIdx.x + 1];
    const int group = a->num_qo_heads / a->num_kv_heads;
    for (int i = begin; i < end; i++) {
        const qi_work w = a->plan.work[i];
        for (int head = w.kv_head; head < w.kv_head + w.num_kv_heads; head++)
            for (int m = 0; m < w.num_rows * group; m += CHUNK) do_chunk(&p, &w, head, m, t);
        if (w.slot >= 0 && one_level) finish_piece(&p, &w, &t->is_last);
    }
}
