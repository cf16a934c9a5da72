/* run.c - qkv_attention_run: check the tensors of a layer, fill the parameters, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/scale_spec.h"
#include "ops/attention/attention.h"

#define LN2 0.69314718055994530942f

/* Base and strides of one of k, v. */
typedef struct kv_tensor {
    const char *data;
    i64 stride[3]; /* page, token, head */
    i64 extent;    /* pages, or tokens when ragged */
} kv_tensor;

/* t: [pages, page_size, heads, dim] (ragged: [tokens, heads, dim]), the middle two by layout.
 * which: -1, or the half of a combined [pages, 2, ...] tensor. */
static qkv_status read_kv(const qkv_attention *a, const DLTensor *t, const char *name, int32_t dim,
                          int which, kv_tensor *out)
{
    const qkv_attention_spec *s = &a->spec;
    const int hnd = s->kv_layout == QKV_HND;
    const int64_t heads = s->num_kv_heads, slots = s->page_size ? s->page_size : QI_ANY;
    const int64_t first = hnd ? heads : slots, second = hnd ? slots : heads;
    int axis = 0; /* of the first of the two */
    if (s->page_size == 0) {
        QI_TRY(qi_expect(t, name, s->dtype_kv, QI_SHAPE(first, second, dim)));
    } else if (which < 0) {
        QI_TRY(qi_expect(t, name, s->dtype_kv, QI_SHAPE(QI_ANY, first, second, dim)));
        axis = 1;
    } else {
        QI_TRY(qi_expect(t, name, s->dtype_kv, QI_SHAPE(QI_ANY, 2, first, second, dim)));
        axis = 2;
    }
    const int token_axis = axis + hnd, head_axis = axis + !hnd;
    out->data = qi_data(t);
    out->stride[0] = s->page_size ? qi_stride(t, 0) : 0;
    out->stride[1] = qi_stride(t, token_axis);
    out->stride[2] = qi_stride(t, head_axis);
    out->extent = s->page_size ? t->shape[0] : t->shape[token_axis];
    if (which == 1 && out->data)
        out->data += qi_stride(t, 1) * (i64)qi_dtype_bytes((qi_dtype)qi_dtype_of(s->dtype_kv));
    return QKV_OK;
}

static qkv_status check_extent(const qkv_attention *a, const char *name, i64 extent)
{
    QI_REQUIRE(
        a->max_page < extent,
        "%s: expected a pool of more than %lld pages, which the plan's request %lld uses (entry "
        "%lld of its page list), got %lld",
        name, (long long)a->max_page, (long long)a->max_page_request, (long long)a->max_page_entry,
        (long long)extent);
    QI_REQUIRE(a->ragged_end <= extent,
               "%s: expected at least %lld tokens, as kv_indptr says, got %lld", name,
               (long long)a->ragged_end, (long long)extent);
    return QKV_OK;
}

static qkv_status check_rows(const qkv_attention *a, const char *name, i64 rows)
{
    QI_REQUIRE(rows >= a->num_tokens, "%s: expected at least %lld rows, as %s says, got %lld", name,
               (long long)a->num_tokens,
               a->on_device ? "max_tokens of the plan, or of the limits," : "qo_indptr",
               (long long)rows);
    return QKV_OK;
}

/* A layer's window must lie within the one that the plan was made for. */
static qkv_status check_window(const char *name, int32_t want, int32_t planned)
{
    QI_REQUIRE(want >= -1 && (planned < 0 || (want >= 0 && want <= planned)),
               "%s: expected within the spec's window of %d, got %d", name, (int)planned,
               (int)want);
    return QKV_OK;
}

/* Folds sm_scale and all scales into one factor a head for logits, sums of v and outputs. */
static void fold_scales(qkv_attention *a, const qi_scale scales[4], float sm_scale,
                        attention_params *p)
{
    const qkv_attention_spec *s = &a->spec;
    const qi_scale *q = &scales[0], *k = &scales[1], *v = &scales[2], *o = &scales[3];
    float *logit = a->head_scales, *value = logit + s->num_qo_heads,
          *output = value + s->num_qo_heads;
    for (int32_t h = 0; h < s->num_qo_heads; h++) {
        const int32_t kv_head = h / (s->num_qo_heads / s->num_kv_heads);
        logit[h] = sm_scale * qi_scale_at(q, h) * qi_scale_at(k, kv_head);
        value[h] = qi_scale_at(v, kv_head);
        output[h] = 1.f / qi_scale_at(o, h);
    }
    p->logit_scale = logit;
    p->value_scale = value;
    p->output_scale = output;
}

