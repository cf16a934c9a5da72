/* cuda.c - attention on a GPU: the plan is made in pinned host memory, from where a kernel pulls it to a
 * block on the device, at addresses that stay, so that launches in a captured graph serve every later plan.
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/arena.h"
#include "base/status.h"
#include "base/thread.h"
#include "ops/attention/attention.h"
#include "ops/attention/boxes.h"
#include "ops/attention/mma_params.h"
#include "ops/attention/plan_params.h"
#include "ops/attention/wgmma.h"

enum {
    THREADS = 128, /* of prefill tiles and the reference; decode tiles may have more */
    NUM_CONSTANTS = QI_SPEC_CONSTANTS + 6,
    MOST_CONSTANTS = QI_WGMMA_CONSTANTS
};

static i32 max32(i32 a, i32 b)
{
    return a > b ? a : b;
}

static i32 min32(i32 a, i32 b)
{
    return a < b ? a : b;
}

/* Keys of a decode tile that one copy of Hopper's copy engine brings; 0: it is not for them. */
static i32 decode_piece(const qkv_attention *a, i32 bytes)
{
    const qkv_attention_spec *s = &a->spec;
    if (a->ctx->cuda.major != 9 || a->limits.max_row_blocks > 0) return 0;
    if (s->head_dim_qk * bytes % 128 != 0 || s->head_dim_vo * bytes % 128 != 0) return 0;
    return qi_box_keys(s->page_size, DECODE_TILE(bytes));
}

/* Does a decode of all requests have about a tile for each SM? Then a block of eight warps an SM takes it whole, where
 * two blocks of four would share it and merge. Fewer tiles than a quarter are cut anyhow, and more warps have too few
 * keys each. Not where the kernel is to be the same whatever the limits. */
static int has_tile_a_sm(const qkv_attention *a)
{
    const i64 tiles = (i64)a->limits.max_requests * a->spec.num_kv_heads,
              sms = a->ctx->cuda.num_sms;
    return a->cuda.decode_piece > 0 && !a->cuda.prefill && a->limits.max_levels == 1 &&
           (a->spec.flags & QKV_ATTENTION_BATCH_INVARIANT) == 0 && tiles <= sms && 4 * tiles > sms;
}

/* Rings of two tiles a warp or more, for two blocks an SM where they fit, since one computes while the other
 * waits; shared memory of an SM is 1 KB more than a block may have, and each block takes 1 KB for itself. */
void qi_attention_cuda_configure(qkv_attention *a)
{
    enum { MAX_STAGES = 6, WIDE = 8 };
    const qkv_attention_spec *s = &a->spec;
    const qkv_attention_limits *l = &a->limits;
    attention_cuda *c = &a->cuda;
    const i32 group = s->num_qo_heads / s->num_kv_heads, few = cuda_decode_rows(group);
    const i64 most = l->max_levels > 1 ? l->max_tokens : l->max_qo_len; /* rows of a group */
    const i32 qk = s->head_dim_qk, vo = s->head_dim_vo;
    const i32 bytes = (i32)qi_dtype_bytes((qi_dtype)qi_dtype_of(s->dtype_kv));
    const i32 room = a->ctx->cuda.shared_bytes, half = (room - 1024) / 2;
    c->decode_rows = few == 0 ? 0 : (most < few ? (i32)most : few) * group <= 8 ? 8 : 16;
    c->decode_piece = c->decode_rows ? decode_piece(a, bytes) : 0;
    c->prefill = most > few;
    const i32 slot = DECODE_SLOT_BYTES(qk, vo, bytes, c->decode_rows, c->decode_piece);
    const int wide =
        has_tile_a_sm(a) && DECODE_SHARED_ROOM(qk, c->decode_rows, WIDE) + 2 * WIDE * slot <= room;
    const i32 warps = wide ? WIDE : THREADS / 32, slots = warps * slot;
    const i32 shared = DECODE_SHARED_ROOM(qk, c->decode_rows, warps);
    c->tile_a_sm = wide;
    c->threads = 32 * warps;
    const i32 prefill = c->prefill ? PREFILL_SHARED_ROOM + PREFILL_SHARED_BYTES(qk, vo, bytes) : 0;
    const i32 needed = max32(c->decode_rows ? shared + 2 * slots : 0, prefill);
    c->blocks_per_sm = needed <= half && !wide ? 2 : 1;
    const i32 left = (c->blocks_per_sm == 2 ? half : room) - shared;
    /* Two of 8 warps' tiles of 8-bit keys are as many bytes in flight as are needed: a third took 5 % longer. */
    const i32 fit = slots > 0 ? left / slots : 0, most_stages = wide && bytes == 1 ? 2 : MAX_STAGES;
    c->decode_stages = c->decode_rows ? min32(max32(fit, 2), most_stages) : 0;
    c->shared_bytes = (u32)max32(c->decode_rows ? shared + c->decode_stages * slots : 0, prefill);
}

