/* attention.c - creating the attention operator: check the spec, choose a row, bind memory.
 * The other two calls are in plan.c and run.c.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/attention.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/arena.h"
#include "base/rope_spec.h"
#include "kern/rope_turns.h"
#include "ops/attention/wgmma.h"

QI_CPU_DECLARE(attention_d64);
QI_CPU_DECLARE(attention_d128);
QI_CPU_DECLARE(attention_any);
QI_CPU_DECLARE(attention_levels);

static const char *reject_variant(const void *desc)
{
    const qkv_attention *a = desc;
    return a->spec.variant ? "the variant is not compiled in" : NULL;
}

static const char *reject_builtin(const void *desc)
{
    const qkv_attention *a = desc;
    return a->spec.variant ? NULL : "there is no variant to compile";
}

/* The rows for one head dim read keys where they are. */
static const char *reject_fixed(const void *desc, int32_t dim, const char *reason)
{
    const qkv_attention_spec *s = &((const qkv_attention *)desc)->spec;
    if (s->variant) return reject_variant(desc);
    if (s->head_dim_qk != dim || s->head_dim_vo != dim) return reason;
    if (s->features & QKV_FEATURE_ROPE) return "keys are rotated in the kernel";
    return NULL;
}

static const char *reject_d64(const void *desc)
{
    return reject_fixed(desc, 64, "head_dim is not 64");
}

static const char *reject_d128(const void *desc)
{
    return reject_fixed(desc, 128, "head_dim is not 128");
}

/* Tensor cores multiply what cp.async brings: keys as they are. */
static const char *reject_mma(const void *desc)
{
    const qkv_attention *a = desc;
    const qkv_attention_spec *s = &a->spec;
    const qi_dtype q = (qi_dtype)qi_dtype_of(s->dtype_q), kv = (qi_dtype)qi_dtype_of(s->dtype_kv);
    if (q == QI_F32 || kv == QI_F32) return "f32 is not multiplied by tensor cores";
    if (qi_dtype_bytes(q) == 2 && qi_dtype_bytes(kv) == 2 && q != kv)
        return "q and k are of different 16-bit types";
    if (s->head_dim_qk > 256 || s->head_dim_vo > 256) return "a head dim is more than 256";
    if (s->num_qo_heads / s->num_kv_heads > PREFILL_TILE_M(s->head_dim_vo))
        return "a token's query heads of a KV head are more than a tile's rows";
    if (s->features & QKV_FEATURE_ROPE) return "keys are rotated in the kernel";
    if (a->variant.changes_keys) return "the variant changes keys";
    if (a->cuda.shared_bytes > (u32)a->ctx->cuda.shared_bytes)
        return "a block has too little shared memory on this device";
    return NULL;
}

static const char *reject_wgmma(const void *desc)
{
    return qi_attention_reject_wgmma(desc);
}

/* Fastest first; the first row whose reject() returns NULL wins; the reference is last. */
const qi_kernel qi_attention_kernels[] = {
    QI_CPU_ROW("attention.d64", reject_d64, attention_d64),
    QI_CPU_ROW("attention.d128", reject_d128, attention_d128),
    QI_CPU_ROW("attention.any", reject_variant, attention_any),
    {.name = "attention.variant",
     .device = kDLCPU,
     .reject = reject_builtin}, /* compiled by create */
    QI_CUDA_ROW("attention.wgmma", reject_wgmma, "ops/attention/attention_wgmma.cu", "attention",
                QI_WGMMA_CONSTANT_NAMES),
    QI_CUDA_ROW("attention.mma", reject_mma, "ops/attention/attention_mma.cu", "attention",
                QI_SPEC_CONSTANT_NAMES
                "DECODE_ROWS DECODE_STAGES DECODE_PIECE PREFILL BLOCKS_PER_SM THREADS"),
    QI_CUDA_ROW("attention.cuda", NULL, "ops/attention/attention.cu", "attention", "THREADS"),
    {0},
};

