/* test_logits_pipe.c - qkv_logits_pipe: random lists of stages against the reference, fused as unfused; names, defaults,
 * user stages; orders that do not fit.
 * SPDX-License-Identifier: Apache-2.0 */
#include "sampling_check.h"

static const char *const stage_names[] = {
    "repetition",  "frequency", "presence", "bias",  "bitmask", "user",      "temperature",
    "top_n_sigma", "softmax",   "top_k",    "top_p", "min_p",   "typical_p", "sample"};

/* ---- lists ----------------------------------------------------------------------------------------- */

enum { MAX_STAGES = 16 };

typedef struct list {
    int n;
    qkv_stage stages[MAX_STAGES];
    unsigned given;
} list;

static qkv_stage *add(list *l, int32_t kind)
{
    l->given |= 1u << kind;
    l->stages[l->n] = (qkv_stage){QKV_STAGE_INIT, .kind = kind};
    return &l->stages[l->n++];
}

/* Subtraction, then a product: no compiler makes one instruction of both. */
static const char source[] =
    "QI_FN float logits_stage(float logit, float value, float element, int token, int request)\n"
    "{\n"
    "    (void)request;\n"
    "    return token % 7 == 3 ? qi_log(0.f) : (logit - element) * value;\n"
    "}\n";

static float by_hand(float logit, float value, float element, int token)
{
    return token % 7 == 3 ? -INFINITY : (logit - element) * value;
}

static void add_user(list *l)
{
    qkv_stage *s = add(l, QKV_STAGE_USER);
    s->source = source;
    s->value_name = "gain";
    s->tensor_name = "level";
}

/* Stages on logits in any order, some twice; softmax; stages on probabilities. top_n_sigma leaves open which tokens it
 * keeps where rounding decides: for the reference it is the last on logits but top_k. */
static list random_list(int32_t kind, bool user)
{
    static const int32_t logits[] = {
        QKV_STAGE_REPETITION, QKV_STAGE_FREQUENCY,   QKV_STAGE_PRESENCE,
        QKV_STAGE_BIAS,       QKV_STAGE_BITMASK,     QKV_STAGE_TEMPERATURE,
        QKV_STAGE_TOP_K,      QKV_STAGE_TEMPERATURE, QKV_STAGE_BIAS};
    static const int32_t probs[] = {QKV_STAGE_TOP_K, QKV_STAGE_TOP_P, QKV_STAGE_MIN_P,
                                    QKV_STAGE_TYPICAL_P};
    list l = {.n = 0};
    if (kind == QKV_LOGITS) {
        for (int64_t n = test_below(6); n > 0; n--) add(&l, logits[test_below(9)]);
        if (user) add_user(&l);
        if (test_below(3) == 0) add(&l, QKV_STAGE_TOP_N_SIGMA);
        if (test_below(3) == 0) add(&l, QKV_STAGE_TOP_K);
    }
    if (kind == QKV_PROBS || test_below(3)) {
        if (kind == QKV_LOGITS) add(&l, QKV_STAGE_SOFTMAX);
        for (int64_t n = test_below(5); n > 0; n--) add(&l, probs[test_below(4)]);
    }
    if (l.n == 0 || test_below(3)) add(&l, QKV_STAGE_SAMPLE);
    return l;
}

static bool samples(const list *l)
{
    return l->stages[l->n - 1].kind == QKV_STAGE_SAMPLE;
}

/* In a static buffer. */
static const char *list_text(const list *l)
{
    static char text[256];
    size_t at = 0;
    text[0] = 0;
    for (int i = 0; i < l->n; i++)
        at += (size_t)snprintf(text + at, sizeof text - at, "%s%s", i ? " " : "",
                               stage_names[l->stages[i].kind]);
    return text;
}

static qkv_logits_pipe *pipe_new(qkv_context *ctx, const list *l, int32_t kind, int32_t unfused,
                                 int64_t batch, int64_t vocab)
{
    qkv_logits_pipe *pipe = NULL;
    const qkv_logits_pipe_spec spec = {
        QKV_LOGITS_PIPE_SPEC_INIT, .num_stages = l->n, .stages = l->stages, .kind = kind,
        .unfused = unfused,        .max_batch = batch, .max_vocab = vocab};
    const qkv_status status = qkv_logits_pipe_create(ctx, &spec, &pipe);
    if (status != QKV_OK) fail_msg("%s: %s", list_text(l), qkv_last_error());
    return pipe;
}

