/* attention_bits.h - for tests of what must hold between runs of attention, bit for bit.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_ATTENTION_BITS_H
#define QKV_TESTS_ATTENTION_BITS_H

#include "attention_run.h"

/* The results of one run, to compare bit for bit. */
typedef struct bits {
    void *o;
    float *lse;
} bits;

static inline bits bits_of(const attn_case *a)
{
    bits b = {case_alloc(case_o_bytes(a), 1), case_alloc(case_lse_bytes(a), 1)};
    memcpy(b.o, a->got_o, case_o_bytes(a));
    memcpy(b.lse, a->got_lse, case_lse_bytes(a));
    return b;
}

static inline bool bits_equal(const bits *b, const attn_case *a)
{
    return memcmp(b->o, a->got_o, case_o_bytes(a)) == 0 &&
           memcmp(b->lse, a->got_lse, case_lse_bytes(a)) == 0;
}

static inline void bits_free(bits *b)
{
    free(b->o), free(b->lse);
}

/* Plan and run on a new operator with these limits changed. */
static inline void run_with(attn_case *a, qkv_context *ctx, int32_t max_workers,
                            int64_t max_split_rows)
{
    a->limits.max_workers = max_workers;
    a->limits.max_split_rows = max_split_rows;
    case_try(a, ctx);
}

static inline case_config any_dims(int i, int32_t page_size)
{
    const DLDataType types[] = {QKV_F32, QKV_F16, QKV_BF16};
    const int32_t dims[] = {64, 128, 40, 96};
    qkv_attention_spec s = case_spec(6, 2, dims[i % 4], page_size);
    s.dtype_q = s.dtype_o = types[i % 3];
    s.dtype_kv = types[(i + i / 3) % 3];
    return case_config_init(s);
}

#endif
