/* test_tokenizer.c - pieces, merges, special tokens and chat; tests/python/check_tokenizer.py holds
 * the same code against the reference implementation.
 *
 * The file of make_tiny_gguf.py comes from the environment (QKV_TEST_GGUF) or as an argument.
 * SPDX-License-Identifier: Apache-2.0 */
#include "support.h"

#include "../examples/generate/bpe.h"
#include "../examples/generate/tokenizer.h"
#include "gguf_writer.h"

static const char *tiny_path;

/* ---- a vocabulary made by hand --------------------------------------------------------------- */

enum { CONTROL = 3, USER = 4, NUM_BYTES = 256 };

/* "\u0120" is a space in the alphabet of such files, "\u010a" a new line. */
static const char *const merges[] = {
    "b c", "a b",  "ab c", "a a", "aa aa",         "\u0120 \u0120", "\u0120 a",      "\u0120 1",
    "1 2", "12 3", "' s",  "' S", "\u010a \u010a", "\u0120 \u00ed", "\u00c3 \u00a9",
};
enum { NUM_MERGES = sizeof merges / sizeof *merges };

/* Tokens that are no merge: a word that only a look-up of the whole finds, then special ones. */
static const struct {
    const char *text;
    int32_t type;
} others[] = {
    {"zz", 1}, {"<|im_start|>", CONTROL}, {"<|im_end|>", CONTROL}, {"<x>", USER}, {"<x>>", USER},
};
enum {
    NUM_OTHERS = sizeof others / sizeof *others,
    NUM_TOKENS = NUM_BYTES + NUM_MERGES + NUM_OTHERS
};

static void put_byte_token(writer *w, int byte)
{
    const int plain = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
    int c = byte;
    if (!plain) {
        c = 256 + byte; /* those before it that stand for themselves take no place */
        if (byte > 126) c -= 94;
        if (byte > 172) c -= 12;
    }
    const char text[] = {(char)(c < 128 ? c : 0xc0 | c >> 6), (char)(0x80 | (c & 63)), 0};
    put_u64(w, c < 128 ? 1 : 2);
    put(w, text, c < 128 ? 1 : 2);
}

/* What differs from a good vocabulary; NULL and 0 leave it good. */
typedef struct spec {
    const char *why, *message;
    const char *pre, *model, *merge; /* merge: in place of the last one */
    uint32_t more_types, add_bos_type;
    uint32_t bos;
    bool no_tokens;
} spec;

static writer build(const spec *s)
{
    writer w = {.data = NULL};
    put_header(&w, 0, 8);
    put_string_key(&w, "tokenizer.ggml.model", s->model ? s->model : "gpt2");
    put_string_key(&w, "tokenizer.ggml.pre", s->pre ? s->pre : "gpt-2");
    put_array_key(&w, s->no_tokens ? "other" : "tokenizer.ggml.tokens", GGUF_STRING, NUM_TOKENS);
    for (int i = 0; i < NUM_BYTES; i++) {
        if (i == 'q')
            put_string(&w, "?? no q"); /* a byte without a token */
        else
            put_byte_token(&w, i);
    }
    for (int i = 0; i < NUM_MERGES; i++) {
        const char *space = strchr(merges[i], ' ');
        const size_t left = (size_t)(space - merges[i]);
        put_u64(&w, strlen(merges[i]) - 1);
        put(&w, merges[i], left);
        put(&w, space + 1, strlen(space + 1));
    }
    for (int i = 0; i < NUM_OTHERS; i++) put_string(&w, others[i].text);
    put_array_key(&w, "tokenizer.ggml.token_type", GGUF_I32, NUM_TOKENS + s->more_types);
    for (uint32_t i = 0; i < NUM_TOKENS + s->more_types; i++)
        put_u32(&w, i < NUM_BYTES + NUM_MERGES || i >= NUM_TOKENS
                        ? 1
                        : (uint32_t)others[i - NUM_BYTES - NUM_MERGES].type);
    put_array_key(&w, "tokenizer.ggml.merges", GGUF_STRING, NUM_MERGES);
    for (int i = 0; i < NUM_MERGES; i++)
        put_string(&w, s->merge && i == NUM_MERGES - 1 ? s->merge : merges[i]);
    put_u32_key(&w, "tokenizer.ggml.bos_token_id", NUM_BYTES + NUM_MERGES + 1 + s->bos);
    put_u32_key(&w, "tokenizer.ggml.eos_token_id", 'z');
    put_key(&w, s->add_bos_type ? "tokenizer.ggml.add_bos_token" : "unused", GGUF_U32);
    put_u32(&w, 1);
    return w;
}

