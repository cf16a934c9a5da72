/* log_probs.c - host side of qkv_log_probs.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/log_probs_params.h"
#include "ops/sampling/pieces.h"
#include "qkv/sampling.h"

QI_CPU_DECLARE(log_probs);

const qi_kernel qi_log_probs_kernels[] = {
    QI_CPU_ROW("log_probs.any", NULL, log_probs),
    QI_CUDA_ROW("log_probs.cuda", NULL, "ops/sampling/log_probs.cu", "log_probs",
                "DTYPE VEC THREADS CLUSTER RESIDENT"),
    {0},
};

static qkv_status check(DLTensor *log_probs, DLTensor *ranks, const DLTensor *logits,
                        const DLTensor *tokens, log_probs_params *p)
{
    QI_TRY(qi_expect_float(logits, "logits", QI_SHAPE(QI_ANY, QI_ANY)));
    const int64_t batch = logits->shape[0], vocab = logits->shape[1];
    QI_REQUIRE(vocab >= 1 && vocab <= QKV_MAX_VOCAB,
               "logits: expected a vocab of 1 to %d, got %lld", QKV_MAX_VOCAB, (long long)vocab);
    QI_TRY(qi_expect(tokens, "tokens", QKV_I32, QI_SHAPE(batch, QI_ANY)));
    const int64_t n = tokens->shape[1];
    QI_TRY(qi_expect(log_probs, "log_probs", QKV_F32, QI_SHAPE(batch, n)));
    if (ranks) QI_TRY(qi_expect(ranks, "ranks", QKV_I32, QI_SHAPE(batch, n)));
    const struct {
        const char *name;
        const DLTensor *out, *apart[3];
    } outs[] = {
        {"log_probs", log_probs, {logits, tokens, ranks}},
        {"ranks", ranks, {logits, tokens}},
    };
    static const char *const names[] = {"logits", "tokens", "ranks"};
    for (int o = 0; o < 2 && outs[o].out; o++) {
        QI_TRY(qi_expect_distinct(outs[o].out, outs[o].name));
        for (int i = 0; i < 3 && outs[o].apart[i]; i++)
            QI_REQUIRE(!qi_overlap(outs[o].out, outs[o].apart[i]),
                       "%s: expected memory apart from %s, got an overlap", outs[o].name, names[i]);
    }
    *p = (log_probs_params){
        .log_probs = qi_data(log_probs),
        .ranks = qi_optional_data(ranks),
        .logits = qi_data(logits),
        .tokens = qi_data(tokens),
        .log_probs_stride = qi_stride(log_probs, 0),
        .ranks_stride = ranks ? qi_stride(ranks, 0) : 0,
        .logits_stride = qi_stride(logits, 0),
        .tokens_stride = qi_stride(tokens, 0),
        .batch = batch,
        .vocab = vocab,
        .n = n,
        .dtype = (qi_dtype)qi_dtype_of(logits->dtype),
    };
    return QKV_OK;
}

qkv_status qkv_log_probs(qkv_context *ctx, DLTensor *log_probs, DLTensor *ranks,
                         const DLTensor *logits, const DLTensor *tokens, void *stream)
{
    QI_REQUIRE_CONTEXT(ctx);
    log_probs_params params;
    QI_TRY(check(log_probs, ranks, logits, tokens, &params));
    if (params.batch == 0 || params.n == 0) return QKV_OK;
    const qi_kernel *row;
    QI_TRY(qi_select(ctx, qi_log_probs_kernels, NULL, &row));
    if (row->device == kDLCUDA)
        return qi_launch_pieces(ctx, row, params.logits, params.batch, params.vocab,
                                params.logits_stride, params.dtype, &params, stream);
    qi_launch(ctx, row, qi_tasks_for(params.batch * params.vocab), &params);
    return QKV_OK;
}
