/* bad_input.h - take a call that works, break one thing of one tensor, and see it refused: a status, a
 * message about that argument, and every byte of every tensor as it was. Blocks, shapes and strides
 * are of exactly the size that they need, so that a sanitizer sees who reads beyond.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_BAD_INPUT_H
#define QKV_TESTS_BAD_INPUT_H

#include "support.h"

#define COUNT(rows) (sizeof(rows) / sizeof *(rows))

static qkv_context *ctx;

enum { BAD_MAX_NDIM = 5, BAD_MAX_ARGS = 16, BAD_POISON = 0xff };

/* A tensor that the call takes, contiguous. */
typedef struct bad_arg {
    const char *name; /* in messages */
    DLDataType dtype;
    int ndim;
    int64_t shape[BAD_MAX_NDIM];
    const void *init; /* its content; NULL: poison */
    const char *also; /* words: named instead where sizes disagree, they follow this one's */
    bool output, optional, strided; /* strided: any last stride */
    unsigned longer, shorter;       /* bit i: axis i may be that */
    bool four_or_five;              /* axes: both are fine */
    unsigned apart;                 /* bit i: need not be apart from argument i */
} bad_arg;

/* One entry of a tensor, set to what it must not be. */
typedef struct bad_entry {
    const char *name;
    int64_t at;
    double value;
    const char *also;
} bad_entry;

typedef struct bad_call {
    const char *what;
    qkv_status (*run)(DLTensor *const *t); /* in the order of args; NULL = not given */
    bad_arg args[BAD_MAX_ARGS];
    const bad_entry *entries; /* NULL, or up to one without a name */
    void (*after)(void);      /* NULL, or called after each refusal */
    bool no_context;          /* the call takes none */
} bad_call;

/* For tables of them: ARG("out", F32, SHAPE(3, 16), .output = true). */
#define F32  2, 32, 1
#define F16  2, 16, 1
#define BF16 4, 16, 1
#define I32  0, 32, 1
#define I64  0, 64, 1
#define U64  1, 64, 1
#define U8   1, 8, 1
#define I8   0, 8, 1
#define E4M3 10, 8, 1
#define SHAPE(...)                                                                                 \
    .ndim = (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), .shape = {__VA_ARGS__}
#define ARG(name_, dtype_, ...)                                                                    \
    {                                                                                              \
        .name = name_, .dtype = {dtype_}, __VA_ARGS__                                              \
    }

/* ---- a call's tensors ---------------------------------------------------------------------- */

typedef struct bad_block {
    DLTensor t;
    unsigned char *before; /* a copy of the data */
    size_t bytes;
} bad_block;

static inline void *bad_copy(const void *from, size_t bytes)
{
    void *p = malloc(bytes + !bytes);
    assert_non_null(p);
    if (bytes > 0) memcpy(p, from, bytes);
    return p;
}

static inline void bad_block_new(bad_block *b, const bad_arg *a)
{
    int64_t n = 1, strides[BAD_MAX_NDIM];
    for (int i = a->ndim - 1; i >= 0; i--) {
        strides[i] = n;
        n *= a->shape[i];
    }
    b->bytes = (size_t)n * test_bytes(a->dtype);
    b->before = malloc(b->bytes + 1);
    assert_non_null(b->before);
    memset(b->before, BAD_POISON, b->bytes);
    if (a->init) memcpy(b->before, a->init, b->bytes);
    b->t = (DLTensor){.data = bad_copy(b->before, b->bytes),
                      .device = test_device(),
                      .ndim = a->ndim,
                      .dtype = a->dtype,
                      .shape = bad_copy(a->shape, (size_t)a->ndim * sizeof(int64_t)),
                      .strides = bad_copy(strides, (size_t)a->ndim * sizeof(int64_t))};
}

static inline void bad_block_free(bad_block *b)
{
    free(b->before), free(b->t.data), free(b->t.shape), free(b->t.strides);
}

