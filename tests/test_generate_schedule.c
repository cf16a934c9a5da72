/* test_generate_schedule.c - the serving loop of examples/generate, on a forward pass that computes
 * nothing but remembers what each slot of each page was filled for.
 *
 * The functions of forward.h below stand in for those of forward.c. In place of a key, a slot holds a
 * hash of the request's tokens up to it, which is all that a key depends on.
 * SPDX-License-Identifier: Apache-2.0 */
#include "engine.h" /* before cmocka, whose fail is a macro */

#include "support.h"

enum { VOCAB = 40, MAX_REQUESTS = 24, MAX_NEW = 60 };

/* ---- the forward pass ------------------------------------------------------------------------ */

typedef struct piece {
    const int32_t *all; /* the request's tokens from its first */
    int32_t *pages;     /* copied */
    int32_t position, num_tokens, first_row;
} piece;

struct forward {
    forward_limits limits;
    uint64_t *slots; /* [num_pages, page_size] */
    piece pieces[MAX_REQUESTS];
    int32_t num_pieces, num_rows;
    float *logits; /* [max_logits, VOCAB] */
};

/* Of a request's tokens, from the hash of those before. */
static uint64_t hash_token(uint64_t before, int32_t token)
{
    return (before ^ (uint64_t)(token + 1)) * 0x9e3779b97f4a7c15u ^ before >> 29;
}

/* The token that follows: "sampling" is a function of all that came before. */
static int32_t next_token(uint64_t hash)
{
    return (int32_t)(hash >> 33) % VOCAB;
}

size_t forward_page_bytes(const model *m, int32_t page_size)
{
    (void)m;
    return (size_t)page_size * sizeof(uint64_t);
}

forward *forward_create(qkv_context *ctx, const model *m, const forward_limits *limits,
                        char error[GGUF_ERROR])
{
    (void)ctx, (void)m, (void)error;
    forward *f = calloc(1, sizeof *f);
    f->limits = *limits;
    f->slots = calloc((size_t)limits->num_pages * (size_t)limits->page_size, sizeof *f->slots);
    f->logits = malloc((size_t)limits->max_logits * VOCAB * sizeof *f->logits);
    assert_true(f->slots && f->logits);
    return f;
}

void forward_destroy(forward *f)
{
    if (!f) return;
    forward_begin(f);
    free(f->slots);
    free(f->logits);
    free(f);
}

void forward_begin(forward *f)
{
    for (int32_t i = 0; i < f->num_pieces; i++) free(f->pieces[i].pages);
    f->num_pieces = f->num_rows = 0;
}

int32_t forward_add(forward *f, const int32_t *tokens, int32_t num_tokens, int32_t position,
                    const int32_t *pages)
{
    const int32_t num_pages = (position + num_tokens - 1) / f->limits.page_size + 1;
    assert_true(num_tokens > 0 && f->num_pieces < f->limits.max_requests);
    assert_true(f->num_rows + num_tokens <= f->limits.max_tokens);
    piece *p = &f->pieces[f->num_pieces++];
    *p = (piece){.all = tokens - position,
                 .pages = malloc((size_t)num_pages * sizeof *pages),
                 .position = position,
                 .num_tokens = num_tokens,
                 .first_row = f->num_rows};
    assert_non_null(p->pages);
    memcpy(p->pages, pages, (size_t)num_pages * sizeof *pages);
    f->num_rows += num_tokens;
    return f->num_rows - 1;
}

static uint64_t *slot_of(forward *f, const piece *p, int32_t position)
{
    const int32_t page = p->pages[position / f->limits.page_size];
    assert_in_range(page, 0, f->limits.num_pages - 1);
    return &f->slots[page * f->limits.page_size + position % f->limits.page_size];
}

/* As in every layer: first all keys are written, then they are read. */
bool forward_run(forward *f, char error[GGUF_ERROR])
{
    (void)error;
    for (int reads = 0; reads < 2; reads++)
        for (int32_t i = 0; i < f->num_pieces; i++) {
            const piece *p = &f->pieces[i];
            uint64_t hash = 0;
            for (int32_t t = 0; t < p->position + p->num_tokens; t++) {
                hash = hash_token(hash, p->all[t]);
                if (!reads && t >= p->position) *slot_of(f, p, t) = hash;
                if (reads && *slot_of(f, p, t) != hash)
                    fail_msg("rows from position %d on read a page at position %d that was not "
                             "computed for these tokens",
                             (int)p->position, (int)t);
            }
        }
    return true;
}

