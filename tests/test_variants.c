/* test_variants.c - the fragments of examples/variants/, and some that use every hook and parameter,
 * compiled, run on every CPU level over small random batches, and compared with their formulas in
 * double.
 *
 * QKV_TEST_CASES=n tries n specs of each fragment.
 * SPDX-License-Identifier: Apache-2.0 */
#include "variant_case.h"

#define PICK(...)                                                                                  \
    ((const int32_t[]){__VA_ARGS__}[test_below(                                                    \
        (int64_t)(sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t)))])

/* ---- contexts: every level of this machine ------------------------------------------------- */

enum { MAX_CONTEXTS = 8 };
static qkv_context *contexts[MAX_CONTEXTS];
static int num_contexts;
static char cache_dir[256];
static progress compiled;

static int open_contexts(void **state)
{
    (void)state;
    int32_t usable;
    const char *level;
    folder_new(cache_dir);
    for (int32_t i = 0; (level = test_level(i, &usable)); i++) {
        if (usable)
            contexts[num_contexts++] = context_on(level, PICK(1, 2, 5), cache_dir, &compiled);
        else
            printf("skipped: this machine cannot run %s\n", level);
    }
    return num_contexts > 0 ? 0 : -1;
}

static int close_contexts(void **state)
{
    (void)state;
    for (int i = 0; i < num_contexts; i++) qkv_context_destroy(contexts[i]);
    folder_free(cache_dir);
    printf("%d kernels compiled in %.1f s\n", compiled.ended, (double)compiled.ms * 1e-3);
    return 0;
}

/* ---- values of the examples' parameters ---------------------------------------------------- */

