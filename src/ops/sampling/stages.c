/* stages.c - see stages.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/stages.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "ops/sampling/stream.h"
#include "ops/sampling/team.h"

QI_CPU_DECLARE(sampling);

const qi_kernel qi_sampling_kernels[] = {
    QI_CPU_ROW("sampling.any", NULL, sampling),
    QI_CUDA_ROW("sampling.cuda", NULL, "ops/sampling/sampling.cu", "sampling",
                "DTYPE OUT_DTYPE IN OUT VEC THREADS CLUSTER EACH CROWDED "
                "STAGES_0 STAGES_1 STAGES_2"),
    {0},
};

#define SAME(stage) _Static_assert((int)STAGE_##stage == (int)QKV_STAGE_##stage, "public numbers")
SAME(REPETITION);
SAME(FREQUENCY);
SAME(PRESENCE);
SAME(BIAS);
SAME(BITMASK);
SAME(USER);
SAME(TEMPERATURE);
SAME(TOP_N_SIGMA);
SAME(SOFTMAX);
SAME(TOP_K);
SAME(TOP_P);
SAME(MIN_P);
SAME(TYPICAL_P);
SAME(SAMPLE);
_Static_assert((int)ROW_LOGITS == (int)QKV_LOGITS && (int)ROW_PROBS == (int)QKV_PROBS &&
                   MAX_VOCAB == QKV_MAX_VOCAB,
               "public numbers");

const stage_info qi_stage_info[] = {
    [STAGE_REPETITION] = {"repetition", "counts", 1, 1, 0},
    [STAGE_FREQUENCY] = {"frequency", "counts", 1, 1, 0},
    [STAGE_PRESENCE] = {"presence", "counts", 1, 1, 0},
    [STAGE_BIAS] = {"bias", "bias", 0, 1, 0},
    [STAGE_BITMASK] = {"bitmask", "bitmask", 0, 1, 0},
    [STAGE_USER] = {"user", NULL, 0, 1, 0},
    [STAGE_TEMPERATURE] = {"temperature", NULL, 1, 1, 0},
    [STAGE_TOP_N_SIGMA] = {"top_n_sigma", NULL, 1, 1, 0},
    [STAGE_SOFTMAX] = {"softmax", NULL, 0, 1, 0},
    [STAGE_TOP_K] = {"top_k", NULL, 1, 1, 1},
    [STAGE_TOP_P] = {"top_p", NULL, 1, 0, 1},
    [STAGE_MIN_P] = {"min_p", NULL, 1, 0, 1},
    [STAGE_TYPICAL_P] = {"typical_p", NULL, 1, 0, 1},
    [STAGE_SAMPLE] = {"sample", NULL, 0, 1, 1},
};

/* ---- values ------------------------------------------------------------------------------------ */

/* The range of a stage's value; NaN is in none. */
typedef struct value_range {
    double low, high;
    int above_low; /* low itself is outside */
    const char *text;
} value_range;

static const value_range ranges[] = {
    [STAGE_REPETITION] = {0, FLT_MAX, 1, "> 0 and finite"},
    [STAGE_FREQUENCY] = {-FLT_MAX, FLT_MAX, 0, "a finite number"},
    [STAGE_PRESENCE] = {-FLT_MAX, FLT_MAX, 0, "a finite number"},
    [STAGE_USER] = {-INFINITY, INFINITY, 0, "a number"},
    [STAGE_TEMPERATURE] = {0, FLT_MAX, 0, ">= 0 and finite"},
    [STAGE_TOP_N_SIGMA] = {0, FLT_MAX, 1, "> 0 and finite"},
    [STAGE_TOP_K] = {0, INT32_MAX, 0, ">= 0"},
    [STAGE_TOP_P] = {0, 1, 1, "in (0, 1]"},
    [STAGE_MIN_P] = {0, 1, 0, "in [0, 1]"},
    [STAGE_TYPICAL_P] = {0, 1, 1, "in (0, 1]"},
};

/* One number on the host, which is read now. */
static int is_number(const DLTensor *t)
{
    return t->device.device_type == kDLCPU && t->ndim == 1 && t->shape && t->shape[0] == 1 &&
           t->data;
}