/* ---- a list's parameters: those of a case of sampling_case.h, by name ------------------------------------ */

typedef struct names {
    int n;
    qkv_named_tensor params[24];
} names;

static void name(names *p, const char *of, const DLTensor *tensor)
{
    if (tensor) p->params[p->n++] = (qkv_named_tensor){of, tensor};
}

static names names_of(const sampling_case *c, const list *l, const view *level,
                      const DLTensor *gain)
{
    const qkv_sampling_params *s = &c->params;
    names p = {.n = 0};
    name(&p, "typical_p", s->typical_p);
    name(&p, "temperature", s->temperature);
    name(&p, "top_n_sigma", s->top_n_sigma);
    name(&p, "top_k", s->top_k);
    name(&p, "top_p", s->top_p);
    name(&p, "min_p", s->min_p);
    name(&p, "repetition", s->repetition);
    name(&p, "frequency", s->frequency);
    name(&p, "presence", s->presence);
    name(&p, "counts", s->counts);
    name(&p, "prompt", s->prompt);
    name(&p, "bias", s->bias);
    name(&p, "bitmask", s->bitmask);
    name(&p, "indices", s->indices);
    if (l->given & STAGE(USER)) {
        name(&p, "gain", gain);
        name(&p, "level", &level->t);
    }
    if (samples(l)) {
        name(&p, "seed", &c->tensors[10].t);
        if (c->offset[0] % 2) name(&p, "offset", &c->tensors[11].t);
    }
    return p;
}

static void check_outputs(const sampling_case *c, const list *l, const view *out, bool valid)
{
    const int64_t batch = c->spec.batch, vocab = c->spec.vocab;
    ref_row r = ref_row_new(vocab);
    double *low = malloc((size_t)vocab * 2 * sizeof *low), *high = low + vocab;
    for (int64_t i = 0; i < batch; i++) {
        ref_request q = c->request[i];
        if (c->offset[0] % 2 == 0) q.offset = 0;
        case_reference(c, i, 0, &r);
        for (int s = 0; s < l->n; s++)
            if (l->stages[s].kind < QKV_STAGE_SAMPLE) ref_stage(&r, l->stages[s].kind, &q);
        if (valid && !ref_valid_is_right(&r, c->valid[i]))
            fail_msg("%s of %s: valid is %d", list_text(l), case_text(c, i), c->valid[i]);
        if (samples(l)) {
            const int32_t token = *(int32_t *)case_row(out, i);
            if (r.kind == QKV_LOGITS) ref_stage(&r, QKV_STAGE_SOFTMAX, &q);
            if (!ref_token_is_right(&r, &q, token))
                fail_msg("%s of %s: token %d is not the one", list_text(l), case_text(c, i), token);
            continue;
        }
        if (r.kind == QKV_PROBS) ref_probabilities(&r, low, high);
        for (int64_t t = 0; t < vocab; t++) {
            const double got = view_get(out, i * vocab + t),
                         none = r.kind == QKV_PROBS ? 0 : (double)-INFINITY;
            const bool right = r.kind == QKV_PROBS
                                   ? check_between(out->t.dtype, got, low[t], high[t])
                                   : got == view_rounded(out->t.dtype, r.value[t]);
            if (!(got == none && r.fate[t] != REF_KEPT) && !(right && r.fate[t] != REF_DROPPED))
                fail_msg("%s of %s: token %d of value %g is %.9g", list_text(l), case_text(c, i),
                         (int)t, r.value[t], got);
        }
    }
    ref_row_free(&r);
    free(low);
}

