/* tokenizer.c - loads a vocabulary and encodes text with it.
 *
 * The file spells the bytes of ordinary tokens in an alphabet of 256 printable characters (a space
 * is "Ġ"). They are turned into bytes once, at load; merges and look-ups then work on bytes.
 * Special tokens (control, user-defined) are spelt as they are.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "bpe.h"

/* Unicode's White_Space. PCRE2's \s has U+180E besides, which is none since Unicode 6.3. */
#define SPACE "\\x{9}-\\x{d}\\x{85}\\p{Z}"

/* The rule by which text is cut into pieces, each of which is encoded by itself. */
typedef struct rule {
    const char *pre;   /* tokenizer.ggml.pre */
    const char *regex; /* one piece; every text is a sequence of them */
    bool whole_first;  /* a piece that is a token is that token, whatever the merges say */
    bool add_bos;      /* unless the file says */
} rule;

#define GPT2_WORD  "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+|"
#define GPT2_OTHER "| ?[^" SPACE "\\p{L}\\p{N}]+|"
#define GPT2_REGEX GPT2_WORD " ?\\p{N}+" GPT2_OTHER "[" SPACE "]+(?![^" SPACE "])|[" SPACE "]+"

/* GPT-2's rule on what lies between digits; so spaces before a digit stay together. */
#define SMOLLM_REGEX GPT2_WORD "\\p{N}" GPT2_OTHER "[" SPACE "]+(?![^" SPACE "\\p{N}])|[" SPACE "]+"

#define LLAMA3_REGEX                                                                               \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"                      \
    " ?[^" SPACE "\\p{L}\\p{N}]+[\\r\\n]*|[" SPACE "]*[\\r\\n]+|"                                  \
    "[" SPACE "]+(?![^" SPACE "])|[" SPACE "]+"

static const rule rules[] = {
    {.pre = "smollm", .regex = SMOLLM_REGEX},
    {.pre = "gpt-2", .regex = GPT2_REGEX},
    {.pre = "gpt2", .regex = GPT2_REGEX},
    {.pre = "default", .regex = GPT2_REGEX},
    {.pre = "llama-bpe", .regex = LLAMA3_REGEX, .whole_first = true, .add_bos = true},
};

typedef struct special {
    gguf_string text; /* not empty */
    int32_t id;
} special;

/* What the chat template of SmolLM2 says when the conversation has no system text. */
#define SMOLLM_SYSTEM "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

/* What the file's token_type says, of the values that matter here. */
enum { TYPE_CONTROL = 3, TYPE_USER_DEFINED = 4 };

enum { FLAG_SPECIAL = 1, FLAG_END = 2 };

struct tokenizer {
    const rule *rule;
    pcre2_code *regex;
    bpe merges;
    int32_t num_tokens, bos, eos;
    bool add_bos, default_system;
    char *text;      /* the bytes of all tokens, one after another */
    size_t *begin;   /* [num_tokens + 1] where each begins in text */
    uint8_t *flags;  /* [num_tokens] */
    int32_t *lookup; /* [num_lookup] hash table of ordinary tokens by bytes; -1: free */
    size_t num_lookup;
    special *specials;         /* by first byte, then the longest first */
    size_t first_special[257]; /* [b] to [b + 1]: those that begin with byte b */
};

/* Working memory of one call of tokenizer_encode. */
typedef struct encoder {
    const tokenizer *t;
    pcre2_match_data *match;
    pcre2_match_context *context;
    bpe_scratch scratch;
    int32_t *ids;
    size_t count;
    char *error;
} encoder;

static inline bool never(int written)
{
    (void)written;
    return false;
}

/* A macro, so that the compiler sees that it is always false and checks the format. */
#define fail(error, ...) never(snprintf((error), GGUF_ERROR, __VA_ARGS__))

/* ---- tokens --------------------------------------------------------------------------------- */

