/* test_pages.c - the page allocator and prefix tree of examples/generate, against a naive account.
 * SPDX-License-Identifier: Apache-2.0 */
#include "support.h"

#include "pages.h"

enum { PAGE_SIZE = 2, MAX_PAGES = 64 };

static void take_all_then_none(page_pool *pool, int32_t *pages)
{
    const int32_t n = page_pool_size(pool);
    bool seen[MAX_PAGES] = {false};
    for (int32_t i = 0; i < n; i++) {
        pages[i] = page_pool_take(pool);
        assert_in_range(pages[i], 0, n - 1);
        assert_false(seen[pages[i]]);
        seen[pages[i]] = true;
    }
    assert_int_equal(page_pool_take(pool), PAGE_NONE);
    assert_int_equal(page_pool_num_held(pool), n);
    assert_int_equal(page_pool_num_available(pool), 0);
}

static void pages_hands_out_each_page_once(void **state)
{
    (void)state;
    int32_t pages[MAX_PAGES];
    page_pool *pool = page_pool_create(5, PAGE_SIZE);
    assert_non_null(pool);
    for (int round = 0; round < 3; round++) {
        take_all_then_none(pool, pages);
        page_pool_release(pool, pages, 5);
        assert_int_equal(page_pool_num_held(pool), 0);
        assert_int_equal(page_pool_num_available(pool), 5);
    }
    assert_int_equal(page_pool_peak_held(pool), 5);
    page_pool_destroy(pool);
    page_pool_destroy(NULL);
}

static void pages_share_by_path_not_by_tokens_alone(void **state)
{
    (void)state;
    const int32_t a[] = {1, 2}, b[] = {3, 4};
    page_pool *pool = page_pool_create(4, PAGE_SIZE);
    const int32_t pages[] = {page_pool_take(pool), page_pool_take(pool)};
    assert_int_equal(page_pool_share(pool, PAGE_ROOT, a), PAGE_NONE);
    assert_true(page_pool_publish(pool, PAGE_ROOT, pages[0], a));
    assert_true(page_pool_publish(pool, pages[0], pages[1], b));
    assert_int_equal(page_pool_share(pool, PAGE_ROOT, b), PAGE_NONE);
    assert_int_equal(page_pool_share(pool, pages[0], a), PAGE_NONE);
    assert_int_equal(page_pool_share(pool, pages[1], b), PAGE_NONE);
    assert_int_equal(page_pool_share(pool, PAGE_ROOT, a), pages[0]);
    assert_int_equal(page_pool_share(pool, pages[0], b), pages[1]);
    assert_int_equal(page_pool_num_held(pool), 2);

    /* A second page with the same path stays private and is free once released. */
    const int32_t twin = page_pool_take(pool);
    assert_false(page_pool_publish(pool, PAGE_ROOT, twin, a));
    page_pool_release(pool, &twin, 1);
    page_pool_release(pool, pages, 2);
    assert_int_equal(page_pool_num_held(pool), 2);
    page_pool_release(pool, pages, 2);
    assert_int_equal(page_pool_num_held(pool), 0);

    /* Cached, not forgotten. */
    assert_int_equal(page_pool_share(pool, PAGE_ROOT, a), pages[0]);
    page_pool_release(pool, pages, 1);
    page_pool_destroy(pool);
}

static void pages_forget_the_oldest_leaf_first(void **state)
{
    (void)state;
    const int32_t a[] = {1, 1}, b[] = {2, 2}, c[] = {3, 3};
    page_pool *pool = page_pool_create(3, PAGE_SIZE);
    const int32_t path[] = {page_pool_take(pool), page_pool_take(pool)};
    const int32_t other = page_pool_take(pool);
    assert_true(page_pool_publish(pool, PAGE_ROOT, path[0], a));
    assert_true(page_pool_publish(pool, path[0], path[1], b));
    assert_true(page_pool_publish(pool, PAGE_ROOT, other, c));
    page_pool_release(pool, path, 2);
    page_pool_release(pool, &other, 1);

    assert_int_equal(page_pool_take(pool), path[1]); /* before its parent, older than other */
    assert_int_equal(page_pool_share(pool, PAGE_ROOT, a), path[0]); /* used: now the youngest */
    page_pool_release(pool, path, 1);
    assert_int_equal(page_pool_take(pool), other);
    assert_int_equal(page_pool_share(pool, PAGE_ROOT, c), PAGE_NONE);
    assert_int_equal(page_pool_take(pool), path[0]);
    assert_int_equal(page_pool_take(pool), PAGE_NONE);
    page_pool_destroy(pool);
}

