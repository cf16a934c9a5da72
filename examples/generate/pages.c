/* pages.c - reference counts, the tree of known pages, and the order in which they are forgotten.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pages.h"

#include <stdlib.h>
#include <string.h>

/* Lists run through the pages themselves. A page of the tree is in one chain of the hash table; a
 * cached page is also between two others of the ring of cached pages. A free page uses next_chain
 * to reach the next free one. */
typedef struct page_entry {
    int32_t holds;
    int32_t parent; /* PAGE_NONE = not in the tree */
    int32_t next_chain;
    int32_t older, newer;
} page_entry;

struct page_pool {
    int32_t num_pages, page_size, num_held, peak_held;
    int32_t first_free;
    uint32_t num_chains; /* a power of two */
    int32_t *chains;     /* [num_chains] first page of each, or PAGE_NONE */
    int32_t *tokens;     /* [num_pages, page_size] of the pages in the tree */
    page_entry *entries; /* [num_pages + 1]; the last is the head of the ring: newer = the oldest */
};

page_pool *page_pool_create(int32_t num_pages, int32_t page_size)
{
    page_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->num_pages = num_pages;
    pool->page_size = page_size;
    pool->num_chains = 1;
    while (pool->num_chains < (uint32_t)num_pages) pool->num_chains *= 2;
    pool->chains = malloc(pool->num_chains * sizeof *pool->chains);
    pool->tokens = malloc((size_t)num_pages * (size_t)page_size * sizeof *pool->tokens);
    pool->entries = malloc(((size_t)num_pages + 1) * sizeof *pool->entries);
    if (!pool->chains || !pool->tokens || !pool->entries) {
        page_pool_destroy(pool);
        return NULL;
    }
    for (uint32_t i = 0; i < pool->num_chains; i++) pool->chains[i] = PAGE_NONE;
    for (int32_t i = 0; i < num_pages; i++)
        pool->entries[i] =
            (page_entry){.parent = PAGE_NONE, .next_chain = i + 1 < num_pages ? i + 1 : PAGE_NONE};
    pool->entries[num_pages] = (page_entry){.older = num_pages, .newer = num_pages};
    return pool;
}

void page_pool_destroy(page_pool *pool)
{
    if (!pool) return;
    free(pool->chains);
    free(pool->tokens);
    free(pool->entries);
    free(pool);
}

/* The chain of the pages below parent with these tokens (FNV-1a over the words). */
static int32_t *chain_of(page_pool *pool, int32_t parent, const int32_t *tokens)
{
    uint64_t hash = (14695981039346656037u ^ (uint32_t)parent) * 1099511628211u;
    for (int32_t i = 0; i < pool->page_size; i++)
        hash = (hash ^ (uint32_t)tokens[i]) * 1099511628211u;
    return &pool->chains[(uint32_t)(hash >> 32) & (pool->num_chains - 1)];
}

static int32_t *tokens_of(page_pool *pool, int32_t page)
{
    return pool->tokens + (size_t)page * (size_t)pool->page_size;
}

static int32_t find(page_pool *pool, int32_t parent, const int32_t *tokens)
{
    int32_t page = *chain_of(pool, parent, tokens);
    while (page != PAGE_NONE) {
        const page_entry *entry = &pool->entries[page];
        if (entry->parent == parent &&
            !memcmp(tokens_of(pool, page), tokens, (size_t)pool->page_size * sizeof *tokens))
            break;
        page = entry->next_chain;
    }
    return page;
}

static void hold(page_pool *pool, int32_t page)
{
    if (pool->entries[page].holds++ > 0) return;
    if (++pool->num_held > pool->peak_held) pool->peak_held = pool->num_held;
}

static void leave_ring(page_pool *pool, int32_t page)
{
    const page_entry *entry = &pool->entries[page];
    pool->entries[entry->older].newer = entry->newer;
    pool->entries[entry->newer].older = entry->older;
}

/* Forgets the cached page that has been unused the longest. */
static int32_t evict(page_pool *pool)
{
    const int32_t page = pool->entries[pool->num_pages].newer;
    if (page == pool->num_pages) return PAGE_NONE;
    page_entry *entry = &pool->entries[page];
    leave_ring(pool, page);
    int32_t *link = chain_of(pool, entry->parent, tokens_of(pool, page));
    while (*link != page) link = &pool->entries[*link].next_chain;
    *link = entry->next_chain;
    entry->parent = PAGE_NONE;
    return page;
}

int32_t page_pool_take(page_pool *pool)
{
    int32_t page = pool->first_free;
    if (page != PAGE_NONE)
        pool->first_free = pool->entries[page].next_chain;
    else if ((page = evict(pool)) == PAGE_NONE)
        return PAGE_NONE;
    hold(pool, page);
    return page;
}

int32_t page_pool_share(page_pool *pool, int32_t parent, const int32_t *tokens)
{
    const int32_t page = find(pool, parent, tokens);
    if (page == PAGE_NONE) return PAGE_NONE;
    if (pool->entries[page].holds == 0) leave_ring(pool, page);
    hold(pool, page);
    return page;
}

bool page_pool_publish(page_pool *pool, int32_t parent, int32_t page, const int32_t *tokens)
{
    if (find(pool, parent, tokens) != PAGE_NONE) return false;
    int32_t *chain = chain_of(pool, parent, tokens);
    memcpy(tokens_of(pool, page), tokens, (size_t)pool->page_size * sizeof *tokens);
    pool->entries[page].parent = parent;
    pool->entries[page].next_chain = *chain;
    *chain = page;
    return true;
}

void page_pool_release(page_pool *pool, const int32_t *pages, int32_t num_pages)
{
    page_entry *ring = &pool->entries[pool->num_pages];
    for (int32_t i = num_pages; i-- > 0;) {
        const int32_t page = pages[i];
        page_entry *entry = &pool->entries[page];
        if (--entry->holds > 0) continue;
        pool->num_held--;
        if (entry->parent == PAGE_NONE) {
            entry->next_chain = pool->first_free;
            pool->first_free = page;
        } else {
            entry->older = ring->older;
            entry->newer = pool->num_pages;
            pool->entries[ring->older].newer = page;
            ring->older = page;
        }
    }
}

int32_t page_pool_size(const page_pool *pool)
{
    return pool->num_pages;
}

int32_t page_pool_num_held(const page_pool *pool)
{
    return pool->num_held;
}

int32_t page_pool_peak_held(const page_pool *pool)
{
    return pool->peak_held;
}

int32_t page_pool_num_available(const page_pool *pool)
{
    return pool->num_pages - pool->num_held;
}
