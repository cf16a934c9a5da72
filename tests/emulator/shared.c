/* shared.c - see shared.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "shared.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "grid.h"

/* [fence, room, fence]: dynamic shared memory ends, to its alignment, where the second fence begins. */
enum { FENCE = 1 << 16, ROOM = SHARED_ROOM, ALIGNMENT = 128, GUARD = 128, GUARD_BYTE = 0xa5 };

typedef struct area {
    const emulator_module *module;
    char *map; /* of the first fence */
    char *dynamic;
    size_t bytes;
    bool open;
} area;

static area areas[MAX_CLUSTER];

static char *room_of(const area *a)
{
    return a->map + FENCE;
}

static char *room_end(const area *a)
{
    return room_of(a) + ROOM;
}

static void set_access(area *a, int access)
{
    if (!a->map)
        a->map = mmap(NULL, FENCE + ROOM + FENCE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (a->map == MAP_FAILED || mprotect(room_of(a), ROOM, access) != 0) abort();
    a->open = access != PROT_NONE;
}

static size_t alignment_of(const emulator_module *module)
{
    size_t alignment = ALIGNMENT;
    for (const unsigned *a = module->alignments_begin; a && a < module->alignments_end; a++)
        if (*a > alignment) alignment = *a;
    return alignment;
}

static void poison_variables(const emulator_module *module)
{
    if (module->shared_begin)
        memset(module->shared_begin, SHARED_POISON,
               (size_t)(module->shared_end - module->shared_begin));
}

void shared_begin(unsigned rank, const emulator_module *module, size_t dynamic_bytes)
{
    area *a = &areas[rank];
    if (!a->open) set_access(a, PROT_READ | PROT_WRITE);
    poison_variables(module);
    const size_t alignment = alignment_of(module);
    a->module = module;
    a->bytes = dynamic_bytes;
    a->dynamic = room_end(a) - (a->bytes + alignment - 1) / alignment * alignment;
    memset(a->dynamic - GUARD, GUARD_BYTE, GUARD);
    memset(a->dynamic, SHARED_POISON, a->bytes);
    memset(a->dynamic + a->bytes, GUARD_BYTE, (size_t)(room_end(a) - a->dynamic) - a->bytes);
}

const char *shared_window(unsigned rank)
{
    return room_of(&areas[rank]);
}

char *shared_dynamic(unsigned rank)
{
    return areas[rank].dynamic;
}

static bool within(const void *p, size_t n, const char *begin, const char *end)
{
    return begin && (uintptr_t)p >= (uintptr_t)begin && (uintptr_t)p + n <= (uintptr_t)end;
}

static bool is_dynamic(const area *a, const void *p, size_t n)
{
    return within(p, n, a->dynamic, a->dynamic + a->bytes);
}

static bool is_variable(const area *a, const void *p, size_t n)
{
    return within(p, n, a->module->shared_begin, a->module->shared_end);
}

bool shared_has(unsigned rank, const void *p, size_t n)
{
    return is_dynamic(&areas[rank], p, n) || is_variable(&areas[rank], p, n);
}

void *shared_at(const void *p, unsigned from, unsigned to)
{
    const area *a = &areas[from], *b = &areas[to];
    if (is_dynamic(a, p, 1)) return b->dynamic + ((const char *)p - a->dynamic);
    if (is_variable(a, p, 1))
        return b->module->shared_begin + ((const char *)p - a->module->shared_begin);
    return NULL;
}

static bool is_all(unsigned char byte, const char *begin, const char *end)
{
    for (; begin < end; begin++)
        if ((unsigned char)*begin != byte) return false;
    return true;
}

const char *shared_check(unsigned rank)
{
    const area *a = &areas[rank];
    if (!is_all(GUARD_BYTE, a->dynamic - GUARD, a->dynamic))
        return "wrote before dynamic shared memory";
    if (!is_all(GUARD_BYTE, a->dynamic + a->bytes, room_end(a)))
        return "wrote past dynamic shared memory";
    return NULL;
}

void shared_end(unsigned rank)
{
    set_access(&areas[rank], PROT_NONE);
    poison_variables(areas[rank].module);
}

const char *shared_check_ended(unsigned rank)
{
    const emulator_module *m = areas[rank].module;
    return is_all(SHARED_POISON, m->shared_begin, m->shared_end)
               ? NULL
               : "another block of the cluster wrote to its shared memory after it had ended";
}

const char *shared_describe(const void *address)
{
    for (const area *a = areas; a < areas + MAX_CLUSTER && a->map; a++)
        if (!a->open && is_dynamic(a, address, 1))
            return ", shared memory of a block of the cluster that has ended";
        else if (within(address, 1, a->map, room_end(a) + FENCE))
            return ", past dynamic shared memory";
    return "";
}
