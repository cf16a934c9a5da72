/* nvrtc.c - see nvrtc.h. Sources are handed over from memory; nothing is read from or written to disk.
 * SPDX-License-Identifier: Apache-2.0 */
#include "jit/nvrtc.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/env.h"
#include "device/find_library.h"
#include "jit/bundle.h"

typedef struct program *program;

/* name here, symbol, arguments; all return 0 or an error number */
#define NVRTC_API(X)                                                                               \
    X(version, "nvrtcVersion", (int *major, int *minor))                                           \
    X(num_archs, "nvrtcGetNumSupportedArchs", (int *count))                                        \
    X(archs, "nvrtcGetSupportedArchs", (int *archs))                                               \
    X(create, "nvrtcCreateProgram",                                                                \
      (program * out, const char *source, const char *name, int num_headers,                       \
       const char *const *headers, const char *const *names))                                      \
    X(destroy, "nvrtcDestroyProgram", (program * p))                                               \
    X(compile, "nvrtcCompileProgram", (program p, int num_options, const char *const *options))    \
    X(log_bytes, "nvrtcGetProgramLogSize", (program p, size_t * bytes))                            \
    X(log, "nvrtcGetProgramLog", (program p, char *log))                                           \
    X(cubin_bytes, "nvrtcGetCUBINSize", (program p, size_t * bytes))                               \
    X(cubin, "nvrtcGetCUBIN", (program p, char *image))                                            \
    X(ptx_bytes, "nvrtcGetPTXSize", (program p, size_t * bytes))                                   \
    X(ptx, "nvrtcGetPTX", (program p, char *image))

typedef struct nvrtc_api {
#define X(name, symbol, args) int(*name) args;
    NVRTC_API(X)
#undef X
} nvrtc_api;

enum { MAX_ARCHS = 64, OLDEST = 12080 };

struct qi_nvrtc {
    nvrtc_api api;
    char identity[32];
    int major, minor;
    int num_archs, archs[MAX_ARCHS];
};

/* ---- finding it --------------------------------------------------------------------------- */

/* NVRTC asks the loader for its builtins by name, which finds them beside it only if they are loaded already. */
static void open_builtins(const char *path, const qi_nvrtc *n)
{
    const char *slash = strrchr(path, '/');
    char builtins[1024];
    if (!slash) return; /* the loader knows the folder */
    snprintf(builtins, sizeof builtins, "%.*s/libnvrtc-builtins.so.%d.%d", (int)(slash - path),
             path, n->major, n->minor);
    dlopen(builtins, RTLD_NOW | RTLD_LOCAL);
}

/* Fills n from the library at path; 0 if that is no NVRTC, or too old. */
static int open_library(const char *path, void *user)
{
    qi_nvrtc *n = user;
    static const struct {
        const char *symbol;
        size_t offset;
    } table[] = {
#define X(name, symbol, args) {symbol, offsetof(nvrtc_api, name)},
        NVRTC_API(X)
#undef X
    };
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return 0;
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        void *function = dlsym(library, table[i].symbol);
        if (!function) goto close;
        memcpy((char *)&n->api + table[i].offset, &function, sizeof function);
    }
    if (n->api.version(&n->major, &n->minor) != 0 || n->major * 1000 + n->minor * 10 < OLDEST)
        goto close;
    if (n->api.num_archs(&n->num_archs) != 0 || n->num_archs > MAX_ARCHS ||
        n->api.archs(n->archs) != 0)
        goto close;
    snprintf(n->identity, sizeof n->identity, "nvrtc %d.%d", n->major, n->minor);
    open_builtins(path, n);
    return 1;

close:
    dlclose(library);
    return 0;
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static qi_nvrtc *nvrtc; /* the process's */
static int looked;

static void look(int driver)
{
    enum { NEWEST = 14, OLDEST_MAJOR = 12 };
    qi_nvrtc *n = calloc(1, sizeof *n);
    if (!n) return;
    const char *wanted = qi_env(QI_ENV_NVRTC);
    int opened = wanted ? open_library(wanted, n) : 0;
    if (!wanted && driver >= OLDEST_MAJOR * 1000)
        opened = qi_find_cuda_library("libnvrtc", driver / 1000, open_library, n);
    for (int major = NEWEST; !wanted && !opened && major >= OLDEST_MAJOR; major--)
        opened = qi_find_cuda_library("libnvrtc", major, open_library, n);
    if (opened)
        nvrtc = n;
    else
        free(n);
}

const qi_nvrtc *qi_nvrtc_find(int driver)
{
    pthread_mutex_lock(&lock);
    if (!looked) look(driver);
    looked = 1;
    pthread_mutex_unlock(&lock);
    return nvrtc;
}

const char *qi_nvrtc_identity(const qi_nvrtc *n)
{
    return n ? n->identity : "";
}

