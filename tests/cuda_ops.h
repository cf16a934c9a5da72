/* cuda_ops.h - every operator that enqueues, on small random data that host and GPU share; and graphs and
 * streams of the driver, for the tests of what calls do on a GPU.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_CUDA_OPS_H
#define QKV_TESTS_CUDA_OPS_H

#include <pthread.h>

#include "support.h"

/* ---- the driver ----------------------------------------------------------------------------- */

/* One call by its symbol: DRIVER("cuStreamDestroy_v2", (void *), stream); fails the test on an error. */
#define DRIVER(symbol, args, ...)                                                                  \
    do {                                                                                           \
        int(*call_) args;                                                                          \
        *(void **)&call_ = test_driver(symbol);                                                    \
        const int result_ = call_(__VA_ARGS__);                                                    \
        if (result_ != 0) fail_msg("%s: error %d", (symbol), result_);                             \
    } while (0)

/* The driver's handles of the two streams that always are. */
#define LEGACY_STREAM     ((void *)1)
#define PER_THREAD_STREAM ((void *)2)

/* One that does not wait for the legacy stream, nor that for it. */
static inline void *stream_new(void)
{
    enum { NON_BLOCKING = 1 };
    void *stream = NULL;
    DRIVER("cuStreamCreate", (void **, unsigned), &stream, NON_BLOCKING);
    return stream;
}

static inline void stream_free(void *stream)
{
    DRIVER("cuStreamDestroy_v2", (void *), stream);
}

static inline void stream_wait(void *stream)
{
    DRIVER("cuStreamSynchronize", (void *), stream);
}

static inline void capture_begin(void *stream)
{
    enum { GLOBAL = 0 }; /* the strictest: no thread may allocate or wait */
    DRIVER("cuStreamBeginCapture_v2", (void *, int), stream, GLOBAL);
}

/* The graph, ready to be launched. */
static inline void *capture_end(void *stream)
{
    void *graph = NULL, *executable = NULL;
    DRIVER("cuStreamEndCapture", (void *, void **), stream, &graph);
    DRIVER("cuGraphInstantiateWithFlags", (void **, void *, unsigned long long), &executable, graph,
           0);
    DRIVER("cuGraphDestroy", (void *), graph);
    return executable;
}

static inline void graph_replay(void *executable, void *stream)
{
    DRIVER("cuGraphLaunch", (void *, void *), executable, stream);
    stream_wait(stream);
}

static inline void graph_free(void *executable)
{
    DRIVER("cuGraphExecDestroy", (void *), executable);
}

/* ---- data ------------------------------------------------------------------------------------ */

enum {
    OPS_ROWS = 6,
    OPS_SIZE = 136, /* of a row of the pointwise operators */
    OPS_COLUMNS = 24,
    OPS_HEADS = 4,
    OPS_KV_HEADS = 2,
    OPS_DIM = 64,
    OPS_REQUESTS = 3,
    OPS_PAGE_SIZE = 4,
    OPS_PAGES = 24, /* a third of them for each request's own */
    OPS_PER_REQUEST = OPS_PAGES / OPS_REQUESTS,
    OPS_VOCAB = 300,
    OPS_K = 20,
    OPS_STATES = 2,
    OPS_WALKS = 2, /* of draft tokens, OPS_NODES long */
    OPS_NODES = OPS_ROWS / OPS_WALKS - 1,
};

