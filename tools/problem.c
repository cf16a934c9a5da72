/* problem.c - SPDX-License-Identifier: Apache-2.0 */
#include "problem.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KIND_INT, KIND_PAIR, KIND_REAL, KIND_CHOICE };

#define DTYPES    "f32|f16|bf16"
#define KV_DTYPES DTYPES "|e4m3|e5m2|i8"

static const struct {
    const char *name;
    int kind;
    int64_t min, max;    /* KIND_INT, KIND_PAIR; KIND_REAL too */
    const char *choices; /* KIND_CHOICE */
    const char *help;
} keys[NUM_KEYS] = {
    [KEY_BATCH] = {"batch", KIND_INT, 1, 1 << 20, NULL, "requests, or rows of logits"},
    [KEY_QO_LEN] = {"qo_len", KIND_INT, 1, 1 << 24, NULL, "new rows of a request"},
    [KEY_KV_LEN] = {"kv_len", KIND_INT, 1, 1 << 27, NULL,
                    "keys of a request, new ones included; the same as qo_len if not given"},
    [KEY_PREFILLS] = {"prefills", KIND_INT, 0, 1 << 20, NULL,
                      "requests that have qo_len rows; the others have one"},
    [KEY_HEADS] = {"heads", KIND_PAIR, 1, 1 << 16, NULL, "query heads/KV heads"},
    [KEY_KV_HEADS] = {"kv_heads", KIND_INT, 1, 1024, NULL, "KV heads"},
    [KEY_HEAD_DIM] = {"head_dim", KIND_PAIR, 2, 65536, NULL,
                      "head_dim_qk/head_dim_vo, or one for both"},
    [KEY_PAGE] = {"page", KIND_INT, 0, 1 << 24, NULL, "tokens a page; 0 = ragged, without pages"},
    [KEY_LAYOUT] = {"layout", KIND_CHOICE, 0, 0, "NHD|HND", "order of a page's axes"},
    [KEY_Q] = {"q", KIND_CHOICE, 0, 0, DTYPES "|e4m3", "dtype of q"},
    [KEY_KV] = {"kv", KIND_CHOICE, 0, 0, KV_DTYPES,
                "dtype of the cache; that of q or dtype if not given"},
    [KEY_O] = {"o", KIND_CHOICE, 0, 0, DTYPES,
               "dtype of o; that of q if not given, bf16 beside q of 8 bits"},
    [KEY_MASK] = {"mask", KIND_CHOICE, 0, 0, "none|causal", "attention mask"},
    [KEY_WINDOW] = {"window", KIND_INT, -1, 1 << 27, NULL, "keys left of a row's own; -1 = open"},
    [KEY_CAP] = {"cap", KIND_REAL, 0, 1 << 20, NULL, "soft cap of the logits; 0 = none"},
    [KEY_DIST] = {"dist", KIND_CHOICE, 0, 0, "fixed|uniform|zipf",
                  "kv lengths: all kv_len; uniform in kv_len/2 .. kv_len; Zipf with mean kv_len; a "
                  "prefill's new rows grow and shrink with them"},
    [KEY_SHARED] = {"shared", KIND_INT, 0, 1 << 27, NULL,
                    "keys that all requests begin with; whole pages, below kv_len"},
    [KEY_FORM] = {"form", KIND_CHOICE, 0, 0, "flat|levels|detect",
                  "how the shared keys are given: to each request, as a level, or to be found"},
    [KEY_INVARIANT] = {"invariant", KIND_CHOICE, 0, 0, "no|yes", "batch-invariant results"},
    [KEY_WRITES] = {"writes", KIND_CHOICE, 0, 0, "appends|any",
                    "the keys that runs of a plan may find written since: new rows' alone, so that "
                    "older ones may be read before a run's turn, or any"},
    [KEY_M] = {"m", KIND_INT, 1, 1 << 24, NULL, "rows of x"},
    [KEY_N] = {"n", KIND_INT, 1, 1 << 24, NULL, "rows of w"},
    [KEY_K] = {"k", KIND_INT, 1, 1 << 24, NULL, "columns of x and w"},
    [KEY_X] = {"x", KIND_CHOICE, 0, 0, DTYPES, "dtype of x"},
    [KEY_W] = {"w", KIND_CHOICE, 0, 0, DTYPES "|q8_0|q4_0|q4_1",
               "dtype or packed format of w; the dtype of x if not given"},
    [KEY_OUT] = {"out", KIND_CHOICE, 0, 0, DTYPES, "dtype of out; that of x if not given"},
    [KEY_TOKENS] = {"tokens", KIND_INT, 1, 1 << 24, NULL, "rows"},
    [KEY_SIZE] = {"size", KIND_INT, 1, 1 << 20, NULL, "width of a row"},
    [KEY_DTYPE] = {"dtype", KIND_CHOICE, 0, 0, DTYPES, "dtype of the inputs"},
    [KEY_RESIDUAL] = {"residual", KIND_CHOICE, 0, 0, "no|yes", "add to the residual stream first"},
    [KEY_ROTARY] = {"rotary", KIND_INT, 0, 65536, NULL, "dims that rotate; 0 = head_dim"},
    [KEY_STYLE] = {"style", KIND_CHOICE, 0, 0, "neox|interleaved", "which elements form a pair"},
    [KEY_ACT] = {"act", KIND_CHOICE, 0, 0, "silu|gelu|gelu_tanh", "activation"},
    [KEY_VOCAB] = {"vocab", KIND_INT, 1, 1 << 24, NULL, "logits a row"},
    [KEY_TEMPERATURE] = {"temperature", KIND_REAL, 0, 1000, NULL, "0 = argmax"},
    [KEY_TOP_K] = {"top_k", KIND_INT, 0, 1 << 24, NULL, "0 = all"},
    [KEY_SORTED] = {"sorted", KIND_CHOICE, 0, 0, "no|yes", "largest first, instead of by index"},
    [KEY_TOP_P] = {"top_p", KIND_REAL, 0, 1, NULL, "in (0, 1]; 1 = all"},
    [KEY_MIN_P] = {"min_p", KIND_REAL, 0, 1, NULL, "0 = all"},
    [KEY_SPREAD] = {"spread", KIND_REAL, 0, 1000, NULL,
                    "standard deviation of the logits: 5 has its mass in few tokens, 0.1 in all"},
    [KEY_NODES] = {"nodes", KIND_INT, 1, 1024, NULL, "draft tokens of a request, a chain"},
    [KEY_DATA] = {"data", KIND_CHOICE, 0, 0, "dram|cache",
                  "dram: inputs rotate over more memory than the last-level cache holds; "
                  "cache: the same each time, held against the speed of as much memory"},
};

