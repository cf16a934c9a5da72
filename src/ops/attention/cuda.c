/* cuda.c - attention on a GPU: the plan is made in pinned host memory and copied to a block on the device,
 * at addresses that stay, so that launches in a captured graph serve every later plan.
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "ops/attention/attention.h"

enum { THREADS = 128, WARPS = THREADS / 32, NUM_CONSTANTS = 19 };

static i32 max32(i32 a, i32 b)
{
    return a > b ? a : b;
}

static i32 min32(i32 a, i32 b)
{
    return a < b ? a : b;
}

/* Rings of two tiles a warp or more, for two blocks an SM where they fit, since one computes while the other
 * waits; shared memory of an SM is 1 KB more than a block may have, and each block takes 1 KB for itself. */
void qi_attention_cuda_configure(qkv_attention *a)
{
    enum { MAX_STAGES = 6 };
    const qkv_attention_spec *s = &a->spec;
    const qkv_attention_limits *l = &a->limits;
    attention_cuda *c = &a->cuda;
    const i32 group = s->num_qo_heads / s->num_kv_heads, few = cuda_decode_rows(group);
    const i64 most = l->max_levels > 1 ? l->max_tokens : l->max_qo_len; /* rows of a group */
    const i32 qk = s->head_dim_qk, vo = s->head_dim_vo;
    const i32 bytes = (i32)qi_dtype_bytes((qi_dtype)qi_dtype_of(s->dtype_kv));
    const i32 room = a->ctx->cuda.shared_bytes, half = (room - 1024) / 2;
    c->decode_rows = few == 0 ? 0 : (most < few ? (i32)most : few) * group <= 8 ? 8 : 16;
    c->prefill = most > few;
    const i32 slots = WARPS * DECODE_SLOT_BYTES(qk, vo, bytes, c->decode_rows);
    const i32 shared = DECODE_SHARED_ROOM(qk, c->decode_rows);
    const i32 prefill = c->prefill ? PREFILL_SHARED_ROOM + PREFILL_SHARED_BYTES(qk, vo, bytes) : 0;
    const i32 needed = max32(c->decode_rows ? shared + 2 * slots : 0, prefill);
    c->blocks_per_sm = needed <= half ? 2 : 1;
    const i32 fit = ((c->blocks_per_sm == 2 ? half : room) - shared) / slots;
    c->decode_stages = c->decode_rows ? min32(max32(fit, 2), MAX_STAGES) : 0;
    c->shared_bytes = (u32)max32(c->decode_rows ? shared + c->decode_stages * slots : 0, prefill);
}

/* Of attention.mma, in the order of its row's names. */
static void write_constants(const qkv_attention *a, i32 *out)
{
    const qkv_attention_spec *s = &a->spec;
    const attention_cuda *c = &a->cuda;
    const i32 constants[] = {
        s->head_dim_qk,
        s->head_dim_vo,
        s->num_qo_heads / s->num_kv_heads,
        s->page_size,
        (i32)qi_dtype_of(s->dtype_q),
        (i32)qi_dtype_of(s->dtype_kv),
        (i32)qi_dtype_of(s->dtype_o),
        s->mask == QKV_MASK_CAUSAL,
        (s->features & QKV_FEATURE_WINDOW) != 0,
        (s->features & QKV_FEATURE_SOFT_CAP) != 0,
        (s->features & QKV_FEATURE_ALIBI) != 0,
        s->mask == QKV_MASK_CUSTOM,
        a->limits.max_row_blocks > 0,
        a->limits.max_levels > 1,
        c->decode_rows,
        c->decode_stages,
        c->prefill,
        c->blocks_per_sm,
        THREADS,
    };
    _Static_assert(sizeof constants / sizeof *constants == NUM_CONSTANTS, "the row's names");
    memcpy(out, constants, sizeof constants);
}

static int is_reference(const qkv_attention *a)
{
    return strcmp(a->row->name, "attention.cuda") == 0;
}

