/* sampling_functions.c - the operators of sampling.h that have no state: rows of logits or probabilities to
 * tokens, and to other rows.
 * SPDX-License-Identifier: Apache-2.0 */
#include "sampling_arguments.h"

/* ---- argmax --------------------------------------------------------------------------------------- */

enum { ARGMAX_LOGITS, ARGMAX_OUT, ARGMAX_CTX, ARGMAX_STREAM };
static signature argmax_signature = {
    .text = "argmax(logits, *, out=None, ctx=None, stream=None)\n--\n\n"
            "The index of each row's largest logit, the lowest among equals.\n\n"
            "logits: [batch, vocab] f32, f16 or bf16. out: i32 [batch]; made if None.\n" COMMON
            "Returns out."};

static PyObject *argmax(ARGUMENTS)
{
    (void)module;
    PyObject *v[ARGMAX_STREAM + 1];
    if (read_call(&argmax_signature, args, nargs, kwnames, v)) return NULL;
    call c;
    tensor slots[2];
    begin_call(&c, slots, 2, v[ARGMAX_CTX], v[ARGMAX_STREAM]);
    tensor *logits = array(&c, v[ARGMAX_LOGITS], "logits");
    const int64_t batch = size_of(logits, 0);
    tensor *out = output(&c, v[ARGMAX_OUT], "out", QKV_I32, 1, &batch);
    if (ready(&c)) RUN(&c, qkv_argmax(c.ctx, dl(out), dl(logits), c.stream));
    return end_call(&c, out);
}

/* ---- stages over rows ----------------------------------------------------------------------------- */

/* The parameters that sample, renormalize and mask_logits have in common. */
enum {
    LOGIT_TEMPERATURE,
    LOGIT_TOP_K,
    LOGIT_TOP_N_SIGMA,
    LOGIT_REPETITION,
    LOGIT_FREQUENCY,
    LOGIT_PRESENCE,
    LOGIT_COUNTS,
    LOGIT_PROMPT,
    LOGIT_BIAS,
    LOGIT_BITMASK,
    NUM_LOGIT
};
#define LOGIT_PARAMETERS                                                                           \
    "temperature=None, top_k=None, top_n_sigma=None, repetition=None, frequency=None, "            \
    "presence=None, counts=None, prompt=None, bias=None, bitmask=None"
enum { PROB_TOP_P, PROB_MIN_P, PROB_TYPICAL_P, PROB_KIND, PROB_ORDER, NUM_PROB };
#define PROB_PARAMETERS                                                                            \
    "top_p=None, min_p=None, typical_p=None, kind=\"logits\", order=\"top_k_first\""
enum { IO_INDICES, IO_VALID, IO_OUT, IO_CTX, IO_STREAM, NUM_IO };
#define IO_PARAMETERS "indices=None, valid=None, out=None, ctx=None, stream=None"

#define LOGIT_DOC                                                                                  \
    "A stage is there if it is given; a value is a number, or an array [batch] on the rows' "      \
    "device:\n"                                                                                    \
    "  repetition: f32 > 0, l > 0 ? l / r : l * r for tokens in prompt or counts\n"                \
    "  frequency, presence: f32, l -= f * count; l -= p where count > 0\n"                         \
    "  bias: f32, f16 or bf16 [batch or 1, vocab], added. bitmask: i32 [batch or 1, words], the "  \
    "bit\n"                                                                                        \
    "  t % 32 of word t / 32 is 0 for a token t that is out\n"                                     \
    "  temperature: f32 >= 0, 0 keeps the largest alone. top_n_sigma: f32 > 0, keeps what is "     \
    "within n\n"                                                                                   \
    "  standard deviations of the largest. top_k: i32, keeps the k largest, 0 = all\n"
#define PROB_DOC "  top_p: f32 in (0, 1]. min_p: f32 in [0, 1]. typical_p: f32 in (0, 1]\n"
#define ROWS_DOC                                                                                   \
    "counts: i32 [batch, vocab], of the output so far. prompt: i32 [batch, words], bits as in "    \
    "bitmask.\n"                                                                                   \
    "rows: [batch, vocab] f32, f16 or bf16. indices: i32 [batch], request i has row indices[i].\n" \
    "valid: True, or bool [batch]: wanted too; False for a row with NaN or +inf, or without "      \
    "mass.\n"