qkv_status qi_request_values(request_values *out, const DLTensor *t, const char *name,
                             DLDataType dtype, i64 batch)
{
    *out = (request_values){0};
    if (!t) return QKV_OK;
    if (is_number(t)) {
        QI_REQUIRE(qi_dtype_of(t->dtype) == qi_dtype_of(dtype), "%s: expected dtype %s, got %s",
                   name, qi_dtype_name(dtype), qi_dtype_name(t->dtype));
        memcpy(&out->one, qi_data(t), dtype.bits / 8);
        return QKV_OK;
    }
    const int one = t->ndim == 1 && t->shape && t->shape[0] == 1;
    QI_TRY(qi_expect(t, name, dtype, QI_SHAPE(one ? 1 : batch)));
    out->values = qi_data(t);
    out->step = !one;
    return QKV_OK;
}

static qkv_status check_range(const request_values *v, i64 batch, i32 kind, const char *name)
{
    if (v->values && !qi_host_reads()) return QKV_OK;
    const value_range *range = &ranges[kind];
    for (i64 r = 0; r < (v->step ? batch : 1); r++) {
        const double x = kind == STAGE_TOP_K ? request_i32(v, r) : (double)request_f32(v, r);
        QI_REQUIRE((range->above_low ? x > range->low : x >= range->low) && x <= range->high,
                   "%s[%lld]: expected %s, got %g", name, (long long)r, range->text, x);
    }
    return QKV_OK;
}

/* ---- the list ---------------------------------------------------------------------------------- */

qkv_status qi_stages_begin(sampling_params *p, const DLTensor *rows, i32 in,
                           const DLTensor *indices, DLTensor *valid)
{
    QI_TRY(qi_expect_float(rows, "rows", QI_SHAPE(QI_ANY, QI_ANY)));
    const i64 vocab = rows->shape[1];
    QI_REQUIRE(vocab >= 1 && vocab <= QKV_MAX_VOCAB, "rows: expected a vocab of 1 to %d, got %lld",
               QKV_MAX_VOCAB, (long long)vocab);
    if (indices) QI_TRY(qi_expect(indices, "indices", QKV_I32, QI_SHAPE(QI_ANY)));
    *p = (sampling_params){
        .rows = qi_data(rows),
        .rows_stride = qi_stride(rows, 0),
        .batch = indices ? indices->shape[0] : rows->shape[0],
        .num_rows = rows->shape[0],
        .vocab = vocab,
        .indices = qi_optional_data(indices),
        .dtype = (qi_dtype)qi_dtype_of(rows->dtype),
        .in = in,
        .out_kind = in,
    };
    if (!valid) return QKV_OK;
    QI_TRY(qi_expect(valid, "valid", QKV_U8, QI_SHAPE(p->batch)));
    QI_REQUIRE(!qi_overlap(valid, rows), "valid: expected memory apart from rows, got an overlap");
    p->valid = qi_data(valid);
    return QKV_OK;
}

/* [batch or 1, columns], one row for all where it has one. */
static qkv_status add_tensor(const DLTensor *t, const char *name, DLDataType dtype, i64 batch,
                             i64 columns, const void **data, i64 *stride)
{
    const int one = t->ndim == 2 && t->shape && t->shape[0] == 1;
    QI_TRY(qi_expect(t, name, dtype, QI_SHAPE(one ? 1 : batch, columns)));
    *data = qi_data(t);
    *stride = one ? 0 : qi_stride(t, 0);
    return QKV_OK;
}

qkv_status qi_stages_add(sampling_params *p, i32 kind, const stage_tensors *t)
{
    const stage_info *info = &qi_stage_info[kind];
    const i64 words = (p->vocab + 31) / 32;
    QI_REQUIRE(p->num_stages < MAX_STAGES, "stages: expected at most %d", MAX_STAGES);
    sampling_stage *s = &p->stages[p->num_stages];
    *s = (sampling_stage){.kind = kind};
    if (info->has_value || t->value) {
        const DLDataType dtype = kind == STAGE_TOP_K ? QKV_I32 : QKV_F32;
        QI_TRY(qi_request_values(&s->value, t->value, t->value_name, dtype, p->batch));
        QI_TRY(check_range(&s->value, p->batch, kind, t->value_name));
    }
    if (t->tensor && (kind == STAGE_BIAS || kind == STAGE_USER)) {
        QI_REQUIRE(qi_is_float(t->tensor->dtype), "%s: expected dtype f32, f16 or bf16, got %s",
                   t->tensor_name, qi_dtype_name(t->tensor->dtype));
        s->dtype = (qi_dtype)qi_dtype_of(t->tensor->dtype);
        QI_TRY(add_tensor(t->tensor, t->tensor_name, t->tensor->dtype, p->batch, p->vocab,
                          &s->tensor, &s->tensor_stride));
    } else if (t->tensor) {
        QI_TRY(add_tensor(t->tensor, t->tensor_name, QKV_I32, p->batch,
                          kind == STAGE_BITMASK ? words : p->vocab, &s->tensor, &s->tensor_stride));
    }
    if (t->prompt) {
        const void *prompt;
        QI_TRY(
            add_tensor(t->prompt, "prompt", QKV_I32, p->batch, words, &prompt, &s->prompt_stride));
        s->prompt = prompt;
    }
    QI_REQUIRE(!info->tensor || s->tensor || s->prompt, "%s: expected a tensor, got NULL",
               info->tensor);
    if (kind == STAGE_SOFTMAX) p->out_kind = ROW_WEIGHTS;
    if (kind == STAGE_SAMPLE) p->out_kind = ROW_TOKENS;
    p->num_stages++;
    return QKV_OK;
}