/* What all operators read and write; floats first. Inputs of one may be outputs of another. */
typedef struct ops_data {
    uint16_t x[OPS_ROWS * OPS_SIZE], up[OPS_ROWS * OPS_SIZE], residual[OPS_ROWS * OPS_SIZE];
    uint16_t out[OPS_ROWS * OPS_SIZE], weight[OPS_SIZE];
    uint16_t matrix[OPS_COLUMNS * OPS_SIZE], product[OPS_ROWS * OPS_COLUMNS];
    uint16_t q[OPS_ROWS * OPS_HEADS * OPS_DIM], q_out[OPS_ROWS * OPS_HEADS * OPS_DIM];
    uint16_t k[OPS_ROWS * OPS_KV_HEADS * OPS_DIM], k_out[OPS_ROWS * OPS_KV_HEADS * OPS_DIM];
    uint16_t v[OPS_ROWS * OPS_KV_HEADS * OPS_DIM];
    uint16_t k_cache[OPS_PAGES * OPS_PAGE_SIZE * OPS_KV_HEADS * OPS_DIM];
    uint16_t v_cache[OPS_PAGES * OPS_PAGE_SIZE * OPS_KV_HEADS * OPS_DIM];
    uint16_t o_states[OPS_STATES][OPS_ROWS * OPS_HEADS * OPS_DIM],
        o[OPS_ROWS * OPS_HEADS * OPS_DIM];
    uint16_t logits[OPS_ROWS * OPS_VOCAB], end_of_bf16[2];
    float lse_states[OPS_STATES][OPS_ROWS * OPS_HEADS], lse[OPS_ROWS * OPS_HEADS];
    float temperature[OPS_ROWS], top_p[OPS_ROWS];
    uint64_t seed[OPS_ROWS];
    int32_t top[OPS_ROWS * OPS_K];
    int32_t tokens[OPS_ROWS], accepted[OPS_ROWS], num_accepted[OPS_WALKS];
    int32_t draft_tokens[OPS_WALKS * OPS_NODES], top_k[OPS_ROWS], positions[OPS_ROWS],
        offsets[OPS_REQUESTS];
    int32_t slots[OPS_ROWS], src[2], dst[2];
    int32_t qo_indptr[OPS_REQUESTS + 1], kv_lens[OPS_REQUESTS];
    int32_t table[OPS_REQUESTS * OPS_PER_REQUEST];
    int32_t kv_indptr[OPS_REQUESTS + 1], kv_indices[OPS_PAGES], last_page_len[OPS_REQUESTS];
} ops_data;

static inline void ops_shuffled(int32_t *x, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        const int32_t j = (int32_t)test_below(i + 1);
        x[i] = x[j];
        x[j] = i;
    }
}

/* Rows to append: they end each request's tokens, in pages that are no other's. */
static inline void ops_fill_index(ops_data *d)
{
    int32_t pages[OPS_PAGES], slots[OPS_PAGES * OPS_PAGE_SIZE];
    ops_shuffled(pages, OPS_PAGES);
    ops_shuffled(slots, OPS_PAGES * OPS_PAGE_SIZE);
    memcpy(d->slots, slots, sizeof d->slots);
    memcpy(d->src, pages, sizeof d->src);
    memcpy(d->dst, pages + 2, sizeof d->dst);
    memcpy(d->table, pages, sizeof d->table);
    for (int r = 0; r < OPS_REQUESTS; r++) {
        const int32_t len = 2 + (int32_t)test_below(OPS_PER_REQUEST * OPS_PAGE_SIZE - 1);
        const int32_t used = (len + OPS_PAGE_SIZE - 1) / OPS_PAGE_SIZE;
        d->qo_indptr[r + 1] = OPS_ROWS / OPS_REQUESTS * (r + 1);
        d->kv_lens[r] = len;
        d->last_page_len[r] = len - (used - 1) * OPS_PAGE_SIZE;
        d->kv_indptr[r + 1] = d->kv_indptr[r] + used;
        memcpy(d->kv_indices + d->kv_indptr[r], d->table + r * OPS_PER_REQUEST,
               (size_t)used * sizeof(int32_t));
        d->offsets[r] = (int32_t)test_below(1000);
    }
}