/* One list of stages on every context, fused and not, with one result, of a dtype where it is no tokens. */
static void check_list(const list *l, const sampling_spec *of, DLDataType dtype)
{
    sampling_spec spec = *of;
    spec.given = l->given & ALL_STAGES;
    sampling_case *c = case_new(&spec);
    const int64_t batch = spec.batch, vocab = spec.vocab;
    if (samples(l)) dtype = QKV_I32;
    view level, out, first = {.block = NULL};
    view_new(&level, float_dtypes[test_below(3)], 3, TEST_SHAPE(test_below(2) ? 1 : batch, vocab));
    view_fill(&level, 2);
    double *levels = view_values(&level);
    float gain[16];
    for (int64_t i = 0; i < batch; i++) {
        gain[i] = (float)ldexp(1, (int)test_below(4) - 2);
        c->request[i].user = by_hand;
        c->request[i].user_value = gain[i];
        c->request[i].user_element = levels + (level.shape[0] == 1 ? 0 : i * vocab);
    }
    const DLTensor *gains = TENSOR(gain, QKV_F32, batch);
    for (int k = 0; k < contexts.n; k++)
        for (int32_t unfused = 0; unfused < 2; unfused++) {
            qkv_logits_pipe *pipe =
                pipe_new(contexts.ctx[k], l, spec.kind, unfused, batch + 3, vocab + 5);
            if (samples(l))
                view_new(&out, dtype, 0, TEST_SHAPE(batch));
            else
                view_new(&out, dtype, first.block ? 0 : 7, TEST_SHAPE(batch, vocab));
            names p = names_of(c, l, &level, gains);
            if (!unfused) name(&p, "valid", &c->tensors[12].t);
            const qkv_status status =
                qkv_logits_pipe_run(pipe, &out.t, &c->rows.t, p.params, p.n, NULL);
            if (status != QKV_OK)
                fail_msg("%s of %s: %s", list_text(l), case_text(c, 0), qkv_last_error());
            assert_int_equal(test_synchronize(), 0);
            check_outputs(c, l, &out, !unfused);
            if (samples(l) && first.block &&
                memcmp(case_row(&out, 0), case_row(&first, 0), (size_t)batch * sizeof(int32_t)) !=
                    0)
                fail_msg("%s of %s: %s, %s gives other tokens", list_text(l), case_text(c, 0),
                         contexts.name[k], unfused ? "unfused" : "fused");
            qkv_logits_pipe_destroy(pipe);
            if (first.block)
                view_free(&out);
            else
                first = out;
        }
    view_free(&first), view_free(&level);
    free(levels);
    case_free(c);
}

static void any_list_gives_what_its_stages_say(void **state)
{
    (void)state;
    static const int64_t vocabs[] = {1, 2, 33, 127, 1000, 5003};
    for (int n = sampling_cases(150); n > 0; n--) {
        const uint64_t few = sampling_few();
        const sampling_spec spec = {
            .batch = 1 + test_below(6),
            .vocab = vocabs[test_below(6)],
            .dtype = float_dtypes[test_below(3)],
            .kind = test_below(4) == 0 ? QKV_PROBS : QKV_LOGITS,
            .shared = (unsigned)test_u64(),
            .shape = -1,
            .strided = test_below(2),
            .indexed = test_below(3) == 0,
        };
        const list l = random_list(spec.kind, false);
        const DLDataType dtype = float_dtypes[test_below(3)];
        sampling_go_on(few);
        check_list(&l, &spec, dtype);
    }
}

static void user_stages_are_called_for_each_token(void **state)
{
    (void)state;
    for (int n = sampling_cases(20); n > 0; n--) {
        const uint64_t few = sampling_few();
        const sampling_spec spec = {
            .batch = 1 + test_below(6),
            .vocab = 1 + test_below(3000),
            .dtype = float_dtypes[test_below(3)],
            .shape = -1,
            .strided = test_below(2),
        };
        const list l = random_list(QKV_LOGITS, true);
        const DLDataType dtype = float_dtypes[test_below(3)];
        sampling_go_on(few);
        check_list(&l, &spec, dtype);
    }
}

/* ---- the calls that a pipe stands for -------------------------------------------------------------------- */

