/* attention.c - creating the attention operator: check the spec, choose a row, bind memory.
 * The other two calls are in plan.c and run.c.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/attention.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/arena.h"

QI_CPU_DECLARE(attention_d64);
QI_CPU_DECLARE(attention_d128);
QI_CPU_DECLARE(attention_any);

static const char *reject_d64(const void *desc)
{
    const qkv_attention_spec *s = desc;
    return s->head_dim_qk == 64 && s->head_dim_vo == 64 ? NULL : "head_dim is not 64";
}

static const char *reject_d128(const void *desc)
{
    const qkv_attention_spec *s = desc;
    return s->head_dim_qk == 128 && s->head_dim_vo == 128 ? NULL : "head_dim is not 128";
}

/* Fastest first; the first row whose reject() returns NULL wins; the reference is last. */
const qi_kernel qi_attention_kernels[] = {
    {"attention.d64", kDLCPU, reject_d64, QI_CPU_ENTRIES(attention_d64)},
    {"attention.d128", kDLCPU, reject_d128, QI_CPU_ENTRIES(attention_d128)},
    {"attention.any", kDLCPU, NULL, QI_CPU_ENTRIES(attention_any)},
    {0},
};

/* ---- spec and limits ------------------------------------------------------------------------ */

static qkv_status check_head_dim(const char *name, int32_t dim)
{
    QI_REQUIRE(dim >= 8 && dim <= 512 && dim % 8 == 0,
               "%s: expected a multiple of 8 from 8 to 512, got %d", name, (int)dim);
    return QKV_OK;
}

static qkv_status check_dtype(const char *name, DLDataType dtype)
{
    if (!qi_is_float(dtype))
        QI_FAIL(QKV_ERR_UNSUPPORTED, "%s: expected f32, f16 or bf16, got %s (code %d, %d bits)",
                name, qi_dtype_name(dtype), dtype.code, dtype.bits);
    return QKV_OK;
}

/* Reads and checks a spec; *out has its defaults filled in. */
static qkv_status read_spec(const qkv_attention_spec *in, qkv_attention_spec *out)
{
    QI_TRY(qi_read_struct(out, sizeof *out, in, "spec"));
    qkv_attention_spec *s = out;
    QI_REQUIRE((s->flags & ~(uint32_t)QKV_ATTENTION_LSE_BASE_2) == 0,
               "flags: expected QKV_ATTENTION_LSE_BASE_2 or 0, got %#x", (unsigned)s->flags);
    QI_REQUIRE(s->num_kv_heads > 0 && s->num_kv_heads <= 1024,
               "num_kv_heads: expected 1 to 1024, got %d", (int)s->num_kv_heads);
    QI_REQUIRE(s->num_qo_heads > 0 && s->num_qo_heads % s->num_kv_heads == 0 &&
                   s->num_qo_heads / s->num_kv_heads <= 512,
               "num_qo_heads: expected 1 to 512 times num_kv_heads (%d), got %d",
               (int)s->num_kv_heads, (int)s->num_qo_heads);
    QI_TRY(check_head_dim("head_dim_qk", s->head_dim_qk));
    QI_TRY(check_head_dim("head_dim_vo", s->head_dim_vo));
    QI_REQUIRE(s->page_size >= 0 && s->page_size <= 1 << 24,
               "page_size: expected 0 (ragged) to 2^24, got %d", (int)s->page_size);
    QI_REQUIRE(s->kv_layout == QKV_NHD || s->kv_layout == QKV_HND,
               "kv_layout: expected QKV_NHD or QKV_HND, got %d", (int)s->kv_layout);
    QI_REQUIRE(s->mask == QKV_MASK_NONE || s->mask == QKV_MASK_CAUSAL,
               "mask: expected QKV_MASK_NONE or QKV_MASK_CAUSAL, got %d", (int)s->mask);
    QI_REQUIRE((s->features & ~(QKV_FEATURE_SOFT_CAP | QKV_FEATURE_WINDOW)) == 0,
               "features: expected QKV_FEATURE_SOFT_CAP, QKV_FEATURE_WINDOW or both, got %#x",
               (unsigned)s->features);
    QI_TRY(check_dtype("dtype_q", s->dtype_q));
    QI_TRY(check_dtype("dtype_kv", s->dtype_kv));
    QI_TRY(check_dtype("dtype_o", s->dtype_o));
    QI_REQUIRE(s->sm_scale >= 0.f && isfinite(s->sm_scale),
               "sm_scale: expected > 0, or 0 for 1/sqrt(head_dim_qk), got %g", (double)s->sm_scale);
    if (s->sm_scale == 0.f) s->sm_scale = (float)(1.0 / sqrt((double)s->head_dim_qk));
    if (s->features & QKV_FEATURE_SOFT_CAP)
        QI_REQUIRE(s->logits_soft_cap > 0.f && isfinite(s->logits_soft_cap),
                   "logits_soft_cap: expected > 0, got %g", (double)s->logits_soft_cap);
    else
        QI_REQUIRE(s->logits_soft_cap == 0.f,
                   "logits_soft_cap: expected 0 without QKV_FEATURE_SOFT_CAP, got %g",
                   (double)s->logits_soft_cap);
    if (s->features & QKV_FEATURE_WINDOW) {
        QI_REQUIRE(s->window_left >= -1, "window_left: expected -1 (open) or more, got %d",
                   (int)s->window_left);
        QI_REQUIRE(s->window_right >= -1, "window_right: expected -1 (open) or more, got %d",
                   (int)s->window_right);
    } else {
        QI_REQUIRE(
            (s->window_left == 0 || s->window_left == -1) &&
                (s->window_right == 0 || s->window_right == -1),
            "window_left, window_right: expected 0 or -1 without QKV_FEATURE_WINDOW, got %d, %d",
            (int)s->window_left, (int)s->window_right);
        s->window_left = s->window_right = -1;
    }
    return QKV_OK;
}

