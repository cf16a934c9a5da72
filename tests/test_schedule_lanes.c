/* test_schedule_lanes.c - many lanes write the bytes that one writes: the scheduler alone under all limits, and
 * all of the planner that a GPU runs against the plan that the host made of the same batch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_case_random.h"
#include "lanes.h"
#include "plan_bytes.h"

enum {
    MAX_REQUESTS = 40,
    MAX_WORK = 4000,
    MAX_WORKERS = 16,
    MAX_TOKENS = MAX_REQUESTS * 60,
    MAX_HEADS = 3
};

/* The library's own, which has one lane. */
void qi_schedule(qi_lanes lanes, const qi_lengths *in, const qi_limits *limits, const qi_plan *out);

static void one_schedule(const qi_lengths *in, const qi_limits *limits, const qi_plan *out)
{
    qi_schedule((qi_lanes){0, 1}, in, limits, out);
}

/* What a schedule writes; all of it compared. */
typedef struct output {
    qi_plan_header header;
    i32 work_indptr[MAX_WORKERS + 1], ticket[MAX_WORK];
    qi_work work[MAX_WORK];
    qi_merge merge[MAX_WORK];
    i32 row_merge[2 * MAX_TOKENS * MAX_HEADS];
} output;

static qi_plan plan_of(output *o)
{
    memset(o, 0x5a, sizeof *o);
    return (qi_plan){.header = &o->header,
                     .work_indptr = o->work_indptr,
                     .work = o->work,
                     .merge = o->merge,
                     .ticket = o->ticket,
                     .row_merge = o->row_merge,
                     .max_tokens = MAX_TOKENS};
}

typedef struct call {
    const qi_lengths *in;
    const qi_limits *limits;
    const qi_plan *out;
} call;

static void schedule(qi_lanes lanes, void *user)
{
    const call *c = user;
    schedule_in_lanes(lanes, c->in, c->limits, c->out);
}

static void schedule_in_many_lanes_gives_the_bytes_of_one(void **state)
{
    (void)state;
    static output one, many;
    int merges = 0;
    for (int trial = 0; trial < 150; trial++) {
        qi_limits limits = {
            .num_workers = 1 + (i32)test_below(MAX_WORKERS),
            .num_kv_heads = 1 + (i32)test_below(MAX_HEADS),
            .group_size = 1 + (i32)test_below(4),
            .decode_rows = (i32)test_below(5),
            .split_heads = (i32)test_below(2),
            .tile_rows = 1 + (i32)test_below(40),
            .causal = (i32)test_below(2),
            .window_left = test_below(3) ? -1 : (i32)test_below(100),
            .window_right = -1,
            .cut_align = 1 << test_below(7),
            .cost_visit = (i32)test_below(100),
            .cost_key = 1 + (i32)test_below(5),
            .cost_pair = 1,
            .cost_strip = test_below(2) ? 0 : test_below(5000),
            .cost_piece = test_below(2) ? 0 : 1 + test_below(1000),
            .near_keys = (i32)test_below(3) * 1000,
            .cost_cut = test_below(2) ? 0 : 1 + test_below(2000),
            .num_units = 1 + (i32)test_below(MAX_WORKERS),
            .alone = (i32)test_below(4),
            .fixed_cuts = test_below(4) == 0,
            .max_split_rows = test_below(3) ? 1 << 20 : test_below(200),
        };
        if (limits.fixed_cuts) limits.cut_align = 512;
        if (limits.near_keys > 0) limits.cost_cut_prefill = 1 + test_below(20000);
        i32 tokens = 0;
        qi_span spans[MAX_REQUESTS + 1];
        qi_strip begins[MAX_WORKERS + 1];
        qi_group groups[MAX_REQUESTS];
        const i32 levels = 1 + (i32)test_below(2);
        const i32 requests = (i32)test_below(MAX_REQUESTS);
        for (i32 r = 0; r < requests; r++) {
            const i32 qo_len = (i32)(test_below(3) ? test_below(4) : test_below(60));
            const i32 kv_len = qo_len + (i32)(test_below(8) ? test_below(300) : test_below(20000));
            groups[r] = (qi_group){.row_begin = tokens,
                                   .num_rows = qo_len,
                                   .kv_len = kv_len,
                                   .kv_head = -1,
                                   .level = (u8)test_below(levels),
                                   .flags = levels == 1 || test_below(2) ? QI_GROUP_ALONE : 0,
                                   .request = r,
                                   .pos_first = kv_len - qo_len,
                                   .pos_last = kv_len - 1};
            tokens += qo_len;
        }
        const qi_lengths in = {.groups = groups,
                               .num_groups = requests,
                               .num_requests = requests,
                               .num_tokens = tokens,
                               .num_levels = levels,
                               .spans = spans,
                               .strips = begins};
        if (schedule_max_work_in_lanes(&limits, tokens, requests, 60) + requests * 40 > MAX_WORK)
            continue;
        const i64 needed = schedule_rows_needed_in_lanes(&in, &limits);
        if (needed > limits.max_split_rows || needed > MAX_WORK) continue;
        qi_plan out = plan_of(&one);
        one_schedule(&in, &limits, &out);
        out = plan_of(&many);
        run_lanes(2 + (i32)test_below(MAX_LANES - 1), schedule, &(call){&in, &limits, &out});
        assert_memory_equal(&one, &many, sizeof one);
        merges += one.header.num_merges > 1;
    }
    assert_true(merges > 10); /* enough of the batches exercise more than the plain walk */
}

/* ---- all of it ---------------------------------------------------------------------------- */

/* A plan in one block, from the sizes that an operator's has. */
typedef struct block {
    qi_plan plan;
    i64 *mask_indptr;
    qi_span *spans;
    qi_strip *strips;
    char *memory;
} block;