float *forward_logits(forward *f, const int32_t *rows, int32_t num_rows, char error[GGUF_ERROR])
{
    (void)error;
    assert_true(num_rows <= f->limits.max_logits);
    for (int32_t i = 0; i < num_rows; i++) {
        const piece *p = f->pieces;
        while (rows[i] >= p->first_row + p->num_tokens) p++;
        const int32_t token = next_token(*slot_of(f, p, p->position + rows[i] - p->first_row));
        for (int32_t v = 0; v < VOCAB; v++) f->logits[i * VOCAB + v] = v == token ? 1.f : 0.f;
    }
    return f->logits;
}

bool forward_save_pages(const forward *f, const int32_t *pages, int32_t num_pages, void *to,
                        char error[GGUF_ERROR])
{
    (void)error;
    const size_t bytes = forward_page_bytes(NULL, f->limits.page_size);
    for (int32_t i = 0; i < num_pages; i++)
        memcpy((char *)to + (size_t)i * bytes, f->slots + pages[i] * f->limits.page_size, bytes);
    return true;
}

bool forward_load_pages(forward *f, const int32_t *pages, int32_t num_pages, const void *from,
                        char error[GGUF_ERROR])
{
    (void)error;
    const size_t bytes = forward_page_bytes(NULL, f->limits.page_size);
    for (int32_t i = 0; i < num_pages; i++)
        memcpy(f->slots + pages[i] * f->limits.page_size, (const char *)from + (size_t)i * bytes,
               bytes);
    return true;
}

/* ---- prompts --------------------------------------------------------------------------------- */

enum { MAX_PROMPT = 400 };
typedef struct workload {
    int32_t tokens[MAX_REQUESTS][MAX_PROMPT];
    engine_prompt prompts[MAX_REQUESTS];
    int32_t num_prompts;
    engine_options options;
} workload;

static int32_t between(int64_t least, int64_t most)
{
    return (int32_t)(least + test_below(most - least + 1));
}

/* A prompt that begins like source, if that is not NULL. */
static int32_t *add_prompt(workload *w, const int32_t *source, int32_t num_shared,
                           int32_t num_tokens, int32_t max_new)
{
    int32_t *tokens = w->tokens[w->num_prompts];
    for (int32_t i = 0; i < num_tokens; i++)
        tokens[i] = i < num_shared ? source[i] : between(0, VOCAB - 1);
    w->prompts[w->num_prompts++] =
        (engine_prompt){.tokens = tokens, .num_tokens = num_tokens, .max_new = max_new};
    return tokens;
}

/* One request makes a prefix known and goes on with others, whose growth will take the last pages.
 * Behind prompts that leave little of a step's budget wait two that begin with the prefix, and then
 * with the same tokens: the second shares pages of the first in the step that fills them, and may be
 * told to leave before it is run. */
static void fill_workload(workload *w)
{
    const int32_t prefix = between(20, 30), decoders = between(5, 10), same = between(1, 8);
    w->options = (engine_options){
        .chunk = 64, .page_size = 1, .share_prefixes = true, .ignore_end = true, .top_p = 1};
    w->num_prompts = 0;
    const int32_t *first = add_prompt(w, NULL, 0, prefix + 1, MAX_NEW);
    for (int32_t i = 0; i < decoders; i++) add_prompt(w, NULL, 0, 1, MAX_NEW);
    add_prompt(w, NULL, 0, w->options.chunk - prefix - 1 - decoders + between(1, 16), 3);
    add_prompt(w, NULL, 0, between(100, 300), 3);
    const int32_t *second = add_prompt(w, first, prefix, prefix + 17 + same, 3);
    add_prompt(w, second, prefix + same, prefix + same + between(17, 36), 12);
    int32_t slots = 0;
    for (int32_t i = 0; i < w->num_prompts; i++) slots += w->prompts[i].num_tokens + 1;
    w->options.max_batch = w->num_prompts;
    w->options.num_pages = slots - 2 * prefix - 20 + between(0, 119);
}