/* Work items and partial rows are numbered in 31 bits. */
#define MAX_INDEX 0x7fffffffLL

static qkv_status read_limits(const qkv_context *ctx, const qkv_attention_spec *spec,
                              const qkv_attention_limits *in, qkv_attention_limits *out)
{
    QI_TRY(qi_read_struct(out, sizeof *out, in, "limits"));
    qkv_attention_limits *l = out;
    QI_REQUIRE(l->max_requests > 0, "max_requests: expected > 0, got %d", (int)l->max_requests);
    QI_REQUIRE(l->max_tokens > 0 && l->max_tokens <= MAX_INDEX,
               "max_tokens: expected 1 to 2^31 - 1, got %lld", (long long)l->max_tokens);
    QI_REQUIRE(l->max_qo_len >= 0, "max_qo_len: expected >= 0, got %d", (int)l->max_qo_len);
    if (l->max_qo_len == 0 || l->max_qo_len > l->max_tokens) l->max_qo_len = (int32_t)l->max_tokens;
    QI_REQUIRE(l->max_workers >= 0 && l->max_workers <= 4096,
               "max_workers: expected 0 to 4096, got %d", (int)l->max_workers);
    if (l->max_workers == 0) l->max_workers = qi_threads_count(ctx->threads);
    QI_REQUIRE(l->max_kv_len > 0 && l->max_kv_len <= MAX_INDEX,
               "max_kv_len: expected 1 to 2^31 - 1, got %lld", (long long)l->max_kv_len);
    if (spec->page_size == 0) l->max_pages = 0;
    QI_REQUIRE(spec->page_size == 0 || (l->max_pages > 0 && l->max_pages <= MAX_INDEX),
               "max_pages: expected 1 to 2^31 - 1, got %lld", (long long)l->max_pages);
    QI_REQUIRE(l->max_split_rows >= 0 && l->max_split_rows <= MAX_INDEX,
               "max_split_rows: expected 0 to 2^31 - 1, got %lld", (long long)l->max_split_rows);
    QI_REQUIRE(l->pool_pages >= 0 && l->pool_pages <= MAX_INDEX,
               "pool_pages: expected 0 to 2^31 - 1, got %lld", (long long)l->pool_pages);
    return QKV_OK;
}

/* What the scheduler needs, from a spec and limits with their defaults filled in. Costs are in
 * units of one multiply-add over a whole head: reading a key costs about 3 of them a byte of its
 * elements on the CPUs measured (docs/performance.md), starting a tile about 200. */
static qi_limits schedule_limits(const qkv_attention_spec *spec, qkv_attention_limits *limits)
{
    const int32_t group = spec->num_qo_heads / spec->num_kv_heads;
    qi_limits s = {
        .num_workers = limits->max_workers,
        .num_kv_heads = spec->num_kv_heads,
        .group_size = group,
        .decode_rows = decode_rows(group),
        .tile_rows = prefill_rows(group),
        .causal = spec->mask == QKV_MASK_CAUSAL,
        .window_left = spec->window_left,
        .window_right = spec->window_right,
        .cut_align = spec->page_size > 64 ? spec->page_size : 64,
        .cost_visit = 200,
        .cost_key = 3 * (int32_t)qi_dtype_bytes((qi_dtype)qi_dtype_of(spec->dtype_kv)),
        .cost_pair = 1,
        .cost_strip = 4000, /* some 5 us: what waking a thread costs */
    };
    const int64_t enough = qi_schedule_split_rows(&s, limits->max_qo_len);
    if (limits->max_split_rows == 0 || limits->max_split_rows > enough)
        limits->max_split_rows = enough;
    s.max_split_rows = limits->max_split_rows;
    return s;
}

