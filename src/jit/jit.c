/* jit.c - see jit.h. An image is loaded from memory (a memfd): what was checked is what runs, and
 * neither a full disk nor a cache that forbids execution matters.
 * SPDX-License-Identifier: Apache-2.0 */
#include "jit/jit.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/sha256.h"
#include "device/cuda.h"
#include "jit/bundle.h"
#include "jit/cache.h"

/* ---- loaded kernels ----------------------------------------------------------------------- */

typedef struct module {
    struct module *next;
    char key[65];
    void *handle; /* NULL: someone is at it */
} module;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static module *modules;

static module **find(const char *key)
{
    module **m = &modules;
    while (*m && strcmp((*m)->key, key) != 0) m = &(*m)->next;
    return m;
}

/* The loaded module of a key; or NULL and the caller must publish() it or NULL. */
static void *claim(const char *key, qkv_status *status)
{
    void *handle = NULL;
    pthread_mutex_lock(&lock);
    module **m;
    while (*(m = find(key)) && !(*m)->handle) pthread_cond_wait(&changed, &lock);
    if (*m) {
        handle = (*m)->handle;
    } else if ((*m = calloc(1, sizeof **m))) {
        snprintf((*m)->key, sizeof(*m)->key, "%s", key);
    } else {
        *status = qi_fail(QKV_ERR_MEMORY, __FILE__, __LINE__, "variant: out of memory");
    }
    pthread_mutex_unlock(&lock);
    return handle;
}

static void publish(const char *key, void *handle)
{
    pthread_mutex_lock(&lock);
    module **m = find(key);
    (*m)->handle = handle;
    if (!handle) {
        module *failed = *m;
        *m = failed->next;
        free(failed);
    }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* fork() waits for the lock, so that the child has it. Who was compiling is not there any more: what
 * they were at is anybody's again. */
static void hold_modules(void)
{
    pthread_mutex_lock(&lock);
}

static void release_modules(void)
{
    pthread_mutex_unlock(&lock);
}

static void drop_unfinished(void)
{
    for (module **m = &modules; *m;) {
        module *one = *m;
        if (one->handle) {
            m = &one->next;
        } else {
            *m = one->next;
            free(one);
        }
    }
    changed = (pthread_cond_t)PTHREAD_COND_INITIALIZER; /* nobody waits here */
    pthread_mutex_unlock(&lock);
}

static qkv_status watch_forks(void)
{
    static atomic_int watched;
    if (atomic_exchange(&watched, 1) ||
        pthread_atfork(hold_modules, release_modules, drop_unfinished) == 0)
        return QKV_OK;
    atomic_store(&watched, 0);
    QI_FAIL(QKV_ERR_MEMORY, "context: out of memory");
}

/* ---- keys --------------------------------------------------------------------------------- */

static void add_text(qi_sha256 *hash, const char *text)
{
    qi_sha256_add(hash, text, strlen(text) + 1); /* the zero keeps neighbours apart */
}

static void make_key(const qi_jit_job *job, const char *compiler, char key[65])
{
    qi_sha256 hash;
    qi_sha256_init(&hash);
    qi_bundle_file file;
    for (int i = 0; qi_bundle(job->device, i, &file); i++) {
        add_text(&hash, file.path);
        qi_sha256_add(&hash, file.text, file.bytes);
    }
    const char *flags = job->device == kDLCUDA ? QI_NVRTC_FLAGS : qi_cc_flags(job->level);
    const char *const parts[] = {QI_KERNEL_FLAGS, flags ? flags : "", job->level, job->defines,
                                 job->header,     job->main,          compiler};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) add_text(&hash, parts[i]);
    qi_sha256_hex(&hash, key);
}

/* ---- what differs between devices ---------------------------------------------------------- */

/* The descriptor stays open: the loader takes two libraries of one path, here its number, for one. */
static void *load_library(const void *image, size_t bytes, const char **error)
{
    char path[64];
    *error = "memory could not be had";
    const int fd = memfd_create("qkv", MFD_CLOEXEC);
    if (fd < 0) return NULL;
    for (size_t at = 0; at < bytes;) {
        const ssize_t n = write(fd, (const char *)image + at, bytes - at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            close(fd);
            return NULL;
        }
        at += (size_t)n;
    }
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        *error = dlerror();
        close(fd);
    }
    return handle;
}

/* *out stays NULL for an image that cannot be loaded; *error is why. MEMORY, DEVICE: the GPU is at fault. */
static qkv_status load_image(DLDeviceType device, const void *image, size_t bytes, void **out,
                             const char **error)
{
    if (device == kDLCUDA) return qi_cuda_load_image(image, out, error);
    *out = load_library(image, bytes, error);
    return QKV_OK;
}

