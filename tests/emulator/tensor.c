/* tensor.c - the copy engine: maps of tensors, and copies of their boxes to shared memory and from there. A copy is
 * performed as late as the program allows: when nobody can go on, and somebody waits for its bytes; a store when its
 * thread waits for its stores. In random runs half of them are performed at once.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "driver.h"

enum { MAX_RANK = 5, MAX_BOX = 256, MAX_ELEMENT_STRIDE = 8, PIECE = 16, SWIZZLED_ROWS = 8 };
enum { SWIZZLE_NONE, SWIZZLE_32B, SWIZZLE_64B, SWIZZLE_128B };
static const uint64_t mark = 0x70616d726f736e74;

/* What the 128 bytes hold. */
typedef struct tensor_map {
    uint64_t mark;
    char *base;
    uint64_t strides[MAX_RANK];             /* bytes; of the first dimension an element's size */
    uint32_t last[MAX_RANK], box[MAX_RANK]; /* last: coordinate */
    uint8_t rank, swizzle;
} tensor_map;

enum { MAP_BYTES = 128, MAP_ALIGNMENT = 64 };
_Static_assert(sizeof(tensor_map) <= MAP_BYTES, "a map fits");

/* ---- encoding ------------------------------------------------------------------------------- */

/* Bytes of an element of a CUtensorMapDataType, 0: none, or one that is packed. */
static uint32_t element_bytes(int type)
{
    static const uint8_t bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    return type >= 0 && (size_t)type < sizeof bytes ? bytes[type] : 0;
}

static bool is_float(int type)
{
    return type >= 6;
}

static CUresult encode(void *map, int type, uint32_t rank, void *base, const uint64_t *dims,
                       const uint64_t *strides, const uint32_t *box,
                       const uint32_t *element_strides, int interleave, int swizzle,
                       int l2_promotion, int fill)
{
    const uint32_t element = element_bytes(type);
    if (!map || !element || rank < 1 || rank > MAX_RANK || !base || (uintptr_t)base % 16 || !dims ||
        (rank > 1 && !strides) || !box || !element_strides || swizzle < SWIZZLE_NONE ||
        swizzle > SWIZZLE_128B || l2_promotion < 0 || l2_promotion > 3 || fill < 0 || fill > 1 ||
        (fill && !is_float(type)))
        return INVALID_VALUE;
    if (interleave || fill) return NOT_SUPPORTED; /* here */
    tensor_map m = {.mark = mark,
                    .base = base,
                    .strides = {element},
                    .rank = (uint8_t)rank,
                    .swizzle = (uint8_t)swizzle};
    for (uint32_t i = 0; i < rank; i++) {
        if (dims[i] == 0 || dims[i] > (uint64_t)1 << 32 || box[i] == 0 || box[i] > MAX_BOX ||
            element_strides[i] == 0 || element_strides[i] > MAX_ELEMENT_STRIDE)
            return INVALID_VALUE;
        if (element_strides[i] != 1) return NOT_SUPPORTED; /* here */
        m.last[i] = (uint32_t)(dims[i] - 1);
        m.box[i] = box[i];
        if (i + 1 == rank) break;
        if (strides[i] % 16 || strides[i] >= (uint64_t)1 << 40) return INVALID_VALUE;
        m.strides[i + 1] = strides[i];
    }
    const uint32_t inner = box[0] * element;
    if (inner % PIECE || (swizzle != SWIZZLE_NONE && inner > 16u << swizzle)) return INVALID_VALUE;
    memset(map, 0, MAP_BYTES);
    memcpy(map, &m, sizeof m);
    return SUCCESS;
}

EXPORT CUresult cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *base,
                                       const uint64_t *dims, const uint64_t *strides,
                                       const uint32_t *box, const uint32_t *element_strides,
                                       int interleave, int swizzle, int l2_promotion, int fill)
{
    ENTER(); /* it asks for a current context, though it only writes the map */
    LEAVE(encode(map, type, rank, base, dims, strides, box, element_strides, interleave, swizzle,
                 l2_promotion, fill));
}

static const tensor_map *map_at(const void *p)
{
    const tensor_map *m = p;
    if ((uintptr_t)p % MAP_ALIGNMENT || m->mark != mark)
        grid_fault("%p is no tensor map, or not aligned to %d bytes", p, MAP_ALIGNMENT);
    return m;
}

/* ---- copies --------------------------------------------------------------------------------- */

typedef struct box_copy {
    char *shared;
    const tensor_map *map;
    void *barrier; /* of a load; a store has none */
    int at[MAX_RANK];
    unsigned thread;
} box_copy;

static box_copy *pending; /* to be performed; oldest first */
static size_t count, room;

void tensor_begin(void)
{
    count = 0;
}

void tensor_check(unsigned rank)
{
    for (size_t i = 0; i < count; i++)
        if (pending[i].thread / MAX_THREADS == rank)
            grid_fault("the block ended before its copies to or from shared memory had");
}

static uint32_t inner_bytes(const tensor_map *m)
{
    return m->box[0] * (uint32_t)m->strides[0];
}

static uint32_t num_rows(const tensor_map *m)
{
    uint32_t rows = 1;
    for (int i = 1; i < m->rank; i++) rows *= m->box[i];
    return rows;
}