/* Everything anew, outputs too: what is not written stays as it is here. */
static inline void ops_fill(ops_data *d, uint64_t seed)
{
    const uint64_t before = test_state;
    test_state = seed;
    memset(d, 0, sizeof *d);
    for (uint16_t *x = d->x; x < d->end_of_bf16; x++) *x = test_to_bf16((float)test_uniform(2));
    for (int i = 0; i < OPS_STATES * OPS_ROWS * OPS_HEADS; i++)
        (&d->lse_states[0][0])[i] = (float)test_uniform(3);
    for (int i = 0; i < OPS_ROWS * OPS_HEADS; i++) d->lse[i] = (float)test_uniform(1);
    for (int i = 0; i < OPS_ROWS; i++) {
        d->temperature[i] = (float)(1.0 + test_uniform(0.5));
        d->top_p[i] = (float)(0.75 + test_uniform(0.25));
        d->top_k[i] = 1 + (int32_t)test_below(OPS_VOCAB);
        d->seed[i] = test_u64();
        d->tokens[i] = d->accepted[i] = -2;
        d->positions[i] = (int32_t)test_below(10000);
    }
    for (int i = 0; i < OPS_WALKS * OPS_NODES; i++)
        d->draft_tokens[i] = (int32_t)test_below(OPS_VOCAB);
    ops_fill_index(d);
    test_state = before;
}

/* ---- the operators ---------------------------------------------------------------------------- */

enum { OPS_DECODE, OPS_MIXED, OPS_LEVELS, OPS_NUM_ATTENTION };

typedef struct ops {
    qkv_context *ctx;
    ops_data *d;
    qkv_attention *attention[OPS_NUM_ATTENTION];
} ops;

#define OPS_MATRIX(data, n)     TENSOR((data), QKV_BF16, OPS_ROWS, (n))
#define OPS_HEADED(data, heads) TENSOR((data), QKV_BF16, OPS_ROWS, (heads), OPS_DIM)
#define OPS_CACHE(data)         TENSOR((data), QKV_BF16, OPS_PAGES, OPS_PAGE_SIZE, OPS_KV_HEADS, OPS_DIM)
#define OPS_INTS(data, n)       TENSOR((data), QKV_I32, (n))
#define OPS_FLOATS(data)        TENSOR((data), QKV_F32, OPS_ROWS)

static inline qkv_status ops_rmsnorm(const ops *s, void *stream)
{
    ops_data *d = s->d;
    return qkv_rmsnorm(s->ctx, OPS_MATRIX(d->out, OPS_SIZE), OPS_MATRIX(d->x, OPS_SIZE),
                       TENSOR(d->weight, QKV_BF16, OPS_SIZE), 1e-5f, 1, stream);
}

static inline qkv_status ops_add_rmsnorm(const ops *s, void *stream)
{
    ops_data *d = s->d;
    return qkv_add_rmsnorm(s->ctx, OPS_MATRIX(d->out, OPS_SIZE), OPS_MATRIX(d->residual, OPS_SIZE),
                           OPS_MATRIX(d->x, OPS_SIZE), TENSOR(d->weight, QKV_BF16, OPS_SIZE), 1e-5f,
                           0, stream);
}

static inline qkv_status ops_gated(const ops *s, int32_t kind, void *stream)
{
    ops_data *d = s->d;
    return qkv_gated_activation(s->ctx, OPS_MATRIX(d->out, OPS_SIZE), OPS_MATRIX(d->x, OPS_SIZE),
                                OPS_MATRIX(d->up, OPS_SIZE), kind, stream);
}

static inline qkv_status ops_silu(const ops *s, void *stream)
{
    return ops_gated(s, QKV_SILU, stream);
}

static inline qkv_status ops_gelu(const ops *s, void *stream)
{
    return ops_gated(s, QKV_GELU, stream);
}

static inline qkv_status ops_gelu_tanh(const ops *s, void *stream)
{
    return ops_gated(s, QKV_GELU_TANH, stream);
}

static const qkv_rope_spec ops_rope_spec = {QKV_ROPE_SPEC_INIT, .theta = 500000};