void qi_attention_spec_constants(const qkv_attention *a, i32 out[QI_SPEC_CONSTANTS])
{
    const qkv_attention_spec *s = &a->spec;
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
    };
    _Static_assert(sizeof constants / sizeof *constants == QI_SPEC_CONSTANTS, "their names");
    memcpy(out, constants, sizeof constants);
}

/* Of attention.mma, in the order of its row's names. */
static void write_constants(const qkv_attention *a, i32 *out)
{
    const attention_cuda *c = &a->cuda;
    const i32 own[] = {c->decode_rows, c->decode_stages, c->decode_piece,
                       c->prefill,     c->blocks_per_sm, c->threads};
    _Static_assert(QI_SPEC_CONSTANTS + sizeof own / sizeof *own == NUM_CONSTANTS,
                   "the row's names");
    qi_attention_spec_constants(a, out);
    memcpy(out + QI_SPEC_CONSTANTS, own, sizeof own);
}

/* The planner, and beside it in its file the copy of a host plan. */
const qi_kernel qi_attention_plan_kernels[] = {
    QI_CUDA_ROW("attention.plan", NULL, "ops/attention/plan.cu", "attention_plan", "THREADS"),
    {0},
};

static qkv_status compile_planner(qkv_attention *a)
{
    const i32 constants[] = {PLAN_THREADS};
    static const char *const names[] = {"attention_plan", "attention_upload"};
    const qi_kernel *row = &qi_attention_plan_kernels[0];
    char defines[64];
    qi_write_defines(&row->cuda, constants, defines, sizeof defines);
    const qi_source source = {
        .what = row->name, .main = row->cuda.file, .defines = defines, .header = ""};
    cu_function functions[2];
    QI_TRY(qi_compile_cuda(a->ctx, &source, names, 2, functions));
    a->cuda.planner = functions[0];
    a->cuda.uploader = functions[1];
    return QKV_OK;
}

/* What a thread of its own compiles beside the attention kernels, which take about as long. */
typedef struct planner_job {
    qkv_attention *a;
    qkv_status status;
    char error[2048];
} planner_job;

static void *run_planner_job(void *arg)
{
    planner_job *job = arg;
    job->status = compile_planner(job->a);
    if (job->status != QKV_OK) snprintf(job->error, sizeof job->error, "%s", qkv_last_error());
    return NULL;
}

static qkv_status compile_kernels(qkv_attention *a)
{
    i32 constants[MOST_CONSTANTS] = {THREADS};
    const char *const names[] = {a->row->cuda.entry, a->levels_row->cuda.entry};
    char defines[1024];
    if (a->cuda.is_reference) {
        a->cuda.threads = THREADS;
        a->cuda.shared_bytes =
            (u32)ATTENTION_SHARED_BYTES(a->spec.head_dim_qk, a->spec.head_dim_vo);
    } else if (a->wgmma.used)
        qi_attention_wgmma_constants(a, constants);
    else
        write_constants(a, constants);
    qi_write_defines(&a->row->cuda, constants, defines, sizeof defines);
    return qi_variant_compile_cuda(a->ctx, &a->spec, &a->variant, a->row, defines, names,
                                   a->limits.max_levels > 1 ? 2 : 1, a->cuda.functions);
}