static inline int bad_num_args(const bad_call *c)
{
    int n = 0;
    while (n < BAD_MAX_ARGS && c->args[n].name) n++;
    return n;
}

/* ---- judging ------------------------------------------------------------------------------- */

static inline bool bad_in_word(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
}

/* Is name among the words of text? */
static inline bool bad_has_word(const char *text, const char *name)
{
    const size_t length = strlen(name);
    for (const char *p = text; (p = strstr(p, name)); p++)
        if ((p == text || !bad_in_word(p[-1])) && !bad_in_word(p[length])) return true;
    return false;
}

/* Is the message about name, or about one word of also? What it is about stands before ": expected". */
static inline bool bad_about(const char *message, const char *name, const char *also)
{
    const char *end = strstr(message, ": expected");
    if (!end) return false;
    char head[64];
    snprintf(head, sizeof head, "%.*s", (int)(end - message), message);
    return bad_has_word(head, name) ||
           (also && (bad_has_word(head, also) || bad_has_word(also, head)));
}

static inline void bad_expect(const char *what, const char *why, qkv_status status,
                              const char *name, const char *also)
{
    const char *message = qkv_last_error();
    if (status != QKV_ERR_INVALID)
        fail_msg("%s, %s: %s: expected QKV_ERR_INVALID, got %s: %s", what, name, why,
                 qkv_status_name(status), status ? message : "");
    if (!bad_about(message, name, also))
        fail_msg("%s, %s: %s: expected a message about it, got: %s", what, name, why, message);
}

static inline void bad_expect_untouched(const bad_call *c, const bad_block *blocks, const char *why)
{
    for (int i = 0; c->args[i].name; i++)
        if (blocks[i].bytes > 0 && memcmp(blocks[i].t.data, blocks[i].before, blocks[i].bytes) != 0)
            fail_msg("%s: %s: %s was written", c->what, why, c->args[i].name);
}

/* ---- faults -------------------------------------------------------------------------------- */

typedef enum bad_fault {
    BAD_ABSENT,
    BAD_F64,
    BAD_CODE,
    BAD_BITS,
    BAD_LANES,
    BAD_NO_LANES,
    BAD_NDIM_0,
    BAD_NDIM_NEGATIVE,
    BAD_NDIM_100,
    BAD_NDIM_LEAST,
    BAD_NDIM_LESS,
    BAD_NDIM_MORE,
    BAD_NO_SHAPE,
    BAD_CUDA,
    BAD_DEVICE,
    BAD_NO_DATA,
    BAD_OFFSET,
    BAD_DATA,
    BAD_FAR_OFFSET,
    BAD_NEGATIVE_OFFSET,
    BAD_STRIDE_LAST,
    BAD_PRODUCT,
    BAD_PRODUCT_EMPTY,
    BAD_BY_AXIS, /* from here on: of each axis */
    BAD_AXIS_NEGATIVE = BAD_BY_AXIS,
    BAD_AXIS_LEAST,
    BAD_AXIS_MOST,
    BAD_AXIS_LESS,
    BAD_AXIS_MORE,
    BAD_STRIDE_NEGATIVE,
    BAD_STRIDE_LEAST,
    BAD_STRIDE_MOST,
    BAD_STRIDE_FAR,
    BAD_STRIDE_0,
    BAD_NUM_FAULTS
} bad_fault;

