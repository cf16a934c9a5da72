/* test_schedule.c - the scheduler's promises on thousands of random and adversarial batches.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdbool.h>

#include "ops/attention/schedule.h"
#include "support.h"

enum { GUARD = 3 }; /* entries behind each output that nobody may touch */

/* One call: inputs, outputs in blocks of exactly the documented capacity, and the account of it. */
typedef struct trial {
    const char *why;
    qi_limits limits;
    qi_lengths in;
    i32 *qo_indptr, *kv_len, *qo_pos;
    qi_group *groups; /* one a request */
    i64 max_qo_len, max_work;
    bool enough; /* partial rows for every cut */
    qi_plan out;
} trial;

static void *allocate(i64 n, size_t bytes)
{
    void *p = malloc((size_t)(n + GUARD) * bytes);
    assert_non_null(p);
    memset(p, 0x5a, (size_t)(n + GUARD) * bytes);
    return p;
}

static void expect_guard(const trial *t, const void *p, i64 n, size_t bytes, const char *what)
{
    const unsigned char *guard = (const unsigned char *)p + (size_t)n * bytes;
    for (size_t i = 0; i < GUARD * bytes; i++)
        if (guard[i] != 0x5a) fail_msg("%s: %s: written past its capacity", t->why, what);
}

static void trial_print(const trial *t)
{
    const qi_limits *l = &t->limits;
    fprintf(stderr,
            "%s: %d requests, %d rows; workers %d, heads %d x %d, decode_rows %d, tile_rows %d, "
            "causal %d, window %d/%d, align %d, costs %d %d %d strip %lld, split rows %lld\n",
            t->why, t->in.num_requests, t->qo_indptr[t->in.num_requests], l->num_workers,
            l->num_kv_heads, l->group_size, l->decode_rows, l->tile_rows, l->causal, l->window_left,
            l->window_right, l->cut_align, l->cost_visit, l->cost_key, l->cost_pair,
            (long long)l->cost_strip, (long long)l->max_split_rows);
    for (i32 r = 0; r < t->in.num_requests && r < 20; r++)
        fprintf(stderr, " %d:%d@%d", t->qo_indptr[r + 1] - t->qo_indptr[r], t->kv_len[r],
                t->qo_pos[r]);
    fprintf(stderr, "\n");
}

#define CHECK(t, condition, ...)                                                                   \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            trial_print(t);                                                                        \
            fail_msg(__VA_ARGS__);                                                                 \
        }                                                                                          \
    } while (0)

/* ---- the account of a schedule, from its work list alone ---------------------------------- */

static i64 cost_of(const qi_limits *l, i64 heads, i64 rows, i64 keys)
{
    return l->cost_visit + heads * keys * (l->cost_key + rows * l->group_size * (i64)l->cost_pair);
}

/* A tile that the walk expects next. */
typedef struct tile {
    i32 request, row_begin, num_rows, kv_head, num_kv_heads, flags, kv_begin, kv_end;
} tile;

/* The tiles in their documented order; false past the last. */
static bool next_tile(const trial *t, tile *x)
{
    const qi_limits *l = &t->limits;
    i32 r = x->request, end = r < 0 ? 0 : t->qo_indptr[r + 1];
    i32 row = x->row_begin + x->num_rows, head = x->kv_head;
    if (r >= 0 && row == end && x->num_kv_heads == 1 && head + 1 < l->num_kv_heads) {
        row = t->qo_indptr[r];
        head++;
    } else if (r < 0 || row == end) {
        do {
            if (++r == t->in.num_requests) return false;
        } while (t->qo_indptr[r + 1] == t->qo_indptr[r]);
        row = t->qo_indptr[r];
        end = t->qo_indptr[r + 1];
        head = 0;
    }
    const i32 n = end - t->qo_indptr[r];
    const bool decode = n <= l->decode_rows;
    *x = (tile){.request = r, .row_begin = row, .kv_head = head};
    x->num_rows = decode ? n : end - row < l->tile_rows ? end - row : l->tile_rows;
    x->num_kv_heads = decode && !l->split_heads ? l->num_kv_heads : 1;
    x->flags = decode ? QI_TILE_DECODE : QI_TILE_PREFILL;
    const i64 first = (i64)t->qo_pos[r] + row - t->qo_indptr[r];
    qi_visible(l, t->kv_len[r], first, first + x->num_rows - 1, &x->kv_begin, &x->kv_end);
    return true;
}

