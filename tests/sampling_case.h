/* sampling_case.h - random calls of the operators of sampling.h: rows of many shapes, parameters of every
 * stage, and every context that must give the same bits for them.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_SAMPLING_CASE_H
#define QKV_TESTS_SAMPLING_CASE_H

#include <float.h>

#include "ref/sampling_ref.h"
#include "view.h"

/* ---- contexts ---------------------------------------------------------------------------------- */

/* Every level of the CPU, of 1, 2 or 3 threads; of tests on a GPU, the GPU and the fastest level. */
static struct {
    int n;
    qkv_context *ctx[12];
    const char *name[12];
} contexts;

static inline int contexts_open(void **state)
{
    (void)state;
    int32_t usable;
    const char *level;
    if (test_on_cuda()) {
        contexts.name[0] = "cuda";
        if (test_context_create(&contexts.ctx[contexts.n++]) != QKV_OK) return -1;
    }
    for (int32_t i = 0; (level = qkv_cpu_level(i, &usable)); i++) {
        if (!usable) continue;
        const qkv_context_options options = {QKV_CONTEXT_OPTIONS_INIT, .isa = level,
                                             .num_threads = 1 + (contexts.n + 1) % 3};
        contexts.name[contexts.n] = level;
        if (qkv_context_create(&options, &contexts.ctx[contexts.n++]) != QKV_OK) return -1;
        if (test_on_cuda()) break;
    }
    return contexts.n == 0;
}

static inline int contexts_close(void **state)
{
    (void)state;
    while (contexts.n > 0) qkv_context_destroy(contexts.ctx[--contexts.n]);
    return 0;
}

/* QKV_TEST_CASES=n makes n random cases of each test; by itself it is so many. */
static inline int sampling_cases(int by_itself)
{
    const char *text = getenv("QKV_TEST_CASES");
    return text ? atoi(text) : by_itself;
}

/* A GPU's kernels take seconds each to compile, one for each list of stages, dtype and so on. */
static inline bool sampling_compiles(void)
{
    return test_on_cuda() && !test_is_emulated();
}

/* What is drawn from here to sampling_go_on() is, on a GPU, one of few things, the same ones in every test: many
 * cases share a kernel. */
static inline uint64_t sampling_few(void)
{
    enum { FEW = 2 };
    static uint64_t first;
    if (!sampling_compiles()) return test_state;
    if (!first) first = test_u64();
    const uint64_t which = (uint64_t)test_below(FEW), state = test_state;
    test_state = first + which;
    return state;
}

/* state: what sampling_few() returned. */
static inline void sampling_go_on(uint64_t state)
{
    if (sampling_compiles()) test_state = state;
}

/* An emulated GPU is given short rows. */
static inline int64_t sampling_vocab(int64_t vocab)
{
    return test_is_emulated() && vocab > 3000 ? 2000 + vocab % 1000 : vocab;
}

/* ---- rows -------------------------------------------------------------------------------------- */

typedef enum row_shape {
    ROW_SMOOTH,
    ROW_FLAT,
    ROW_TIES,      /* four values */
    ROW_NEAR_TIES, /* values that differ in their last bits */
    ROW_MASKED,    /* nine of ten tokens have no mass */
    ROW_STEEP,     /* most masses are next to nothing */
    ROW_ONE_HOT,
    ROW_HEAVY_TAIL, /* 1 / rank */
    ROW_DIRTY,      /* NaN, infinities, and negative probabilities */
    ROW_NOTHING,    /* no token has mass */
    ROW_NUM_SHAPES
} row_shape;

static const char *const row_shape_names[ROW_NUM_SHAPES] = {
    "smooth", "flat",    "ties",       "near ties", "masked",
    "steep",  "one-hot", "heavy tail", "dirty",     "nothing"};

/* From the normal distribution, nearly. */
static inline double row_normal(void)
{
    double sum = 0;
    for (int i = 0; i < 6; i++) sum += test_uniform(1);
    return sum * 0.7071;
}

