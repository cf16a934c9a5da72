/* variant.c - see variant.h. The struct that the text sees is written from the table, so its layout is
 * known here: 4-byte numbers, and for a tensor its address and one 8-byte stride an axis.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/variant.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(sizeof(variant_args) == MAX_ARG_WORDS * sizeof(i64), "room for every argument");

/* ---- the table ---------------------------------------------------------------------------- */

/* Words that C or C++ keep for themselves. */
static int is_keyword(const char *name)
{
    static const char words[] =
        " alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl "
        "concept const consteval constexpr constinit const_cast continue co_await co_return "
        "co_yield decltype default delete do double dynamic_cast else enum explicit export extern "
        "false float for friend goto if inline int long mutable namespace new noexcept not not_eq "
        "nullptr operator or or_eq private protected public register reinterpret_cast requires "
        "restrict return short signed sizeof static static_assert static_cast struct switch "
        "template this thread_local throw true try typedef typeid typename union unsigned using "
        "virtual void volatile wchar_t while xor xor_eq ";
    char padded[VARIANT_MAX_NAME + 3];
    snprintf(padded, sizeof padded, " %s ", name);
    return strstr(words, padded) != NULL;
}

static int is_identifier(const char *name)
{
    if (!name || !(isalpha((unsigned char)name[0]) || name[0] == '_')) return 0;
    size_t n = 0;
    for (; name[n]; n++)
        if (!(isalnum((unsigned char)name[n]) || name[n] == '_')) return 0;
    return n <= VARIANT_MAX_NAME && !is_keyword(name);
}

/* The C type of a tensor's elements, NULL if variants cannot read the dtype. */
static const char *element_type(DLDataType dtype)
{
    switch (qi_dtype_of(dtype)) {
    case QI_F32: return "float";
    case QI_I32: return "int";
    case QI_I64: return "long long";
    case QI_U8: return "unsigned char";
    case QI_I8: return "signed char";
    default: return NULL;
    }
}

static qkv_status read_param(const qkv_param *in, int32_t index, const variant_table *before,
                             variant_param *out)
{
    QI_REQUIRE(is_identifier(in->name),
               "variant.params[%d].name: expected an identifier of at most %d characters, got %s",
               (int)index, VARIANT_MAX_NAME, in->name ? in->name : "NULL");
    for (int32_t i = 0; i < index; i++)
        QI_REQUIRE(strcmp(before->params[i].name, in->name) != 0,
                   "variant.params[%d].name: expected a name of its own, got %s again", (int)index,
                   in->name);
    QI_REQUIRE(in->type >= QKV_PARAM_F32 && in->type <= QKV_PARAM_TENSOR,
               "variant.params[%d].type (%s): expected QKV_PARAM_F32, QKV_PARAM_I32 or "
               "QKV_PARAM_TENSOR, got %d",
               (int)index, in->name, (int)in->type);
    const int tensor = in->type == QKV_PARAM_TENSOR;
    QI_REQUIRE(tensor ? in->ndim >= 1 && in->ndim <= VARIANT_MAX_NDIM : in->ndim == 0,
               "variant.params[%d].ndim (%s): expected 1 to %d for a tensor and 0 else, got %d",
               (int)index, in->name, VARIANT_MAX_NDIM, (int)in->ndim);
    QI_REQUIRE(!tensor || element_type(in->dtype),
               "variant.params[%d].dtype (%s): expected f32, i32, i64, u8 or i8, got %s",
               (int)index, in->name, qi_dtype_name(in->dtype));
    *out = (variant_param){.type = in->type, .ndim = in->ndim, .dtype = in->dtype};
    snprintf(out->name, sizeof out->name, "%s", in->name);
    return QKV_OK;
}

/* Is there a line "#define NAME ..." in the text? */
static int defines(const char *source, const char *name)
{
    for (const char *at = source; (at = strstr(at, "#")); at++) {
        const char *word = at + 1 + strspn(at + 1, " \t");
        if (strncmp(word, "define", 6) != 0) continue;
        word += 6 + strspn(word + 6, " \t");
        const size_t n = strlen(name);
        if (strncmp(word, name, n) == 0 && !isalnum((unsigned char)word[n]) && word[n] != '_')
            return 1;
    }
    return 0;
}

qkv_status qi_variant_read(const qkv_variant *variant, variant_table *out)
{
    *out = (variant_table){.num_params = -1};
    if (!variant) return QKV_OK;
    qkv_variant v;
    QI_TRY(qi_read_struct(&v, sizeof v, variant, "variant"));
    QI_REQUIRE(is_identifier(v.name),
               "variant.name: expected an identifier of at most %d characters, got %s",
               VARIANT_MAX_NAME, v.name ? v.name : "NULL");
    QI_REQUIRE(v.source, "variant.source: expected text, got NULL");
    QI_REQUIRE(v.num_params >= 0 && v.num_params <= VARIANT_MAX_PARAMS,
               "variant.num_params: expected 0 to %d, got %d", VARIANT_MAX_PARAMS,
               (int)v.num_params);
    QI_REQUIRE(v.num_params == 0 || v.params, "variant.params: expected %d parameters, got NULL",
               (int)v.num_params);
    snprintf(out->name, sizeof out->name, "%s", v.name);
    for (int32_t i = 0; i < v.num_params; i++) {
        variant_param *p = &out->params[i];
        QI_TRY(read_param(&v.params[i], i, out, p));
        const int tensor = p->type == QKV_PARAM_TENSOR;
        if (tensor) out->bytes = (out->bytes + 7) / 8 * 8;
        p->offset = out->bytes;
        out->bytes += tensor ? 8u * (1u + (size_t)p->ndim) : 4;
    }
    out->num_params = v.num_params;
    out->no_softmax = defines(v.source, "VARIANT_NO_SOFTMAX");
    out->changes_queries = defines(v.source, "VARIANT_QUERY");
    out->changes_keys = defines(v.source, "VARIANT_KEY");
    return QKV_OK;
}

