/* tensor.c - the copy engine: maps of tensors, and copies of their boxes to shared memory. A copy is performed as
 * late as the program allows: when nobody can go on, and somebody waits for its bytes. In random runs half of
 * them are performed at once.
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
    const char *base;
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

typedef struct load {
    char *to;
    const tensor_map *map;
    void *barrier;
    int at[MAX_RANK];
    unsigned thread;
} load;

static load *loads; /* to be performed; oldest first */
static size_t count, room;

void tensor_begin(void)
{
    count = 0;
}

const char *tensor_check(void)
{
    return count ? "the block ended before its copies to shared memory had" : NULL;
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

/* Row r of the box: what lies outside the tensor is 0. */
static void read_row(const load *l, uint32_t r, char *row)
{
    const tensor_map *m = l->map;
    const char *from = m->base;
    const int64_t x = l->at[0], end = x + m->box[0], last = m->last[0];
    const int64_t first = x < 0 ? 0 : x, past = end > last + 1 ? last + 1 : end;
    bool inside = first < past;
    for (int i = 1; i < m->rank; i++) {
        const int64_t at = (int64_t)l->at[i] + r % m->box[i];
        r /= m->box[i];
        inside = inside && at >= 0 && at <= m->last[i];
        if (inside) from += (uint64_t)at * m->strides[i];
    }
    const uint64_t element = m->strides[0];
    memset(row, 0, inner_bytes(m));
    if (inside)
        memcpy(row + (uint64_t)(first - x) * element, from + (uint64_t)first * element,
               (uint64_t)(past - first) * element);
}

/* Piece by piece to where swizzling puts them, by bits of the address. */
static void write_row(const tensor_map *m, char *to, const char *row)
{
    const uintptr_t mask = (1u << m->swizzle) - 1;
    for (uint32_t i = 0; i < inner_bytes(m); i += PIECE) {
        const uintptr_t at = (uintptr_t)(to + i);
        memcpy(to + i + ((at ^ (at >> 7 & mask) << 4) - at), row + i, PIECE);
    }
}

static void perform(const load *l)
{
    char row[MAX_BOX * sizeof(double)];
    const uint32_t rows = num_rows(l->map), bytes = inner_bytes(l->map);
    grid_blame(l->thread);
    for (uint32_t r = 0; r < rows; r++) {
        read_row(l, r, row);
        write_row(l->map, l->to + r * bytes, row);
    }
    mbarrier_complete(l->barrier, (int)(rows * bytes));
    grid_blame(NOBODY);
}

void tensor_load(void *to, const void *map, void *barrier, unsigned rank, const int *at)
{
    const tensor_map *m = map_at(map);
    const uint32_t inner = inner_bytes(m), rows = num_rows(m);
    const uintptr_t alignment = m->swizzle != SWIZZLE_NONE && rows >= SWIZZLED_ROWS ? 1024 : 128;
    if (device_arch() < 90) grid_fault("a tensor's copy, which sm_%u has not", device_arch());
    if (m->rank != rank) grid_fault("a %u-dimensional copy of a map of %d", rank, m->rank);
    if (m->swizzle != SWIZZLE_NONE && inner != 16u << m->swizzle)
        grid_fault("swizzled rows of %u bytes are not emulated: %u expected", inner,
                   16u << m->swizzle);
    if ((uintptr_t)to % alignment)
        grid_fault("a tensor's copy to %p, which is not aligned to %d bytes", to, (int)alignment);
    if (!grid_is_shared(to, (size_t)rows * inner))
        grid_fault("a tensor's copy of %u bytes to %p: not shared memory", rows * inner, to);
    mbarrier_check(barrier);
    load new = {
        .to = to, .map = m, .barrier = barrier, .thread = grid_warp() * LANES + grid_lane()};
    memcpy(new.at, at, rank * sizeof *at);
    if (grid_is_random() && grid_random(2)) {
        perform(&new);
        return;
    }
    if (count == room) {
        room = room ? 2 * room : 64;
        loads = realloc(loads, room * sizeof *loads);
        if (!loads) abort();
    }
    loads[count++] = new;
}

void tensor_perform(const void *barrier)
{
    size_t kept = 0;
    for (size_t i = 0; i < count; i++)
        if (loads[i].barrier == barrier)
            perform(&loads[i]);
        else
            loads[kept++] = loads[i];
    count = kept;
}

bool tensor_perform_awaited(void)
{
    for (size_t i = 0; i < count; i++)
        if (mbarrier_is_awaited(loads[i].barrier)) {
            tensor_perform(loads[i].barrier);
            return true;
        }
    return false;
}