/* *out: NULL where there is none. */
static qkv_status find_symbol(DLDeviceType device, void *handle, const char *symbol, void **out)
{
    if (device == kDLCUDA) return qi_cuda_find(handle, symbol, out);
    *out = dlsym(handle, symbol);
    return QKV_OK;
}

const char *qi_jit_compiler(const qi_jit *jit, DLDeviceType device)
{
    return device == kDLCUDA ? qi_nvrtc_identity(jit->nvrtc) : jit->cc.identity;
}

static qkv_status run_compiler(const qi_jit *jit, const qi_jit_job *job, void **image,
                               size_t *bytes)
{
    return job->device == kDLCUDA ? qi_nvrtc_compile(jit->nvrtc, job, image, bytes, NULL)
                                  : qi_cc_compile(&jit->cc, job, image, bytes);
}

/* ---- images ------------------------------------------------------------------------------- */

/* From the cache: *handle stays NULL where there is no entry, or one that does not load. */
static qkv_status load_cached(const qi_jit *jit, const qi_jit_job *job, const char *key,
                              void **handle)
{
    void *image;
    size_t bytes;
    const char *error;
    const int found = jit->cache_dir[0] ? qi_cache_read(jit->cache_dir, key, &image, &bytes) : 0;
    if (found < 0) QI_FAIL(QKV_ERR_MEMORY, "%s: out of memory", job->what);
    if (found == 0) return QKV_OK;
    const qkv_status status = load_image(job->device, image, bytes, handle, &error);
    free(image);
    return status;
}

/* By the compiler. */
static qkv_status make_image(const qi_jit *jit, const qi_jit_job *job, void **image, size_t *bytes)
{
    const int64_t start = qi_now_ns();
    const int can = qi_jit_compiler(jit, job->device)[0] != '\0';
    if (jit->progress && can) jit->progress(jit->user, job->what, -1.0);
    const qkv_status status = run_compiler(jit, job, image, bytes);
    if (jit->progress && can)
        jit->progress(jit->user, job->what, (double)(qi_now_ns() - start) * 1e-9);
    return status;
}

/* Under its key and, for machines without this compiler, under the key that names none. */
static int write_cached(const qi_jit *jit, const char *key, const char *any_key, const void *image,
                        size_t bytes)
{
    const int written = qi_cache_write(jit->cache_dir, key, image, bytes);
    return qi_cache_write(jit->cache_dir, any_key, image, bytes) && written;
}

static qkv_status compile(const qi_jit *jit, const qi_jit_job *job, const char *key,
                          const char *any_key, void **handle)
{
    void *image;
    size_t bytes;
    const char *error;
    QI_TRY(make_image(jit, job, &image, &bytes));
    const qkv_status status = load_image(job->device, image, bytes, handle, &error);
    if (*handle && jit->cache_dir[0]) write_cached(jit, key, any_key, image, bytes);
    free(image);
    if (status != QKV_OK) return status;
    if (!*handle) QI_FAIL(QKV_ERR_COMPILE, "%s: cannot be loaded: %s", job->what, error);
    return QKV_OK;
}

static int is_cached(const qi_jit *jit, const char *key)
{
    void *image;
    size_t bytes;
    if (qi_cache_read(jit->cache_dir, key, &image, &bytes) <= 0) return 0;
    free(image);
    return 1;
}

/* How long to wait for another process that is at the same kernel. */
enum { PATIENCE_MS = 60000 };

static qkv_status fill_entry(const qi_jit *jit, const qi_jit_job *job, const char *key,
                             const char *any_key)
{
    void *image;
    size_t bytes;
    if (is_cached(jit, key) && is_cached(jit, any_key)) return QKV_OK;
    QI_TRY(make_image(jit, job, &image, &bytes));
    const int written = write_cached(jit, key, any_key, image, bytes);
    free(image);
    if (!written)
        QI_FAIL(QKV_ERR_COMPILE, "%s: cannot be written to the cache (%s)", job->what,
                jit->cache_dir);
    return QKV_OK;
}

/* Sees to it that the cache has the kernel; nothing is loaded. */
static qkv_status fill_cache(const qi_jit *jit, const qi_jit_job *job, const char *key,
                             const char *any_key)
{
    if (is_cached(jit, key) && is_cached(jit, any_key)) return QKV_OK;
    const int right = qi_cache_lock(jit->cache_dir, key, PATIENCE_MS);
    const qkv_status status = fill_entry(jit, job, key, any_key);
    qi_cache_unlock(jit->cache_dir, key, right);
    return status;
}

