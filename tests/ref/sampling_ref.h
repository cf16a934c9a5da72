/* sampling_ref.h - what include/qkv/sampling.h says of one row, by a full sort, and what it leaves open.
 *
 * Logits are rounded to f32 after each stage, as the header's f32 formulas are, so that ties are the library's
 * ties. Masses of probabilities are integers and exact. Weights exp(l - max) are known up to the error of
 * f32 (WEIGHT_ERROR in sampling_ref.c), and what follows from them is an interval: a token that a
 * filter keeps for one weight within it and drops for another is REF_EITHER, and right both ways.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_SAMPLING_REF_H
#define QKV_TESTS_SAMPLING_REF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qkv/sampling.h"

enum { REF_DROPPED, REF_EITHER, REF_KEPT };

/* The parameters of one request. Tensors are its own rows; NULL: not given. */
typedef struct ref_request {
    float temperature, top_p, min_p, typical_p, top_n_sigma, repetition, frequency, presence;
    int32_t top_k;
    uint64_t seed, offset;
    const int32_t *counts, *prompt, *bitmask; /* [vocab], [words], [words] */
    const double *bias;                       /* [vocab] */
    float (*user)(float logit, float value, float element, int token);
    float user_value;
    const double *user_element;
} ref_request;

typedef struct ref_row {
    int64_t vocab;
    int32_t kind; /* qkv_row_kind by now */
    bool clean;   /* the row given has no NaN, no +inf, no negative probability */
    int exponent; /* masses count 2^(exponent - 42) */
    /* of each token: */
    double *value; /* logit, an f32 number, also once softmax made it a weight; or probability */
    double *low, *high; /* of probabilities and weights: the least and the largest it may be */
    unsigned char *fate;
    uint64_t least, most; /* between them is the sum of masses left, where kind is QKV_PROBS */
    double largest;       /* the largest of those left is no less, there too */
    /* those not dropped, by a key: */
    struct ref_item *order;
    int64_t num_ordered;
    bool is_sorted; /* by value */
} ref_row;

ref_row ref_row_new(int64_t max_vocab);
void ref_row_free(ref_row *r);

/* row [vocab] as given, in double; NaN and infinities included. NULL: a row that indices do not reach. */
void ref_begin(ref_row *r, int32_t kind, const double *row, int64_t vocab);

/* One stage, by qkv_stage_kind; not QKV_STAGE_SAMPLE. */
void ref_stage(ref_row *r, int32_t stage, const ref_request *q);

/* The stages of a call in the header's order; given has bit s for qkv_stage_kind s. */
void ref_stages(ref_row *r, unsigned given, int32_t order, const ref_request *q);

/* Is valid what the row and the stages make it? */
bool ref_valid_is_right(const ref_row *r, int valid);

/* Is it the token drawn by this seed and offset? */
bool ref_token_is_right(const ref_row *r, const ref_request *q, int32_t token);

/* The least and the largest probability of each token, before they are rounded to a type, that qkv_renormalize may
 * give. A token that may be dropped may have 0 besides. */
void ref_probabilities(const ref_row *r, double *low, double *high);

/* Every token's probability; false if there is none, or if a token with mass may be dropped, which counts as if it
 * were not. */
bool ref_distribution(const ref_row *r, double *p);

#endif