qkv_status qi_stages_out(sampling_params *p, const DLTensor *rows, DLTensor *out, const char *name,
                         i32 out_kind)
{
    if (out_kind == ROW_TOKENS) {
        QI_TRY(qi_expect(out, name, QKV_I32, QI_SHAPE(p->batch)));
    } else {
        QI_TRY(qi_expect_float(out, name, QI_SHAPE(p->batch, p->vocab)));
        QI_TRY(qi_expect_distinct(out, name));
        p->out_stride = qi_stride(out, 0);
    }
    const int in_place = qi_same(out, rows) && !p->indices;
    QI_REQUIRE(in_place || !qi_overlap(out, rows),
               "%s: expected memory apart from rows, got an overlap", name);
    p->out = qi_data(out);
    p->out_dtype = (qi_dtype)qi_dtype_of(out->dtype);
    p->out_kind = out_kind;
    return QKV_OK;
}

/* ---- launching --------------------------------------------------------------------------------- */

/* A launch on a GPU: the constants of its kernel, and how many threads run it. */
typedef struct cuda_shape {
    i32 constants[12];
    qi_grid grid;
} cuda_shape;

/* Elements of an access that rows, the result and tensors of stages allow. */
static i32 vector_of(const sampling_params *p)
{
    i32 vec = 16 / (i32)qi_dtype_bytes(p->dtype);
    vec = QI_VECTOR(vec, p->vocab, p->rows_stride, QI_ADDRESS(p->rows, p->dtype));
    if (p->out_kind != ROW_TOKENS)
        vec = QI_VECTOR(vec, p->out_stride, QI_ADDRESS(p->out, p->out_dtype));
    for (i32 s = 0; s < p->num_stages; s++) {
        const sampling_stage *stage = &p->stages[s];
        const int floats = stage->kind == STAGE_BIAS || stage->kind == STAGE_USER;
        if (stage->tensor && stage->kind != STAGE_BITMASK)
            vec = QI_VECTOR(vec, stage->tensor_stride,
                            QI_ADDRESS(stage->tensor, floats ? stage->dtype : QI_I32));
    }
    return vec;
}

/* The top_k to which rows can be streamed (stream_row.cuh says when); NULL: there is none. Values of k on the device are
 * taken for few: a streamed row of another k is read again for each of its passes. */
static const request_values *find_stream(const sampling_params *p)
{
    i32 s = 0;
    while (s < p->num_stages && p->stages[s].kind < STAGE_TEMPERATURE) s++;
    if (s < p->num_stages && p->stages[s].kind == STAGE_TEMPERATURE) s++;
    if (s == p->num_stages || p->stages[s].kind != STAGE_TOP_K || p->out_kind != ROW_TOKENS)
        return NULL;
    const request_values *k = &p->stages[s].value;
    const i32 one = k->one.whole;
    if (!k->values && (one < 1 || one > MOST_LISTED || one >= p->vocab)) return NULL;
    for (s++; s < p->num_stages; s++)
        if (!TAKES_LIST(p->stages[s].kind)) return NULL;
    return k;
}

/* Do the blocks of these rows, of such a part of one each, have to wait for others, so that top_p at the end is to leave room
 * for three an SM (LEAN, top_p.cuh)? */
static i32 is_crowded(const qkv_context *ctx, const sampling_params *p, i32 cluster, i64 bytes)
{
    enum { CLUSTER = 8, LEAST_BYTES = 24 * 1024, MOST_BYTES = 64 * 1024 };
    const i32 last = p->num_stages - 1;
    return cluster == CLUSTER && bytes >= LEAST_BYTES && bytes <= MOST_BYTES && last > 0 &&
           p->stages[last].kind == STAGE_SAMPLE && p->stages[last - 1].kind == STAGE_TOP_P &&
           p->batch * cluster > 2 * ctx->cuda.num_sms;
}