#define KIND_DOC                                                                                   \
    "kind: \"probs\" for rows of probabilities, which have no stages before top_k. order: "        \
    "\"joint\": top_p\n"                                                                           \
    "sees the mass before top_k, as top_k does.\n"

typedef struct row_call {
    call c;
    tensor slots[NUM_LOGIT + NUM_PROB + NUM_IO + 3];
    tensor *rows, *valid;
    int64_t shape[2]; /* batch, vocab */
    qkv_sampling_params params;
} row_call;

/* Reads rows and stages; prob is NULL where only logits go. */
static void begin_rows(row_call *r, PyObject *rows, PyObject *const *logit, PyObject *const *prob,
                       PyObject *const *io)
{
    call *c = &r->c;
    qkv_sampling_params *p = &r->params;
    begin_call(c, r->slots, sizeof r->slots / sizeof r->slots[0], io[IO_CTX], io[IO_STREAM]);
    *p = (qkv_sampling_params){QKV_SAMPLING_PARAMS_INIT};
    r->rows = array(c, rows, "rows");
#define NUMBER(field, value) p->field = dl(number_or_array(c, value, #field, QKV_F32))
    NUMBER(temperature, logit[LOGIT_TEMPERATURE]);
    p->top_k = dl(number_or_array(c, logit[LOGIT_TOP_K], "top_k", QKV_I32));
    NUMBER(top_n_sigma, logit[LOGIT_TOP_N_SIGMA]);
    NUMBER(repetition, logit[LOGIT_REPETITION]);
    NUMBER(frequency, logit[LOGIT_FREQUENCY]);
    NUMBER(presence, logit[LOGIT_PRESENCE]);
    if (prob) {
        NUMBER(top_p, prob[PROB_TOP_P]);
        NUMBER(min_p, prob[PROB_MIN_P]);
        NUMBER(typical_p, prob[PROB_TYPICAL_P]);
        c->failed = c->failed ||
                    read_word(prob[PROB_KIND], "kind", &p->kind, "logits", "probs", NULL) ||
                    read_word(prob[PROB_ORDER], "order", &p->order, "top_k_first", "joint", NULL);
    }
#undef NUMBER
    p->counts = dl(optional_array_or_list(c, logit[LOGIT_COUNTS], "counts", QKV_I32));
    p->prompt = dl(optional_array_or_list(c, logit[LOGIT_PROMPT], "prompt", QKV_I32));
    p->bias = dl(optional_array_or_list(c, logit[LOGIT_BIAS], "bias", QKV_F32));
    p->bitmask = dl(optional_array_or_list(c, logit[LOGIT_BITMASK], "bitmask", QKV_I32));
    tensor *indices = optional_array_or_list(c, io[IO_INDICES], "indices", QKV_I32);
    p->indices = dl(indices);
    r->shape[0] = size_of(indices ? indices : r->rows, 0);
    r->shape[1] = size_of(r->rows, 1);
    r->valid = valid_output(c, io[IO_VALID], r->shape[0]);
    p->valid = dl(r->valid);
}

tensor *valid_output(call *c, PyObject *value, int64_t batch)
{
    const DLDataType boolean = {.code = 6, .bits = 8, .lanes = 1}; /* kDLBool of newer DLPacks */
    tensor *t = wanted_output(c, value, "valid", boolean, 1, &batch);
    if (t && t->dl.dtype.code == boolean.code && t->dl.dtype.bits == 8) t->dl.dtype = QKV_U8;
    return t;
}

/* Rows of the rows' dtype, unless they are given. */
static tensor *rows_output(row_call *r, PyObject *value)
{
    if (r->c.failed) return NULL;
    return output(&r->c, value, "out", r->rows->dl.dtype, 2, r->shape);
}

enum {
    SAMPLE_ROWS,
    SAMPLE_SEED,
    SAMPLE_OFFSET,
    SAMPLE_LOGIT,
    SAMPLE_PROB = SAMPLE_LOGIT + NUM_LOGIT,
    SAMPLE_IO = SAMPLE_PROB + NUM_PROB,
    NUM_SAMPLE = SAMPLE_IO + NUM_IO
};
static signature sample_signature = {
    .text = "sample(rows, *, seed, offset=None, " LOGIT_PARAMETERS ", " PROB_PARAMETERS
            ", " IO_PARAMETERS ")\n--\n\n"
            "Draws one token a row from what the stages leave of it, in this order.\n\n" LOGIT_DOC
            "  softmax\n" PROB_DOC
            "A row's draw depends on its seed and offset (the number of the draw), u64 or i64, "
            "alone: one\n"
            "seed for all rows draws with the same random number in each; give a list for draws "
            "that are\n"
            "independent.\n\n" ROWS_DOC KIND_DOC "out: i32 [batch]; made if None.\n" COMMON
            "Returns out, or (out, valid) if valid is wanted."};