static void a_pipe_is_the_call(void **state)
{
    (void)state;
    for (int n = sampling_cases(30); n > 0; n--) {
        const uint64_t few = sampling_few();
        const sampling_spec spec = {
            .batch = 4,
            .vocab = sampling_vocab(1 + test_below(40000)),
            .dtype = float_dtypes[test_below(3)],
            .given = STAGE(TEMPERATURE) | STAGE(TOP_K) | STAGE(TOP_P) | STAGE(MIN_P),
            .shape = -1,
        };
        sampling_go_on(few);
        sampling_case *c = case_new(&spec);
        int32_t *tokens = check_draw(c), out[4];
        list l = {.n = 0};
        add(&l, QKV_STAGE_TEMPERATURE), add(&l, QKV_STAGE_TOP_K), add(&l, QKV_STAGE_SOFTMAX);
        add(&l, QKV_STAGE_TOP_P), add(&l, QKV_STAGE_MIN_P), add(&l, QKV_STAGE_SAMPLE);
        c->offset[0] |= 1; /* so that offsets are named, but the first one is another */
        free(tokens);
        tokens = check_draw(c);
        for (int k = 0; k < contexts.n; k++) {
            qkv_logits_pipe *pipe = pipe_new(contexts.ctx[k], &l, QKV_LOGITS, k % 2, 4, spec.vocab);
            const names p = names_of(c, &l, NULL, NULL);
            EXPECT_OK(qkv_logits_pipe_run(pipe, TENSOR(out, QKV_I32, 4), &c->rows.t, p.params, p.n,
                                          NULL));
            assert_memory_equal(out, tokens, sizeof out);
            qkv_logits_pipe_destroy(pipe);
        }
        free(tokens);
        case_free(c);
    }
}

/* ---- defaults and names ------------------------------------------------------------------------------- */

enum { TOKENS = 8 };

static void defaults_stand_in_for_what_is_not_given(void **state)
{
    (void)state;
    float row[TOKENS] = {0, 1, 2, 3, 4, 5, 6, 7}, out[TOKENS], half = 0.5f;
    int32_t three = 3;
    const DLTensor *x = TENSOR(row, QKV_F32, 1, TOKENS);
    DLTensor *o = TENSOR(out, QKV_F32, 1, TOKENS);
    const qkv_named_tensor params[] = {{"top_k", TENSOR(&three, QKV_I32, 1)},
                                       {"temperature", TENSOR(&half, QKV_F32, 1)}};
    for (int k = 0; k < contexts.n; k++)
        for (int32_t unfused = 0; unfused < 2; unfused++) {
            list l = {.n = 0};
            qkv_stage *temperature = add(&l, QKV_STAGE_TEMPERATURE),
                      *top_k = add(&l, QKV_STAGE_TOP_K);
            temperature->default_value = 0.25f, temperature->has_default = 1;
            top_k->default_value = 2, top_k->has_default = 1;
            qkv_logits_pipe *pipe = pipe_new(contexts.ctx[k], &l, QKV_LOGITS, unfused, 1, TOKENS);
            temperature->default_value = 77; /* create has copied it */
            for (int given = 0; given < 4; given++) {
                const qkv_named_tensor some[] = {params[given == 2], params[1]};
                EXPECT_OK(qkv_logits_pipe_run(pipe, o, x, some, given == 3 ? 2 : given > 0, NULL));
                const int kept = given & 1 ? 3 : 2;
                const float factor = given & 2 ? 2 : 4;
                for (int t = 0; t < TOKENS; t++)
                    assert_true(out[t] == (t < TOKENS - kept ? -INFINITY : factor * (float)t));
            }
            qkv_logits_pipe_destroy(pipe);
        }
}

/* A temperature of 0 leaves one token, whatever would have been the largest after the bias that follows. */
static void what_follows_no_temperature_sees_one_token(void **state)
{
    (void)state;
    float row[TOKENS] = {0, 1, 7, 3, 4, 5, 6, 2}, bias[TOKENS] = {100}, out[TOKENS], zero = 0;
    const qkv_named_tensor params[] = {{"temperature", TENSOR(&zero, QKV_F32, 1)},
                                       {"bias", TENSOR(bias, QKV_F32, 1, TOKENS)}};
    list l = {.n = 0};
    add(&l, QKV_STAGE_TEMPERATURE), add(&l, QKV_STAGE_BIAS), add(&l, QKV_STAGE_TEMPERATURE);
    for (int k = 0; k < contexts.n; k++)
        for (int32_t unfused = 0; unfused < 2; unfused++) {
            qkv_logits_pipe *pipe = pipe_new(contexts.ctx[k], &l, QKV_LOGITS, unfused, 1, TOKENS);
            EXPECT_OK(qkv_logits_pipe_run(pipe, TENSOR(out, QKV_F32, 1, TOKENS),
                                          TENSOR(row, QKV_F32, 1, TOKENS), params, 2, NULL));
            for (int t = 0; t < TOKENS; t++) assert_true(out[t] == (t == 2 ? 7 : -INFINITY));
            qkv_logits_pipe_destroy(pipe);
        }
}