/* A key that takes another's value when a string does not give it, if the operator has that one. */
static const struct {
    problem_key key, from;
} follows[] = {
    {KEY_KV_LEN, KEY_QO_LEN}, {KEY_KV, KEY_Q},  {KEY_O, KEY_Q},
    {KEY_W, KEY_X},           {KEY_OUT, KEY_X}, {KEY_KV, KEY_DTYPE},
};

/* The defaults list an operator's keys, in order. */
static const struct {
    const char *name, *about, *defaults;
} ops[] = {
    {"decode", "attention, one new row a request",
     "batch=1,kv_len=4096,heads=32/8,head_dim=128,page=16,layout=NHD,q=bf16,kv=bf16,o=bf16,"
     "mask=causal,window=-1,cap=0,dist=fixed,shared=0,form=flat,invariant=no,writes=appends,"
     "data=dram"},
    {"prefill", "attention, qo_len new rows a request",
     "batch=1,qo_len=1024,kv_len=1024,heads=32/8,head_dim=128,page=16,layout=NHD,q=bf16,kv=bf16,"
     "o=bf16,mask=causal,window=-1,cap=0,dist=fixed,data=dram"},
    {"mixed", "attention, prefills requests of qo_len new rows among decodes",
     "batch=8,prefills=1,qo_len=512,kv_len=1024,heads=32/8,head_dim=128,page=16,layout=NHD,q=bf16,"
     "kv=bf16,o=bf16,mask=causal,window=-1,cap=0,dist=fixed,data=dram"},
    {"append", "new keys and values into pages",
     "batch=1,qo_len=1024,kv_len=1024,kv_heads=8,head_dim=128,page=16,layout=NHD,dtype=bf16,"
     "kv=bf16,data=dram"},
    {"gemm", "out[m,n] = x[m,k] w[n,k]^T", "m=1,n=4096,k=4096,x=bf16,w=bf16,out=bf16,data=dram"},
    {"rmsnorm", "RMSNorm", "tokens=64,size=4096,dtype=bf16,residual=no,data=dram"},
    {"rope", "rotary embedding of q and k, in place",
     "tokens=1024,heads=32/8,head_dim=128,dtype=bf16,rotary=0,style=neox,data=dram"},
    {"gated", "gated activation, act(gate) * up",
     "tokens=64,size=14336,dtype=bf16,act=silu,data=dram"},
    {"argmax", "index of each row's largest logit",
     "batch=1,vocab=128256,dtype=f32,spread=5,data=dram"},
    {"sample", "one token a row",
     "batch=1,vocab=128256,dtype=f32,temperature=1,top_k=0,top_p=1,min_p=0,spread=5,data=dram"},
    {"renormalize", "the distribution that sample draws from",
     "batch=1,vocab=128256,dtype=f32,temperature=1,top_k=0,top_p=1,min_p=0,spread=5,data=dram"},
    {"mask_logits", "logits, -inf where top-k drops them",
     "batch=1,vocab=128256,dtype=f32,temperature=1,top_k=40,spread=5,data=dram"},
    {"top_k", "the top_k largest logits of each row and where they are",
     "batch=1,vocab=128256,dtype=f32,top_k=50,sorted=yes,spread=5,data=dram"},
    {"log_probs", "log-probabilities and ranks of top_k tokens of each row",
     "batch=1,vocab=128256,dtype=f32,top_k=8,spread=5,data=dram"},
    {"verify", "chains of draft tokens, accepted to their ends",
     "batch=1,nodes=4,vocab=128256,dtype=f32,data=dram"},
};
enum { NUM_OPS = sizeof ops / sizeof ops[0] };

