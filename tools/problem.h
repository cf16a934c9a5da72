/* problem.h - problem strings: "batch=8,kv_len=4096,heads=32/8,head_dim=128,q=bf16,mask=causal".
 *
 * Each operator has a list of keys with defaults; a string sets some of them. Printing gives the
 * canonical string: every key of the operator, in the operator's order. It parses to the same
 * problem.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_PROBLEM_H
#define QKV_TOOLS_PROBLEM_H

#include <stdbool.h>

#include "qkv/base.h"

typedef enum problem_key {
    KEY_BATCH,
    KEY_QO_LEN,
    KEY_KV_LEN,
    KEY_PREFILLS,
    KEY_HEADS, /* num_qo_heads/num_kv_heads */
    KEY_KV_HEADS,
    KEY_HEAD_DIM, /* qk/vo */
    KEY_PAGE,
    KEY_LAYOUT,
    KEY_Q,
    KEY_KV,
    KEY_O,
    KEY_MASK,
    KEY_WINDOW,
    KEY_CAP,
    KEY_DIST,
    KEY_SHARED,
    KEY_FORM,
    KEY_INVARIANT,
    KEY_WRITES,
    KEY_M,
    KEY_N,
    KEY_K,
    KEY_X,
    KEY_W,
    KEY_OUT,
    KEY_TOKENS,
    KEY_SIZE,
    KEY_DTYPE,
    KEY_RESIDUAL,
    KEY_ROTARY,
    KEY_STYLE,
    KEY_ACT,
    KEY_VOCAB,
    KEY_TEMPERATURE,
    KEY_TOP_K,
    KEY_SORTED,
    KEY_TOP_P,
    KEY_MIN_P,
    KEY_SPREAD,
    KEY_NODES,
    KEY_DATA,
    NUM_KEYS
} problem_key;

enum { DIST_FIXED, DIST_UNIFORM, DIST_ZIPF };
enum { FORM_FLAT, FORM_LEVELS, FORM_DETECT };
enum { DATA_DRAM, DATA_CACHE };
enum { W_Q8_0 = 3, W_Q4_0, W_Q4_1 }; /* of KEY_W, after the dtypes */
enum { STYLE_NEOX, STYLE_INTERLEAVED };

/* first: the number, the choice (in the order above or of the public header), or what stands
 * before a '/'; second: what stands behind it, or the same again. */
typedef struct problem_value {
    int64_t first, second;
    double real;
} problem_value;

typedef struct problem {
    const char *op;
    problem_value value[NUM_KEYS];
} problem;

enum { PROBLEM_ERROR = 512, PROBLEM_TEXT = 512 };

/* The i-th operator's name, NULL past the end; *defaults (may be NULL): its canonical default
 * string; *about: what it is, in a few words. */
const char *problem_op(int i, const char **defaults, const char **about);

/* What a key means and takes, for help; NULL past the end. */
const char *problem_key_help(int i, const char **name);

/* false: error says which key (or operator) is at fault and lists the known ones. */
bool problem_parse(const char *op, const char *text, problem *out, char error[PROBLEM_ERROR]);

void problem_print(const problem *p, char text[PROBLEM_TEXT]);

DLDataType problem_dtype(const problem *p, problem_key key);

#endif