qkv_status qi_attention_cuda_compile(qkv_attention *a)
{
    planner_job job = {.a = a};
    pthread_t thread;
    const int beside = qi_thread_start(&thread, run_planner_job, &job) == 0;
    const qkv_status status = compile_kernels(a);
    if (beside)
        pthread_join(thread, NULL);
    else
        run_planner_job(&job);
    QI_TRY(status);
    if (job.status != QKV_OK) QI_FAIL(job.status, "%s", job.error);
    return QKV_OK;
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
    for (i32 i = 0; i < MAX_IN_FLIGHT; i++) qi_cuda_event_destroy(device, a->cuda.uploaded[i]);
    qi_cuda_free(device, a->owned.plan);
    qi_cuda_free(device, a->owned.scratch);
    qi_cuda_free_pinned(device, a->owned.pinned);
}

/* The device's address of what is at this one of the host's block. */
void *qi_attention_on_device(const qkv_attention *a, const void *host)
{
    return host ? a->cuda.block + ((const char *)host - a->cuda.host) : NULL;
}

qkv_status qi_attention_cuda_bind(qkv_attention *a, const qkv_workspace *w)
{
    const qi_plan *host = &a->plan;
    a->cuda.block = w->plan;
    a->cuda.stages = w->pinned;
    a->cuda.stage_bytes =
        w->pinned_bytes / (u64)a->limits.plans_in_flight / QI_ARENA_ALIGN * QI_ARENA_ALIGN;
    a->cuda.host = w->pinned;
    a->cuda.plan = (qi_plan){
        .header = qi_attention_on_device(a, host->header),
        .work_indptr = qi_attention_on_device(a, host->work_indptr),
        .work = qi_attention_on_device(a, host->work),
        .merge = qi_attention_on_device(a, host->merge),
        .ticket = qi_attention_on_device(a, host->ticket),
        .claims = qi_attention_on_device(a, host->claims),
        .groups = qi_attention_on_device(a, host->groups),
        .rows = qi_attention_on_device(a, host->rows),
        .row_merge = qi_attention_on_device(a, host->row_merge),
        .token_request = qi_attention_on_device(a, host->token_request),
        .qo_indptr = qi_attention_on_device(a, host->qo_indptr),
        .kv_len = qi_attention_on_device(a, host->kv_len),
        .qo_pos = qi_attention_on_device(a, host->qo_pos),
        .mask_first = qi_attention_on_device(a, host->mask_first),
        .pages = qi_attention_on_device(a, host->pages),
        .o_partial = host->o_partial,
        .lse_partial = host->lse_partial,
        .max_tokens = host->max_tokens,
    };
    const qi_cuda_device *device = &a->ctx->cuda;
    for (i32 i = 0; i < a->limits.plans_in_flight; i++)
        QI_TRY(qi_cuda_event_create(device, &a->cuda.uploaded[i]));
    /* Tickets and claims are 0 between runs; the kernels leave them so. What else is there may be read before it is
     * written (decode_ahead.cuh). */
    QI_TRY(qi_cuda_zero(device, w->plan, w->plan_bytes, NULL));
    if (a->rope.num_pairs > 0)
        QI_TRY(qi_cuda_copy(device, qi_attention_on_device(a, a->rope_turns), a->rope_turns,
                            (u64)a->rope.num_pairs * sizeof(double), NULL));
    return qi_cuda_wait(device, NULL);
}

/* ---- plan --------------------------------------------------------------------------------- */