static inline double row_logit(row_shape shape, int64_t i, int64_t hot)
{
    switch (shape) {
    case ROW_SMOOTH: return 2 * row_normal();
    case ROW_FLAT: return 1.5;
    case ROW_TIES: return (double)test_below(4);
    case ROW_NEAR_TIES: return 1 + (double)test_below(4) * 0x1p-23;
    case ROW_MASKED: return test_below(10) ? (double)-INFINITY : 2 * row_normal();
    case ROW_STEEP: return -1000 * fabs(test_uniform(1));
    case ROW_ONE_HOT: return i == hot ? 7 : (double)-INFINITY;
    case ROW_HEAVY_TAIL: return -log(1 + (double)((i * 7919) % 524287));
    default: return row_normal();
    }
}

static inline double row_dirt(int32_t kind)
{
    switch (test_below(4)) {
    case 0: return NAN;
    case 1: return (double)-INFINITY;
    case 2: return (double)(test_below(100) ? NAN : INFINITY);
    default: return kind == QKV_PROBS ? -0.5 : -3e38;
    }
}

/* A row of its own for each call. */
static inline void row_fill(void *data, DLDataType dtype, int64_t at, int64_t vocab, int32_t kind,
                            row_shape shape)
{
    const int64_t hot = test_below(vocab);
    const double factor =
        kind == QKV_PROBS ? ldexp(1 + test_uniform(0.5), (int)test_below(12) - 8) : 1;
    for (int64_t i = 0; i < vocab; i++) {
        double x = row_logit(shape, i, hot);
        if (kind == QKV_PROBS)
            x = shape == ROW_FLAT || shape == ROW_TIES || shape == ROW_NEAR_TIES
                    ? x
                    : exp(x - 4) * factor;
        if (shape == ROW_DIRTY && test_below(5) == 0) x = row_dirt(kind);
        if (shape == ROW_NOTHING)
            x = kind == QKV_PROBS ? (test_below(2) ? 0 : (double)NAN)
                                  : (double)(test_below(2) ? -INFINITY : NAN);
        test_put(data, dtype, at + i, x);
    }
}

/* ---- a call ------------------------------------------------------------------------------------ */

#define STAGE(name) (1u << QKV_STAGE_##name)
#define ON_LOGITS                                                                                  \
    (STAGE(REPETITION) | STAGE(FREQUENCY) | STAGE(PRESENCE) | STAGE(BIAS) | STAGE(BITMASK) |       \
     STAGE(TEMPERATURE) | STAGE(TOP_N_SIGMA))
#define AFTER_SOFTMAX (STAGE(TOP_P) | STAGE(MIN_P) | STAGE(TYPICAL_P))
#define ALL_STAGES    (ON_LOGITS | STAGE(TOP_K) | AFTER_SOFTMAX)

typedef struct sampling_spec {
    int64_t batch, vocab;
    DLDataType dtype;
    int32_t kind, order;
    unsigned given;  /* STAGE() of what is not NULL */
    unsigned shared; /* of these, the ones that all requests have one of */
    int shape;       /* row_shape; -1: of each row another */
    bool strided, indexed;
    int64_t num_rows; /* of indexed ones; 0: any number */
} sampling_spec;

/* Arrays by request; the numbers of stage s in value[s]. */
typedef struct sampling_case {
    sampling_spec spec;
    int64_t num_rows;
    view rows, counts, prompt, bias, bitmask;
    float *value[QKV_STAGE_SAMPLE];
    int32_t *top_k, *indices;
    uint64_t *seed, *offset;
    uint8_t *valid;
    ref_request *request;
    double *bias_values; /* [requests, vocab], as they are in bias */
    test_tensor tensors[16];
    qkv_sampling_params params;
} sampling_case;

static inline float random_value(int32_t stage)
{
    static const float temperatures[] = {0, 0.05f, 0.7f, 1, 1.7f, 1e4f};
    static const float top_ps[] = {1e-6f, 0.1f, 0.5f, 0.9f, 0.999f, 1};
    static const float min_ps[] = {0, 1e-4f, 0.02f, 0.25f, 1};
    static const float typicals[] = {0.01f, 0.3f, 0.5f, 0.95f, 1};
    static const float sigmas[] = {1e-3f, 0.5f, 1, 2.5f, 100};
    static const float penalties[] = {0.5f, 1, 1.2f, 3};
    switch (stage) {
    case QKV_STAGE_TEMPERATURE: return temperatures[test_below(6)];
    case QKV_STAGE_TOP_P: return top_ps[test_below(6)];
    case QKV_STAGE_MIN_P: return min_ps[test_below(5)];
    case QKV_STAGE_TYPICAL_P: return typicals[test_below(5)];
    case QKV_STAGE_TOP_N_SIGMA: return sigmas[test_below(5)];
    case QKV_STAGE_REPETITION: return penalties[test_below(4)];
    default: return (float)test_uniform(2); /* frequency, presence */
    }
}