gguf_string tokenizer_decode(const tokenizer *t, int32_t id)
{
    if (id < 0 || id >= t->num_tokens) return (gguf_string){.data = t->text, .len = 0};
    return (gguf_string){.data = t->text + t->begin[id], .len = t->begin[id + 1] - t->begin[id]};
}

static bool has_flag(const tokenizer *t, int32_t id, uint8_t flag)
{
    return id >= 0 && id < t->num_tokens && (t->flags[id] & flag);
}

bool tokenizer_is_special(const tokenizer *t, int32_t id)
{
    return has_flag(t, id, FLAG_SPECIAL);
}

bool tokenizer_is_end(const tokenizer *t, int32_t id)
{
    return has_flag(t, id, FLAG_END);
}

int32_t tokenizer_bos(const tokenizer *t)
{
    return t->bos;
}

int32_t tokenizer_eos(const tokenizer *t)
{
    return t->eos;
}

int32_t tokenizer_vocab_size(const tokenizer *t)
{
    return t->num_tokens;
}

/* The slot of the ordinary token with these bytes, or the free one where it belongs. */
static int32_t *find_slot(const tokenizer *t, const char *bytes, size_t len)
{
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < len; i++) hash = (hash ^ (uint8_t)bytes[i]) * 1099511628211u;
    hash ^= hash >> 32;
    for (size_t i = (size_t)hash;; i++) {
        int32_t *slot = &t->lookup[i & (t->num_lookup - 1)];
        if (*slot < 0) return slot;
        const gguf_string token = tokenizer_decode(t, *slot);
        if (token.len == len && memcmp(token.data, bytes, len) == 0) return slot;
    }
}

/* The byte that a character of the alphabet stands for, or -1. Printable ones of Latin-1 stand for
 * themselves, the others follow from U+0100 in order: 0-32, 127-160, 173. */
static int alphabet_byte(unsigned c)
{
    if ((c >= 33 && c <= 126) || (c >= 161 && c <= 172) || (c >= 174 && c <= 255)) return (int)c;
    if (c < 256 || c > 256 + 67) return -1;
    c -= 256;
    return (int)(c <= 32 ? c : c <= 66 ? c - 33 + 127 : 173);
}

/* Turns text in the alphabet into bytes; false if there is any other character in it. The
 * alphabet's characters take one or two bytes of UTF-8. */
static bool from_alphabet(gguf_string text, char *out, size_t *len)
{
    *len = 0;
    for (size_t i = 0; i < text.len;) {
        unsigned c = (uint8_t)text.data[i++];
        if (c >= 0x80) {
            if ((c & 0xe0) != 0xc0 || i == text.len || ((uint8_t)text.data[i] & 0xc0) != 0x80)
                return false;
            c = (c & 31) << 6 | ((uint8_t)text.data[i++] & 63);
        }
        const int byte = alphabet_byte(c);
        if (byte < 0) return false;
        out[(*len)++] = (char)byte;
    }
    return true;
}

/* ---- loading -------------------------------------------------------------------------------- */

static bool load_rule(tokenizer *t, const gguf *file, char *error)
{
    gguf_string model, pre;
    if (!gguf_get_string(file, "tokenizer.ggml.model", &model, error) ||
        !gguf_get_string(file, "tokenizer.ggml.pre", &pre, error))
        return false;
    if (!gguf_equal(model, "gpt2"))
        return fail(error, "tokenizer.ggml.model: expected gpt2 (byte-level BPE), got %.*s",
                    (int)(model.len < 80 ? model.len : 80), model.data);
    for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++)
        if (gguf_equal(pre, rules[i].pre)) t->rule = &rules[i];
    if (!t->rule)
        return fail(error, "tokenizer.ggml.pre: expected smollm, gpt-2 or llama-bpe, got %.*s",
                    (int)(pre.len < 80 ? pre.len : 80), pre.data);
    int code;
    size_t where;
    t->regex = pcre2_compile((PCRE2_SPTR)t->rule->regex, PCRE2_ZERO_TERMINATED,
                             PCRE2_UTF | PCRE2_UCP, &code, &where, NULL);
    return t->regex ||
           fail(error, "regular expression of %s: error %d at %zu", t->rule->pre, code, where);
}