qkv_status qi_attention_cuda_compile(qkv_attention *a)
{
    i32 constants[NUM_CONSTANTS] = {THREADS};
    const char *const names[] = {a->row->cuda.entry, a->levels_row->cuda.entry};
    char defines[1024];
    if (!is_reference(a)) write_constants(a, constants);
    qi_write_defines(&a->row->cuda, constants, defines, sizeof defines);
    return qi_variant_compile_cuda(a->ctx, &a->spec, &a->variant, a->row, defines, names,
                                   a->cuda.functions);
}

/* ---- memory ------------------------------------------------------------------------------- */

qkv_status qi_attention_cuda_alloc(qkv_attention *a, const qkv_workspace_size *size,
                                   qkv_workspace *out)
{
    const qi_cuda_device *device = &a->ctx->cuda;
    *out =
        (qkv_workspace){QKV_WORKSPACE_INIT, .plan_bytes = size->plan_bytes,
                        .scratch_bytes = size->scratch_bytes, .pinned_bytes = size->pinned_bytes};
    a->owned = *out; /* destroy frees what there is */
    QI_TRY(qi_cuda_alloc(device, size->plan_bytes, &a->owned.plan));
    QI_TRY(qi_cuda_alloc(device, size->scratch_bytes, &a->owned.scratch));
    QI_TRY(qi_cuda_alloc_pinned(device, size->pinned_bytes, &a->owned.pinned));
    *out = a->owned;
    return QKV_OK;
}

void qi_attention_cuda_free(qkv_attention *a)
{
    const qi_cuda_device *device = &a->ctx->cuda;
    if (qi_check_context(a->ctx) != QKV_OK) return; /* the parent's */
    qi_cuda_event_destroy(device, a->cuda.uploaded);
    qi_cuda_free(device, a->owned.plan);
    qi_cuda_free(device, a->owned.scratch);
    qi_cuda_free_pinned(device, a->owned.pinned);
}

/* The device's address of what is at this one of the host's block. */
static void *on_device(const qkv_attention *a, const void *host)
{
    return host ? a->cuda.block + ((const char *)host - a->cuda.host) : NULL;
}

/* Copies the first bytes of an array of the block. */
static qkv_status upload(const qkv_attention *a, void *to, const void *from, u64 bytes,
                         void *stream)
{
    return bytes ? qi_cuda_copy(&a->ctx->cuda, to, from, bytes, stream) : QKV_OK;
}

qkv_status qi_attention_cuda_bind(qkv_attention *a, const qkv_workspace *w)
{
    const qi_plan *host = &a->plan;
    a->cuda.block = w->plan;
    a->cuda.host = w->pinned;
    a->cuda.plan = (qi_plan){
        .header = on_device(a, host->header),
        .work_indptr = on_device(a, host->work_indptr),
        .work = on_device(a, host->work),
        .merge = on_device(a, host->merge),
        .ticket = on_device(a, host->ticket),
        .groups = on_device(a, host->groups),
        .rows = on_device(a, host->rows),
        .row_merge = on_device(a, host->row_merge),
        .token_request = on_device(a, host->token_request),
        .qo_indptr = on_device(a, host->qo_indptr),
        .kv_len = on_device(a, host->kv_len),
        .qo_pos = on_device(a, host->qo_pos),
        .mask_first = on_device(a, host->mask_first),
        .pages = on_device(a, host->pages),
        .o_partial = host->o_partial,
        .lse_partial = host->lse_partial,
        .max_tokens = host->max_tokens,
    };
    const qi_cuda_device *device = &a->ctx->cuda;
    QI_TRY(qi_cuda_event_create(device, &a->cuda.uploaded));
    /* Tickets are 0 between runs; the kernels leave them so. */
    QI_TRY(qi_cuda_zero(device, a->cuda.plan.ticket,
                        (u64)((char *)a->plan.groups - (char *)a->plan.ticket), NULL));
    QI_TRY(upload(a, on_device(a, a->rope_turns), a->rope_turns,
                  (u64)a->rope.num_pairs * sizeof(double), NULL));
    return qi_cuda_wait(device, NULL);
}

/* ---- plan --------------------------------------------------------------------------------- */

