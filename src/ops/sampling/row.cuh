/* row.cuh - a row of tokens as the threads of a kernel have it, and what its stages do to single values.
 *
 * Warps take runs of tokens in the order of the row, and in a run pieces of VEC neighbouring tokens a lane: a
 * sum by warps, in their order, says where in the row a running sum passes a number.
 *
 * RESIDENT rows are read once and stay in shared memory, where a thread has its own values and no other looks;
 * stages change them there. Rows too long for that are read again for each pass, and then gone through the stages
 * so far, of which `stages` has what they found.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_ROW_CUH
#define QI_SAMPLING_ROW_CUH

#include "kern/philox.h"
#include "kern/variant.h"
#include "ops/sampling/stage_list.cuh"

#define FROM_BLOCK (WORDS_OF + 1) /* a sample and its head */
#include "ops/sampling/exchange.cuh"
#include "ops/sampling/mass.cuh"

#ifdef QI_VARIANT
#include "qi_variant.h"
#endif

enum {
    RESIDENT = EACH > 0,
    AHEAD = VEC > 1 && !(RESIDENT && FINDS) ? 4 : 8, /* loads of a thread under way */
    PIECE = WARP * VEC,                              /* tokens */
    UNROLL = RESIDENT ? 2 : 1,
    WORDS = qi_words(DTYPE, VEC)
};

/* The last token kept, in a stage's order. */
typedef struct cut {
    float value;
    u32 index;
} cut;
#define KEEP_ALL                                                                                   \
    {                                                                                              \
        NO_LOGIT, ~0u                                                                              \
    }

/* What a stage does, once that is known. */
typedef struct stage_view {
    float value;
    cut last;
    double mean; /* of typical_p */
} stage_view;

/* The request's numbers, in shared memory: each wait for one would be as long as that for the row. */
typedef struct request_numbers {
    u32 values[MAX_STAGES]; /* of stages: f32, i32 of top_k */
    u64 random;             /* of the draw */
} request_numbers;

typedef struct row_view {
    const sampling_params *p;
    request_numbers *numbers; /* where ASKS */
    const char *from;         /* 0: no row */
    i64 request;
    u32 vocab, begin; /* this lane's first token */
    int pieces;       /* of a warp */
    int unit;         /* see mass_of */
    float to_unit;    /* a weight times this is below 2 */
    place at;
    float *x;        /* RESIDENT: this thread's piece i begins at i * THREADS * VEC */
    float largest;   /* of this thread, after the early stages */
    u64 mass;        /* of this thread, after softmax */
    u64 kept;        /* of the row, after top_p; 0: not known */
    const u64 *sent; /* of each warp, after top_p at the end; 0: not known */
    stage_view stages[NUM_STAGES + 1];
} row_view;

#define FOR_EACH_PIECE(r, i)                                                                       \
    _Pragma("unroll UNROLL") for (int i = 0; i < (RESIDENT ? EACH : (r)->pieces); i++)

/* Where a row stays this is less to keep than its begin. */
QI_INLINE u32 token_at(const row_view *r, int i)
{
    const u32 begin = RESIDENT ? (r->at.warp * (EACH * WARP) + r->at.lane) * VEC : r->begin;
    return begin + (u32)i * PIECE;
}

QI_INLINE float absent(const int kind)
{
    return kind == ROW_LOGITS ? NO_LOGIT : 0.f;
}

/* ---- values --------------------------------------------------------------------------------- */

/* Elements of a stage's tensor. */
QI_INLINE void load_elements(const row_view *r, const sampling_stage *stage, u32 token, float *out)
{
    const i64 first = r->request * stage->tensor_stride + token;
    const char *const from = qi_at(stage->tensor, stage->dtype, first);
    if (stage->dtype == QI_F32)
        qi_load(out, from, QI_F32, VEC);
    else if (stage->dtype == QI_F16)
        qi_load(out, from, QI_F16, VEC);
    else
        qi_load(out, from, QI_BF16, VEC);
}

/* Bits of the VEC tokens from `token` on, which are in one word. */
QI_INLINE u32 load_bits(const u32 *words, i64 stride, i64 request, u32 token)
{
    return words[request * stride + token / 32] >> token % 32;
}