/* Merges the partial rows of several levels. */
const qi_kernel qi_attention_levels_kernels[] = {
    QI_CPU_ROW("attention.levels", NULL, attention_levels),
    QI_CUDA_ROW("attention.cuda", NULL, "ops/attention/attention.cu", "attention_levels", ""),
    {0},
};

/* ---- spec and limits ------------------------------------------------------------------------ */

static qkv_status check_head_dim(const char *name, int32_t dim)
{
    QI_REQUIRE(dim >= 8 && dim <= MAX_HEAD_DIM && dim % 8 == 0,
               "%s: expected a multiple of 8 from 8 to %d, got %d", name, (int)MAX_HEAD_DIM,
               (int)dim);
    return QKV_OK;
}

/* Every float type, and i8 where allowed. */
static qkv_status check_dtype(const char *name, DLDataType dtype, int allow_i8)
{
    const int32_t t = qi_dtype_of(dtype);
    if (qi_is_float(dtype) || t == QI_E4M3 || t == QI_E5M2 || (allow_i8 && t == QI_I8))
        return QKV_OK;
    QI_FAIL(QKV_ERR_UNSUPPORTED,
            "%s: expected f32, f16, bf16, e4m3, e5m2%s, got %s (code %d, %d bits)", name,
            allow_i8 ? " or i8" : "", qi_dtype_name(dtype), dtype.code, dtype.bits);
}

static qkv_status check_shape(const qkv_attention_spec *s)
{
    QI_REQUIRE(s->num_kv_heads > 0 && s->num_kv_heads <= 1024,
               "num_kv_heads: expected 1 to 1024, got %d", (int)s->num_kv_heads);
    QI_REQUIRE(s->num_qo_heads > 0 && s->num_qo_heads % s->num_kv_heads == 0 &&
                   s->num_qo_heads / s->num_kv_heads <= MAX_GROUP,
               "num_qo_heads: expected 1 to %d times num_kv_heads (%d), got %d", MAX_GROUP,
               (int)s->num_kv_heads, (int)s->num_qo_heads);
    QI_TRY(check_head_dim("head_dim_qk", s->head_dim_qk));
    QI_TRY(check_head_dim("head_dim_vo", s->head_dim_vo));
    QI_REQUIRE(s->page_size >= 0 && s->page_size <= 1 << 24,
               "page_size: expected 0 (ragged) to 2^24, got %d", (int)s->page_size);
    QI_REQUIRE(s->kv_layout == QKV_NHD || s->kv_layout == QKV_HND,
               "kv_layout: expected QKV_NHD or QKV_HND, got %d", (int)s->kv_layout);
    QI_TRY(check_dtype("dtype_q", s->dtype_q, 0));
    QI_TRY(check_dtype("dtype_kv", s->dtype_kv, 1));
    return check_dtype("dtype_o", s->dtype_o, 0);
}

static qkv_status check_windows(qkv_attention_spec *s)
{
    if (s->features & QKV_FEATURE_WINDOW) {
        QI_REQUIRE(s->window_left >= -1, "window_left: expected -1 (open) or more, got %d",
                   (int)s->window_left);
        QI_REQUIRE(s->window_right >= -1, "window_right: expected -1 (open) or more, got %d",
                   (int)s->window_right);
        return QKV_OK;
    }
    QI_REQUIRE((s->window_left == 0 || s->window_left == -1) &&
                   (s->window_right == 0 || s->window_right == -1),
               "window_left, window_right: expected 0 or -1 without QKV_FEATURE_WINDOW, got %d, %d",
               (int)s->window_left, (int)s->window_right);
    s->window_left = s->window_right = -1;
    return QKV_OK;
}