static double *random_array(int64_t n, double scale, double offset)
{
    double *x = case_memory(n, sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (double)(float)(test_uniform(scale) + offset);
    return x;
}

static ref_values values_new(const qkv_attention_spec *spec)
{
    const int64_t heads = spec->num_qo_heads;
    ref_values v = {.bias = (double)(float)test_uniform(3),
                    .cap = (double)(float)(3 + test_uniform(2)),
                    .theta = PICK(10000, 500000, 100),
                    .head_dim = spec->head_dim_qk,
                    .max_distance = PICK(0, 1, 30, 200),
                    .sink_tokens = PICK(0, 1, 4, 40),
                    .window = PICK(1, 2, 17, 100),
                    .positions = MAX_KV_LEN,
                    .nodes = MAX_QO_LEN};
    v.slopes = random_array(heads, 0.1, 0.1);
    v.sink = random_array(heads, 4, 0);
    v.table = random_array(heads * (2 * v.max_distance + 1), 3, 0);
    v.document = random_array(MAX_REQUESTS * v.positions, 0, 0);
    for (int64_t i = 1; i < MAX_REQUESTS * v.positions; i++)
        v.document[i] = v.document[i - 1] + (double)(test_below(25) == 0);
    v.tree = random_array(MAX_REQUESTS * v.nodes * v.nodes, 0, 0);
    for (int64_t i = 0; i < MAX_REQUESTS * v.nodes; i++) { /* node i % nodes of request i / nodes */
        double *row = v.tree + i * v.nodes;
        const int64_t node = i % v.nodes, parent = node ? test_below(node) : -1;
        if (parent >= 0)
            memcpy(row, row - (node - parent) * v.nodes, (size_t)v.nodes * sizeof *row);
        row[node] = 1;
    }
    return v;
}

static void values_free(ref_values *v)
{
    free(v->slopes), free(v->sink), free(v->table), free(v->document), free(v->tree);
}

/* ---- the examples -------------------------------------------------------------------------- */

static void bind_sigmoid(arguments *a, const ref_values *v, int64_t heads)
{
    (void)heads;
    add_f32(a, "bias", v->bias);
}

static void bind_soft_cap(arguments *a, const ref_values *v, int64_t heads)
{
    (void)heads;
    add_f32(a, "cap", v->cap);
}

static void bind_alibi(arguments *a, const ref_values *v, int64_t heads)
{
    add_tensor(a, "slopes", QKV_F32, TEST_SHAPE(heads), v->slopes);
}

static void bind_sink(arguments *a, const ref_values *v, int64_t heads)
{
    add_tensor(a, "sink", QKV_F32, TEST_SHAPE(heads), v->sink);
}

static void bind_document_mask(arguments *a, const ref_values *v, int64_t heads)
{
    (void)heads;
    add_tensor(a, "document", QKV_I32, TEST_SHAPE(MAX_REQUESTS, v->positions), v->document);
}

static void bind_relative_bias(arguments *a, const ref_values *v, int64_t heads)
{
    add_tensor(a, "table", QKV_F32, TEST_SHAPE(heads, 2 * v->max_distance + 1), v->table);
    add_i32(a, "max_distance", v->max_distance);
}

static void bind_streaming(arguments *a, const ref_values *v, int64_t heads)
{
    (void)heads;
    add_i32(a, "sink_tokens", v->sink_tokens);
    add_i32(a, "window", v->window);
}

static void bind_tree_mask(arguments *a, const ref_values *v, int64_t heads)
{
    (void)heads;
    add_tensor(a, "tree", QKV_I32, TEST_SHAPE(MAX_REQUESTS, v->nodes, v->nodes), v->tree);
}

static void bind_rope(arguments *a, const ref_values *v, int64_t heads)
{
    (void)heads;
    add_f32(a, "theta", v->theta);
    add_i32(a, "head_dim", v->head_dim);
}

/* The built-in feature that an example says it is the same as. */
typedef enum builtin { NOTHING, SOFT_CAP, ALIBI, SINK, ROPE, ROPE_INTERLEAVED } builtin;

static const struct example {
    const char *name;
    void (*bind)(arguments *a, const ref_values *v, int64_t heads);
    builtin same_as;
    int num_hooks; /* that run in loops */
} examples[] = {
    {"sigmoid", bind_sigmoid, NOTHING, 1},
    {"soft_cap", bind_soft_cap, SOFT_CAP, 1},
    {"alibi", bind_alibi, ALIBI, 1},
    {"sink", bind_sink, SINK, 0},
    {"document_mask", bind_document_mask, NOTHING, 1},
    {"relative_bias", bind_relative_bias, NOTHING, 1},
    {"streaming", bind_streaming, NOTHING, 1},
    {"tree_mask", bind_tree_mask, NOTHING, 1},
    {"rope", bind_rope, ROPE, 2},
    {"rope_interleaved", bind_rope, ROPE_INTERLEAVED, 2},
};
enum { NUM_EXAMPLES = sizeof examples / sizeof *examples };

/* The text of examples/variants/NAME.h. */
static char *read_example(const char *name)
{
    static char text[16384];
    char path[1024];
    snprintf(path, sizeof path, "%s/%s.h", QKV_VARIANTS_DIR, name);
    FILE *f = fopen(path, "r");
    if (!f) fail_msg("cannot read %s", path);
    const size_t n = fread(text, 1, sizeof text - 1, f);
    assert_true(n > 0 && n < sizeof text - 1);
    fclose(f);
    text[n] = 0;
    return text;
}

/* ---- problems ------------------------------------------------------------------------------ */

static DLDataType any_float(void)
{
    const DLDataType types[] = {QKV_F32, QKV_BF16, QKV_F16};
    return types[test_below(3)];
}

/* A fragment is compiled for its head dims: all of its specs have these, for compiling takes longer
 * than all else here. */
typedef struct head_dims {
    int32_t qk, vo;
} head_dims;

static head_dims any_head_dims(void)
{
    const int32_t dim = PICK(64, 128, 40);
    return (head_dims){dim, test_below(4) ? dim : PICK(64, 128, 40, 8)};
}

/* number: of the spec among those of a fragment; the first three try each dtype of the cache. */
static qkv_attention_spec any_spec(int64_t number, head_dims dims)
{
    const DLDataType caches[] = {QKV_F32, QKV_BF16, QKV_F16};
    qkv_attention_spec s = {QKV_ATTENTION_SPEC_INIT};
    s.num_kv_heads = PICK(1, 2, 3);
    s.num_qo_heads = s.num_kv_heads * PICK(1, 2, 4, 5);
    s.head_dim_qk = dims.qk;
    s.head_dim_vo = dims.vo;
    s.page_size = PICK(0, 1, 3, 16, 16, 64);
    s.kv_layout = PICK(QKV_NHD, QKV_HND);
    s.mask = PICK(QKV_MASK_NONE, QKV_MASK_CAUSAL);
    s.dtype_kv = number < 3 ? caches[number] : any_float();
    s.dtype_q = test_below(2) ? s.dtype_kv : any_float();
    s.dtype_o = test_below(2) ? s.dtype_q : any_float();
    s.sm_scale = (float)(0.2 + test_uniform(0.1));
    if (test_below(4) == 0) {
        s.features |= QKV_FEATURE_SOFT_CAP;
        s.logits_soft_cap = (float)(5 + test_uniform(2));
    }
    if (test_below(4) == 0) {
        s.features |= QKV_FEATURE_WINDOW;
        s.window_left = PICK(-1, 10, 100);
        s.window_right = PICK(-1, 0, 20);
    }
    return s;
}

static int64_t num_specs(int64_t n)
{
    const char *text = getenv("QKV_TEST_CASES");
    return text ? strtoll(text, NULL, 0) : n;
}

enum { NUM_CASES = 5 };
typedef struct problem {
    variant_case cases[NUM_CASES];
    qkv_attention_limits limits;
    int num_cases;
} problem;

/* Decode, prefill, mixed; and two of several levels, which need a softmax. */
static problem *problem_new(const qkv_attention_spec *spec, const ref_variant *variant,
                            const ref_values *values, bool strange)
{
    problem *p = case_memory(1, sizeof *p);
    p->limits = case_limits();
    p->num_cases = variant->no_softmax ? 3 : NUM_CASES;
    if (variant->no_softmax) p->limits.max_levels = 1;
    for (int i = 0; i < p->num_cases; i++) {
        variant_case *c = &p->cases[i];
        const batch_kind kinds[NUM_CASES] = {DECODE, PREFILL, MIXED, DECODE, MIXED};
        case_build(c, spec, kinds[i], i < 3 ? 1 : 2, strange);
        if (variant->no_softmax) c->io.lse = NULL;
        case_refer(c, variant, values);
    }
    return p;
}

static void problem_free(problem *p)
{
    for (int i = 0; i < p->num_cases; i++) case_free(&p->cases[i]);
    free(p);
}

/* All cases on every level. io: what they take beside their tensors. */
static void try_problem(problem *p, const qkv_attention_spec *spec, const ref_variant *variant,
                        const qkv_attention_io *io, const char *what)
{
    for (int i = 0; i < num_contexts; i++) {
        char who[128];
        const char *device = qkv_context_device_name(contexts[i]);
        snprintf(who, sizeof who, "%s, %s, on %s", variant->name, what, device);
        qkv_attention *op;
        EXPECT_OK(qkv_attention_create(contexts[i], spec, &p->limits, NULL, &op));
        for (int j = 0; j < p->num_cases; j++) {
            variant_case *c = &p->cases[j];
            c->io.args = io->args;
            c->io.num_args = io->num_args;
            c->io.sink = io->sink;
            c->io.alibi_slopes = io->alibi_slopes;
            case_try(c, op, variant, who, device);
        }
        qkv_attention_destroy(op);
    }
}

/* spec with the built-in instead of the variant. */
static void try_builtin(problem *p, const struct example *example, const qkv_attention_spec *spec,
                        const ref_values *v)
{
    qkv_attention_spec s = *spec;
    s.variant = NULL;
    const qkv_rope_spec rope = {QKV_ROPE_SPEC_INIT, .theta = (float)v->theta,
                                .interleaved = example->same_as == ROPE_INTERLEAVED};
    const double *per_head = example->same_as == SINK ? v->sink : v->slopes;
    float numbers[64];
    for (int32_t h = 0; h < s.num_qo_heads; h++) numbers[h] = (float)per_head[h];
    const DLTensor *tensor = TENSOR(numbers, QKV_F32, s.num_qo_heads);
    qkv_attention_io io = {QKV_ATTENTION_IO_INIT};
    switch (example->same_as) {
    case SOFT_CAP:
        s.features |= QKV_FEATURE_SOFT_CAP;
        s.logits_soft_cap = (float)v->cap;
        break;
    case ALIBI:
        s.features |= QKV_FEATURE_ALIBI;
        io.alibi_slopes = tensor;
        break;
    case SINK:
        s.flags |= QKV_ATTENTION_HAS_SINK;
        io.sink = tensor;
        break;
    default:
        s.features |= QKV_FEATURE_ROPE;
        s.rope = &rope;
        break;
    }
    try_problem(p, &s, ref_variant_of(example->name), &io, "built in");
}

static void try_example(const struct example *example, int64_t number, head_dims dims)
{
    qkv_attention_spec spec = any_spec(number, dims);
    if (example->same_as == SOFT_CAP) { /* two caps are not one */
        spec.features &= ~QKV_FEATURE_SOFT_CAP;
        spec.logits_soft_cap = 0;
    }
    ref_values values = values_new(&spec);
    arguments args = {0};
    example->bind(&args, &values, spec.num_qo_heads);
    const qkv_variant variant = variant_with(example->name, read_example(example->name), &args);
    problem *p = problem_new(&spec, ref_variant_of(example->name), &values, false);

    spec.variant = &variant;
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .args = args.args, .num_args = args.num};
    try_problem(p, &spec, ref_variant_of(example->name), &io, "variant");
    if (example->same_as != NOTHING) try_builtin(p, example, &spec, &values);
    problem_free(p);
    arguments_free(&args);
    values_free(&values);
}