/* The sizes that bound a strip. */
typedef struct account {
    i64 total, num_tiles, largest_whole, largest_cut_step, largest_floor;
    i32 num_merges;
    i64 num_split_rows;
    bool any_prefill;
} account;

/* Checks that the pieces from work item i on are this tile, and returns how many they are. */
static i32 check_tile(const trial *t, const tile *x, i32 i, account *a)
{
    const qi_limits *l = &t->limits;
    const qi_work *w = t->out.work;
    i32 key = x->kv_begin, n = 0;
    const i64 step = cost_of(l, x->num_kv_heads, x->num_rows, 3 * (i64)l->cut_align);
    const i64 cost = cost_of(l, x->num_kv_heads, x->num_rows, x->kv_end - x->kv_begin);
    const qi_merge *m = &t->out.merge[a->num_merges];
    do {
        CHECK(t, i + n < t->out.header->num_work, "request %d: work ends early", x->request);
        const qi_work *p = &w[i + n];
        CHECK(
            t,
            p->group == x->request && p->row_begin == x->row_begin && p->num_rows == x->num_rows &&
                p->kv_head == x->kv_head && p->num_kv_heads == x->num_kv_heads &&
                p->flags == x->flags,
            "item %d: rows %d + %d of request %d, head %d, where rows %d + %d of %d, %d come next",
            i + n, p->row_begin, p->num_rows, p->group, p->kv_head, x->row_begin, x->num_rows,
            x->request, x->kv_head);
        CHECK(t, p->kv_begin == key && p->kv_end >= p->kv_begin && p->kv_end <= x->kv_end,
              "item %d: keys %d..%d, expected to go on from %d to at most %d", i + n, p->kv_begin,
              p->kv_end, key, x->kv_end);
        const bool whole = p->kv_begin == x->kv_begin && p->kv_end == x->kv_end;
        CHECK(t, (p->slot < 0) == whole, "item %d: slot %d", i + n, p->slot);
        if (!whole) {
            CHECK(t, p->kv_end - p->kv_begin >= l->cut_align, "item %d: a piece of %d keys", i + n,
                  p->kv_end - p->kv_begin);
            CHECK(t, p->kv_end == x->kv_end || p->kv_end % l->cut_align == 0,
                  "item %d: cut at key %d", i + n, p->kv_end);
            CHECK(t, p->slot == m->slot + n * m->rows_per_piece, "item %d: slot %d", i + n,
                  p->slot);
        }
        key = p->kv_end;
        n++;
    } while (key < x->kv_end);
    if (n > 1) {
        CHECK(t,
              m->row_begin == x->row_begin && m->num_rows == x->num_rows &&
                  m->kv_head == x->kv_head && m->num_kv_heads == x->num_kv_heads &&
                  m->num_pieces == n &&
                  m->rows_per_piece == x->num_rows * x->num_kv_heads * l->group_size,
              "merge %d does not fit its %d pieces", a->num_merges, n);
        CHECK(t, m->slot == a->num_split_rows, "merge %d: slot %d", a->num_merges, m->slot);
        CHECK(t, t->out.ticket[a->num_merges] == 0, "ticket %d is not clear", a->num_merges);
        a->num_split_rows += (i64)n * m->rows_per_piece;
        a->num_merges++;
        if (step > a->largest_cut_step) a->largest_cut_step = step;
    } else if (cost > a->largest_whole) {
        a->largest_whole = cost;
    }
    if ((cost < step ? cost : step) > a->largest_floor)
        a->largest_floor = cost < step ? cost : step;
    a->any_prefill = a->any_prefill || x->flags == QI_TILE_PREFILL;
    a->total += cost;
    a->num_tiles++;
    return n;
}