static inline qkv_status ops_rope(const ops *s, void *stream)
{
    ops_data *d = s->d;
    return qkv_rope(s->ctx, &ops_rope_spec, OPS_HEADED(d->q_out, OPS_HEADS),
                    OPS_HEADED(d->q, OPS_HEADS), OPS_HEADED(d->k_out, OPS_KV_HEADS),
                    OPS_HEADED(d->k, OPS_KV_HEADS), OPS_INTS(d->positions, OPS_ROWS), NULL, NULL,
                    stream);
}

/* In place, positions by request. */
static inline qkv_status ops_rope_offsets(const ops *s, void *stream)
{
    ops_data *d = s->d;
    DLTensor *q = OPS_HEADED(d->q, OPS_HEADS);
    return qkv_rope(s->ctx, &ops_rope_spec, q, q, NULL, NULL, NULL,
                    OPS_INTS(d->qo_indptr, OPS_REQUESTS + 1), OPS_INTS(d->offsets, OPS_REQUESTS),
                    stream);
}

static inline qkv_status ops_append(const ops *s, const qkv_kv_index *index,
                                    const qkv_kv_append_options *options, void *stream)
{
    ops_data *d = s->d;
    return qkv_kv_append(s->ctx, OPS_CACHE(d->k_cache), OPS_CACHE(d->v_cache), QKV_NHD,
                         OPS_HEADED(d->k, OPS_KV_HEADS), OPS_HEADED(d->v, OPS_KV_HEADS), index,
                         NULL, options, stream);
}

static inline qkv_status ops_append_table(const ops *s, void *stream)
{
    ops_data *d = s->d;
    const qkv_kv_index index = {
        QKV_KV_INDEX_INIT, .qo_indptr = OPS_INTS(d->qo_indptr, OPS_REQUESTS + 1),
        .block_table = TENSOR(d->table, QKV_I32, OPS_REQUESTS, OPS_PER_REQUEST),
        .kv_lens = OPS_INTS(d->kv_lens, OPS_REQUESTS)};
    return ops_append(s, &index, NULL, stream);
}

/* With RoPE of k and q on the way. */
static inline qkv_status ops_append_csr(const ops *s, void *stream)
{
    ops_data *d = s->d;
    const qkv_kv_index index = {QKV_KV_INDEX_INIT,
                                .qo_indptr = OPS_INTS(d->qo_indptr, OPS_REQUESTS + 1),
                                .kv_indptr = OPS_INTS(d->kv_indptr, OPS_REQUESTS + 1),
                                .kv_indices = OPS_INTS(d->kv_indices, OPS_PAGES),
                                .kv_last_page_len = OPS_INTS(d->last_page_len, OPS_REQUESTS)};
    const qkv_kv_append_options options = {QKV_KV_APPEND_OPTIONS_INIT, .k_scale = {.value = 0.5f},
                                           .rope = &ops_rope_spec, .q = OPS_HEADED(d->q, OPS_HEADS),
                                           .q_out = OPS_HEADED(d->q_out, OPS_HEADS)};
    return ops_append(s, &index, &options, stream);
}

static inline qkv_status ops_append_slots(const ops *s, void *stream)
{
    ops_data *d = s->d;
    return qkv_kv_append_slots(s->ctx, OPS_CACHE(d->k_cache), OPS_CACHE(d->v_cache), QKV_NHD,
                               OPS_HEADED(d->k, OPS_KV_HEADS), OPS_HEADED(d->v, OPS_KV_HEADS),
                               OPS_INTS(d->slots, OPS_ROWS), NULL, stream);
}

static inline qkv_status ops_copy_pages(const ops *s, void *stream)
{
    ops_data *d = s->d;
    return qkv_kv_copy_pages(s->ctx, OPS_CACHE(d->k_cache), OPS_CACHE(d->v_cache),
                             OPS_INTS(d->src, 2), OPS_INTS(d->dst, 2), stream);
}