/* The scales of q, k, v and o, and the layer's sm_scale. */
static qkv_status read_scales(const qkv_attention *a, const qkv_attention_io *io,
                              qi_scale scales[4], float *sm_scale)
{
    const qkv_attention_spec *s = &a->spec;
    QI_TRY(qi_scale_read(&io->q_scale, "q_scale", s->num_qo_heads, &scales[0]));
    QI_TRY(qi_scale_read(&io->k_scale, "k_scale", s->num_kv_heads, &scales[1]));
    QI_TRY(qi_scale_read(&io->v_scale, "v_scale", s->num_kv_heads, &scales[2]));
    QI_TRY(qi_scale_read(&io->o_scale, "o_scale", s->num_qo_heads, &scales[3]));
    QI_REQUIRE(io->sm_scale >= 0.f && isfinite(io->sm_scale),
               "sm_scale: expected > 0, or 0 for the spec's, got %g", (double)io->sm_scale);
    *sm_scale = io->sm_scale > 0.f ? io->sm_scale : s->sm_scale;
    return QKV_OK;
}

/* A tensor of one f32 a query head that must be there, or must not. */
static qkv_status read_per_head(const qkv_attention *a, const qkv_attention_io *io,
                                const DLTensor *t, const char *name, int wanted,
                                const char *switch_name, const float **out)
{
    QI_REQUIRE(wanted || !t, "%s: expected NULL without %s", name, switch_name);
    if (!wanted) return QKV_OK;
    QI_TRY(qi_expect(t, name, QKV_F32, QI_SHAPE(a->spec.num_qo_heads)));
    QI_REQUIRE(!qi_overlap(t, io->o), "%s: expected memory apart from o", name);
    QI_REQUIRE(!io->lse || !qi_overlap(t, io->lse), "%s: expected memory apart from lse", name);
    *out = qi_data(t);
    return QKV_OK;
}

/* Soft cap and window of this layer. */
static qkv_status read_overrides(const qkv_attention *a, const qkv_attention_io *io,
                                 attention_params *p)
{
    const qkv_attention_spec *s = &a->spec;
    QI_REQUIRE(io->logits_soft_cap == 0.f || (s->features & QKV_FEATURE_SOFT_CAP),
               "logits_soft_cap: expected 0, since the spec has no QKV_FEATURE_SOFT_CAP, got %g",
               (double)io->logits_soft_cap);
    QI_REQUIRE(io->logits_soft_cap >= 0.f && isfinite(io->logits_soft_cap),
               "logits_soft_cap: expected > 0, or 0 for the spec's, got %g",
               (double)io->logits_soft_cap);
    p->logits_soft_cap = io->logits_soft_cap > 0.f ? io->logits_soft_cap : s->logits_soft_cap;
    p->window_left = s->window_left;
    p->window_right = s->window_right;
    QI_REQUIRE(io->set_window == 0 || io->set_window == 1, "set_window: expected 0 or 1, got %d",
               (int)io->set_window);
    if (!io->set_window) {
        QI_REQUIRE(io->window_left == 0 && io->window_right == 0,
                   "window_left, window_right: expected 0 without set_window, got %d, %d",
                   (int)io->window_left, (int)io->window_right);
        return QKV_OK;
    }
    QI_REQUIRE(s->features & QKV_FEATURE_WINDOW,
               "set_window: expected 0, since the spec has no QKV_FEATURE_WINDOW, got 1");
    QI_TRY(check_window("window_left", io->window_left, s->window_left));
    QI_TRY(check_window("window_right", io->window_right, s->window_right));
    p->window_left = io->window_left;
    p->window_right = io->window_right;
    return QKV_OK;
}