/* typical_p drops the largest, 9/16, since 3/16 are nearer to the entropy: min_p goes by what is left. */
static void min_p_goes_by_the_largest_left(void **state)
{
    (void)state;
    const float inf = INFINITY;
    float row[TOKENS] = {2.1972246f, 0, 0, 0, 0, 1.0986123f, -inf, -inf}, out[TOKENS];
    float tenth = 0.1f, one = 1;
    const qkv_named_tensor params[] = {{"typical_p", TENSOR(&tenth, QKV_F32, 1)},
                                       {"min_p", TENSOR(&one, QKV_F32, 1)}};
    list l = {.n = 0};
    add(&l, QKV_STAGE_SOFTMAX), add(&l, QKV_STAGE_TYPICAL_P), add(&l, QKV_STAGE_MIN_P);
    for (int k = 0; k < contexts.n; k++)
        for (int32_t unfused = 0; unfused < 2; unfused++) {
            qkv_logits_pipe *pipe = pipe_new(contexts.ctx[k], &l, QKV_LOGITS, unfused, 1, TOKENS);
            EXPECT_OK(qkv_logits_pipe_run(pipe, TENSOR(out, QKV_F32, 1, TOKENS),
                                          TENSOR(row, QKV_F32, 1, TOKENS), params, 2, NULL));
            for (int t = 0; t < TOKENS; t++) assert_true(out[t] == (t == 5));
            qkv_logits_pipe_destroy(pipe);
        }
}

/* Probabilities of any size: the kernels of an unfused pipe take each other's rows as the first takes those given. */
static void large_probabilities_stay_probabilities(void **state)
{
    (void)state;
    float row[TOKENS] = {0, 1e20f, 0, 3e38f, 0, 2e38f, 1, 0}, half = 0.5f;
    int32_t token;
    uint64_t seed = 0;
    const qkv_named_tensor params[] = {{"top_p", TENSOR(&half, QKV_F32, 1)},
                                       {"seed", TENSOR(&seed, QKV_U64, 1)}};
    list l = {.n = 0};
    add(&l, QKV_STAGE_TOP_P), add(&l, QKV_STAGE_TOP_P), add(&l, QKV_STAGE_SAMPLE);
    for (int k = 0; k < contexts.n; k++)
        for (int32_t unfused = 0; unfused < 2; unfused++) {
            qkv_logits_pipe *pipe = pipe_new(contexts.ctx[k], &l, QKV_PROBS, unfused, 1, TOKENS);
            token = CHECK_POISON;
            EXPECT_OK(qkv_logits_pipe_run(pipe, TENSOR(&token, QKV_I32, 1),
                                          TENSOR(row, QKV_F32, 1, TOKENS), params, 2, NULL));
            assert_int_equal(token, 3);
            qkv_logits_pipe_destroy(pipe);
        }
}