const char *problem_op(int i, const char **defaults, const char **about)
{
    if (i < 0 || i >= NUM_OPS) return NULL;
    if (defaults) *defaults = ops[i].defaults;
    if (about) *about = ops[i].about;
    return ops[i].name;
}

const char *problem_key_help(int i, const char **name)
{
    if (i < 0 || i >= NUM_KEYS) return NULL;
    *name = keys[i].name;
    return keys[i].help;
}

static int find_op(const char *name)
{
    for (int i = 0; i < NUM_OPS; i++)
        if (strcmp(ops[i].name, name) == 0) return i;
    return -1;
}

/* ---- one value ----------------------------------------------------------------------------- */

/* Decimal digits with an optional minus; *end behind them. */
static bool read_int(const char *text, char **end, int64_t *out)
{
    const char *digits = text + (*text == '-');
    if (*digits < '0' || *digits > '9' || strspn(digits, "0123456789") > 18) return false;
    *out = strtoll(text, end, 10);
    return true;
}

static bool read_real(const char *text, double *out)
{
    char *end;
    if (!*text || text[strspn(text, "0123456789.eE+-")]) return false;
    *out = strtod(text, &end);
    return !*end && isfinite(*out);
}

/* The index of a word in "a|b|c", or -1. */
static int64_t find_choice(const char *choices, const char *word)
{
    const size_t n = strlen(word);
    int64_t i = 0;
    for (const char *at = choices;; i++) {
        const size_t len = strcspn(at, "|");
        if (len == n && memcmp(at, word, n) == 0) return i;
        if (!at[len]) return -1;
        at += len + 1;
    }
}

static bool read_value(int key, const char *text, problem_value *out)
{
    const int64_t min = keys[key].min, max = keys[key].max;
    problem_value v = {0};
    char *end = NULL;
    switch (keys[key].kind) {
    case KIND_CHOICE:
        v.first = v.second = find_choice(keys[key].choices, text);
        if (v.first < 0) return false;
        break;
    case KIND_REAL:
        if (!read_real(text, &v.real) || v.real < (double)min || v.real > (double)max) return false;
        break;
    default:
        if (!read_int(text, &end, &v.first)) return false;
        v.second = v.first;
        if (keys[key].kind == KIND_PAIR && *end == '/' && !read_int(end + 1, &end, &v.second))
            return false;
        if (*end || v.first < min || v.first > max || v.second < min || v.second > max)
            return false;
    }
    *out = v;
    return true;
}