static qkv_status check_features(qkv_attention_spec *s, qi_rope *rope)
{
    const uint32_t flags = QKV_ATTENTION_BATCH_INVARIANT | QKV_ATTENTION_LSE_BASE_2 |
                           QKV_ATTENTION_HAS_SINK | QKV_ATTENTION_ONLY_APPENDS;
    const int32_t features =
        QKV_FEATURE_SOFT_CAP | QKV_FEATURE_ALIBI | QKV_FEATURE_WINDOW | QKV_FEATURE_ROPE;
    QI_REQUIRE((s->flags & ~flags) == 0, "flags: expected QKV_ATTENTION_..., got %#x",
               (unsigned)s->flags);
    QI_REQUIRE((s->features & ~features) == 0, "features: expected QKV_FEATURE_..., got %#x",
               (unsigned)s->features);
    QI_REQUIRE(s->mask >= QKV_MASK_NONE && s->mask <= QKV_MASK_CUSTOM,
               "mask: expected QKV_MASK_NONE, QKV_MASK_CAUSAL or QKV_MASK_CUSTOM, got %d",
               (int)s->mask);
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
    *rope = (qi_rope){.num_pairs = 0};
    if (s->features & QKV_FEATURE_ROPE)
        QI_TRY(qi_rope_read(s->rope, "rope", s->head_dim_qk, rope));
    else
        QI_REQUIRE(!s->rope, "rope: expected NULL without QKV_FEATURE_ROPE");
    return check_windows(s);
}

/* Reads and checks a spec; *out has its defaults filled in. */
static qkv_status read_spec(const qkv_attention_spec *in, qkv_attention_spec *out, qi_rope *rope)
{
    QI_TRY(qi_read_struct(out, sizeof *out, in, "spec"));
    QI_TRY(check_shape(out));
    return check_features(out, rope);
}

/* Work items and partial rows are numbered in 31 bits; rows and keys in 30, so that adding a tile to
 * one never overflows. */
#define MAX_INDEX  0x7fffffffLL
#define MAX_LENGTH (1LL << 30)

static qkv_status read_limits(const qkv_attention_spec *spec, const qkv_attention_limits *in,
                              qkv_attention_limits *out)
{
    QI_TRY(qi_read_struct(out, sizeof *out, in, "limits"));
    qkv_attention_limits *l = out;
    QI_REQUIRE(l->max_requests > 0, "max_requests: expected > 0, got %d", (int)l->max_requests);
    QI_REQUIRE(l->max_tokens > 0 && l->max_tokens <= MAX_LENGTH,
               "max_tokens: expected 1 to 2^30, got %lld", (long long)l->max_tokens);
    QI_REQUIRE(l->max_qo_len >= 0, "max_qo_len: expected >= 0, got %d", (int)l->max_qo_len);
    if (l->max_qo_len == 0 || l->max_qo_len > l->max_tokens) l->max_qo_len = (int32_t)l->max_tokens;
    QI_REQUIRE(l->max_workers >= 0 && l->max_workers <= 4096,
               "max_workers: expected 0 to 4096, got %d", (int)l->max_workers);
    QI_REQUIRE(l->max_kv_len > 0 && l->max_kv_len <= MAX_LENGTH,
               "max_kv_len: expected 1 to 2^30, got %lld", (long long)l->max_kv_len);
    if (spec->page_size == 0) l->max_pages = 0;
    QI_REQUIRE(spec->page_size == 0 || (l->max_pages > 0 && l->max_pages <= MAX_INDEX),
               "max_pages: expected 1 to 2^31 - 1, got %lld", (long long)l->max_pages);
    QI_REQUIRE(l->max_split_rows >= 0 && l->max_split_rows <= MAX_INDEX,
               "max_split_rows: expected 0 to 2^31 - 1, got %lld", (long long)l->max_split_rows);
    QI_REQUIRE(l->pool_pages >= 0 && l->pool_pages <= MAX_INDEX,
               "pool_pages: expected 0 to 2^31 - 1, got %lld", (long long)l->pool_pages);
    QI_REQUIRE(l->max_levels >= 0 && l->max_levels <= MAX_LEVELS,
               "max_levels: expected 0 to %d, got %d", MAX_LEVELS, (int)l->max_levels);
    if (l->max_levels == 0) l->max_levels = 1;
    QI_REQUIRE(l->max_levels == 1 || !(spec->flags & QKV_ATTENTION_BATCH_INVARIANT),
               "max_levels: expected 1 with QKV_ATTENTION_BATCH_INVARIANT, got %d",
               (int)l->max_levels);
    QI_REQUIRE(l->max_row_blocks >= 0, "max_row_blocks: expected >= 0, got %d",
               (int)l->max_row_blocks);
    QI_REQUIRE(l->plans_in_flight >= 0 && l->plans_in_flight <= MAX_IN_FLIGHT,
               "plans_in_flight: expected 0 to %d, got %d", (int)MAX_IN_FLIGHT,
               (int)l->plans_in_flight);
    if (l->plans_in_flight == 0) l->plans_in_flight = 2;
    QI_REQUIRE(l->reserved == 0, "limits.reserved: expected 0, got %d", (int)l->reserved);
    return QKV_OK;
}

