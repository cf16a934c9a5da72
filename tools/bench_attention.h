/* bench_attention.h - what a bench of attention holds, for what runs it and what checks it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_BENCH_ATTENTION_H
#define QKV_TOOLS_BENCH_ATTENTION_H

#include "attention_problem.h"
#include "bench.h"

typedef struct bench_attention_state {
    attention_problem a;
    qkv_attention *op;
    int32_t *qo_indptr, *kv_indptr, *kv_indices, *last_page_len; /* the host's */
    int32_t *device_index[4]; /* the same for the device, where plans of it are made */
    int64_t io_sets;          /* of q, o and lse; one on the CPU, where they are hardly noticed */
    bench_array q, k, v;      /* k, v: num_sets pools */
    char *o;
    float *lse;
    int64_t rows, k_elements, v_elements; /* of a set; a row of each head */
} bench_attention_state;

/* The keys begin .. end - 1 of a request. */
typedef struct bench_keys {
    int64_t begin, end;
} bench_keys;

/* What a row of a request sees. */
bench_keys bench_row_sees(const attention_problem *a, int64_t request, int64_t row);

/* The first row of a set. */
static inline int64_t bench_first_row(const bench_attention_state *s, int64_t set)
{
    return set % s->io_sets * s->rows;
}

static inline char *bench_o_at(const bench_attention_state *s, int64_t row)
{
    return s->o + data_bytes(s->a.spec.dtype_o, row * s->a.spec.head_dim_vo);
}

void bench_attention_run(bench *b, int64_t set);

/* One run on poisoned outputs, of which some rows are held against double precision. */
void bench_attention_verify(bench *b);

#endif
