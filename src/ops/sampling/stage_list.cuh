/* stage_list.cuh - the list of stages as the compiler of its kernel knows it: constants, so that what a list has not
 * is dropped. 4 bits a stage in STAGES_0 to STAGES_2: its kind + 1, 0 past the last.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_STAGE_LIST_CUH
#define QI_SAMPLING_STAGE_LIST_CUH

#include "kern/cuda/prelude.cuh"
#include "ops/sampling/sampling_params.h"

QI_INLINE constexpr int listed_kind(const int s)
{
    const int packed = s < 7 ? STAGES_0 : s < 14 ? STAGES_1 : STAGES_2;
    return (packed >> s % 7 * 4 & 15) - 1;
}

/* All of it in one number. A draw from logits begins with a softmax, and else is no stage, but what follows the
 * list. */
QI_INLINE constexpr u64 pack_stages()
{
    u64 packed = 0;
    int row = IN;
    for (int s = 0; s < MAX_STAGES; s++) {
        int kind = listed_kind(s);
        if (kind == STAGE_SAMPLE) kind = row == ROW_LOGITS ? STAGE_SOFTMAX : -1;
        if (kind == STAGE_SOFTMAX) row = ROW_WEIGHTS;
        packed |= (u64)(kind + 1) << 4 * s;
    }
    return packed;
}
enum : u64 { STAGES = pack_stages() };

QI_INLINE constexpr int kind_of(const int s)
{
    return (int)(s < MAX_STAGES ? STAGES >> 4 * s & 15 : 0) - 1;
}

QI_INLINE constexpr int count_stages()
{
    int n = 0;
    while (kind_of(n) >= 0) n++;
    return n;
}

/* Stages that a row goes through as it is loaded: they take a token without looking at others. A temperature of 0
 * looks, and is put off to after them: what follows a temperature waits. */
QI_INLINE constexpr int count_early_stages()
{
    int n = 0;
    while (kind_of(n) >= 0 && kind_of(n) <= STAGE_TEMPERATURE)
        if (kind_of(n++) == STAGE_TEMPERATURE) break;
    return EACH > 0 ? n : 0;
}

/* Stages whose results stay with a row: a filter at the end is applied by who looks at the row then. */
QI_INLINE constexpr int count_kept_stages()
{
    const int n = count_stages();
    return n > 0 && kind_of(n - 1) >= STAGE_TOP_K ? n - 1 : n;
}

/* Does a stage look for the end of a prefix? */
QI_INLINE constexpr int finds()
{
    for (int s = 0; s < count_stages(); s++)
        if (kind_of(s) >= STAGE_TOP_K && kind_of(s) != STAGE_MIN_P) return 1;
    return 0;
}

/* Do rows change by products alone as they are loaded? */
QI_INLINE constexpr int loads_products()
{
    for (int s = 0; s < count_early_stages(); s++)
        if (kind_of(s) != STAGE_TEMPERATURE) return 0;
    return EACH > 0 && IN == ROW_LOGITS;
}

QI_INLINE constexpr int find_softmax()
{
    int n = 0;
    while (n < MAX_STAGES && kind_of(n) != STAGE_SOFTMAX) n++;
    return n;
}

/* Is the largest weight before stage s the 1 that softmax made it? Of the filters only typical_p drops it. */
QI_INLINE constexpr int largest_is_one(const int s)
{
    for (int i = 0; i < s; i++)
        if (kind_of(i) == STAGE_TYPICAL_P) return 0;
    return s > find_softmax();
}

enum {
    NUM_STAGES = count_stages(),
    NUM_EARLY = count_early_stages(),
    NUM_KEPT = count_kept_stages(),
    SOFTMAX_AT = find_softmax(), /* MAX_STAGES: nowhere */
    FINDS = finds(),
    PRODUCTS = loads_products(),
};

/* X(0) to X(15). A loop over stages would be unrolled too late: their constants are to drop code before that. */
#define FOR_EACH_STAGE(X)                                                                          \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

/* What a row is before stage s. */
QI_INLINE constexpr int row_kind(const int s)
{
    return s > SOFTMAX_AT ? ROW_WEIGHTS : IN;
}

/* Can all stages after s go on with a list? */
QI_INLINE constexpr int ends_in_list(const int s)
{
    if (OUT != ROW_TOKENS || (kind_of(s) != STAGE_TOP_K && kind_of(s) != STAGE_TOP_P)) return 0;
    for (int i = s + 1; i < NUM_STAGES; i++)
        if (!TAKES_LIST(kind_of(i))) return 0;
    return 1;
}

/* Does a row that stays end so after top_k? */
QI_INLINE constexpr int ends_with_top_k()
{
    for (int s = 0; s < NUM_STAGES; s++)
        if (EACH > 0 && kind_of(s) == STAGE_TOP_K && ends_in_list(s)) return 1;
    return 0;
}

enum { ASKS = ends_with_top_k() }; /* for the request's numbers early */

/* The number of user stages before s. */
QI_INLINE constexpr int user_stages(const int s)
{
    int n = 0;
    for (int i = 0; i < s; i++) n += kind_of(i) == STAGE_USER;
    return n;
}

/* The stage whose pass lists tokens; MAX_STAGES: none. */
QI_INLINE constexpr int find_front()
{
    int s = 0;
    while (kind_of(s) >= 0 && kind_of(s) < STAGE_SOFTMAX) s++;
    const int softmax = kind_of(s) == STAGE_SOFTMAX;
    if (kind_of(s + softmax) != STAGE_TOP_P || (!softmax && IN == ROW_LOGITS)) return MAX_STAGES;
    return EACH == 0 || s == NUM_EARLY ? s : MAX_STAGES; /* filters before it wait for softmax */
}

enum {
    FRONT_AT = find_front(),
    FRONT = (FRONT_AT < MAX_STAGES),
    TOP_P_AT = FRONT_AT + (kind_of(FRONT_AT) == STAGE_SOFTMAX),
    TOP_P_IS_LAST = FRONT && TOP_P_AT == NUM_STAGES - 1,
    DRAWS = TOP_P_IS_LAST && OUT == ROW_TOKENS, /* from what top_p keeps */
    LEAN = CROWDED && DRAWS, /* three blocks an SM, of which the first of a row ends it alone */
    BINS = LEAN ? 192 : 256, /* of top_p's sample (guess.cuh) */
    IN_WORD = 4,             /* counts of them, 16 bits each, as they are sent */
    WORDS_OF = BINS / IN_WORD,
};

#endif
