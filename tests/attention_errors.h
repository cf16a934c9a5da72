/* attention_errors.h - what the tests of refusals share: wrong fields, faulty tensors, a batch to
 * break.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_ATTENTION_ERRORS_H
#define QKV_TESTS_ATTENTION_ERRORS_H

#include "attention_run.h"

#define COUNT(rows) (sizeof(rows) / sizeof *(rows))

static qkv_context *ctx;

/* The message contains number n as a word of its own, before its (file:line). */
static inline bool message_has(const char *message, int64_t n)
{
    const char *end = strrchr(message, '(');
    char text[24];
    const int len = snprintf(text, sizeof text, "%lld", (long long)n);
    for (const char *p = message; (p = strstr(p, text)) && (!end || p < end); p++) {
        const bool starts = p == message || !strchr("0123456789-", p[-1]);
        if (starts && !strchr("0123456789", p[len])) return true;
    }
    return false;
}

/* Status and the argument's name at the beginning of the message. */
static inline void expect_refusal(const char *why, qkv_status got, qkv_status status,
                                  const char *name)
{
    if (got != status)
        fail_msg("%s: expected %s, got %s: %s", why, qkv_status_name(status), qkv_status_name(got),
                 qkv_last_error());
    if (!strstr(qkv_last_error(), name))
        fail_msg("%s: expected a message about %s, got: %s", why, name, qkv_last_error());
}

/* One field of a struct set to a wrong value; the type says which kind of field. */
typedef struct wrong_field {
    const char *why, *name;
    size_t offset;
    char type; /* i: int32, u: uint32, l: int64, f: float */
    double value;
    int32_t features; /* of the spec */
} wrong_field;

static inline void set_field(void *s, const wrong_field *w)
{
    char *p = (char *)s + w->offset;
    if (w->type == 'i') memcpy(p, &(int32_t){(int32_t)w->value}, 4);
    if (w->type == 'u') memcpy(p, &(uint32_t){(uint32_t)w->value}, 4);
    if (w->type == 'l') memcpy(p, &(int64_t){(int64_t)w->value}, 8);
    if (w->type == 'f') memcpy(p, &(float){(float)w->value}, 4);
}

/* Five requests over pages of 16: the third has no row, the fourth no key. */
static inline void build(attn_case *a, int32_t form)
{
    case_config c = case_config_init(case_spec(4, 2, 64, form == CASE_RAGGED ? 0 : 16));
    c.form = form;
    c.limits.max_requests = 5;
    c.limits.max_tokens = 30;
    c.limits.max_qo_len = 12;
    c.limits.max_kv_len = 92;
    c.limits.max_pages = 20;
    case_add(&c, 1, 40);
    case_add(&c, 7, 90);
    case_add(&c, 0, 5);
    case_add(&c, 2, 0);
    case_add(&c, 3, 33);
    case_build(a, &c);
    a->limits.pool_pages = a->config.spec.page_size ? a->k.x.shape[0] : 0;
}

/* Plans and runs as if nothing had happened. */
static inline void expect_still_works(attn_case *a, qkv_attention *op)
{
    case_expect_poison(&a->o, "o");
    case_expect_poison(&a->lse, "lse");
    EXPECT_OK(qkv_attention_plan(op, &a->batch, NULL));
    case_run(a, op);
    case_check(a, qkv_context_device_name(ctx));
}

/* What can be wrong with a tensor that its content does not show. */
typedef enum fault {
    ABSENT,
    DTYPE,
    LANES,
    NDIM_LESS,
    NDIM_MORE,
    AXIS_0,
    AXIS_1,
    AXIS_2,
    AXIS_3,
    DEVICE,
    NO_DATA,
    STRIDE_LAST,
    MISALIGNED
} fault;

/* A changed copy that shares shape and strides with nobody. */
typedef struct faulty {
    test_tensor x;
    DLTensor *t; /* NULL = ABSENT */
} faulty;

static inline void break_tensor(faulty *f, const test_tensor *from, fault what, int64_t by)
{
    f->x = *from;
    f->x.t.shape = f->x.shape;
    f->x.t.strides = f->x.strides;
    f->t = what == ABSENT ? NULL : &f->x.t;
    const int ndim = f->x.t.ndim;
    if (what == DTYPE)
        f->x.t.dtype = from->t.dtype.code == 0    ? QKV_I64
                       : from->t.dtype.bits == 32 ? QKV_F16
                                                  : QKV_F32;
    if (what == LANES) f->x.t.dtype.lanes = 2;
    if (what == NDIM_LESS) f->x.t.ndim--;
    if (what == NDIM_MORE) {
        f->x.shape[ndim] = f->x.strides[ndim] = 1;
        f->x.t.ndim++;
    }
    if (what >= AXIS_0 && what <= AXIS_3) f->x.shape[what - AXIS_0] += by;
    if (what == DEVICE) f->x.t.device = (DLDevice){kDLCUDA, 0};
    if (what == NO_DATA) f->x.t.data = NULL;
    if (what == STRIDE_LAST) f->x.strides[ndim - 1] = 2;
    if (what == MISALIGNED) f->x.t.byte_offset = 1;
}

static inline int open_context(void **state)
{
    (void)state;
    return qkv_context_create(&(qkv_context_options){TEST_CONTEXT_INIT, .num_threads = 2}, &ctx) ==
                   QKV_OK
               ? 0
               : -1;
}

static inline int close_context(void **state)
{
    (void)state;
    qkv_context_destroy(ctx);
    return 0;
}

#endif
