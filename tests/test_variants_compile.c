/* test_variants_compile.c - what compilers make of each example: on the CPU every hook's loop becomes
 * vectors, and NVRTC takes the same text for each GPU generation.
 * SPDX-License-Identifier: Apache-2.0 */
#include <dirent.h>
#include <dlfcn.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <unistd.h>

#include "jit/nvrtc.h"
#include "support.h"

/* A file of examples/variants, and the table of parameters that its comment gives. */
typedef struct example {
    char name[64], file[512];
    char *text;
    qkv_param params[8];
    char param_names[8][64];
    int32_t num_params;
} example;

static char *read_text(const char *path)
{
    FILE *file = fopen(path, "r");
    if (!file) return NULL;
    char *text = calloc(1, 1 << 20);
    assert_non_null(text);
    const size_t n = fread(text, 1, (1 << 20) - 1, file);
    fclose(file);
    text[n] = '\0';
    return text;
}

/* " *   bias  tensor f32 [heads, positions]  words", or "f32" or "i32" in the tensor's place. */
static void read_params(example *x)
{
    const char *at = strstr(x->text, " * Parameters\n");
    for (at = at ? strchr(at, '\n') + 1 : ""; strncmp(at, " *   ", 5) == 0;
         at = strchr(at, '\n') + 1) {
        char type[16], element[16], shape[128];
        char *name = x->param_names[x->num_params];
        qkv_param *p = &x->params[x->num_params];
        if (sscanf(at, " *   %63s tensor %15s [%127[^]]]", name, element, shape) == 3) {
            *p = (qkv_param){.name = name, .type = QKV_PARAM_TENSOR, .ndim = 1};
            for (const char *c = shape; *c; c++) p->ndim += *c == ',';
            p->dtype = strcmp(element, "f32") == 0   ? QKV_F32
                       : strcmp(element, "i32") == 0 ? QKV_I32
                                                     : QKV_U8;
        } else if (at[5] != ' ' && sscanf(at, " *   %63s %15s", name, type) == 2 &&
                   (strcmp(type, "f32") == 0 || strcmp(type, "i32") == 0)) {
            *p = (qkv_param){.name = name, .type = type[0] == 'f' ? QKV_PARAM_F32 : QKV_PARAM_I32};
        } else {
            continue; /* a second line of words */
        }
        x->num_params++;
    }
}

/* Calls body for every example. */
static void every_example(void (*body)(const example *x, void *user), void *user)
{
    DIR *folder = opendir(QKV_VARIANTS_DIR);
    assert_non_null(folder);
    int count = 0;
    for (const struct dirent *entry; (entry = readdir(folder));) {
        const char *dot = strrchr(entry->d_name, '.');
        if (!dot || strcmp(dot, ".h") != 0) continue;
        example x = {.num_params = 0};
        snprintf(x.name, sizeof x.name, "%.*s", (int)(dot - entry->d_name), entry->d_name);
        snprintf(x.file, sizeof x.file, "%s/%s", QKV_VARIANTS_DIR, entry->d_name);
        x.text = read_text(x.file);
        assert_non_null(x.text);
        read_params(&x);
        body(&x, user);
        free(x.text);
        count++;
    }
    closedir(folder);
    assert_true(count >= 10);
}

static bool has_hook(const example *x, const char *hook)
{
    char line[80];
    snprintf(line, sizeof line, "#define %s 1", hook);
    return strstr(x->text, line) != NULL;
}

/* ---- vectors ------------------------------------------------------------------------------ */

static char work[] = "/tmp/qkv-test-XXXXXX";

/* A compiler that also writes what it vectorised to work/report. */
static void write_compiler(char *path, size_t bytes)
{
    snprintf(path, bytes, "%s/cc", work);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fprintf(file,
            "#!/bin/sh\n"
            "case $(cc --version) in\n"
            "*clang*) exec cc \"$@\" -Rpass=loop-vectorize 2>%s/report ;;\n"
            "*) exec cc \"$@\" -fopt-info-vec-optimized=%s/report ;;\n"
            "esac\n",
            work, work);
    fclose(file);
    assert_int_equal(chmod(path, 0700), 0);
}

