/* test_sampling_equality.c - what a request draws depends on its row, its parameters and its seed alone: not on
 * the run, on who is in the batch, on its place there, on how its parameters were handed over. Then random
 * parameters without regard for sense, in bounded time.
 * SPDX-License-Identifier: Apache-2.0 */
#include "sampling_check.h"

/* Levels and the GPU against each other are in check_draw and check_filter, of every test of the family. */

static sampling_spec spec_of(unsigned given)
{
    static const int64_t some[] = {3, 127, 1000, 5003, 40000};
    return (sampling_spec){
        .batch = 2 + test_below(14),
        .vocab = sampling_vocab(some[test_below(5)]),
        .dtype = float_dtypes[test_below(3)],
        .kind = given & ON_LOGITS ? QKV_LOGITS : (int32_t)test_below(2),
        .order = (int32_t)test_below(2),
        .given = given,
        .shape = -1,
        .strided = test_below(2),
    };
}

/* Of any stages that are `among`. */
static sampling_spec any_spec(unsigned among)
{
    const uint64_t few = sampling_few();
    const sampling_spec spec = spec_of((unsigned)test_u64() & among &
                                       (test_below(2) ? ALL_STAGES : AFTER_SOFTMAX | STAGE(TOP_K)));
    sampling_go_on(few);
    return spec;
}

/* Rows [first, first + n) of a tensor that has one for each request; as it is, if there is one for all. */
static const DLTensor *slice(test_tensor *to, const DLTensor *t, int64_t first, int64_t n)
{
    if (!t || t->shape[0] == 1) return t;
    to->t = *t;
    to->t.shape = to->shape;
    to->t.shape[0] = n;
    if (t->ndim > 1) to->t.shape[1] = t->shape[1];
    to->t.byte_offset += (uint64_t)(first * t->strides[0]) * test_bytes(t->dtype);
    return &to->t;
}

/* The call of a part of the requests. */
static qkv_sampling_params params_of(const qkv_sampling_params *p, test_tensor *to, int64_t first,
                                     int64_t n)
{
    qkv_sampling_params part = *p;
    const DLTensor **const tensors[] = {
        &part.temperature, &part.top_k,     &part.top_p,     &part.min_p,
        &part.seed,        &part.offset,    &part.typical_p, &part.top_n_sigma,
        &part.repetition,  &part.frequency, &part.presence,  &part.counts,
        &part.prompt,      &part.bias,      &part.bitmask,   &part.indices};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        *tensors[i] = slice(&to[i], *tensors[i], first, n);
    part.valid = NULL;
    return part;
}

static void a_part_of_a_batch_draws_the_same(void **state)
{
    (void)state;
    for (int n = sampling_cases(60); n > 0; n--) {
        const sampling_spec spec = any_spec(ALL_STAGES);
        sampling_case *c = case_new(&spec);
        int32_t *tokens = check_draw(c), part[16];
        const int64_t first = test_below(spec.batch), m = 1 + test_below(spec.batch - first);
        test_tensor rows, to[16];
        for (int k = 0; k < contexts.n; k++) {
            const qkv_sampling_params params = params_of(&c->params, to, first, m);
            memset(part, 0xff, sizeof part);
            EXPECT_OK(qkv_sample(contexts.ctx[k], TENSOR(part, QKV_I32, m),
                                 slice(&rows, &c->rows.t, first, m), &params, NULL));
            if (memcmp(part, tokens + first, (size_t)m * sizeof *part) != 0)
                fail_msg("%s: %s: %d requests alone draw others", case_text(c, first),
                         contexts.name[k], (int)m);
        }
        free(tokens);
        case_free(c);
    }
}

