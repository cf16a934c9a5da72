/* test_schedule_claims.c - plans for workers that take items as they come free: tiles of levels in equal pieces, and
 * heads of short prompts in turns.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdbool.h>

#include "ops/attention/schedule.h"
#include "support.h"

enum { MAX_GROUPS = 600, MAX_TOKENS = 2048, MAX_HEADS = 8, MAX_WORKERS = 300, MAX_WORK = 40000 };

typedef struct trial {
    qi_limits limits;
    qi_lengths in;
    i32 num_shared, shared_last; /* groups of the shared level; do they follow the others? */
    qi_group groups[MAX_GROUPS];
    qi_span spans[MAX_GROUPS + 1];
    qi_strip strips[MAX_WORKERS + 1];
    qi_plan_header header;
    qi_work work[MAX_WORK];
    qi_merge merge[MAX_WORK];
    i32 work_indptr[MAX_WORKERS + 1], ticket[MAX_WORK], row_merge[2 * MAX_TOKENS * MAX_HEADS];
} trial;

static trial t;

static i32 rows_of_one(i32 n)
{
    (void)n;
    return 1;
}

static i32 any_rows(i32 n)
{
    return 1 + (i32)test_below(n);
}

/* Shared groups of so many requests each, which have some rows and own keys each. */
static void make_groups(i32 shared, i32 members, i32 shared_len, i32 own_len, i32 (*rows)(i32))
{
    const i32 requests = shared * members;
    qi_group *above = t.groups + (t.shared_last ? requests : 0);
    qi_group *own = t.groups + (t.shared_last ? 0 : shared);
    i32 row = 0;
    for (i32 r = 0; r < requests; r++) {
        qi_group *g = &above[r / members];
        const i32 n = rows(6);
        if (r % members == 0)
            *g = (qi_group){.row_begin = row,
                            .kv_len = shared_len,
                            .kv_head = -1,
                            .flags = QI_GROUP_MIXED,
                            .pos_first = shared_len,
                            .pos_last = shared_len + own_len};
        own[r] = (qi_group){.row_begin = row,
                            .num_rows = n,
                            .kv_len = own_len,
                            .kv_offset = shared_len,
                            .kv_head = -1,
                            .level = 1,
                            .request = r,
                            .pos_first = shared_len + own_len - n,
                            .pos_last = shared_len + own_len - 1};
        g->num_rows += n;
        row += n;
    }
    t.num_shared = shared;
    t.in = (qi_lengths){.groups = t.groups,
                        .num_groups = shared + requests,
                        .num_requests = requests,
                        .num_tokens = row,
                        .num_levels = 2,
                        .spans = t.spans,
                        .strips = t.strips};
    assert_true(row <= MAX_TOKENS && shared + requests <= MAX_GROUPS);
}

static void plan(void)
{
    const qi_plan out = {.header = &t.header,
                         .work_indptr = t.work_indptr,
                         .work = t.work,
                         .merge = t.merge,
                         .ticket = t.ticket,
                         .row_merge = t.row_merge,
                         .max_tokens = t.in.num_tokens};
    const i64 capacity =
        qi_schedule_max_work(&t.limits, t.in.num_tokens, t.in.num_groups, t.in.num_tokens);
    assert_true(capacity <= MAX_WORK);
    qi_schedule((qi_lanes){0, 1}, &t.in, &t.limits, &out);
    assert_true(t.header.num_work <= capacity);
}

/* Pieces from item i on of one tile: as long as each other, but for the last, between multiples of cut_align, with
 * partial rows one after another. Returns how many. */