void qi_nvrtc_level(const qi_nvrtc *n, int major, int minor, char level[QI_ARCH_BYTES])
{
    const int arch = major * 10 + minor;
    int newest = 0; /* of those that the device runs too */
    for (int i = 0; n && i < n->num_archs; i++)
        if (n->archs[i] <= arch && n->archs[i] > newest) newest = n->archs[i];
    if (!n || newest == arch)
        snprintf(level, QI_ARCH_BYTES, "sm_%d%s", arch, major >= 9 ? "a" : "");
    else
        snprintf(level, QI_ARCH_BYTES, "compute_%d", newest);
}

/* ---- running it --------------------------------------------------------------------------- */

#define ONE_MORE(id, path) +1
enum { NUM_HEADERS = QI_BUNDLE_SHARED(ONE_MORE) QI_BUNDLE_CUDA(ONE_MORE) + 1 };

/* The bundled files under their paths, and the variant's text; returns how many. */
static int list_headers(const qi_jit_job *job, const char *texts[NUM_HEADERS],
                        const char *names[NUM_HEADERS])
{
    int count = 0;
    qi_bundle_file file;
    for (int i = 0; qi_bundle(kDLCUDA, i, &file); i++) {
        names[count] = file.path;
        texts[count++] = file.text; /* a zero follows */
    }
    names[count] = "qi_variant.h";
    texts[count++] = job->header;
    return count;
}

/* What NVRTC said, malloc'ed; NULL where there is nothing or no memory. */
static char *read_log(const qi_nvrtc *n, program p)
{
    size_t bytes = 0;
    if (n->api.log_bytes(p, &bytes) != 0 || bytes == 0) return NULL;
    char *text = malloc(bytes);
    if (text && n->api.log(p, text) != 0) text[0] = '\0';
    return text;
}

static qkv_status read_image(const qi_nvrtc *n, program p, const qi_jit_job *job, void **image,
                             size_t *bytes)
{
    const int ptx = strncmp(job->level, "compute_", 8) == 0;
    const int sized = ptx ? n->api.ptx_bytes(p, bytes) : n->api.cubin_bytes(p, bytes);
    if (sized != 0 || *bytes == 0)
        QI_FAIL(QKV_ERR_COMPILE, "%s: NVRTC made no code for %s", job->what, job->level);
    *image = malloc(*bytes);
    if (!*image) QI_FAIL(QKV_ERR_MEMORY, "%s: out of memory for the compiled kernel", job->what);
    if (ptx)
        n->api.ptx(p, *image);
    else
        n->api.cubin(p, *image);
    return QKV_OK;
}

static qkv_status compile_program(const qi_nvrtc *n, program p, const qi_jit_job *job, void **image,
                                  size_t *bytes, char **log)
{
    enum { MAX_OPTIONS = 16 };
    char arch[64], flags[] = QI_NVRTC_FLAGS, *rest;
    const char *options[MAX_OPTIONS] = {arch, "--ptxas-options=-v"};
    int count = log ? 2 : 1;
    snprintf(arch, sizeof arch, "--gpu-architecture=%s", job->level);
    if (job->header[0]) options[count++] = "--define-macro=QI_VARIANT";
    for (char *word = strtok_r(flags, " ", &rest); word && count < MAX_OPTIONS;
         word = strtok_r(NULL, " ", &rest))
        options[count++] = word;
    const int result = n->api.compile(p, count, options);
    char *said = read_log(n, p);
    qkv_status status = QKV_OK;
    if (result != 0) {
        char lines[1024] = "";
        if (said) qi_first_lines(said, lines, sizeof lines);
        status = qi_fail(QKV_ERR_COMPILE, __FILE__, __LINE__, "%s: %s for %s failed: %s", job->what,
                         n->identity, job->level, lines[0] ? lines : "it said nothing");
    } else {
        status = read_image(n, p, job, image, bytes);
    }
    if (log && status == QKV_OK)
        *log = said;
    else
        free(said);
    return status;
}

qkv_status qi_nvrtc_compile(const qi_nvrtc *n, const qi_jit_job *job, void **image, size_t *bytes,
                            char **log)
{
    if (!n)
        QI_FAIL(QKV_ERR_COMPILE,
                "%s: expected NVRTC 12.8 or newer (libnvrtc.so, of a CUDA toolkit or a Python "
                "package; or QKV_NVRTC) to compile it with, found none",
                job->what);
    const char *texts[NUM_HEADERS], *names[NUM_HEADERS];
    const int count = list_headers(job, texts, names);
    const size_t room = strlen(job->defines) + strlen(job->main) + 32;
    char *source = malloc(room);
    if (!source) QI_FAIL(QKV_ERR_MEMORY, "%s: out of memory", job->what);
    snprintf(source, room, "%s#include \"%s\"\n", job->defines, job->main);
    program p = NULL;
    const int result = n->api.create(&p, source, "main.cu", count, texts, names);
    free(source);
    if (result != 0) QI_FAIL(QKV_ERR_MEMORY, "%s: NVRTC cannot begin: error %d", job->what, result);
    const qkv_status status = compile_program(n, p, job, image, bytes, log);
    n->api.destroy(&p);
    return status;
}