static inline qkv_status ops_merge(const ops *s, void *stream)
{
    ops_data *d = s->d;
    const DLTensor *o[] = {OPS_HEADED(d->o_states[0], OPS_HEADS),
                           OPS_HEADED(d->o_states[1], OPS_HEADS)};
    const DLTensor *lse[] = {TENSOR(d->lse_states[0], QKV_F32, OPS_ROWS, OPS_HEADS),
                             TENSOR(d->lse_states[1], QKV_F32, OPS_ROWS, OPS_HEADS)};
    return qkv_attention_merge(s->ctx, OPS_HEADED(d->o, OPS_HEADS),
                               TENSOR(d->lse, QKV_F32, OPS_ROWS, OPS_HEADS), o, lse, OPS_STATES, 0,
                               stream);
}

/* Of two dtypes: by a kernel of the library's. Halves of such bits are finite, too. */
static inline qkv_status ops_gemm(const ops *s, void *stream)
{
    ops_data *d = s->d;
    return qkv_gemm(s->ctx, OPS_MATRIX(d->product, OPS_COLUMNS), OPS_MATRIX(d->x, OPS_SIZE),
                    TENSOR(d->matrix, QKV_F16, OPS_COLUMNS, OPS_SIZE), stream);
}

static inline qkv_status ops_argmax(const ops *s, void *stream)
{
    return qkv_argmax(s->ctx, OPS_INTS(s->d->tokens, OPS_ROWS), OPS_MATRIX(s->d->logits, OPS_VOCAB),
                      stream);
}

static inline qkv_status ops_sample(const ops *s, void *stream)
{
    ops_data *d = s->d;
    const qkv_sampling_params params = {
        QKV_SAMPLING_PARAMS_INIT, .temperature = OPS_FLOATS(d->temperature),
        .top_k = OPS_INTS(d->top_k, OPS_ROWS), .top_p = OPS_FLOATS(d->top_p),
        .seed = TENSOR(d->seed, QKV_U64, OPS_ROWS)};
    return qkv_sample(s->ctx, OPS_INTS(d->tokens, OPS_ROWS), OPS_MATRIX(d->logits, OPS_VOCAB),
                      &params, stream);
}

static inline qkv_status ops_top_k(const ops *s, void *stream)
{
    ops_data *d = s->d;
    return qkv_top_k(s->ctx, OPS_MATRIX(d->product, OPS_K),
                     TENSOR(d->top, QKV_I32, OPS_ROWS, OPS_K), OPS_MATRIX(d->logits, OPS_VOCAB), 1,
                     stream);
}

static inline qkv_status ops_log_probs(const ops *s, void *stream)
{
    ops_data *d = s->d;
    return qkv_log_probs(s->ctx, TENSOR(d->lse, QKV_F32, OPS_ROWS, 1),
                         TENSOR(d->top, QKV_I32, OPS_ROWS, 1), OPS_MATRIX(d->logits, OPS_VOCAB),
                         TENSOR(d->positions, QKV_I32, OPS_ROWS, 1), stream);
}

/* Draft rows are target rows, of other nodes. */
static inline qkv_status ops_verify(const ops *s, void *stream)
{
    ops_data *d = s->d;
    const qkv_verify_io io = {
        QKV_VERIFY_IO_INIT,
        .accepted = TENSOR(d->accepted, QKV_I32, OPS_WALKS, OPS_NODES + 1),
        .num_accepted = OPS_INTS(d->num_accepted, OPS_WALKS),
        .tokens = TENSOR(d->tokens, QKV_I32, OPS_WALKS, OPS_NODES + 1),
        .target = TENSOR(d->logits, QKV_BF16, OPS_WALKS, OPS_NODES + 1, OPS_VOCAB),
        .draft_tokens = TENSOR(d->draft_tokens, QKV_I32, OPS_WALKS, OPS_NODES),
        .draft = TENSOR(d->logits + OPS_VOCAB, QKV_BF16, OPS_WALKS, OPS_NODES, OPS_VOCAB),
        .seed = TENSOR(d->seed, QKV_U64, OPS_WALKS)};
    return qkv_verify(s->ctx, &io, stream);
}