/* ---- compiling ---------------------------------------------------------------------------- */

/* The struct, then the user's text with its own line numbers. malloc'ed. */
static char *write_header(const variant_table *table, const char *source)
{
    const size_t bytes = strlen(source) + 256 + 160 * VARIANT_MAX_PARAMS;
    char *text = malloc(bytes);
    if (!text) return NULL;
    size_t at = (size_t)snprintf(text, bytes, "typedef struct variant_params {\n");
    for (int32_t i = 0; i < table->num_params; i++) {
        const variant_param *p = &table->params[i];
        if (p->type == QKV_PARAM_TENSOR)
            at += (size_t)snprintf(text + at, bytes - at,
                                   "    struct { const %s *data; long long stride[%d]; } %s;\n",
                                   element_type(p->dtype), (int)p->ndim, p->name);
        else
            at += (size_t)snprintf(text + at, bytes - at, "    %s %s;\n",
                                   p->type == QKV_PARAM_F32 ? "float" : "int", p->name);
    }
    if (table->num_params == 0) at += (size_t)snprintf(text + at, bytes - at, "    int none_;\n");
    snprintf(text + at, bytes - at, "} variant_params;\n#line 1 \"%s\"\n%s\n", table->name, source);
    return text;
}

qkv_status qi_variant_compile(const qkv_context *ctx, const qkv_attention_spec *spec,
                              const variant_table *table, qi_cpu_kernel entries[2])
{
    static const char *const names[] = {"attention_any", "attention_levels"};
    char what[VARIANT_MAX_NAME + 16], dims[96];
    snprintf(what, sizeof what, "variant %s", table->name);
    snprintf(dims, sizeof dims, "#define HEAD_DIM_QK %d\n#define HEAD_DIM_VO %d\n",
             (int)spec->head_dim_qk, (int)spec->head_dim_vo);
    char *header = write_header(table, spec->variant->source);
    if (!header) QI_FAIL(QKV_ERR_MEMORY, "variant: out of memory");
    const qi_source source = {
        .what = what, .main = "ops/attention/attention.cpu.c", .defines = dims, .header = header};
    const qkv_status status = qi_compile(ctx, &source, names, 2, entries);
    free(header);
    return status;
}

qkv_status qi_variant_compile_cuda(const qkv_context *ctx, const qkv_attention_spec *spec,
                                   const variant_table *table, const qi_kernel *row,
                                   const char *defines, const char *const *names, i32 count,
                                   cu_function *out)
{
    char what[VARIANT_MAX_NAME + 16], *header = NULL;
    qi_source source = {
        .what = row->name, .main = row->cuda.file, .defines = defines, .header = ""};
    if (table->num_params >= 0) {
        snprintf(what, sizeof what, "variant %s", table->name);
        header = write_header(table, spec->variant->source);
        if (!header) QI_FAIL(QKV_ERR_MEMORY, "variant: out of memory");
        source.what = what;
        source.header = header;
    }
    const qkv_status status = qi_compile_cuda(ctx, &source, names, count, out);
    free(header);
    return status;
}

/* ---- arguments ---------------------------------------------------------------------------- */

/* A tensor of the table's dtype, any shape of ndim axes, any strides. */
static qkv_status pack_tensor(const variant_param *p, const DLTensor *t, char *at)
{
    char name[VARIANT_MAX_NAME + 8];
    snprintf(name, sizeof name, "args.%s", p->name);
    static const int64_t any[VARIANT_MAX_NDIM] = {QI_ANY, QI_ANY, QI_ANY, QI_ANY};
    QI_TRY(qi_expect_strided(t, name, p->dtype, p->ndim, any));
    const void *data = qi_data(t);
    memcpy(at, &data, sizeof data);
    for (int i = 0; i < p->ndim; i++) {
        const int64_t stride = qi_stride(t, i);
        memcpy(at + 8 + 8 * i, &stride, sizeof stride);
    }
    return QKV_OK;
}

qkv_status qi_variant_pack(const variant_table *table, const qkv_attention_io *io,
                           variant_args *out)
{
    const int32_t expected = table->num_params < 0 ? 0 : table->num_params;
    QI_REQUIRE(io->num_args == expected, "num_args: expected %d, the variant's parameters, got %d",
               (int)expected, (int)io->num_args);
    QI_REQUIRE(expected == 0 || io->args, "args: expected %d arguments, got NULL", (int)expected);
    QI_REQUIRE(!table->no_softmax || !io->lse,
               "lse: expected NULL, since the variant has no softmax");
    for (int32_t i = 0; i < expected; i++) {
        const variant_param *p = &table->params[i];
        const qkv_arg *arg = &io->args[i];
        char *at = (char *)out->words + p->offset;
        switch (p->type) {
        case QKV_PARAM_F32: memcpy(at, &arg->f32, sizeof arg->f32); break;
        case QKV_PARAM_I32: memcpy(at, &arg->i32, sizeof arg->i32); break;
        default: QI_TRY(pack_tensor(p, arg->tensor, at)); break;
        }
    }
    return QKV_OK;
}
