/* sampling_ref.c - see sampling_ref.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ref/sampling_ref.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kern/philox.h"

__extension__ typedef unsigned __int128 wide;

enum { UNIT = 42 }; /* 2^-42 of the largest one's power of two */

/*
 * exp(t) in f32: t = l - max is rounded by 2^-24 |t|, its product with log2(e) by as much again, log2(e) itself by
 * less, and an absolute error of the exponent is a relative one of the power; a polynomial of f32 adds a few
 * times 2^-24. Twice that. exp(0) is 1.
 */
#define WEIGHT_ERROR(t) ((t) == 0 ? 0 : 0x1p-21 + 0x1p-22 * fabs(t))
/* Weights below may be 0 in f32, and the smallest numbers of f32 are. */
#define SMALL_WEIGHT 0x1p-98
#define NO_WEIGHT    0x1p-127
/* Typical: logarithms are numbers of 2^-14 powers of two, rounded; so is their mean. */
#define LOG_ERROR 0x1p-13
/* Standard deviation: differences are numbers of 20 bits, rounded, and so is the root of their mean square, which
 * moves by no more than each of them. */
#define SIGMA_ERROR(range) (1.5 * 0x1p-20 * (range))

/* A token in an order: by key, largest first; equal keys by value, largest first, then by index. */
typedef struct ref_item {
    double key, value;
    int32_t index;
} ref_item;

static void *array(int64_t n, size_t bytes)
{
    void *p = calloc((size_t)n, bytes);
    if (p) return p;
    printf("sampling_ref: out of memory\n");
    abort();
}

ref_row ref_row_new(int64_t max_vocab)
{
    return (ref_row){
        .value = array(max_vocab, sizeof(double)),
        .low = array(max_vocab, sizeof(double)),
        .high = array(max_vocab, sizeof(double)),
        .fate = array(max_vocab, 1),
        .order = array(max_vocab, sizeof(ref_item)),
    };
}

void ref_row_free(ref_row *r)
{
    free(r->value), free(r->low), free(r->high), free(r->fate), free(r->order);
}

/* ---- masses --------------------------------------------------------------------------------- */

static uint64_t mass(const ref_row *r, double x)
{
    return x < (double)FLT_MIN ? 0 : (uint64_t)floor(ldexp(x, UNIT - r->exponent));
}

static uint64_t low_mass(const ref_row *r, int64_t i)
{
    return r->fate[i] == REF_KEPT ? mass(r, r->low[i]) : 0;
}

static uint64_t high_mass(const ref_row *r, int64_t i)
{
    return r->fate[i] != REF_DROPPED ? mass(r, r->high[i]) : 0;
}

/* Of those surely left. Every filter but typical keeps the largest, whichever token it is. */
static void set_largest(ref_row *r)
{
    for (int64_t i = 0; i < r->vocab; i++)
        if (r->fate[i] == REF_KEPT) r->largest = fmax(r->largest, r->low[i]);
}

static uint64_t at_most(uint64_t x, uint64_t most)
{
    return x < most ? x : most;
}

static uint64_t at_least(uint64_t x, uint64_t least)
{
    return x > least ? x : least;
}

/*
 * After a stage: all that is surely left, and what may be; where the stage promises more, at least and at most that.
 * Of many tokens whose fates are open the sum may be known well. If there is mass at all, a token has it.
 */
static void set_mass(ref_row *r, uint64_t least, uint64_t most)
{
    uint64_t low = 0, high = 0, smallest = UINT64_MAX;
    for (int64_t i = 0; i < r->vocab; i++) {
        low += low_mass(r, i);
        high += high_mass(r, i);
        if (high_mass(r, i) > 0) smallest = at_most(mass(r, r->low[i]), smallest);
    }
    const bool some = r->least > 0 && high > 0;
    r->least = at_least(low, some ? at_least(least, smallest) : least);
    r->most = at_most(high, most);
}

/* ---- rows ----------------------------------------------------------------------------------- */

