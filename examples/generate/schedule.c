/* schedule.c - which rows a step computes, and the pages they live in.
 *
 * Keys and values are written before they are read in every layer, so a request may share a page in
 * the very step that another fills it: pages of a prompt are made known when they are scheduled,
 * and requests that are looked at later in the same step find them.
 * SPDX-License-Identifier: Apache-2.0 */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

#include "clock.h"

/* The library computes the attention of a few rows and of many rows in different ways, which round
 * differently. Up to 16 rows may count as few. So that a prompt comes out the same however it is
 * cut, no piece of it is that short unless the whole prompt is. */
enum { MIN_PIECE = 17 };

static int32_t min_int(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

int32_t engine_pages_for(const engine *e, int32_t num_tokens)
{
    return num_tokens > 0 ? (num_tokens - 1) / e->options.page_size + 1 : 0;
}

/* ---- pages ----------------------------------------------------------------------------------- */

/* Pages until the request's next token, or its prompt, is done. The last token that a request may
 * generate is never an input, so it needs no slot. */
static int32_t pages_wanted(const engine *e, const request *r)
{
    const int32_t tokens = (r->num_tokens > r->prompt_len ? r->num_tokens : r->prompt_len) + 1;
    return engine_pages_for(e, min_int(tokens, r->prompt_len + r->max_new - 1));
}

/* Pages that nobody holds and that running requests will not need for their prompts. */
static int32_t pages_to_spare(const engine *e)
{
    int32_t spare = page_pool_num_available(e->pool);
    for (int32_t i = 0; i < e->num_running; i++)
        spare -= pages_wanted(e, e->running[i]) - e->running[i]->num_pages;
    return spare;
}

static void release_pages(engine *e, request *r)
{
    page_pool_release(e->pool, r->pages, r->num_pages);
    r->num_pages = r->num_known = 0;
}

/* Takes the youngest running request out of the batch. It is never one that the step already
 * computes: those are older than the one that asks for a page. The asking one itself may share pages
 * that this step has yet to fill: only its first `computed` tokens are saved. */
static bool preempt_youngest(engine *e, const request *asking, int32_t computed,
                             char error[GGUF_ERROR])
{
    request *r = e->running[--e->num_running];
    if (r == asking) {
        e->counts.shared_tokens -= r->num_cached - computed;
        r->num_cached = computed;
    }
    const int32_t num_pages = min_int(r->num_pages, engine_pages_for(e, r->num_cached));
    r->saved = allocate((size_t)num_pages * forward_page_bytes(e->m, e->options.page_size));
    if (!r->saved) return fail(error, "out of memory while swapping out a request");
    if (!forward_save_pages(e->compute, r->pages, num_pages, r->saved, error)) return false;
    release_pages(e, r);
    r->num_pages = num_pages;
    r->state = PREEMPTED;
    e->next = (int32_t)(r - e->requests);
    e->counts.preemptions++;
    return true;
}

/* Pages for the request's first num_tokens tokens, at the cost of younger requests if need be. The
 * request itself is preempted when it is the youngest: see its state. computed: its tokens from
 * former steps. */
static bool grow(engine *e, request *r, int32_t num_tokens, int32_t computed,
                 char error[GGUF_ERROR])
{
    const int32_t num_pages = engine_pages_for(e, num_tokens);
    while (r->state == RUNNING && r->num_pages < num_pages) {
        const int32_t page = page_pool_take(e->pool);
        if (page != PAGE_NONE)
            r->pages[r->num_pages++] = page;
        else if (!preempt_youngest(e, r, computed, error))
            return false;
    }
    return true;
}

/* ---- prefix sharing -------------------------------------------------------------------------- */

static int32_t last_known(const request *r)
{
    return r->num_known ? r->pages[r->num_known - 1] : PAGE_ROOT;
}

/* Takes over the pages that begin like the rest of the prompt. What remains to compute is no less
 * than a piece, and never nothing: the last token's output is wanted. */
static void share_pages(engine *e, request *r)
{
    const int32_t page_size = e->options.page_size;
    if (!e->options.share_prefixes || r->private_from_here) return;
    while (r->num_cached == r->num_known * page_size &&
           r->prompt_len - r->num_cached - page_size >= MIN_PIECE) {
        const int32_t page = page_pool_share(e->pool, last_known(r), r->tokens + r->num_cached);
        if (page == PAGE_NONE) return;
        r->pages[r->num_pages++] = page;
        r->num_known++;
        r->num_cached += page_size;
        e->counts.shared_tokens += page_size;
    }
}

/* Makes the prompt's full pages known. Pages of generated tokens stay private: another prompt is to
 * find keys that were computed as prompts are. */
static void publish_pages(engine *e, request *r)
{
    const int32_t page_size = e->options.page_size;
    while (e->options.share_prefixes && !r->private_from_here &&
           (r->num_known + 1) * page_size <= r->num_cached) {
        if (page_pool_publish(e->pool, last_known(r), r->pages[r->num_known],
                              r->tokens + r->num_known * page_size))
            r->num_known++;
        else /* another was first */
            r->private_from_here = true;
    }
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* How many of the prompt's remaining tokens a step takes with what is left of its budget. */
static int32_t piece_of(const engine *e, int32_t remaining, int32_t budget)
{
    if (remaining <= budget) return remaining;
    if (e->options.chunk < 2 * MIN_PIECE) /* too small to choose: whole chunks only */
        return budget == e->options.chunk ? budget : 0;
    const int32_t n = min_int(budget, remaining - MIN_PIECE);
    return n < MIN_PIECE ? 0 : n;
}

/* Adds n tokens of a running request to the step; its pages reach that far. */
static void add_rows(engine *e, request *r, int32_t n)
{
    const int32_t row =
        forward_add(e->compute, r->tokens + r->num_cached, n, r->num_cached, r->pages);
    r->num_cached += n;
    if (r->num_cached < r->num_tokens) return;
    e->rows[e->num_sampled] = row;
    e->sampled[e->num_sampled++] = r;
}

static bool schedule_request(engine *e, request *r, int32_t *budget, char error[GGUF_ERROR])
{
    const bool prompt = r->num_cached < r->prompt_len;
    const int32_t computed = r->num_cached;
    int32_t n = 1;
    if (prompt) {
        share_pages(e, r);
        n = piece_of(e, r->prompt_len - r->num_cached, *budget);
        if (n == 0) return true;
    }
    if (!grow(e, r, r->num_cached + n, computed, error)) return false;
    if (r->state != RUNNING) return true;
    add_rows(e, r, n);
    if (prompt) {
        publish_pages(e, r);
        *budget -= n;
        e->step_prompt_tokens += n;
    }
    return true;
}

/* ---- who is in ------------------------------------------------------------------------------- */

double engine_ms_until(const engine *e, const request *r)
{
    return e->start_ms + r->arrival_ms - now_ms();
}

request *engine_next(engine *e)
{
    while (e->next < e->num_requests && e->requests[e->next].state == FINISHED) e->next++;
    return e->next < e->num_requests ? &e->requests[e->next] : NULL;
}

/* Puts a preempted request back as it was, in other pages that it has to itself. */
static bool resume(engine *e, request *r, char error[GGUF_ERROR])
{
    const int32_t num_pages = r->num_pages;
    for (int32_t i = 0; i < num_pages; i++) r->pages[i] = page_pool_take(e->pool);
    if (!forward_load_pages(e->compute, r->pages, num_pages, r->saved, error)) return false;
    free(r->saved);
    r->saved = NULL;
    r->private_from_here = num_pages > 0;
    return true;
}

/* Takes over known pages of a new request if there is room for the rest. */
static bool fits(engine *e, request *r)
{
    if (r->state == PREEMPTED) return pages_wanted(e, r) <= pages_to_spare(e);
    share_pages(e, r); /* first, so that these pages do not count as available */
    if (pages_wanted(e, r) - r->num_pages <= pages_to_spare(e)) return true;
    e->counts.shared_tokens -= r->num_cached;
    release_pages(e, r);
    r->num_cached = 0;
    return false;
}

/* Lets in the next request if there is room for it; *admitted is NULL if not. */
static bool admit(engine *e, request **admitted, char error[GGUF_ERROR])
{
    request *r = engine_next(e);
    *admitted = NULL;
    if (!r || e->num_running == e->options.max_batch || engine_ms_until(e, r) > 0 || !fits(e, r))
        return true;
    if (r->state == PREEMPTED && !resume(e, r, error)) return false;
    r->state = RUNNING;
    e->running[e->num_running++] = r;
    e->next++;
    *admitted = r;
    return true;
}

bool engine_schedule(engine *e, char error[GGUF_ERROR])
{
    int32_t budget = e->options.chunk;
    e->num_sampled = e->step_prompt_tokens = 0;
    forward_begin(e->compute);
    for (int32_t i = 0; i < e->num_running; i++)
        if (!schedule_request(e, e->running[i], &budget, error)) return false;
    for (request *r; budget > 0;) {
        if (!admit(e, &r, error)) return false;
        if (!r) break;
        if (!schedule_request(e, r, &budget, error)) return false;
    }
    return true;
}