static inline int32_t random_top_k(int64_t vocab)
{
    const int32_t ks[] = {0, 1, 2, 40, 50, 300, (int32_t)vocab - 1, (int32_t)vocab, INT32_MAX};
    return ks[test_below(9)];
}

/* How many requests have a value of their own for the stage. */
static inline int64_t case_count(const sampling_spec *s, int32_t stage)
{
    return s->shared >> stage & 1 ? 1 : s->batch;
}

static inline int64_t case_words(const sampling_spec *s)
{
    return (s->vocab + 31) / 32;
}

/* A view's row of a request; NULL where the stage has none. */
static inline void *case_row(const view *v, int64_t request)
{
    if (!v->block) return NULL;
    const int64_t row = v->shape[0] == 1 ? 0 : request;
    return v->block + v->t.byte_offset + (size_t)(row * v->strides[0]) * test_bytes(v->t.dtype);
}

/* Words of which about one bit in `one_of` is 0 (or 1). */
static inline void case_fill_bits(view *v, int one_of, bool ones)
{
    for (int64_t r = 0; r < v->shape[0]; r++) {
        int32_t *words = case_row(v, r);
        for (int64_t w = 0; w < v->shape[1]; w++) {
            uint32_t bits = 0;
            for (int b = 0; b < 32; b++) bits |= (uint32_t)(test_below(one_of) == 0) << b;
            words[w] = (int32_t)(ones ? bits : ~bits);
        }
    }
}

static inline void case_fill_tensors(sampling_case *c)
{
    const sampling_spec *s = &c->spec;
    const int64_t pad = s->strided ? 5 : 0, words = case_words(s);
    const DLDataType bias_dtype = float_dtypes[test_below(3)];
    const unsigned counting = STAGE(REPETITION) | STAGE(FREQUENCY) | STAGE(PRESENCE);
    const bool prompt = (s->given & STAGE(REPETITION)) && test_below(2);
    const bool counts = (s->given & counting) &&
                        (!prompt || test_below(2) || (s->given & counting) != STAGE(REPETITION));
    if (counts) {
        view_new(&c->counts, QKV_I32, pad, TEST_SHAPE(s->batch, s->vocab));
        for (int64_t r = 0; r < s->batch; r++)
            for (int64_t i = 0; i < s->vocab; i++)
                ((int32_t *)case_row(&c->counts, r))[i] =
                    test_below(4) ? 0 : (int32_t)(test_below(9) ? test_below(5) : 1 << 25);
    }
    if (prompt) {
        view_new(&c->prompt, QKV_I32, pad, TEST_SHAPE(s->batch, words));
        case_fill_bits(&c->prompt, 4, true);
    }
    if (s->given & STAGE(BIAS)) {
        const int64_t n = case_count(s, QKV_STAGE_BIAS);
        view_new(&c->bias, bias_dtype, pad, TEST_SHAPE(n, s->vocab));
        c->bias_values = malloc((size_t)(n * s->vocab) * sizeof(double));
        for (int64_t i = 0; i < n * s->vocab; i++) {
            const int64_t at = view_index(&c->bias, i);
            test_put(c->bias.block, bias_dtype, at,
                     test_below(20) ? test_uniform(3) : (double)-INFINITY);
            c->bias_values[i] = test_get(c->bias.block, bias_dtype, at);
        }
    }
    if (s->given & STAGE(BITMASK)) {
        view_new(&c->bitmask, QKV_I32, pad, TEST_SHAPE(case_count(s, QKV_STAGE_BITMASK), words));
        case_fill_bits(&c->bitmask, test_below(2) ? 2 : 30, test_below(2));
    }
}