/* ---- stages as they change VEC values --------------------------------------------------------- */

QI_INLINE void apply_penalty(const row_view *r, const int kind, const int s, u32 token, float *x)
{
    const sampling_stage *const stage = &r->p->stages[s];
    const float value = r->stages[s].value;
    u32 counts[VEC] = {}, bits = 0;
    if (stage->tensor) {
        const i64 first = r->request * stage->tensor_stride + token;
        qi_load_words(counts, qi_at(stage->tensor, QI_I32, first), QI_I32, VEC);
    }
    if (kind == STAGE_REPETITION && stage->prompt)
        bits = load_bits(stage->prompt, stage->prompt_stride, r->request, token);
    for (int e = 0; e < VEC; e++) {
        const i32 count = (i32)counts[e];
        if (kind == STAGE_REPETITION && (count > 0 || bits >> e & 1))
            x[e] = repetition_of(x[e], value);
        if (kind == STAGE_FREQUENCY) x[e] = frequency_of(x[e], value, count);
        if (kind == STAGE_PRESENCE && count > 0) x[e] = presence_of(x[e], value);
    }
}

QI_INLINE void apply_tensor(const row_view *r, const int kind, const int s, u32 token, float *x)
{
    const sampling_stage *const stage = &r->p->stages[s];
    if (kind == STAGE_BITMASK) {
        const u32 bits =
            load_bits((const u32 *)stage->tensor, stage->tensor_stride, r->request, token);
        for (int e = 0; e < VEC; e++)
            if (!(bits >> e & 1)) x[e] = NO_LOGIT;
        return;
    }
    float elements[VEC] = {};
    if (stage->tensor) load_elements(r, stage, token, elements);
    for (int e = 0; e < VEC; e++) {
        if (kind == STAGE_BIAS) x[e] = bias_of(x[e], elements[e]);
#ifdef QI_VARIANT
        if (kind == STAGE_USER)
            x[e] = clean_logit(user_stage(user_stages(s), x[e], r->stages[s].value, elements[e],
                                          (int)(token + e), (int)r->request));
#endif
    }
}

/* What typical_p orders a token with weight by. */
QI_INLINE float typical_of(const row_view *r, const int s, float w)
{
    return typical_value(information_of(w, r->unit), r->stages[s].mean);
}

/* By what stage s orders tokens: larger first, then the lower index. */
QI_INLINE float order_value(const row_view *r, const int s, float x)
{
    return kind_of(s) != STAGE_TYPICAL_P ? x : x > 0.f ? typical_of(r, s, x) : NO_LOGIT;
}

/* Stage s of VEC values from `token` on. From vocab on they are absent, which no stage changes. */
QI_INLINE void apply(const row_view *r, const int s, u32 token, float *x)
{
    const int kind = kind_of(s);
    const stage_view *const v = &r->stages[s];
    if (kind <= STAGE_PRESENCE) {
        if (token < r->vocab) apply_penalty(r, kind, s, token, x);
        return;
    }
    if (kind <= STAGE_USER) {
        if (token < r->vocab) apply_tensor(r, kind, s, token, x);
        return;
    }
    for (int e = 0; e < VEC; e++) {
        if (kind == STAGE_TEMPERATURE) {
            if (v->value == 0.f)
                x[e] = token + e == v->last.index ? x[e] : NO_LOGIT;
            else
                x[e] = temperature_of(x[e], v->value);
        } else if (kind == STAGE_SOFTMAX) {
            x[e] = weight_of(x[e], v->value);
        } else if (kind == STAGE_TOP_N_SIGMA || kind == STAGE_MIN_P) {
            x[e] = x[e] >= v->value ? x[e] : absent(row_kind(s));
        } else {
            const float y = order_value(r, s, x[e]);
            const int after = y == v->last.value && token + e > v->last.index;
            x[e] = y < v->last.value || after ? absent(row_kind(s)) : x[e];
        }
    }
}

/* ---- rows ----------------------------------------------------------------------------------- */

