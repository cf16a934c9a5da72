/* test_attention_io_errors.c - run names the tensor or parameter that is wrong, writes nothing, and
 * the operator goes on to work.
 * SPDX-License-Identifier: Apache-2.0 */
#include "attention_errors.h"

/* The call fails about name, and nothing was written. */
static void expect_run_refusal(attn_case *a, qkv_attention *op, const qkv_attention_io *io,
                               const char *why, const char *name)
{
    expect_refusal(why, qkv_attention_run(op, io, NULL), QKV_ERR_INVALID, name);
    case_expect_poison(&a->o, "o");
    case_expect_poison(&a->lse, "lse");
}

static void attention_run_names_the_wrong_tensor(void **state)
{
    (void)state;
    static const struct {
        char tensor; /* q k v o, l for lse */
        fault what;
        int64_t by;
    } rows[] = {
        {'q', ABSENT, 0},  {'q', AXIS_0, -1}, {'q', AXIS_0, -13}, {'q', AXIS_1, -1},
        {'q', AXIS_1, 1},  {'q', AXIS_2, -8}, {'q', AXIS_2, 8},   {'k', ABSENT, 0},
        {'k', AXIS_0, -9}, {'k', AXIS_1, -1}, {'k', AXIS_1, 1},   {'k', AXIS_2, -1},
        {'k', AXIS_2, 2},  {'k', AXIS_3, -8}, {'k', AXIS_3, 8},   {'v', AXIS_0, -9},
        {'v', AXIS_1, -1}, {'v', AXIS_2, 1},  {'v', AXIS_3, -8},  {'v', AXIS_3, 8},
        {'o', ABSENT, 0},  {'o', AXIS_0, -1}, {'o', AXIS_1, -1},  {'o', AXIS_1, 1},
        {'o', AXIS_2, -8}, {'o', AXIS_2, 8},  {'l', AXIS_0, -1},  {'l', AXIS_1, -1},
        {'l', AXIS_1, 1},
    };
    static const fault any[] = {DTYPE,  LANES,   NDIM_LESS,   NDIM_MORE,
                                DEVICE, NO_DATA, STRIDE_LAST, MISALIGNED};
    static const char tensors[] = "qkvol";
    attn_case a;
    build(&a, CASE_CSR);
    case_op op = case_op_new(ctx, &a);
    expect_run_refusal(&a, op.op, &a.io, "no plan yet", "plan");
    EXPECT_OK(qkv_attention_plan(op.op, &a.batch, NULL));
    for (size_t i = 0; i < COUNT(rows) + 5 * COUNT(any); i++) {
        const size_t j = i - COUNT(rows);
        const bool listed = i < COUNT(rows);
        const char tensor = listed ? rows[i].tensor : tensors[j / COUNT(any)];
        const fault what = listed ? rows[i].what : any[j % COUNT(any)];
        if (tensor == 'l' && what == STRIDE_LAST) continue; /* any strides */
        const case_view *view = tensor == 'q'   ? &a.q
                                : tensor == 'k' ? &a.k
                                : tensor == 'v' ? &a.v
                                : tensor == 'o' ? &a.o
                                                : &a.lse;
        faulty f;
        break_tensor(&f, &view->x, what, listed ? rows[i].by : 0);
        qkv_attention_io io = a.io;
        if (tensor == 'q') io.q = f.t;
        if (tensor == 'k') io.k = f.t;
        if (tensor == 'v') io.v = f.t;
        if (tensor == 'o') io.o = f.t;
        if (tensor == 'l') io.lse = f.t;
        char why[64], name[8];
        snprintf(why, sizeof why, "%c, fault %d by %d", tensor, (int)what,
                 listed ? (int)rows[i].by : 0);
        snprintf(name, sizeof name, "%s:", tensor == 'l' ? "lse" : (char[]){tensor, 0});
        expect_run_refusal(&a, op.op, &io, why, name);
    }
    qkv_attention_io io = a.io;
    io.v = NULL; /* then k must hold both */
    expect_run_refusal(&a, op.op, &io, "v missing", "k:");
    expect_still_works(&a, op.op);
    case_op_free(&op);
    case_free(&a);
}

static void attention_run_wants_all_pages_of_the_plan(void **state)
{
    (void)state;
    for (int32_t form = CASE_CSR; form <= CASE_RAGGED; form++) {
        attn_case a;
        build(&a, form);
        a.limits.pool_pages = 0; /* so that plan cannot know */
        int64_t needed = form == CASE_RAGGED ? case_ints(&a.kv_indptr)[5] : 0;
        for (int32_t i = 0; form != CASE_RAGGED && i < a.first_page[5]; i++)
            if (a.pages[i] >= needed) needed = a.pages[i] + 1;
        case_op op = case_op_new(ctx, &a);
        EXPECT_OK(qkv_attention_plan(op.op, &a.batch, NULL));
        for (int which = 0; which < 2; which++) {
            faulty f;
            const case_view *view = which ? &a.v : &a.k;
            break_tensor(&f, &view->x, AXIS_0, needed - view->x.shape[0]);
            qkv_attention_io io = a.io;
            *(which ? &io.v : &io.k) = f.t;
            EXPECT_OK(qkv_attention_run(op.op, &io, NULL));
            case_collect(&a);
            case_check(&a, qkv_context_device_name(ctx));
            f.x.shape[0]--;
            expect_run_refusal(&a, op.op, &io, "one page short", which ? "v:" : "k:");
        }
        case_op_free(&op);
        case_free(&a);
    }
}