/* f32 as the library has it after a load and after each stage. */
static double sane(const ref_row *r, double x)
{
    if (r->kind == QKV_LOGITS) {
        if (isnan(x)) return (double)-INFINITY;
    } else if (!(x >= (double)FLT_MIN)) {
        return 0;
    }
    return x > (double)FLT_MAX ? (double)FLT_MAX : x;
}

/* A token that was dropped is back where a stage makes more than -inf of its -inf. */
static void set_logit(ref_row *r, int64_t i, float x)
{
    r->value[i] = sane(r, (double)x);
    if (r->value[i] == (double)-INFINITY)
        r->fate[i] = REF_DROPPED;
    else if (r->fate[i] == REF_DROPPED)
        r->fate[i] = REF_KEPT;
    r->is_sorted = false;
}

static float logit(const ref_row *r, int64_t i)
{
    return r->fate[i] == REF_DROPPED ? -INFINITY : (float)r->value[i];
}

void ref_begin(ref_row *r, int32_t kind, const double *row, int64_t vocab)
{
    r->vocab = vocab;
    r->kind = kind;
    r->clean = row != NULL;
    r->is_sorted = false;
    r->exponent = 0;
    double largest = 0;
    for (int64_t i = 0; i < vocab; i++) {
        const double x = row ? row[i] : kind == QKV_LOGITS ? (double)-INFINITY : 0;
        if (isnan(x) || x == (double)INFINITY || (kind == QKV_PROBS && x < 0)) r->clean = false;
        r->value[i] = r->low[i] = r->high[i] = sane(r, x);
        r->fate[i] =
            r->value[i] > (kind == QKV_LOGITS ? (double)-INFINITY : 0) ? REF_KEPT : REF_DROPPED;
        largest = fmax(largest, r->value[i]);
    }
    if (kind == QKV_PROBS && largest > 0) r->exponent = ilogb(largest);
    r->largest = 0;
    if (kind == QKV_PROBS) {
        r->least = 0;
        set_mass(r, 0, UINT64_MAX);
        set_largest(r);
    }
}

static int by_key(const void *a, const void *b)
{
    const ref_item *x = a, *y = b;
    if (x->key != y->key) return x->key > y->key ? -1 : 1;
    if (x->value != y->value) return x->value > y->value ? -1 : 1;
    return (x->index > y->index) - (x->index < y->index);
}

/* Those not dropped; keys NULL: by value. */
static void sort(ref_row *r, const double *keys)
{
    if (r->is_sorted && !keys) {
        int64_t n = 0;
        for (int64_t s = 0; s < r->num_ordered; s++)
            if (r->fate[r->order[s].index] != REF_DROPPED) r->order[n++] = r->order[s];
        r->num_ordered = n;
        return;
    }
    r->num_ordered = 0;
    for (int64_t i = 0; i < r->vocab; i++)
        if (r->fate[i] != REF_DROPPED)
            r->order[r->num_ordered++] =
                (ref_item){keys ? keys[i] : r->value[i], r->value[i], (int32_t)i};
    qsort(r->order, (size_t)r->num_ordered, sizeof *r->order, by_key);
    r->is_sorted = keys == NULL;
}

/* ---- prefixes of an order ------------------------------------------------------------------- */

/* What may stand before a token of an order counts as much as this. */
typedef struct before {
    uint64_t low, high;
} before;

/*
 * A filter that keeps a prefix of the order just sorted, as long as what stands before a token counts less than
 * wish, which is a number from low_wish to high_wish. It counts tokens, or masses. first [vocab] and last
 * are the ends of where a token's key may be; of two tokens of one value the lower index is before the other,
 * whatever their keys are.
 */