static void check_strips(const trial *t, const account *a)
{
    const qi_limits *l = &t->limits;
    const qi_plan_header *h = t->out.header;
    i64 n = l->num_workers;
    if (l->cost_strip > 0 && a->total / l->cost_strip < n) n = a->total / l->cost_strip;
    if (n < 1) n = 1;
    CHECK(t, h->num_strips == n, "expected %lld strips, got %d", (long long)n, h->num_strips);
    const i64 share = (a->total + n - 1) / n;
    const i64 largest =
        a->largest_whole > a->largest_cut_step ? a->largest_whole : a->largest_cut_step;
    const i64 eighth =
        a->any_prefill && a->largest_floor < share / 8 ? share / 8 : a->largest_floor;
    CHECK(t, t->out.work_indptr[0] == 0 && t->out.work_indptr[l->num_workers] == h->num_work,
          "work_indptr does not span the work");
    for (i32 w = 0; w < l->num_workers; w++) {
        const i32 begin = t->out.work_indptr[w], end = t->out.work_indptr[w + 1];
        CHECK(t, begin <= end && (w < n || begin == end), "strip %d: %d..%d", w, begin, end);
        i64 cost = 0;
        for (i32 i = begin; i < end; i++)
            cost += cost_of(l, t->out.work[i].num_kv_heads, t->out.work[i].num_rows,
                            t->out.work[i].kv_end - t->out.work[i].kv_begin);
        CHECK(t, cost <= share + largest + l->cost_visit,
              "strip %d costs %lld, where a share is %lld and the largest piece %lld", w,
              (long long)cost, (long long)share, (long long)largest);
        CHECK(t, !t->enough || cost <= share + eighth + l->cost_visit,
              "strip %d costs %lld, though a cut could bring it to %lld + %lld", w, (long long)cost,
              (long long)share, (long long)eighth);
    }
}

static void check_plan(const trial *t)
{
    const qi_plan *out = &t->out;
    const i64 workers = t->limits.num_workers;
    expect_guard(t, out->header, 1, sizeof *out->header, "header");
    expect_guard(t, out->work_indptr, workers + 1, sizeof(i32), "work_indptr");
    expect_guard(t, out->work, t->max_work, sizeof *out->work, "work");
    expect_guard(t, out->merge, workers - 1, sizeof *out->merge, "merge");
    expect_guard(t, out->ticket, workers - 1, sizeof(i32), "ticket");
    expect_guard(t, t->in.spans, t->in.num_groups + 1, sizeof(qi_span), "spans");
    expect_guard(t, t->in.strips, workers + 1, sizeof(qi_strip), "strips");
    account a = {0};
    i32 i = 0;
    tile x = {.request = -1};
    while (next_tile(t, &x)) i += check_tile(t, &x, i, &a);
    const qi_plan_header *h = out->header;
    CHECK(t, h->num_work == i, "%d work items, %d of them for tiles", h->num_work, i);
    CHECK(t, h->num_work <= t->max_work && h->num_merges <= workers - 1, "over capacity");
    CHECK(t, i - a.num_tiles <= workers - 1, "%lld extra pieces", (long long)(i - a.num_tiles));
    CHECK(t, h->num_merges == a.num_merges, "%d merges, %d needed", h->num_merges, a.num_merges);
    CHECK(t, h->num_split_rows == a.num_split_rows && a.num_split_rows <= t->limits.max_split_rows,
          "%lld partial rows, %lld needed", (long long)h->num_split_rows,
          (long long)a.num_split_rows);
    CHECK(t,
          h->status == 0 && h->num_requests == t->in.num_requests &&
              h->num_tokens == t->qo_indptr[t->in.num_requests],
          "header: status %d, %d requests, %d tokens", h->status, h->num_requests, h->num_tokens);
    check_strips(t, &a);
}

/* ---- running ------------------------------------------------------------------------------ */

static void trial_begin(trial *t, const char *why, i32 num_requests)
{
    memset(t, 0, sizeof *t);
    t->why = why;
    t->qo_indptr = allocate(num_requests + 1, sizeof(i32));
    t->kv_len = allocate(num_requests, sizeof(i32));
    t->qo_pos = allocate(num_requests, sizeof(i32));
    t->qo_indptr[0] = 0;
    t->groups = allocate(num_requests, sizeof(qi_group));
    t->in = (qi_lengths){
        .groups = t->groups, .num_levels = 1, .spans = allocate(num_requests + 1, sizeof(qi_span))};
}

static void trial_add(trial *t, i32 qo_len, i32 kv_len)
{
    const i32 r = t->in.num_requests++;
    t->qo_indptr[r + 1] = t->qo_indptr[r] + qo_len;
    t->kv_len[r] = kv_len;
    t->qo_pos[r] = kv_len - qo_len;
    if (qo_len > t->max_qo_len) t->max_qo_len = qo_len;
}