/* "1 to 1024", "none|causal": what a key takes. */
static void print_range(int key, char *text, size_t size)
{
    if (keys[key].kind == KIND_CHOICE)
        snprintf(text, size, "%s", keys[key].choices);
    else
        snprintf(text, size, "%s from %lld to %lld",
                 keys[key].kind == KIND_REAL   ? "a number"
                 : keys[key].kind == KIND_PAIR ? "N or N/N, each"
                                               : "a whole number",
                 (long long)keys[key].min, (long long)keys[key].max);
}

/* ---- strings ------------------------------------------------------------------------------- */

/* "name=value" up to a comma; the value is cut into text. */
typedef struct item {
    const char *name;
    int name_len, key; /* key -1: unknown */
    char text[64];
} item;

/* Reads the item at *at and moves on; false: it has no '=', or too long a value. */
static bool next_item(const char **at, item *out)
{
    const size_t len = strcspn(*at, ","), name_len = strcspn(*at, "=,");
    *out = (item){.name = *at, .name_len = (int)(name_len < 64 ? name_len : 64), .key = -1};
    const char *value = *at + name_len + 1;
    const size_t value_len = name_len < len ? len - name_len - 1 : sizeof out->text;
    *at += len + ((*at)[len] == ',');
    if (value_len >= sizeof out->text) return false;
    memcpy(out->text, value, value_len);
    for (int k = 0; k < NUM_KEYS; k++)
        if (strlen(keys[k].name) == name_len && memcmp(keys[k].name, out->name, name_len) == 0)
            out->key = k;
    return true;
}

/* The names of an operator's keys. */
static void print_known(int op, char *text, size_t size)
{
    size_t used = 0;
    for (const char *at = ops[op].defaults; *at && used < size;) {
        item it;
        next_item(&at, &it);
        const char *comma = used ? ", " : "";
        used += (size_t)snprintf(text + used, size - used, "%s%s", comma, keys[it.key].name);
    }
}

static bool fail_known(int op, const char *what, const item *it, char error[PROBLEM_ERROR])
{
    char known[256];
    print_known(op, known, sizeof known);
    snprintf(error, PROBLEM_ERROR, "%.*s: %s; %s takes %s", it->name_len, it->name, what,
             ops[op].name, known);
    return false;
}

/* Applies a string. allowed: the operator's keys (NULL: all); given: those that the string set. */
static bool apply(int op, const char *text, const bool *allowed, bool *given, problem *out,
                  char error[PROBLEM_ERROR])
{
    for (const char *at = text; *at;) {
        item it;
        const bool whole = next_item(&at, &it);
        const bool comma_last = at[-1] == ',' && !*at;
        if (!whole || comma_last) return fail_known(op, "expected key=value", &it, error);
        if (it.key < 0 || (allowed && !allowed[it.key]))
            return fail_known(op, "not a key", &it, error);
        if (given[it.key]) return fail_known(op, "given twice", &it, error);
        if (!read_value(it.key, it.text, &out->value[it.key])) {
            char range[96];
            print_range(it.key, range, sizeof range);
            snprintf(error, PROBLEM_ERROR, "%s: expected %s, got \"%s\"", keys[it.key].name, range,
                     it.text);
            return false;
        }
        given[it.key] = true;
    }
    return true;
}