/* Does the report say that the loop marked with this hook was vectorised? */
static bool is_vectorised(const char *report, const char *hook)
{
    char mark[64], place[64];
    snprintf(mark, sizeof mark, "vectorises: %s ", hook);
    char *source = read_text(QKV_SOURCE_DIR "/ops/attention/hooks.cpu.h");
    assert_non_null(source);
    const char *at = strstr(source, mark);
    assert_non_null(at);
    int line = 1;
    for (const char *c = source; c < at; c++) line += *c == '\n';
    free(source);
    snprintf(place, sizeof place, "hooks.cpu.h:%d:", line);
    for (const char *found = report; (found = strstr(found, place)); found++) {
        const char *end = strchr(found, '\n');
        const char *says = strstr(found, "vectorized");
        if (says && end && says < end && strstr(found, "loop") < end) return true;
    }
    return false;
}

static void expect_vectors(const example *x, void *user)
{
    static const char *const hooks[] = {"VARIANT_LOGIT", "VARIANT_MASK", "VARIANT_QUERY",
                                        "VARIANT_KEY", "VARIANT_OUTPUT"};
    qkv_context *ctx = user;
    const qkv_variant variant = {QKV_VARIANT_INIT, .name = x->name, .source = x->text,
                                 .params = x->params, .num_params = x->num_params};
    const qkv_attention_spec spec = {
        QKV_ATTENTION_SPEC_INIT, .num_qo_heads = 8,   .num_kv_heads = 2,
        .head_dim_qk = 128,      .head_dim_vo = 128,  .dtype_q = QKV_BF16,
        .dtype_kv = QKV_BF16,    .dtype_o = QKV_BF16, .variant = &variant};
    const qkv_attention_limits limits = {QKV_ATTENTION_LIMITS_INIT, .max_requests = 1,
                                         .max_tokens = 64, .max_kv_len = 64};
    EXPECT_OK(qkv_attention_warm_up(ctx, &spec, &limits));
    char path[64];
    snprintf(path, sizeof path, "%s/report", work);
    char *report = read_text(path);
    assert_non_null(report);
    for (size_t i = 0; i < sizeof hooks / sizeof hooks[0]; i++)
        if (has_hook(x, hooks[i]) && !is_vectorised(report, hooks[i]))
            fail_msg("%s: the loop over %s was not vectorised (%s)", x->name, hooks[i],
                     qkv_context_device_name(ctx));
    free(report);
    unlink(path);
}

static void variants_vectorise(void **state)
{
    (void)state;
    char compiler[64];
    assert_non_null(mkdtemp(work));
    write_compiler(compiler, sizeof compiler);
    int32_t usable;
    const char *level;
    for (int32_t i = 0; (level = qkv_cpu_level(i, &usable)); i++) {
        if (!usable || qkv_cpu_level(i + 1, NULL)) continue; /* the last: the quickest to compile */
        qkv_context *ctx;
        EXPECT_OK(qkv_context_create(&(qkv_context_options){QKV_CONTEXT_OPTIONS_INIT, .isa = level,
                                                            .num_threads = 1, .cache_dir = "",
                                                            .compiler = compiler},
                                     &ctx));
        every_example(expect_vectors, ctx);
        qkv_context_destroy(ctx);
    }
    unlink(compiler);
    rmdir(work);
}

/* ---- NVRTC -------------------------------------------------------------------------------- */

typedef struct nvrtc {
    void *handle;
    int (*create)(void **program, const char *source, const char *name, int headers,
                  const char *const *texts, const char *const *names);
    int (*compile)(void *program, int options, const char *const *option);
    int (*log_size)(void *program, size_t *bytes);
    int (*log)(void *program, char *text);
    int (*destroy)(void **program);
} nvrtc;