QI_INLINE void load_piece(const row_view *r, int i, u32 *words)
{
    const u32 token = token_at(r, i);
    if (r->from && token < r->vocab) qi_load_words(words, qi_at(r->from, DTYPE, token), DTYPE, VEC);
}

/* Piece i out of its words; *bad is set where it makes the row invalid. */
QI_INLINE void open_piece(const row_view *r, int i, const u32 *words, float *x, int *bad)
{
    if (!r->from || token_at(r, i) >= r->vocab) {
        for (int e = 0; e < VEC; e++) x[e] = absent(IN);
        return;
    }
    qi_unpack_all(x, words, DTYPE, VEC);
    for (int e = 0; e < VEC; e++) {
        if (r->p->valid) *bad |= IN == ROW_LOGITS ? bad_logit(x[e]) : bad_prob(x[e]);
        x[e] = IN == ROW_LOGITS ? clean_logit(x[e]) : clean_prob(x[e]);
    }
}

/* Takes piece i from stage `first` to before stage `end`. */
QI_INLINE void apply_all(const row_view *r, const int first, const int end, int i, float *x)
{
    const u32 token = token_at(r, i);
#define APPLY(s)                                                                                   \
    if (s < NUM_STAGES && first <= s && s < end) apply(r, s, token, x);
    FOR_EACH_STAGE(APPLY)
#undef APPLY
}

/* Piece i before stage s, read again. A function of its own: inlined, every pass would have the text of all stages. */
static __device__ __noinline__ void reread_piece(const row_view *r, int s, int i, float *x)
{
    u32 words[WORDS];
    int bad = 0;
    load_piece(r, i, words);
    open_piece(r, i, words, x, &bad);
    apply_all(r, 0, s, i, x);
}

/* Piece i before stage s. */
QI_INLINE void piece(const row_view *r, const int s, int i, float *x)
{
    if (!RESIDENT) {
        reread_piece(r, s, i, x);
        return;
    }
    qi_load(x, r->x + i * (THREADS * VEC), QI_F32, VEC);
    if (s > NUM_KEPT) apply(r, s - 1, token_at(r, i), x);
}

QI_INLINE void keep_piece(const row_view *r, int i, const float *x)
{
    qi_store(r->x + i * (THREADS * VEC), x, QI_F32, VEC);
}

/* ---- masses --------------------------------------------------------------------------------- */

/* Times to_unit_of() where a row's unit may be another than 1. */
QI_INLINE float in_unit(const row_view *r, const int kind, float w)
{
    return kind == ROW_PROBS ? rn_mul(w, r->to_unit) : w;
}

/* The mass of a piece before stage s. */
QI_INLINE u64 piece_mass(const row_view *r, const int s, const float *x)
{
    mass_sum sum = {};
    for (int e = 0; e < VEC; e++) add_mass(&sum, in_unit(r, row_kind(s), x[e]));
    return whole_mass(sum, VEC);
}

/* Does stage s, a filter of logits, leave its work to the softmax that follows? */
QI_INLINE constexpr int waits(const int s)
{
    const int filters = s >= 0 && (kind_of(s) == STAGE_TOP_K || kind_of(s) == STAGE_TOP_N_SIGMA);
    return filters && kind_of(s + 1) == STAGE_SOFTMAX;
}

/* Takes the row through stage s, whose view is complete. */
QI_INLINE void apply_to_row(row_view *r, const int s)
{
    if (!RESIDENT || s >= NUM_KEPT || waits(s)) return;
    const int filtered = waits(s - 1); /* most pieces have nothing left to make weights of */
    r->mass = 0;
    FOR_EACH_PIECE(r, i)
    {
        float x[VEC];
        int any = !filtered;
        piece(r, s, i, x);
        if (filtered) apply_all(r, s - 1, s, i, x);
        for (int e = 0; e < VEC; e++) any |= x[e] > NO_LOGIT;
        if (any)
            apply_all(r, s, s + 1, i, x);
        else
            for (int e = 0; e < VEC; e++) x[e] = 0.f;
        keep_piece(r, i, x);
        if (any && kind_of(s) == STAGE_SOFTMAX) r->mass += piece_mass(r, s + 1, x);
    }
}