/* What keys demand of each other. */
static bool check(const problem *p, const bool *has, char error[PROBLEM_ERROR])
{
    const problem_value *v = p->value;
    const char *what = NULL;
    if (has[KEY_HEADS] && v[KEY_HEADS].first % v[KEY_HEADS].second)
        what = "heads: expected query heads that are a multiple of the KV heads";
    else if (has[KEY_PREFILLS] && v[KEY_PREFILLS].first > v[KEY_BATCH].first)
        what = "prefills: expected at most batch";
    else if (has[KEY_KV_LEN] && has[KEY_QO_LEN] && v[KEY_QO_LEN].first > v[KEY_KV_LEN].first)
        what = "qo_len: expected at most kv_len";
    else if (has[KEY_TOP_P] && !(v[KEY_TOP_P].real > 0))
        what = "top_p: expected more than 0";
    else if (has[KEY_ROTARY] && v[KEY_HEAD_DIM].first != v[KEY_HEAD_DIM].second)
        what = "head_dim: expected one for q and k";
    else if (has[KEY_W] && v[KEY_W].first >= W_Q8_0 && v[KEY_K].first % 32)
        what = "k: expected a multiple of 32 for packed weights";
    else if (has[KEY_KV_HEADS] && v[KEY_PAGE].first == 0)
        what = "page: expected at least 1";
    else if (v[KEY_SHARED].first > 0 &&
             (v[KEY_PAGE].first == 0 || v[KEY_SHARED].first % v[KEY_PAGE].first ||
              v[KEY_SHARED].first >= v[KEY_KV_LEN].first || v[KEY_DIST].first != DIST_FIXED))
        what = "shared: expected whole pages, fewer keys than kv_len, and dist=fixed";
    else if (v[KEY_FORM].first == FORM_LEVELS && v[KEY_SHARED].first == 0)
        what = "form: expected shared keys for levels";
    else if (v[KEY_FORM].first != FORM_FLAT && (v[KEY_INVARIANT].first || v[KEY_PAGE].first == 0))
        what = "form: expected flat with invariant=yes, or without pages";
    if (what) snprintf(error, PROBLEM_ERROR, "%s", what);
    return !what;
}

bool problem_parse(const char *op, const char *text, problem *out, char error[PROBLEM_ERROR])
{
    const int index = find_op(op);
    if (index < 0) {
        size_t used = (size_t)snprintf(error, PROBLEM_ERROR, "op: expected one of");
        for (int i = 0; i < NUM_OPS; i++)
            used += (size_t)snprintf(error + used, PROBLEM_ERROR - used, " %s", ops[i].name);
        snprintf(error + used, PROBLEM_ERROR - used, ", got \"%.64s\"", op);
        return false;
    }
    problem p = {.op = ops[index].name};
    bool has[NUM_KEYS] = {false}, given[NUM_KEYS] = {false};
    if (!apply(index, ops[index].defaults, NULL, has, &p, error)) return false;
    if (!apply(index, text, has, given, &p, error)) return false;
    for (size_t i = 0; i < sizeof follows / sizeof follows[0]; i++)
        if (has[follows[i].key] && !given[follows[i].key] && given[follows[i].from])
            p.value[follows[i].key] = follows[i].key == KEY_O && p.value[KEY_Q].first > 2
                                          ? p.value[KEY_O] /* nobody stores so few bits */
                                          : p.value[follows[i].from];
    if (!check(&p, has, error)) return false;
    *out = p;
    return true;
}

/* Six digits, or as many as it takes to read back the same number. */
static int print_real(double value, char *text, size_t size)
{
    int n = 0;
    for (int digits = 6; digits <= 17; digits++) {
        n = snprintf(text, size, "%.*g", digits, value);
        if (strtod(text, NULL) == value) break;
    }
    return n;
}

static int print_value(int key, const problem_value *v, char *text, size_t size)
{
    const char *word = keys[key].choices;
    switch (keys[key].kind) {
    case KIND_REAL: return print_real(v->real, text, size);
    case KIND_CHOICE:
        for (int64_t i = 0; i < v->first; i++) word += strcspn(word, "|") + 1;
        return snprintf(text, size, "%.*s", (int)strcspn(word, "|"), word);
    default:
        if (v->first == v->second) return snprintf(text, size, "%lld", (long long)v->first);
        return snprintf(text, size, "%lld/%lld", (long long)v->first, (long long)v->second);
    }
}

void problem_print(const problem *p, char text[PROBLEM_TEXT])
{
    size_t used = 0;
    for (const char *at = ops[find_op(p->op)].defaults; *at;) {
        item it;
        next_item(&at, &it);
        used += (size_t)snprintf(text + used, PROBLEM_TEXT - used, "%s%s=", used ? "," : "",
                                 keys[it.key].name);
        used += (size_t)print_value(it.key, &p->value[it.key], text + used, PROBLEM_TEXT - used);
    }
}

DLDataType problem_dtype(const problem *p, problem_key key)
{
    const DLDataType order[] = {QKV_F32, QKV_F16, QKV_BF16, QKV_E4M3, QKV_E5M2, QKV_I8};
    return order[p->value[key].first]; /* the order of KV_DTYPES */
}
