/* pipe.c - qkv_logits_pipe: an order of stages, checked when it is made, and its parameters by name. A fused
 * pipe is one list of stages.h, run by one kernel; an unfused one runs each stage as a list of its own, from and
 * to rows of f32 that it keeps.
 * SPDX-License-Identifier: Apache-2.0 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ops/sampling/stages.h"

enum { MAX_NAME = 63 };

typedef struct pipe_stage {
    i32 kind, has_default;
    float default_value;
    char value_name[MAX_NAME + 1], tensor_name[MAX_NAME + 1]; /* "": none */
    void (*apply)(const void *block, qi_task task);
} pipe_stage;

/* Stages that one kernel runs. */
typedef struct pipe_list {
    i32 first, end;
    char *header; /* on a GPU the texts of its user stages, NULL without */
    qi_functions functions;
} pipe_list;

struct qkv_logits_pipe {
    qkv_context *ctx;
    pipe_stage stages[MAX_STAGES];
    pipe_list lists[MAX_STAGES];
    i32 num_stages, num_lists, in, out_kind;
    i64 max_batch, max_vocab;
    float *rows; /* [max_batch, max_vocab] between lists, NULL where there is one */
};

/* ---- making ------------------------------------------------------------------------------------ */

static int is_identifier(const char *name)
{
    size_t n = 0;
    if (!isalpha((unsigned char)name[0]) && name[0] != '_') return 0;
    while (isalnum((unsigned char)name[n]) || name[n] == '_') n++;
    return name[n] == '\0' && n <= MAX_NAME;
}

static qkv_status copy_name(char *to, const char *name, i32 stage, const char *field)
{
    to[0] = '\0';
    if (!name) return QKV_OK;
    QI_REQUIRE(is_identifier(name),
               "stages[%d].%s: expected an identifier of at most %d characters", (int)stage, field,
               MAX_NAME);
    snprintf(to, MAX_NAME + 1, "%s", name);
    return QKV_OK;
}

/* Reads stage i, whose rows are of a kind so far; changes that to what the stage gives. */
static qkv_status read_stage(pipe_stage *out, const qkv_stage *from, i32 i, i32 *kind)
{
    qkv_stage s;
    QI_TRY(qi_read_struct(&s, sizeof s, from, "stages"));
    QI_REQUIRE(s.kind >= 0 && s.kind <= STAGE_SAMPLE,
               "stages[%d].kind: expected QKV_STAGE_..., got %d", (int)i, (int)s.kind);
    const stage_info *info = &qi_stage_info[s.kind];
    QI_REQUIRE(*kind != ROW_TOKENS, "stages[%d] (%s): expected sample to be the last stage", (int)i,
               info->name);
    QI_REQUIRE(*kind == ROW_LOGITS ? info->takes_logits : info->takes_probs,
               "stages[%d] (%s): expected %s before it, got %s", (int)i, info->name,
               info->takes_logits ? "logits" : "probabilities (QKV_STAGE_SOFTMAX makes them)",
               *kind == ROW_LOGITS ? "logits" : "probabilities");
    const int user = s.kind == STAGE_USER;
    QI_REQUIRE(user == (s.source != NULL), "stages[%d].source (%s): expected %s", (int)i,
               info->name, user ? "text, got NULL" : "NULL, got text");
    QI_REQUIRE(user || (!s.value_name && !s.tensor_name),
               "stages[%d] (%s): expected names for user stages only", (int)i, info->name);
    QI_REQUIRE(!s.has_default || info->has_value || (user && s.value_name),
               "stages[%d].has_default (%s): expected 0, since it has no value", (int)i,
               info->name);
    *out = (pipe_stage){
        .kind = s.kind, .has_default = s.has_default, .default_value = s.default_value};
    QI_TRY(
        copy_name(out->value_name, info->has_value ? info->name : s.value_name, i, "value_name"));
    QI_TRY(
        copy_name(out->tensor_name, info->tensor ? info->tensor : s.tensor_name, i, "tensor_name"));
    if (s.kind == STAGE_SOFTMAX) *kind = ROW_WEIGHTS;
    if (s.kind == STAGE_SAMPLE) *kind = ROW_TOKENS;
    return QKV_OK;
}