/* One request of the random walk: its prompt, and what each of its pages holds. */
enum { MAX_PATH = 6, NUM_REQUESTS = 12 };
typedef struct walker {
    int32_t tokens[MAX_PATH * PAGE_SIZE], pages[MAX_PATH], num_pages;
    bool in_tree; /* all of its pages so far are known */
} walker;

/* What the engine does for one page: share it, or take and publish it. content[page] is the path
 * that was last written there, so that a shared page can be checked against the path asked for. */
static void walker_extend(walker *w, page_pool *pool, int32_t content[][1 + MAX_PATH * PAGE_SIZE])
{
    const int32_t n = w->num_pages, *tokens = w->tokens + n * PAGE_SIZE;
    const int32_t parent = n ? w->pages[n - 1] : PAGE_ROOT;
    int32_t page = w->in_tree ? page_pool_share(pool, parent, tokens) : PAGE_NONE;
    if (page != PAGE_NONE) {
        assert_int_equal(content[page][0], n + 1);
        assert_memory_equal(content[page] + 1, w->tokens,
                            (size_t)((n + 1) * PAGE_SIZE) * sizeof *tokens);
    } else {
        if ((page = page_pool_take(pool)) == PAGE_NONE) {
            assert_int_equal(page_pool_num_available(pool), 0);
            return;
        }
        content[page][0] = n + 1;
        memcpy(content[page] + 1, w->tokens, (size_t)((n + 1) * PAGE_SIZE) * sizeof *tokens);
        w->in_tree = w->in_tree && test_below(8) && page_pool_publish(pool, parent, page, tokens);
    }
    w->pages[w->num_pages++] = page;
}

/* Requests grow and leave at random over a tree of few branches. A shared page must hold exactly
 * the path it is shared for, a page of one request must never be handed to another, and the counts
 * must agree with a plain count over all requests. */
static void pages_agree_with_a_naive_account(void **state)
{
    (void)state;
    static int32_t content[MAX_PAGES][1 + MAX_PATH * PAGE_SIZE];
    int64_t num_shared = 0;
    for (int trial = 0; trial < 200; trial++) {
        const int32_t num_pages = 1 + (int32_t)test_below(MAX_PAGES);
        page_pool *pool = page_pool_create(num_pages, PAGE_SIZE);
        walker walkers[NUM_REQUESTS];
        memset(walkers, 0, sizeof walkers);
        for (int move = 0; move < 500; move++) {
            walker *w = &walkers[test_below(NUM_REQUESTS)];
            if (w->num_pages == MAX_PATH || (w->num_pages && !test_below(6))) {
                page_pool_release(pool, w->pages, w->num_pages);
                w->num_pages = 0;
            } else {
                if (!w->num_pages) {
                    w->in_tree = true;
                    for (int i = 0; i < MAX_PATH * PAGE_SIZE; i++)
                        w->tokens[i] = i % PAGE_SIZE ? 7 : (int32_t)test_below(3);
                }
                walker_extend(w, pool, content);
            }

            int32_t holds[MAX_PAGES] = {0}, held = 0, listed = 0;
            for (int i = 0; i < NUM_REQUESTS; i++) {
                for (int32_t j = 0; j < walkers[i].num_pages; j++, listed++) {
                    const int32_t page = walkers[i].pages[j];
                    assert_in_range(page, 0, num_pages - 1);
                    held += holds[page]++ == 0;
                    assert_int_equal(content[page][0], j + 1);
                    assert_memory_equal(content[page] + 1, walkers[i].tokens,
                                        (size_t)((j + 1) * PAGE_SIZE) * sizeof(int32_t));
                }
            }
            num_shared += listed - held;
            assert_int_equal(page_pool_num_held(pool), held);
            assert_int_equal(page_pool_num_available(pool), num_pages - held);
        }
        for (int i = 0; i < NUM_REQUESTS; i++)
            page_pool_release(pool, walkers[i].pages, walkers[i].num_pages);
        int32_t all[MAX_PAGES];
        take_all_then_none(pool, all);
        page_pool_destroy(pool);
    }
    assert_true(num_shared > 0);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pages_hands_out_each_page_once),
        cmocka_unit_test(pages_share_by_path_not_by_tokens_alone),
        cmocka_unit_test(pages_forget_the_oldest_leaf_first),
        cmocka_unit_test(pages_agree_with_a_naive_account),
    };
    return cmocka_run_group_tests_name("pages", tests, NULL, NULL);
}