static void variants_examples_agree_with_their_formulas(void **state)
{
    (void)state;
    for (int i = 0; i < NUM_EXAMPLES; i++) {
        const head_dims dims = any_head_dims();
        for (int64_t n = 0; n < num_specs(6); n++) try_example(&examples[i], n, dims);
    }
}

/* ---- every hook at once -------------------------------------------------------------------- */

/* A number 0 .. 63 that depends on each field of a position: if one is wrong, it is. */
#define CODE(pos, salt)                                                                            \
    (((pos).request * 3 + (pos).qo_head * 5 + (pos).kv_head * 7 + (pos).qo_pos * 11 +              \
      (pos).kv_pos * 13 + (pos).qo_idx * 17 + (pos).qo_len * 19 + (pos).kv_len * 23 + (salt)) &    \
     63)

static const char every_hook[] =
    "QI_FN int position_code(qi_pos p, int salt)\n"
    "{\n"
    "    return (p.request * 3 + p.qo_head * 5 + p.kv_head * 7 + p.qo_pos * 11 + p.kv_pos * 13 +\n"
    "            p.qo_idx * 17 + p.qo_len * 19 + p.kv_len * 23 + salt) & 63;\n"
    "}\n"
    "#define VARIANT_QUERY 1\n"
    "QI_FN qi_pair variant_query(const variant_params *v, qi_pos pos, int dim, qi_pair x)\n"
    "{\n"
    "    const float f = 0.5f + (float)position_code(pos, dim) / 64.f;\n"
    "    const qi_pair changed = {x.y * f, x.x - x.y};\n"
    "    (void)v;\n"
    "    return changed;\n"
    "}\n"
    "#define VARIANT_KEY 1\n"
    "QI_FN qi_pair variant_key(const variant_params *v, qi_pos pos, int dim, qi_pair x)\n"
    "{\n"
    "    const int salt = pos.kv_pos * 13 + pos.kv_head * 7 + dim;\n"
    "    const qi_pair changed = {x.x - x.y, x.x * (float)(salt & 63) / 64.f};\n"
    "    (void)v;\n"
    "    return changed;\n"
    "}\n"
    "#define VARIANT_LOGIT 1\n"
    "QI_FN float variant_logit(const variant_params *v, qi_pos pos, float logit)\n"
    "{\n"
    "    return logit * 0.5f + (float)position_code(pos, 1) / 32.f * v->bias;\n"
    "}\n"
    "#define VARIANT_MASK 1\n"
    "QI_FN int variant_mask(const variant_params *v, qi_pos pos)\n"
    "{\n"
    "    (void)v;\n"
    "    return position_code(pos, 2) & 22;\n" /* any nonzero number keeps */
    "}\n"
    "#define VARIANT_STATE 1\n"
    "QI_FN float variant_state(const variant_params *v, qi_pos pos)\n"
    "{\n"
    "    return (float)position_code(pos, 3) / 16.f - v->cap;\n"
    "}\n"
    "#define VARIANT_OUTPUT 1\n"
    "QI_FN float variant_output(const variant_params *v, qi_pos pos, int dim, float o)\n"
    "{\n"
    "    return o * (float)position_code(pos, dim) / 32.f + v->bias;\n"
    "}\n";

