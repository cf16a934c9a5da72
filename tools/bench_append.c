/* bench_append.c - new keys and values into pages in random order.
 * Bytes: k and v read, and written to the cache.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "bench.h"

enum { NUM_SAMPLES = 256 /* rows that are checked */ };

typedef struct state {
    int64_t batch, qo_len, kv_len, heads, dim[2], page, request_pages, num_pages, num_tokens;
    int32_t layout;
    DLDataType dtype, kv;
    bench_array rows[2]; /* k, v: num_sets of [num_tokens, ...] */
    char *pool[2];       /* num_sets of [num_pages, ...] */
    int32_t *qo_indptr, *block_table, *kv_lens;
    int32_t *device_index[3]; /* the same for the device */
} state;

static void make_index(bench *b, state *s)
{
    s->qo_indptr = bench_alloc(b, (double)s->batch + 1, sizeof(int32_t));
    s->kv_lens = bench_alloc(b, (double)s->batch, sizeof(int32_t));
    s->block_table = bench_alloc(b, (double)s->num_pages, sizeof(int32_t));
    for (int64_t r = 0; r < s->batch; r++) {
        s->qo_indptr[r + 1] = (int32_t)((r + 1) * s->qo_len);
        s->kv_lens[r] = (int32_t)s->kv_len;
    }
    for (int64_t i = 0; i < s->num_pages; i++) s->block_table[i] = (int32_t)i;
    data_shuffle(&b->random, s->block_table, s->num_pages);
    s->device_index[0] = bench_upload(b, s->qo_indptr, ((size_t)s->batch + 1) * sizeof(int32_t));
    s->device_index[1] = bench_upload(b, s->block_table, (size_t)s->num_pages * sizeof(int32_t));
    s->device_index[2] = bench_upload(b, s->kv_lens, (size_t)s->batch * sizeof(int32_t));
}

static void setup(bench *b)
{
    state *s = b->state = bench_alloc(b, 1, sizeof *s);
    s->batch = bench_int(b, KEY_BATCH);
    s->qo_len = bench_int(b, KEY_QO_LEN);
    s->kv_len = bench_int(b, KEY_KV_LEN);
    s->heads = bench_int(b, KEY_KV_HEADS);
    s->dim[0] = b->p->value[KEY_HEAD_DIM].first;
    s->dim[1] = b->p->value[KEY_HEAD_DIM].second;
    s->page = bench_int(b, KEY_PAGE);
    s->layout = (int32_t)bench_int(b, KEY_LAYOUT);
    s->dtype = problem_dtype(b->p, KEY_DTYPE);
    s->kv = problem_dtype(b->p, KEY_KV);
    s->request_pages = (s->kv_len + s->page - 1) / s->page;
    s->num_pages = s->batch * s->request_pages;
    s->num_tokens = s->batch * s->qo_len;
    bench_rows_of(b, "append", b->row, sizeof b->row);

    const double row = (double)(s->heads * (s->dim[0] + s->dim[1]));
    const double in = (double)s->num_tokens * row * (double)data_bytes(s->dtype, 1);
    const double out = (double)s->num_tokens * row * (double)data_bytes(s->kv, 1);
    const double pool = (double)s->num_pages * (double)s->page * row * (double)data_bytes(s->kv, 1);
    b->bytes = in + out;
    b->copies = true;
    bench_rotate(b, b->bytes, in + pool);
    for (int i = 0; i < 2; i++) {
        const double sets = (double)b->num_sets * (double)(s->heads * s->dim[i]);
        s->rows[i] = bench_random(b, s->dtype, sets * (double)s->num_tokens, 1);
        s->pool[i] =
            bench_memory(b, sets * (double)s->num_pages * (double)s->page, data_bytes(s->kv, 1));
        bench_poison(b, s->pool[i], s->kv,
                     b->num_sets * s->heads * s->dim[i] * s->num_pages * s->page);
    }
    make_index(b, s);
}

/* The first element of a set of rows. */
static int64_t rows_at(const state *s, int i, int64_t set)
{
    return set * s->num_tokens * s->heads * s->dim[i];
}

