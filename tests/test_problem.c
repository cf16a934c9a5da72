/* test_problem.c - problem strings of the qkv tool, and what they say about attention.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_problem.h"
#include "problem.h"
#include "support.h"

static problem parsed(const char *op, const char *text)
{
    problem p;
    char error[PROBLEM_ERROR];
    if (!problem_parse(op, text, &p, error)) fail_msg("%s %s: %s", op, text, error);
    return p;
}

/* ---- parsing ------------------------------------------------------------------------------- */

static void problem_defaults_are_canonical(void **state)
{
    (void)state;
    const char *op, *defaults, *about;
    char text[PROBLEM_TEXT];
    int n = 0;
    for (; (op = problem_op(n, &defaults, &about)); n++) {
        problem p = parsed(op, "");
        problem_print(&p, text);
        assert_string_equal(text, defaults);
        p = parsed(op, defaults);
        assert_string_equal(p.op, op);
        problem_print(&p, text);
        assert_string_equal(text, defaults);
        assert_true(strlen(about) > 0);
    }
    assert_true(n > 0);
    assert_null(problem_op(-1, NULL, NULL));
}

static void problem_reads_values(void **state)
{
    (void)state;
    static const struct {
        const char *op, *text;
        problem_key key;
        int64_t first, second;
        const char *why;
    } cases[] = {
        {"decode", "batch=8", KEY_BATCH, 8, 8, "a number"},
        {"decode", "kv_len=1,batch=8", KEY_BATCH, 8, 8, "behind another"},
        {"decode", "batch=1048576", KEY_BATCH, 1 << 20, 1 << 20, "the most"},
        {"decode", "batch=007", KEY_BATCH, 7, 7, "leading zeros are decimal"},
        {"decode", "window=-1", KEY_WINDOW, -1, -1, "the least is negative"},
        {"decode", "heads=32/8", KEY_HEADS, 32, 8, "a pair"},
        {"decode", "heads=4", KEY_HEADS, 4, 4, "one number for both"},
        {"decode", "head_dim=192/128", KEY_HEAD_DIM, 192, 128, "a pair"},
        {"decode", "layout=HND", KEY_LAYOUT, QKV_HND, QKV_HND,
         "choices as the header numbers them"},
        {"decode", "layout=NHD", KEY_LAYOUT, QKV_NHD, QKV_NHD, ""},
        {"decode", "mask=none", KEY_MASK, QKV_MASK_NONE, QKV_MASK_NONE, ""},
        {"decode", "mask=causal", KEY_MASK, QKV_MASK_CAUSAL, QKV_MASK_CAUSAL, ""},
        {"gated", "act=gelu", KEY_ACT, QKV_GELU, QKV_GELU, "a choice that starts another"},
        {"gated", "act=gelu_tanh", KEY_ACT, QKV_GELU_TANH, QKV_GELU_TANH, ""},
        {"gated", "act=silu", KEY_ACT, QKV_SILU, QKV_SILU, ""},
        {"decode", "dist=zipf", KEY_DIST, DIST_ZIPF, DIST_ZIPF, ""},
        {"rope", "style=interleaved", KEY_STYLE, STYLE_INTERLEAVED, STYLE_INTERLEAVED, ""},
        {"gemm", "data=cache", KEY_DATA, DATA_CACHE, DATA_CACHE, ""},
        {"prefill", "qo_len=99", KEY_KV_LEN, 99, 99, "kv_len follows qo_len"},
        {"prefill", "kv_len=200,qo_len=99", KEY_KV_LEN, 200, 200, "unless given, in any order"},
        {"prefill", "qo_len=99,kv_len=200", KEY_KV_LEN, 200, 200, ""},
        {"prefill", "kv_len=2000", KEY_QO_LEN, 1024, 1024, "qo_len does not follow kv_len"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const problem p = parsed(cases[i].op, cases[i].text);
        const problem_value *v = &p.value[cases[i].key];
        if (v->first != cases[i].first || v->second != cases[i].second)
            fail_msg("%s %s: expected %d/%d, got %d/%d (%s)", cases[i].op, cases[i].text,
                     (int)cases[i].first, (int)cases[i].second, (int)v->first, (int)v->second,
                     cases[i].why);
    }
    static const struct {
        const char *text;
        double value;
    } reals[] = {{"1", 1}, {"0.5", 0.5}, {"1e-3", 1e-3}, {"1.", 1}, {"+.25", 0.25}};
    for (size_t i = 0; i < sizeof reals / sizeof reals[0]; i++) {
        char text[64];
        snprintf(text, sizeof text, "top_p=%s", reals[i].text);
        assert_true(parsed("sample", text).value[KEY_TOP_P].real == reals[i].value);
    }
}

static void problem_dtypes_follow_the_first_one(void **state)
{
    (void)state;
    const struct {
        const char *op, *text;
        problem_key key;
        DLDataType want;
    } cases[] = {
        {"decode", "", KEY_Q, QKV_BF16},
        {"decode", "q=f32", KEY_KV, QKV_F32},
        {"decode", "q=f32", KEY_O, QKV_F32},
        {"decode", "kv=f16,q=f32", KEY_KV, QKV_F16},
        {"decode", "kv=f16", KEY_Q, QKV_BF16},
        {"gemm", "x=f16", KEY_W, QKV_F16},
        {"gemm", "x=f16,w=f32", KEY_OUT, QKV_F16},
        {"gemm", "w=f32", KEY_X, QKV_BF16},
        {"append", "dtype=f32", KEY_KV, QKV_F32},
        {"append", "dtype=f32,kv=bf16", KEY_KV, QKV_BF16},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const problem p = parsed(cases[i].op, cases[i].text);
        const DLDataType got = problem_dtype(&p, cases[i].key);
        if (got.code != cases[i].want.code || got.bits != cases[i].want.bits)
            fail_msg("%s %s: got code %d, %d bits", cases[i].op, cases[i].text, got.code, got.bits);
    }
}

static void problem_names_the_bad_key(void **state)
{
    (void)state;
    static const struct {
        const char *op, *text, *error, *why;
    } cases[] = {
        {"", "", "op: expected one of decode", "no operator"},
        {"decod", "", "got \"decod\"", "a part of a name"},
        {"decode", "bach=1", "bach: not a key; decode takes batch, kv_len", "an unknown key"},
        {"decode", "qo_len=4", "qo_len: not a key; decode takes", "another operator's key"},
        {"decode", "batch", "batch: expected key=value", "no value"},
        {"decode", "batch=", "batch: expected a whole number from 1 to", "an empty value"},
        {"decode", "=4", ": not a key", "an empty key"},
        {"decode", ",", "expected key=value", "a comma alone"},
        {"decode", "batch=4,", "batch: expected key=value", "a comma behind"},
        {"decode", ",batch=4", "expected key=value", "a comma in front"},
        {"decode", "batch=4,,kv_len=4", "expected key=value", "two commas"},
        {"decode", "batch=4,kv_len=5,batch=4", "batch: given twice", "twice"},
        {"decode", "batch=0", "batch: expected a whole number from 1 to 1048576, got \"0\"",
         "small"},
        {"decode", "batch=1048577", "batch: expected", "too much"},
        {"decode", "batch=99999999999999999999", "batch: expected", "more than 64 bits"},
        {"decode", "batch=4x", "batch: expected", "something behind the number"},
        {"decode", "batch= 4", "batch: expected", "a space"},
        {"decode", "batch=+4", "batch: expected", "a sign that no number has here"},
        {"decode", "batch=4.0", "batch: expected", "not whole"},
        {"decode", "batch=-", "batch: expected", "a sign alone"},
        {"decode", "batch=4/2", "batch: expected", "a pair for one number"},
        {"decode", "heads=8/", "heads: expected N or N/N", "half a pair"},
        {"decode", "heads=/8", "heads: expected N or N/N", "the other half"},
        {"decode", "heads=8/0", "heads: expected N or N/N, each from 1", "a bad second number"},
        {"decode", "heads=8/4/2", "heads: expected N or N/N", "three"},
        {"decode", "heads=8/3", "heads: expected query heads that are a multiple", "no multiple"},
        {"decode", "heads=4/8", "heads: expected query heads that are a multiple", "the wrong way"},
        {"decode", "q=float", "q: expected f32|f16|bf16|e4m3, got \"float\"", "not a choice"},
        {"decode", "q=f", "q: expected f32|f16|bf16", "a part of a choice"},
        {"decode", "q=f32|f16", "q: expected f32|f16|bf16", "the separator is no choice"},
        {"decode", "q=", "q: expected f32|f16|bf16", "an empty choice"},
        {"decode", "mask=CAUSAL", "mask: expected none|causal", "capitals"},
        {"decode", "cap=-1", "cap: expected a number from 0", "a negative real"},
        {"sample", "temperature=nan", "temperature: expected a number", "NaN"},
        {"sample", "temperature=1e999", "temperature: expected a number", "infinity"},
        {"sample", "temperature=0x1", "temperature: expected a number", "not decimal"},
        {"sample", "temperature=1e", "temperature: expected a number", "half a number"},
        {"sample", "temperature=", "temperature: expected a number", "an empty real"},
        {"sample", "top_p=0", "top_p: expected more than 0", "an open end"},
        {"prefill", "qo_len=9,kv_len=8", "qo_len: expected at most kv_len",
         "more new rows than keys"},
        {"mixed", "batch=2,prefills=3", "prefills: expected at most batch", "too many"},
        {"rope", "head_dim=64/32", "head_dim: expected one", "rope has one"},
        {"append", "page=0", "page: expected at least 1", "append has pages"},
        {"decode", "batch=000000000000000000000000000000000000000000000000000000000000000000001",
         "batch: expected key=value", "a value that nobody needs"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        problem p, before;
        memset(&p, 0x5a, sizeof p);
        memcpy(&before, &p, sizeof p);
        char error[PROBLEM_ERROR] = "";
        if (problem_parse(cases[i].op, cases[i].text, &p, error))
            fail_msg("%s %s was taken (%s)", cases[i].op, cases[i].text, cases[i].why);
        if (!strstr(error, cases[i].error))
            fail_msg("%s %s: expected \"%s\", got \"%s\" (%s)", cases[i].op, cases[i].text,
                     cases[i].error, error, cases[i].why);
        assert_memory_equal(&p, &before, sizeof p);
    }
}

static void problem_cuts_long_errors(void **state)
{
    (void)state;
    char text[2000], error[PROBLEM_ERROR];
    problem p;
    memset(text, 'k', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    assert_false(problem_parse(text, "", &p, error));
    assert_true(strlen(error) < sizeof error);
    assert_false(problem_parse("decode", text, &p, error));
    assert_true(strlen(error) < sizeof error);
    text[sizeof text - 9] = '=';
    assert_false(problem_parse("decode", text, &p, error));
    assert_non_null(strstr(error, "not a key"));
}

/* ---- printing ------------------------------------------------------------------------------ */

/* Random strings of an operator's keys in random order: each value is printed as it was given, and
 * what is printed parses to the same values. */
static void problem_prints_what_it_reads(void **state)
{
    (void)state;
    static const char *const items[] = {
        "batch=7",      "qo_len=9",     "kv_len=4000", "prefills=3",
        "heads=12/3",   "kv_heads=5",   "head_dim=64", "page=3",
        "layout=HND",   "q=f16",        "kv=f32",      "o=bf16",
        "mask=none",    "window=11",    "cap=1.25",    "dist=uniform",
        "m=3",          "n=16777216",   "k=1",         "x=f16",
        "w=f16",        "out=f32",      "tokens=2",    "size=77",
        "dtype=f16",    "residual=yes", "rotary=32",   "style=neox",
        "act=gelu",     "vocab=12345",  "top_k=8",     "temperature=0.7",
        "top_p=0.0625", "min_p=1e-09",  "data=cache",
    };
    enum { NUM_ITEMS = sizeof items / sizeof items[0] };
    for (int round = 0; round < 2000; round++) {
        const char *op, *defaults;
        int num_ops = 0;
        while (problem_op(num_ops, NULL, NULL)) num_ops++;
        op = problem_op((int)test_below(num_ops), &defaults, NULL);
        char text[1024] = "", printed[PROBLEM_TEXT], again[PROBLEM_TEXT], wrapped[PROBLEM_TEXT + 2];
        bool used[NUM_ITEMS] = {false};
        for (int64_t n = test_below(20); n > 0; n--) {
            const int64_t i = test_below(NUM_ITEMS);
            char key[32];
            snprintf(key, sizeof key, "%.*s", (int)strcspn(items[i], "=") + 1, items[i]);
            const char *at = strstr(defaults, key);
            if (used[i] || !at || (at > defaults && at[-1] != ',')) continue;
            used[i] = true;
            snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s", *text ? "," : "",
                     items[i]);
        }
        const problem p = parsed(op, text);
        problem_print(&p, printed);
        snprintf(wrapped, sizeof wrapped, ",%s,", printed);
        for (int i = 0; i < NUM_ITEMS; i++) {
            char item[64];
            snprintf(item, sizeof item, ",%s,", items[i]);
            if (used[i] && !strstr(wrapped, item)) fail_msg("%s %s: no %s", op, printed, items[i]);
        }
        const problem q = parsed(op, printed);
        problem_print(&q, again);
        assert_string_equal(printed, again);
        assert_memory_equal(p.value, q.value, sizeof p.value);
    }
}

static void problem_prints_reals_exactly(void **state)
{
    (void)state;
    for (int i = 0; i < 1000; i++) {
        problem p = parsed("sample", "");
        char text[PROBLEM_TEXT];
        p.value[KEY_TEMPERATURE].real = fabs(test_uniform(test_below(2) ? 1 : 1000));
        problem_print(&p, text);
        assert_true(parsed("sample", text).value[KEY_TEMPERATURE].real ==
                    p.value[KEY_TEMPERATURE].real);
    }
}

static void problem_explains_every_key(void **state)
{
    (void)state;
    const char *name, *help;
    int n = 0;
    for (; (help = problem_key_help(n, &name)); n++) assert_true(*help && *name);
    assert_int_equal(n, NUM_KEYS);
}

/* ---- attention ----------------------------------------------------------------------------- */

static void attention_problem_adds_up(void **state)
{
    (void)state;
    static const struct {
        const char *op, *text;
        int64_t least, most; /* of a request's keys */
    } cases[] = {
        {"decode", "batch=5,kv_len=33,page=8", 33, 33},
        {"decode", "batch=64,kv_len=100,page=16,dist=uniform", 50, 100},
        {"decode", "batch=64,kv_len=100,page=16,dist=zipf", 1, 100 * 64},
        {"decode", "batch=3,kv_len=20,page=0", 20, 20},
        {"prefill", "batch=4,qo_len=7,kv_len=30,page=1", 30, 30},
        {"mixed", "batch=9,prefills=4,qo_len=60,kv_len=80,dist=zipf", 1, 80 * 9},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const problem p = parsed(cases[i].op, cases[i].text);
        attention_problem a = attention_problem_create(&p);
        const int64_t page = a.spec.page_size, qo_len = p.value[KEY_QO_LEN].first;
        const int64_t prefills = strcmp(p.op, "mixed") == 0     ? p.value[KEY_PREFILLS].first
                                 : strcmp(p.op, "prefill") == 0 ? a.batch
                                                                : 0;
        int64_t tokens = 0, keys = 0, pages = 0, most = 0, long_ones = 0;
        for (int64_t r = 0; r < a.batch; r++) {
            assert_in_range(a.kv_len[r], cases[i].least, cases[i].most);
            assert_true(a.kv_len[r] >= a.qo_len[r]);
            long_ones += a.qo_len[r] > 1;
            tokens += a.qo_len[r];
            keys += a.kv_len[r];
            pages += page ? (a.kv_len[r] + page - 1) / page : 0;
            if (a.kv_len[r] > most) most = a.kv_len[r];
        }
        assert_int_equal(long_ones, prefills);
        assert_int_equal(tokens, a.batch - prefills + prefills * qo_len);
        assert_int_equal(a.num_tokens, tokens);
        assert_int_equal(a.num_keys, keys);
        assert_int_equal(a.num_pages, pages);
        assert_int_equal(a.pool_slots, page ? pages * page : keys);
        assert_int_equal(a.limits.max_kv_len, most);
        assert_int_equal(a.limits.max_tokens, tokens);
        assert_int_equal(a.limits.max_pages, pages);
        attention_problem_destroy(&a);
    }
}

static void attention_problem_asks_for_features(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int32_t features;
    } cases[] = {
        {"", 0},
        {"window=0", QKV_FEATURE_WINDOW},
        {"cap=30", QKV_FEATURE_SOFT_CAP},
        {"window=5,cap=1", QKV_FEATURE_WINDOW | QKV_FEATURE_SOFT_CAP},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const problem p = parsed("decode", cases[i].text);
        attention_problem a = attention_problem_create(&p);
        assert_int_equal(a.spec.features, cases[i].features);
        attention_problem_destroy(&a);
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(problem_defaults_are_canonical),
        cmocka_unit_test(problem_reads_values),
        cmocka_unit_test(problem_dtypes_follow_the_first_one),
        cmocka_unit_test(problem_names_the_bad_key),
        cmocka_unit_test(problem_cuts_long_errors),
        cmocka_unit_test(problem_prints_what_it_reads),
        cmocka_unit_test(problem_prints_reals_exactly),
        cmocka_unit_test(problem_explains_every_key),
        cmocka_unit_test(attention_problem_adds_up),
        cmocka_unit_test(attention_problem_asks_for_features),
    };
    return cmocka_run_group_tests_name("problem", tests, NULL, NULL);
}