static bool allocate_tokens(tokenizer *t, gguf_array tokens, char *error)
{
    const size_t count = tokens.count;
    size_t bytes = 1; /* never nothing: malloc(0) may be NULL */
    for (size_t i = 0; i < count; i++) bytes += gguf_next_string(&tokens).len;
    for (t->num_lookup = 16; t->num_lookup < 2 * count;) t->num_lookup *= 2;
    t->text = malloc(bytes);
    t->begin = calloc(count + 1, sizeof *t->begin);
    t->flags = calloc(count, 1);
    t->specials = calloc(count, sizeof *t->specials);
    t->lookup = malloc(t->num_lookup * sizeof *t->lookup);
    if (!t->text || !t->begin || !t->flags || !t->specials || !t->lookup)
        return fail(error, "tokenizer: out of memory");
    for (size_t i = 0; i < t->num_lookup; i++) t->lookup[i] = -1;
    return true;
}

/* Adds the next token. Of two with the same bytes the first is found. */
static void add_token(tokenizer *t, gguf_string text, int64_t type)
{
    const int32_t id = t->num_tokens++;
    char *out = t->text + t->begin[id];
    size_t len;
    if (type == TYPE_CONTROL || type == TYPE_USER_DEFINED) t->flags[id] = FLAG_SPECIAL;
    const bool ordinary = !t->flags[id] && from_alphabet(text, out, &len);
    if (!ordinary) {
        len = text.len;
        memcpy(out, text.data, len);
    }
    t->begin[id + 1] = t->begin[id] + len;
    if (!ordinary) return;
    int32_t *slot = find_slot(t, out, len);
    if (*slot < 0) *slot = id;
}

static int compare_specials(const void *left, const void *right)
{
    const special *a = left, *b = right;
    const int first = (uint8_t)*a->text.data - (uint8_t)*b->text.data;
    if (first) return first;
    if (a->text.len != b->text.len) return a->text.len > b->text.len ? -1 : 1;
    return a->id - b->id;
}

static void sort_specials(tokenizer *t)
{
    size_t count = 0;
    for (int32_t id = 0; id < t->num_tokens; id++) {
        const special s = {.text = tokenizer_decode(t, id), .id = id};
        if (!(t->flags[id] & FLAG_SPECIAL) || !s.text.len) continue;
        t->specials[count++] = s;
        t->first_special[(uint8_t)*s.text.data + 1]++;
    }
    qsort(t->specials, count, sizeof *t->specials, compare_specials);
    for (int byte = 0; byte < 256; byte++) t->first_special[byte + 1] += t->first_special[byte];
}

/* The longest special token that the text begins with, or -1. */
static int32_t special_at(const tokenizer *t, const char *text, size_t len)
{
    const uint8_t byte = (uint8_t)*text;
    for (size_t i = t->first_special[byte]; i < t->first_special[byte + 1]; i++) {
        const special *s = &t->specials[i];
        if (s->text.len <= len && memcmp(text, s->text.data, s->text.len) == 0) return s->id;
    }
    return -1;
}

static int32_t find_special(const tokenizer *t, const char *name)
{
    const int32_t id = special_at(t, name, strlen(name));
    return id >= 0 && gguf_equal(tokenizer_decode(t, id), name) ? id : -1;
}