/* The mass of this thread before stage s. */
QI_INLINE u64 thread_mass(const row_view *r, const int s)
{
    if (RESIDENT && s > 0 && s <= NUM_KEPT && kind_of(s - 1) == STAGE_SOFTMAX) return r->mass;
    u64 mass = 0;
    FOR_EACH_PIECE(r, i)
    {
        float x[VEC];
        piece(r, s, i, x);
        mass += piece_mass(r, s, x);
    }
    return mass;
}

/* The largest value of this thread before stage s; absent() if there is none. */
QI_INLINE float thread_largest(const row_view *r, const int s)
{
    if (RESIDENT && s == NUM_EARLY) return r->largest;
    float largest = absent(row_kind(s));
    FOR_EACH_PIECE(r, i)
    {
        float x[VEC];
        piece(r, s, i, x);
        for (int e = 0; e < VEC; e++) largest = fmaxf(largest, x[e]);
    }
    return largest;
}

/* Do all stages from the early ones to s keep the row's largest token? Filters of logits do. */
QI_INLINE constexpr int keeps_largest(const int s)
{
    int i = NUM_EARLY;
    while (i < s && (kind_of(i) == STAGE_TOP_K || kind_of(i) == STAGE_TOP_N_SIGMA)) i++;
    return i == s;
}

/* Of the row. */
QI_INLINE float row_largest(row_view *r, const int s)
{
    const float mine = RESIDENT && keeps_largest(s) ? r->largest : thread_largest(r, s);
    return value_of((u32)max_row(&r->at, key_of(mine)));
}

/* The number of stage s, and that of a top_k, which is whole. */
QI_INLINE float number_of(const row_view *r, const int s)
{
    if (ASKS) return float_of(r->numbers->values[s]);
    return request_f32(&r->p->stages[s].value, r->request);
}

QI_INLINE i32 whole_of(const row_view *r, const int s)
{
    if (ASKS) return (i32)r->numbers->values[s];
    return request_i32(&r->p->stages[s].value, r->request);
}

/* The draw's random number. */
QI_INLINE u64 random_of(const row_view *r)
{
    if (ASKS) return r->numbers->random;
    return qi_philox_u64(request_u64(&r->p->seed, r->request),
                         request_u64(&r->p->offset, r->request));
}

/* What the lanes of the last warp have of these numbers, asked for before the row: those of stages, seed, offset. */
QI_INLINE u64 ask_numbers(const row_view *r)
{
    const u32 lane = r->at.lane;
    if (!ASKS || threadIdx.x / WARP != WARPS - 1) return 0;
    if (lane < NUM_STAGES) return (u32)request_i32(&r->p->stages[lane].value, r->request);
    return request_u64(lane == WARP - 1 ? &r->p->offset : &r->p->seed, r->request);
}

/* By whole warps, when the row's first loads are under way, so that one wait is for all; a barrier follows. */
QI_INLINE void keep_numbers(const row_view *r, u64 asked)
{
    const u32 lane = r->at.lane;
    if (!ASKS || threadIdx.x / WARP != WARPS - 1) return;
    const u64 seed = __shfl_sync(ALL_LANES, asked, WARP - 2);
    const u64 random = qi_philox_u64(seed, __shfl_sync(ALL_LANES, asked, WARP - 1));
    if (lane < NUM_STAGES) r->numbers->values[lane] = (u32)asked;
    if (lane == 0) r->numbers->random = random;
}

QI_INLINE float early_value(const row_view *r, const int s)
{
    const float value = request_f32(&r->p->stages[s].value, r->request);
    if (kind_of(s) != STAGE_TEMPERATURE) return value;
    return value == 0.f ? 1.f : rn_div(1.f, value); /* 0 is for run_stage() */
}

/* The values of the stages before `end`, which are early ones. */
QI_INLINE void read_values(row_view *r, const int end)
{
#define READ_VALUE(s)                                                                              \
    if (s < NUM_STAGES && s < end) r->stages[s].value = early_value(r, s);
    FOR_EACH_STAGE(READ_VALUE)
#undef READ_VALUE
}

/* Brings a row that changes by products alone into its room, where the warp has VEC tokens at every place. 0: an element
 * or a product was NaN or +inf, which the largest tells, and the row is to be cleaned. */