/* The texts of a list's user stages one after the other, each function with its number, and user_stage(), which
 * calls one by number. malloc'ed. */
static char *join_texts(const pipe_list *list, const qkv_stage *stages)
{
    static const char begin[] = "QI_FN float user_stage(int n, float logit, float value, float "
                                "element, int token, int request)\n{\n",
                      end[] = "    return logit;\n}\n";
    size_t bytes = sizeof begin + sizeof end, at = 0;
    int n = 0;
    for (i32 i = list->first; i < list->end; i++)
        if (stages[i].kind == STAGE_USER) bytes += strlen(stages[i].source) + 256;
    char *text = malloc(bytes);
    if (!text) return NULL;
    for (i32 i = list->first; i < list->end; i++)
        if (stages[i].kind == STAGE_USER)
            at +=
                (size_t)snprintf(text + at, bytes - at,
                                 "#define logits_stage logits_stage_%d\n#line 1 \"stage %d\"\n%s\n"
                                 "#undef logits_stage\n",
                                 n++, (int)i, stages[i].source);
    at += (size_t)snprintf(text + at, bytes - at, "%s", begin);
    for (int i = 0; i < n; i++)
        at += (size_t)snprintf(text + at, bytes - at,
                               "    if (n == %d) return logits_stage_%d(logit, value, element, "
                               "token, request);\n",
                               i, i);
    snprintf(text + at, bytes - at, "%s", end);
    return text;
}

/* A list of the pipe for rows of f32, its longest row and values by request, as far as a kernel depends on it. */
static sampling_params shape_of(const qkv_logits_pipe *pipe, const pipe_list *list)
{
    const int last = list->end == pipe->num_stages;
    sampling_params p = {.vocab = pipe->max_vocab,
                         .rows_stride = pipe->max_vocab,
                         .batch = pipe->max_batch,
                         .in = pipe->in};
    for (i32 i = 0; i < list->first; i++)
        if (pipe->stages[i].kind == STAGE_SOFTMAX) p.in = ROW_WEIGHTS;
    p.out_kind = p.in;
    for (i32 i = list->first; i < list->end; i++) {
        p.stages[p.num_stages++] = (sampling_stage){
            .kind = pipe->stages[i].kind,
            .value = {.values = pipe, .step = 1}, /* that there will be some is all that is asked */
        };
        if (pipe->stages[i].kind == STAGE_SOFTMAX) p.out_kind = ROW_WEIGHTS;
    }
    if (p.out_kind == ROW_PROBS) p.out_kind = ROW_WEIGHTS;
    if (last) p.out_kind = pipe->out_kind;
    if (p.out_kind == ROW_TOKENS) p.out_dtype = QI_I32;
    return p;
}

/* On the CPU a text becomes a function of its own; on a GPU those of a list become its kernel, with the stages
 * around them. */
static qkv_status compile(qkv_logits_pipe *pipe, const qkv_stage *stages)
{
    static const char *const name = "user_stage";
    const int on_gpu = pipe->ctx->device.device_type == kDLCUDA;
    for (pipe_list *list = pipe->lists; list < pipe->lists + pipe->num_lists; list++) {
        int any = 0;
        for (i32 i = list->first; i < list->end; i++) {
            if (stages[i].kind != STAGE_USER) continue;
            any = 1;
            const qi_source source = {.what = "user stage",
                                      .main = "ops/sampling/user_stage.cpu.c",
                                      .defines = "",
                                      .header = stages[i].source};
            if (!on_gpu) QI_TRY(qi_compile(pipe->ctx, &source, &name, 1, &pipe->stages[i].apply));
        }
        if (!any || !on_gpu) continue;
        list->header = join_texts(list, stages);
        if (!list->header) QI_FAIL(QKV_ERR_MEMORY, "pipe: out of memory");
        const stage_texts texts = {.functions = &list->functions, .header = list->header};
        const sampling_params p = shape_of(pipe, list);
        QI_TRY(qi_stages_compile(pipe->ctx, &p, &texts));
    }
    return QKV_OK;
}