static inline qkv_status ops_run(const ops *s, int which, void *stream)
{
    ops_data *d = s->d;
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT,
                                 .q = OPS_HEADED(d->q, OPS_HEADS),
                                 .k = OPS_CACHE(d->k_cache),
                                 .v = OPS_CACHE(d->v_cache),
                                 .o = OPS_HEADED(d->o, OPS_HEADS),
                                 .lse = TENSOR(d->lse, QKV_F32, OPS_ROWS, OPS_HEADS)};
    return qkv_attention_run(s->attention[which], &io, stream);
}

static inline qkv_status ops_run_decode(const ops *s, void *stream)
{
    return ops_run(s, OPS_DECODE, stream);
}

static inline qkv_status ops_run_mixed(const ops *s, void *stream)
{
    return ops_run(s, OPS_MIXED, stream);
}

static inline qkv_status ops_run_levels(const ops *s, void *stream)
{
    return ops_run(s, OPS_LEVELS, stream);
}

static const struct {
    const char *name;
    qkv_status (*call)(const ops *s, void *stream);
    int num_launches;
} ops_list[] = {
    {"rmsnorm", ops_rmsnorm, 1},
    {"add_rmsnorm", ops_add_rmsnorm, 1},
    {"silu", ops_silu, 1},
    {"gelu", ops_gelu, 1},
    {"gelu_tanh", ops_gelu_tanh, 1},
    {"rope", ops_rope, 1},
    {"rope by offsets", ops_rope_offsets, 1},
    {"append by a table", ops_append_table, 1},
    {"append by CSR, rotating", ops_append_csr, 1},
    {"append by slots", ops_append_slots, 1},
    {"copy_pages", ops_copy_pages, 1},
    {"merge", ops_merge, 1},
    {"gemm", ops_gemm, 1},
    {"argmax", ops_argmax, 1},
    {"sample", ops_sample, 1},
    {"top_k", ops_top_k, 1},
    {"log_probs", ops_log_probs, 1},
    {"verify", ops_verify, 1},
    {"attention run, decode", ops_run_decode, 1},
    {"attention run, mixed", ops_run_mixed, 1},
    {"attention run, levels", ops_run_levels, 2},
};
enum { OPS_COUNT = sizeof ops_list / sizeof ops_list[0] };

/* ---- plans ------------------------------------------------------------------------------------- */

static inline qkv_attention *ops_attention_new(qkv_context *ctx, int which)
{
    const qkv_attention_spec spec = {
        QKV_ATTENTION_SPEC_INIT,    .flags = QKV_ATTENTION_ONLY_APPENDS,
        .num_qo_heads = OPS_HEADS,  .num_kv_heads = OPS_KV_HEADS,
        .head_dim_qk = OPS_DIM,     .head_dim_vo = OPS_DIM,
        .page_size = OPS_PAGE_SIZE, .mask = QKV_MASK_CAUSAL,
        .dtype_q = QKV_BF16,        .dtype_kv = QKV_BF16,
        .dtype_o = QKV_BF16};
    const qkv_attention_limits limits = {
        QKV_ATTENTION_LIMITS_INIT,
        .max_requests = OPS_REQUESTS,
        .max_tokens = OPS_ROWS,
        .max_qo_len = which == OPS_DECODE ? 1 : 0,
        .max_workers = 5,
        .max_kv_len = OPS_PAGES * OPS_PAGE_SIZE * 2,
        .max_pages = OPS_PAGES * OPS_REQUESTS + OPS_PAGES,
        .max_levels = which == OPS_LEVELS ? 2 : 1,
    };
    qkv_attention *a;
    EXPECT_OK(qkv_attention_create(ctx, &spec, &limits, NULL, &a));
    return a;
}

static pthread_mutex_t ops_random =
    PTHREAD_MUTEX_INITIALIZER; /* of test_state, where threads plan */

/* Random lengths and pages, by the seed; several levels share up to 8 pages. The arrays are gone on return,
 * and poison. */
