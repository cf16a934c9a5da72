/* test_verify.c - qkv_verify: what it emits is distributed as the target says, for chains and trees, for drafts that were
 * drawn and drafts that were chosen; and what it writes is a walk down the tree.
 * SPDX-License-Identifier: Apache-2.0 */
#include "chi_square.h"
#include "sampling_case.h"

#define SIGNIFICANCE 1e-6

enum { MAX_NODES = 12, VOCAB = 4, DEPTH = 3 };

/* A batch of walks. parents NULL: a chain. */
typedef struct walks {
    int64_t batch, nodes, vocab;
    DLDataType dtype;
    bool drawn; /* draft tokens, from draft; else chosen */
    const int32_t *parents;
    view target, draft;
    int32_t *draft_tokens, *accepted, *num_accepted, *tokens;
    uint64_t *seed, *offset;
} walks;

static void walks_new(walks *w, int64_t batch, int64_t nodes, int64_t vocab, DLDataType dtype,
                      bool drawn, const int32_t *parents, bool strided)
{
    const size_t n = (size_t)(batch * (nodes + 1) + 1);
    *w = (walks){.batch = batch,
                 .nodes = nodes,
                 .vocab = vocab,
                 .dtype = dtype,
                 .drawn = drawn,
                 .parents = parents,
                 .draft_tokens = malloc(n * sizeof(int32_t)),
                 .accepted = malloc(n * sizeof(int32_t)),
                 .tokens = malloc(n * sizeof(int32_t)),
                 .num_accepted = malloc(n * sizeof(int32_t)),
                 .seed = malloc(n * sizeof(uint64_t)),
                 .offset = malloc(n * sizeof(uint64_t))};
    view_new(&w->target, dtype, strided ? 5 : 0, TEST_SHAPE(batch, nodes + 1, vocab));
    view_new(&w->draft, dtype, strided ? 5 : 0, TEST_SHAPE(batch, nodes, vocab));
    for (int64_t b = 0; b < batch; b++) {
        w->seed[b] = test_u64();
        w->offset[b] = test_u64();
    }
}

static void walks_free(walks *w)
{
    view_free(&w->target), view_free(&w->draft);
    free(w->draft_tokens), free(w->accepted), free(w->tokens);
    free(w->num_accepted), free(w->seed), free(w->offset);
}

static int32_t parent_of(const walks *w, int64_t node)
{
    return w->parents ? w->parents[node] : (int32_t)node - 1;
}

static void run(walks *w, qkv_context *ctx)
{
    const size_t bytes = (size_t)(w->batch * (w->nodes + 1)) * sizeof(int32_t);
    memset(w->accepted, 0x55, bytes);
    memset(w->tokens, 0x55, bytes);
    memset(w->num_accepted, 0x55, (size_t)w->batch * sizeof(int32_t));
    const qkv_verify_io io = {
        QKV_VERIFY_IO_INIT,
        .accepted = TENSOR(w->accepted, QKV_I32, w->batch, w->nodes + 1),
        .num_accepted = TENSOR(w->num_accepted, QKV_I32, w->batch),
        .tokens = TENSOR(w->tokens, QKV_I32, w->batch, w->nodes + 1),
        .target = &w->target.t,
        .draft_tokens = TENSOR(w->draft_tokens, QKV_I32, w->batch, w->nodes),
        .draft = w->drawn ? &w->draft.t : NULL,
        .parents = w->parents ? TENSOR((void *)w->parents, QKV_I32, 1, w->nodes) : NULL,
        .seed = TENSOR(w->seed, QKV_U64, w->batch),
        .offset = TENSOR(w->offset, QKV_U64, w->batch),
    };
    EXPECT_OK(qkv_verify(ctx, &io, NULL));
}