/* Rows in another order by indices, some of them twice; and the probabilities of renormalize with them. */
static void indices_only_say_where_rows_are(void **state)
{
    (void)state;
    for (int n = sampling_cases(40); n > 0; n--) {
        sampling_spec spec = any_spec(~ON_LOGITS);
        spec.shared = ALL_STAGES;
        sampling_case *c = case_new(&spec);
        for (int64_t i = 1; i < spec.batch; i++) {
            c->seed[i] = c->seed[0]; /* so that a row draws the same wherever it stands */
            c->offset[i] = c->offset[0];
        }
        int32_t *tokens = check_draw(c), again[16], indices[16];
        view out = check_filter(c, qkv_renormalize, QKV_F32, false), moved;
        view_new(&moved, QKV_F32, 0, TEST_SHAPE(spec.batch, spec.vocab));
        for (int64_t i = 0; i < spec.batch; i++) indices[i] = (int32_t)test_below(spec.batch);
        const DLTensor *by = TENSOR(indices, QKV_I32, spec.batch);
        for (int k = 0; k < contexts.n; k++) {
            check_set_draws(c, true);
            c->params.indices = by;
            EXPECT_OK(qkv_sample(contexts.ctx[k], TENSOR(again, QKV_I32, spec.batch), &c->rows.t,
                                 &c->params, NULL));
            check_set_draws(c, false);
            EXPECT_OK(qkv_renormalize(contexts.ctx[k], &moved.t, &c->rows.t, &c->params, NULL));
            for (int64_t i = 0; i < spec.batch; i++) {
                if (again[i] != tokens[indices[i]])
                    fail_msg("%s: draws %d, not %d", case_text(c, i), again[i], tokens[indices[i]]);
                if (memcmp(case_row(&moved, i), case_row(&out, indices[i]),
                           (size_t)spec.vocab * sizeof(float)) != 0)
                    fail_msg("%s: other probabilities", case_text(c, i));
            }
        }
        free(tokens);
        view_free(&out), view_free(&moved);
        case_free(c);
    }
}

/* One number for all requests, and the same number for each. */
static void one_number_is_as_good_as_many(void **state)
{
    (void)state;
    for (int n = sampling_cases(40); n > 0; n--) {
        sampling_spec spec = any_spec(ALL_STAGES);
        spec.shared = ALL_STAGES & ~(STAGE(BIAS) | STAGE(BITMASK));
        sampling_case *c = case_new(&spec);
        int32_t *one = check_draw(c);
        c->spec.shared = 0; /* the arrays have that number everywhere */
        case_fill_params(c);
        int32_t *many = check_draw(c);
        if (memcmp(one, many, (size_t)spec.batch * sizeof *one) != 0)
            fail_msg("%s: tokens differ", case_text(c, 0));
        free(one), free(many);
        case_free(c);
    }
}

static void each_run_gives_the_same_bits(void **state)
{
    (void)state;
    for (int n = sampling_cases(10); n > 0; n--) {
        const sampling_spec spec = any_spec(ALL_STAGES);
        sampling_case *c = case_new(&spec);
        int32_t *first = check_draw(c);
        view probs = check_filter(c, qkv_renormalize, spec.dtype, false);
        for (int times = 0; times < 5; times++) {
            int32_t *next = check_draw(c);
            view other = check_filter(c, qkv_renormalize, spec.dtype, false);
            assert_memory_equal(next, first, (size_t)spec.batch * sizeof *next);
            for (int64_t i = 0; i < spec.batch * spec.vocab; i++)
                assert_true(view_get(&other, i) == view_get(&probs, i));
            free(next);
            view_free(&other);
        }
        free(first);
        view_free(&probs);
        case_free(c);
    }
}

/* Where there are more threads than rows, several share one. */
static void any_number_of_threads_gives_the_same_bits(void **state)
{
    (void)state;
    static const int64_t vocabs[] = {1, 255, 257, 10000, 128256, 500000};
    static const int32_t threads[] = {1, 2, 3, 5};
    static const unsigned given[] = {0, STAGE(TOP_P), STAGE(MIN_P), STAGE(TOP_P) | STAGE(MIN_P),
                                     ALL_STAGES};
    const char *level;
    int32_t usable;
    if (test_on_cuda()) skip();
    for (int32_t l = 0; (level = qkv_cpu_level(l, &usable)); l++) {
        if (!usable) continue;
        const int n = contexts.n;
        for (size_t i = 0; i < sizeof threads / sizeof *threads; i++) {
            const qkv_context_options options = {QKV_CONTEXT_OPTIONS_INIT, .isa = level,
                                                 .num_threads = threads[i]};
            contexts.name[contexts.n] = level;
            EXPECT_OK(qkv_context_create(&options, &contexts.ctx[contexts.n++]));
        }
        for (size_t i = 0; i < 3 * sizeof vocabs / sizeof *vocabs; i++) {
            for (size_t g = 0; g < sizeof given / sizeof *given; g++) {
                sampling_spec spec =
                    spec_of(given[g] == ALL_STAGES ? (unsigned)test_u64() & given[g] : given[g]);
                spec.vocab = vocabs[i / 3];
                spec.batch = 1 + (int64_t)i % 3;
                sampling_case *c = case_new(&spec);
                free(check_draw(c));
                view probs = check_filter(c, qkv_renormalize, spec.dtype, false);
                view_free(&probs);
                case_free(c);
            }
        }
        while (contexts.n > n) qkv_context_destroy(contexts.ctx[--contexts.n]);
    }
}

