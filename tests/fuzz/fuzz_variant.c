/* fuzz_variant.c - libFuzzer: any table of parameters is refused with a message, or is laid out without
 * overlap, gets as far as the compiler, and takes arguments without a touch outside its struct.
 * Built and run by tools/fuzz.sh.
 *
 * Nothing is compiled: the policy allows kernels of the cache alone, and there is no cache.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ops/attention/variant.h"
#include "qkv/qkv.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_GIVEN = 40, MAX_TEXT = 100 };

#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) abort();                                                                      \
    } while (0)

/* ---- input --------------------------------------------------------------------------------- */

typedef struct input {
    const uint8_t *at, *end;
} input;

static int32_t next(input *in)
{
    return in->at < in->end ? *in->at++ : 0;
}

/* A small number, mostly one that is right. */
static int32_t number(input *in, int32_t right)
{
    const int32_t kind = next(in);
    if (kind < 224) return kind % (right + 1);
    if (kind < 250) return kind - 237;
    return (int32_t)((uint32_t)kind << 24 | (uint32_t)next(in) << 8 | (uint32_t)next(in));
}

/* Text of its own allocation: any bytes up to a zero. */
static char *text(input *in)
{
    const size_t longest = (size_t)next(in) % MAX_TEXT;
    char *out = malloc(longest + 1);
    CHECK(out);
    size_t n = 0;
    while (n < longest && (out[n] = (char)next(in))) n++;
    out[n] = '\0';
    return realloc(out, n + 1);
}

/* Mostly an identifier of its own; else a keyword, nothing, or any text. */
static char *name(input *in, int32_t i)
{
    static const char *const odd[] = {"float", "class", "", "long", "_", "pos", "stride", "data"};
    const int32_t kind = next(in);
    char *out = malloc(16);
    CHECK(out);
    if (kind < 200) {
        snprintf(out, 16, "p%d", kind < 190 ? (int)i : kind % 4);
        return out;
    }
    if (kind < 220) return strcpy(out, odd[kind % 8]);
    free(out);
    return kind < 225 ? NULL : text(in);
}

static DLDataType dtype(input *in)
{
    const DLDataType good[] = {QKV_F32, QKV_I32, QKV_I64, QKV_U8, QKV_I8, QKV_F16, QKV_E4M3};
    const int32_t kind = next(in);
    if (kind < 240) return good[kind % (kind < 200 ? 5 : 7)];
    return (DLDataType){(uint8_t)next(in), (uint8_t)next(in), (uint16_t)next(in)};
}

/* ---- a variant ----------------------------------------------------------------------------- */

/* Parameters in an allocation of exactly as many. */
static qkv_param *make_params(input *in, int32_t n)
{
    qkv_param *params = malloc((size_t)n * sizeof *params + 1);
    CHECK(params);
    for (int32_t i = 0; i < n; i++) {
        const int32_t type = number(in, QKV_PARAM_TENSOR), plain = next(in) < 230;
        const int tensor = type == QKV_PARAM_TENSOR;
        params[i] = (qkv_param){.type = type};
        params[i].ndim = !plain ? number(in, 6) : tensor ? 1 + next(in) % 4 : 0;
        if (tensor || !plain) params[i].dtype = dtype(in);
        params[i].name = name(in, i);
    }
    return params;
}

/* A struct of this library's size, of the past's, which ends after some field, or of a future one's. */
static qkv_variant *make_variant(input *in, const qkv_variant *v)
{
    static const size_t past[] = {0, 4, 8, 16, 24};
    const int32_t kind = next(in);
    size_t size = sizeof *v;
    if (kind >= 220) size = kind < 240 ? size + (size_t)(kind - 220) : past[kind % 5];
    char *out = calloc(1, size < 4 ? 4 : size);
    CHECK(out);
    memcpy(out, v, size < sizeof *v ? size : sizeof *v);
    const uint32_t struct_size = (uint32_t)size;
    memcpy(out, &struct_size, sizeof struct_size);
    if (kind > 230 && kind < 240) out[size - 1] = (char)next(in);
    return (qkv_variant *)(void *)out;
}

/* ---- what a good one must be ---------------------------------------------------------------- */

static size_t param_bytes(const variant_param *p)
{
    return p->type == QKV_PARAM_TENSOR ? 8u * (1u + (size_t)p->ndim) : 4;
}