/* A path from the root's children down, of draft tokens, one token more, -1 after that. */
static void check_form(const walks *w)
{
    for (int64_t b = 0; b < w->batch; b++) {
        const int32_t *accepted = w->accepted + b * (w->nodes + 1);
        const int32_t *tokens = w->tokens + b * (w->nodes + 1), n = w->num_accepted[b];
        assert_in_range(n, 0, w->nodes);
        for (int64_t i = 0; i <= w->nodes; i++) {
            if (i >= n) {
                assert_int_equal(accepted[i], -1);
                if (i > n) assert_int_equal(tokens[i], -1);
                continue;
            }
            assert_in_range(accepted[i], 0, w->nodes - 1);
            assert_int_equal(parent_of(w, accepted[i]), i ? accepted[i - 1] : -1);
            assert_int_equal(tokens[i], w->draft_tokens[b * w->nodes + accepted[i]]);
        }
        assert_in_range(tokens[n], 0, w->vocab - 1);
    }
}

/* On every context, with the same result, that stays in w. */
static void run_everywhere(walks *w)
{
    const size_t n = (size_t)(w->batch * (w->nodes + 1)) * sizeof(int32_t);
    int32_t *tokens = malloc(n + 1), *accepted = malloc(n + 1);
    for (int k = 0; k < contexts.n; k++) {
        run(w, contexts.ctx[k]);
        check_form(w);
        if (k && (memcmp(tokens, w->tokens, n) != 0 || memcmp(accepted, w->accepted, n) != 0))
            fail_msg("%s and %s walk otherwise", contexts.name[0], contexts.name[k]);
        memcpy(tokens, w->tokens, n);
        memcpy(accepted, w->accepted, n);
    }
    free(tokens), free(accepted);
}

/* ---- the distribution --------------------------------------------------------------------------- */

/* A model: the probabilities of the next token after each token, and at first (VOCAB). */
typedef struct model {
    double p[VOCAB + 1][VOCAB];
} model;

static const char *const model_kinds[] = {"smooth", "peaked", "with zeros", "flat"};

static model model_new(int kind, DLDataType dtype)
{
    model m;
    for (int i = 0; i <= VOCAB; i++) {
        double sum = 0;
        for (int t = 0; t < VOCAB; t++) {
            double x = 0.05 + fabs(test_uniform(1));
            if (kind == 1) x = t == i % VOCAB ? 20 : x;
            if (kind == 2) x = (t + i) % 3 ? x : 0;
            if (kind == 3) x = 1;
            m.p[i][t] = view_rounded(dtype, x * 0.3); /* rows need not sum to 1 */
            sum += m.p[i][t];
        }
        for (int t = 0; t < VOCAB; t++) m.p[i][t] /= sum;
    }
    return m;
}

static int model_draw(const model *m, int after)
{
    double u = (test_uniform(1) + 1) / 2;
    for (int t = 0; t < VOCAB - 1; t++)
        if ((u -= m->p[after][t]) < 0) return t;
    return VOCAB - 1;
}

/* Some rows sum to half of what others do. */
static void put_row(view *v, int64_t row, const double *p)
{
    const double factor = test_below(2) ? 0.5 : 1;
    for (int64_t t = 0; t < VOCAB; t++) view_put(v, row * VOCAB + t, p[t] * factor);
}

static void fill_walks(walks *w, const model *target, const model *draft)
{
    for (int64_t b = 0; b < w->batch; b++) {
        int32_t *tokens = w->draft_tokens + b * w->nodes;
        put_row(&w->target, b * (w->nodes + 1), target->p[VOCAB]);
        for (int64_t i = 0; i < w->nodes; i++) {
            const int32_t parent = parent_of(w, i);
            const int after = parent < 0 ? VOCAB : tokens[parent];
            put_row(&w->draft, b * w->nodes + i, draft->p[after]);
            /* chosen: any rule without chance, here children of a node are different tokens */
            tokens[i] = w->drawn ? model_draw(draft, after) : (int32_t)((after + 2 + i) % VOCAB);
            put_row(&w->target, b * (w->nodes + 1) + i + 1, target->p[tokens[i]]);
        }
    }
}