/* In place is as good as elsewhere, strides as none, f16 rows as the f32 rows of their values. */
static void where_rows_stand_does_not_matter(void **state)
{
    (void)state;
    for (int n = sampling_cases(40); n > 0; n--) {
        sampling_spec spec = any_spec(ALL_STAGES);
        spec.strided = true;
        sampling_case *c = case_new(&spec);
        int32_t *tokens = check_draw(c), *others;
        view apart = check_filter(c, qkv_renormalize, spec.dtype, false);
        view within = check_filter(c, qkv_renormalize, spec.dtype, true);
        for (int64_t i = 0; i < spec.batch * spec.vocab; i++)
            assert_true(view_get(&within, i) == view_get(&apart, i));
        view plain;
        view_new(&plain, QKV_F32, 0, TEST_SHAPE(spec.batch, spec.vocab));
        for (int64_t i = 0; i < spec.batch * spec.vocab; i++)
            view_put(&plain, i, view_get(&c->rows, i));
        const view given = c->rows;
        c->rows = plain;
        c->rows.t.shape = c->rows.shape, c->rows.t.strides = c->rows.strides;
        others = check_draw(c);
        assert_memory_equal(tokens, others, (size_t)spec.batch * sizeof *tokens);
        free(tokens), free(others);
        view_free(&apart), view_free(&within), view_free(&plain);
        c->rows = given;
        case_free(c);
    }
}

/* ---- parameters without sense ---------------------------------------------------------------------- */

/* Any f32 in range, whatever its exponent. */
static float any_positive(float most)
{
    const float x = test_bits_float((uint32_t)test_below(0x7f7fffff) + 1);
    return x <= most ? x : fmodf(x, most) + FLT_MIN;
}

static void any_parameters_end_in_time(void **state)
{
    (void)state;
    enum { SECONDS = 300 }; /* of them a hundred for a machine that has others at work */
    static const float sigmas[] = {1e-30f, 1, 1e30f};
    const time_t begin = time(NULL);
    for (int n = sampling_cases(150); n > 0; n--) {
        const sampling_spec spec = any_spec(ALL_STAGES);
        sampling_case *c = case_new(&spec);
        for (int64_t i = 0; i < spec.batch; i++) {
            /* 1 / T is finite: what would be infinite, or not a number, is the header's to leave open */
            c->value[QKV_STAGE_TEMPERATURE][i] = fmaxf(any_positive(FLT_MAX), 0x1p-100f);
            c->value[QKV_STAGE_TOP_P][i] = fminf(any_positive(1), 1);
            c->value[QKV_STAGE_MIN_P][i] = fminf(any_positive(1), 1);
            c->value[QKV_STAGE_TYPICAL_P][i] = fminf(any_positive(1), 1);
            c->value[QKV_STAGE_TOP_N_SIGMA][i] = sigmas[test_below(3)];
            c->value[QKV_STAGE_REPETITION][i] = any_positive(FLT_MAX);
            c->value[QKV_STAGE_FREQUENCY][i] = any_positive(FLT_MAX) * (test_below(2) ? 1 : -1);
            c->value[QKV_STAGE_PRESENCE][i] = any_positive(FLT_MAX) * (test_below(2) ? 1 : -1);
            c->top_k[i] = (int32_t)(test_u64() >> (33 + test_below(31)));
        }
        for (int64_t i = 0; i < spec.batch * spec.vocab && n % 3 == 0; i++) { /* any bits */
            const uint64_t bits = test_u64();
            memcpy(c->rows.block + (size_t)view_index(&c->rows, i) * test_bytes(spec.dtype), &bits,
                   test_bytes(spec.dtype));
        }
        free(c->request);
        case_fill_requests(c);
        check_sample(c);
        check_renormalize(c, QKV_F32, false);
        case_free(c);
        if (time(NULL) - begin > SECONDS) fail_msg("%d cases left", n);
    }
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_part_of_a_batch_draws_the_same),
        cmocka_unit_test(indices_only_say_where_rows_are),
        cmocka_unit_test(one_number_is_as_good_as_many),
        cmocka_unit_test(each_run_gives_the_same_bits),
        cmocka_unit_test(any_number_of_threads_gives_the_same_bits),
        cmocka_unit_test(where_rows_stand_does_not_matter),
        cmocka_unit_test(any_parameters_end_in_time),
    };
    return cmocka_run_group_tests_name("sampling_equality", tests, contexts_open, contexts_close);
}