static tokenizer *create(const char *pre)
{
    char error[GGUF_ERROR] = "";
    writer w = build(&(spec){.pre = pre});
    gguf *file = gguf_open_memory(w.data, w.len, error);
    if (!file) fail_msg("%s", error);
    tokenizer *t = tokenizer_create(file, error);
    if (!t) fail_msg("%s: %s", pre, error);
    gguf_close(file);
    free(w.data); /* a tokenizer keeps nothing of the file */
    return t;
}

static tokenizer *create_tiny(void)
{
    char error[GGUF_ERROR] = "";
    gguf *file = gguf_open(tiny_path, error);
    if (!file) fail_msg("%s", error);
    tokenizer *t = tokenizer_create(file, error);
    if (!t) fail_msg("%s", error);
    gguf_close(file);
    return t;
}

/* ---- pieces and merges ----------------------------------------------------------------------- */

static void tokenizer_cuts_and_merges(void **state)
{
    (void)state;
    enum { S = TOKENIZER_SPECIAL, B = TOKENIZER_BOS };
    static const struct {
        const char *why, *pre, *text, *want; /* tokens, a | after each */
        unsigned flags;
    } cases[] = {
        {"the lowest rank first, not the leftmost", "gpt-2", "abc", "a|bc|", 0},
        {"later merges", "gpt-2", "ab", "ab|", 0},
        {"the leftmost of equals", "gpt-2", "aaaaa", "aaaa|a|", 0},
        {"merges do not cross pieces", "gpt-2", "a1b", "a|1|b|", 0},
        {"two bytes of a character", "gpt-2", "\u00e9\u00e8", "\u00e9|\xc3|\xa8|", 0},
        {"space goes with the word", "gpt-2", " a", " a|", 0},
        {"the last space only", "gpt-2", "   a", "  | a|", 0},
        {"trailing spaces together", "gpt-2", "a   ", "a|  | |", 0},
        {"space goes with a number", "gpt-2", "a 1", "a| 1|", 0},
        {"but not here", "smollm", "a 1", "a| |1|", 0},
        {"nor here", "llama-bpe", "a 1", "a| |1|", 0},
        {"spaces before a digit stay together", "smollm", "  1", "  |1|", 0},
        {"all but the last do", "gpt-2", "  1", " | 1|", 0},
        {"the last is a piece", "llama-bpe", "   1", "  | |1|", 0},
        {"digits together", "gpt-2", "11231", "1|123|1|", 0},
        {"digits alone", "smollm", "123", "1|2|3|", 0},
        {"digits by three", "llama-bpe", "11231", "1|12|3|1|", 0},
        {"digits of any script are digits", "smollm", "a\u0661b", "a|\xd9|\xa1|b|", 0},
        {"apostrophe and s", "gpt-2", "a's", "a|'s|", 0},
        {"apostrophe and capital s", "gpt-2", "a'S", "a|'|S|", 0},
        {"whatever the case", "llama-bpe", "a'S", "a|'S|", 0},
        {"lines apart", "gpt-2", "a\n\na", "a|\n|\n|a|", 0},
        {"lines together", "llama-bpe", "a\n\na", "a|\n\n|a|", 0},
        {"no merge makes it", "gpt-2", "zz", "z|z|", 0},
        {"a look-up finds it", "llama-bpe", "zz", "zz|", 0},
        {"only the whole piece is looked up", "llama-bpe", "zzz", "z|z|z|", 0},
        {"a byte without a token is left out", "gpt-2", "aqa", "aa|", 0},
        {"all left out", "gpt-2", "qq", "", 0},
        {"no text", "gpt-2", "", "", S},
        {"bytes that are no UTF-8", "gpt-2",
         "a\xff\xfe"
         "a",
         "a|\xff|\xfe|a|", 0},
        {"half a character", "smollm", "a\xc3", "a|\xc3|", 0},
        {"a surrogate", "gpt-2", " \xed\xa0\x80", " |\xed|\xa0|\x80|", 0},
        {"a long way to write a slash", "gpt-2", "\xc0\xaf", "\xc0|\xaf|", 0},
        {"past U+10FFFF", "gpt-2", "\xf4\x90\x80\x80", "\xf4|\x90|\x80|\x80|", 0},
        {"special tokens", "gpt-2", "a<|im_end|>a", "a|<|im_end|>|a|", S},
        {"not asked for", "gpt-2", "<x>", "<|x|>|", 0},
        {"the longest", "gpt-2", "<x>><x>", "<x>>|<x>|", S},
        {"nearly one", "gpt-2", "<<x><x", "<|<x>|<|x|", S},
        {"the text around is cut apart", "gpt-2", " <x> a", " |<x>| a|", S},
        {"the file does not ask for BOS", "gpt-2", "a", "a|", B},
        {"this rule does", "llama-bpe", "a", "<|im_start|>|a|", B},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char error[GGUF_ERROR] = "", got[256] = "";
        tokenizer *t = create(cases[i].pre);
        size_t count = SIZE_MAX;
        int32_t *ids = tokenizer_encode(t, cases[i].text, strlen(cases[i].text), cases[i].flags,
                                        &count, error);
        if (!ids) fail_msg("%s: %s", cases[i].why, error);
        for (size_t j = 0; j < count; j++) {
            const gguf_string token = tokenizer_decode(t, ids[j]);
            strncat(got, token.data, token.len);
            strcat(got, "|");
        }
        if (strcmp(got, cases[i].want) != 0)
            fail_msg("%s (%s): expected \"%s\", got \"%s\"", cases[i].why, cases[i].pre,
                     cases[i].want, got);
        free(ids);
        tokenizer_destroy(t);
    }
}