static const char *const bad_why[BAD_NUM_FAULTS] = {
    [BAD_ABSENT] = "NULL",
    [BAD_F64] = "f64",
    [BAD_CODE] = "an unknown code",
    [BAD_BITS] = "no bits",
    [BAD_LANES] = "two lanes",
    [BAD_NO_LANES] = "no lanes",
    [BAD_NDIM_0] = "ndim 0",
    [BAD_NDIM_NEGATIVE] = "ndim -1",
    [BAD_NDIM_100] = "ndim 100",
    [BAD_NDIM_LEAST] = "the least ndim",
    [BAD_NDIM_LESS] = "an axis less",
    [BAD_NDIM_MORE] = "an axis more",
    [BAD_NO_SHAPE] = "shape NULL",
    [BAD_CUDA] = "on a GPU",
    [BAD_DEVICE] = "on an unknown device",
    [BAD_NO_DATA] = "data NULL",
    [BAD_OFFSET] = "byte_offset 1",
    [BAD_DATA] = "data at an odd address",
    [BAD_FAR_OFFSET] = "byte_offset past the address space",
    [BAD_NEGATIVE_OFFSET] = "byte_offset -64",
    [BAD_STRIDE_LAST] = "gaps in the last axis",
    [BAD_PRODUCT] = "sizes whose product overflows",
    [BAD_PRODUCT_EMPTY] = "no element, but sizes whose product overflows",
    [BAD_AXIS_NEGATIVE] = "size -1",
    [BAD_AXIS_LEAST] = "the least size",
    [BAD_AXIS_MOST] = "the largest size",
    [BAD_AXIS_LESS] = "one index less",
    [BAD_AXIS_MORE] = "one index more",
    [BAD_STRIDE_NEGATIVE] = "a negative stride",
    [BAD_STRIDE_LEAST] = "the least stride",
    [BAD_STRIDE_MOST] = "the largest stride",
    [BAD_STRIDE_FAR] = "a stride whose bytes overflow",
    [BAD_STRIDE_0] = "a stride of 0",
};

/* Does the fault make sense for the argument's axis, and is it one? */
static inline bool bad_applies(const bad_arg *a, bad_fault what, int axis)
{
    const int64_t n = a->shape[axis];
    switch (what) {
    case BAD_ABSENT: return !a->optional;
    case BAD_OFFSET:
    case BAD_DATA: return a->dtype.bits > 8;
    case BAD_STRIDE_LAST: return !a->strided && a->shape[a->ndim - 1] > 1;
    case BAD_NDIM_LESS:
    case BAD_NDIM_MORE: return !a->four_or_five;
    case BAD_PRODUCT:
    case BAD_PRODUCT_EMPTY: return a->ndim > 1;
    case BAD_AXIS_LESS: return n > 0 && !(a->shorter >> axis & 1);
    case BAD_AXIS_MORE: return !(a->longer >> axis & 1);
    case BAD_STRIDE_0: return a->output && n > 1 && (axis + 1 < a->ndim || a->strided);
    case BAD_STRIDE_NEGATIVE:
    case BAD_STRIDE_LEAST:
    case BAD_STRIDE_MOST:
    case BAD_STRIDE_FAR: return n > 1;
    default: return true;
    }
}