/* ---- memory --------------------------------------------------------------------------------- */

/* Tasks of one run: no more than strips, nor than threads. */
static int64_t num_tasks(const qkv_attention *a)
{
    const int64_t threads = qi_threads_count(a->ctx->threads);
    return a->limits.max_workers < threads ? a->limits.max_workers : threads;
}

/* Lays out (arenas over memory) or measures (empty arenas) the workspace. */
static void bind_workspace(qkv_attention *a, qi_arena *plan, qi_arena *scratch)
{
    const qkv_attention_limits *l = &a->limits;
    const uint64_t requests = (uint64_t)l->max_requests, workers = (uint64_t)l->max_workers;
    const uint64_t max_work =
        (uint64_t)qi_schedule_max_work(&a->schedule, l->max_tokens, l->max_requests, l->max_qo_len);
    a->plan = (qi_plan){
        .header = qi_arena_take(plan, 1, sizeof(qi_plan_header)),
        .work_indptr = qi_arena_take(plan, workers + 1, sizeof(i32)),
        .work = qi_arena_take(plan, max_work, sizeof(qi_work)),
        .merge = qi_arena_take(plan, workers, sizeof(qi_merge)),
        .ticket = qi_arena_take(plan, workers, sizeof(i32)),
        .qo_indptr = qi_arena_take(plan, requests + 1, sizeof(i32)),
        .kv_len = qi_arena_take(plan, requests, sizeof(i32)),
        .qo_pos = qi_arena_take(plan, requests, sizeof(i32)),
        .kv_begin = qi_arena_take(plan, requests + 1, sizeof(i32)),
        .pages = qi_arena_take(plan, (uint64_t)l->max_pages, sizeof(i32)),
        .o_partial = qi_arena_take(scratch, (uint64_t)l->max_split_rows,
                                   (uint64_t)a->spec.head_dim_vo * sizeof(float)),
        .lse_partial = qi_arena_take(scratch, (uint64_t)l->max_split_rows, sizeof(float)),
    };
    const i32 group = a->schedule.group_size, dim_qk = a->spec.head_dim_qk,
              dim_vo = a->spec.head_dim_vo;
    i64 floats = decode_scratch_floats(group, a->spec.num_kv_heads, dim_qk, dim_vo);
    if (l->max_qo_len > a->schedule.decode_rows) {
        const i64 prefill = prefill_scratch_floats(group, dim_qk, dim_vo);
        floats = floats > prefill ? floats : prefill;
    }
    a->scratch_stride = round_up(floats * (i64)sizeof(float), QI_ARENA_ALIGN);
    a->scratch = qi_arena_take(scratch, (uint64_t)num_tasks(a), (uint64_t)a->scratch_stride);
}

/* Reads spec and limits, chooses a row and measures the workspace; binds nothing. */
static qkv_status prepare(qkv_context *ctx, const qkv_attention_spec *spec,
                          const qkv_attention_limits *limits, qkv_attention *a,
                          qkv_workspace_size *size)
{
    QI_REQUIRE_CONTEXT(ctx);
    *a = (qkv_attention){.ctx = ctx, .max_page = -1};
    QI_TRY(read_spec(spec, &a->spec));
    QI_TRY(read_limits(ctx, &a->spec, limits, &a->limits));
    a->schedule = schedule_limits(&a->spec, &a->limits);
    QI_TRY(qi_select(ctx, qi_attention_kernels, &a->spec, &a->row));
    const i64 max_work = qi_schedule_max_work(&a->schedule, a->limits.max_tokens,
                                              a->limits.max_requests, a->limits.max_qo_len);
    QI_REQUIRE(max_work <= MAX_INDEX, "max_tokens: expected at most 2^31 - 1 work items, got %lld",
               (long long)max_work);
    qi_arena plan = {NULL, 0}, scratch = {NULL, 0};
    bind_workspace(a, &plan, &scratch);
    *size = (qkv_workspace_size){.plan_bytes = plan.used, .scratch_bytes = scratch.used};
    return QKV_OK;
}

/* ---- public calls --------------------------------------------------------------------------- */