QI_INLINE int load_products(row_view *r, u64 asked)
{
    float largest = NO_LOGIT;
#pragma unroll 1
    for (int first = 0; first < r->pieces; first += AHEAD) {
        u32 words[AHEAD][WORDS];
#pragma unroll
        for (int n = 0; n < AHEAD; n++)
            if (first + n < r->pieces)
                qi_load_words(words[n], qi_at(r->from, DTYPE, token_at(r, first + n)), DTYPE, VEC);
        if (first == 0) {
            read_values(r, NUM_EARLY);
            keep_numbers(r, asked);
        }
#pragma unroll
        for (int n = 0; n < AHEAD; n++) {
            float x[VEC];
            if (first + n >= r->pieces) continue;
            qi_unpack_all(x, words[n], DTYPE, VEC);
            for (int e = 0; e < VEC; e++) {
#define SCALE(s)                                                                                   \
    if (s < NUM_EARLY) x[e] = rn_mul(x[e], r->stages[s].value);
                FOR_EACH_STAGE(SCALE)
#undef SCALE
                largest = max_nan(largest, x[e]);
            }
            keep_piece(r, first + n, x);
        }
    }
    if (!(largest <= LARGEST)) return 0;
    r->largest = largest;
    return 1;
}

QI_INLINE void open_row(row_view *r, const sampling_params *p, mailbox *box,
                        request_numbers *numbers, u32 rank, float *room)
{
    const u32 lane = threadIdx.x % WARP, warp = rank * WARPS + threadIdx.x / WARP;
    r->p = p;
    r->numbers = numbers;
    r->request = blockIdx.x / CLUSTER;
    r->vocab = (u32)p->vocab;
    r->at = {box, rank, warp, lane, 0};
    r->pieces = RESIDENT ? EACH : (int)((r->vocab + ALL_WARPS * PIECE - 1) / (ALL_WARPS * PIECE));
    r->begin = (warp * (u32)r->pieces * WARP + lane) * VEC;
    r->unit = EXPONENT_BIAS;
    r->to_unit = 1.f;
    r->kept = 0;
    r->sent = 0;
    const i64 row = p->indices ? p->indices[r->request] : r->request;
    r->from = row >= 0 && row < p->num_rows ? qi_at(p->rows, DTYPE, row * p->rows_stride) : 0;
    r->x = room + threadIdx.x * VEC;
    r->largest = absent(row_kind(NUM_EARLY));
}

/* Brings a row into its room if it stays there, through the early stages. Whether a value in it makes it invalid. */
QI_INLINE int read_row(row_view *r, u64 asked)
{
    int bad = !r->from;
    if (!RESIDENT && !r->p->valid) return bad;
    const u32 end = (r->at.warp + 1) * (u32)r->pieces * PIECE;
    const int products = PRODUCTS && r->from && end <= r->vocab; /* the same for all lanes */
    if (products && load_products(r, asked)) return 0;
    if (!products) {
        read_values(r, NUM_EARLY);
        keep_numbers(r, asked);
    }
#pragma unroll 1
    for (int first = 0; first < r->pieces; first += AHEAD) {
        u32 words[AHEAD][WORDS];
#pragma unroll
        for (int n = 0; n < AHEAD; n++)
            if (first + n < r->pieces) load_piece(r, first + n, words[n]);
#pragma unroll
        for (int n = 0; n < AHEAD; n++) {
            float x[VEC];
            if (first + n >= r->pieces) continue;
            open_piece(r, first + n, words[n], x, &bad);
            if (!RESIDENT) continue;
            apply_all(r, 0, NUM_EARLY, first + n, x);
            keep_piece(r, first + n, x);
            for (int e = 0; e < VEC; e++) r->largest = fmaxf(r->largest, x[e]);
        }
    }
    return bad;
}

/* The row's largest value says it. */
QI_INLINE void set_unit(row_view *r, float largest)
{
    const u32 exponent = bits_of(largest) >> 23;
    if (IN != ROW_PROBS || exponent == 0) return;
    r->unit = (int)exponent;
    r->to_unit = to_unit_of(r->unit);
}

#endif
