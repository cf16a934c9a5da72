/* append.cpu.c - scatter rows of k and v into pages. Tasks share the rows.
 * Bound: memory, one read and one write of every row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/simd.h"
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

static void append_row(const append_tensor *t, i64 row, i64 page, i64 slot)
{
    const i64 size = (i64)qi_size_of(t->dtype), cache_size = (i64)qi_size_of(t->cache_dtype);
    const char *in = (const char *)t->rows + row * t->row_stride * size;
    char *out = (char *)t->cache + (page * t->page_stride + slot * t->slot_stride) * cache_size;
    for (i64 head = 0; head < t->num_heads; head++) {
        if (t->dtype == t->cache_dtype)
            memcpy(out, in, (size_t)(t->head_dim * size));
        else
            convert(out, t->cache_dtype, in, t->dtype, t->head_dim);
        in += t->row_head_stride * size;
        out += t->head_stride * cache_size;
    }
}

static void append_by_slot(const append_params *p, i64 begin, i64 end)
{
    for (i64 row = begin; row < end; row++) {
        const i64 slot =
            p->slots_dtype == QI_I32 ? ((const i32 *)p->slots)[row] : ((const i64 *)p->slots)[row];
        if (slot < 0) continue;
        append_row(&p->k, row, slot / p->page_size, slot % p->page_size);
        append_row(&p->v, row, slot / p->page_size, slot % p->page_size);
    }
}

static void append_by_position(const append_params *p, i64 begin, i64 end)
{
    i64 request = 0;
    for (i64 row = begin; row < end; row++) {
        while (row >= p->index.qo_indptr[request + 1]) request++;
        const i64 position =
            p->positions ? p->positions[row]
                         : qi_kv_len(&p->index, request) + row - p->index.qo_indptr[request + 1];
        const i64 page = qi_kv_pages(&p->index, request)[position / p->page_size];
        append_row(&p->k, row, page, position % p->page_size);
        append_row(&p->v, row, page, position % p->page_size);
    }
}

QI_CPU_KERNEL(append)
{
    const append_params *p = params;
    i64 begin, end;
    qi_task_share(task, p->nnz, 1, &begin, &end);
    if (p->slots)
        append_by_slot(p, begin, end);
    else
        append_by_position(p, begin, end);
}
