/* sampling.c - host side of qkv_argmax, qkv_sample, qkv_renormalize and qkv_mask_logits: the last three are
 * lists of stages.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/stages.h"
#include "ops/sampling/stream.h"

QI_CPU_DECLARE(argmax);

const qi_kernel qi_argmax_kernels[] = {
    QI_CPU_ROW("argmax.any", NULL, argmax),
    QI_CUDA_ROW("argmax.cuda", NULL, "ops/sampling/argmax.cu", "argmax",
                "DTYPE VEC THREADS CLUSTER"),
    {0},
};

/* ---- argmax ------------------------------------------------------------------------------------ */

static qkv_status check_argmax(DLTensor *tokens, const DLTensor *logits, argmax_params *p)
{
    QI_TRY(qi_expect_float(logits, "logits", QI_SHAPE(QI_ANY, QI_ANY)));
    const int64_t batch = logits->shape[0], vocab = logits->shape[1];
    QI_REQUIRE(vocab >= 1 && vocab <= INT32_MAX, "logits: expected a vocab of 1 to %d, got %lld",
               INT32_MAX, (long long)vocab);
    QI_TRY(qi_expect(tokens, "tokens", QKV_I32, QI_SHAPE(batch)));
    QI_REQUIRE(!qi_overlap(tokens, logits),
               "tokens: expected memory apart from logits, got an overlap");
    *p = (argmax_params){
        .tokens = qi_data(tokens),
        .logits = qi_data(logits),
        .logits_stride = qi_stride(logits, 0),
        .batch = batch,
        .vocab = vocab,
        .dtype = (qi_dtype)qi_dtype_of(logits->dtype),
    };
    return QKV_OK;
}

static qkv_status launch_argmax(const qkv_context *ctx, const qi_kernel *row,
                                const argmax_params *p, void *stream)
{
    enum { THREADS = 1024 };
    const i32 most = 16 / (i32)qi_dtype_bytes(p->dtype);
    const i32 vec = QI_VECTOR(most, p->vocab, p->logits_stride, QI_ADDRESS(p->logits, p->dtype));
    const i32 cluster = qi_stream_cluster(ctx, p->batch, p->vocab, THREADS * vec, 1);
    const i32 constants[] = {(i32)p->dtype, vec, THREADS, cluster};
    const qi_grid grid = {.x = (u32)(p->batch * cluster),
                          .threads = THREADS,
                          .overlaps_before = 1,
                          .cluster = (u32)cluster};
    return qi_launch_cuda(ctx, row, constants, &grid, p, stream);
}

qkv_status qkv_argmax(qkv_context *ctx, DLTensor *tokens, const DLTensor *logits, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    argmax_params params;
    QI_TRY(check_argmax(tokens, logits, &params));
    if (params.batch == 0) return QKV_OK;
    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_argmax_kernels, NULL, &row));
    if (row->device == kDLCUDA) return launch_argmax(ctx, row, &params, stream);
    qi_launch(ctx, row, qi_tasks_for(params.batch * params.vocab), &params);
    return QKV_OK;
}

/* ---- lists of stages --------------------------------------------------------------------------- */

/* Adds a stage if one of its tensors is given. */
static qkv_status add(sampling_params *p, i32 kind, const DLTensor *value, const DLTensor *tensor,
                      const DLTensor *prompt)
{
    const stage_info *info = &qi_stage_info[kind];
    if (info->has_value ? !value : !tensor) return QKV_OK;
    const int is_logits = p->out_kind == ROW_LOGITS;
    QI_REQUIRE(is_logits ? info->takes_logits : info->takes_probs,
               "%s: expected NULL for rows of probabilities, got a tensor", info->name);
    return qi_stages_add(p, kind,
                         &(stage_tensors){.value = value,
                                          .tensor = tensor,
                                          .prompt = prompt,
                                          .value_name = info->name,
                                          .tensor_name = info->tensor});
}

/* Begins a list with what comes before softmax. */
static qkv_status add_logit_stages(sampling_params *p, const DLTensor *rows,
                                   const qkv_sampling_params *s)
{
    QI_REQUIRE(s->kind == QKV_LOGITS || s->kind == QKV_PROBS,
               "params.kind: expected QKV_LOGITS or QKV_PROBS, got %d", (int)s->kind);
    QI_REQUIRE(s->order == QKV_TOP_K_FIRST || s->order == QKV_TOP_K_JOINT,
               "params.order: expected QKV_TOP_K_FIRST or QKV_TOP_K_JOINT, got %d", (int)s->order);
    QI_REQUIRE(s->reserved == 0, "params.reserved: expected 0, got %u", (unsigned)s->reserved);
    QI_TRY(qi_stages_begin(p, rows, s->kind, s->indices, s->valid));
    QI_REQUIRE(!s->prompt || s->repetition,
               "prompt: expected NULL without repetition, got a tensor");
    QI_REQUIRE(!s->counts || s->repetition || s->frequency || s->presence,
               "counts: expected NULL without repetition, frequency and presence, got a tensor");
    QI_TRY(add(p, STAGE_REPETITION, s->repetition, s->counts, s->prompt));
    QI_TRY(add(p, STAGE_FREQUENCY, s->frequency, s->counts, NULL));
    QI_TRY(add(p, STAGE_PRESENCE, s->presence, s->counts, NULL));
    QI_TRY(add(p, STAGE_BIAS, NULL, s->bias, NULL));
    QI_TRY(add(p, STAGE_BITMASK, NULL, s->bitmask, NULL));
    QI_TRY(add(p, STAGE_TEMPERATURE, s->temperature, NULL, NULL));
    QI_TRY(add(p, STAGE_TOP_N_SIGMA, s->top_n_sigma, NULL, NULL));
    return s->order == QKV_TOP_K_FIRST ? add(p, STAGE_TOP_K, s->top_k, NULL, NULL) : QKV_OK;
}

