/* arena.h - bump allocation over a caller's block. The same code measures (base NULL) and carves,
 * so a size and its layout cannot drift apart.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_BASE_ARENA_H
#define QI_BASE_ARENA_H

#include <stddef.h>
#include <stdint.h>

#define QI_ARENA_ALIGN 64u

typedef struct qi_arena {
    char *base; /* NULL: measure only */
    uint64_t used;
} qi_arena;

/* The next count * bytes, aligned; NULL while measuring. */
static inline void *qi_arena_take(qi_arena *arena, uint64_t count, uint64_t bytes)
{
    void *at = arena->base ? arena->base + arena->used : NULL;
    arena->used += (count * bytes + QI_ARENA_ALIGN - 1) / QI_ARENA_ALIGN * QI_ARENA_ALIGN;
    return at;
}

#endif