static bool load_tokens(tokenizer *t, const gguf *file, char *error)
{
    gguf_array tokens, types = {.count = 0};
    if (!gguf_get_array(file, "tokenizer.ggml.tokens", GGUF_STRING, &tokens, error)) return false;
    if (tokens.count == 0 || tokens.count > INT32_MAX / 4)
        return fail(error, "tokenizer.ggml.tokens: got %zu tokens", tokens.count);
    if (gguf_has(file, "tokenizer.ggml.token_type") &&
        !gguf_get_array(file, "tokenizer.ggml.token_type", GGUF_I32, &types, error))
        return false;
    if (types.count && types.count != tokens.count)
        return fail(error, "tokenizer.ggml.token_type: expected %zu elements, got %zu",
                    tokens.count, types.count);
    if (!allocate_tokens(t, tokens, error)) return false;
    for (size_t i = 0; tokens.count; i++)
        add_token(t, gguf_next_string(&tokens), types.count ? gguf_int_at(&types, i) : 0);
    sort_specials(t);
    return true;
}

static int32_t find_token(const tokenizer *t, gguf_string spelt, char *room)
{
    size_t len;
    return spelt.len && from_alphabet(spelt, room, &len) ? *find_slot(t, room, len) : -1;
}

/* "left right", and the two together, are all tokens. room holds the longest merge. */
static bool load_merge(tokenizer *t, gguf_string merge, char *room)
{
    const char *space = memchr(merge.data, ' ', merge.len);
    if (!space) return false;
    const size_t left_len = (size_t)(space - merge.data);
    const gguf_string left = {.data = merge.data, .len = left_len};
    const gguf_string right = {.data = space + 1, .len = merge.len - left_len - 1};
    const int32_t left_id = find_token(t, left, room), right_id = find_token(t, right, room);
    if (left_id < 0 || right_id < 0) return false;
    const gguf_string a = tokenizer_decode(t, left_id), b = tokenizer_decode(t, right_id);
    memcpy(room, a.data, a.len);
    memcpy(room + a.len, b.data, b.len);
    const int32_t merged = *find_slot(t, room, a.len + b.len);
    if (merged >= 0) bpe_add(&t->merges, left_id, right_id, merged);
    return merged >= 0;
}

static bool load_merges(tokenizer *t, const gguf *file, char *error)
{
    gguf_array merges;
    if (!gguf_get_array(file, "tokenizer.ggml.merges", GGUF_STRING, &merges, error)) return false;
    if (merges.count > INT32_MAX / 4)
        return fail(error, "tokenizer.ggml.merges: got %zu merges", merges.count);
    size_t longest = 1;
    gguf_array walk = merges;
    while (walk.count) {
        const gguf_string merge = gguf_next_string(&walk);
        if (merge.len > longest) longest = merge.len;
    }
    char *room = malloc(longest);
    bool ok = bpe_init(&t->merges, merges.count) && room;
    if (!ok) fail(error, "tokenizer: out of memory");
    for (int i = 0; ok && i < 256; i++) t->merges.byte_ids[i] = *find_slot(t, &(char){(char)i}, 1);
    for (size_t i = 0; ok && merges.count; i++) {
        const gguf_string merge = gguf_next_string(&merges);
        ok = load_merge(t, merge, room) ||
             fail(error,
                  "tokenizer.ggml.merges: number %zu, \"%.*s\", does not join two tokens "
                  "into a third",
                  i, (int)(merge.len < 80 ? merge.len : 80), merge.data);
    }
    free(room);
    return ok;
}

static bool load_id(const tokenizer *t, const gguf *file, const char *key, int32_t *out,
                    char *error)
{
    uint64_t id;
    *out = -1;
    if (!gguf_has(file, key)) return true;
    if (!gguf_get_uint(file, key, &id, error)) return false;
    if (id >= (uint64_t)t->num_tokens)
        return fail(error, "%s: expected a token below %d, got %llu", key, t->num_tokens,
                    (unsigned long long)id);
    *out = (int32_t)id;
    return true;
}