/* Merges by the definition: look at every pair, each time. */
static size_t merge_slowly(const bpe_merge *rules, size_t num_rules, int32_t *ids, size_t count)
{
    for (;;) {
        const bpe_merge *best = NULL;
        size_t where = 0;
        for (size_t i = 0; i + 1 < count; i++)
            for (size_t r = 0; r < num_rules; r++)
                if (rules[r].left == ids[i] && rules[r].right == ids[i + 1] &&
                    (!best || rules[r].rank < best->rank)) {
                    best = &rules[r];
                    where = i;
                }
        if (!best) return count;
        ids[where] = best->merged;
        memmove(ids + where + 1, ids + where + 2, (count - where - 2) * sizeof *ids);
        count--;
    }
}

static void bpe_merges_by_the_definition(void **state)
{
    (void)state;
    enum { RULES = 40, LETTERS = 4, MAX_LEN = 60 };
    bpe_scratch scratch = {.capacity = 0};
    for (int round = 0; round < 3000; round++) {
        bpe b;
        bpe_merge rules[RULES];
        assert_true(bpe_init(&b, RULES));
        for (int32_t i = 0; i < LETTERS; i++) b.byte_ids[i] = i;
        for (uint32_t r = 0; r < RULES; r++) {
            /* Of tokens that there are by then; now and then a pair that was there before. */
            const int64_t tokens = LETTERS + r / 2;
            rules[r] = (bpe_merge){.left = (int32_t)test_below(tokens),
                                   .right = (int32_t)test_below(tokens),
                                   .merged = LETTERS + (int32_t)r,
                                   .rank = r};
            bpe_add(&b, rules[r].left, rules[r].right, rules[r].merged);
        }
        uint8_t text[MAX_LEN];
        int32_t want[MAX_LEN], got[MAX_LEN];
        const size_t len = (size_t)test_below(MAX_LEN) + 1;
        for (size_t i = 0; i < len; i++) want[i] = text[i] = (uint8_t)test_below(LETTERS);
        size_t count = 0;
        assert_true(bpe_encode(&b, &scratch, text, len, got, &count));
        assert_int_equal(count, merge_slowly(rules, RULES, want, len));
        assert_memory_equal(got, want, count * sizeof *got);
        bpe_free(&b);
    }
    bpe_scratch_free(&scratch);
}

static void tokenizer_gives_every_byte_back(void **state)
{
    (void)state;
    tokenizer *t = create_tiny();
    static char text[5000], got[sizeof text];
    for (int round = 0; round < 200; round++) {
        char error[GGUF_ERROR] = "";
        const size_t len = (size_t)test_below(sizeof text);
        const int64_t range = round % 2 ? 256 : 100;
        for (size_t i = 0; i < len; i++)
            text[i] = (char)(range < 256 ? 32 + test_below(range) : test_below(range));
        size_t count, at = 0;
        int32_t *ids = tokenizer_encode(t, text, len, 0, &count, error);
        if (!ids) fail_msg("%s", error);
        for (size_t i = 0; i < count; i++) {
            const gguf_string token = tokenizer_decode(t, ids[i]);
            assert_true(token.len > 0 && token.len <= len - at);
            memcpy(got + at, token.data, token.len);
            at += token.len;
        }
        assert_int_equal(at, len);
        assert_memory_equal(got, text, len);
        free(ids);
    }
    assert_int_equal(tokenizer_decode(t, -1).len, 0);
    assert_int_equal(tokenizer_decode(t, tokenizer_vocab_size(t)).len, 0);
    tokenizer_destroy(t);
}