/* One of several processes that want a kernel compiles it. */
static qkv_status compile_once(const qi_jit *jit, const qi_jit_job *job, const char *key,
                               const char *any_key, const char **how, void **handle)
{
    const int right = qi_cache_lock(jit->cache_dir, key, PATIENCE_MS);
    qkv_status status = right >= 0 ? load_cached(jit, job, key, handle) : QKV_OK;
    if (status == QKV_OK && !*handle) {
        *how = "compiled";
        status = compile(jit, job, key, any_key, handle);
    }
    qi_cache_unlock(jit->cache_dir, key, right);
    return status;
}

static qkv_status make_module(const qi_jit *jit, const qi_jit_job *job, const char *key,
                              const char *any_key, const char **how, void **handle)
{
    *how = "cache";
    *handle = NULL;
    QI_TRY(load_cached(jit, job, key, handle));
    /* Where nothing can be compiled, what another machine's compiler made is welcome. */
    const int can_compile = jit->policy == QKV_JIT_ALLOW && qi_jit_compiler(jit, job->device)[0];
    if (!*handle && !can_compile) QI_TRY(load_cached(jit, job, any_key, handle));
    if (*handle) return QKV_OK;
    if (jit->policy == QKV_JIT_CACHED)
        QI_FAIL(
            QKV_ERR_COMPILE,
            "%s: jit_policy is QKV_JIT_CACHED, and the cache (%s) has no entry that can be loaded",
            job->what, jit->cache_dir[0] ? jit->cache_dir : "none");
    return compile_once(jit, job, key, any_key, how, handle);
}

qkv_status qi_jit_get(const qi_jit *jit, const qi_logger *logger, const qi_jit_job *job,
                      const char *const *symbols, int num_symbols, void **functions)
{
    if (jit->policy == QKV_JIT_NEVER)
        QI_FAIL(QKV_ERR_COMPILE, "%s: jit_policy is QKV_JIT_NEVER", job->what);
    char key[65], any_key[65];
    make_key(job, qi_jit_compiler(jit, job->device), key);
    make_key(job, "", any_key);
    for (int i = 0; i < num_symbols; i++) functions[i] = NULL;
    if (jit->policy == QKV_JIT_FILL) return fill_cache(jit, job, key, any_key);
    const int64_t start = qi_now_ns();
    const char *how = "loaded";
    qkv_status status = QKV_OK;
    void *handle = claim(key, &status);
    if (status != QKV_OK) return status;
    if (!handle) {
        status = make_module(jit, job, key, any_key, &how, &handle);
        publish(key, status == QKV_OK ? handle : NULL);
        if (status != QKV_OK) return status;
    }
    if (qi_verbose(logger, QI_VERBOSE_DISPATCH))
        qi_log(logger, "jit,%s,%s,%s,ms=%.2f", job->what, job->level, how,
               (double)(qi_now_ns() - start) * 1e-6);
    for (int i = 0; i < num_symbols; i++) {
        QI_TRY(find_symbol(job->device, handle, symbols[i], &functions[i]));
        if (!functions[i])
            QI_FAIL(QKV_ERR_INTERNAL, "%s: expected the symbol %s in the compiled kernel",
                    job->what, symbols[i]);
    }
    return QKV_OK;
}

qkv_status qi_jit_open(const qkv_context_options *options, int cuda_driver, qi_jit *out)
{
    const int cuda = options->device.device_type == kDLCUDA;
    QI_REQUIRE(options->jit_policy >= QKV_JIT_ALLOW &&
                   options->jit_policy <= (cuda ? QKV_JIT_FILL : QKV_JIT_NEVER),
               "jit_policy: expected QKV_JIT_ALLOW, QKV_JIT_CACHED or QKV_JIT_NEVER, or for CUDA "
               "QKV_JIT_FILL, got %d",
               (int)options->jit_policy);
    QI_TRY(watch_forks());
    *out = (qi_jit){.policy = options->jit_policy,
                    .progress = options->jit_progress,
                    .user = options->jit_user};
    qi_cache_dir(options->cache_dir, out->cache_dir, sizeof out->cache_dir);
    QI_REQUIRE(out->policy != QKV_JIT_FILL || out->cache_dir[0],
               "cache_dir: expected a folder with QKV_JIT_FILL, got none");
    if (cuda)
        out->nvrtc = qi_nvrtc_find(cuda_driver);
    else
        qi_cc_find(options->compiler, &out->cc);
    return QKV_OK;
}
