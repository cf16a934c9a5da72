/* stream_row.cuh - rows that are not kept, where stages of single tokens and then top_k begin a list that can end
 * with the few tokens that are left (list.cuh): streamed.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_STREAM_ROW_CUH
#define QI_SAMPLING_STREAM_ROW_CUH

#include "ops/sampling/list.cuh"

/* The top_k that rows are streamed to, MAX_STAGES: none. A temperature, if any, comes just before it: one of 0 is a
 * k of 1. */
QI_INLINE constexpr int find_stream()
{
    int s = 0;
    while (kind_of(s) >= 0 && kind_of(s) < STAGE_TEMPERATURE) s++;
    if (kind_of(s) == STAGE_TEMPERATURE) s++;
    return EACH == 0 && ends_in_list(s) ? s : MAX_STAGES;
}

enum {
    STREAM_AT = find_stream(),
    STREAMS = STREAM_AT != MAX_STAGES,
    HEATED = STREAM_AT != 0 && kind_of(STREAM_AT - 1) == STAGE_TEMPERATURE,
    RAW = IN == ROW_LOGITS && STREAM_AT == HEATED, /* the largest element has the largest value */
    STREAM_ROOM = 2 * MOST_LISTED
};

typedef row_view source;

QI_INLINE void load_words(const row_view *r, u32 i, u32 *words)
{
    load_piece(r, (int)i, words);
}

QI_INLINE void values_of(const row_view *r, u32 i, const u32 *words, float *x, int *bad)
{
    open_piece(r, (int)i, words, x, bad);
    apply_all(r, 0, STREAM_AT, (int)i, x);
}

/* Of raw elements the largest tells whether it is to be cleaned: NaN is the largest. */
QI_INLINE float largest_raw(const u32 *words)
{
    float x[VEC], largest;
    qi_unpack_all(x, words, DTYPE, VEC);
    largest = x[0];
    for (int e = 1; e < VEC; e++) largest = max_nan(largest, x[e]);
    return largest;
}

QI_INLINE float largest_value(const row_view *r, u32 i, const u32 *words, int *bad)
{
    float x[VEC], largest = absent(IN);
    if (!r->from || token_at(r, (int)i) >= r->vocab) return largest;
    if (RAW) {
        largest = largest_raw(words);
        if (largest <= LARGEST)
            return HEATED ? temperature_of(largest, r->stages[STREAM_AT - 1].value) : largest;
    }
    values_of(r, i, words, x, bad);
    largest = x[0];
    for (int e = 1; e < VEC; e++) largest = fmaxf(largest, x[e]);
    return largest;
}

QI_INLINE void load_values(const row_view *r, u32 i, float *x)
{
    u32 words[WORDS];
    int bad = 0;
    load_words(r, i, words);
    values_of(r, i, words, x, &bad);
}

#include "ops/sampling/stream.cuh"

_Static_assert(!STREAMS || sizeof(candidates) <= sizeof(token_list),
               "candidates are where the list will be");

/* How many tokens a row is streamed to; 0: it is not. */
QI_INLINE u32 stream_k(const row_view *r)
{
    if (!STREAMS) return 0;
    if (HEATED && number_of(r, STREAM_AT - 1) == 0.f) return 1;
    const i32 k = whole_of(r, STREAM_AT);
    return k > 0 && k <= MOST_LISTED && (u32)k < r->vocab ? (u32)k : 0;
}

/* All stages. Returns, in the first block, whether there was mass to draw from. */
QI_INLINE int run_streamed(row_view *r, finder *f, u32 k, int *bad)
{
    candidates *const c = (candidates *)&f->list;
    r->begin = r->at.lane * VEC; /* pieces are counted through the row */
    read_values(r, STREAM_AT);
    const u64 low = (u64)all_keys(STREAM_AT).low << 32;
    u32 n = stream(r, &r->at, c, r->vocab, k, low, bad);
    n = collect(&r->at, c, n, k);
    if (r->at.rank != 0) return 0;
    __syncthreads(); /* values lie where the counts were */
    for (u32 i = threadIdx.x; i < n; i += THREADS)
        f->list.values[i] = value_of(key_in(c->ranks[i]));
    __syncthreads();
    sort_list(f, n);
    if (n > 0) set_unit(r, f->list.values[0]);
    return finish_list(r, STREAM_AT, f, min(n, k));
}

#endif
