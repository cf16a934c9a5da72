/* bpe.c - merges by a linked list of symbols and a heap of the pairs that can be merged.
 *
 * A heap entry is rank << 32 | position of the left symbol, so the smallest is the next merge.
 * Entries are not removed when one of their symbols goes into another merge: an entry counts only
 * if the pair now at its position still has its rank.
 * SPDX-License-Identifier: Apache-2.0 */
#include "bpe.h"

#include <stdlib.h>

typedef struct bpe_symbol {
    int32_t id;         /* -1 once it is part of the symbol on its left */
    int32_t prev, next; /* -1 at the ends */
} bpe_symbol;

/* ---- merges --------------------------------------------------------------------------------- */

bool bpe_init(bpe *b, size_t num_merges)
{
    *b = (bpe){.num_slots = 16};
    for (int i = 0; i < 256; i++) b->byte_ids[i] = -1;
    while (b->num_slots < 2 * num_merges) b->num_slots *= 2;
    b->slots = malloc(b->num_slots * sizeof *b->slots);
    if (!b->slots) return false;
    for (size_t i = 0; i < b->num_slots; i++) b->slots[i].merged = -1;
    return true;
}

void bpe_free(bpe *b)
{
    free(b->slots);
}

/* The slot of a pair, or the free one where it belongs. */
static bpe_merge *find_slot(const bpe *b, int32_t left, int32_t right)
{
    uint64_t hash = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
    for (size_t i = (size_t)hash;; i++) {
        bpe_merge *slot = &b->slots[i & (b->num_slots - 1)];
        if (slot->merged < 0 || (slot->left == left && slot->right == right)) return slot;
    }
}

void bpe_add(bpe *b, int32_t left, int32_t right, int32_t merged)
{
    bpe_merge *slot = find_slot(b, left, right);
    if (slot->merged < 0)
        *slot = (bpe_merge){.left = left, .right = right, .merged = merged, .rank = b->num_merges};
    b->num_merges++;
}

/* ---- heap: the smallest entry first --------------------------------------------------------- */

static void push(uint64_t *heap, size_t *size, uint64_t entry)
{
    size_t i = (*size)++;
    for (; i && heap[(i - 1) / 2] > entry; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = entry;
}

static uint64_t pop(uint64_t *heap, size_t *size)
{
    const uint64_t top = heap[0], last = heap[--*size];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < *size; i = child) {
        if (child + 1 < *size && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= last) break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return top;
}

/* ---- encoding ------------------------------------------------------------------------------- */

static bool reserve(bpe_scratch *scratch, size_t len)
{
    if (len <= scratch->capacity) return true;
    const size_t capacity = len < 256 ? 256 : len;
    bpe_scratch_free(scratch);
    /* Entries: one per pair of bytes, and two new neighbours per merge. */
    scratch->symbols = malloc(capacity * sizeof *scratch->symbols);
    scratch->heap = malloc(3 * capacity * sizeof *scratch->heap);
    scratch->capacity = capacity;
    if (scratch->symbols && scratch->heap) return true;
    bpe_scratch_free(scratch);
    return false;
}

void bpe_scratch_free(bpe_scratch *scratch)
{
    free(scratch->symbols);
    free(scratch->heap);
    scratch->symbols = NULL;
    scratch->heap = NULL;
    scratch->capacity = 0;
}

/* The merge of the symbol at this position and the next one, or NULL. */
static const bpe_merge *merge_at(const bpe *b, const bpe_symbol *symbols, int32_t at)
{
    if (at < 0 || symbols[at].id < 0 || symbols[at].next < 0) return NULL;
    const bpe_merge *merge = find_slot(b, symbols[at].id, symbols[symbols[at].next].id);
    return merge->merged < 0 ? NULL : merge;
}

static void push_pair(const bpe *b, bpe_scratch *s, size_t *size, int32_t at)
{
    const bpe_merge *merge = merge_at(b, s->symbols, at);
    if (merge) push(s->heap, size, (uint64_t)merge->rank << 32 | (uint32_t)at);
}

static void merge_pair(bpe_symbol *symbols, int32_t at, int32_t merged)
{
    bpe_symbol *left = &symbols[at], *right = &symbols[left->next];
    left->id = merged;
    left->next = right->next;
    if (right->next >= 0) symbols[right->next].prev = at;
    right->id = -1;
}

bool bpe_encode(const bpe *b, bpe_scratch *scratch, const uint8_t *text, size_t len, int32_t *ids,
                size_t *count)
{
    if (!reserve(scratch, len)) return false;
    bpe_symbol *symbols = scratch->symbols;
    int32_t num_symbols = 0;
    size_t size = 0;
    for (size_t i = 0; i < len; i++) {
        const int32_t id = b->byte_ids[text[i]], at = num_symbols;
        if (id < 0) continue;
        symbols[num_symbols++] = (bpe_symbol){.id = id, .prev = at - 1, .next = at + 1};
    }
    if (num_symbols == 0) return true;
    symbols[num_symbols - 1].next = -1;
    for (int32_t i = 0; i < num_symbols; i++) push_pair(b, scratch, &size, i);
    while (size) {
        const uint64_t entry = pop(scratch->heap, &size);
        const int32_t at = (int32_t)(entry & UINT32_MAX);
        const bpe_merge *merge = merge_at(b, symbols, at);
        if (!merge || merge->rank != entry >> 32) continue;
        merge_pair(symbols, at, merge->merged);
        push_pair(b, scratch, &size, symbols[at].prev);
        push_pair(b, scratch, &size, at);
    }
    for (int32_t at = 0; at >= 0; at = symbols[at].next) ids[(*count)++] = symbols[at].id;
    return true;
}