/* The first DEPTH tokens; after those emitted, the target model goes on. */
static double p_of_walks(const walks *w, const model *target)
{
    enum { OUTCOMES = VOCAB * VOCAB * VOCAB };
    int64_t seen[OUTCOMES] = {0};
    double p[OUTCOMES];
    for (int64_t b = 0; b < w->batch; b++) {
        int outcome = 0, before = VOCAB;
        for (int i = 0; i < DEPTH; i++) {
            before = i <= w->num_accepted[b] ? w->tokens[b * (w->nodes + 1) + i]
                                             : model_draw(target, before);
            outcome = outcome * VOCAB + before;
        }
        seen[outcome]++;
    }
    for (int i = 0; i < OUTCOMES; i++) {
        const int a = i / (VOCAB * VOCAB), b = i / VOCAB % VOCAB, c = i % VOCAB;
        p[i] = target->p[VOCAB][a] * target->p[a][b] * target->p[b][c];
    }
    return chi_square_p(seen, p, OUTCOMES, w->batch);
}

/* A GPU reads parents, and has this program's variables (cuda.h), no constants. */
static struct {
    const char *name;
    int64_t nodes;
    int32_t parents[MAX_NODES];
} trees[] = {
    {"one node", 1, {-1}},
    {"three children of the root", 3, {-1, -1, -1}},
    {"a chain", 4, {-1, 0, 1, 2}},
    {"two and two of each", 6, {-1, -1, 0, 0, 1, 1}},
    {"deep, then wide", 7, {-1, 0, 1, 1, 0, -1, 5}},
    {"three of each, in turns", 12, {-1, -1, 0, 1, -1, 0, 1, 4, 2, 2, 3, 8}},
};
enum { NUM_TREES = sizeof trees / sizeof *trees, CHAIN = NUM_TREES };

static void tokens_are_distributed_as_the_targets(void **state)
{
    (void)state;
    enum { KINDS = 4, MAX_VALUES = (NUM_TREES + 1) * 2 * KINDS };
    const uint64_t seed = test_state;
    const int64_t batch = test_is_emulated() ? 60 : 6000;
    double values[MAX_VALUES];
    int64_t n = 0;
    test_state = 20251130; /* the same walks on every run: nothing here fails by chance */
    for (int tree = 0; tree <= CHAIN; tree++)
        for (int form = 0; form < 2 * KINDS; form++) {
            const DLDataType dtype = float_dtypes[(tree + form) % 3];
            const model target = model_new(form / 2, dtype),
                        draft = model_new((form + tree) % KINDS, dtype);
            walks w;
            walks_new(&w, batch, tree == CHAIN ? 5 : trees[tree].nodes, VOCAB, dtype, form % 2,
                      tree == CHAIN ? NULL : trees[tree].parents, false);
            fill_walks(&w, &target, &draft);
            run_everywhere(&w);
            const double value = p_of_walks(&w, &target);
            if (value == -2 || (value >= 0 && value < SIGNIFICANCE))
                fail_msg("%s, target %s, draft %s: p-value %g",
                         tree == CHAIN ? "no parents" : trees[tree].name, model_kinds[form / 2],
                         w.drawn ? model_kinds[(form + tree) % KINDS] : "chosen", value);
            if (value >= 0) values[n++] = value;
            walks_free(&w);
        }
    test_state = seed;
    if (batch < 1000) return;
    assert_int_equal(n, MAX_VALUES);
    const double even = uniform_p(values, n);
    if (even < SIGNIFICANCE) fail_msg("p-values are not even: %g", even);
}

/* A draft as good as the target is accepted to the end; a token that the target never has is not. */
static void counts_are_what_they_must_be(void **state)
{
    (void)state;
    enum { NODES = 5, BATCH = 200 };
    for (int d = 0; d < 3; d++)
        for (int kind = 0; kind < 4; kind++) {
            const model target = model_new(kind, float_dtypes[d]);
            walks w;
            walks_new(&w, BATCH, NODES, VOCAB, float_dtypes[d], true, NULL, true);
            fill_walks(&w, &target, &target);
            for (int64_t b = 0; b < BATCH; b++) /* the same bits */
                for (int64_t i = 0; i < NODES * VOCAB; i++)
                    view_put(&w.draft, b * NODES * VOCAB + i,
                             view_get(&w.target, b * (NODES + 1) * VOCAB + i));
            run_everywhere(&w);
            for (int64_t b = 0; b < BATCH; b++) assert_int_equal(w.num_accepted[b], NODES);
            for (int64_t b = 0; b < BATCH; b++) { /* node 2's token is impossible */
                const int32_t token = w.draft_tokens[b * NODES + 2];
                view_put(&w.target, (b * (NODES + 1) + 2) * VOCAB + token, 0);
            }
            run_everywhere(&w);
            for (int64_t b = 0; b < BATCH; b++) {
                assert_int_equal(w.num_accepted[b], 2);
                if (kind != 2) /* others are possible there */
                    assert_int_not_equal(w.tokens[b * (NODES + 1) + 2],
                                         w.draft_tokens[b * NODES + 2]);
            }
            walks_free(&w);
        }
}