/* Any prompts, some of which begin like others, on any pool that takes the largest of them. */
static void fill_workload_at_random(workload *w)
{
    w->options = (engine_options){.chunk = between(1, 150),
                                  .page_size = between(1, 4),
                                  .share_prefixes = true,
                                  .ignore_end = true,
                                  .top_p = 1};
    w->num_prompts = 0;
    int32_t total = 0, most = 0;
    for (int32_t n = between(1, MAX_REQUESTS); n > 0; n--) {
        const engine_prompt *from = &w->prompts[test_below(w->num_prompts + 1)];
        if (from == &w->prompts[w->num_prompts]) from = NULL; /* begins like no other */
        const int32_t shared = from ? between(0, from->num_tokens) : 0;
        const int32_t len = 1 + (shared + between(0, 80)) % MAX_PROMPT;
        const int32_t max_new = between(1, MAX_NEW);
        add_prompt(w, from ? from->tokens : NULL, shared, len, max_new);
        const int32_t pages = (len + max_new - 2) / w->options.page_size + 1;
        total += pages;
        if (pages > most) most = pages;
    }
    w->options.max_batch = between(1, w->num_prompts);
    w->options.num_pages = between(most, total);
    const bool wait = between(0, 9) == 0;
    for (int32_t i = 1; wait && i < w->num_prompts; i++)
        w->prompts[i].arrival_ms = w->prompts[i - 1].arrival_ms + between(0, 300) * 1e-3;
}

/* ---- the test ------------------------------------------------------------------------------ */

/* Each request generates what it would generate alone, from its arrival on. */
static void check_tokens(const engine *e, const request *r)
{
    uint64_t hash = 0;
    assert_int_equal(r->state, FINISHED);
    assert_int_equal(r->num_tokens, r->prompt_len + r->max_new);
    assert_true(r->token_ms[0] >= e->start_ms + r->arrival_ms);
    for (int32_t i = 0; i < r->num_tokens; i++) {
        if (i >= r->prompt_len) assert_int_equal(r->tokens[i], next_token(hash));
        hash = hash_token(hash, r->tokens[i]);
    }
}

static void run_workload(qkv_context *ctx, const workload *w, engine_counts *counts)
{
    const compute_device cpu = DEVICE_CPU;
    const model m = {.config = {.vocab_size = VOCAB, .context_len = 1 << 20}, .device = &cpu};
    char error[GGUF_ERROR] = "";
    engine *e = engine_create(ctx, &m, NULL, &w->options, w->prompts, w->num_prompts, error);
    if (!e) fail_msg("%s", error);
    for (int64_t step = 0; engine_busy(e); step++) {
        if (!engine_step(e, error)) fail_msg("%s", error);
        assert_true(step < 100000);
        assert_true(page_pool_num_held(e->pool) <= w->options.num_pages);
    }
    for (int32_t i = 0; i < e->num_requests; i++) check_tokens(e, &e->requests[i]);
    assert_int_equal(page_pool_num_held(e->pool), 0);
    assert_true(e->counts.shared_tokens >= 0);
    counts->shared_tokens += e->counts.shared_tokens;
    counts->preemptions += e->counts.preemptions;
    engine_destroy(e);
}

static void run_many(void (*fill)(workload *w), int num_trials)
{
    static workload w;
    qkv_context *ctx;
    EXPECT_OK(qkv_context_create(&(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .num_threads = 1},
                                 &ctx));
    engine_counts counts = {.preemptions = 0};
    for (int trial = 0; trial < num_trials; trial++) {
        fill(&w);
        run_workload(ctx, &w, &counts);
    }
    assert_true(counts.shared_tokens > num_trials && counts.preemptions > num_trials / 10);
    qkv_context_destroy(ctx);
}

static void generate_reads_a_shared_page_only_once_it_is_computed(void **state)
{
    (void)state;
    run_many(fill_workload, 4000);
}

static void generate_gives_a_request_its_own_tokens_whatever_it_runs_with(void **state)
{
    (void)state;
    run_many(fill_workload_at_random, 1000);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(generate_reads_a_shared_page_only_once_it_is_computed),
        cmocka_unit_test(generate_gives_a_request_its_own_tokens_whatever_it_runs_with),
    };
    return cmocka_run_group_tests_name("generate_schedule", tests, NULL, NULL);
}