static void attention_run_refuses_overlap(void **state)
{
    (void)state;
    attn_case a;
    build(&a, CASE_CSR);
    case_op op = case_op_new(ctx, &a);
    EXPECT_OK(qkv_attention_plan(op.op, &a.batch, NULL));
    const case_view *inputs[] = {&a.q, &a.k, &a.v};
    const char *names[] = {"q", "k", "v"};
    for (int i = 0; i < 3; i++) {
        test_tensor o;
        test_tensor_init(&o, inputs[i]->x.owned, QKV_F32, 3, a.o.x.shape);
        qkv_attention_io io = a.io;
        io.o = &o.t;
        expect_run_refusal(&a, op.op, &io, names[i], "o:");
        /* by one element, at either end */
        o.t.data = (char *)inputs[i]->x.owned + inputs[i]->bytes - 4;
        expect_run_refusal(&a, op.op, &io, "the last element", "o:");
        o.t.data = (char *)inputs[i]->x.owned - a.o.bytes + 4;
        expect_run_refusal(&a, op.op, &io, "the first element", "o:");
    }
    const case_view *touched[] = {&a.o, &a.q, &a.k, &a.v};
    for (int i = 0; i < 4; i++) {
        test_tensor lse;
        test_tensor_init(&lse, touched[i]->x.owned, QKV_F32, 2, a.o.x.shape);
        qkv_attention_io io = a.io;
        io.lse = &lse.t;
        expect_run_refusal(&a, op.op, &io, "over another tensor", "lse:");
    }
    expect_still_works(&a, op.op);
    case_op_free(&op);
    case_free(&a);
}

static void attention_run_names_the_wrong_parameter(void **state)
{
    (void)state;
#define F(field) #field, offsetof(qkv_attention_io, field)
    enum { CAP = QKV_FEATURE_SOFT_CAP, WINDOW = QKV_FEATURE_WINDOW };
    static const wrong_field rows[] = {
        {"no struct_size", F(struct_size), 'u', 0, 0},
        {"negative", F(sm_scale), 'f', -1, 0},
        {"not a number", F(sm_scale), 'f', NAN, 0},
        {"infinite", F(sm_scale), 'f', INFINITY, 0},
        {"a cap without the feature", F(logits_soft_cap), 'f', 30, 0},
        {"negative", F(logits_soft_cap), 'f', -30, CAP},
        {"not a number", F(logits_soft_cap), 'f', NAN, CAP},
        {"infinite", F(logits_soft_cap), 'f', INFINITY, CAP},
        {"a window without the feature", F(set_window), 'i', 1, 0},
        {"neither 0 nor 1", F(set_window), 'i', 2, WINDOW},
        {"wider to the left", F(window_left), 'i', 6, WINDOW},
        {"open to the left", F(window_left), 'i', -1, WINDOW},
        {"below -1", F(window_left), 'i', -2, WINDOW},
        {"wider to the right", F(window_right), 'i', 4, WINDOW},
        {"open to the right", F(window_right), 'i', -1, WINDOW},
    };
#undef F
    for (size_t i = 0; i < COUNT(rows); i++) {
        attn_case a;
        build(&a, CASE_CSR);
        qkv_attention_spec *s = &a.config.spec;
        s->features = rows[i].features;
        s->logits_soft_cap = s->features & CAP ? 20 : 0;
        s->window_left = s->features & WINDOW ? 5 : 0;
        s->window_right = s->features & WINDOW ? 3 : 0;
        attention_ref(s, &a.batch, &a.io, a.ref_o, a.ref_rows);
        case_op op = case_op_new(ctx, &a);
        EXPECT_OK(qkv_attention_plan(op.op, &a.batch, NULL));
        qkv_attention_io io = a.io;
        if (strncmp(rows[i].name, "window", 6) == 0) io.set_window = 1;
        set_field(&io, &rows[i]);
        expect_run_refusal(&a, op.op, &io, rows[i].why, rows[i].name);
        expect_still_works(&a, op.op);
        case_op_free(&op);
        case_free(&a);
    }
    attn_case a;
    build(&a, CASE_CSR);
    case_op op = case_op_new(ctx, &a);
    EXPECT_OK(qkv_attention_plan(op.op, &a.batch, NULL));
    EXPECT_FAIL(QKV_ERR_INVALID, "io", qkv_attention_run(op.op, NULL, NULL));
    case_op_free(&op);
    case_free(&a);
}

int main(void)
{
    test_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_run_names_the_wrong_tensor),
        cmocka_unit_test(attention_run_wants_all_pages_of_the_plan),
        cmocka_unit_test(attention_run_refuses_overlap),
        cmocka_unit_test(attention_run_names_the_wrong_parameter),
    };
    return cmocka_run_group_tests_name("attention_io_errors", tests, open_context, close_context);
}