static PyObject *sample(ARGUMENTS)
{
    (void)module;
    PyObject *v[NUM_SAMPLE];
    if (read_call(&sample_signature, args, nargs, kwnames, v)) return NULL;
    row_call r;
    call *c = &r.c;
    begin_rows(&r, v[SAMPLE_ROWS], v + SAMPLE_LOGIT, v + SAMPLE_PROB, v + SAMPLE_IO);
    r.params.seed = dl(number_or_array(c, v[SAMPLE_SEED], "seed", QKV_U64));
    r.params.offset = dl(number_or_array(c, v[SAMPLE_OFFSET], "offset", QKV_U64));
    tensor *out = output(c, v[SAMPLE_IO + IO_OUT], "out", QKV_I32, 1, r.shape);
    if (ready(c)) RUN(c, qkv_sample(c->ctx, dl(out), dl(r.rows), &r.params, c->stream));
    return end_call_wanted(c, out, r.valid);
}

enum {
    RENORMALIZE_ROWS,
    RENORMALIZE_LOGIT,
    RENORMALIZE_PROB = RENORMALIZE_LOGIT + NUM_LOGIT,
    RENORMALIZE_IO = RENORMALIZE_PROB + NUM_PROB,
    NUM_RENORMALIZE = RENORMALIZE_IO + NUM_IO
};
static signature renormalize_signature = {
    .text =
        "renormalize(rows, *, " LOGIT_PARAMETERS ", " PROB_PARAMETERS ", " IO_PARAMETERS ")\n--\n\n"
        "The distribution that sample() would draw from: softmax, and renormalisation by the "
        "stages.\n\n" LOGIT_DOC "  softmax\n" PROB_DOC "\n" ROWS_DOC KIND_DOC
        "out: f32, f16 or bf16 [batch, vocab], may be rows; made like rows if None.\n" COMMON
        "Returns out, or (out, valid) if valid is wanted."};

static PyObject *renormalize(ARGUMENTS)
{
    (void)module;
    PyObject *v[NUM_RENORMALIZE];
    if (read_call(&renormalize_signature, args, nargs, kwnames, v)) return NULL;
    row_call r;
    call *c = &r.c;
    begin_rows(&r, v[RENORMALIZE_ROWS], v + RENORMALIZE_LOGIT, v + RENORMALIZE_PROB,
               v + RENORMALIZE_IO);
    tensor *out = rows_output(&r, v[RENORMALIZE_IO + IO_OUT]);
    if (ready(c)) RUN(c, qkv_renormalize(c->ctx, dl(out), dl(r.rows), &r.params, c->stream));
    return end_call_wanted(c, out, r.valid);
}

enum { MASK_ROWS, MASK_LOGIT, MASK_IO = MASK_LOGIT + NUM_LOGIT, NUM_MASK = MASK_IO + NUM_IO };
static signature mask_logits_signature = {
    .text =
        "mask_logits(rows, *, " LOGIT_PARAMETERS ", " IO_PARAMETERS ")\n--\n\n"
        "Logits after the stages, -inf for tokens that are not kept.\n\n" LOGIT_DOC "\n" ROWS_DOC
        "out: f32, f16 or bf16 [batch, vocab], may be rows; made like rows if None.\n" COMMON
        "Returns out, or (out, valid) if valid is wanted."};

static PyObject *mask_logits(ARGUMENTS)
{
    (void)module;
    PyObject *v[NUM_MASK];
    if (read_call(&mask_logits_signature, args, nargs, kwnames, v)) return NULL;
    row_call r;
    call *c = &r.c;
    begin_rows(&r, v[MASK_ROWS], v + MASK_LOGIT, NULL, v + MASK_IO);
    tensor *out = rows_output(&r, v[MASK_IO + IO_OUT]);
    if (ready(c)) RUN(c, qkv_mask_logits(c->ctx, dl(out), dl(r.rows), &r.params, c->stream));
    return end_call_wanted(c, out, r.valid);
}