/* Points a->plan into a stage. */
static void use_stage(qkv_attention *a, i32 stage)
{
    const u64 bytes = a->cuda.stage_bytes;
    char *host = a->cuda.stages + (u64)stage * bytes;
    qi_attention_bind(a, host, (char *)a->cuda.plan.o_partial);
    a->cuda.host = host;
}

/* Takes the next stage, as soon as what it held is copied: where plans follow each other faster than that. */
qkv_status qi_attention_cuda_begin_plan(qkv_attention *a, void *stream)
{
    int capturing;
    QI_TRY(qi_cuda_capturing(&a->ctx->cuda, stream, &capturing));
    QI_REQUIRE(!capturing,
               "stream: expected one that is not being captured, since a plan of host arrays would "
               "become part of the graph as it is now; plan before each replay instead, or of "
               "arrays on the device");
    a->cuda.next = (a->cuda.stage + 1) % a->limits.plans_in_flight;
    QI_TRY(qi_cuda_event_wait(&a->ctx->cuda, a->cuda.uploaded[a->cuda.next]));
    use_stage(a, a->cuda.next);
    return QKV_OK;
}

void qi_attention_cuda_cancel_plan(qkv_attention *a)
{
    use_stage(a, a->cuda.stage);
}

static void add_part(upload_params *p, void *to, const void *from, i64 count, size_t bytes)
{
    if (count == 0) return;
    p->part[p->num_parts].to = to;
    p->part[p->num_parts].from = from;
    p->part[p->num_parts].bytes = count * (i64)bytes;
    p->num_parts++;
}

/* One launch, which pulls what is in use of each array. */
qkv_status qi_attention_cuda_upload(qkv_attention *a, const qi_lengths *lengths, void *stream)
{
    const qi_plan *from = &a->plan, *to = &a->cuda.plan;
    const qi_plan_header *h = from->header;
    const i64 tokens = h->num_tokens, requests = h->num_requests, heads = a->spec.num_kv_heads;
    const int levels = h->num_levels > 1;
    upload_params p = {.num_parts = 0};
    add_part(&p, to->header, from->header, 1, sizeof *h);
    add_part(&p, to->work_indptr, from->work_indptr, a->limits.max_workers + 1, sizeof(i32));
    add_part(&p, to->work, from->work, h->num_work, sizeof(qi_work));
    add_part(&p, to->merge, from->merge, h->num_merges, sizeof(qi_merge));
    add_part(&p, to->groups, from->groups, lengths->num_groups, sizeof(qi_group));
    add_part(&p, to->rows, from->rows, levels ? tokens : 0, sizeof(i32));
    add_part(&p, to->token_request, from->token_request, tokens, sizeof(i32));
    add_part(&p, to->qo_indptr, from->qo_indptr, requests + 1, sizeof(i32));
    add_part(&p, to->kv_len, from->kv_len, requests, sizeof(i32));
    add_part(&p, to->qo_pos, from->qo_pos, requests, sizeof(i32));
    add_part(&p, to->mask_first, from->mask_first, requests, sizeof(i32));
    add_part(&p, to->pages, from->pages, a->num_listed, sizeof(i32));
    add_part(&p, qi_attention_on_device(a, a->mask_indptr), a->mask_indptr,
             a->mask_bits ? requests : 0, sizeof(i64));
    for (i64 l = 0; levels && l < h->num_levels; l++)
        add_part(&p, to->row_merge + l * to->max_tokens * heads,
                 from->row_merge + l * to->max_tokens * heads, tokens * heads, sizeof(i32));
    const qi_cuda_device *device = &a->ctx->cuda;
    const qi_grid grid = {.x = UPLOAD_BLOCKS, .threads = UPLOAD_THREADS};
    a->cuda.run_is_behind = 0;
    a->cuda.captured_run_is_behind = NULL;
    QI_TRY(qi_cuda_launch(device, a->cuda.uploader, &grid, &p, stream));
    a->cuda.stage = a->cuda.next;
    return qi_cuda_event_record(device, a->cuda.uploaded[a->cuda.stage], stream);
}