/* Pieces of all tiles that fixed cuts divide: a tile of n has more than n - 2 times cut_align keys. */
static int64_t max_fixed_pieces(const qi_limits *s, const qkv_attention_spec *spec,
                                const qkv_attention_limits *l)
{
    const int64_t per_tile = l->max_kv_len / s->cut_align + 1;
    const int64_t tiles = l->max_row_blocks > l->max_requests ? l->max_row_blocks : l->max_requests;
    if (l->max_kv_len <= s->cut_align) return 0;
    const int64_t heads = s->split_heads ? s->num_kv_heads : 1;
    const int64_t most = heads * tiles * per_tile;
    if (spec->page_size == 0 || l->max_row_blocks > 0) return most;
    const int64_t by_pages = heads * (l->max_pages * spec->page_size / s->cut_align + 2 * tiles);
    return by_pages < most ? by_pages : most;
}

/* Rows of the largest group. */
static int64_t max_group_rows(const qkv_attention_limits *l)
{
    return l->max_levels > 1 ? l->max_tokens : l->max_qo_len;
}

static int64_t max_groups(const qkv_attention_limits *l)
{
    return (int64_t)l->max_requests * l->max_levels + l->max_row_blocks;
}

/* Work items of any batch within the limits. */
static int64_t max_work(const qi_limits *s, const qkv_attention_spec *spec,
                        const qkv_attention_limits *l)
{
    const int64_t blocks = l->max_row_blocks, rows = max_group_rows(l);
    const int64_t plain = qi_schedule_max_work(s, l->max_tokens * l->max_levels,
                                               (int64_t)l->max_requests * l->max_levels, rows);
    const int64_t sparse =
        blocks ? qi_schedule_max_work(s, l->max_tokens * s->num_kv_heads, blocks, rows) : 0;
    const int64_t work = plain > sparse ? plain : sparse;
    return s->fixed_cuts ? work + max_fixed_pieces(s, spec, l) : work;
}

/* Partial rows that no batch needs more than. */
static int64_t enough_split_rows(const qi_limits *s, const qkv_attention_spec *spec,
                                 const qkv_attention_limits *l)
{
    const int64_t heads = (int64_t)s->num_kv_heads * s->group_size;
    int64_t rows = qi_schedule_split_rows(s, max_group_rows(l));
    if (l->max_levels > 1) rows += l->max_levels * l->max_tokens * heads;
    if (s->fixed_cuts) {
        const int64_t decode = s->decode_rows < l->max_qo_len ? s->decode_rows : l->max_qo_len;
        const int64_t pieces = max_fixed_pieces(s, spec, l); /* times heads may overflow */
        const int64_t of_piece = decode * (s->split_heads ? s->group_size : heads);
        rows += pieces < MAX_INDEX ? pieces * of_piece : MAX_INDEX;
    }
    return rows < MAX_INDEX ? rows : MAX_INDEX;
}

/* Keys of a piece under BATCH_INVARIANT: few enough for a long request to keep many threads busy, and
 * so many that beginning and merging pieces costs a few percent (docs/performance.md). */