static inline qkv_status ops_plan(const ops *s, int which, uint64_t seed, void *stream)
{
    pthread_mutex_lock(&ops_random);
    const uint64_t before = test_state;
    test_state = seed;
    const int decode = which == OPS_DECODE;
    const int32_t n = 1 + (int32_t)test_below(OPS_REQUESTS);
    int32_t qo[OPS_REQUESTS + 1] = {0}, lens[OPS_REQUESTS], table[OPS_REQUESTS * OPS_PAGES];
    for (int r = 0; r < n; r++) {
        qo[r + 1] = qo[r] + (decode ? 1 : 1 + (int32_t)test_below(OPS_ROWS / OPS_REQUESTS));
        lens[r] = qo[r + 1] - qo[r] + (int32_t)test_below(OPS_PAGES * OPS_PAGE_SIZE - OPS_ROWS);
    }
    for (int i = 0; i < OPS_REQUESTS * OPS_PAGES; i++) table[i] = (int32_t)test_below(OPS_PAGES);
    int32_t shared_qo[2] = {0, qo[n]};
    int32_t shared_len = OPS_PAGE_SIZE * (1 + (int32_t)test_below(8));
    test_state = before;
    pthread_mutex_unlock(&ops_random);
    const qkv_kv_index index[] = {
        {QKV_KV_INDEX_INIT, .qo_indptr = OPS_INTS(shared_qo, 2),
         .block_table = TENSOR(table, QKV_I32, 1, OPS_PAGES), .kv_lens = OPS_INTS(&shared_len, 1)},
        {QKV_KV_INDEX_INIT, .qo_indptr = OPS_INTS(qo, n + 1),
         .block_table = TENSOR(table, QKV_I32, n, OPS_PAGES), .kv_lens = OPS_INTS(lens, n)}};
    const int several = which == OPS_LEVELS;
    const qkv_attention_batch batch = {QKV_ATTENTION_BATCH_INIT, .num_levels = several ? 2 : 1,
                                       .levels = index + !several};
    const qkv_status status = qkv_attention_plan(s->attention[which], &batch, stream);
    memset(qo, 0xff, sizeof qo), memset(lens, 0xff, sizeof lens), memset(table, 0xff, sizeof table);
    return status;
}

/* Everything planned, and launched once: kernels are compiled and loaded. */
static inline ops ops_new(qkv_context *ctx, uint64_t seed)
{
    ops s = {.ctx = ctx, .d = malloc(sizeof *s.d)};
    assert_non_null(s.d);
    ops_fill(s.d, seed);
    for (int i = 0; i < OPS_NUM_ATTENTION; i++) {
        s.attention[i] = ops_attention_new(ctx, i);
        EXPECT_OK(ops_plan(&s, i, seed, NULL));
    }
    for (int i = 0; i < OPS_COUNT; i++) EXPECT_OK(ops_list[i].call(&s, NULL));
    return s;
}

static inline void ops_free(ops *s)
{
    for (int i = 0; i < OPS_NUM_ATTENTION; i++) qkv_attention_destroy(s->attention[i]);
    free(s->d);
}

/* The data after an eager call on data of that seed. */
static inline void ops_expected(const ops *s, int which, uint64_t seed, ops_data *out)
{
    ops_fill(s->d, seed);
    EXPECT_OK(ops_list[which].call(s, NULL));
    memcpy(out, s->d, sizeof *out);
    ops_fill(s->d, seed);
    assert_memory_not_equal(out, s->d, sizeof *out); /* it does something */
}

static inline void ops_compare(const char *what, const ops_data *got, const ops_data *want)
{
    for (size_t i = 0; i < sizeof *got; i++)
        if (((const char *)got)[i] != ((const char *)want)[i])
            fail_msg("%s: byte %zu of the data differs", what, i);
}

/* ---- tests -------------------------------------------------------------------------------------- */

/* For main(): says why there is nothing to do, and that it is so. */
static inline bool ops_skip(void)
{
    if (test_on_cuda()) return false;
    printf("skipped: QKV_TEST_DEVICE is not cuda\n");
    return true;
}

#endif