static cuda_shape shape_on_cuda(const qkv_context *ctx, const sampling_params *p)
{
    /* Shared memory of a block is its part of the row, and up to 48 KB. From half of the largest block on one
     * block an SM is left: it is given the threads of two. Clusters of more than 8 blocks are for so few rows that half
     * of the SMs have none, and for rows that have no room in 8 blocks; what their warps exchange has no room if there
     * are more of them. Of short rows an SM has more, by smaller blocks. */
    enum {
        MOST = 8,
        OTHER_BYTES = 48 * 1024,
        HALF_BYTES = 66 * 1024,
        BLOCK = 8192, /* tokens of a row that is one block's */
        FEW_WAVES = 2,
        FEW_K = 256
    };
    const i32 vec = vector_of(p);
    const i64 most_bytes = ctx->cuda.shared_bytes - OTHER_BYTES;
    const i32 most = qi_cuda_most_clustered(&ctx->cuda);
    const i32 limit = most > MOST && 2 * most * p->batch > ctx->cuda.num_sms ? MOST : most;
    i32 threads = 512, cluster = 1;
    while (cluster < limit && p->vocab > BLOCK * cluster) cluster *= 2;
    if (cluster == MOST && 4 * p->vocab / MOST > most_bytes) cluster = most;
    if (p->vocab <= BLOCK / 2) threads = 256;
    if (4 * p->vocab / cluster > HALF_BYTES && cluster <= MOST) threads = 1024;
    i32 each = (i32)((p->vocab + vec * threads * cluster - 1) / (vec * threads * cluster));
    if (4ll * each * vec * threads > most_bytes) threads = 512, each = 0; /* the row is not kept */
    i32 kept = each > 0 ? each * vec : MOST_SAMPLED;                      /* values of a thread */

    /* Few rows are kept even so, and short ones: what follows the last read is shorter. */
    const request_values *k = find_stream(p);
    const int few =
        p->vocab <= BLOCK || p->batch * cluster <= FEW_WAVES * (1024 / threads) * ctx->cuda.num_sms;
    if (k && !(few && each > 0 && (k->values || k->one.whole <= FEW_K))) {
        threads = 512, each = kept = 0;
        cluster = qi_stream_cluster(ctx, p->batch, p->vocab, threads * vec, 2);
    }
    const i32 crowded = each > 0 && is_crowded(ctx, p, cluster, 4ll * each * vec * threads);
    cuda_shape shape = {.constants = {(i32)p->dtype, (i32)p->out_dtype, p->in, p->out_kind, vec,
                                      threads, cluster, each, crowded},
                        .grid = {.x = (u32)(p->batch * cluster),
                                 .threads = (u32)threads,
                                 .shared_bytes = (u32)(4 * kept * threads),
                                 .overlaps_before = 1,
                                 .cluster = (u32)cluster}};
    for (i32 s = 0; s < p->num_stages; s++)
        shape.constants[9 + s / 7] |= (p->stages[s].kind + 1) << s % 7 * 4;
    return shape;
}

qkv_status qi_stages_compile(const qkv_context *ctx, const sampling_params *p,
                             const stage_texts *texts)
{
    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_sampling_kernels, NULL, &row));
    const cuda_shape shape = shape_on_cuda(ctx, p);
    cu_function function;
    return qi_find_cuda_text(ctx, texts->functions, texts->header, row, shape.constants, &function);
}

qkv_status qi_stages_launch(const qkv_context *ctx, const sampling_params *p,
                            const stage_texts *texts, void *stream)
{
    if (p->batch == 0) return QKV_OK;
    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_sampling_kernels, NULL, &row));
    if (row->device != kDLCUDA) {
        team rows = {.rows = p->batch};
        qi_launch(ctx, row, team_tasks(p->batch, p->vocab), &(team_launch){p, &rows});
        return QKV_OK;
    }
    const cuda_shape shape = shape_on_cuda(ctx, p);
    if (!texts) return qi_launch_cuda(ctx, row, shape.constants, &shape.grid, p, stream);
    cu_function function;
    QI_TRY(
        qi_find_cuda_text(ctx, texts->functions, texts->header, row, shape.constants, &function));
    return function ? qi_cuda_launch(&ctx->cuda, function, &shape.grid, p, stream) : QKV_OK;
}