/* Keys at any offset: positions count from the request's first key. */
static void schedule(trial *t)
{
    t->in.num_groups = t->in.num_requests;
    t->in.num_tokens = t->qo_indptr[t->in.num_requests];
    for (i32 r = 0; r < t->in.num_requests; r++) {
        const i32 offset = r % 2 ? r * 31 + 7 : 0;
        const i32 rows = t->qo_indptr[r + 1] - t->qo_indptr[r];
        t->groups[r] = (qi_group){.row_begin = t->qo_indptr[r],
                                  .num_rows = rows,
                                  .kv_len = t->kv_len[r],
                                  .kv_offset = offset,
                                  .kv_head = -1,
                                  .flags = QI_GROUP_ALONE,
                                  .request = r,
                                  .pos_first = (i64)t->qo_pos[r] + offset,
                                  .pos_last = (i64)t->qo_pos[r] + offset + rows - 1};
    }
    qi_schedule((qi_lanes){.id = 0, .count = 1}, &t->in, &t->limits, &t->out);
}

static qi_plan new_plan(const trial *t)
{
    const i64 workers = t->limits.num_workers;
    return (qi_plan){.header = allocate(1, sizeof(qi_plan_header)),
                     .work_indptr = allocate(workers + 1, sizeof(i32)),
                     .work = allocate(t->max_work, sizeof(qi_work)),
                     .merge = allocate(workers - 1, sizeof(qi_merge)),
                     .ticket = allocate(workers - 1, sizeof(i32))};
}

static void free_plan(qi_plan *p)
{
    free(p->header), free(p->work_indptr), free(p->work), free(p->merge), free(p->ticket);
}

/* Schedules twice into different memory, and checks. split_rows < 0: as many as there can be. */
static void trial_plan(trial *t, i64 split_rows)
{
    const i64 max_qo_len = t->max_qo_len > 0 ? t->max_qo_len : 1;
    const i64 most = qi_schedule_split_rows(&t->limits, max_qo_len);
    t->limits.max_split_rows = split_rows < 0 ? most : split_rows;
    t->enough = t->limits.max_split_rows >= most;
    t->max_work = qi_schedule_max_work(&t->limits, t->qo_indptr[t->in.num_requests],
                                       t->in.num_requests, max_qo_len);
    t->in.strips = allocate(t->limits.num_workers + 1, sizeof(qi_strip));
    t->out = new_plan(t);
    schedule(t);
}

/* Plans twice, and checks the plan. */
static void trial_end(trial *t, i64 split_rows)
{
    trial_plan(t, split_rows);
    check_plan(t);
    qi_plan first = t->out;
    t->out = new_plan(t);
    memset(t->out.work, 0, (size_t)t->max_work * sizeof *t->out.work);
    schedule(t);
    const qi_plan_header *h = first.header;
    if (memcmp(h, t->out.header, sizeof *h) != 0 ||
        memcmp(first.work_indptr, t->out.work_indptr,
               (size_t)(t->limits.num_workers + 1) * sizeof(i32)) != 0 ||
        memcmp(first.work, t->out.work, (size_t)h->num_work * sizeof *first.work) != 0 ||
        memcmp(first.merge, t->out.merge, (size_t)h->num_merges * sizeof *first.merge) != 0)
        CHECK(t, false, "the same batch gave another schedule");
    free_plan(&first);
}

static void trial_free(trial *t)
{
    free_plan(&t->out);
    free(t->qo_indptr), free(t->kv_len), free(t->qo_pos), free(t->groups);
    free(t->in.spans), free(t->in.strips);
}

/* What a CPU of so many workers would ask for, or anything else. */
static qi_limits any_limits(void)
{
    qi_limits l = {.num_workers = 1 + (i32)test_below(test_below(4) ? 16 : 300),
                   .num_kv_heads = 1 + (i32)test_below(8),
                   .group_size = 1 + (i32)test_below(8),
                   .decode_rows = (i32)test_below(17),
                   .split_heads = (i32)test_below(2),
                   .tile_rows = 1 + (i32)test_below(64),
                   .causal = test_below(3) > 0,
                   .window_left = test_below(3) ? -1 : (i32)test_below(200),
                   .window_right = test_below(3) ? -1 : (i32)test_below(50),
                   .cut_align = 1 + (i32)test_below(64),
                   .cost_visit = (i32)test_below(2000),
                   .cost_key = (i32)test_below(200),
                   .cost_pair = 1 + (i32)test_below(40)};
    if (test_below(2)) l.cost_strip = 1 + test_below(3000000);
    return l;
}