static size_t rows_bytes(const qkv_logits_pipe *pipe)
{
    return (size_t)pipe->max_batch * (size_t)pipe->max_vocab * sizeof(float);
}

static qkv_status allocate(qkv_logits_pipe *pipe)
{
    const qkv_allocator *mem = &pipe->ctx->allocator;
    if (pipe->num_lists == 1 || rows_bytes(pipe) == 0) return QKV_OK;
    if (pipe->ctx->device.device_type == kDLCUDA)
        return qi_cuda_alloc(&pipe->ctx->cuda, rows_bytes(pipe), (void **)&pipe->rows);
    pipe->rows = mem->alloc(mem->user, rows_bytes(pipe), 64);
    if (!pipe->rows) QI_FAIL(QKV_ERR_MEMORY, "pipe: out of memory for its rows");
    return QKV_OK;
}

void qkv_logits_pipe_destroy(qkv_logits_pipe *pipe)
{
    if (!pipe) return;
    const qkv_allocator mem = pipe->ctx->allocator;
    if (pipe->rows && pipe->ctx->device.device_type == kDLCUDA)
        qi_cuda_free(&pipe->ctx->cuda, pipe->rows);
    else if (pipe->rows)
        mem.free(mem.user, pipe->rows, rows_bytes(pipe));
    for (i32 i = 0; i < pipe->num_lists; i++) {
        free(pipe->lists[i].header);
        qi_functions_free(&pipe->lists[i].functions);
    }
    mem.free(mem.user, pipe, sizeof *pipe);
}

static qkv_status read_spec(qkv_logits_pipe *pipe, const qkv_logits_pipe_spec *spec)
{
    QI_REQUIRE(spec->num_stages >= 1 && spec->num_stages <= MAX_STAGES,
               "num_stages: expected 1 to %d, got %d", MAX_STAGES, (int)spec->num_stages);
    QI_REQUIRE(spec->stages, "stages: expected %d stages, got NULL", (int)spec->num_stages);
    QI_REQUIRE(spec->kind == QKV_LOGITS || spec->kind == QKV_PROBS,
               "kind: expected QKV_LOGITS or QKV_PROBS, got %d", (int)spec->kind);
    QI_REQUIRE(spec->max_vocab >= 1 && spec->max_vocab <= QKV_MAX_VOCAB,
               "max_vocab: expected 1 to %d, got %lld", QKV_MAX_VOCAB, (long long)spec->max_vocab);
    QI_REQUIRE(spec->max_batch >= 0 && spec->max_batch <= INT32_MAX,
               "max_batch: expected 0 to %d, got %lld", INT32_MAX, (long long)spec->max_batch);
    pipe->num_stages = spec->num_stages;
    pipe->in = spec->kind;
    pipe->max_batch = spec->max_batch;
    pipe->max_vocab = spec->max_vocab;
    i32 kind = spec->kind;
    for (i32 i = 0; i < spec->num_stages; i++)
        QI_TRY(read_stage(&pipe->stages[i], &spec->stages[i], i, &kind));
    pipe->out_kind = kind == ROW_WEIGHTS ? ROW_PROBS : kind;
    pipe->num_lists = spec->unfused ? spec->num_stages : 1;
    for (i32 i = 0; i < pipe->num_lists; i++) {
        pipe->lists[i].first = i;
        pipe->lists[i].end = spec->unfused ? i + 1 : spec->num_stages;
        qi_functions_init(&pipe->lists[i].functions);
    }
    return QKV_OK;
}