static void tokenizer_takes_one_long_piece(void **state)
{
    (void)state;
    static const char *const pre[] = {"smollm", "gpt-2", "llama-bpe"};
    enum { LEN = 1 << 20 };
    char *text = malloc(LEN);
    for (size_t p = 0; p < 3; p++) {
        tokenizer *t = create(pre[p]);
        /* Letters, spaces, lines, marks, and bytes that are no UTF-8. */
        for (const char *c = "a \n!\xff"; *c; c++) {
            char error[GGUF_ERROR] = "";
            size_t count = 0;
            memset(text, *c, LEN);
            const clock_t begin = clock();
            int32_t *ids = tokenizer_encode(t, text, LEN, TOKENIZER_SPECIAL, &count, error);
            if (!ids) fail_msg("%s", error);
            const double seconds = (double)(clock() - begin) / CLOCKS_PER_SEC;
            /* Takes 0.1 s; a quadratic algorithm would take an hour. */
            if (seconds > 20) fail_msg("%s, \"%c\": took %.1f s", pre[p], *c, seconds);
            assert_true(count >= LEN / 4 && count <= LEN);
            free(ids);
        }
        tokenizer_destroy(t);
    }
    free(text);
}

/* ---- what the file says ---------------------------------------------------------------------- */

static void tokenizer_knows_its_tokens(void **state)
{
    (void)state;
    tokenizer *t = create("gpt-2");
    const int32_t start = NUM_BYTES + NUM_MERGES + 1, end = start + 1;
    assert_int_equal(tokenizer_vocab_size(t), NUM_TOKENS);
    assert_int_equal(tokenizer_bos(t), start);
    assert_int_equal(tokenizer_eos(t), 'z');
    assert_true(tokenizer_is_special(t, start) && tokenizer_is_special(t, end + 1));
    assert_false(tokenizer_is_special(t, 'z') || tokenizer_is_special(t, start - 1));
    assert_false(tokenizer_is_special(t, -1) || tokenizer_is_special(t, NUM_TOKENS));
    assert_true(tokenizer_is_end(t, 'z') && tokenizer_is_end(t, end));
    assert_false(tokenizer_is_end(t, start) || tokenizer_is_end(t, 'y'));
    tokenizer_destroy(t);
    tokenizer_destroy(NULL);
}