/* ---- batches ------------------------------------------------------------------------------ */

static i32 any_len(i64 n)
{
    return (i32)test_below(1 + test_below(n));
}

/* Which (row, kv head, key) triples each item touches, counted one by one. */
static void expect_every_triple_once(const trial *t)
{
    const i32 rows = t->qo_indptr[t->in.num_requests], heads = t->limits.num_kv_heads;
    i32 keys = 1;
    for (i32 r = 0; r < t->in.num_requests; r++) keys = t->kv_len[r] > keys ? t->kv_len[r] : keys;
    unsigned char *count = calloc((size_t)rows * (size_t)heads * (size_t)keys + 1, 1);
    assert_non_null(count);
    for (i32 i = 0; i < t->out.header->num_work; i++) {
        const qi_work *w = &t->out.work[i];
        for (i64 row = w->row_begin; row < w->row_begin + w->num_rows; row++)
            for (i64 head = w->kv_head; head < w->kv_head + w->num_kv_heads; head++)
                for (i64 key = w->kv_begin; key < w->kv_end; key++)
                    count[(row * heads + head) * keys + key]++;
    }
    const qi_limits *l = &t->limits;
    for (i32 r = 0; r < t->in.num_requests; r++) {
        for (i64 row = t->qo_indptr[r]; row < t->qo_indptr[r + 1]; row++) {
            const i64 p = (i64)t->qo_pos[r] + row - t->qo_indptr[r];
            for (i64 key = 0; key < keys; key++) {
                const bool visible = key < t->kv_len[r] && (!l->causal || key <= p) &&
                                     (l->window_left < 0 || key >= p - l->window_left) &&
                                     (l->window_right < 0 || key <= p + l->window_right);
                for (i64 head = 0; head < heads; head++) {
                    const int n = count[(row * heads + head) * keys + key];
                    CHECK(t, n <= (key < t->kv_len[r]) && n >= visible,
                          "row %lld, head %lld, key %lld: %d times", (long long)row,
                          (long long)head, (long long)key, n);
                }
            }
        }
    }
    free(count);
}

static void schedule_covers_small_batches_exactly(void **state)
{
    (void)state;
    for (int i = 0; i < 3000; i++) {
        trial t;
        const i32 n = (i32)test_below(8);
        trial_begin(&t, "small", n);
        t.limits = any_limits();
        for (i32 r = 0; r < n; r++) {
            trial_add(&t, test_below(3) ? any_len(40) : 1, any_len(400));
            if (test_below(5) == 0) t.qo_pos[r] = (i32)test_below(450) - 25;
        }
        trial_end(&t, test_below(2) ? -1 : test_below(2000));
        expect_every_triple_once(&t);
        trial_free(&t);
    }
}

static void schedule_keeps_its_bounds_on_random_batches(void **state)
{
    (void)state;
    for (int i = 0; i < 3000; i++) {
        trial t;
        const i32 n = 1 + any_len(300);
        const i64 kind = test_below(5);
        trial_begin(&t, "random", n + 1);
        t.limits = any_limits();
        for (i32 r = 0; r < n; r++) {
            if (kind == 0) /* uniform decode */
                trial_add(&t, 1, 4096);
            else if (kind == 1) /* Zipf */
                trial_add(&t, test_below(8) ? 1 : any_len(300), 60000 / (1 + any_len(n)));
            else if (kind == 2) /* tiny ones, and a giant below */
                trial_add(&t, any_len(3), any_len(8));
            else if (kind == 3) /* prompts */
                trial_add(&t, 1 + any_len(2000), 2000);
            else
                trial_add(&t, any_len(100), any_len(3000));
        }
        if (kind == 2) trial_add(&t, test_below(2) ? 1 : 1500, 100000);
        trial_end(&t, test_below(2) ? -1 : test_below(100000));
        trial_free(&t);
    }
}

