/* shared.c - see shared.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "shared.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* [fence, room, fence]: dynamic shared memory ends, to its alignment, where the second fence begins. */
enum { FENCE = 1 << 16, ROOM = SHARED_ROOM, ALIGNMENT = 128, GUARD = 128, GUARD_BYTE = 0xa5 };

static char *map; /* of the first fence */
static char *dynamic;
static size_t bytes;

static char *room_end(void)
{
    return map + FENCE + ROOM;
}

static void open_map(void)
{
    map = mmap(NULL, FENCE + ROOM + FENCE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect(map + FENCE, ROOM, PROT_READ | PROT_WRITE) != 0) abort();
}

static size_t alignment_of(const emulator_module *module)
{
    size_t alignment = ALIGNMENT;
    for (const unsigned *a = module->alignments_begin; a && a < module->alignments_end; a++)
        if (*a > alignment) alignment = *a;
    return alignment;
}

void shared_begin(const emulator_module *module, size_t dynamic_bytes)
{
    if (!map) open_map();
    if (module->shared_begin)
        memset(module->shared_begin, SHARED_POISON,
               (size_t)(module->shared_end - module->shared_begin));
    bytes = dynamic_bytes;
    const size_t alignment = alignment_of(module);
    dynamic = room_end() - (bytes + alignment - 1) / alignment * alignment;
    memset(dynamic - GUARD, GUARD_BYTE, GUARD);
    memset(dynamic, SHARED_POISON, bytes);
    memset(dynamic + bytes, GUARD_BYTE, (size_t)(room_end() - dynamic) - bytes);
}

const char *shared_window(void)
{
    return map + FENCE;
}

char *shared_dynamic(void)
{
    return dynamic;
}

static bool within(const void *p, size_t n, const char *begin, const char *end)
{
    return begin && (uintptr_t)p >= (uintptr_t)begin && (uintptr_t)p + n <= (uintptr_t)end;
}

bool shared_has(const emulator_module *module, const void *p, size_t n)
{
    return within(p, n, dynamic, dynamic + bytes) ||
           within(p, n, module->shared_begin, module->shared_end);
}

static bool is_guard(const char *begin, const char *end)
{
    for (; begin < end; begin++)
        if ((unsigned char)*begin != GUARD_BYTE) return false;
    return true;
}

const char *shared_check(void)
{
    if (!is_guard(dynamic - GUARD, dynamic)) return "wrote before dynamic shared memory";
    if (!is_guard(dynamic + bytes, room_end())) return "wrote past dynamic shared memory";
    return NULL;
}

const char *shared_describe(const void *address)
{
    return map && within(address, 1, map, room_end() + FENCE) ? ", past dynamic shared memory" : "";
}