/* Where row r of the box lies; bytes [begin, end) of it are in the tensor. */
static char *find_row(const box_copy *c, uint32_t r, uint64_t *begin, uint64_t *end)
{
    const tensor_map *m = c->map;
    const uint64_t element = m->strides[0];
    char *row = m->base;
    const int64_t x = c->at[0], behind = x + m->box[0], last = m->last[0];
    const int64_t first = x < 0 ? 0 : x, past = behind > last + 1 ? last + 1 : behind;
    bool inside = first < past;
    for (int i = 1; i < m->rank; i++) {
        const int64_t at = (int64_t)c->at[i] + r % m->box[i];
        r /= m->box[i];
        inside = inside && at >= 0 && at <= m->last[i];
        if (inside) row += (uint64_t)at * m->strides[i];
    }
    *begin = inside ? (uint64_t)(first - x) * element : 0;
    *end = inside ? (uint64_t)(past - x) * element : 0;
    return inside ? row + x * (int64_t)element : row;
}

/* Where swizzling, by bits of the address, puts the piece that would be here. */
static char *swizzled(const tensor_map *m, char *piece)
{
    const uintptr_t mask = (1u << m->swizzle) - 1, at = (uintptr_t)piece;
    return piece + ((at ^ (at >> 7 & mask) << 4) - at);
}

static void perform(const box_copy *c)
{
    char row[MAX_BOX * sizeof(double)];
    const uint32_t rows = num_rows(c->map), bytes = inner_bytes(c->map);
    grid_blame(c->thread);
    for (uint32_t r = 0; r < rows; r++) {
        uint64_t begin, end;
        char *there = find_row(c, r, &begin, &end), *here = c->shared + r * bytes;
        if (c->barrier) {
            memset(row, 0, bytes); /* what lies outside the tensor */
            memcpy(row + begin, there + begin, end - begin);
            for (uint32_t i = 0; i < bytes; i += PIECE)
                memcpy(swizzled(c->map, here + i), row + i, PIECE);
        } else {
            for (uint32_t i = 0; i < bytes; i += PIECE)
                memcpy(row + i, swizzled(c->map, here + i), PIECE);
            memcpy(there + begin, row + begin, end - begin);
        }
    }
    if (c->barrier) mbarrier_complete(c->barrier, (int)(rows * bytes));
    grid_blame(NOBODY);
}

static void begin(void *shared, const void *map, void *barrier, unsigned rank, const int *at)
{
    const tensor_map *m = map_at(map);
    const uint32_t inner = inner_bytes(m), rows = num_rows(m);
    const uintptr_t alignment = m->swizzle != SWIZZLE_NONE && rows >= SWIZZLED_ROWS ? 1024 : 128;
    if (device_arch() < 90) grid_fault("a tensor's copy, which sm_%u has not", device_arch());
    if (m->rank != rank) grid_fault("a %u-dimensional copy of a map of %d", rank, m->rank);
    if (m->swizzle != SWIZZLE_NONE && inner != 16u << m->swizzle)
        grid_fault("swizzled rows of %u bytes are not emulated: %u expected", inner,
                   16u << m->swizzle);
    if ((uintptr_t)shared % alignment)
        grid_fault("a tensor's copy at %p, which is not aligned to %d bytes", shared,
                   (int)alignment);
    if (!grid_is_shared(shared, (size_t)rows * inner))
        grid_fault("a tensor's copy of %u bytes at %p: not shared memory", rows * inner, shared);
    if (barrier) mbarrier_check(barrier);
    box_copy new = {.shared = shared,
                    .map = m,
                    .barrier = barrier,
                    .thread = grid_warp() * LANES + grid_lane()};
    memcpy(new.at, at, rank * sizeof *at);
    if (grid_is_random() && grid_random(2)) {
        perform(&new);
        return;
    }
    if (count == room) {
        room = room ? 2 * room : 64;
        pending = realloc(pending, room * sizeof *pending);
        if (!pending) abort();
    }
    pending[count++] = new;
}

void tensor_load(void *to, const void *map, void *barrier, unsigned rank, const int *at)
{
    begin(to, map, barrier, rank, at);
}

void tensor_store(const void *map, const void *from, unsigned rank, const int *at)
{
    for (unsigned i = 0; i < rank; i++) /* an H200 calls this an illegal instruction */
        if (at[i] < 0) grid_fault("a store of a box at %d", at[i]);
    begin((void *)(uintptr_t)from, map, NULL, rank, at);
}

/* Performs copies that count at this barrier; without one, this thread's stores. */
static void perform_all(const void *barrier, unsigned thread)
{
    size_t kept = 0;
    for (size_t i = 0; i < count; i++)
        if (pending[i].barrier == barrier && (barrier || pending[i].thread == thread))
            perform(&pending[i]);
        else
            pending[kept++] = pending[i];
    count = kept;
}

void tensor_perform(const void *barrier)
{
    perform_all(barrier, NOBODY);
}

void tensor_perform_loads(void)
{
    size_t kept = 0;
    for (size_t i = 0; i < count; i++)
        if (pending[i].barrier)
            perform(&pending[i]);
        else
            pending[kept++] = pending[i];
    count = kept;
}

void tensor_await_stores(void)
{
    perform_all(NULL, grid_warp() * LANES + grid_lane());
}

bool tensor_perform_awaited(void)
{
    for (size_t i = 0; i < count; i++)
        if (pending[i].barrier && mbarrier_is_awaited(pending[i].barrier)) {
            tensor_perform(pending[i].barrier);
            return true;
        }
    return false;
}
