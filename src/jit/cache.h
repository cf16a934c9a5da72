/* cache.h - the disk cache of compiled kernels.
 *
 * An entry is a file of its own, named by its key: a header with the key, the payload's size and its
 * SHA-256, then the payload. What is read will be executed, so it is believed only if it is whole and
 * if nobody but its owner, who is the effective user or root, could have written it. A reader never
 * waits: whatever is wrong with an entry, it is not there. Writers make a file of another name and
 * rename it, so a reader sees all of an entry or none, and a killed writer leaves at most that file.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_JIT_CACHE_H
#define QI_JIT_CACHE_H

#include <stddef.h>

/* The folder that entries live in: option if not NULL, else $QKV_CACHE_DIR, else $XDG_CACHE_HOME/qkv,
 * else $HOME/.cache/qkv. 0 and an empty name where there is none, it does not fit, or option or
 * QKV_CACHE_DIR is empty, which turns the cache off. */
int qi_cache_dir(const char *option, char *out, size_t out_bytes);

/* Entry `key` (64 hex digits): 1 and malloc'ed bytes; 0: absent, cut off, changed, of another format,
 * or not trusted; -1: out of memory. A bad entry is removed where possible. */
int qi_cache_read(const char *dir, const char *key, void **bytes, size_t *size);

/* Best effort: makes the folder if need be; 1 if the entry stands, 0 and no trace left on a full disk,
 * a read-only folder and the like. */
int qi_cache_write(const char *dir, const char *key, const void *bytes, size_t size);

/* The right to make an entry, which one process has at a time: waits up to so many ms for it. -1: not had, by
 * then or because such a folder has no locks; the caller makes the entry nonetheless, for locks only save
 * work. A killed holder's is free. */
int qi_cache_lock(const char *dir, const char *key, int ms);
void qi_cache_unlock(const char *dir, const char *key, int lock); /* -1 is fine */

#endif
