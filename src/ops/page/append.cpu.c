/* append.cpu.c - scatter rows of k and v into pages, quantised and rotated on the way where that is
 * asked for. Tasks share the rows. Bound: memory, one read and one write of every row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/rope.h"
#include "kern/cpu/stream.h"
#include "ops/page/append_params.h"

QI_INLINE void convert_as(char *out, const qi_dtype to, const char *in, const qi_dtype from, i64 n)
{
    i64 i = 0;
    for (; i + QI_VW <= n; i += QI_VW)
        qi_store(out + i * (i64)qi_size_of(to), to, qi_load(qi_at(in, from, i), from));
    if (i < n)
        qi_store_n(out + i * (i64)qi_size_of(to), to, qi_load_n(qi_at(in, from, i), from, n - i),
                   n - i);
}

QI_INLINE void convert_from(char *out, qi_dtype to, const char *in, const qi_dtype from, i64 n)
{
    switch (to) {
    case QI_F32: convert_as(out, QI_F32, in, from, n); break;
    case QI_F16: convert_as(out, QI_F16, in, from, n); break;
    default: convert_as(out, QI_BF16, in, from, n); break;
    }
}

static void convert(char *out, qi_dtype to, const char *in, qi_dtype from, i64 n)
{
    switch (from) {
    case QI_F32: convert_from(out, to, in, QI_F32, n); break;
    case QI_F16: convert_from(out, to, in, QI_F16, n); break;
    default: convert_from(out, to, in, QI_BF16, n); break;
    }
}

/* A task's private memory: frequencies, the angles of a row, a head as f32. */
typedef struct append_scratch {
    double turns[QI_ROPE_MAX_PAIRS];
    float cosine[2 * QI_ROPE_MAX_PAIRS], sine[2 * QI_ROPE_MAX_PAIRS];
    float head[];
} append_scratch;

/* Longest head that changes on its way; append.c refuses others. */
_Static_assert(sizeof(append_scratch) + APPEND_MAX_DIM * sizeof(float) <= QI_TASK_SCRATCH_BYTES,
               "a head lives in task scratch");

/* One head, rotated, divided by the scale and rounded. */
static void change_head(const append_params *p, const append_tensor *t, i64 head, char *out,
                        const char *in, append_scratch *scratch)
{
    const float scale = qi_scale_at(&t->scale, head);
    qi_widen_any(scratch->head, in, t->dtype, t->head_dim);
    if (t->rotate) qi_rope_rotate(&p->rope, scratch->head, scratch->cosine, scratch->sine);
    if (scale != 1.f)
        for (i64 d = 0; d < t->head_dim; d++) scratch->head[d] /= scale;
    qi_narrow_any(out, t->cache_dtype, scratch->head, t->head_dim);
}

static void append_row(const append_params *p, const append_tensor *t, i64 row, i64 page, i64 slot,
                       append_scratch *scratch)
{
    const i64 size = (i64)qi_size_of(t->dtype), cache_size = (i64)qi_size_of(t->cache_dtype);
    const char *in = (const char *)t->rows + row * t->row_stride * size;
    char *out = (char *)t->cache + (page * t->page_stride + slot * t->slot_stride) * cache_size;
    for (i64 head = 0; head < t->num_heads; head++) {
        if (!t->plain)
            change_head(p, t, head, out, in, scratch);
        else if (t->dtype == t->cache_dtype && p->streams)
            qi_stream_copy(out, in, t->head_dim * size);
        else if (t->dtype == t->cache_dtype)
            memcpy(out, in, (size_t)(t->head_dim * size));
        else
            convert(out, t->cache_dtype, in, t->dtype, t->head_dim);
        in += t->row_head_stride * size;
        out += t->head_stride * cache_size;
    }
}

/* One row of k, v and q; page < 0: of q alone. */
static void append_all(const append_params *p, i64 row, i64 position, i64 page, i64 slot,
                       append_scratch *scratch)
{
    if (p->rope.num_pairs > 0)
        qi_rope_angles(&p->rope, scratch->turns, (double)position, scratch->cosine, scratch->sine);
    if (page >= 0) {
        append_row(p, &p->k, row, page, slot, scratch);
        append_row(p, &p->v, row, page, slot, scratch);
    }
    if (p->q.rows) append_row(p, &p->q, row, row, 0, scratch);
}

static void append_by_slot(const append_params *p, i64 begin, i64 end, append_scratch *scratch)
{
    for (i64 row = begin; row < end; row++) {
        const i64 slot =
            p->slots_dtype == QI_I32 ? ((const i32 *)p->slots)[row] : ((const i64 *)p->slots)[row];
        append_all(p, row, p->positions ? p->positions[row] : 0,
                   slot < 0 ? -1 : slot / p->page_size, slot % p->page_size, scratch);
    }
}

static void append_by_position(const append_params *p, i64 begin, i64 end, append_scratch *scratch)
{
    i64 request = 0;
    for (i64 row = begin; row < end; row++) {
        while (row >= p->index.qo_indptr[request + 1]) request++;
        const i64 position =
            p->positions ? p->positions[row]
                         : qi_kv_len(&p->index, request) + row - p->index.qo_indptr[request + 1];
        append_all(p, row, position, qi_kv_pages(&p->index, request)[position / p->page_size],
                   position % p->page_size, scratch);
    }
}

QI_CPU_KERNEL(append)
{
    const append_params *p = params;
    i64 begin, end;
    qi_task_share(task, p->nnz, 1, &begin, &end);
    append_scratch *scratch = task.scratch;
    if (p->rope.num_pairs > 0 && begin < end) qi_rope_turns(&p->rope, scratch->turns);
    if (p->slots)
        append_by_slot(p, begin, end, scratch);
    else
        append_by_position(p, begin, end, scratch);
    if (p->streams) qi_stream_end();
}