/* Values of every stage and request. */
static inline void case_fill_values(sampling_case *c)
{
    const sampling_spec *s = &c->spec;
    const size_t n = (size_t)s->batch + 1;
    for (int32_t stage = 0; stage < QKV_STAGE_SAMPLE; stage++) {
        c->value[stage] = malloc(n * sizeof(float));
        for (int64_t i = 0; i < s->batch; i++)
            c->value[stage][i] =
                i < case_count(s, stage) ? random_value(stage) : c->value[stage][0];
    }
    c->top_k = malloc(n * sizeof *c->top_k);
    c->indices = malloc(n * sizeof *c->indices);
    c->seed = malloc(n * sizeof *c->seed);
    c->offset = malloc(n * sizeof *c->offset);
    c->valid = malloc(n);
    for (int64_t i = 0; i < s->batch; i++) {
        c->top_k[i] = i < case_count(s, QKV_STAGE_TOP_K) ? random_top_k(s->vocab) : c->top_k[0];
        c->seed[i] = test_u64();
        c->offset[i] = test_below(2) ? test_u64() : (uint64_t)test_below(100);
        c->indices[i] = (int32_t)(s->indexed && test_below(8) ? test_below(c->num_rows) : i);
        if (s->indexed && test_below(30) == 0)
            c->indices[i] = test_below(2) ? -1 - (int32_t)test_below(9)
                                          : (int32_t)(c->num_rows + test_below(9));
    }
}

/* The same for the reference. */
static inline void case_fill_requests(sampling_case *c)
{
    const sampling_spec *s = &c->spec;
    c->request = calloc((size_t)s->batch + 1, sizeof *c->request);
    for (int64_t i = 0; i < s->batch; i++)
        c->request[i] = (ref_request){
            .temperature = c->value[QKV_STAGE_TEMPERATURE][i],
            .top_p = c->value[QKV_STAGE_TOP_P][i],
            .min_p = c->value[QKV_STAGE_MIN_P][i],
            .typical_p = c->value[QKV_STAGE_TYPICAL_P][i],
            .top_n_sigma = c->value[QKV_STAGE_TOP_N_SIGMA][i],
            .repetition = c->value[QKV_STAGE_REPETITION][i],
            .frequency = c->value[QKV_STAGE_FREQUENCY][i],
            .presence = c->value[QKV_STAGE_PRESENCE][i],
            .top_k = c->top_k[i],
            .seed = c->seed[i],
            .offset = c->offset[i],
            .counts = case_row(&c->counts, i),
            .prompt = case_row(&c->prompt, i),
            .bitmask = case_row(&c->bitmask, i),
            .bias =
                c->bias_values ? c->bias_values + (c->bias.shape[0] == 1 ? 0 : i) * s->vocab : NULL,
        };
}

/* One number for all stands on the heap too, at the first request's place. */
static inline const DLTensor *case_values(sampling_case *c, int at, int32_t stage, void *values,
                                          DLDataType dtype)
{
    if (!(c->spec.given >> stage & 1)) return NULL;
    return &test_tensor_init(&c->tensors[at], values, dtype,
                             TEST_SHAPE(case_count(&c->spec, stage)))
                ->t;
}

/* What a call is given, but for seeds and valid. */
static inline void case_fill_params(sampling_case *c)
{
#define VALUES(at, NAME) case_values(c, at, QKV_STAGE_##NAME, c->value[QKV_STAGE_##NAME], QKV_F32)
    c->params = (qkv_sampling_params){
        QKV_SAMPLING_PARAMS_INIT,
        .kind = c->spec.kind,
        .order = c->spec.order,
        .temperature = VALUES(0, TEMPERATURE),
        .top_p = VALUES(1, TOP_P),
        .min_p = VALUES(2, MIN_P),
        .typical_p = VALUES(3, TYPICAL_P),
        .top_n_sigma = VALUES(4, TOP_N_SIGMA),
        .repetition = VALUES(5, REPETITION),
        .frequency = VALUES(6, FREQUENCY),
        .presence = VALUES(7, PRESENCE),
        .top_k = case_values(c, 8, QKV_STAGE_TOP_K, c->top_k, QKV_I32),
        .counts = c->counts.block ? &c->counts.t : NULL,
        .prompt = c->prompt.block ? &c->prompt.t : NULL,
        .bias = c->bias.block ? &c->bias.t : NULL,
        .bitmask = c->bitmask.block ? &c->bitmask.t : NULL,
    };
#undef VALUES
    const int64_t batch = c->spec.batch;
    if (c->spec.indexed)
        c->params.indices =
            &test_tensor_init(&c->tensors[9], c->indices, QKV_I32, TEST_SHAPE(batch))->t;
    test_tensor_init(&c->tensors[10], c->seed, QKV_U64, TEST_SHAPE(batch));
    test_tensor_init(&c->tensors[11], c->offset, QKV_U64, TEST_SHAPE(batch));
    test_tensor_init(&c->tensors[12], c->valid, QKV_DTYPE(kDLUInt, 8), TEST_SHAPE(batch));
}

