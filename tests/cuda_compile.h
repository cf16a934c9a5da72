/* cuda_compile.h - NVRTC over many jobs, two at a time, with what ptxas says of each; what is known from an
 * earlier run of the same sources, options and NVRTC is read from a folder: $QKV_TEST_CACHE, else one in the
 * build tree.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_CUDA_COMPILE_H
#define QKV_TESTS_CUDA_COMPILE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/sha256.h"
#include "base/status.h"
#include "jit/bundle.h"
#include "jit/cache.h"
#include "jit/nvrtc.h"

typedef struct compiled {
    qi_jit_job job;
    char defines[1024]; /* the job's */
    bool failed, cached;
    char error[1024]; /* why it failed */
    char *log;        /* of ptxas */
    size_t bytes;     /* of the image */
    double seconds;
} compiled;

/* ---- keys: a hash of what a compilation reads ------------------------------------------------- */

enum { MAX_FILES = 128 };

static inline bool bundled_file(const char *path, size_t bytes, int *index, qi_bundle_file *file)
{
    for (*index = 0; qi_bundle(kDLCUDA, *index, file); ++*index)
        if (strlen(file->path) == bytes && memcmp(file->path, path, bytes) == 0) return true;
    return false;
}

/* Adds a text and, once each, the bundled files that it includes. */
static inline void add_text(qi_sha256 *hash, const char *text, size_t bytes, bool seen[MAX_FILES])
{
    qi_sha256_add(hash, text, bytes);
    for (const char *at = text; (at = strstr(at, "#include \""));) {
        const char *path = at + strlen("#include \"");
        const size_t length = strcspn(path, "\"");
        int index;
        qi_bundle_file file;
        at = path + length;
        if (!bundled_file(path, length, &index, &file) || index >= MAX_FILES || seen[index])
            continue;
        seen[index] = true;
        add_text(hash, file.text, file.bytes, seen);
    }
}

static inline void compile_key(const qi_nvrtc *nvrtc, const qi_jit_job *job, char key[65])
{
    const char *const parts[] = {"log 2", QI_NVRTC_FLAGS, qi_nvrtc_identity(nvrtc), job->level,
                                 job->header};
    bool seen[MAX_FILES] = {false};
    char main_file[256];
    qi_sha256 hash;
    qi_sha256_init(&hash);
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        qi_sha256_add(&hash, parts[i], strlen(parts[i]) + 1);
    qi_sha256_add(&hash, job->defines, strlen(job->defines) + 1);
    const int n = snprintf(main_file, sizeof main_file, "#include \"%s\"", job->main);
    add_text(&hash, main_file, (size_t)n, seen);
    qi_sha256_hex(&hash, key);
}

/* ---- compiling -------------------------------------------------------------------------------- */

static inline const char *compile_cache(void)
{
    const char *folder = getenv("QKV_TEST_CACHE");
    return folder ? folder : QKV_BINARY_DIR "/compiled";
}

/* An entry is the image's size and a zero-terminated log. */
static inline bool read_compiled(const char *key, compiled *c)
{
    void *entry;
    size_t bytes;
    if (qi_cache_read(compile_cache(), key, &entry, &bytes) <= 0) return false;
    if (bytes > sizeof c->bytes && ((char *)entry)[bytes - 1] == '\0') {
        memcpy(&c->bytes, entry, sizeof c->bytes);
        c->log = strdup((char *)entry + sizeof c->bytes);
        c->cached = c->log != NULL;
    }
    free(entry);
    return c->cached;
}

static inline void write_compiled(const char *key, const compiled *c)
{
    const size_t log_bytes = strlen(c->log) + 1, bytes = sizeof c->bytes + log_bytes;
    char *entry = malloc(bytes);
    if (!entry) return;
    memcpy(entry, &c->bytes, sizeof c->bytes);
    memcpy(entry + sizeof c->bytes, c->log, log_bytes);
    qi_cache_write(compile_cache(), key, entry, bytes);
    free(entry);
}

static inline void compile_one(const qi_nvrtc *nvrtc, compiled *c)
{
    char key[65];
    void *image = NULL;
    compile_key(nvrtc, &c->job, key);
    if (read_compiled(key, c)) return;
    const int64_t start = qi_now_ns();
    c->failed = qi_nvrtc_compile(nvrtc, &c->job, &image, &c->bytes, &c->log) != QKV_OK;
    c->seconds = (double)(qi_now_ns() - start) * 1e-9;
    free(image);
    if (c->failed)
        snprintf(c->error, sizeof c->error, "%s", qkv_last_error());
    else if (c->log)
        write_compiled(key, c);
}

typedef struct compile_queue {
    const qi_nvrtc *nvrtc;
    compiled *jobs;
    int num_jobs;
    atomic_int next;
} compile_queue;

static inline void *compile_some(void *arg)
{
    compile_queue *q = arg;
    for (int i; (i = atomic_fetch_add(&q->next, 1)) < q->num_jobs;)
        compile_one(q->nvrtc, &q->jobs[i]);
    return NULL;
}

/* Fills in what follows defines. */
static inline void compile_all(const qi_nvrtc *nvrtc, compiled *jobs, int num_jobs)
{
    setenv("CUDA_CACHE_DISABLE", "1", 1); /* NVRTC's own cache has no log */
    compile_queue q = {.nvrtc = nvrtc, .jobs = jobs, .num_jobs = num_jobs};
    pthread_t second;
    const bool two = pthread_create(&second, NULL, compile_some, &q) == 0;
    compile_some(&q);
    if (two) pthread_join(second, NULL);
}

/* ---- what ptxas says -------------------------------------------------------------------------- */

/* The largest number that stands before these words, of all kernels of the log. */
static inline int ptxas_says(const char *log, const char *words)
{
    int most = 0;
    for (const char *at = log; at && (at = strstr(at, words)); at++) {
        const char *number = at;
        while (number > log && number[-1] >= '0' && number[-1] <= '9') number--;
        const int n = atoi(number);
        if (n > most) most = n;
    }
    return most;
}

#endif
