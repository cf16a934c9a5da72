/* gpu_process.h - kernels of the tests' own, and processes that run them with the driver alone: after a fault a GPU
 * takes nothing more from the process whose kernel it was.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_GPU_PROCESS_H
#define QKV_TESTS_GPU_PROCESS_H

#include <sys/wait.h>
#include <unistd.h>

#include "device/cuda_api.h"
#include "jit/nvrtc.h"
#include "support.h"

enum { SUCCEEDED, FAILED }; /* a process */

/* In a process. */
#define MUST(call)                                                                                 \
    do {                                                                                           \
        const int result_ = (call);                                                                \
        if (result_ != 0) {                                                                        \
            fprintf(stderr, "%s: error %d\n", #call, result_);                                     \
            _exit(FAILED);                                                                         \
        }                                                                                          \
    } while (0)

/* ---- kernels -------------------------------------------------------------------------------- */

static inline char *append_file(char *text, const char *name)
{
    char path[512];
    snprintf(path, sizeof path, QKV_SOURCE_DIR "/../tests/%s", name);
    FILE *file = fopen(path, "r");
    if (!file) fail_msg("no file %s", path);
    size_t used = text ? strlen(text) : 0, got;
    do {
        text = realloc(text, used + 4097);
        got = fread(text + used, 1, 4096, file);
        used += got;
    } while (got > 0);
    text[used] = '\0';
    fclose(file);
    return text;
}

/* The image of a file of tests/, whose parameters another declares, for a level as "sm_90a". */
static inline void *compile_kernels(const char *kernels, const char *params, const char *level,
                                    const char *defines)
{
    void *image;
    size_t bytes;
    char *text = append_file(append_file(NULL, params), kernels);
    const qi_jit_job job = {.what = kernels,
                            .device = kDLCUDA,
                            .level = level,
                            .defines = defines,
                            .header = text,
                            .main = "qi_variant.h"};
    if (qi_nvrtc_compile(qi_nvrtc_find(0), &job, &image, &bytes, NULL) != QKV_OK) {
        fprintf(stderr, "%s\n", qkv_last_error());
        exit(1);
    }
    free(text);
    return image;
}

/* ---- processes -------------------------------------------------------------------------------- */

typedef struct outcome {
    int code;
    char said[4096]; /* to stderr */
} outcome;

static inline int attribute(int which)
{
    int value = 0;
    MUST(qi_cuda.device_attribute(&value, which, 0));
    return value;
}

/* The first GPU's context is current then. */
static inline void open_device(void)
{
    cu_context context;
    MUST((int)qi_cuda_load());
    MUST(qi_cuda.init(0));
    MUST(qi_cuda.primary_retain(&context, 0));
    MUST(qi_cuda.context_set(context));
}

/* What body(argument) in a process of its own comes to, after open_device(). seed: of the emulator, 0: none. */
static inline outcome run_process(int (*body)(const void *), const void *argument, int seed)
{
    outcome out = {.code = -1};
    char number[16];
    int ends[2], status;
    fflush(NULL);
    assert_int_equal(pipe(ends), 0);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        snprintf(number, sizeof number, "%d", seed);
        if (seed)
            setenv("QKV_EMULATOR_SEED", number, 1);
        else
            unsetenv("QKV_EMULATOR_SEED");
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        open_device();
        _exit(body(argument));
    }
    close(ends[1]);
    ssize_t got;
    size_t used = 0;
    while ((got = read(ends[0], out.said + used, sizeof out.said - 1 - used)) > 0)
        used += (size_t)got;
    close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFEXITED(status)) out.code = WEXITSTATUS(status);
    return out;
}

static inline void expect_success(const char *what, const outcome *out)
{
    if (out->code != SUCCEEDED) fail_msg("%s: exit code %d: %s", what, out->code, out->said);
}

/* ---- in a process: memory -------------------------------------------------------------------- */

static inline void *device_memory(size_t bytes, const void *from)
{
    cu_ptr p;
    MUST(qi_cuda.memory_alloc(&p, bytes));
    if (from)
        MUST(qi_cuda.copy_async(p, (cu_ptr)(uintptr_t)from, bytes, NULL));
    else
        MUST(qi_cuda.memset_async(p, 0xff, bytes, NULL));
    return (void *)(uintptr_t)p;
}

static inline void read_back(void *to, const void *from, size_t bytes)
{
    MUST(qi_cuda.copy_async((cu_ptr)(uintptr_t)to, (cu_ptr)(uintptr_t)from, bytes, NULL));
    MUST(qi_cuda.stream_synchronize(NULL));
}

#endif