/* Shapes, dtypes, extents; p gets addresses and strides. */
static qkv_status read_tensors(const qkv_attention *a, const qkv_attention_io *io,
                               attention_params *p)
{
    const qkv_attention_spec *s = &a->spec;
    QI_TRY(qi_expect(io->q, "q", s->dtype_q, QI_SHAPE(QI_ANY, s->num_qo_heads, s->head_dim_qk)));
    QI_TRY(check_rows(a, "q", io->q->shape[0]));
    QI_TRY(qi_expect(io->o, "o", s->dtype_o, QI_SHAPE(QI_ANY, s->num_qo_heads, s->head_dim_vo)));
    QI_TRY(check_rows(a, "o", io->o->shape[0]));
    QI_TRY(qi_expect_distinct(io->o, "o"));

    kv_tensor k, v;
    const int combined = io->v == NULL && s->page_size > 0;
    QI_REQUIRE(
        !combined || s->head_dim_qk == s->head_dim_vo,
        "v: expected a tensor, since k and v with unequal head dims cannot share one, got NULL");
    QI_TRY(read_kv(a, io->k, "k", s->head_dim_qk, combined ? 0 : -1, &k));
    QI_TRY(read_kv(a, combined ? io->k : io->v, "v", s->head_dim_vo, combined ? 1 : -1, &v));
    QI_TRY(check_extent(a, "k", k.extent));
    QI_TRY(check_extent(a, "v", v.extent));
    QI_REQUIRE(!qi_overlap(io->o, io->q), "o: expected memory apart from q");
    QI_REQUIRE(!qi_overlap(io->o, io->k), "o: expected memory apart from k");
    QI_REQUIRE(combined || !qi_overlap(io->o, io->v), "o: expected memory apart from v");
    if (io->lse) {
        QI_TRY(qi_expect_strided(io->lse, "lse", QKV_F32, QI_SHAPE(QI_ANY, s->num_qo_heads)));
        QI_TRY(check_rows(a, "lse", io->lse->shape[0]));
        QI_TRY(qi_expect_distinct(io->lse, "lse"));
        QI_REQUIRE(!qi_overlap(io->lse, io->o), "lse: expected memory apart from o");
        QI_REQUIRE(!qi_overlap(io->lse, io->q), "lse: expected memory apart from q");
        QI_REQUIRE(!qi_overlap(io->lse, io->k), "lse: expected memory apart from k");
        QI_REQUIRE(combined || !qi_overlap(io->lse, io->v), "lse: expected memory apart from v");
        p->lse = qi_data(io->lse);
        p->lse_stride[0] = qi_stride(io->lse, 0);
        p->lse_stride[1] = qi_stride(io->lse, 1);
    }

    p->q = qi_data(io->q);
    p->o = qi_data(io->o);
    p->k = k.data;
    p->v = v.data;
    for (int i = 0; i < 2; i++) {
        p->q_stride[i] = qi_stride(io->q, i);
        p->o_stride[i] = qi_stride(io->o, i);
    }
    p->q_rows = io->q->shape[0];
    p->kv_extent = k.extent < v.extent ? k.extent : v.extent;
    memcpy(p->k_stride, k.stride, sizeof p->k_stride);
    memcpy(p->v_stride, v.stride, sizeof p->v_stride);
    return QKV_OK;
}

/* What the plan's batch and the spec add. */
static void set_plan_params(const qkv_attention *a, attention_params *p)
{
    p->rope = a->rope;
    p->rope_turns = a->rope_turns;
    if (a->mask_bits) {
        p->mask_bits = a->mask_bits;
        p->mask_indptr = a->mask_indptr;
    }
    if (a->bsr.indptr) {
        p->bsr_indices = a->bsr.indices;
        p->bsr_mask = a->bsr.mask;
        p->bsr_mask_stride = a->bsr.mask_stride;
        p->bsr_rows = a->bsr.rows;
        p->bsr_cols = a->bsr.cols;
    }
    p->general = p->alibi_slopes || a->mask_bits || a->bsr.indptr;
}

/* "qkv,run,OP,ROW,PROBLEM,us=..": OP and PROBLEM, which has the means of the batch's lengths, are
 * what `qkv bench` takes. */