enum { FIXED_CUT = 2048 };

/* Rows of a prefill tile, tokens times query heads of a KV head. */
static i32 rows_of_tile(const qkv_attention *a)
{
    if (a->ctx->device.device_type != kDLCUDA) return PREFILL_M;
    return a->wgmma.used ? 64 * a->wgmma.warpgroups : PREFILL_TILE_M(a->spec.head_dim_vo);
}

/* Keys of a KV head that take, with their values, 4 MB: a part of L2 that is in it whatever else is. */
static i32 near_keys(const qkv_attention_spec *spec)
{
    const i32 bytes = (i32)qi_dtype_bytes((qi_dtype)qi_dtype_of(spec->dtype_kv));
    return (4 << 20) / ((spec->head_dim_qk + spec->head_dim_vo) * bytes);
}

/* What starting a tile costs a strip on a GPU: instructions alone where a strip has one, as it has with few tiles; else
 * the wait between two, as measured (NOTES.md), which is longest where no other block of the SM uses it. */
static i32 cuda_cost_visit(const qkv_attention *a, const qkv_attention_limits *limits)
{
    if (a->cuda.prefill) return 40000;
    if (a->cuda.tile_a_sm) return 150000;
    return (i64)limits->max_requests * a->spec.num_kv_heads <= limits->max_workers ? 5000 : 30000;
}

/* What the scheduler needs, from a spec and limits with their defaults filled in. Costs are in
 * units of one multiply-add over a whole head: reading a key costs about 3 of them a byte of its
 * elements on the CPUs measured (docs/performance.md), starting a tile about 200; on GPUs, whose
 * tensor cores are that much faster than their memory, 150, and what cuda_cost_visit() says, where a
 * unit is some 0.1 ns of half an SM. A cut there costs some 4 us. */