static void twist_query(const ref_pos *pos, double *a, double *b, int64_t dim)
{
    const double x = *a, y = *b;
    *a = y * (0.5 + (double)CODE(*pos, dim) / 64);
    *b = x - y;
}

static void twist_key(const ref_pos *pos, double *a, double *b, int64_t dim)
{
    const double x = *a, y = *b;
    *a = x - y;
    *b = x * (double)((pos->kv_pos * 13 + pos->kv_head * 7 + dim) & 63) / 64;
}

static void every_query(const ref_values *v, const ref_pos *pos, double *x, int64_t dim)
{
    (void)v;
    for (int64_t d = 0; d < dim; d += 2) twist_query(pos, &x[d], &x[d + 1], d);
}

static void every_key(const ref_values *v, const ref_pos *pos, double *x, int64_t dim)
{
    (void)v;
    for (int64_t d = 0; d < dim; d += 2) twist_key(pos, &x[d], &x[d + 1], d);
}

static void every_query_half(const ref_values *v, const ref_pos *pos, double *x, int64_t dim)
{
    (void)v;
    for (int64_t d = 0; d < dim / 2; d++) twist_query(pos, &x[d], &x[d + dim / 2], d);
}

static void every_key_half(const ref_values *v, const ref_pos *pos, double *x, int64_t dim)
{
    (void)v;
    for (int64_t d = 0; d < dim / 2; d++) twist_key(pos, &x[d], &x[d + dim / 2], d);
}