/* Unfused too, whose kernels are many: of a row that is dirty, one without mass, one that a stage empties, a good one. */
static void valid_is_told_by_every_pipe(void **state)
{
    (void)state;
    enum { ROWS = 4 };
    const float inf = INFINITY;
    float rows[ROWS][2] = {{NAN, 1}, {-inf, -inf}, {1, 2}, {1, 2}}, temperature = 1;
    int32_t mask[ROWS] = {3, 3, 0, 2}, tokens[ROWS];
    const int32_t expected_tokens[ROWS] = {1, 0, 0, 1};
    const uint8_t expected[ROWS] = {0, 0, 0, 1};
    uint64_t seed[ROWS] = {1, 2, 3, 4};
    uint8_t valid[ROWS];
    const qkv_named_tensor params[] = {{"bitmask", TENSOR(mask, QKV_I32, ROWS, 1)},
                                       {"temperature", TENSOR(&temperature, QKV_F32, 1)},
                                       {"valid", TENSOR(valid, QKV_U8, ROWS)},
                                       {"seed", TENSOR(seed, QKV_U64, ROWS)}};
    list l = {.n = 0};
    add(&l, QKV_STAGE_BITMASK), add(&l, QKV_STAGE_TEMPERATURE);
    add(&l, QKV_STAGE_SOFTMAX), add(&l, QKV_STAGE_SAMPLE);
    for (int k = 0; k < contexts.n; k++)
        for (int32_t unfused = 0; unfused < 2; unfused++) {
            qkv_logits_pipe *pipe = pipe_new(contexts.ctx[k], &l, QKV_LOGITS, unfused, ROWS, 2);
            memset(valid, 99, sizeof valid);
            EXPECT_OK(qkv_logits_pipe_run(pipe, TENSOR(tokens, QKV_I32, ROWS),
                                          TENSOR(rows, QKV_F32, ROWS, 2), params, 4, NULL));
            assert_memory_equal(tokens, expected_tokens, sizeof tokens);
            assert_memory_equal(valid, expected, sizeof valid);
            qkv_logits_pipe_destroy(pipe);
        }
}

/* Seeds have no default, offset 0 needs none. Two stages of a kind have one value. */
static void names_are_checked(void **state)
{
    (void)state;
    float row[TOKENS] = {1}, out[TOKENS], half = 0.5f, bad = -1;
    int32_t tokens[1] = {CHECK_POISON};
    uint64_t seed = 5;
    const DLTensor *x = TENSOR(row, QKV_F32, 1, TOKENS), *t = TENSOR(&half, QKV_F32, 1);
    const DLTensor *s = TENSOR(&seed, QKV_U64, 1);
    DLTensor *o = TENSOR(tokens, QKV_I32, 1);
    DLTensor negative = *TENSOR(&bad, QKV_F32, 1); /* on the host, so that its value is looked at */
    negative.device = (DLDevice){kDLCPU, 0};
    list l = {.n = 0};
    add(&l, QKV_STAGE_TEMPERATURE), add(&l, QKV_STAGE_TEMPERATURE), add(&l, QKV_STAGE_SAMPLE);
    const struct {
        const char *message; /* NULL: fine */
        int n;
        qkv_named_tensor params[3];
    } cases[] = {
        {NULL, 2, {{"temperature", t}, {"seed", s}}},
        {NULL, 3, {{"offset", s}, {"seed", s}, {"temperature", t}}},
        {"seed", 1, {{"temperature", t}}},
        {"temperature", 1, {{"seed", s}}},
        {"top_p", 3, {{"temperature", t}, {"seed", s}, {"top_p", t}}},
        {"temperature", 3, {{"temperature", t}, {"seed", s}, {"temperature", t}}},
        {"seed", 2, {{"temperature", t}, {"seed", t}}},
        {"params[1]", 2, {{"temperature", t}, {"seed", NULL}}},
        {"temperature", 2, {{"temperature", &negative}, {"seed", s}}},
        {"temperature", 2, {{"temperature", TENSOR(&bad, QKV_F32, 0)}, {"seed", s}}},
        {"params", 2, {{"seed", s}, {NULL, t}}},
    };
    for (int k = 0; k < contexts.n; k++)
        for (int32_t unfused = 0; unfused < 2; unfused++) {
            qkv_logits_pipe *pipe = pipe_new(contexts.ctx[k], &l, QKV_LOGITS, unfused, 1, TOKENS);
            for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
                tokens[0] = CHECK_POISON;
                if (cases[i].message) {
                    EXPECT_FAIL(QKV_ERR_INVALID, cases[i].message,
                                qkv_logits_pipe_run(pipe, o, x, cases[i].params, cases[i].n, NULL));
                    assert_int_equal(tokens[0], CHECK_POISON);
                } else {
                    EXPECT_OK(qkv_logits_pipe_run(pipe, o, x, cases[i].params, cases[i].n, NULL));
                    assert_in_range(tokens[0], 0, TOKENS - 1);
                }
            }
            EXPECT_FAIL(QKV_ERR_INVALID, "out",
                        qkv_logits_pipe_run(pipe, TENSOR(out, QKV_F32, 1, TOKENS), x,
                                            cases[0].params, 2, NULL));
            EXPECT_FAIL(QKV_ERR_INVALID, "rows",
                        qkv_logits_pipe_run(pipe, o, NULL, cases[0].params, 2, NULL));
            EXPECT_FAIL(QKV_ERR_INVALID, "params", qkv_logits_pipe_run(pipe, o, x, NULL, 2, NULL));
            qkv_logits_pipe_destroy(pipe);
        }
    EXPECT_FAIL(QKV_ERR_INVALID, "pipe", qkv_logits_pipe_run(NULL, o, x, cases[0].params, 2, NULL));
    qkv_logits_pipe_destroy(NULL);
}

