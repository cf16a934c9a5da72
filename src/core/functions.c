/* functions.c - see functions.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/functions.h"

#include <stdlib.h>
#include <string.h>

#include "base/status.h"

void qi_functions_init(qi_functions *f)
{
    pthread_mutex_init(&f->lock, NULL);
    for (int i = 0; i < QI_FUNCTION_BUCKETS; i++) atomic_init(&f->buckets[i], NULL);
}

void qi_functions_free(qi_functions *f)
{
    for (int i = 0; i < QI_FUNCTION_BUCKETS; i++)
        for (qi_function *at = atomic_load(&f->buckets[i]), *next; at; at = next) {
            next = at->next;
            free(at);
        }
    pthread_mutex_destroy(&f->lock);
}

/* FNV-1a over words, folded. */
static unsigned bucket_of(const qi_function_key *key)
{
    u64 hash = (0xcbf29ce484222325u ^ (uintptr_t)key->row) * 0x100000001b3u;
    for (int i = 0; i < QI_MAX_CONSTANTS; i++)
        hash = (hash ^ (u32)key->constants[i]) * 0x100000001b3u;
    return (unsigned)(hash >> 32 ^ hash) % QI_FUNCTION_BUCKETS;
}

static int same(const qi_function_key *a, const qi_function_key *b)
{
    return a->row == b->row && memcmp(a->constants, b->constants, sizeof a->constants) == 0;
}

cu_function qi_functions_find(qi_functions *f, const qi_function_key *key)
{
    const qi_function *at = atomic_load_explicit(&f->buckets[bucket_of(key)], memory_order_acquire);
    while (at && !same(&at->key, key)) at = at->next;
    return at ? at->function : NULL;
}

qkv_status qi_functions_add(qi_functions *f, const qi_function_key *key, cu_function function)
{
    qi_function *entry = malloc(sizeof *entry);
    if (!entry) QI_FAIL(QKV_ERR_MEMORY, "kernel: out of memory");
    *entry = (qi_function){.key = *key, .function = function};
    pthread_mutex_lock(&f->lock);
    if (qi_functions_find(f, key)) {
        free(entry);
    } else {
        _Atomic(qi_function *) *bucket = &f->buckets[bucket_of(key)];
        entry->next = atomic_load_explicit(bucket, memory_order_relaxed);
        atomic_store_explicit(bucket, entry, memory_order_release);
    }
    pthread_mutex_unlock(&f->lock);
    return QKV_OK;
}