qkv_status qkv_logits_pipe_create(qkv_context *ctx, const qkv_logits_pipe_spec *spec,
                                  qkv_logits_pipe **out)
{
    QI_REQUIRE_CONTEXT(ctx);
    QI_REQUIRE(out, "pipe: expected a place for it, got NULL");
    *out = NULL;
    qkv_logits_pipe_spec s;
    QI_TRY(qi_read_struct(&s, sizeof s, spec, "spec"));
    qkv_logits_pipe *pipe = ctx->allocator.alloc(ctx->allocator.user, sizeof *pipe, 64);
    if (!pipe) QI_FAIL(QKV_ERR_MEMORY, "pipe: out of memory");
    *pipe = (qkv_logits_pipe){.ctx = ctx};
    qkv_status status;
    QI_TRY_OR(read_spec(pipe, &s), fail);
    QI_TRY_OR(compile(pipe, s.stages), fail);
    QI_TRY_OR(allocate(pipe), fail);
    *out = pipe;
    return QKV_OK;
fail:
    qkv_logits_pipe_destroy(pipe);
    return status;
}

/* ---- running ----------------------------------------------------------------------------------- */

typedef struct pipe_run {
    const qkv_named_tensor *params;
    i32 num_params;
} pipe_run;

/* NULL: not given. */
static const DLTensor *given(const pipe_run *run, const char *name)
{
    for (i32 i = 0; i < run->num_params; i++)
        if (strcmp(run->params[i].name, name) == 0) return run->params[i].tensor;
    return NULL;
}

static int stage_has(const pipe_stage *s, const char *name)
{
    return strcmp(name, s->value_name) == 0 || strcmp(name, s->tensor_name) == 0 ||
           (s->kind == STAGE_REPETITION && strcmp(name, "prompt") == 0) ||
           (s->kind == STAGE_SAMPLE && (strcmp(name, "seed") == 0 || strcmp(name, "offset") == 0));
}

static qkv_status check_names(const qkv_logits_pipe *pipe, const pipe_run *run)
{
    for (i32 i = 0; i < run->num_params; i++) {
        const char *name = run->params[i].name;
        QI_REQUIRE(name && run->params[i].tensor,
                   "params[%d]: expected a name and a tensor, got NULL", (int)i);
        int found = strcmp(name, "indices") == 0 || strcmp(name, "valid") == 0;
        for (i32 s = 0; s < pipe->num_stages; s++) found |= stage_has(&pipe->stages[s], name);
        QI_REQUIRE(found, "params[%d]: expected a parameter of the pipe's stages, got %s", (int)i,
                   name);
        for (i32 other = 0; other < i; other++)
            QI_REQUIRE(strcmp(run->params[other].name, name) != 0,
                       "params[%d]: expected each name once, got %s again", (int)i, name);
    }
    return QKV_OK;
}

/* Adds stage i of the pipe with what the run gives for it. */
static qkv_status add_stage(const qkv_logits_pipe *pipe, i32 i, const pipe_run *run,
                            sampling_params *p)
{
    const pipe_stage *s = &pipe->stages[i];
    stage_tensors t = {.value_name = s->value_name, .tensor_name = s->tensor_name};
    float real = s->default_value;
    int32_t whole = real >= 0x1p31f ? INT32_MAX
                    : real >= 0     ? (int32_t)real
                                    : -1; /* -1 is refused */
    const int counts = s->kind == STAGE_TOP_K;
    int64_t one = 1;
    const DLTensor by_default = {.data = counts ? (void *)&whole : (void *)&real,
                                 .device = {kDLCPU, 0},
                                 .ndim = 1,
                                 .dtype = counts ? QKV_I32 : QKV_F32,
                                 .shape = &one};
    if (s->value_name[0]) {
        t.value = given(run, s->value_name);
        QI_REQUIRE(t.value || s->has_default, "%s: expected a tensor, since it has no default",
                   s->value_name);
        if (!t.value) t.value = &by_default;
    }
    if (s->tensor_name[0]) {
        t.tensor = given(run, s->tensor_name);
        QI_REQUIRE(t.tensor || s->kind == STAGE_REPETITION, "%s: expected a tensor, got none",
                   s->tensor_name);
    }
    if (s->kind == STAGE_REPETITION) t.prompt = given(run, "prompt");
    QI_TRY(qi_stages_add(p, s->kind, &t));
    p->stages[p->num_stages - 1].apply = s->apply;
    if (s->kind != STAGE_SAMPLE) return QKV_OK;
    QI_REQUIRE(given(run, "seed"), "seed: expected a tensor, got none");
    QI_TRY(qi_request_values(&p->seed, given(run, "seed"), "seed", QKV_U64, p->batch));
    return qi_request_values(&p->offset, given(run, "offset"), "offset", QKV_U64, p->batch);
}