static i32 check_pieces(i32 i, i64 *slot)
{
    const qi_work *w = &t.work[i];
    const i32 align = t.limits.cut_align,
              rows = w->num_rows * w->num_kv_heads * t.limits.group_size;
    const qi_merge *m = &t.merge[w->merge];
    const i32 n = m->num_pieces, kv_end = w[n - 1].kv_end;
    assert_int_equal(w->kv_begin, 0);
    assert_int_equal(m->slot, *slot);
    assert_int_equal(m->rows_per_piece, rows);
    for (i32 k = 0; k < n; k++) {
        assert_true(w[k].group == w->group && w[k].row_begin == w->row_begin &&
                    w[k].kv_head == w->kv_head && w[k].merge == w->merge);
        assert_int_equal(w[k].slot, *slot + (i64)k * rows);
        if (k > 0) assert_int_equal(w[k].kv_begin, w[k - 1].kv_end);
        if (k + 1 < n) assert_int_equal(w[k].kv_end, (k + 1) * w->kv_end);
        assert_true(w[k].kv_end == kv_end || w[k].kv_end % align == 0);
        assert_true(w[k].kv_end > w[k].kv_begin && w[k].kv_end - w[k].kv_begin <= w->kv_end);
    }
    assert_int_equal(kv_end, t.groups[w->group].kv_len); /* all is visible */
    *slot += (i64)n * rows;
    return n;
}

/* Checks all of a plan and counts the shared level's pieces. Rows, heads and keys come once each. */
static i32 check_plan(void)
{
    const qi_plan_header *h = &t.header;
    const i32 first = t.shared_last ? t.in.num_groups - t.num_shared : 0;
    i32 merges = 0, shared = 0, extra = 0;
    i64 slot = 0, rows = 0, wanted = 0;
    for (i32 i = 0; i < h->num_work; merges++) {
        const qi_work *w = &t.work[i];
        const bool of_shared = w->group >= first && w->group < first + t.num_shared;
        const i32 n = check_pieces(i, &slot);
        assert_int_equal(w->merge, merges);
        rows += w->num_rows * w->num_kv_heads;
        for (i32 k = i; k < i + n; k++)
            assert_true(of_shared == (k >= h->shared_begin && k < h->shared_begin + h->num_shared));
        shared += of_shared ? n : 0;
        extra += n - 1;
        i += n;
    }
    for (i32 g = 0; g < t.in.num_groups; g++)
        wanted += t.groups[g].num_rows * t.limits.num_kv_heads;
    assert_int_equal(rows, wanted);
    assert_int_equal(h->num_merges, merges);
    assert_int_equal(h->num_split_rows, slot);
    assert_true(slot <= t.limits.max_split_rows);
    assert_true(extra <= ROUNDS * t.limits.num_workers);
    assert_int_equal(t.work_indptr[0], 0);
    assert_int_equal(t.work_indptr[t.limits.num_workers], h->num_work);
    for (i32 w = 0; w < t.limits.num_workers; w++)
        assert_true(t.work_indptr[w] <= t.work_indptr[w + 1]);
    return shared;
}

/* As on an H100. */
static qi_limits limits_of_gpu(void)
{
    return (qi_limits){.num_workers = 132,
                       .num_kv_heads = 8,
                       .group_size = 4,
                       .decode_rows = 4,
                       .split_heads = 1,
                       .tile_rows = 32,
                       .causal = 1,
                       .window_left = -1,
                       .window_right = -1,
                       .cut_align = 128,
                       .cost_visit = 40000,
                       .cost_key = 300,
                       .cost_pair = 1,
                       .cost_piece = 200000,
                       .cost_cut = 39000,
                       .cost_cut_prefill = 500000,
                       .num_units = 132,
                       .max_split_rows = 1 << 30};
}