qkv_status qkv_attention_can_run(qkv_context *ctx, const qkv_attention_spec *spec,
                                 const qkv_attention_limits *limits, char *reasons,
                                 size_t reasons_bytes)
{
    qkv_attention a;
    qkv_workspace_size size;
    const qkv_status status = prepare(ctx, spec, limits, &a, &size);
    if (!reasons || reasons_bytes == 0) return status;
    reasons[0] = '\0';
    if (status != QKV_OK && status != QKV_ERR_UNSUPPORTED) return status;
    size_t at = 0;
    for (const qi_kernel *k = qi_attention_kernels; k->name && at < reasons_bytes; k++) {
        const char *reason = k->reject ? k->reject(&a.spec) : NULL;
        const int n = snprintf(reasons + at, reasons_bytes - at, "%s: %s\n", k->name,
                               reason ? reason : "runs");
        at += n > 0 ? (size_t)n : 0;
    }
    return status;
}

qkv_status qkv_attention_workspace_size(qkv_context *ctx, const qkv_attention_spec *spec,
                                        const qkv_attention_limits *limits, qkv_workspace_size *out)
{
    QI_REQUIRE(out, "out: expected a pointer, got NULL");
    qkv_attention a;
    qkv_workspace_size size;
    QI_TRY(prepare(ctx, spec, limits, &a, &size));
    *out = size;
    return QKV_OK;
}

static qkv_status check_workspace(const qkv_workspace *given, const qkv_workspace_size *size,
                                  qkv_workspace *out)
{
    QI_TRY(qi_read_struct(out, sizeof *out, given, "workspace"));
    const struct {
        const char *name;
        const void *block;
        uint64_t bytes, needed;
    } parts[] = {{"plan", out->plan, out->plan_bytes, size->plan_bytes},
                 {"scratch", out->scratch, out->scratch_bytes, size->scratch_bytes}};
    for (int i = 0; i < 2; i++) {
        QI_REQUIRE(parts[i].block && (uintptr_t)parts[i].block % QI_ARENA_ALIGN == 0,
                   "workspace.%s: expected a block aligned to %u bytes, got %p", parts[i].name,
                   QI_ARENA_ALIGN, parts[i].block);
        if (parts[i].bytes < parts[i].needed)
            QI_FAIL(QKV_ERR_MEMORY, "workspace.%s_bytes: expected at least %llu, got %llu",
                    parts[i].name, (unsigned long long)parts[i].needed,
                    (unsigned long long)parts[i].bytes);
    }
    return QKV_OK;
}

qkv_status qkv_attention_create(qkv_context *ctx, const qkv_attention_spec *spec,
                                const qkv_attention_limits *limits, const qkv_workspace *workspace,
                                qkv_attention **out)
{
    QI_REQUIRE(out, "out: expected a pointer, got NULL");
    *out = NULL;
    qkv_attention prepared;
    qkv_workspace_size size;
    QI_TRY(prepare(ctx, spec, limits, &prepared, &size));
    qkv_workspace w = {QKV_WORKSPACE_INIT};
    if (workspace) QI_TRY(check_workspace(workspace, &size, &w));

    const qkv_allocator *mem = &ctx->allocator;
    qkv_attention *a = mem->alloc(mem->user, sizeof *a, 64);
    if (!a) QI_FAIL(QKV_ERR_MEMORY, "attention: out of memory");
    *a = prepared;
    if (!workspace) {
        a->owned = w = (qkv_workspace){
            QKV_WORKSPACE_INIT, .plan = mem->alloc(mem->user, size.plan_bytes, 4096),
            .scratch = mem->alloc(mem->user, size.scratch_bytes, 4096),
            .plan_bytes = size.plan_bytes, .scratch_bytes = size.scratch_bytes};
        if (!w.plan || !w.scratch) {
            qkv_attention_destroy(a);
            QI_FAIL(QKV_ERR_MEMORY, "attention: out of memory for %llu + %llu bytes of workspace",
                    (unsigned long long)size.plan_bytes, (unsigned long long)size.scratch_bytes);
        }
    }
    bind_workspace(a, &(qi_arena){.base = w.plan}, &(qi_arena){.base = w.scratch});
    memset(a->plan.header, 0, sizeof *a->plan.header);
    *out = a;
    return QKV_OK;
}

void qkv_attention_destroy(qkv_attention *attention)
{
    if (!attention) return;
    const qkv_allocator *mem = &attention->ctx->allocator;
    const qkv_workspace *w = &attention->owned;
    if (w->scratch) mem->free(mem->user, w->scratch, w->scratch_bytes);
    if (w->plan) mem->free(mem->user, w->plan, w->plan_bytes);
    mem->free(mem->user, attention, sizeof *attention);
}
