/* lanes.h - the planner's text once more, in many lanes, which are threads between barriers, as a block of a
 * GPU runs it: functions of groups.c and schedule.c with _in_lanes at their ends, and device_plan().
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_LANES_H
#define QKV_TESTS_LANES_H

#include <pthread.h>

#define QI_LANES
#include "ops/attention/lanes.h"
#include "support.h"

enum { MAX_LANES = 5 };

static pthread_barrier_t lanes_barrier;
static i64 lanes_values[MAX_LANES];

static void lanes_sync(qi_lanes lanes)
{
    (void)lanes;
    pthread_barrier_wait(&lanes_barrier);
}

static i64 lanes_min(qi_lanes lanes, i64 value);

static void lanes_add(qi_lanes lanes, i64 *sums, i64 *totals, i64 *most)
{
    for (int k = 0; k < NUM_MOST; k++) most[k] = -lanes_min(lanes, -most[k]);
    for (int k = 0; k < NUM_SUMS; k++) {
        lanes_values[lanes.id] = sums[k];
        lanes_sync(lanes);
        sums[k] = totals[k] = 0;
        for (i32 i = 0; i < lanes.count; i++) {
            if (i < lanes.id) sums[k] += lanes_values[i];
            totals[k] += lanes_values[i];
        }
        lanes_sync(lanes);
    }
}

static i64 lanes_min(qi_lanes lanes, i64 value)
{
    i64 least = value;
    lanes_values[lanes.id] = value;
    lanes_sync(lanes);
    for (i32 i = 0; i < lanes.count; i++)
        if (lanes_values[i] < least) least = lanes_values[i];
    lanes_sync(lanes);
    return least;
}

static int lanes_any(qi_lanes lanes, int value)
{
    return lanes_min(lanes, -(i64)(value != 0)) != 0;
}

static i64 lanes_sum(qi_lanes lanes, i64 value)
{
    i64 sum = 0;
    lanes_values[lanes.id] = value;
    lanes_sync(lanes);
    for (i32 i = 0; i < lanes.count; i++) sum += lanes_values[i];
    lanes_sync(lanes);
    return sum;
}

static pthread_mutex_t lanes_lock = PTHREAD_MUTEX_INITIALIZER;

static void lanes_lower(i64 *at, i64 value)
{
    pthread_mutex_lock(&lanes_lock);
    if (value < *at) *at = value;
    pthread_mutex_unlock(&lanes_lock);
}

static void lanes_raise(i64 *at, i64 value)
{
    pthread_mutex_lock(&lanes_lock);
    if (value > *at) *at = value;
    pthread_mutex_unlock(&lanes_lock);
}

static void lanes_lower32(i32 *at, i32 value)
{
    pthread_mutex_lock(&lanes_lock);
    if (value < *at) *at = value;
    pthread_mutex_unlock(&lanes_lock);
}

#define qi_schedule             schedule_in_lanes
#define qi_schedule_nothing     schedule_nothing_in_lanes
#define qi_schedule_max_work    schedule_max_work_in_lanes
#define qi_schedule_split_rows  schedule_split_rows_in_lanes
#define qi_schedule_rows_needed schedule_rows_needed_in_lanes
#define qi_groups_by_level      groups_by_level_in_lanes
#define qi_copy_requests        copy_requests_in_lanes
#include "ops/attention/groups.c"
#include "ops/attention/schedule.c"

#include "ops/attention/planner.h"
#undef qi_schedule
#undef qi_schedule_nothing
#undef qi_schedule_max_work
#undef qi_schedule_split_rows
#undef qi_schedule_rows_needed
#undef qi_groups_by_level
#undef qi_copy_requests

typedef struct lane {
    qi_lanes lanes;
    void (*body)(qi_lanes lanes, void *user);
    void *user;
} lane;

static void *run_lane(void *arg)
{
    const lane *l = arg;
    l->body(l->lanes, l->user);
    return NULL;
}

static void run_lanes(i32 count, void (*body)(qi_lanes lanes, void *user), void *user)
{
    pthread_t threads[MAX_LANES];
    lane lanes[MAX_LANES];
    assert_int_equal(pthread_barrier_init(&lanes_barrier, NULL, (unsigned)count), 0);
    for (i32 i = 0; i < count; i++) {
        lanes[i] = (lane){{i, count}, body, user};
        assert_int_equal(pthread_create(&threads[i], NULL, run_lane, &lanes[i]), 0);
    }
    for (i32 i = 0; i < count; i++) pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&lanes_barrier);
}

#endif