/* Extremes, each with plenty of workers and with one. */
static void schedule_takes_adversarial_batches(void **state)
{
    (void)state;
    static const struct {
        const char *why;
        i32 num_requests, qo_len, kv_len, giant_qo_len, giant_kv_len;
    } rows[] = {
        {"no request", 0, 0, 0, -1, 0},
        {"one that is empty", 1, 0, 0, -1, 0},
        {"all empty", 1000, 0, 0, -1, 0},
        {"rows that see nothing", 1000, 3, 0, -1, 0},
        {"keys that nobody reads", 1000, 0, 5000, -1, 0},
        {"100k requests", 100000, 1, 300, -1, 0},
        {"100k requests and a giant at the end", 100000, 1, 1, 1, 2000000000},
        {"a giant alone", 0, 0, 0, 1, 2000000000},
        {"10^7 tokens in one prompt", 0, 0, 0, 10000000, 10000000},
        {"10^7 tokens in prompts of 10^4", 1000, 10000, 10000, -1, 0},
        {"10^6 requests of long contexts", 1000000, 1, 100000, -1, 0},
        {"one key each", 5000, 1, 1, -1, 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        for (i32 workers = 1; workers <= 1024; workers *= 32) {
            trial t;
            const bool giant = rows[i].giant_qo_len >= 0;
            trial_begin(&t, rows[i].why, rows[i].num_requests + giant);
            t.limits = (qi_limits){.num_workers = workers,
                                   .num_kv_heads = 8,
                                   .group_size = 8,
                                   .decode_rows = 4,
                                   .tile_rows = 32,
                                   .causal = 1,
                                   .window_left = -1,
                                   .window_right = -1,
                                   .cut_align = 64,
                                   .cost_visit = 500,
                                   .cost_key = 32,
                                   .cost_pair = 4};
            for (i32 r = 0; r < rows[i].num_requests; r++)
                trial_add(&t, rows[i].qo_len, rows[i].kv_len);
            if (giant) trial_add(&t, rows[i].giant_qo_len, rows[i].giant_kv_len);
            trial_end(&t, -1);
            trial_free(&t);
        }
    }
}

/* A long request is really cut, once per worker, and not at all without partial rows. */
static void schedule_cuts_where_it_may(void **state)
{
    (void)state;
    for (i32 workers = 2; workers <= 64; workers *= 2) {
        for (int rows_given = 0; rows_given < 2; rows_given++) {
            trial t;
            trial_begin(&t, "one long request", 1);
            t.limits = any_limits();
            t.limits.num_workers = workers;
            t.limits.decode_rows = 1;
            t.limits.split_heads = 0;
            t.limits.window_left = t.limits.window_right = -1;
            t.limits.cost_strip = 0;
            trial_add(&t, 1, 1000000);
            trial_end(&t, rows_given ? -1 : 0);
            assert_int_equal(t.out.header->num_work, rows_given ? workers : 1);
            trial_free(&t);
        }
    }
}

/* Strips of whole tiles where equal ones would gain less than cutting costs. */
static void schedule_cuts_only_where_it_pays(void **state)
{
    (void)state;
    static const struct {
        const char *why;
        i32 requests, kv_len, cost_cut, workers;
        bool cut;
    } rows[] = {
        {"128 tiles for 132 units, a cut is dear", 16, 1024, 40000, 264, false},
        {"128 tiles for 132 units, a cut is cheap", 16, 1024, 1, 264, true},
        {"512 tiles for 264 workers: 2 each", 64, 1024, 40000, 264, false},
        {"long tiles are worth it", 64, 4096, 40000, 264, true},
        {"a few tiles leave units idle", 2, 8192, 40000, 264, true},
        {"more tiles than workers, of which there are fewer than units", 16, 64, 40000, 100, false},
        {"one worker", 2, 64, 40000, 1, false},
        {"64 tiles, of which the SMs that have one make the others' speed", 8, 1024, 39000, 132,
         false},
        {"8 tiles in 8 pieces each", 1, 1024, 39000, 264, true},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        trial t;
        trial_begin(&t, rows[i].why, rows[i].requests);
        t.limits = (qi_limits){.num_workers = rows[i].workers,
                               .num_units = 132,
                               .alone = 2,
                               .num_kv_heads = 8,
                               .group_size = 4,
                               .decode_rows = 4,
                               .split_heads = 1,
                               .tile_rows = 32,
                               .causal = 1,
                               .window_left = -1,
                               .window_right = -1,
                               .cut_align = 64,
                               .cost_visit = 5000,
                               .cost_key = 300,
                               .cost_pair = 1,
                               .cost_cut = rows[i].cost_cut};
        for (i32 r = 0; r < rows[i].requests; r++) trial_add(&t, 1, rows[i].kv_len);
        trial_plan(&t, -1);
        const qi_plan_header *h = t.out.header;
        CHECK(&t, (h->num_merges > 0) == rows[i].cut, "%d merges", (int)h->num_merges);
        const i32 tiles = 8 * rows[i].requests;
        for (i32 w = 0; w < rows[i].workers && !rows[i].cut; w++) {
            const i32 n = t.out.work_indptr[w + 1] - t.out.work_indptr[w];
            CHECK(&t, n <= (tiles - 1) / rows[i].workers + 1, "worker %d has %d tiles", (int)w,
                  (int)n);
        }
        CHECK(&t,
              t.out.work_indptr[rows[i].workers] == h->num_work &&
                  (rows[i].cut || h->num_work == tiles),
              "%d items, of which workers have %d", (int)h->num_work,
              (int)t.out.work_indptr[rows[i].workers]);
        trial_free(&t);
    }
}

/* Tiles that are no more than the workers: at most an item each, all tiles in as many pieces if they are alike. */
static void schedule_gives_few_tiles_a_strip_each(void **state)
{
    (void)state;
    int whole = 0, cut = 0;
    for (int i = 0; i < 2000; i++) {
        trial t;
        const i32 n = 1 + (i32)test_below(12), len = 1 + any_len(4000);
        const bool alike = test_below(2);
        trial_begin(&t, "few", n);
        t.limits = any_limits();
        t.limits.split_heads = 1;
        t.limits.decode_rows = 4;
        t.limits.cut_align = 1 + (i32)test_below(64);
        t.limits.cost_strip = 0;
        t.limits.cost_key = 300;
        t.limits.cost_cut = 1 + test_below(50000);
        t.limits.num_units = 1 + (i32)test_below(200);
        t.limits.alone = (i32)test_below(4);
        for (i32 r = 0; r < n; r++) trial_add(&t, 1, alike ? len : 1 + any_len(400));
        trial_plan(&t, test_below(3) ? -1 : test_below(300));
        expect_every_triple_once(&t);
        const qi_plan_header *h = t.out.header;
        const i32 tiles = n * t.limits.num_kv_heads, workers = t.limits.num_workers;
        const i32 each = h->num_strips / tiles;
        const bool ours = h->num_strips < workers || alike; /* as many are equal strips, too */
        if (ours && h->num_strips == tiles * each && (h->num_merges == 0 || alike)) {
            for (i32 w = 0; w < workers; w++) {
                const i32 items = t.out.work_indptr[w + 1] - t.out.work_indptr[w];
                CHECK(&t, items <= 1 || (alike && each > 1), "worker %d has %d tiles", w, items);
            }
            whole += h->num_merges == 0, cut += h->num_merges > 0;
        }
        CHECK(&t, t.out.work_indptr[workers] == h->num_work, "%d items are nobody's", h->num_work);
        for (i32 k = 0; k < h->num_work; k++)
            CHECK(&t,
                  t.out.work[k].kv_end % t.limits.cut_align == 0 || t.out.work[k].slot < 0 ||
                      t.out.work[k].kv_end == t.kv_len[t.out.work[k].group],
                  "item %d ends at key %d", k, t.out.work[k].kv_end);
        trial_free(&t);
    }
    if (whole < 20 || cut < 20) fail_msg("%d whole, %d cut", whole, cut);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(schedule_covers_small_batches_exactly),
        cmocka_unit_test(schedule_keeps_its_bounds_on_random_batches),
        cmocka_unit_test(schedule_takes_adversarial_batches),
        cmocka_unit_test(schedule_cuts_where_it_may),
        cmocka_unit_test(schedule_cuts_only_where_it_pays),
        cmocka_unit_test(schedule_gives_few_tiles_a_strip_each),
    };
    return cmocka_run_group_tests_name("schedule", tests, NULL, NULL);
}