static void schedule_gives_each_worker_a_shared_piece(void **state)
{
    (void)state;
    static const struct {
        const char *why;
        i32 shared, members, shared_len, own_len, pieces, longest;
    } rows[] = {
        {"8 tiles, 16 pieces each", 1, 16, 8192, 128, 128, 512},
        {"16 tiles, 8 pieces each", 1, 64, 8192, 128, 128, 1024},
        {"64 tiles, 2 pieces each", 1, 256, 32768, 128, 128, 16384},
        {"64 tiles of 4 groups", 4, 64, 8192, 128, 128, 4096},
        {"120 tiles: one each", 1, 480, 32768, 128, 120, 32768},
        {"136 tiles, more than workers: all take several", 1, 544, 32768, 128, 408,
         10923 / 128 * 128 + 128},
        {"short ones stay whole beside long own keys", 1, 64, 512, 4096, 16, 512},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        t.limits = limits_of_gpu();
        t.shared_last = 0;
        make_groups(rows[i].shared, rows[i].members, rows[i].shared_len, rows[i].own_len,
                    rows_of_one);
        plan();
        const i32 pieces = check_plan();
        if (pieces != rows[i].pieces || t.work[0].kv_end != rows[i].longest)
            fail_msg("%s: %d pieces of %d keys", rows[i].why, (int)pieces, (int)t.work[0].kv_end);
    }
}

static void schedule_cuts_any_levels_into_equal_pieces(void **state)
{
    (void)state;
    int cut = 0, whole = 0;
    for (int i = 0; i < 500; i++) {
        t.limits = limits_of_gpu();
        t.limits.num_workers = 1 + (i32)test_below(MAX_WORKERS);
        t.limits.num_kv_heads = 1 + (i32)test_below(MAX_HEADS);
        t.limits.group_size = 1 + (i32)test_below(8);
        t.limits.tile_rows = 128 / t.limits.group_size;
        t.limits.cut_align = test_below(2) ? 128 : 80;
        t.limits.cost_key = (i32)test_below(400);
        t.limits.cost_piece = 1 + test_below(400000);
        t.shared_last = (i32)test_below(2);
        make_groups(any_rows(6), any_rows(60), 1 + (i32)test_below(test_below(2) ? 40000 : 500),
                    8 + (i32)test_below(test_below(4) ? 300 : 9000), any_rows);
        const i64 needed = qi_schedule_rows_needed(&t.in, &t.limits);
        if (test_below(3) == 0) /* too few to cut anything */
            t.limits.max_split_rows = needed;
        else
            t.limits.max_split_rows = needed + qi_schedule_split_rows(&t.limits, t.in.num_tokens);
        plan();
        assert_int_equal(t.header.status, 0);
        check_plan();
        const bool is_cut = t.header.num_split_rows > needed;
        if (t.limits.max_split_rows == needed) assert_false(is_cut);
        cut += is_cut, whole += !is_cut;
    }
    assert_true(cut > 50 && whole > 50);
}

/* ---- heads in turns --------------------------------------------------------------------------- */

/* Requests of one level, the first so many of them prompts, the others decodes of 4096 keys. */
static void make_requests(i32 requests, i32 prompts, i32 (*rows)(i32), i32 most)
{
    i32 row = 0;
    for (i32 r = 0; r < requests; r++) {
        const i32 n = r < prompts ? rows(most) : 1, kv_len = r < prompts ? n : 4096;
        t.groups[r] = (qi_group){.row_begin = row,
                                 .num_rows = n,
                                 .kv_len = kv_len,
                                 .kv_head = -1,
                                 .flags = QI_GROUP_ALONE,
                                 .request = r,
                                 .pos_first = kv_len - n,
                                 .pos_last = kv_len - 1};
        row += n;
    }
    t.num_shared = 0;
    t.in = (qi_lengths){.groups = t.groups,
                        .num_groups = requests,
                        .num_requests = requests,
                        .num_tokens = row,
                        .num_levels = 1,
                        .spans = t.spans,
                        .strips = t.strips};
}

static i32 all_rows(i32 n)
{
    return n;
}

static int by_line(const void *a, const void *b)
{
    const qi_work *x = a, *y = b;
    if (x->group != y->group) return x->group < y->group ? -1 : 1;
    if (x->kv_head != y->kv_head) return x->kv_head < y->kv_head ? -1 : 1;
    if (x->row_begin != y->row_begin) return x->row_begin < y->row_begin ? -1 : 1;
    return x->kv_begin < y->kv_begin ? -1 : x->kv_begin > y->kv_begin;
}