static void keep_prefix(ref_row *r, const double *first, const double *last, bool masses,
                        uint64_t low_wish, uint64_t high_wish)
{
    const int64_t n = r->num_ordered;
    before *sums = array(n + 1, sizeof *sums);
    unsigned char *fates = array(n + 1, 1);
    for (int64_t s = 0; s < n; s++) {
        const int64_t i = r->order[s].index;
        sums[s + 1] = sums[s];
        sums[s + 1].low += masses ? low_mass(r, i) : r->fate[i] == REF_KEPT;
        sums[s + 1].high += masses ? high_mass(r, i) : 1;
    }
    /* [0, surely) are before all of [begin, end), which have one value; those from never on are not. Keys fall,
     * so that both only grow. */
    int64_t surely = 0, never = 0;
    for (int64_t begin = 0, end; begin < n; begin = end) {
        const int64_t b = r->order[begin].index;
        for (end = begin; end < n && r->order[end].value == r->order[begin].value &&
                          r->order[end].key == r->order[begin].key;)
            end++;
        while (surely < begin && first[r->order[surely].index] > last[b]) surely++;
        if (never < end) never = end;
        while (never < n && last[r->order[never].index] >= first[b]) never++;
        for (int64_t s = begin; s < end; s++) {
            const unsigned char old = r->fate[r->order[s].index];
            const uint64_t low = sums[surely].low + (sums[s].low - sums[begin].low);
            const uint64_t high = sums[s].high + (sums[never].high - sums[end].high);
            fates[s] = low >= high_wish ? REF_DROPPED : high < low_wish ? old : REF_EITHER;
        }
    }
    for (int64_t s = 0; s < n; s++) r->fate[r->order[s].index] = fates[s];
    free(sums), free(fates);
}

/* ceil(share * kept), at least 1; twice the rounding of that product in double is open, if it is rounded. */
static void wishes(const ref_row *r, float share, uint64_t *low, uint64_t *high)
{
    const uint64_t kept[] = {r->least, r->most};
    uint64_t wish[2];
    int e;
    const uint64_t m = (uint64_t)ldexp(frexp((double)share, &e), 24); /* share = m * 2^(e - 24) */
    for (int i = 0; i < 2; i++) {
        const wide product = (wide)m * kept[i];
        const int shift = 24 - e;
        wish[i] =
            shift > 126 ? product > 0 : (uint64_t)((product + (((wide)1 << shift) - 1)) >> shift);
        const double rounded = (double)kept[i] * (double)m;
        const bool exact = (wide)rounded == product;
        const uint64_t slack = exact ? 0 : 1 + (wish[i] >> 51);
        if (i == 0)
            wish[i] = wish[i] > slack ? wish[i] - slack : 0;
        else
            wish[i] += slack;
        if (wish[i] < 1) wish[i] = 1;
    }
    *low = wish[0];
    *high = wish[1];
}

static void keep_top_k(ref_row *r, int32_t k)
{
    if (k <= 0 || k >= r->vocab) return;
    sort(r, NULL);
    /* the k largest are no less than any k that are surely there, and no more than the first k that may be */
    uint64_t least = 0, most = 0;
    for (int64_t s = 0, low = 0; s < r->num_ordered && r->kind == QKV_PROBS && low < k; s++) {
        const int64_t i = r->order[s].index;
        if (s < k) most += high_mass(r, i);
        if (r->fate[i] == REF_KEPT) {
            least += low_mass(r, i);
            low++;
        }
    }
    keep_prefix(r, r->low, r->high, false, (uint64_t)k, (uint64_t)k);
    if (r->kind == QKV_PROBS) set_mass(r, least, at_most(most, r->most));
}

/* Of a prefix that ends once it has its wish: it has that, and one token more at most. */
static void set_mass_of_prefix(ref_row *r, uint64_t low_wish, uint64_t high_wish)
{
    uint64_t largest = 0;
    for (int64_t i = 0; i < r->vocab; i++) largest = at_least(high_mass(r, i), largest);
    set_mass(r, at_most(low_wish, r->least), at_most(high_wish - 1 + largest, r->most));
}

static void keep_top_p(ref_row *r, float p)
{
    if (p >= 1) return;
    uint64_t low, high;
    wishes(r, p, &low, &high);
    sort(r, NULL);
    keep_prefix(r, r->low, r->high, true, low, high);
    set_mass_of_prefix(r, low, high);
}

/* ---- the other filters ------------------------------------------------------------------------ */