static double every_logit(const ref_values *v, const ref_pos *pos, double x)
{
    return x / 2 + (double)CODE(*pos, 1) / 32 * v->bias;
}

static bool every_mask(const ref_values *v, const ref_pos *pos)
{
    (void)v;
    return (CODE(*pos, 2) & 22) != 0;
}

static double every_state(const ref_values *v, const ref_pos *pos)
{
    return (double)CODE(*pos, 3) / 16 - v->cap;
}

static double every_output(const ref_values *v, const ref_pos *pos, int64_t dim, double o)
{
    return o * (double)CODE(*pos, dim) / 32 + v->bias;
}

static void variants_hooks_work_together(void **state)
{
    (void)state;
    static const struct {
        const char *name, *first; /* what stands before every_hook */
        bool half, no_softmax;
    } rows[] = {
        {"every_hook", "", false, false},
        {"every_hook_half", "#define VARIANT_PAIR_HALF 1\n#define VARIANT_NO_SOFTMAX 1\n", true,
         true},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const ref_variant ref = {.name = rows[i].name,
                                 .query = rows[i].half ? every_query_half : every_query,
                                 .key = rows[i].half ? every_key_half : every_key,
                                 .logit = every_logit,
                                 .mask = every_mask,
                                 .state = every_state,
                                 .output = every_output,
                                 .no_softmax = rows[i].no_softmax,
                                 .gain = 2};
        char text[4096];
        snprintf(text, sizeof text, "%s%s", rows[i].first, every_hook);
        const head_dims dims = any_head_dims();
        for (int64_t n = 0; n < num_specs(6); n++) {
            qkv_attention_spec spec = any_spec(n, dims);
            ref_values values = values_new(&spec);
            arguments args = {0};
            add_f32(&args, "bias", values.bias);
            add_f32(&args, "cap", values.cap);
            const qkv_variant variant = variant_with(rows[i].name, text, &args);
            problem *p = problem_new(&spec, &ref, &values, true);
            spec.variant = &variant;
            const qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .args = args.args,
                                         .num_args = args.num};
            try_problem(p, &spec, &ref, &io, "variant");
            problem_free(p);
            arguments_free(&args);
            values_free(&values);
        }
    }
}

/* ---- parameters ---------------------------------------------------------------------------- */