static void tokenizer_names_what_is_wrong(void **state)
{
    (void)state;
    static const spec cases[] = {
        {"another model", "tokenizer.ggml.model: expected gpt2 (byte-level BPE), got llama",
         .model = "llama"},
        {"another rule", "llama-bpe, got deepseek-llm", .pre = "deepseek-llm"},
        {"no vocabulary", "tokenizer.ggml.tokens: expected an array, got no such key",
         .no_tokens = true},
        {"more types than tokens", "tokenizer.ggml.token_type: expected 276 elements, got 277",
         .more_types = 1},
        {"merge of one", "number 14, \"ab\", does not join", .merge = "ab"},
        {"merge of nothing", "number 14, \" a\", does not join", .merge = " a"},
        {"merge into nothing", "number 14, \"a \", does not join", .merge = "a "},
        {"merge of what is no token", "\"x yz\", does not join", .merge = "x yz"},
        {"merge into what is no token", "\"x y\", does not join", .merge = "x y"},
        {"merge of a special token", "\"< x>\", does not join", .merge = "< x>"},
        {"BOS is no token", "tokenizer.ggml.bos_token_id: expected a token below 276, got 276",
         .bos = NUM_OTHERS - 1},
        {"BOS wanted, or not", "tokenizer.ggml.add_bos_token: expected a bool, got u32",
         .add_bos_type = 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char error[GGUF_ERROR] = "";
        writer w = build(&cases[i]);
        gguf *file = gguf_open_memory(w.data, w.len, error);
        if (!file) fail_msg("%s: %s", cases[i].why, error);
        tokenizer *t = tokenizer_create(file, error);
        if (t || !strstr(error, cases[i].message))
            fail_msg("%s: expected \"%s\", got \"%s\"", cases[i].why, cases[i].message, error);
        gguf_close(file);
        free(w.data);
    }
}

static void tokenizer_survives_flipped_bytes(void **state)
{
    (void)state;
    static const char text[] = "The 12 ships' names <|im_end|>\n\n \u00e9t\u00e9 \xff";
    size_t len = 0;
    int created = 0;
    uint8_t *tiny = read_bytes(tiny_path, &len);
    assert_non_null(tiny);
    uint8_t *copy = malloc(len);
    for (int round = 0; round < 1000; round++) {
        char error[GGUF_ERROR] = "";
        size_t count = 0;
        memcpy(copy, tiny, len);
        for (int64_t i = test_below(3); i >= 0; i--)
            copy[test_below((int64_t)len / 24)] = (uint8_t)test_u64(); /* where the header is */
        gguf *file = gguf_open_memory(copy, len, error);
        tokenizer *t = file ? tokenizer_create(file, error) : NULL;
        assert_true(t || error[0]);
        int32_t *ids = t ? tokenizer_encode(t, text, sizeof text, TOKENIZER_SPECIAL | TOKENIZER_BOS,
                                            &count, error)
                         : NULL;
        assert_true(ids || !t);
        for (size_t i = 0; i < count; i++)
            assert_true(ids[i] >= 0 && ids[i] < tokenizer_vocab_size(t));
        created += t != NULL;
        free(ids);
        tokenizer_destroy(t);
        gguf_close(file);
    }
    assert_true(created > 0);
    free(copy);
    free(tiny);
}

/* ---- chat ------------------------------------------------------------------------------------ */

static void chatml_writes_the_conversation(void **state)
{
    (void)state;
    static const struct {
        const char *why, *system, *want;
        bool tiny;
    } cases[] = {
        {"the system text of the file's template", NULL,
         "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
         "<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\n",
         true},
        {"another system text", "Be brief.",
         "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n"
         "<|im_start|>assistant\n",
         true},
        {"no template", NULL, "<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\n", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char error[GGUF_ERROR] = "";
        size_t len = 0;
        tokenizer *t = cases[i].tiny ? create_tiny() : create("gpt-2");
        char *text = tokenizer_chatml(t, cases[i].system, "Hi\n and more", 3, &len, error);
        if (!text) fail_msg("%s: %s", cases[i].why, error);
        assert_string_equal(text, cases[i].want);
        assert_int_equal(len, strlen(text));
        free(text);
        tokenizer_destroy(t);
    }
}

static void chatml_needs_its_tokens(void **state)
{
    (void)state;
    char error[GGUF_ERROR] = "";
    size_t len;
    writer w = build(&(spec){.why = "good"});
    for (size_t i = 0; i + 12 < w.len; i++)
        if (memcmp(w.data + i, "<|im_start|>", 12) == 0) w.data[i + 2] = 'x';
    gguf *file = gguf_open_memory(w.data, w.len, error);
    if (!file) fail_msg("%s", error);
    tokenizer *t = tokenizer_create(file, error);
    if (!t) fail_msg("%s", error);
    assert_null(tokenizer_chatml(t, NULL, "Hi", 2, &len, error));
    assert_non_null(strstr(error, "<|im_start|>"));
    tokenizer_destroy(t);
    gguf_close(file);
    free(w.data);
}

int main(int argc, char **argv)
{
    test_seed();
    tiny_path = argc > 1 ? argv[1] : getenv("QKV_TEST_GGUF");
    if (!tiny_path) {
        fprintf(stderr, "expected the path of tiny.gguf in QKV_TEST_GGUF or as an argument\n");
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tokenizer_cuts_and_merges),
        cmocka_unit_test(bpe_merges_by_the_definition),
        cmocka_unit_test(tokenizer_gives_every_byte_back),
        cmocka_unit_test(tokenizer_takes_one_long_piece),
        cmocka_unit_test(tokenizer_knows_its_tokens),
        cmocka_unit_test(tokenizer_names_what_is_wrong),
        cmocka_unit_test(tokenizer_survives_flipped_bytes),
        cmocka_unit_test(chatml_writes_the_conversation),
        cmocka_unit_test(chatml_needs_its_tokens),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