/* What a run writes shares no memory with what it reads by name. */
static qkv_status check_apart(const pipe_run *run, const DLTensor *out)
{
    for (i32 i = 0; i < run->num_params; i++)
        QI_REQUIRE(run->params[i].tensor == out || !qi_overlap(out, run->params[i].tensor),
                   "%s: expected memory apart from what is written, got an overlap",
                   run->params[i].name);
    return QKV_OK;
}

/* One list of the pipe, from rows of a kind to out. */
static qkv_status run_list(qkv_logits_pipe *pipe, pipe_list *list, const pipe_run *run,
                           const DLTensor *rows, i32 in, DLTensor *out, i32 out_kind, void *stream)
{
    const int first = list->first == 0;
    sampling_params p;
    DLTensor *valid = (DLTensor *)given(run, "valid"); /* the one that is written */
    QI_TRY(qi_stages_begin(&p, rows, in, first ? given(run, "indices") : NULL, valid));
    QI_REQUIRE(!valid || !qi_overlap(valid, out),
               "valid: expected memory apart from out, got an overlap");
    p.valid_so_far = !first;
    for (i32 i = list->first; i < list->end; i++) QI_TRY(add_stage(pipe, i, run, &p));
    QI_TRY(qi_stages_out(&p, rows, out, "out", out_kind));
    const stage_texts texts = {.functions = &list->functions, .header = list->header};
    return qi_stages_launch(pipe->ctx, &p, list->header ? &texts : NULL, stream);
}

qkv_status qkv_logits_pipe_run(qkv_logits_pipe *pipe, DLTensor *out, const DLTensor *rows,
                               const qkv_named_tensor *params, int32_t num_params, void *stream)
{
    QI_REQUIRE(pipe, "pipe: expected a pipe, got NULL");
    QI_REQUIRE_CONTEXT(pipe->ctx);
    QI_REQUIRE(num_params >= 0 && (num_params == 0 || params),
               "params: expected num_params names and tensors, got NULL");
    const pipe_run run = {.params = params, .num_params = num_params};
    QI_TRY(check_names(pipe, &run));
    QI_TRY(qi_expect_float(rows, "rows", QI_SHAPE(QI_ANY, QI_ANY)));
    QI_REQUIRE(rows->shape[1] <= pipe->max_vocab,
               "rows: expected a vocab of at most max_vocab %lld, got %lld",
               (long long)pipe->max_vocab, (long long)rows->shape[1]);
    const DLTensor *indices = given(&run, "indices");
    int64_t shape[2] = {rows->shape[0], rows->shape[1]};
    if (indices && indices->ndim == 1 && indices->shape) shape[0] = indices->shape[0];
    QI_REQUIRE(pipe->num_lists == 1 || shape[0] <= pipe->max_batch,
               "rows: expected a batch of at most max_batch %lld, got %lld",
               (long long)pipe->max_batch, (long long)shape[0]);
    DLTensor between = {.data = pipe->rows,
                        .device = pipe->ctx->device,
                        .ndim = 2,
                        .dtype = QKV_F32,
                        .shape = shape};
    QI_TRY(check_apart(&run, out));
    if (given(&run, "valid")) QI_TRY(check_apart(&run, given(&run, "valid")));
    for (i32 i = 0; i < pipe->num_lists; i++) {
        const int last = i + 1 == pipe->num_lists;
        const sampling_params of_list = shape_of(pipe, &pipe->lists[i]);
        QI_TRY(run_list(pipe, &pipe->lists[i], &run, i == 0 ? rows : &between, of_list.in,
                        last ? out : &between, of_list.out_kind, stream));
    }
    return QKV_OK;
}