/* Softmax and what comes after it. */
static qkv_status add_prob_stages(sampling_params *p, const qkv_sampling_params *s)
{
    if (p->out_kind == ROW_LOGITS) QI_TRY(qi_stages_add(p, STAGE_SOFTMAX, &(stage_tensors){0}));
    QI_TRY(add(p, STAGE_TOP_P, s->top_p, NULL, NULL));
    if (s->order == QKV_TOP_K_JOINT) QI_TRY(add(p, STAGE_TOP_K, s->top_k, NULL, NULL));
    QI_TRY(add(p, STAGE_MIN_P, s->min_p, NULL, NULL));
    return add(p, STAGE_TYPICAL_P, s->typical_p, NULL, NULL);
}

/* Outputs share no memory with values and tensors of stages. */
static qkv_status check_apart(DLTensor *out, const char *name, const qkv_sampling_params *s)
{
    const struct {
        const DLTensor *tensor;
        const char *name;
    } read[] = {
        {s->temperature, "temperature"},
        {s->top_k, "top_k"},
        {s->top_p, "top_p"},
        {s->min_p, "min_p"},
        {s->seed, "seed"},
        {s->offset, "offset"},
        {s->typical_p, "typical_p"},
        {s->top_n_sigma, "top_n_sigma"},
        {s->repetition, "repetition"},
        {s->frequency, "frequency"},
        {s->presence, "presence"},
        {s->counts, "counts"},
        {s->prompt, "prompt"},
        {s->bias, "bias"},
        {s->bitmask, "bitmask"},
        {s->indices, "indices"},
    };
    for (size_t i = 0; out && i < sizeof read / sizeof read[0]; i++)
        QI_REQUIRE(!read[i].tensor || !qi_overlap(out, read[i].tensor),
                   "%s: expected memory apart from %s, got an overlap", read[i].name, name);
    return QKV_OK;
}

static qkv_status run(const qkv_context *ctx, sampling_params *p, const DLTensor *rows,
                      DLTensor *out, const char *name, i32 out_kind, const qkv_sampling_params *s,
                      void *stream)
{
    QI_TRY(qi_stages_out(p, rows, out, name, out_kind));
    QI_TRY(check_apart(out, name, s));
    QI_TRY(check_apart(s->valid, "valid", s));
    QI_REQUIRE(!s->valid || !qi_overlap(s->valid, out),
               "valid: expected memory apart from %s, got an overlap", name);
    return qi_stages_launch(ctx, p, NULL, stream);
}

qkv_status qkv_sample(qkv_context *ctx, DLTensor *tokens, const DLTensor *rows,
                      const qkv_sampling_params *params, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    qkv_sampling_params s;
    sampling_params p;
    QI_TRY(qi_read_struct(&s, sizeof s, params, "params"));
    QI_TRY(add_logit_stages(&p, rows, &s));
    QI_TRY(add_prob_stages(&p, &s));
    QI_REQUIRE(s.seed, "seed: expected a tensor, got NULL");
    QI_TRY(qi_request_values(&p.seed, s.seed, "seed", QKV_U64, p.batch));
    QI_TRY(qi_request_values(&p.offset, s.offset, "offset", QKV_U64, p.batch));
    QI_TRY(qi_stages_add(&p, STAGE_SAMPLE, &(stage_tensors){0}));
    return run(ctx, &p, rows, tokens, "tokens", ROW_TOKENS, &s, stream);
}

/* What has no tokens draws nothing. */
static qkv_status check_no_draw(const qkv_sampling_params *s)
{
    QI_REQUIRE(!s->seed && !s->offset, "%s: expected NULL where nothing is drawn, got a tensor",
               s->seed ? "seed" : "offset");
    return QKV_OK;
}

qkv_status qkv_renormalize(qkv_context *ctx, DLTensor *probs, const DLTensor *rows,
                           const qkv_sampling_params *params, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    qkv_sampling_params s;
    sampling_params p;
    QI_TRY(qi_read_struct(&s, sizeof s, params, "params"));
    QI_TRY(check_no_draw(&s));
    QI_TRY(add_logit_stages(&p, rows, &s));
    QI_TRY(add_prob_stages(&p, &s));
    return run(ctx, &p, rows, probs, "probs", ROW_PROBS, &s, stream);
}

qkv_status qkv_mask_logits(qkv_context *ctx, DLTensor *out, const DLTensor *rows,
                           const qkv_sampling_params *params, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    qkv_sampling_params s;
    sampling_params p;
    QI_TRY(qi_read_struct(&s, sizeof s, params, "params"));
    QI_TRY(check_no_draw(&s));
    QI_REQUIRE(s.kind == QKV_LOGITS, "params.kind: expected QKV_LOGITS, got %d", (int)s.kind);
    const DLTensor *later[] = {s.top_p, s.min_p, s.typical_p};
    static const char *const names[] = {"top_p", "min_p", "typical_p"};
    for (int i = 0; i < 3; i++)
        QI_REQUIRE(!later[i], "%s: expected NULL, since rows stay logits, got a tensor", names[i]);
    s.order = QKV_TOP_K_FIRST;
    QI_TRY(add_logit_stages(&p, rows, &s));
    return run(ctx, &p, rows, out, "out", ROW_LOGITS, &s, stream);
}