static qi_limits schedule_limits(const qkv_attention *a, qkv_attention_limits *limits)
{
    const qkv_attention_spec *spec = &a->spec;
    const int cuda = a->ctx->device.device_type == kDLCUDA;
    const int32_t group = spec->num_qo_heads / spec->num_kv_heads;
    const int fixed = (spec->flags & QKV_ATTENTION_BATCH_INVARIANT) != 0;
    qi_limits s = {
        .num_workers = limits->max_workers,
        .num_kv_heads = spec->num_kv_heads,
        .group_size = group,
        .decode_rows = cuda ? cuda_decode_rows(group) : decode_rows(group),
        .split_heads = cuda,
        .tile_rows = prefill_rows(group, rows_of_tile(a)),
        .causal = spec->mask == QKV_MASK_CAUSAL,
        .window_left = spec->window_left,
        .window_right = spec->window_right,
        .cut_align = fixed                           ? FIXED_CUT
                     : a->wgmma.used                 ? a->wgmma.keys
                     : !cuda && spec->page_size > 64 ? spec->page_size
                                                     : 64,
        .fixed_cuts = fixed,
        .cost_visit = !cuda ? 200 : cuda_cost_visit(a, limits),
        .cost_key =
            (cuda ? 150 : 3) * (int32_t)qi_dtype_bytes((qi_dtype)qi_dtype_of(spec->dtype_kv)),
        .cost_pair = 1,
        .cost_strip = cuda ? 0 : 4000, /* some 5 us: what waking a thread costs */
        .cost_piece = a->wgmma.used && limits->max_levels > 1 ? 200000 : 0, /* some 9000 cycles */
        .cost_cut = cuda ? 39000 : 0,
        .cost_cut_prefill = a->wgmma.used ? 500000 : 0, /* some 10 us */
        .near_keys = a->wgmma.used ? near_keys(spec) : 0,
        .num_units = cuda ? a->ctx->cuda.num_sms : 0,
        .alone = cuda ? 2 : 0,
    };
    const int64_t enough = enough_split_rows(&s, spec, limits);
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

/* Does the kernel widen keys and values into scratch? */
static int widens_rows(const qkv_attention *a)
{
    return a->spec.features & QKV_FEATURE_ROPE || a->variant.num_params >= 0 ||
           qi_dtype_of(a->spec.dtype_kv) != QI_F32;
}

/* Lays out (arenas over memory) or measures (empty arenas) the workspace. */
static void bind_workspace(qkv_attention *a, qi_arena *plan, qi_arena *scratch)
{
    const qkv_attention_spec *s = &a->spec;
    const qkv_attention_limits *l = &a->limits;
    const uint64_t requests = (uint64_t)l->max_requests, workers = (uint64_t)l->max_workers;
    const uint64_t work = (uint64_t)max_work(&a->schedule, s, l), tokens = (uint64_t)l->max_tokens;
    const uint64_t groups = (uint64_t)max_groups(l), kv_heads = (uint64_t)s->num_kv_heads;
    const int levels = l->max_levels > 1;
    const uint64_t merges = levels || a->schedule.fixed_cuts ? work : workers;
    a->plan = (qi_plan){
        .header = qi_arena_take(plan, 1, sizeof(qi_plan_header)),
        .work_indptr = qi_arena_take(plan, workers + 1, sizeof(i32)),
        .work = qi_arena_take(plan, work, sizeof(qi_work)),
        .merge = qi_arena_take(plan, merges, sizeof(qi_merge)),
        .ticket = qi_arena_take(plan, merges, sizeof(i32)),
        .claims = qi_arena_take(plan, 2, sizeof(i32)),
        .groups = qi_arena_take(plan, groups, sizeof(qi_group)),
        .rows = qi_arena_take(plan, levels ? tokens : 0, sizeof(i32)),
        .row_merge = qi_arena_take(plan, levels ? (uint64_t)l->max_levels * tokens * kv_heads : 0,
                                   sizeof(i32)),
        .token_request = qi_arena_take(plan, tokens, sizeof(i32)),
        .qo_indptr = qi_arena_take(plan, requests + 1, sizeof(i32)),
        .kv_len = qi_arena_take(plan, requests, sizeof(i32)),
        .qo_pos = qi_arena_take(plan, requests, sizeof(i32)),
        .mask_first = qi_arena_take(plan, requests, sizeof(i32)),
        .pages = qi_arena_take(plan, (uint64_t)l->max_pages, sizeof(i32)),
        .o_partial = qi_arena_take(scratch, (uint64_t)l->max_split_rows,
                                   (uint64_t)s->head_dim_vo * sizeof(float)),
        .lse_partial = qi_arena_take(scratch, (uint64_t)l->max_split_rows, sizeof(float)),
        .max_tokens = l->max_tokens,
    };
    a->spare_groups = qi_arena_take(plan, groups, sizeof(qi_group));
    a->spare_rows = qi_arena_take(plan, levels ? tokens : 0, sizeof(i32));
    a->spans = qi_arena_take(plan, groups + 1, sizeof *a->spans);
    a->strips = qi_arena_take(plan, workers + 1, sizeof *a->strips);
    a->order = qi_arena_take(plan, levels ? requests : 0, sizeof(i32));
    a->mask_indptr = qi_arena_take(plan, s->mask == QKV_MASK_CUSTOM ? requests : 0, sizeof(i64));
    a->rope_turns = qi_arena_take(plan, (uint64_t)a->rope.num_pairs, sizeof(double));
    a->head_scales = qi_arena_take(plan, 3 * (uint64_t)s->num_qo_heads, sizeof(float));
    if (a->ctx->device.device_type == kDLCUDA) { /* blocks have shared memory */
        a->found = qi_arena_take(plan, 1, sizeof *a->found);
        return;
    }
    const i32 group = a->schedule.group_size;
    i64 floats = decode_scratch_floats(group, s->num_kv_heads, s->head_dim_qk, s->head_dim_vo,
                                       widens_rows(a));
    if (max_group_rows(l) > a->schedule.decode_rows) {
        const i64 prefill = prefill_scratch_floats(group, s->head_dim_qk, s->head_dim_vo);
        floats = floats > prefill ? floats : prefill;
    }
    a->scratch_stride = round_up(floats * (i64)sizeof(float), QI_ARENA_ALIGN);
    a->scratch = qi_arena_take(scratch, (uint64_t)num_tasks(a), (uint64_t)a->scratch_stride);
}

void qi_attention_bind(qkv_attention *a, char *plan, char *scratch)
{
    bind_workspace(a, &(qi_arena){.base = plan}, &(qi_arena){.base = scratch});
}

/* As many as can work at a time. */
static int32_t num_workers(const qkv_attention *a)
{
    if (a->ctx->device.device_type != kDLCUDA) return qkv_context_num_threads(a->ctx);
    return (a->wgmma.used ? 1 : a->cuda.blocks_per_sm) * a->ctx->cuda.num_sms;
}

/* Reads spec and limits, chooses a row and measures the workspace; binds nothing. */
static qkv_status prepare(qkv_context *ctx, const qkv_attention_spec *spec,
                          const qkv_attention_limits *limits, qkv_attention *a,
                          qkv_workspace_size *size)
{
    QI_REQUIRE_CONTEXT(ctx);
    *a = (qkv_attention){.ctx = ctx, .max_page = -1};
    QI_TRY(read_spec(spec, &a->spec, &a->rope));
    QI_TRY(qi_variant_read(a->spec.variant, &a->variant));
    QI_TRY(read_limits(&a->spec, limits, &a->limits));
    if (ctx->device.device_type == kDLCUDA) {
        qi_attention_cuda_configure(a);
        qi_attention_wgmma_configure(a);
    }
    QI_TRY(qi_select(ctx, qi_attention_kernels, a, &a->row));
    a->wgmma.used = strcmp(a->row->name, "attention.wgmma") == 0;
    a->cuda.is_reference = strcmp(a->row->name, "attention.cuda") == 0;
    QI_TRY(qi_select(ctx, qi_attention_levels_kernels, a, &a->levels_row));
    if (a->limits.max_workers == 0) a->limits.max_workers = num_workers(a);
    a->schedule = schedule_limits(a, &a->limits);
    QI_REQUIRE(!(a->variant.no_softmax && a->spec.flags & QKV_ATTENTION_HAS_SINK),
               "flags: expected no QKV_ATTENTION_HAS_SINK, since the variant has no softmax");
    const i64 work = max_work(&a->schedule, &a->spec, &a->limits);
    QI_REQUIRE(work <= MAX_INDEX, "max_tokens: expected at most 2^31 - 1 work items, got %lld",
               (long long)work);
    qi_arena plan = {NULL, 0}, scratch = {NULL, 0};
    bind_workspace(a, &plan, &scratch);
    *size = (qkv_workspace_size){
        .plan_bytes = plan.used,
        .scratch_bytes = scratch.used,
        .pinned_bytes = ctx->device.device_type == kDLCUDA
                            ? plan.used * (uint64_t)a->limits.plans_in_flight
                            : 0,
    };
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
    if (!reasons || reasons_bytes == 0 || status != QKV_OK) return status;
    reasons[0] = '\0';
    size_t at = 0;
    for (const qi_kernel *k = qi_attention_kernels; k->name && at < reasons_bytes; k++) {
        const char *reason = k->reject ? k->reject(&a) : NULL;
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
    QI_REQUIRE(out->reserved == 0, "workspace.reserved: expected 0, got %u",
               (unsigned)out->reserved);
    const struct {
        const char *name;
        const void *block;
        uint64_t bytes, needed;
    } parts[] = {{"plan", out->plan, out->plan_bytes, size->plan_bytes},
                 {"scratch", out->scratch, out->scratch_bytes, size->scratch_bytes},
                 {"pinned", out->pinned, out->pinned_bytes, size->pinned_bytes}};
    for (int i = 0; i < 3; i++) {
        if (i == 2 && parts[i].needed == 0) continue; /* the CPU's */
        QI_REQUIRE(parts[i].block && (uintptr_t)parts[i].block % QI_ARENA_ALIGN == 0,
                   "workspace.%s: expected a block aligned to %u bytes, got %p", parts[i].name,
                   QI_ARENA_ALIGN, parts[i].block);
        if (parts[i].bytes < parts[i].needed)
            QI_FAIL(QKV_ERR_MEMORY, "workspace.%s_bytes: expected at least %llu, got %llu",
                    parts[i].name, (unsigned long long)parts[i].needed,
                    (unsigned long long)parts[i].bytes);
    }
    const uintptr_t plan = (uintptr_t)out->plan, scratch = (uintptr_t)out->scratch;
    QI_REQUIRE(plan < scratch ? scratch - plan >= size->plan_bytes
                              : plan - scratch >= size->scratch_bytes,
               "workspace.scratch: expected a block apart from workspace.plan, got an overlap");
    return QKV_OK;
}

/* Puts the kernels that a variant was compiled to in place of the row's. */
static qkv_status compile_variant(qkv_context *ctx, qkv_attention *a)
{
    if (ctx->device.device_type == kDLCUDA) return qi_attention_cuda_compile(a);
    if (a->variant.num_params < 0) return QKV_OK;
    qi_cpu_kernel entries[2];
    QI_TRY(qi_variant_compile(ctx, &a->spec, &a->variant, entries));
    a->compiled[0] = *a->row;
    a->compiled[1] = *a->levels_row;
    for (int i = 0; i < 2; i++) a->compiled[i].cpu[ctx->cpu_level] = entries[i];
    return QKV_OK;
}

qkv_status qkv_attention_warm_up(qkv_context *ctx, const qkv_attention_spec *spec,
                                 const qkv_attention_limits *limits)
{
    qkv_attention a;
    qkv_workspace_size size;
    QI_TRY(prepare(ctx, spec, limits, &a, &size));
    return compile_variant(ctx, &a);
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
    QI_TRY(compile_variant(ctx, &prepared));

    const qkv_allocator *mem = &ctx->allocator;
    qkv_attention *a = mem->alloc(mem->user, sizeof *a, 64);
    if (!a) QI_FAIL(QKV_ERR_MEMORY, "attention: out of memory");
    *a = prepared;
    a->spec.variant = NULL; /* and rope: the caller's, copied */
    a->spec.rope = NULL;
    const int cuda = ctx->device.device_type == kDLCUDA;
    if (a->variant.num_params >= 0 && !cuda) {
        a->row = &a->compiled[0];
        a->levels_row = &a->compiled[1];
    }
    qkv_status status = QKV_OK;
    if (!workspace && cuda) {
        QI_TRY_OR(qi_attention_cuda_alloc(a, &size, &w), fail);
    } else if (!workspace) {
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
    qi_attention_bind(a, cuda ? w.pinned : w.plan, w.scratch);
    qi_plan_header *header = a->plan.header; /* NULL only where nothing is bound */
    if (header) *header = (qi_plan_header){.status = 0};
    if (a->rope.num_pairs > 0) qi_rope_turns(&a->rope, a->rope_turns);
    if (cuda) QI_TRY_OR(qi_attention_cuda_bind(a, &w), fail);
    *out = a;
    return QKV_OK;

fail:
    qkv_attention_destroy(a);
    return status;
}

void qkv_attention_destroy(qkv_attention *attention)
{
    if (!attention) return;
    const qkv_allocator *mem = &attention->ctx->allocator;
    const qkv_workspace *w = &attention->owned;
    if (attention->ctx->device.device_type == kDLCUDA) {
        qi_attention_cuda_free(attention);
        mem->free(mem->user, attention, sizeof *attention);
        return;
    }
    if (w->scratch) mem->free(mem->user, w->scratch, w->scratch_bytes);
    if (w->plan) mem->free(mem->user, w->plan, w->plan_bytes);
    mem->free(mem->user, attention, sizeof *attention);
}