/* ---- the largest, and log-probabilities ----------------------------------------------------------- */

enum { TOP_K_ROWS, TOP_K_K, TOP_K_SORTED, TOP_K_VALUES, TOP_K_INDICES, TOP_K_CTX, TOP_K_STREAM };
static signature top_k_signature = {
    .text = "top_k(rows, k, *, sorted=True, values=None, indices=None, ctx=None, stream=None)\n"
            "--\n\n"
            "Each row's k largest values and where they are, equals by index, the lowest first.\n\n"
            "rows: [batch, vocab] f32, f16 or bf16. k: 1 to vocab. sorted: largest first, else by "
            "index.\n"
            "values: rows' dtype [batch, k], indices: i32 [batch, k]; made if None.\n" COMMON
            "Returns (values, indices)."};

static PyObject *top_k(ARGUMENTS)
{
    (void)module;
    PyObject *v[TOP_K_STREAM + 1];
    int64_t shape[2] = {0, 0};
    int32_t sorted = 1;
    if (read_call(&top_k_signature, args, nargs, kwnames, v) ||
        read_i64(v[TOP_K_K], "k", &shape[1]) || read_flag(v[TOP_K_SORTED], "sorted", &sorted)) {
        return NULL;
    }
    call c;
    tensor slots[3];
    begin_call(&c, slots, 3, v[TOP_K_CTX], v[TOP_K_STREAM]);
    tensor *rows = array(&c, v[TOP_K_ROWS], "rows"), *values = NULL, *indices = NULL;
    shape[0] = size_of(rows, 0);
    if (rows && (shape[1] < 1 || shape[1] > size_of(rows, 1))) {
        raise_error(QKV_ERR_INVALID, "k: expected 1 to vocab, %lld, got %lld",
                    (long long)size_of(rows, 1), (long long)shape[1]);
        c.failed = 1;
    }
    if (rows) values = output(&c, v[TOP_K_VALUES], "values", rows->dl.dtype, 2, shape);
    indices = output(&c, v[TOP_K_INDICES], "indices", QKV_I32, 2, shape);
    if (ready(&c)) RUN(&c, qkv_top_k(c.ctx, dl(values), dl(indices), dl(rows), sorted, c.stream));
    return end_call_tuple(&c, 2, (tensor *[]){values, indices});
}

enum { LOG_LOGITS, LOG_TOKENS, LOG_RANKS, LOG_OUT, LOG_CTX, LOG_STREAM };
static signature log_probs_signature = {
    .text = "log_probs(logits, tokens, *, ranks=None, out=None, ctx=None, stream=None)\n--\n\n"
            "log(softmax(logits))[tokens], natural log; top_k() has the tokens of the top n.\n\n"
            "logits: [batch, vocab] f32, f16 or bf16. tokens: i32 [batch, n]. out: f32 [batch, n], "
            "-inf for\n"
            "a token without mass or outside of the vocabulary; made if None. ranks: True, or i32 "
            "[batch, n]:\n"
            "wanted too, how many tokens are before it, the largest logit first, equals by "
            "index.\n" COMMON "Returns out, or (out, ranks) if ranks are wanted."};

static PyObject *log_probs(ARGUMENTS)
{
    (void)module;
    PyObject *v[LOG_STREAM + 1];
    if (read_call(&log_probs_signature, args, nargs, kwnames, v)) return NULL;
    call c;
    tensor slots[4];
    begin_call(&c, slots, 4, v[LOG_CTX], v[LOG_STREAM]);
    tensor *logits = array(&c, v[LOG_LOGITS], "logits");
    tensor *tokens = array_or_list(&c, v[LOG_TOKENS], "tokens", QKV_I32);
    const int64_t shape[2] = {size_of(tokens, 0), size_of(tokens, 1)};
    tensor *out = output(&c, v[LOG_OUT], "out", QKV_F32, 2, shape);
    tensor *ranks = wanted_output(&c, v[LOG_RANKS], "ranks", QKV_I32, 2, shape);
    if (ready(&c))
        RUN(&c, qkv_log_probs(c.ctx, dl(out), dl(ranks), dl(logits), dl(tokens), c.stream));
    return end_call_wanted(&c, out, ranks);
}