static void *take(block *b, size_t *used, i64 count, size_t bytes)
{
    void *at = b->memory + *used;
    *used += ((size_t)count * bytes + 63) / 64 * 64;
    return at;
}

static block block_new(const qkv_attention *a, i64 max_work)
{
    enum { BYTES = 8 << 20 };
    const qkv_attention_limits *l = &a->limits;
    const i64 tokens = l->max_tokens, requests = l->max_requests, levels = l->max_levels;
    block b = {.memory = aligned_alloc(64, BYTES)};
    assert_non_null(b.memory);
    memset(b.memory, 0x5a, BYTES);
    size_t used = 0;
    b.plan = a->plan; /* scratch and the sizes */
    b.plan.header = take(&b, &used, 1, sizeof(qi_plan_header));
    b.plan.work_indptr = take(&b, &used, l->max_workers + 1, sizeof(i32));
    b.plan.work = take(&b, &used, max_work, sizeof(qi_work));
    b.plan.merge = take(&b, &used, max_work, sizeof(qi_merge));
    b.plan.ticket = take(&b, &used, max_work, sizeof(i32));
    b.plan.groups = take(&b, &used, requests * levels, sizeof(qi_group));
    b.plan.rows = take(&b, &used, tokens, sizeof(i32));
    b.plan.row_merge = take(&b, &used, levels * tokens * a->spec.num_kv_heads, sizeof(i32));
    b.plan.token_request = take(&b, &used, tokens, sizeof(i32));
    b.plan.qo_indptr = take(&b, &used, requests + 1, sizeof(i32));
    b.plan.kv_len = take(&b, &used, requests, sizeof(i32));
    b.plan.qo_pos = take(&b, &used, requests, sizeof(i32));
    b.plan.mask_first = take(&b, &used, requests, sizeof(i32));
    b.plan.pages = take(&b, &used, 0, sizeof(i32));
    b.mask_indptr = take(&b, &used, requests, sizeof(i64));
    b.spans = take(&b, &used, requests * levels + 1, sizeof(qi_span));
    b.strips = take(&b, &used, l->max_workers + 1, sizeof(qi_strip));
    assert_true(used < BYTES);
    return b;
}

static const i32 *ints_of(const DLTensor *t)
{
    return t ? (const i32 *)qi_data(t) : NULL;
}

/* A batch as the device's planner gets it. */
static plan_params params_of(const qkv_attention *a, const qkv_attention_batch *b, const block *out)
{
    plan_params p = {.limits = a->schedule,
                     .plan = out->plan,
                     .mask_indptr = out->mask_indptr,
                     .spans = out->spans,
                     .strips = out->strips,
                     .max_tokens = a->limits.max_tokens,
                     .max_qo_len = a->limits.max_qo_len,
                     .max_kv_len = a->limits.max_kv_len,
                     .max_pages = a->limits.max_pages};
    batch_view *view = &p.batch;
    view->num_levels = b->num_levels;
    view->in_place = 1;
    view->pages_at = (i64)out->plan.pages;
    for (i32 l = 0; l < b->num_levels; l++) {
        const qkv_kv_index *in = &b->levels[l];
        qi_kv_view *v = &view->level[l];
        v->num_requests = in->qo_indptr->shape[0] - 1;
        v->page_size = a->spec.page_size;
        v->qo_indptr = ints_of(in->qo_indptr);
        v->kv_indptr = ints_of(in->kv_indptr);
        v->kv_indices = ints_of(in->kv_indices);
        v->kv_last_page_len = ints_of(in->kv_last_page_len);
        v->block_table = ints_of(in->block_table);
        v->kv_lens = ints_of(in->kv_lens);
        if (in->block_table) v->block_table_stride = qi_stride(in->block_table, 0);
        v->num_entries = in->block_table  ? in->block_table->shape[1]
                         : in->kv_indices ? in->kv_indices->shape[0]
                                          : 0;
    }
    view->qo_pos = ints_of(b->qo_pos);
    if (b->mask_bits) {
        view->mask_bits = qi_data(b->mask_bits);
        view->mask_indptr = qi_data(b->mask_indptr);
        view->num_mask_bytes = b->mask_bits->shape[0];
    }
    return p;
}

static void plan_in_lanes(qi_lanes lanes, void *user)
{
    const plan_params *p = user;
    const plan_room room = {.groups = p->plan.groups, .spans = p->spans, .strips = p->strips};
    device_plan(lanes, p, &room);
}

static void lanes_plan_a_batch_as_the_host_does(void **state)
{
    (void)state;
    const any_features features = {.custom_mask = 4, .invariant = 4, .levels = 2};
    qkv_context *ctx;
    EXPECT_OK(qkv_context_create(&(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT}, &ctx));
    for (int64_t i = 0; i < case_count(2000); i++) {
        const case_config config = any_config(any_spec(&features), &features);
        attn_case c;
        case_build_index(&c, &config);
        qkv_attention *a;
        EXPECT_OK(qkv_attention_create(ctx, &c.config.spec, &c.limits, NULL, &a));
        EXPECT_OK(qkv_attention_plan(a, &c.batch, NULL));
        const block out = block_new(a, a->plan.header->num_work + 1);
        plan_params p = params_of(a, &c.batch, &out);
        run_lanes(2 + (i32)test_below(MAX_LANES - 1), plan_in_lanes, &p);
        expect_same_plan(a, &a->plan, &out.plan, num_groups_of(&c.batch), i);
        free(out.memory);
        qkv_attention_destroy(a);
        case_free_index(&c);
    }
    qkv_context_destroy(ctx);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(schedule_in_many_lanes_gives_the_bytes_of_one),
        cmocka_unit_test(lanes_plan_a_batch_as_the_host_does),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