static void log_run(const qkv_attention *a, const attention_params *p, i64 ns)
{
    const qkv_attention_spec *s = &a->spec;
    i64 requests = 0, prefills = 0, new_rows = 0, keys = 0;
    if (a->on_device) return; /* its lengths are not known here */
    for (i32 r = 0; r < a->plan.header->num_requests; r++) {
        const i64 qo_len = (i64)a->plan.qo_indptr[r + 1] - a->plan.qo_indptr[r];
        if (qo_len == 0) continue;
        requests++;
        keys += a->plan.kv_len[r];
        if (qo_len == 1) continue;
        prefills++;
        new_rows += qo_len;
    }
    if (requests == 0) return;
    const i64 mean_new = prefills ? new_rows / prefills : 0;
    const char *op = prefills == 0 ? "decode" : prefills == requests ? "prefill" : "mixed";
    char rows[64] = "";
    if (prefills == requests)
        snprintf(rows, sizeof rows, "qo_len=%lld,", (long long)mean_new);
    else if (prefills)
        snprintf(rows, sizeof rows, "prefills=%lld,qo_len=%lld,", (long long)prefills,
                 (long long)mean_new);
    qi_log(&a->ctx->logger,
           "run,%s,%s,batch=%lld,%skv_len=%lld,heads=%d/%d,head_dim=%d/%d,page=%d,layout=%s,q=%s,"
           "kv=%s,o=%s,mask=%s,window=%d,cap=%g,us=%.1f",
           op, a->row->name, (long long)requests, rows, (long long)(keys / requests),
           (int)s->num_qo_heads, (int)s->num_kv_heads, (int)s->head_dim_qk, (int)s->head_dim_vo,
           (int)s->page_size, s->kv_layout == QKV_HND ? "HND" : "NHD", qi_dtype_name(s->dtype_q),
           qi_dtype_name(s->dtype_kv), qi_dtype_name(s->dtype_o), p->causal ? "causal" : "none",
           (int)p->window_left, (double)p->logits_soft_cap, (double)ns * 1e-3);
}

qkv_status qkv_attention_run(qkv_attention *attention, const qkv_attention_io *io, void *stream)
{
    qkv_attention *a = attention;
    QI_REQUIRE(a, "attention: expected an operator, got NULL");
    QI_REQUIRE_CONTEXT(a->ctx);
    QI_REQUIRE(a->planned, "attention: expected a plan before the first run, got none");
    qkv_attention_io layer;
    QI_TRY(qi_read_struct(&layer, sizeof layer, io, "io"));
    const qkv_attention_spec *s = &a->spec;
    attention_params p = {
        .plan = a->plan,
        .num_qo_heads = s->num_qo_heads,
        .num_kv_heads = s->num_kv_heads,
        .head_dim_qk = s->head_dim_qk,
        .head_dim_vo = s->head_dim_vo,
        .page_size = s->page_size,
        .max_pages = a->limits.max_pages,
        .dtype_q = (qi_dtype)qi_dtype_of(s->dtype_q),
        .dtype_kv = (qi_dtype)qi_dtype_of(s->dtype_kv),
        .dtype_o = (qi_dtype)qi_dtype_of(s->dtype_o),
        .lse_scale = s->flags & QKV_ATTENTION_LSE_BASE_2 ? 1.f : LN2,
        .causal = s->mask == QKV_MASK_CAUSAL,
        .num_workers = a->limits.max_workers,
        .scratch = a->scratch,
        .scratch_stride = a->scratch_stride,
    };
    QI_REQUIRE(layer.reserved == 0, "reserved: expected 0, got %u", (unsigned)layer.reserved);
    QI_TRY(read_tensors(a, &layer, &p));
    QI_TRY(read_per_head(a, &layer, layer.sink, "sink", (s->flags & QKV_ATTENTION_HAS_SINK) != 0,
                         "QKV_ATTENTION_HAS_SINK", &p.sink));
    QI_TRY(read_per_head(a, &layer, layer.alibi_slopes, "alibi_slopes",
                         (s->features & QKV_FEATURE_ALIBI) != 0, "QKV_FEATURE_ALIBI",
                         &p.alibi_slopes));
    QI_TRY(read_overrides(a, &layer, &p));
    QI_TRY(qi_variant_pack(&a->variant, &layer, &a->args));
    p.variant = &a->args;
    qi_scale scales[4];
    float sm_scale;
    QI_TRY(read_scales(a, &layer, scales, &sm_scale));
    set_plan_params(a, &p);
    if (a->num_tokens == 0) return QKV_OK;

    const int verbose = qi_verbose(&a->ctx->logger, QI_VERBOSE_RUN);
    const i64 start = verbose ? qi_now_ns() : 0;
    if (a->ctx->device.device_type == kDLCUDA) {
        QI_TRY(qi_attention_cuda_run(a, &p, scales, sm_scale, stream));
        if (verbose) log_run(a, &p, qi_now_ns() - start); /* the host's time */
        return QKV_OK;
    }
    fold_scales(a, scales, sm_scale, &p);
    qi_launch(a->ctx, a->row, a->plan.header->num_strips, &p);
    if (a->plan.header->num_levels > 1)
        qi_launch(a->ctx, a->levels_row, a->plan.header->num_strips, &p);
    if (verbose) log_run(a, &p, qi_now_ns() - start);
    return QKV_OK;
}