/* The f32 numbers around min_p * x, or the one that it is. */
static float product_below(float min_p, double x)
{
    const double exact = (double)min_p * x;
    const float f = (float)exact;
    return (double)f > exact ? nextafterf(f, 0) : f;
}

static float product_above(float min_p, double x)
{
    const double exact = (double)min_p * x;
    const float f = (float)exact;
    return (double)f < exact ? nextafterf(f, INFINITY) : f;
}

static void keep_min_p(ref_row *r, float min_p)
{
    const double low = r->largest;
    double high = 0;
    for (int64_t i = 0; i < r->vocab; i++)
        if (r->fate[i] != REF_DROPPED) high = fmax(high, r->high[i]);
    const double below = (double)product_below(min_p, low);
    const double above = (double)product_above(min_p, high);
    uint64_t lost_low = 0, lost_high = 0;
    for (int64_t i = 0; i < r->vocab; i++) {
        if (r->fate[i] == REF_DROPPED || r->low[i] >= above) continue;
        lost_high += high_mass(r, i);
        if (r->high[i] < below) lost_low += low_mass(r, i);
        r->fate[i] = r->high[i] < below ? REF_DROPPED : REF_EITHER;
    }
    const uint64_t left = r->least - at_most(lost_high, r->least);
    set_mass(r, at_least(left, mass(r, low)), r->most - at_most(lost_low, r->most));
}

/*
 * The key is -|mean - x| where x = -log2 of the weight and mean the mean of x, by which all differ from -log2 p and
 * from the entropy by the same number. Tokens that may be missing have their masses at either end of
 * where their x are.
 */
static void keep_typical(ref_row *r, float typical_p)
{
    if (typical_p >= 1) return;
    double sum = 0, moment = 0, open = 0, least = INFINITY, most = -INFINITY;
    for (int64_t i = 0; i < r->vocab; i++) {
        if (r->fate[i] == REF_DROPPED) continue;
        const double w = (r->low[i] + r->high[i]) / 2, x = -log2(w);
        if (r->fate[i] == REF_KEPT) {
            sum += w;
            moment += w * x;
        } else {
            open += w;
            least = fmin(least, x);
            most = fmax(most, x);
        }
    }
    if (sum + open == 0) return;
    double from = INFINITY, to = -INFINITY;
    if (sum > 0) from = to = moment / sum;
    if (open > 0) {
        from = fmin(from, (moment + open * least) / (sum + open));
        to = fmax(to, (moment + open * most) / (sum + open));
    }
    const double mean = (from + to) / 2, error = LOG_ERROR + (to - from) / 2;
    double *key = array(3 * r->vocab, sizeof *key), *first = key + r->vocab,
           *last = first + r->vocab;
    for (int64_t i = 0; i < r->vocab; i++) {
        if (r->fate[i] == REF_DROPPED) continue;
        key[i] = -fabs(mean + log2((r->low[i] + r->high[i]) / 2));
        first[i] = key[i] - error;
        last[i] = key[i] + error;
    }
    uint64_t low, high;
    wishes(r, typical_p, &low, &high);
    sort(r, key);
    keep_prefix(r, first, last, true, low, high);
    set_mass_of_prefix(r, low, high);
    r->largest = 0; /* it may not be typical */
    set_largest(r);
    free(key);
}

static void keep_top_n_sigma(ref_row *r, float n_sigma)
{
    double max = -INFINITY, min = INFINITY, mean = 0, square = 0;
    int64_t n = 0;
    for (int64_t i = 0; i < r->vocab; i++) {
        if (r->fate[i] == REF_DROPPED) continue;
        if (r->fate[i] == REF_EITHER) {
            printf("sampling_ref: top_n_sigma of tokens whose fate is open\n");
            abort();
        }
        max = fmax(max, r->value[i]);
        min = fmin(min, r->value[i]);
        n++;
    }
    if (n == 0) return;
    for (int64_t i = 0; i < r->vocab; i++)
        if (r->fate[i] != REF_DROPPED) mean += (max - r->value[i]) / (double)n;
    for (int64_t i = 0; i < r->vocab; i++)
        if (r->fate[i] != REF_DROPPED)
            square += (max - r->value[i] - mean) * ((max - r->value[i] - mean) / (double)n);
    const double reach = (double)n_sigma * sqrt(square);
    /* no difference, no error: what equals max is kept, whatever n_sigma is */
    const double slack =
        max == min ? 0 : (double)n_sigma * SIGMA_ERROR(max - min) + 0x1p-22 * (reach + fabs(max));
    for (int64_t i = 0; i < r->vocab; i++) {
        if (r->fate[i] == REF_DROPPED || r->value[i] == max) continue;
        const double above = r->value[i] - (max - reach);
        if (above < -slack || max == min)
            r->fate[i] = REF_DROPPED;
        else if (above < slack)
            r->fate[i] = REF_EITHER;
    }
}