/* Sets the fault in a copy of which the shape and the strides are the caller's to free. */
static inline void bad_break(DLTensor *t, bad_fault what, int axis)
{
    const size_t bytes = (size_t)t->ndim * sizeof(int64_t);
    t->shape = bad_copy(t->shape, bytes);
    t->strides = bad_copy(t->strides, bytes);
    int64_t *const size = &t->shape[axis], *const stride = &t->strides[axis];
    switch (what) {
    case BAD_F64: t->dtype = QKV_DTYPE(kDLFloat, 64); break;
    case BAD_CODE: t->dtype.code = 99; break;
    case BAD_BITS: t->dtype.bits = 0; break;
    case BAD_LANES: t->dtype.lanes = 2; break;
    case BAD_NO_LANES: t->dtype.lanes = 0; break;
    case BAD_NDIM_0: t->ndim = 0; break;
    case BAD_NDIM_NEGATIVE: t->ndim = -1; break;
    case BAD_NDIM_100: t->ndim = 100; break;
    case BAD_NDIM_LEAST: t->ndim = INT32_MIN; break;
    case BAD_NDIM_LESS: t->ndim--; break;
    case BAD_NDIM_MORE:
        t->shape = realloc(t->shape, bytes + 8);
        t->strides = realloc(t->strides, bytes + 8);
        t->shape[t->ndim] = t->strides[t->ndim] = 1;
        t->ndim++;
        break;
    case BAD_NO_SHAPE: free(t->shape), t->shape = NULL; break;
    case BAD_CUDA: t->device = (DLDevice){kDLCUDA, 0}; break;
    case BAD_DEVICE: t->device.device_type = (DLDeviceType)77; break;
    case BAD_NO_DATA: t->data = NULL; break;
    case BAD_OFFSET: t->byte_offset = 1; break;
    case BAD_DATA: t->data = (char *)t->data + 1; break;
    case BAD_FAR_OFFSET: t->byte_offset = (UINT64_MAX - (uintptr_t)t->data) / 64 * 64; break;
    case BAD_NEGATIVE_OFFSET: t->byte_offset = (uint64_t)-64; break;
    case BAD_STRIDE_LAST: t->strides[t->ndim - 1] = 2; break;
    case BAD_PRODUCT:
        for (int i = 0; i < t->ndim; i++) t->shape[i] = INT64_C(1) << 33; /* wraps around to 0 */
        for (int i = 0; i + 1 < t->ndim; i++) t->strides[i] = i + 2 == t->ndim ? t->shape[i] : 0;
        break;
    case BAD_PRODUCT_EMPTY:
        for (int i = 0; i < t->ndim; i++) t->shape[i] = i + 1 < t->ndim ? INT64_C(1) << 61 : 0;
        break;
    case BAD_AXIS_NEGATIVE: *size = -1; break;
    case BAD_AXIS_LEAST: *size = INT64_MIN; break;
    case BAD_AXIS_MOST: *size = INT64_MAX; break;
    case BAD_AXIS_LESS: --*size; break;
    case BAD_AXIS_MORE: ++*size; break;
    case BAD_STRIDE_NEGATIVE: *stride = -*stride; break;
    case BAD_STRIDE_LEAST: *stride = INT64_MIN; break;
    case BAD_STRIDE_MOST: *stride = INT64_MAX; break;
    case BAD_STRIDE_FAR: *stride = INT64_MAX / 8; break;
    case BAD_STRIDE_0: *stride = 0; break;
    default: break;
    }
}

/* ---- all of it ----------------------------------------------------------------------------- */

static inline void bad_try(const bad_call *c, bad_block *blocks, DLTensor **t, int arg,
                           DLTensor *broken, const char *why, const char *also)
{
    t[arg] = broken;
    const qkv_status status = c->run(t);
    t[arg] = &blocks[arg].t;
    bad_expect(c->what, why, status, c->args[arg].name, also);
    bad_expect_untouched(c, blocks, why);
    if (c->after) c->after();
}

/* Every fault of every tensor. */
static inline void bad_try_faults(const bad_call *c, bad_block *blocks, DLTensor **t, int arg)
{
    const bad_arg *a = &c->args[arg];
    for (int what = 0; what < BAD_NUM_FAULTS; what++)
        for (int axis = 0; axis < (what < BAD_BY_AXIS ? 1 : a->ndim); axis++) {
            if (!bad_applies(a, (bad_fault)what, axis)) continue;
            DLTensor broken = blocks[arg].t;
            bad_break(&broken, (bad_fault)what, axis);
            int64_t *const shape = broken.shape, *const strides = broken.strides;
            bad_try(c, blocks, t, arg, what == BAD_ABSENT ? NULL : &broken, bad_why[what], a->also);
            if (what != BAD_STRIDE_LAST && what < BAD_STRIDE_NEGATIVE) {
                broken.strides = NULL; /* the same of a contiguous one */
                bad_try(c, blocks, t, arg, what == BAD_ABSENT ? NULL : &broken, bad_why[what],
                        a->also);
            }
            free(shape), free(strides);
        }
}