/* ---- orders and texts that are refused ---------------------------------------------------------------- */

#define S(name) QKV_STAGE_##name
enum { END = -1 };

/* What is refused, and words of the message: the stage, what it takes, what it got. */
static const struct {
    const char *stage, *takes, *got;
    int32_t kind, stages[4];
} bad_orders[] = {
    {"top_p", "prob", "logits", QKV_LOGITS, {S(TOP_P), END}},
    {"min_p", "prob", "logits", QKV_LOGITS, {S(TEMPERATURE), S(MIN_P), END}},
    {"typical_p", "prob", "logits", QKV_LOGITS, {S(TYPICAL_P), S(SOFTMAX), END}},
    {"softmax", "logits", "prob", QKV_LOGITS, {S(SOFTMAX), S(SOFTMAX), END}},
    {"softmax", "logits", "prob", QKV_PROBS, {S(SOFTMAX), END}},
    {"temperature", "logits", "prob", QKV_LOGITS, {S(SOFTMAX), S(TOP_P), S(TEMPERATURE), END}},
    {"repetition", "logits", "prob", QKV_PROBS, {S(REPETITION), END}},
    {"frequency", "logits", "prob", QKV_PROBS, {S(FREQUENCY), END}},
    {"presence", "logits", "prob", QKV_PROBS, {S(PRESENCE), END}},
    {"bias", "logits", "prob", QKV_PROBS, {S(TOP_K), S(BIAS), END}},
    {"bitmask", "logits", "prob", QKV_LOGITS, {S(SOFTMAX), S(BITMASK), END}},
    {"top_n_sigma", "logits", "prob", QKV_LOGITS, {S(SOFTMAX), S(TOP_N_SIGMA), END}},
    {"top_k", "sample", "last", QKV_LOGITS, {S(SAMPLE), S(TOP_K), END}},
    {"sample", "sample", "last", QKV_LOGITS, {S(SAMPLE), S(SAMPLE), END}},
    {"stages[1]", "kind", "99", QKV_LOGITS, {S(TOP_K), 99, END}},
    {"stages[0]", "kind", "-2", QKV_LOGITS, {-2, END}},
    {"kind", "QKV_", "7", 7, {S(TOP_K), END}},
    {"num_stages", "1", "0", QKV_LOGITS, {END}},
};
#undef S

static void orders_that_do_not_fit_are_named(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof bad_orders / sizeof *bad_orders; i++) {
        list l = {.n = 0};
        qkv_logits_pipe *pipe = NULL;
        for (; bad_orders[i].stages[l.n] != END; l.n++)
            l.stages[l.n] = (qkv_stage){QKV_STAGE_INIT, .kind = bad_orders[i].stages[l.n]};
        const qkv_logits_pipe_spec spec = {
            QKV_LOGITS_PIPE_SPEC_INIT,  .num_stages = l.n, .stages = l.stages,
            .kind = bad_orders[i].kind, .max_batch = 1,    .max_vocab = TOKENS};
        const qkv_status status = qkv_logits_pipe_create(contexts.ctx[0], &spec, &pipe);
        const char *message = status ? qkv_last_error() : "";
        if (status != QKV_ERR_INVALID || !strstr(message, bad_orders[i].stage) ||
            !strstr(message, bad_orders[i].takes) || !strstr(message, bad_orders[i].got))
            fail_msg("order %d, %s: %s: %s", (int)i, bad_orders[i].stage, qkv_status_name(status),
                     message);
        assert_null(pipe);
    }
}

