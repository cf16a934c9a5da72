/* sampling.c - host side of qkv_argmax and qkv_sample: check, choose, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "core/launch.h"
#include "ops/sampling/sampling_params.h"
#include "qkv/sampling.h"

QI_CPU_DECLARE(argmax);
QI_CPU_DECLARE(sample);

const qi_kernel qi_argmax_kernels[] = {
    QI_CPU_ROW("argmax.any", NULL, argmax),
    QI_CUDA_ROW("argmax.cuda", NULL, "ops/sampling/argmax.cu", "argmax", "DTYPE VEC THREADS"),
    {0},
};

const qi_kernel qi_sample_kernels[] = {
    QI_CPU_ROW("sample.any", NULL, sample),
    QI_CUDA_ROW("sample.cuda", NULL, "ops/sampling/sample.cu", "sample", "DTYPE VEC THREADS"),
    {0},
};

/* Both operators' tensors. */
static qkv_status check_rows(DLTensor *tokens, const DLTensor *logits, argmax_params *rows)
{
    QI_TRY(qi_expect_float(logits, "logits", QI_SHAPE(QI_ANY, QI_ANY)));
    const int64_t batch = logits->shape[0], vocab = logits->shape[1];
    QI_REQUIRE(vocab >= 1 && vocab <= INT32_MAX, "logits: expected a vocab of 1 to %d, got %lld",
               INT32_MAX, (long long)vocab);
    QI_TRY(qi_expect(tokens, "tokens", QKV_I32, QI_SHAPE(batch)));
    QI_REQUIRE(!qi_overlap(tokens, logits),
               "tokens: expected memory apart from logits, got an overlap");
    *rows = (argmax_params){
        .tokens = qi_data(tokens),
        .logits = qi_data(logits),
        .logits_stride = qi_stride(logits, 0),
        .batch = batch,
        .vocab = vocab,
        .dtype = (qi_dtype)qi_dtype_of(logits->dtype),
    };
    return QKV_OK;
}

/* An optional [batch] tensor of per-request values. */
static qkv_status check_values(const DLTensor *values, const char *name, DLDataType dtype,
                               const DLTensor *tokens)
{
    if (!values) return QKV_OK;
    QI_TRY(qi_expect(values, name, dtype, QI_SHAPE(tokens->shape[0])));
    QI_REQUIRE(!qi_overlap(tokens, values), "%s: expected memory apart from tokens, got an overlap",
               name);
    return QKV_OK;
}

/* Values in range, where the host may read them; NaN is in none. */
static qkv_status check_ranges(const sample_params *p)
{
    if (!qi_host_reads()) return QKV_OK;
    for (int64_t r = 0; r < p->rows.batch; r++) {
        const double temperature = p->temperature ? (double)p->temperature[r] : 1;
        const double top_p = p->top_p ? (double)p->top_p[r] : 1;
        const double min_p = p->min_p ? (double)p->min_p[r] : 0;
        QI_REQUIRE(temperature >= 0 && isfinite(temperature),
                   "temperature[%lld]: expected >= 0 and finite, got %g", (long long)r,
                   temperature);
        QI_REQUIRE(!p->top_k || p->top_k[r] >= 0, "top_k[%lld]: expected >= 0, got %d",
                   (long long)r, p->top_k[r]);
        QI_REQUIRE(top_p > 0 && top_p <= 1, "top_p[%lld]: expected in (0, 1], got %g", (long long)r,
                   top_p);
        QI_REQUIRE(min_p >= 0 && min_p <= 1, "min_p[%lld]: expected in [0, 1], got %g",
                   (long long)r, min_p);
    }
    return QKV_OK;
}

/* Elements of one access that rows allow. */
static i32 vector_of(const argmax_params *p)
{
    return QI_VECTOR(16 / (i32)qi_dtype_bytes(p->dtype), p->vocab, p->logits_stride,
                     QI_ADDRESS(p->logits, p->dtype));
}

static qkv_status launch_argmax(const qkv_context *ctx, const qi_kernel *row,
                                const argmax_params *p, void *stream)
{
    enum { THREADS = 1024 };
    const i32 constants[] = {(i32)p->dtype, vector_of(p), THREADS};
    const qi_grid grid = {.x = (u32)p->batch, .threads = THREADS, .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

static qkv_status launch_sample(const qkv_context *ctx, const qi_kernel *row,
                                const sample_params *p, void *stream)
{
    enum { THREADS = 512 };
    const i32 constants[] = {(i32)p->rows.dtype, vector_of(&p->rows), THREADS};
    const qi_grid grid = {.x = (u32)p->rows.batch,
                          .threads = THREADS,
                          .shared_bytes = SAMPLER_BYTES(THREADS),
                          .overlaps_before = 1};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

qkv_status qkv_argmax(qkv_context *ctx, DLTensor *tokens, const DLTensor *logits, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    argmax_params params;
    QI_TRY(check_rows(tokens, logits, &params));
    if (params.batch == 0) return QKV_OK;
    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_argmax_kernels, NULL, &row));
    if (row->device == kDLCUDA) return launch_argmax(ctx, row, &params, stream);
    qi_launch(ctx, row, qi_tasks_for(params.batch * params.vocab), &params);
    return QKV_OK;
}

qkv_status qkv_sample(qkv_context *ctx, DLTensor *tokens, const DLTensor *logits,
                      const qkv_sampling_params *sampling, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    qkv_sampling_params s;
    QI_TRY(qi_read_struct(&s, sizeof s, sampling, "params"));
    QI_REQUIRE(s.reserved == 0, "params.reserved: expected 0, got %u", (unsigned)s.reserved);
    sample_params params;
    QI_TRY(check_rows(tokens, logits, &params.rows));
    QI_REQUIRE(s.seed, "seed: expected a tensor, got NULL");
    QI_TRY(check_values(s.temperature, "temperature", QKV_F32, tokens));
    QI_TRY(check_values(s.top_k, "top_k", QKV_I32, tokens));
    QI_TRY(check_values(s.top_p, "top_p", QKV_F32, tokens));
    QI_TRY(check_values(s.min_p, "min_p", QKV_F32, tokens));
    QI_TRY(check_values(s.seed, "seed", QKV_U64, tokens));
    QI_TRY(check_values(s.offset, "offset", QKV_U64, tokens));
    params.temperature = qi_optional_data(s.temperature);
    params.top_k = qi_optional_data(s.top_k);
    params.top_p = qi_optional_data(s.top_p);
    params.min_p = qi_optional_data(s.min_p);
    params.seed = qi_data(s.seed);
    params.offset = qi_optional_data(s.offset);
    QI_TRY(check_ranges(&params));
    if (params.rows.batch == 0) return QKV_OK;

    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_sample_kernels, NULL, &row));
    if (row->device == kDLCUDA) return launch_sample(ctx, row, &params, stream);
    qi_launch(ctx, row, params.rows.batch, &params);
    return QKV_OK;
}