/* ---- speculative sampling ------------------------------------------------------------------------- */

enum {
    VERIFY_TARGET,
    VERIFY_DRAFT_TOKENS,
    VERIFY_DRAFT,
    VERIFY_SEED,
    VERIFY_OFFSET,
    VERIFY_PARENTS,
    VERIFY_ACCEPTED,
    VERIFY_NUM_ACCEPTED,
    VERIFY_TOKENS,
    VERIFY_CTX,
    VERIFY_STREAM
};
static signature verify_signature = {
    .text =
        "verify(target, draft_tokens, draft=None, *, seed, offset=None, parents=None, "
        "accepted=None, num_accepted=None, tokens=None, ctx=None, stream=None)\n--\n\n"
        "Speculative sampling: accepts a path of drafted tokens, draws one more; as of target.\n\n"
        "target: [batch, nodes + 1, vocab] f32, f16 or bf16 probabilities, row 0 after the "
        "context, row\n"
        "i + 1 after node i. draft_tokens: i32 [batch, nodes]. draft: [batch, nodes, vocab] of "
        "target's\n"
        "dtype, what each was drawn from, None where they were chosen without chance. parents: "
        "i32 [batch\n"
        "or 1, nodes], of each node, -1 = the context; None = a chain. seed, offset: a number or "
        "u64 or i64\n"
        "[batch]; the draws offset to offset + nodes are used up.\n"
        "accepted: i32 [batch, nodes + 1], the nodes, then -1. num_accepted: i32 [batch]. tokens: "
        "i32\n"
        "[batch, nodes + 1], those of the nodes and the one drawn, then -1. Made if None.\n" COMMON
        "Returns (accepted, num_accepted, tokens)."};

static PyObject *verify(ARGUMENTS)
{
    (void)module;
    PyObject *v[VERIFY_STREAM + 1];
    if (read_call(&verify_signature, args, nargs, kwnames, v)) return NULL;
    call c;
    tensor slots[9];
    begin_call(&c, slots, 9, v[VERIFY_CTX], v[VERIFY_STREAM]);
    tensor *target = array(&c, v[VERIFY_TARGET], "target");
    tensor *draft_tokens = array_or_list(&c, v[VERIFY_DRAFT_TOKENS], "draft_tokens", QKV_I32);
    const int64_t shape[2] = {size_of(draft_tokens, 0), size_of(draft_tokens, 1) + 1};
    tensor *out[3] = {
        output(&c, v[VERIFY_ACCEPTED], "accepted", QKV_I32, 2, shape),
        output(&c, v[VERIFY_NUM_ACCEPTED], "num_accepted", QKV_I32, 1, shape),
        output(&c, v[VERIFY_TOKENS], "tokens", QKV_I32, 2, shape),
    };
    const qkv_verify_io io = {
        QKV_VERIFY_IO_INIT,
        .accepted = dl(out[0]),
        .num_accepted = dl(out[1]),
        .tokens = dl(out[2]),
        .target = dl(target),
        .draft_tokens = dl(draft_tokens),
        .draft = dl(optional_array(&c, v[VERIFY_DRAFT], "draft")),
        .parents = dl(optional_array_or_list(&c, v[VERIFY_PARENTS], "parents", QKV_I32)),
        .seed = dl(number_or_array(&c, v[VERIFY_SEED], "seed", QKV_U64)),
        .offset = dl(number_or_array(&c, v[VERIFY_OFFSET], "offset", QKV_U64)),
    };
    if (ready(&c)) RUN(&c, qkv_verify(c.ctx, &io, c.stream));
    return end_call_tuple(&c, 3, out);
}

/* ---- module --------------------------------------------------------------------------------------- */

static PyMethodDef functions[] = {
    METHOD("argmax", argmax),
    METHOD("sample", sample),
    METHOD("renormalize", renormalize),
    METHOD("mask_logits", mask_logits),
    METHOD("top_k", top_k),
    METHOD("log_probs", log_probs),
    METHOD("verify", verify),
    {NULL, NULL, 0, NULL},
};
static signature *const signatures[] = {
    &argmax_signature, &sample_signature,    &renormalize_signature, &mask_logits_signature,
    &top_k_signature,  &log_probs_signature, &verify_signature,
};

int add_sampling(PyObject *module)
{
    return add_methods(module, functions, signatures);
}