/* How many are accepted of one node: sum of min(p, d) if it was drawn, p of the token if it was chosen. */
static void rates_are_those_of_the_formula(void **state)
{
    (void)state;
    const int64_t batch = test_is_emulated() ? 100 : 20000;
    const uint64_t seed = test_state;
    test_state = 7;
    for (int form = 0; form < 8; form++) {
        const model target = model_new(form / 2, QKV_F32),
                    draft = model_new((form + 1) % 4, QKV_F32);
        walks w;
        walks_new(&w, batch, 1, VOCAB, QKV_F32, form % 2, NULL, false);
        fill_walks(&w, &target, &draft);
        run_everywhere(&w);
        double p = 0;
        int64_t seen[2] = {0};
        for (int t = 0; t < VOCAB && w.drawn; t++) p += fmin(target.p[VOCAB][t], draft.p[VOCAB][t]);
        if (!w.drawn) p = target.p[VOCAB][w.draft_tokens[0]];
        for (int64_t b = 0; b < batch; b++) seen[w.num_accepted[b]]++;
        const double value = chi_square_p(seen, (double[]){1 - p, p}, 2, batch);
        if (value == -2 || (value >= 0 && value < SIGNIFICANCE))
            fail_msg("form %d: %d of %d accepted, not %g of them", form, (int)seen[1], (int)batch,
                     p);
        walks_free(&w);
    }
    test_state = seed;
}

/* ---- forms, and who else is there ----------------------------------------------------------------- */

static void fill_random(walks *w)
{
    for (int64_t b = 0; b < w->batch; b++) {
        for (int64_t i = 0; i <= w->nodes; i++)
            row_fill(w->target.block, w->dtype,
                     view_index(&w->target, (b * (w->nodes + 1) + i) * w->vocab), w->vocab,
                     QKV_PROBS, (row_shape)test_below(ROW_NUM_SHAPES));
        for (int64_t i = 0; i < w->nodes; i++) {
            row_fill(w->draft.block, w->dtype, view_index(&w->draft, (b * w->nodes + i) * w->vocab),
                     w->vocab, QKV_PROBS, (row_shape)test_below(ROW_NUM_SHAPES));
            w->draft_tokens[b * w->nodes + i] =
                test_below(9) ? (int32_t)test_below(w->vocab) : (int32_t)(test_u64() >> 32);
        }
    }
}

static void a_chain_is_a_tree(void **state)
{
    (void)state;
    for (int n = sampling_cases(60); n > 0; n--) {
        const int64_t nodes = 1 + test_below(MAX_NODES);
        int32_t parents[MAX_NODES];
        for (int32_t i = 0; i < nodes; i++) parents[i] = i - 1;
        walks w;
        walks_new(&w, 1 + test_below(5), nodes, 1 + test_below(700), float_dtypes[test_below(3)],
                  test_below(2), NULL, test_below(2));
        fill_random(&w);
        run_everywhere(&w);
        const size_t bytes = (size_t)(w.batch * (nodes + 1)) * sizeof(int32_t);
        int32_t *tokens = malloc(bytes), *accepted = malloc(bytes);
        memcpy(tokens, w.tokens, bytes);
        memcpy(accepted, w.accepted, bytes);
        w.parents = parents;
        run_everywhere(&w);
        assert_memory_equal(tokens, w.tokens, bytes);
        assert_memory_equal(accepted, w.accepted, bytes);
        free(tokens), free(accepted);
        walks_free(&w);
    }
}

