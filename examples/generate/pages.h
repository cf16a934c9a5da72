/* pages.h - who holds which page of the KV pool, and which pages may be shared.
 *
 * A page is free, held (by one request or more) or cached: held by nobody, but kept because its
 * tokens are known and another prompt may begin the same way. Known pages form a tree: the children
 * of a page are the pages that may follow it, found by their tokens. A full page's keys and values
 * depend only on the tokens from the start of the prompt to the page's end, which is exactly what
 * its path in the tree spells, so whoever has the same path may read the same page.
 *
 * A request that holds a page of the tree holds all pages above it too, and gives them back last
 * page first. The list of cached pages, oldest first, therefore has every page after the pages that
 * hang below it, and taking its first never cuts a path in the middle.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_PAGES_H
#define GENERATE_PAGES_H

#include <stdbool.h>
#include <stdint.h>

typedef struct page_pool page_pool;

enum { PAGE_NONE = -1, PAGE_ROOT = -2 /* the parent of a prompt's first page */ };

/* NULL when out of memory. num_pages and page_size are at least 1. */
page_pool *page_pool_create(int32_t num_pages, int32_t page_size);
void page_pool_destroy(page_pool *pool);

/* A page for the caller to write, held once and not known to the tree. Free pages go first, then
 * the cached page that has been unused the longest. PAGE_NONE when every page is held. */
int32_t page_pool_take(page_pool *pool);

/* The page below parent with these page_size tokens, held once more for the caller; or PAGE_NONE.
 * parent is PAGE_ROOT or a page of the tree that the caller holds. */
int32_t page_pool_share(page_pool *pool, int32_t parent, const int32_t *tokens);

/* Makes a page that the caller holds known as the one below parent with these tokens. False when
 * the tree has such a page already: the caller's stays private. */
bool page_pool_publish(page_pool *pool, int32_t parent, int32_t page, const int32_t *tokens);

/* Gives back one hold on each of a request's pages, in the order of its tokens. */
void page_pool_release(page_pool *pool, const int32_t *pages, int32_t num_pages);

int32_t page_pool_size(const page_pool *pool);
int32_t page_pool_num_held(const page_pool *pool);
int32_t page_pool_peak_held(const page_pool *pool);
int32_t
page_pool_num_available(const page_pool *pool); /* free or cached: page_pool_take has them */

#endif