/* ---- run ---------------------------------------------------------------------------------- */

/* A warp for each (row, query head), as far as is worth it: beside each other they hide that a row's loads wait for each
 * other. */
static u32 merge_blocks(const qkv_attention *a)
{
    const i32 warps = MERGE_THREADS / 32, parts = (a->spec.num_qo_heads + warps - 1) / warps;
    const i64 all = a->limits.max_tokens * parts, most = MERGE_BLOCKS * a->ctx->cuda.num_sms;
    return (u32)(all < most ? all : most);
}

static qkv_status launch_strips(const qkv_attention *a, const void *params, void *stream)
{
    const qi_grid grid = {.x = (u32)a->limits.max_workers,
                          .threads = (u32)a->cuda.threads,
                          .shared_bytes = a->cuda.shared_bytes,
                          .overlaps_before = 1};
    return qi_cuda_launch(&a->ctx->cuda, a->cuda.functions[0], &grid, params, stream);
}

/* Are there kernels that can read old keys before their turn, and may they? */
static int has_early_keys(const qkv_attention *a)
{
    return (a->spec.flags & QKV_ATTENTION_ONLY_APPENDS) != 0 && a->ctx->cuda.major >= 9 &&
           a->spec.head_dim_vo <= MMA_EARLY_DIM && !a->cuda.prefill && a->limits.max_levels == 1 &&
           a->limits.max_row_blocks == 0;
}

/* The launch of attention_mma.cu. What it reads before its turn the launch before must not write, nor any that may run
 * beside that one. Of the plan this is so once a run has waited for it: later launches begin after that. And a graph
 * begins when all that was enqueued before has ended, so that its launches may take what an eager run has waited for as
 * given, whatever is planned between its replays. */
static qkv_status run_mma(qkv_attention *a, const attention_cuda_params *c, void *stream)
{
    const attention_params *p = &c->at;
    mma_params m = {.c = *c};
    int capturing = 0;
    if (has_early_keys(a)) {
        QI_TRY(qi_cuda_capturing(&a->ctx->cuda, stream, &capturing));
        m.early = a->cuda.run_is_behind || (capturing && a->cuda.captured_run_is_behind == stream);
    }
    m.kv_by_tma = a->cuda.decode_piece > 0 && qi_box_keys_fit(p);
    if (m.kv_by_tma) {
        const qi_box_tensor boxes[] = {
            qi_box_of_whole_rows(qi_box_of_keys(p, a->cuda.decode_piece, &m.k)),
            qi_box_of_whole_rows(qi_box_of_values(p, a->cuda.decode_piece, &m.v)),
        };
        QI_TRY(qi_cuda_tensor_maps(&a->ctx->cuda, boxes, 2));
    }
    QI_TRY(launch_strips(a, &m, stream));
    if (capturing)
        a->cuda.captured_run_is_behind = stream;
    else
        a->cuda.run_is_behind = 1;
    return QKV_OK;
}

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
    c.at.rope_turns = qi_attention_on_device(a, a->rope_turns);
    c.at.mask_indptr = p->mask_bits ? qi_attention_on_device(a, a->mask_indptr) : NULL;
    c.at.variant = NULL;
    memcpy(c.args, &a->args, a->variant.num_params > 0 ? a->variant.bytes : 0);
    if (a->wgmma.used)
        QI_TRY(qi_attention_wgmma_run(a, &c, stream));
    else if (a->cuda.is_reference)
        QI_TRY(launch_strips(a, &c, stream));
    else
        QI_TRY(run_mma(a, &c, stream));
    if (a->limits.max_levels == 1) return QKV_OK;
    const qi_grid merge = {.x = merge_blocks(a),
                           .threads = MERGE_THREADS,
                           .shared_bytes = MERGE_SHARED_BYTES,
                           .overlaps_before = 1};
    return qi_cuda_launch(&a->ctx->cuda, a->cuda.functions[1], &merge, &c, stream);
}