/* A request alone, and parents of each request's own. */
static void requests_do_not_know_of_each_other(void **state)
{
    (void)state;
    for (int n = sampling_cases(40); n > 0; n--) {
        const int tree = (int)test_below(NUM_TREES);
        const int64_t batch = 2 + test_below(4), nodes = trees[tree].nodes;
        walks w;
        walks_new(&w, batch, nodes, 1 + test_below(700), float_dtypes[test_below(3)], test_below(2),
                  trees[tree].parents, test_below(2));
        fill_random(&w);
        run_everywhere(&w);
        int32_t parents[5 * MAX_NODES], tokens[MAX_NODES + 1], accepted[MAX_NODES + 1], count;
        for (int64_t i = 0; i < batch * nodes; i++) parents[i] = trees[tree].parents[i % nodes];
        for (int64_t b = 0; b < batch; b++) {
            DLTensor target = w.target.t, draft = w.draft.t;
            int64_t one_target[] = {1, nodes + 1, w.vocab}, one_draft[] = {1, nodes, w.vocab};
            target.shape = one_target, draft.shape = one_draft;
            target.byte_offset += (uint64_t)(b * target.strides[0]) * test_bytes(w.dtype);
            draft.byte_offset += (uint64_t)(b * draft.strides[0]) * test_bytes(w.dtype);
            const qkv_verify_io io = {
                QKV_VERIFY_IO_INIT,
                .accepted = TENSOR(accepted, QKV_I32, 1, nodes + 1),
                .num_accepted = TENSOR(&count, QKV_I32, 1),
                .tokens = TENSOR(tokens, QKV_I32, 1, nodes + 1),
                .target = &target,
                .draft_tokens = TENSOR(w.draft_tokens + b * nodes, QKV_I32, 1, nodes),
                .draft = w.drawn ? &draft : NULL,
                .parents = TENSOR(parents + b * nodes, QKV_I32, 1, nodes),
                .seed = TENSOR(w.seed + b, QKV_U64, 1),
                .offset = TENSOR(w.offset + b, QKV_U64, 1),
            };
            EXPECT_OK(qkv_verify(contexts.ctx[test_below(contexts.n)], &io, NULL));
            assert_int_equal(count, w.num_accepted[b]);
            const size_t bytes = (size_t)(nodes + 1) * sizeof(int32_t);
            assert_memory_equal(tokens, w.tokens + b * (nodes + 1), bytes);
            assert_memory_equal(accepted, w.accepted + b * (nodes + 1), bytes);
        }
        walks_free(&w);
    }
}

/* ---- what is degenerate ---------------------------------------------------------------------------- */

/* Any rows, any tokens, any parents: a walk of the right form, in time. */
static void anything_gives_a_walk(void **state)
{
    (void)state;
    static const int64_t vocabs[] = {1, 2, 127, 1000, 32000};
    for (int n = sampling_cases(150); n > 0; n--) {
        int32_t parents[MAX_NODES];
        const int64_t nodes = 1 + test_below(MAX_NODES);
        for (int32_t i = 0; i < nodes; i++)
            parents[i] =
                test_below(5) ? (int32_t)test_below(i + 1) - 1 : (int32_t)(test_u64() >> 32);
        walks w;
        walks_new(&w, 1 + test_below(4), nodes, sampling_vocab(vocabs[test_below(n % 10 ? 4 : 5)]),
                  float_dtypes[test_below(3)], test_below(2), test_below(4) ? parents : NULL,
                  test_below(2));
        fill_random(&w);
        run_everywhere(&w);
        walks_free(&w);
    }
}