/* What may be changed before the call: values (then case_fill_requests once more), rows. */
static inline sampling_case *case_new(const sampling_spec *spec)
{
    sampling_case *c = calloc(1, sizeof *c);
    assert_non_null(c);
    c->spec = *spec;
    c->num_rows = !spec->indexed   ? spec->batch
                  : spec->num_rows ? spec->num_rows
                                   : 1 + test_below(2 * spec->batch);
    view_new(&c->rows, spec->dtype, spec->strided ? 9 : 0, TEST_SHAPE(c->num_rows, spec->vocab));
    for (int64_t r = 0; r < c->num_rows; r++) {
        const int shape = spec->shape < 0 ? (int)test_below(ROW_NUM_SHAPES) : spec->shape;
        row_fill(c->rows.block, spec->dtype, view_index(&c->rows, r * spec->vocab), spec->vocab,
                 spec->kind, (row_shape)shape);
    }
    case_fill_tensors(c);
    case_fill_values(c);
    case_fill_requests(c);
    case_fill_params(c);
    return c;
}

static inline void case_free(sampling_case *c)
{
    view_free(&c->rows), view_free(&c->counts), view_free(&c->prompt);
    view_free(&c->bias), view_free(&c->bitmask);
    for (int i = 0; i < QKV_STAGE_SAMPLE; i++) free(c->value[i]);
    free(c->top_k), free(c->indices), free(c->seed), free(c->offset), free(c->valid);
    free(c->request), free(c->bias_values), free(c);
}

/* In a static buffer. */
static inline const char *case_text(const sampling_case *c, int64_t i)
{
    static char text[512];
    const ref_request *q = &c->request[i];
    snprintf(
        text, sizeof text,
        "%s of %s, batch %d, vocab %d%s, stages %#x (shared %#x, %s), request %d of row %d, %s: "
        "temperature %.9g, top_n_sigma %.9g, top_k %d, top_p %.9g, min_p %.9g, typical_p %.9g, "
        "repetition %.9g, frequency %.9g, presence %.9g, seed %#llx, offset %#llx",
        c->spec.dtype.bits == 32  ? "f32"
        : c->spec.dtype.code == 4 ? "bf16"
                                  : "f16",
        c->spec.kind == QKV_PROBS ? "probabilities" : "logits", (int)c->spec.batch,
        (int)c->spec.vocab, c->spec.strided ? " (strided)" : "", c->spec.given, c->spec.shared,
        c->spec.order == QKV_TOP_K_JOINT ? "joint" : "top-k first", (int)i, c->indices[i],
        c->spec.shape < 0 ? "any shape" : row_shape_names[c->spec.shape], (double)q->temperature,
        (double)q->top_n_sigma, q->top_k, (double)q->top_p, (double)q->min_p, (double)q->typical_p,
        (double)q->repetition, (double)q->frequency, (double)q->presence,
        (unsigned long long)q->seed, (unsigned long long)q->offset);
    return text;
}

/* A request's row as it was given, then after the stages; also those that the call does not name. */
static inline void case_reference(const sampling_case *c, int64_t i, unsigned stages, ref_row *r)
{
    const int64_t vocab = c->spec.vocab, row = c->indices[i];
    const bool there = row >= 0 && row < c->num_rows;
    double *given = malloc((size_t)vocab * sizeof *given);
    assert_non_null(given);
    const int64_t at = there ? view_index(&c->rows, row * vocab) : 0;
    for (int64_t t = 0; t < vocab && there; t++)
        given[t] = test_get(c->rows.block, c->spec.dtype, at + t);
    ref_begin(r, c->spec.kind, there ? given : NULL, vocab);
    ref_stages(r, stages, c->spec.order, &c->request[i]);
    free(given);
}

/* The stages of a call that ends with probabilities or a token. */
static inline unsigned case_stages(const sampling_case *c)
{
    return c->spec.given | (c->spec.kind == QKV_LOGITS ? STAGE(SOFTMAX) : 0);
}

#endif
