/* fuzz_plan.c - libFuzzer: any index arrays are refused with a message, or planned and run without
 * a touch outside the tensors (AddressSanitizer watches: every array is an allocation of its own).
 *
 * The first bytes choose form, lengths and the pool; the rest fills the arrays, mostly with small
 * numbers so that some batches are valid. Built and run by tools/fuzz.sh.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "qkv/qkv.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { HEADS = 2, DIM = 8, PAGE = 4, POOL = 16, MAX_TOKENS = 32, KEYS = 96 };

typedef struct input {
    const uint8_t *at, *end;
} input;

static uint8_t next(input *in)
{
    return in->at < in->end ? *in->at++ : 0;
}

/* An array of n numbers: a byte each, or after an escape four bytes as they come. */
static int32_t *numbers(input *in, int64_t n)
{
    int32_t *out = malloc((size_t)(n > 0 ? n : 1) * sizeof *out);
    if (!out) abort();
    for (int64_t i = 0; i < n; i++) {
        out[i] = (int32_t)next(in) - 2;
        if (out[i] == 253) {
            uint32_t word = 0;
            for (int b = 0; b < 4; b++) word = word << 8 | next(in);
            memcpy(&out[i], &word, sizeof word);
        }
    }
    return out;
}

static DLTensor vector(int32_t *data, int64_t *length)
{
    return (DLTensor){
        .data = data, .device = {kDLCPU, 0}, .ndim = 1, .dtype = QKV_I32, .shape = length};
}

static void run(qkv_attention *attention, int ragged)
{
    static float q[MAX_TOKENS * HEADS * DIM], o[MAX_TOKENS * HEADS * DIM];
    int64_t rows[] = {MAX_TOKENS, HEADS, DIM}, flat[] = {KEYS, 1, DIM};
    int64_t pages[] = {POOL, PAGE, 1, DIM};
    const size_t floats = ragged ? KEYS * DIM : POOL * PAGE * DIM;
    float *k = calloc(floats, sizeof *k), *v = calloc(floats, sizeof *v);
    if (!k || !v) abort();
    DLTensor tq = {.data = q, .device = {kDLCPU, 0}, .ndim = 3, .dtype = QKV_F32, .shape = rows};
    DLTensor to = tq, tk = tq, tv;
    to.data = o;
    tk.data = k;
    tk.ndim = ragged ? 3 : 4;
    tk.shape = ragged ? flat : pages;
    tv = tk;
    tv.data = v;
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .q = &tq, .k = &tk, .v = &tv, .o = &to};
    if (qkv_attention_run(attention, &io, NULL) != QKV_OK && !ragged) abort();
    free(k);
    free(v);
}

static qkv_attention *create(int ragged)
{
    static qkv_context *ctx;
    if (!ctx &&
        qkv_context_create(&(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .num_threads = 1},
                           &ctx) != QKV_OK)
        abort();
    const qkv_attention_spec spec = {QKV_ATTENTION_SPEC_INIT, .num_qo_heads = HEADS,
                                     .num_kv_heads = 1,       .head_dim_qk = DIM,
                                     .head_dim_vo = DIM,      .page_size = ragged ? 0 : PAGE,
                                     .mask = QKV_MASK_CAUSAL, .dtype_q = QKV_F32,
                                     .dtype_kv = QKV_F32,     .dtype_o = QKV_F32};
    const qkv_attention_limits limits = {
        QKV_ATTENTION_LIMITS_INIT, .max_requests = 8, .max_tokens = MAX_TOKENS, .max_workers = 3,
        .max_kv_len = 48,          .max_pages = 64,   .pool_pages = POOL};
    qkv_attention *attention;
    if (qkv_attention_create(ctx, &spec, &limits, NULL, &attention) != QKV_OK) abort();
    return attention;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static qkv_attention *paged, *ragged;
    if (!paged) {
        paged = create(0);
        ragged = create(1);
    }
    input in = {data, data + size};
    const int form = next(&in) % 3; /* CSR, block table, ragged */
    int64_t requests = next(&in) % 10, entries = requests + 1, listed = next(&in) % 80;
    int64_t table[] = {requests, next(&in) % 16};
    int32_t *qo = numbers(&in, entries), *indptr = numbers(&in, entries);
    int32_t *last = numbers(&in, requests), *pos = numbers(&in, requests);
    int32_t *list = numbers(&in, form == 1 ? requests * table[1] : listed);
    DLTensor qo_indptr = vector(qo, &entries), kv_indptr = vector(indptr, &entries);
    DLTensor lens = vector(last, &requests), qo_pos = vector(pos, &requests);
    DLTensor indices = vector(list, &listed);
    if (form == 1) {
        indices.ndim = 2;
        indices.shape = table;
    }
    const qkv_kv_index index = {QKV_KV_INDEX_INIT,
                                .qo_indptr = &qo_indptr,
                                .kv_indptr = form == 1 ? NULL : &kv_indptr,
                                .kv_indices = form == 0 ? &indices : NULL,
                                .kv_last_page_len = form == 0 ? &lens : NULL,
                                .block_table = form == 1 ? &indices : NULL,
                                .kv_lens = form == 1 ? &lens : NULL};
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = 1, .levels = &index,
                                       .qo_pos = size % 2 ? &qo_pos : NULL};
    qkv_attention *attention = form == 2 ? ragged : paged;
    const qkv_status status = qkv_attention_plan(attention, &batch, NULL);
    if (status != QKV_OK && !qkv_last_error()[0]) abort();
    if (status == QKV_OK) run(attention, form == 2);
    free(qo);
    free(indptr);
    free(last);
    free(pos);
    free(list);
    return 0;
}
