/* mbarrier.c - mbarriers: barriers in shared memory, of arrivals and of bytes that copies bring. Their 8 bytes hold
 * a mark and the number of a record here.
 * SPDX-License-Identifier: Apache-2.0 */
#include "grid.h"

#include <stdio.h>
#include <string.h>

enum { MAX_BARRIERS = 1024, MAX_COUNT = (1 << 20) - 1 };
static const uint64_t mark = (uint64_t)0x6d626172 << 32;

typedef struct barrier {
    const void *at;
    int count;   /* arrivals of a phase */
    int pending; /* of them, in the one under way */
    int bytes;   /* that it still waits for; below 0: they came before they were expected */
    unsigned phase;
    bool awaited;
} barrier;

static barrier barriers[MAX_BARRIERS]; /* of the running cluster */
static unsigned num_barriers;

void mbarrier_begin(void)
{
    num_barriers = 0;
}

static barrier *known(const void *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    const uint64_t i = value ^ mark;
    return i < num_barriers && barriers[i].at == at ? &barriers[i] : NULL;
}

static barrier *known_here(const void *at)
{
    if ((uintptr_t)at % sizeof(uint64_t) || !grid_is_shared(at, sizeof(uint64_t)))
        grid_fault("mbarrier at %p: not 8 aligned bytes of shared memory", at);
    return known(at);
}

static barrier *find(const void *at)
{
    barrier *b = known_here(at);
    if (!b) grid_fault("mbarrier at %p: not initialised, or overwritten", at);
    return b;
}

void mbarrier_check(const void *at)
{
    (void)find(at);
}

void mbarrier_init(void *at, int count)
{
    barrier *b = known_here(at);
    if (count < 1 || count > MAX_COUNT) grid_fault("mbarrier at %p of %d arrivals", at, count);
    if (b && (b->awaited || b->bytes)) grid_fault("mbarrier at %p: initialised while in use", at);
    if (!b && num_barriers == MAX_BARRIERS) grid_fault("more than %d mbarriers", MAX_BARRIERS);
    if (!b) b = &barriers[num_barriers++];
    *b = (barrier){.at = at, .count = count, .pending = count};
    const uint64_t value = mark ^ (uint64_t)(b - barriers);
    memcpy(at, &value, sizeof value);
}

void mbarrier_inval(void *at)
{
    barrier *b = find(at);
    if (b->awaited || b->bytes) grid_fault("mbarrier at %p: invalidated while in use", at);
    b->at = NULL;
    memset(at, 0xff, sizeof(uint64_t));
}

static void end_phase_if_complete(barrier *b)
{
    if (b->pending || b->bytes) return;
    b->phase++;
    b->pending = b->count;
    b->awaited = false;
    grid_wake(b->at);
}

static void add_bytes(barrier *b, int bytes)
{
    b->bytes += bytes;
    if (b->bytes > MAX_COUNT || b->bytes < -MAX_COUNT)
        grid_fault("mbarrier at %p waits for %d bytes", b->at, b->bytes);
}

void mbarrier_arrive(void *at, int bytes)
{
    barrier *b = find(at);
    if (bytes < 0 || bytes > MAX_COUNT) grid_fault("mbarrier at %p: expects %d bytes", at, bytes);
    if (b->pending == 0)
        grid_fault(
            "mbarrier at %p: more than %d arrivals in phase %u, which still waits for %d bytes", at,
            b->count, b->phase, b->bytes);
    add_bytes(b, bytes);
    b->pending--;
    end_phase_if_complete(b);
    if (grid_is_random()) grid_pause();
}

void mbarrier_complete(void *at, int bytes)
{
    barrier *b = known(at); /* of another block, maybe */
    if (!b) b = find(at);
    add_bytes(b, -bytes);
    end_phase_if_complete(b);
}

static bool has_ended(const barrier *b, unsigned parity)
{
    return (b->phase & 1) != parity;
}

static barrier *find_parity(const void *at, unsigned parity)
{
    if (parity > 1) grid_fault("mbarrier at %p: a phase's parity is 0 or 1, got %u", at, parity);
    return find(at);
}

/* Whoever spins on it lets others run, after the look: lanes that look one after the other see the same. */
int mbarrier_test(void *at, unsigned parity)
{
    const bool ended = has_ended(find_parity(at, parity), parity);
    if (!ended) {
        grid_pause();
        tensor_perform(at);
    }
    return ended;
}

void mbarrier_wait(void *at, unsigned parity)
{
    barrier *b = find_parity(at, parity);
    if (grid_is_random()) {
        grid_pause();
        if (grid_random(2)) tensor_perform(at);
    }
    if (has_ended(b, parity)) return;
    b->awaited = true;
    grid_sleep(at);
    if (!has_ended(b, parity))
        grid_fault("mbarrier at %p: two phases ended before this thread could see the first", at);
}

bool mbarrier_is_awaited(const void *at)
{
    const barrier *b = known(at);
    return b && b->awaited;
}

void mbarrier_describe(const void *at, char *text, size_t bytes)
{
    const barrier *b = known(at);
    if (b)
        snprintf(text, bytes, "the mbarrier at %p, whose phase %u lacks %d arrivals and %d bytes",
                 at, b->phase, b->pending, b->bytes);
    else
        snprintf(text, bytes, "the mbarrier at %p, since overwritten", at);
}