/* ---- stages on each token --------------------------------------------------------------------- */

static bool has_bit(const int32_t *words, int64_t i)
{
    return words && ((uint32_t)words[i / 32] >> (i % 32) & 1);
}

static int64_t argmax(const ref_row *r)
{
    int64_t best = -1;
    for (int64_t i = 0; i < r->vocab; i++)
        if (r->fate[i] != REF_DROPPED && (best < 0 || r->value[i] > r->value[best])) best = i;
    return best;
}

static void set_temperature(ref_row *r, float temperature)
{
    if (temperature == 0) {
        const int64_t best = argmax(r);
        for (int64_t i = 0; i < r->vocab; i++)
            if (i != best) set_logit(r, i, -INFINITY);
        return;
    }
    const float factor = 1 / temperature;
    for (int64_t i = 0; i < r->vocab; i++) set_logit(r, i, logit(r, i) * factor);
}

static void softmax(ref_row *r)
{
    const int64_t best = argmax(r);
    for (int64_t i = 0; i < r->vocab; i++) {
        if (r->fate[i] == REF_DROPPED) continue;
        const double t = r->value[i] - r->value[best], w = exp(t), error = WEIGHT_ERROR(t);
        r->low[i] = w * (1 - error);
        r->high[i] = w * (1 + error);
        if (w < SMALL_WEIGHT) r->fate[i] = w < NO_WEIGHT ? REF_DROPPED : REF_EITHER;
    }
    r->kind = QKV_PROBS;
    r->exponent = 0;
    r->least = 0;
    set_mass(r, 0, UINT64_MAX);
    set_largest(r);
}

/* On logits the order is by the logits themselves. */
static void sharpen(ref_row *r)
{
    memcpy(r->low, r->value, (size_t)r->vocab * sizeof *r->low);
    memcpy(r->high, r->value, (size_t)r->vocab * sizeof *r->high);
}

void ref_stage(ref_row *r, int32_t stage, const ref_request *q)
{
    for (int64_t i = 0; i < r->vocab && stage <= QKV_STAGE_USER; i++) {
        const float l = logit(r, i);
        const int32_t count = q->counts ? q->counts[i] : 0;
        switch (stage) {
        case QKV_STAGE_REPETITION:
            if (count > 0 || has_bit(q->prompt, i))
                set_logit(r, i, l > 0 ? l / q->repetition : l * q->repetition);
            break;
        case QKV_STAGE_FREQUENCY: set_logit(r, i, fmaf(-q->frequency, (float)count, l)); break;
        case QKV_STAGE_PRESENCE:
            if (count > 0) set_logit(r, i, l - q->presence);
            break;
        case QKV_STAGE_BIAS: set_logit(r, i, l + (float)q->bias[i]); break;
        case QKV_STAGE_BITMASK:
            if (!has_bit(q->bitmask, i)) set_logit(r, i, -INFINITY);
            break;
        default: /* QKV_STAGE_USER */
            set_logit(
                r, i,
                q->user(l, q->user_value, q->user_element ? (float)q->user_element[i] : 0, (int)i));
        }
    }
    if (r->kind == QKV_LOGITS) sharpen(r);
    switch (stage) {
    case QKV_STAGE_TEMPERATURE: set_temperature(r, q->temperature); break;
    case QKV_STAGE_TOP_N_SIGMA: keep_top_n_sigma(r, q->top_n_sigma); break;
    case QKV_STAGE_SOFTMAX: softmax(r); break;
    case QKV_STAGE_TOP_K: keep_top_k(r, q->top_k); break;
    case QKV_STAGE_TOP_P: keep_top_p(r, q->top_p); break;
    case QKV_STAGE_MIN_P: keep_min_p(r, q->min_p); break;
    case QKV_STAGE_TYPICAL_P: keep_typical(r, q->typical_p); break;
    default: break;
    }
}

