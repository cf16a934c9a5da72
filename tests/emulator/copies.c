/* copies.c - cp.async: a copy is performed as late as the program allows, when its thread waits for it, so
 * that a missing wait reads what was there before; in random runs half of them at once, the earliest that
 * they may be, so that a missing barrier before them destroys what others still read.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "grid.h"

static void perform(const copy *c)
{
    memcpy(c->to, c->from, c->bytes);
    memset(c->to + c->bytes, 0, c->size - c->bytes);
}

void copies_begin(copies *c)
{
    c->count = c->group = 0;
}

void copies_add(void *to, const void *from, unsigned bytes, unsigned size)
{
    copies *c = grid_copies();
    if (bytes > size) grid_fault("cp.async of %u bytes out of %u", bytes, size);
    if ((uintptr_t)to % size || (uintptr_t)from % size)
        grid_fault("cp.async of %u bytes from %p to %p: not aligned", size, from, to);
    if (!grid_is_shared(to, size)) grid_fault("cp.async to %p: not shared memory", to);
    const copy new = {.to = to, .from = from, .bytes = bytes, .size = size, .group = c->group};
    if (grid_is_random() && grid_random(2)) {
        perform(&new);
        return;
    }
    if (c->count == c->room) {
        c->room = c->room ? 2 * c->room : 16;
        c->list = realloc(c->list, c->room * sizeof *c->list);
        if (!c->list) abort();
    }
    c->list[c->count++] = new;
}

void copies_commit(void)
{
    grid_copies()->group++;
}

void copies_perform(copies *c)
{
    for (unsigned i = 0; i < c->count; i++) perform(&c->list[i]);
    c->count = 0;
}

void copies_wait(unsigned n)
{
    copies *c = grid_copies();
    unsigned done = 0;
    while (done < c->count && c->list[done].group + n < c->group) perform(&c->list[done++]);
    c->count -= done;
    memmove(c->list, c->list + done, c->count * sizeof *c->list);
}
