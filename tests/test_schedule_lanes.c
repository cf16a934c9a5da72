/* test_schedule_lanes.c - many lanes, here threads between barriers, write the bytes that one writes.
 *
 * The scheduler's text is compiled once more with a scan of this file's own, as a device will do.
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>

#include "ops/attention/schedule.h"
#include "support.h"

enum {
    MAX_LANES = 5,
    MAX_REQUESTS = 40,
    MAX_WORK = 4000,
    MAX_WORKERS = 16,
    MAX_TOKENS = MAX_REQUESTS * 60,
    MAX_HEADS = 3
};

static pthread_barrier_t barrier;
static i64 values[MAX_LANES];

static i64 scan_add(qi_lanes lanes, i64 value, i64 *total)
{
    values[lanes.id] = value;
    pthread_barrier_wait(&barrier);
    i64 below = 0;
    *total = 0;
    for (i32 i = 0; i < lanes.count; i++) {
        if (i < lanes.id) below += values[i];
        *total += values[i];
    }
    pthread_barrier_wait(&barrier);
    return below;
}

static i64 max_all(qi_lanes lanes, i64 value)
{
    i64 largest = value;
    values[lanes.id] = value;
    pthread_barrier_wait(&barrier);
    for (i32 i = 0; i < lanes.count; i++)
        if (values[i] > largest) largest = values[i];
    pthread_barrier_wait(&barrier);
    return largest;
}

#define QI_SCHEDULE_LANES
#define qi_schedule             schedule_in_lanes
#define qi_schedule_max_work    max_work_in_lanes
#define qi_schedule_split_rows  split_rows_in_lanes
#define qi_schedule_rows_needed rows_needed_in_lanes
#include "ops/attention/schedule.c"
#undef qi_schedule
#undef qi_schedule_max_work
#undef qi_schedule_split_rows
#undef qi_schedule_rows_needed
void qi_schedule(qi_lanes lanes, const qi_lengths *in, const qi_limits *limits, const qi_plan *out);
i64 qi_schedule_max_work(const qi_limits *limits, i64 max_tokens, i64 max_requests, i64 max_qo_len);
i64 qi_schedule_split_rows(const qi_limits *limits, i64 max_qo_len);
i64 qi_schedule_rows_needed(const qi_lengths *in, const qi_limits *limits);

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

typedef struct lane {
    qi_lanes lanes;
    const qi_lengths *in;
    const qi_limits *limits;
    const qi_plan *out;
} lane;

static void *run_lane(void *arg)
{
    const lane *l = arg;
    schedule_in_lanes(l->lanes, l->in, l->limits, l->out);
    return NULL;
}

static void run_lanes(i32 count, const qi_lengths *in, const qi_limits *limits, const qi_plan *out)
{
    pthread_t threads[MAX_LANES];
    lane lanes[MAX_LANES];
    assert_int_equal(pthread_barrier_init(&barrier, NULL, (unsigned)count), 0);
    for (i32 i = 0; i < count; i++) {
        lanes[i] = (lane){{i, count}, in, limits, out};
        assert_int_equal(pthread_create(&threads[i], NULL, run_lane, &lanes[i]), 0);
    }
    for (i32 i = 0; i < count; i++) pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&barrier);
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
            .fixed_cuts = test_below(4) == 0,
            .max_split_rows = test_below(3) ? 1 << 20 : test_below(200),
        };
        if (limits.fixed_cuts) limits.cut_align = 512;
        i32 tokens = 0;
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
                               .num_levels = levels};
        if (qi_schedule_max_work(&limits, tokens, requests, 60) + requests * 40 > MAX_WORK)
            continue;
        const i64 needed = qi_schedule_rows_needed(&in, &limits);
        if (needed > limits.max_split_rows || needed > MAX_WORK) continue;
        qi_plan out = plan_of(&one);
        qi_schedule((qi_lanes){0, 1}, &in, &limits, &out);
        out = plan_of(&many);
        run_lanes(2 + (i32)test_below(MAX_LANES - 1), &in, &limits, &out);
        assert_memory_equal(&one, &many, sizeof one);
        merges += one.header.num_merges > 1;
    }
    assert_true(merges > 10); /* enough of the batches exercise more than the plain walk */
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(schedule_in_many_lanes_gives_the_bytes_of_one),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
