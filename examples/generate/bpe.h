/* bpe.h - byte-pair merging: the bytes of one piece of text to token ids.
 *
 * Starts with one token per byte and, until no two neighbours can be merged, merges the pair of
 * the lowest rank, the leftmost of equals. Source: Sennrich et al. 2016, arXiv:1508.07909.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_GENERATE_BPE_H
#define QKV_GENERATE_BPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A slot of the hash table of merges; merged < 0 when it is free. */
typedef struct bpe_merge {
    int32_t left, right, merged;
    uint32_t rank;
} bpe_merge;

typedef struct bpe {
    int32_t byte_ids[256]; /* -1: no token, such bytes are left out */
    bpe_merge *slots;
    size_t num_slots; /* a power of two, at least twice the merges */
    uint32_t num_merges;
} bpe;

/* Working memory of one caller, kept between pieces; begin with zeros. */
typedef struct bpe_scratch {
    struct bpe_symbol *symbols;
    uint64_t *heap;
    size_t capacity; /* bytes of text that there is room for */
} bpe_scratch;

/* Room for num_merges < 2^31; every byte without a token. False when out of memory. */
bool bpe_init(bpe *b, size_t num_merges);
void bpe_free(bpe *b);

/* Adds the next merge in order of rank. Of two for the same pair the first counts. */
void bpe_add(bpe *b, int32_t left, int32_t right, int32_t merged);

/* Writes at most len < 2^31 ids and adds their number to *count. Takes O(len log len). False when
 * out of memory. */
bool bpe_encode(const bpe *b, bpe_scratch *scratch, const uint8_t *text, size_t len, int32_t *ids,
                size_t *count);
void bpe_scratch_free(bpe_scratch *scratch);

#endif