static char *pool_at(const state *s, int i, int64_t set)
{
    return s->pool[i] + data_bytes(s->kv, set * s->num_pages * s->page * s->heads * s->dim[i]);
}

static void run(bench *b, int64_t set)
{
    state *s = b->state;
    data_tensor rows[2], pool[2], qo_indptr, block_table, kv_lens;
    for (int i = 0; i < 2; i++) {
        const int64_t first = s->layout == QKV_HND ? s->heads : s->page;
        const int64_t second = s->layout == QKV_HND ? s->page : s->heads;
        BENCH_TENSOR(b, &rows[i], bench_at(&s->rows[i], rows_at(s, i, set)), s->dtype,
                     s->num_tokens, s->heads, s->dim[i]);
        BENCH_TENSOR(b, &pool[i], pool_at(s, i, set), s->kv, s->num_pages, first, second,
                     s->dim[i]);
    }
    BENCH_TENSOR(b, &qo_indptr, s->device_index[0], QKV_I32, s->batch + 1);
    BENCH_TENSOR(b, &block_table, s->device_index[1], QKV_I32, s->batch, s->request_pages);
    BENCH_TENSOR(b, &kv_lens, s->device_index[2], QKV_I32, s->batch);
    const qkv_kv_index index = {QKV_KV_INDEX_INIT, .qo_indptr = &qo_indptr.t,
                                .block_table = &block_table.t, .kv_lens = &kv_lens.t};
    tool_check(qkv_kv_append(b->ctx, &pool[0].t, &pool[1].t, s->layout, &rows[0].t, &rows[1].t,
                             &index, NULL, NULL, b->stream),
               "qkv_kv_append");
}

/* How far a number may be from what a type keeps of it: half a unit of its last place, or of the smallest
 * number's; i8 has units of 1. */
static double stored_error(DLDataType t, double x)
{
    if (t.bits != 8) return data_eps(t) * fabs(x) + 0x1p-25;
    if (t.code == kDLInt) return 0.5;
    const int e5m2 = t.code == QKV_E5M2.code;
    return fabs(x) * (e5m2 ? 0x1p-3 : 0x1p-4) + (e5m2 ? 0x1p-17 : 0x1p-10);
}

static void verify(bench *b)
{
    state *s = b->state;
    const int64_t set = data_below(&b->random, b->num_sets);
    const bool exact =
        s->kv.bits == 32 || (s->kv.code == s->dtype.code && s->kv.bits == s->dtype.bits);
    const double largest = fmax((double)s->dim[0], (double)s->dim[1]);
    double *want = bench_alloc(b, largest, sizeof *want),
           *got = bench_alloc(b, largest, sizeof *got);
    run(b, set);
    for (int k = 0; k < NUM_SAMPLES; k++) {
        const int64_t request = data_below(&b->random, s->batch),
                      i = data_below(&b->random, s->qo_len);
        const int64_t token = request * s->qo_len + i, head = data_below(&b->random, s->heads);
        const int64_t position = s->kv_len - s->qo_len + i, slot = position % s->page;
        const int64_t page = s->block_table[request * s->request_pages + position / s->page];
        for (int j = 0; j < 2; j++) {
            const int64_t row = s->layout == QKV_HND ? (page * s->heads + head) * s->page + slot
                                                     : (page * s->page + slot) * s->heads + head;
            bench_read(&s->rows[j], rows_at(s, j, set) + (token * s->heads + head) * s->dim[j],
                       s->dim[j], want);
            bench_results(b, pool_at(s, j, set), s->kv, row * s->dim[j], s->dim[j], got);
            for (int64_t d = 0; d < s->dim[j]; d++)
                bench_expect(b, got[d], want[d], exact ? 0 : stored_error(s->kv, want[d]),
                             "%s of row %lld, head %lld, dim %lld", j ? "v" : "k", (long long)token,
                             (long long)head, (long long)d);
        }
    }
}

const bench_op bench_append = {.name = "append", .setup = setup, .run = run, .verify = verify};