static bool load_ids(tokenizer *t, const gguf *file, char *error)
{
    /* Where files do not say what ends a turn or a document, these do. */
    static const char *const ends[] = {"<|im_end|>", "<|eot_id|>", "<|end_of_text|>",
                                       "<|endoftext|>"};
    int32_t eot;
    if (!load_id(t, file, "tokenizer.ggml.bos_token_id", &t->bos, error) ||
        !load_id(t, file, "tokenizer.ggml.eos_token_id", &t->eos, error) ||
        !load_id(t, file, "tokenizer.ggml.eot_token_id", &eot, error))
        return false;
    t->add_bos = t->rule->add_bos;
    if (gguf_has(file, "tokenizer.ggml.add_bos_token") &&
        !gguf_get_bool(file, "tokenizer.ggml.add_bos_token", &t->add_bos, error))
        return false;
    if (t->eos >= 0) t->flags[t->eos] |= FLAG_END;
    if (eot >= 0) t->flags[eot] |= FLAG_END;
    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
        const int32_t id = find_special(t, ends[i]);
        if (id >= 0) t->flags[id] |= FLAG_END;
    }
    return true;
}

static bool contains(gguf_string text, const char *part)
{
    const size_t len = strlen(part);
    for (size_t i = 0; i + len <= text.len; i++)
        if (memcmp(text.data + i, part, len) == 0) return true;
    return false;
}

static bool load_template(tokenizer *t, const gguf *file, char *error)
{
    gguf_string template;
    if (!gguf_has(file, "tokenizer.chat_template")) return true;
    if (!gguf_get_string(file, "tokenizer.chat_template", &template, error)) return false;
    t->default_system = contains(template, SMOLLM_SYSTEM);
    return true;
}

tokenizer *tokenizer_create(const gguf *file, char error[GGUF_ERROR])
{
    tokenizer *t = calloc(1, sizeof *t);
    if (!t) {
        fail(error, "tokenizer: out of memory");
        return NULL;
    }
    if (load_rule(t, file, error) && load_tokens(t, file, error) && load_merges(t, file, error) &&
        load_ids(t, file, error) && load_template(t, file, error))
        return t;
    tokenizer_destroy(t);
    return NULL;
}

void tokenizer_destroy(tokenizer *t)
{
    if (!t) return;
    pcre2_code_free(t->regex);
    bpe_free(&t->merges);
    free(t->text);
    free(t->begin);
    free(t->flags);
    free(t->lookup);
    free(t->specials);
    free(t);
}

/* ---- encoding ------------------------------------------------------------------------------- */

static bool encode_piece(encoder *e, const char *text, size_t len)
{
    const tokenizer *t = e->t;
    const int32_t whole = t->rule->whole_first ? *find_slot(t, text, len) : -1;
    if (whole >= 0) {
        e->ids[e->count++] = whole;
        return true;
    }
    return bpe_encode(&t->merges, &e->scratch, (const uint8_t *)text, len, e->ids, &e->count) ||
           fail(e->error, "tokenizer: out of memory");
}

/* Text that is UTF-8: cut by the regular expression. */
static bool encode_characters(encoder *e, const char *text, size_t len)
{
    for (size_t at = 0; at < len;) {
        const int code = pcre2_match(e->t->regex, (PCRE2_SPTR)text, len, at,
                                     PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, e->match, e->context);
        if (code < 1) return fail(e->error, "tokenizer: PCRE2 error %d at byte %zu", code, at);
        const size_t end = pcre2_get_ovector_pointer(e->match)[1];
        if (!encode_piece(e, text + at, end - at)) return false;
        at = end;
    }
    return true;
}

/* Bytes of the character that the text begins with; 0 if it is no UTF-8. len > 0. */
static size_t character_len(const char *text, size_t len)
{
    const uint8_t *p = (const uint8_t *)text, first = *p;
    if (first < 0x80) return 1;
    const size_t n = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    if (first < 0xc2 || first > 0xf4 || n > len) return 0;
    for (size_t i = 1; i < n; i++)
        if ((p[i] & 0xc0) != 0x80) return 0;
    /* Too long for what they say, surrogates, past U+10FFFF. */
    if ((first == 0xe0 && p[1] < 0xa0) || (first == 0xed && p[1] > 0x9f) ||
        (first == 0xf0 && p[1] < 0x90) || (first == 0xf4 && p[1] > 0x8f))
        return 0;
    return n;
}