/* An output over the first or the last bytes of another tensor, both in a block of their own. */
static inline void bad_try_overlap(const bad_call *c, bad_block *blocks, DLTensor **t, int arg,
                                   int other, bool last)
{
    const size_t out = (blocks[arg].bytes + 7) & ~(size_t)7,
                 in = (blocks[other].bytes + 7) & ~(size_t)7;
    char *const block = calloc(1, in + 2 * out), why[64];
    assert_non_null(block);
    memcpy(block + out, blocks[other].before, blocks[other].bytes);
    char *const before = bad_copy(block, in + 2 * out);
    DLTensor read = blocks[other].t, written = blocks[arg].t;
    read.data = block + out;
    written.data = last ? block + out + blocks[other].bytes / 8 * 8 - 8 : block + 8;
    t[other] = &read;
    snprintf(why, sizeof why, "over the %s bytes of %s", last ? "last" : "first",
             c->args[other].name);
    bad_try(c, blocks, t, arg, &written, why, c->args[other].name);
    t[other] = &blocks[other].t;
    assert_memory_equal(block, before, in + 2 * out);
    free(block), free(before);
}

static inline void bad_try_overlaps(const bad_call *c, bad_block *blocks, DLTensor **t, int arg)
{
    for (int i = 0; c->args[i].name; i++) {
        if (i == arg || (c->args[arg].apart >> i & 1)) continue;
        if (blocks[i].bytes < 8 || blocks[arg].bytes < 8) fail_msg("%s: too small", c->what);
        for (int last = 0; last < 2; last++) bad_try_overlap(c, blocks, t, arg, i, last);
    }
}

static inline void bad_put(void *data, DLDataType t, int64_t at, double value)
{
    if (t.code > 1)
        test_put(data, t, at, value);
    else if (t.bits == 64)
        ((int64_t *)data)[at] = (int64_t)value;
    else
        ((int32_t *)data)[at] = (int32_t)value;
}

static inline void bad_try_entries(const bad_call *c, bad_block *blocks, DLTensor **t)
{
    for (const bad_entry *e = c->entries; e && e->name; e++) {
        int i = 0;
        while (strcmp(c->args[i].name, e->name) != 0) i++;
        DLTensor changed = blocks[i].t;
        changed.data = bad_copy(blocks[i].before, blocks[i].bytes);
        bad_put(changed.data, changed.dtype, e->at, e->value);
        char why[64];
        snprintf(why, sizeof why, "entry %d = %.17g", (int)e->at, e->value);
        bad_try(c, blocks, t, i, &changed, why, e->also);
        free(changed.data);
    }
}

static inline void bad_check(const bad_call *c)
{
    bad_block blocks[BAD_MAX_ARGS] = {{.bytes = 0}};
    DLTensor *t[BAD_MAX_ARGS] = {NULL};
    const int n = bad_num_args(c);
    for (int i = 0; i < n; i++) {
        bad_block_new(&blocks[i], &c->args[i]);
        t[i] = &blocks[i].t;
    }
    for (int round = 0; round < 2; round++) { /* it works before all of this, and after */
        EXPECT_OK(c->run(t));
        for (int i = 0; i < n; i++)
            if (c->args[i].output) memcpy(blocks[i].t.data, blocks[i].before, blocks[i].bytes);
        bad_expect_untouched(c, blocks, "working");
        if (round) break;
        for (int i = 0; i < n; i++) {
            bad_try_faults(c, blocks, t, i);
            if (c->args[i].output) bad_try_overlaps(c, blocks, t, i);
        }
        bad_try_entries(c, blocks, t);
        qkv_context *const own = ctx;
        ctx = NULL;
        if (!c->no_context) bad_expect(c->what, "NULL", c->run(t), "ctx", NULL);
        ctx = own;
        bad_expect_untouched(c, blocks, "no context");
    }
    for (int i = 0; i < n; i++) bad_block_free(&blocks[i]);
}

/* ---- a context for the group ----------------------------------------------------------------- */

static inline int bad_open(void **state)
{
    (void)state;
    return qkv_context_create(&(qkv_context_options){TEST_CONTEXT_INIT, .num_threads = 2}, &ctx) !=
           QKV_OK;
}

static inline int bad_close(void **state)
{
    (void)state;
    qkv_context_destroy(ctx);
    return 0;
}

#endif