void ref_stages(ref_row *r, unsigned given, int32_t order, const ref_request *q)
{
    static const int32_t k_first[] = {QKV_STAGE_TOP_K, QKV_STAGE_SOFTMAX, QKV_STAGE_TOP_P},
                         joint[] = {QKV_STAGE_SOFTMAX, QKV_STAGE_TOP_P, QKV_STAGE_TOP_K};
    for (int32_t s = QKV_STAGE_REPETITION; s <= QKV_STAGE_TOP_N_SIGMA; s++)
        if (given >> s & 1) ref_stage(r, s, q);
    for (int i = 0; i < 3; i++) {
        const int32_t s = order == QKV_TOP_K_JOINT ? joint[i] : k_first[i];
        if (given >> s & 1) ref_stage(r, s, q);
    }
    for (int32_t s = QKV_STAGE_MIN_P; s <= QKV_STAGE_TYPICAL_P; s++)
        if (given >> s & 1) ref_stage(r, s, q);
}

/* ---- answers ---------------------------------------------------------------------------------- */

bool ref_valid_is_right(const ref_row *r, int valid)
{
    bool may = false, must = false;
    for (int64_t i = 0; i < r->vocab; i++) {
        const bool mass_of_logit = r->kind == QKV_LOGITS && r->fate[i] != REF_DROPPED;
        may = may || mass_of_logit || high_mass(r, i) > 0;
        must = must || (mass_of_logit && r->fate[i] == REF_KEPT) || low_mass(r, i) > 0;
    }
    return valid == 1 ? r->clean && may : valid == 0 && !(r->clean && must);
}

static uint64_t share(uint64_t random, uint64_t kept)
{
    return (uint64_t)((wide)random * kept >> 64);
}

bool ref_token_is_right(const ref_row *r, const ref_request *q, int32_t token)
{
    uint64_t below_low = 0, below_high = 0;
    if (token == 0 && r->least == 0) return true;
    if (token < 0 || token >= r->vocab || high_mass(r, token) == 0) return false;
    const uint64_t random = qi_philox_u64(q->seed, q->offset);
    for (int64_t i = 0; i < token; i++) {
        below_low += low_mass(r, i);
        below_high += high_mass(r, i);
    }
    return below_low <= share(random, r->most) &&
           below_high + high_mass(r, token) > share(random, r->least);
}

void ref_probabilities(const ref_row *r, double *low, double *high)
{
    const double rounding = 0x1p-22; /* of a factor, of the product, and of sums to double */
    for (int64_t i = 0; i < r->vocab; i++) {
        low[i] = high[i] = 0;
        if (r->fate[i] == REF_DROPPED || r->least == 0) continue;
        /* it may be the mass, or what was rounded down to it */
        low[i] = (double)mass(r, r->low[i]) / (double)r->most * (1 - rounding);
        high[i] = ldexp(r->high[i], UNIT - r->exponent) / (double)r->least * (1 + rounding);
    }
}

bool ref_distribution(const ref_row *r, double *p)
{
    bool known = true;
    double sum = 0;
    for (int64_t i = 0; i < r->vocab; i++) {
        if (r->fate[i] == REF_EITHER && high_mass(r, i) > 0) known = false;
        p[i] = r->fate[i] != REF_DROPPED ? (r->low[i] + r->high[i]) / 2 : 0;
        sum += p[i];
    }
    for (int64_t i = 0; i < r->vocab && sum > 0; i++) p[i] /= sum;
    return known && sum > 0;
}