static bool open_nvrtc(nvrtc *n)
{
    static const char *const names[] = {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so",
                                        "/usr/local/cuda/lib64/libnvrtc.so",
                                        "/usr/local/cuda-13.0/lib/libnvrtc.so"};
    const char *wanted = getenv("QKV_NVRTC");
    qi_nvrtc_find(0); /* loads what lies beside it, too */
    if (wanted && *wanted) n->handle = dlopen(wanted, RTLD_NOW);
    for (size_t i = 0; i < sizeof names / sizeof names[0] && !n->handle; i++)
        n->handle = dlopen(names[i], RTLD_NOW);
    if (!n->handle) return false;
    const struct {
        const char *name;
        void *slot;
    } symbols[] = {{"nvrtcCreateProgram", &n->create},
                   {"nvrtcCompileProgram", &n->compile},
                   {"nvrtcGetProgramLogSize", &n->log_size},
                   {"nvrtcGetProgramLog", &n->log},
                   {"nvrtcDestroyProgram", &n->destroy}};
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *symbol = dlsym(n->handle, symbols[i].name);
        assert_non_null(symbol);
        memcpy(symbols[i].slot, &symbol, sizeof symbol);
    }
    return true;
}

/* The text between the variant's maths and a kernel that calls every hook it has. */
static void expect_gpu_code(const example *x, void *user)
{
    const nvrtc *n = user;
    static char source[1 << 21];
    char *library = read_text(QKV_SOURCE_DIR "/kern/variant.h");
    assert_non_null(library);
    int at = snprintf(source, sizeof source, "%s\ntypedef struct variant_params {\n", library);
    free(library);
#define ADD(...) at += snprintf(source + at, sizeof source - (size_t)at, __VA_ARGS__)
    for (int32_t i = 0; i < x->num_params; i++) {
        const qkv_param *p = &x->params[i];
        const char *type = p->dtype.code == 2    ? "float"
                           : p->dtype.bits == 32 ? "int"
                                                 : "unsigned char";
        if (p->type == QKV_PARAM_TENSOR)
            ADD("struct { const %s *data; long long stride[%d]; } %s;\n", type, p->ndim, p->name);
        else
            ADD("%s %s;\n", p->type == QKV_PARAM_F32 ? "float" : "int", p->name);
    }
    ADD("int none_; } variant_params;\n#line 1 \"%s\"\n%s\n", x->name, x->text);
    ADD("extern \"C\" __global__ void hooks(const variant_params v, qi_pos pos, float *x) {\n"
        "  float y = x[threadIdx.x]; qi_pair pair = {y, y + 1.f};\n");
    if (has_hook(x, "VARIANT_QUERY")) ADD("  pair = variant_query(&v, pos, 2, pair);\n");
    if (has_hook(x, "VARIANT_KEY")) ADD("  pair = variant_key(&v, pos, 2, pair);\n");
    if (has_hook(x, "VARIANT_LOGIT")) ADD("  y = variant_logit(&v, pos, pair.x + pair.y);\n");
    if (has_hook(x, "VARIANT_MASK")) ADD("  if (!variant_mask(&v, pos)) y = 0.f;\n");
    if (has_hook(x, "VARIANT_STATE")) ADD("  y += variant_state(&v, pos);\n");
    if (has_hook(x, "VARIANT_OUTPUT")) ADD("  y = variant_output(&v, pos, 3, y);\n");
    ADD("  x[threadIdx.x] = y + pair.x;\n}\n");
#undef ADD
    static const char *const archs[] = {"--gpu-architecture=sm_80", "--gpu-architecture=sm_90a",
                                        "--gpu-architecture=sm_100a"};
    for (int i = 0; i < 3; i++) {
        void *program;
        const char *options[] = {archs[i], "--std=c++17"};
        assert_int_equal(n->create(&program, source, x->name, 0, NULL, NULL), 0);
        if (n->compile(program, 2, options) != 0) {
            size_t bytes;
            n->log_size(program, &bytes);
            char *log = calloc(bytes + 1, 1);
            n->log(program, log);
            fail_msg("%s, %s: %s", x->name, archs[i], log);
        }
        n->destroy(&program);
    }
}

static void variants_compile_for_gpus(void **state)
{
    (void)state;
    nvrtc n = {.handle = NULL};
    if (!open_nvrtc(&n)) {
        printf("skipped: no libnvrtc on this machine\n");
        skip();
    }
    every_example(expect_gpu_code, &n);
    dlclose(n.handle);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(variants_vectorise),
        cmocka_unit_test(variants_compile_for_gpus),
    };
    return cmocka_run_group_tests_name("variants_compile", tests, NULL, NULL);
}