/* Plans without turns and with them: the same items in another order, of each group's heads, so many together, from the
 * last to the first no tile longer than the one before. */
static void check_turns(i32 near_keys)
{
    static qi_work line[MAX_WORK];
    static qi_merge merge[MAX_WORK];
    t.limits.near_keys = 0;
    plan();
    const qi_plan_header h = t.header;
    memcpy(line, t.work, (size_t)h.num_work * sizeof *line);
    memcpy(merge, t.merge, (size_t)h.num_merges * sizeof *merge);
    t.limits.near_keys = near_keys;
    plan();
    assert_memory_equal(&h, &t.header, sizeof h);
    assert_memory_equal(merge, t.merge, (size_t)h.num_merges * sizeof *merge);
    const bool whole =
        t.limits.cost_cut_prefill > 1; /* else some may be cut: then the line's order stays */
    for (i32 i = 1; i < h.num_work && whole; i++) {
        const qi_work *w = &t.work[i], *before = w - 1;
        const i32 kv_len = t.groups[w->group].kv_len;
        const i32 together = near_keys / kv_len > 1 ? near_keys / kv_len : 1;
        if (w->flags == QI_TILE_PREFILL && w->group == before->group &&
            w->kv_head / together == before->kv_head / together)
            assert_true(w->kv_end >= before->kv_end);
    }
    qsort(t.work, (size_t)h.num_work, sizeof *t.work, by_line);
    qsort(line, (size_t)h.num_work, sizeof *line, by_line);
    assert_memory_equal(line, t.work, (size_t)h.num_work * sizeof *line);
}

static void schedule_lets_heads_take_turns(void **state)
{
    (void)state;
    t.limits = limits_of_gpu();
    make_requests(1, 1, all_rows, 1024);
    check_turns(8192); /* all heads */
    check_turns(3072); /* three of them, and two at the end */
    check_turns(1023); /* none */
    for (int i = 0; i < 300; i++) {
        t.limits = limits_of_gpu();
        t.limits.num_workers = 1 + (i32)test_below(MAX_WORKERS);
        t.limits.num_kv_heads = 1 + (i32)test_below(MAX_HEADS);
        t.limits.cost_cut_prefill = test_below(2) ? 1 : 500000;
        t.limits.max_split_rows = test_below(3) ? 1 << 30 : test_below(5000);
        const i32 prompts = (i32)test_below(6);
        make_requests(prompts + (i32)test_below(6), prompts, any_rows, 300);
        check_turns((i32)test_below(5000));
    }
}

static void schedule_says_who_takes_what(void **state)
{
    (void)state;
    static const struct {
        const char *why;
        i32 requests, prompts, rows;
        bool claims, cut, claimed;
    } rows[] = {
        {"strips of a few tiles that were cut", 20, 0, 0, true, true, false},
        {"many of them", 100, 0, 0, true, true, true},
        {"whole tiles", 66, 66, 64, true, false, true},
        {"whole prompts among a few cut decodes", 21, 1, 300, true, true, true},
        {"workers that do not", 66, 66, 64, false, false, false},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        t.limits = limits_of_gpu();
        if (!rows[i].claims) t.limits.cost_cut_prefill = 0;
        make_requests(rows[i].requests, rows[i].prompts, all_rows, rows[i].rows);
        plan();
        if ((t.header.num_merges > 0) != rows[i].cut || t.header.claimed != rows[i].claimed)
            fail_msg("%s: %d merges, claimed %d", rows[i].why, (int)t.header.num_merges,
                     (int)t.header.claimed);
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(schedule_lets_heads_take_turns),
        cmocka_unit_test(schedule_says_who_takes_what),
        cmocka_unit_test(schedule_gives_each_worker_a_shared_piece),
        cmocka_unit_test(schedule_cuts_any_levels_into_equal_pieces),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