/* Waits until the block may be written: where plans follow each other faster than they are copied. */
qkv_status qi_attention_cuda_begin_plan(qkv_attention *a, void *stream)
{
    int capturing;
    QI_TRY(qi_cuda_capturing(&a->ctx->cuda, stream, &capturing));
    QI_REQUIRE(!capturing,
               "stream: expected one that is not being captured, since a plan of host arrays would "
               "become part of the graph as it is now; plan before each replay instead");
    return qi_cuda_event_wait(&a->ctx->cuda, a->cuda.uploaded);
}

qkv_status qi_attention_cuda_upload(qkv_attention *a, const qi_lengths *lengths, void *stream)
{
    const qi_plan *from = &a->plan, *to = &a->cuda.plan;
    const qi_plan_header *h = from->header;
    const u64 tokens = (u64)h->num_tokens, requests = (u64)h->num_requests, word = sizeof(i32);
    const struct {
        void *to;
        const void *from;
        u64 bytes;
    } parts[] = {
        {to->header, from->header, sizeof *h},
        {to->work_indptr, from->work_indptr, ((u64)a->limits.max_workers + 1) * word},
        {to->work, from->work, (u64)h->num_work * sizeof(qi_work)},
        {to->merge, from->merge, (u64)h->num_merges * sizeof(qi_merge)},
        {to->groups, from->groups, (u64)lengths->num_groups * sizeof(qi_group)},
        {to->rows, from->rows, h->num_levels > 1 ? tokens * word : 0},
        {to->token_request, from->token_request, tokens * word},
        {to->qo_indptr, from->qo_indptr, (requests + 1) * word},
        {to->kv_len, from->kv_len, requests * word},
        {to->qo_pos, from->qo_pos, requests * word},
        {to->mask_first, from->mask_first, requests * word},
        {to->pages, from->pages, (u64)a->num_listed * word},
        {on_device(a, a->mask_indptr), a->mask_indptr, a->mask_bits ? requests * sizeof(i64) : 0},
    };
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        QI_TRY(upload(a, parts[i].to, parts[i].from, parts[i].bytes, stream));
    const i64 pitch = from->max_tokens * a->spec.num_kv_heads;
    for (i32 l = 0; h->num_levels > 1 && l < h->num_levels; l++)
        QI_TRY(upload(a, to->row_merge + l * pitch, from->row_merge + l * pitch,
                      tokens * (u64)a->spec.num_kv_heads * word, stream));
    return qi_cuda_event_record(&a->ctx->cuda, a->cuda.uploaded, stream);
}

/* ---- run ---------------------------------------------------------------------------------- */

qkv_status qi_attention_cuda_run(qkv_attention *a, const attention_params *p,
                                 const qi_scale scales[4], float sm_scale, void *stream)
{
    attention_cuda_params c = {
        .at = *p,
        .q_scale = scales[0],
        .k_scale = scales[1],
        .v_scale = scales[2],
        .o_scale = scales[3],
        .sm_scale = sm_scale,
    };
    c.at.plan = a->cuda.plan;
    c.at.rope_turns = on_device(a, a->rope_turns);
    c.at.mask_indptr = p->mask_bits ? on_device(a, a->mask_indptr) : NULL;
    c.at.variant = NULL;
    memcpy(c.args, &a->args, a->variant.num_params > 0 ? a->variant.bytes : 0);
    const i32 qk = a->spec.head_dim_qk, vo = a->spec.head_dim_vo;
    const qi_grid grid = {.x = (u32)a->limits.max_workers,
                          .threads = THREADS,
                          .shared_bytes = is_reference(a) ? (u32)ATTENTION_SHARED_BYTES(qk, vo)
                                                          : a->cuda.shared_bytes,
                          .overlaps_before = 1};
    QI_TRY(qi_cuda_launch(&a->ctx->cuda, a->cuda.functions[0], &grid, &c, stream));
    if (a->limits.max_levels == 1) return QKV_OK;
    const qi_grid merge = {
        .x = (u32)a->limits.max_workers, .threads = THREADS, .overlaps_before = 1};
    return qi_cuda_launch(&a->ctx->cuda, a->cuda.functions[1], &merge, &c, stream);
}