static void degenerate_rows_give_what_the_header_says(void **state)
{
    (void)state;
    enum { NODES = 2, ROWS = NODES + 1, TOKENS = 4, CASES = 8 };
    const float nan = NAN, inf = INFINITY;
    static const struct {
        const char *why;
        int32_t draft_tokens[NODES], parents[NODES], tokens[NODES + 1], accepted[NODES + 1], num;
    } cases[CASES] = {
        {"no mass at the root", {0, 1}, {-1, 0}, {0, -1, -1}, {-1, -1, -1}, 0},
        {"no mass after a node", {2, 1}, {-1, 0}, {2, 0, -1}, {0, -1, -1}, 1},
        {"a token past the vocabulary", {4, 1}, {-1, 0}, {3, -1, -1}, {-1, -1, -1}, 0},
        {"a token below it", {-1, 3}, {-1, -1}, {3, 1, -1}, {1, -1, -1}, 1},
        {"a parent that is not above", {3, 3}, {0, -1}, {3, 1, -1}, {1, -1, -1}, 1},
        {"a parent below the root", {3, 3}, {-2, -1}, {3, 1, -1}, {1, -1, -1}, 1},
        {"a child after one that is refused", {1, 3}, {-1, -1}, {3, 1, -1}, {1, -1, -1}, 1},
        {"NaN and negative are 0, +inf is one number", {2, 0}, {-1, 0}, {2, 0, 1}, {0, 1, -1}, 2},
    };
    /* rows that leave nothing to chance: one token each, or none */
    float target[CASES][ROWS][TOKENS] = {
        {{0, 0, 0, 0}, {0, 1, 0, 0}, {0, 1, 0, 0}},
        {{0, 0, 7, 0}, {0, nan, -1, 0}, {0, 1, 0, 0}},
        {{0, 0, 0, 2}, {0, 1, 0, 0}, {0, 1, 0, 0}},
        {{0, 0, 0, 2}, {0, 1, 0, 0}, {0, 1, 0, 0}},
        {{0, 0, 0, 2}, {1, 0, 0, 0}, {0, 1, 0, 0}},
        {{0, 0, 0, 2}, {1, 0, 0, 0}, {0, 1, 0, 0}},
        {{0, 0, 0, 2}, {1, 0, 0, 0}, {0, 1, 0, 0}},
        {{nan, -3, 1e-3f, -inf}, {inf, 1, 1, nan}, {nan, 1e-3f, 0x1p-140f, 0}},
    };
    int32_t tokens[NODES + 1], accepted[NODES + 1], num;
    for (int k = 0; k < contexts.n; k++)
        for (int i = 0; i < CASES; i++) {
            int32_t draft_tokens[NODES], parents[NODES];
            uint64_t seed = test_u64();
            memcpy(draft_tokens, cases[i].draft_tokens, sizeof draft_tokens);
            memcpy(parents, cases[i].parents, sizeof parents);
            const qkv_verify_io io = {
                QKV_VERIFY_IO_INIT,
                .accepted = TENSOR(accepted, QKV_I32, 1, NODES + 1),
                .num_accepted = TENSOR(&num, QKV_I32, 1),
                .tokens = TENSOR(tokens, QKV_I32, 1, NODES + 1),
                .target = TENSOR(target[i], QKV_F32, 1, ROWS, TOKENS),
                .draft_tokens = TENSOR(draft_tokens, QKV_I32, 1, NODES),
                .parents = TENSOR(parents, QKV_I32, 1, NODES),
                .seed = TENSOR(&seed, QKV_U64, 1),
            };
            memset(tokens, 0x55, sizeof tokens);
            memset(accepted, 0x55, sizeof accepted);
            EXPECT_OK(qkv_verify(contexts.ctx[k], &io, NULL));
            if (num != cases[i].num || memcmp(tokens, cases[i].tokens, sizeof tokens) != 0 ||
                memcmp(accepted, cases[i].accepted, sizeof accepted) != 0)
                fail_msg("%s, %s: %d accepted: %d %d, tokens %d %d %d", contexts.name[k],
                         cases[i].why, num, accepted[0], accepted[1], tokens[0], tokens[1],
                         tokens[2]);
        }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tokens_are_distributed_as_the_targets),
        cmocka_unit_test(counts_are_what_they_must_be),
        cmocka_unit_test(rates_are_those_of_the_formula),
        cmocka_unit_test(a_chain_is_a_tree),
        cmocka_unit_test(requests_do_not_know_of_each_other),
        cmocka_unit_test(anything_gives_a_walk),
        cmocka_unit_test(degenerate_rows_give_what_the_header_says),
    };
    return cmocka_run_group_tests_name("verify", tests, contexts_open, contexts_close);
}