/* Text without special tokens: runs of characters and of bytes that are none. */
static bool encode_plain(encoder *e, const char *text, size_t len)
{
    for (size_t at = 0, end = 0; at < len; at = end) {
        for (size_t n; end < len && (n = character_len(text + end, len - end)) > 0;) end += n;
        if (!encode_characters(e, text + at, end - at)) return false;
        at = end;
        while (end < len && character_len(text + end, len - end) == 0) end++;
        if (end > at && !encode_piece(e, text + at, end - at)) return false;
    }
    return true;
}

static bool encode_text(encoder *e, const char *text, size_t len, bool with_specials)
{
    size_t begin = 0;
    for (size_t at = 0; with_specials && at < len;) {
        const int32_t id = special_at(e->t, text + at, len - at);
        if (id < 0) {
            at++;
            continue;
        }
        if (!encode_plain(e, text + begin, at - begin)) return false;
        e->ids[e->count++] = id;
        begin = at += tokenizer_decode(e->t, id).len;
    }
    return encode_plain(e, text + begin, len - begin);
}

int32_t *tokenizer_encode(const tokenizer *t, const char *text, size_t len, unsigned flags,
                          size_t *count, char error[GGUF_ERROR])
{
    if (len >= 1u << 30) {
        fail(error, "text: expected less than 1 GiB, got %zu bytes", len);
        return NULL;
    }
    /* Every token but BOS stands for a byte at least. */
    encoder e = {.t = t, .error = error, .ids = malloc((len + 1) * sizeof *e.ids)};
    e.match = pcre2_match_data_create(1, NULL);
    e.context = pcre2_match_context_create(NULL);
    bool ok = e.ids && e.match && e.context;
    if (!ok) {
        fail(error, "tokenizer: out of memory");
    } else {
        /* The limit counts steps; a run of spaces takes one or two for each. */
        pcre2_set_match_limit(e.context, UINT32_MAX);
        pcre2_set_depth_limit(e.context, UINT32_MAX);
        if ((flags & TOKENIZER_BOS) && t->add_bos && t->bos >= 0) e.ids[e.count++] = t->bos;
        ok = encode_text(&e, text, len, flags & TOKENIZER_SPECIAL);
    }
    pcre2_match_context_free(e.context);
    pcre2_match_data_free(e.match);
    bpe_scratch_free(&e.scratch);
    if (!ok) {
        free(e.ids);
        return NULL;
    }
    *count = e.count;
    return e.ids;
}

/* ---- chat ----------------------------------------------------------------------------------- */

static char *append(char *at, const char *text, size_t len)
{
    memcpy(at, text, len);
    return at + len;
}

char *tokenizer_chatml(const tokenizer *t, const char *system, const char *user, size_t user_len,
                       size_t *len, char error[GGUF_ERROR])
{
    if (find_special(t, "<|im_start|>") < 0 || find_special(t, "<|im_end|>") < 0) {
        fail(error, "chat: this model's vocabulary has no <|im_start|> and <|im_end|> (ChatML)");
        return NULL;
    }
    if (!system && t->default_system) system = SMOLLM_SYSTEM;
    const char *const parts[] = {
        system ? "<|im_start|>system\n" : "",
        system ? system : "",
        system ? "<|im_end|>\n" : "",
        "<|im_start|>user\n",
    };
    const char *const tail = "<|im_end|>\n<|im_start|>assistant\n";
    size_t bytes = user_len + strlen(tail);
    for (size_t i = 0; i < 4; i++) bytes += strlen(parts[i]);
    char *text = malloc(bytes + 1), *at = text;
    if (!text) {
        fail(error, "chat: out of memory");
        return NULL;
    }
    for (size_t i = 0; i < 4; i++) at = append(at, parts[i], strlen(parts[i]));
    at = append(at, user, user_len);
    append(at, tail, strlen(tail) + 1);
    *len = bytes;
    return text;
}