static void bad_specs_are_named(void **state)
{
    (void)state;
    qkv_context *const ctx = contexts.ctx[0];
    qkv_logits_pipe *pipe = NULL;
    list l = {.n = 0};
    add(&l, QKV_STAGE_SAMPLE);
#define SPEC(...) (&(qkv_logits_pipe_spec){QKV_LOGITS_PIPE_SPEC_INIT, __VA_ARGS__})
#define FINE      .num_stages = 1, .stages = l.stages, .max_batch = 1, .max_vocab = 8
    const qkv_status invalid = QKV_ERR_INVALID;
    EXPECT_FAIL(invalid, "ctx", qkv_logits_pipe_create(NULL, SPEC(FINE), &pipe));
    EXPECT_FAIL(invalid, "spec", qkv_logits_pipe_create(ctx, NULL, &pipe));
    EXPECT_FAIL(invalid, "pipe", qkv_logits_pipe_create(ctx, SPEC(FINE), NULL));
    EXPECT_FAIL(
        invalid, "stages",
        qkv_logits_pipe_create(ctx, SPEC(.num_stages = 1, .max_batch = 1, .max_vocab = 8), &pipe));
    EXPECT_FAIL(invalid, "num_stages",
                qkv_logits_pipe_create(ctx, SPEC(.num_stages = 17, .stages = l.stages), &pipe));
    EXPECT_FAIL(invalid, "num_stages",
                qkv_logits_pipe_create(ctx, SPEC(.num_stages = -1, .stages = l.stages), &pipe));
#undef FINE
#undef SPEC
    assert_null(pipe);
}

static void user_texts_are_compiled_when_made(void **state)
{
    (void)state;
    static const struct {
        const char *why, *source, *value_name, *tensor_name;
        qkv_status status;
        const char *message;
    } cases[] = {
        {"no text", NULL, NULL, NULL, QKV_ERR_INVALID, "source"},
        {"a name that is none", source, "two words", NULL, QKV_ERR_INVALID, "value_name"},
        {"another", source, NULL, "7up", QKV_ERR_INVALID, "tensor_name"},
        {"no C",
         "QI_FN float logits_stage(float logit, float v, float e, int t, int r) { return nowhere; "
         "}",
         NULL, NULL, QKV_ERR_COMPILE, "nowhere"},
    };
    for (int k = 0; k < contexts.n; k++)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            qkv_logits_pipe *pipe = NULL;
            list l = {.n = 0};
            qkv_stage *s = add(&l, QKV_STAGE_USER);
            s->source = cases[i].source, s->value_name = cases[i].value_name;
            s->tensor_name = cases[i].tensor_name;
            const qkv_logits_pipe_spec spec = {QKV_LOGITS_PIPE_SPEC_INIT, .num_stages = 1,
                                               .stages = l.stages, .max_batch = 1, .max_vocab = 8};
            const qkv_status status = qkv_logits_pipe_create(contexts.ctx[k], &spec, &pipe);
            if (status != cases[i].status || !strstr(qkv_last_error(), cases[i].message))
                fail_msg("%s: %s: %s", cases[i].why, qkv_status_name(status),
                         status ? qkv_last_error() : "");
            assert_null(pipe);
        }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_list_gives_what_its_stages_say),
        cmocka_unit_test(user_stages_are_called_for_each_token),
        cmocka_unit_test(a_pipe_is_the_call),
        cmocka_unit_test(defaults_stand_in_for_what_is_not_given),
        cmocka_unit_test(what_follows_no_temperature_sees_one_token),
        cmocka_unit_test(min_p_goes_by_the_largest_left),
        cmocka_unit_test(large_probabilities_stay_probabilities),
        cmocka_unit_test(valid_is_told_by_every_pipe),
        cmocka_unit_test(names_are_checked),
        cmocka_unit_test(orders_that_do_not_fit_are_named),
        cmocka_unit_test(bad_specs_are_named),
        cmocka_unit_test(user_texts_are_compiled_when_made),
    };
    return cmocka_run_group_tests_name("logits_pipe", tests, contexts_open, contexts_close);
}