static const char sum_of_params[] =
    "#define VARIANT_OUTPUT 1\n"
    "QI_FN float variant_output(const variant_params *v, qi_pos pos, int dim, float o)\n"
    "{\n"
    "    const int a = dim % 2, b = dim % 3, c = dim % 5;\n"
    "    float sum = v->number + (float)v->whole;\n"
    "    sum += v->f32.data[a * v->f32.stride[0] + b * v->f32.stride[1] + c * v->f32.stride[2] +\n"
    "                       a * v->f32.stride[3]];\n"
    "    sum += (float)v->i32.data[c * v->i32.stride[0]];\n"
    "    sum += (float)v->i64.data[b * v->i64.stride[0] + c * v->i64.stride[1]];\n"
    "    sum += (float)v->u8.data[c * v->u8.stride[0] + a * v->u8.stride[1] + b * "
    "v->u8.stride[2]];\n"
    "    sum += (float)v->i8.data[c * v->i8.stride[0]] * v->last;\n"
    "    (void)pos, (void)o;\n"
    "    return sum;\n"
    "}\n";

/* Small whole numbers: sums of them are exact. */
static void whole_numbers(double *x, int64_t n, int64_t low, int64_t high)
{
    for (int64_t i = 0; i < n; i++) x[i] = (double)(low + test_below(high - low + 1));
}

static void variants_take_parameters_of_every_type(void **state)
{
    (void)state;
    enum { DIM = 64 };
    qkv_attention_spec spec = {QKV_ATTENTION_SPEC_INIT, .num_qo_heads = 1,  .num_kv_heads = 1,
                               .head_dim_qk = DIM,      .head_dim_vo = DIM, .dtype_q = QKV_F32,
                               .dtype_kv = QKV_F32,     .dtype_o = QKV_F32, .sm_scale = 1.f};
    double f32[2][3][5][2], i32[5], i64[3][5], u8[5][2][3], i8[5];
    const double number = (double)test_below(100) / 8, whole = (double)test_below(1000) - 500;
    whole_numbers(&f32[0][0][0][0], 60, -1000, 1000);
    whole_numbers(i32, 5, -100000, 100000);
    whole_numbers(&i64[0][0], 15, -100000, 100000);
    whole_numbers(&u8[0][0][0], 30, 0, 255);
    whole_numbers(i8, 5, -128, 127);
    arguments args = {0};
    add_f32(&args, "number", number);
    add_tensor(&args, "f32", QKV_F32, TEST_SHAPE(2, 3, 5, 2), &f32[0][0][0][0]);
    add_i32(&args, "whole", (int64_t)whole);
    add_tensor(&args, "i32", QKV_I32, TEST_SHAPE(5), i32);
    add_tensor(&args, "i64", QKV_I64, TEST_SHAPE(3, 5), &i64[0][0]);
    add_tensor(&args, "u8", QKV_U8, TEST_SHAPE(5, 2, 3), &u8[0][0][0]);
    add_tensor(&args, "i8", QKV_I8, TEST_SHAPE(5), i8);
    add_f32(&args, "last", 2);
    const qkv_variant variant = variant_with("sum_of_params", sum_of_params, &args);
    spec.variant = &variant;

    variant_case c;
    case_build(&c, &spec, DECODE, 1, false);
    c.io.args = args.args, c.io.num_args = args.num;
    c.io.o_scale = (qkv_scale){0};
    const qkv_attention_limits limits = case_limits();
    for (int i = 0; i < num_contexts; i++) {
        qkv_attention *op;
        EXPECT_OK(qkv_attention_create(contexts[i], &spec, &limits, NULL, &op));
        EXPECT_OK(qkv_attention_plan(op, &c.batch, NULL));
        EXPECT_OK(qkv_attention_run(op, &c.io, NULL));
        for (int64_t n = 0; n < (int64_t)c.tokens * DIM; n++) {
            const int64_t d = n % DIM, x = d % 2, y = d % 3, z = d % 5;
            const double want =
                number + whole + f32[x][y][z][x] + i32[z] + i64[y][z] + u8[z][x][y] + i8[z] * 2;
            assert_true((double)((const float *)c.o_tensor.owned)[n] == want);
        }
        qkv_attention_destroy(op);
    }
    case_free(&c);
    arguments_free(&args);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(variants_examples_agree_with_their_formulas),
        cmocka_unit_test(variants_hooks_work_together),
        cmocka_unit_test(variants_take_parameters_of_every_type),
    };
    return cmocka_run_group_tests_name("variants", tests, open_contexts, close_contexts);
}