static void check_layout(const variant_table *t)
{
    size_t end = 0;
    CHECK(t->bytes <= sizeof(variant_args));
    for (int32_t i = 0; i < t->num_params; i++) {
        const variant_param *p = &t->params[i];
        CHECK(p->name[0] && strspn(p->name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"
                                            "0123456789") == strlen(p->name));
        for (int32_t j = 0; j < i; j++) CHECK(strcmp(p->name, t->params[j].name) != 0);
        CHECK(p->offset >= end && p->offset % (p->type == QKV_PARAM_TENSOR ? 8 : 4) == 0);
        end = p->offset + param_bytes(p);
    }
    CHECK(end <= t->bytes);
}

/* Arguments, mostly right; nothing behind the struct may change. */
static void check_pack(input *in, const variant_table *t)
{
    static DLTensor tensors[VARIANT_MAX_PARAMS];
    static int64_t shapes[VARIANT_MAX_PARAMS][VARIANT_MAX_NDIM + 1];
    static qkv_arg args[VARIANT_MAX_PARAMS];
    static uint64_t element;
    int spoiled = 0;
    for (int32_t i = 0; i < t->num_params; i++) {
        const variant_param *p = &t->params[i];
        DLTensor *x = &tensors[i];
        *x = (DLTensor){.data = &element,
                        .device = {kDLCPU, 0},
                        .ndim = p->ndim,
                        .dtype = p->dtype,
                        .shape = shapes[i]};
        for (int d = 0; d <= VARIANT_MAX_NDIM; d++) shapes[i][d] = 1;
        args[i] = (qkv_arg){.f32 = 1, .i32 = 2, .tensor = x};
        const int32_t kind = next(in);
        if (p->type != QKV_PARAM_TENSOR || kind < 230) continue;
        spoiled = 1;
        switch (kind % 5) {
        case 0: x->ndim++; break;
        case 1: x->dtype.bits = (uint8_t)(x->dtype.bits ^ 0x18); break;
        case 2: x->device.device_type = kDLCUDA; break;
        case 3: shapes[i][0] = -1; break;
        default: args[i].tensor = NULL;
        }
    }
    const int32_t num_args = next(in) < 240 ? t->num_params : number(in, 40);
    const qkv_attention_io io = {QKV_ATTENTION_IO_INIT, .num_args = num_args, .args = args};
    variant_args packed;
    memset(&packed, 0x5a, sizeof packed);
    const qkv_status status = qi_variant_pack(t, &io, &packed);
    CHECK(status == (spoiled || num_args != t->num_params ? QKV_ERR_INVALID : QKV_OK));
    for (size_t i = t->bytes; i < sizeof packed; i++) CHECK(((unsigned char *)&packed)[i] == 0x5a);
}

static qkv_context *context(void)
{
    static qkv_context *ctx;
    if (!ctx)
        CHECK(qkv_context_create(&(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .num_threads = 1,
                                                        .jit_policy = QKV_JIT_CACHED,
                                                        .cache_dir = ""},
                                 &ctx) == QKV_OK);
    return ctx;
}

static void check_create(const qkv_variant *v, qkv_status expected)
{
    const qkv_attention_spec spec = {
        QKV_ATTENTION_SPEC_INIT, .num_qo_heads = 1,  .num_kv_heads = 1,
        .head_dim_qk = 8,        .head_dim_vo = 8,   .dtype_q = QKV_F32,
        .dtype_kv = QKV_F32,     .dtype_o = QKV_F32, .variant = v};
    const qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 1,
                                         .max_tokens = 1, .max_kv_len = 1};
    qkv_attention *op = (qkv_attention *)context();
    CHECK(qkv_attention_create(context(), &spec, &limits, NULL, &op) == expected && !op);
    CHECK(qkv_attention_warm_up(context(), &spec, &limits) == expected);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, data + size};
    const int32_t kind = next(&in), given = next(&in) % MAX_GIVEN;
    qkv_param *params = make_params(&in, given);
    char *label = name(&in, 0), *source = kind % 16 ? text(&in) : NULL;
    const qkv_variant whole = {QKV_VARIANT_INIT, .num_params = kind < 240 ? given : -(kind % 3),
                               .name = label, .source = source,
                               .params = kind % 16 == 1 ? NULL : params};
    qkv_variant *v = make_variant(&in, &whole);
    static variant_table table;
    const qkv_status status = qi_variant_read(v, &table);
    CHECK(status == QKV_OK || (status == QKV_ERR_INVALID && qkv_last_error()[0]));
    if (status != QKV_OK) {
        check_create(v, status);
    } else {
        if (next(&in) % 8 == 0) check_create(v, QKV_ERR_COMPILE); /* hashing sources takes time */
        check_layout(&table);
        if (table.num_params > 0) check_pack(&in, &table);
    }
    for (int32_t i = 0; i < given; i++) free((char *)(uintptr_t)params[i].name);
    free(params);
    free(label);
    free(source);
    free(v);
    return 0;
}
