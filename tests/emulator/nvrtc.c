/* nvrtc.c - the emulated run-time compiler, libnvrtc.so.13: a "cubin" is a shared object that the system's
 * C++ compiler makes of the program's texts with emulator.h before them and this folder's *.cuh in the place
 * of the real ones.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "translate.h"

#define EXPORT __attribute__((visibility("default")))

typedef enum nvrtcResult {
    SUCCESS = 0,
    OUT_OF_MEMORY = 1,
    INVALID_INPUT = 3,
    COMPILATION = 6
} nvrtcResult;

typedef struct program {
    char *source;
    int num_headers;
    const char *const *headers, *const *names; /* the caller's, as long as the program */
    char *log, *image;
    size_t image_bytes;
} program;

extern char **environ;

EXPORT nvrtcResult nvrtcVersion(int *major, int *minor)
{
    *major = 13;
    *minor = 0;
    return SUCCESS;
}

static const int architectures[] = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121};
enum { NUM_ARCHITECTURES = sizeof architectures / sizeof architectures[0] };

EXPORT nvrtcResult nvrtcGetNumSupportedArchs(int *count)
{
    *count = NUM_ARCHITECTURES;
    return SUCCESS;
}

EXPORT nvrtcResult nvrtcGetSupportedArchs(int *archs)
{
    memcpy(archs, architectures, sizeof architectures);
    return SUCCESS;
}

EXPORT const char *nvrtcGetErrorString(nvrtcResult result)
{
    return result == SUCCESS ? "NVRTC_SUCCESS" : "NVRTC_ERROR";
}

EXPORT nvrtcResult nvrtcCreateProgram(program **out, const char *source, const char *name,
                                      int num_headers, const char *const *headers,
                                      const char *const *names)
{
    (void)name;
    program *p = calloc(1, sizeof *p);
    if (!p) return OUT_OF_MEMORY;
    *p = (program){
        .source = strdup(source), .num_headers = num_headers, .headers = headers, .names = names};
    *out = p;
    return p->source ? SUCCESS : OUT_OF_MEMORY;
}

EXPORT nvrtcResult nvrtcDestroyProgram(program **p)
{
    free((*p)->source);
    free((*p)->log);
    free((*p)->image);
    free(*p);
    *p = NULL;
    return SUCCESS;
}

/* ---- files ---------------------------------------------------------------------------------- */

enum { PATH_BYTES = 1024 };

/* Writes folder/name, and the folders on the way to it. */
static bool write_text(const char *folder, const char *name, const char *text)
{
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    for (char *slash = path + strlen(folder) + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
        *slash = '\0';
        mkdir(path, 0700);
    }
    FILE *file = fopen(path, "w");
    if (!file) return false;
    const bool whole = fputs(text, file) >= 0;
    return fclose(file) == 0 && whole;
}

static bool write_translated(const char *folder, const char *name, const char *text)
{
    char *translated = translate(text);
    const bool done = translated && write_text(folder, name, translated);
    free(translated);
    return done;
}

static char *read_file(const char *folder, const char *name, size_t *bytes)
{
    char path[PATH_BYTES];
    struct stat status;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "r");
    if (!file) return NULL;
    char *text = NULL;
    if (fstat(fileno(file), &status) == 0) text = malloc((size_t)status.st_size + 1);
    *bytes = text ? fread(text, 1, (size_t)status.st_size, file) : 0;
    if (text) text[*bytes] = '\0';
    fclose(file);
    return text;
}

static int remove_one(const char *path, const struct stat *status, int kind, struct FTW *where)
{
    (void)status, (void)kind, (void)where;
    return remove(path);
}

/* Whether it wraps a GPU's instructions: this folder has one of the same name. */
static bool is_replaced(const char *header)
{
    static const char *const names[] = {"kern/cuda/ptx.cuh", "kern/cuda/tma.cuh",
                                        "kern/cuda/cluster.cuh", "kern/cuda/mma_sm90.cuh"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(header, names[i]) == 0) return true;
    return false;
}

static bool write_replaced(const char *folder, const char *name)
{
    char text[PATH_BYTES];
    snprintf(text, sizeof text, "#include \"" EMULATOR_DIR "%s\"\n", strrchr(name, '/'));
    return write_text(folder, name, text);
}

static bool write_program(const program *p, const char *folder)
{
    bool done = write_translated(folder, "main.cu", p->source);
    for (int i = 0; i < p->num_headers && done; i++)
        done = is_replaced(p->names[i]) ? write_replaced(folder, p->names[i])
                                        : write_translated(folder, p->names[i], p->headers[i]);
    return done;
}

/* ---- compiling ------------------------------------------------------------------------------ */

enum { MAX_ARGUMENTS = 64 };

/* Runs a command in a folder, what it says going to the folder's file "log"; whether it exits with 0. */
static bool run(const char *folder, char *const *arguments)
{
    posix_spawn_file_actions_t actions;
    pid_t child;
    int status = -1;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addchdir_np(&actions, folder);
    posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "log", O_WRONLY | O_CREAT | O_TRUNC,
                                     0600);
    posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
    const bool begun = posix_spawnp(&child, arguments[0], &actions, NULL, arguments, environ) == 0;
    posix_spawn_file_actions_destroy(&actions);
    while (begun && waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
    return begun && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* Options that are of use to a CPU. */
static void add_options(int num_options, const char *const *options, const char **arguments, int *n,
                        char macros[][128])
{
    static const char architecture[] = "--gpu-architecture=", define[] = "--define-macro=";
    for (int i = 0; i < num_options && *n < MAX_ARGUMENTS - 1; i++) {
        const char *value = strchr(options[i], '=');
        if (strncmp(options[i], architecture, strlen(architecture)) == 0)
            snprintf(macros[i], 128, "-D__CUDA_ARCH__=%d", atoi(strchr(value, '_') + 1) * 10);
        else if (strncmp(options[i], define, strlen(define)) == 0)
            snprintf(macros[i], 128, "-D%.120s", value + 1);
        else
            continue;
        arguments[(*n)++] = macros[i];
    }
}

static bool compile(const char *folder, const char *source, int num_options,
                    const char *const *options)
{
    static const char *const fixed[] = {EMULATOR_COMPILER,
                                        "-x",
                                        "c++",
                                        "-std=c++20",
                                        EMULATOR_FLAGS,
                                        "-w",
                                        "-fPIC",
                                        "-shared",
                                        "-nostdlib",
                                        "-fno-exceptions",
                                        "-fno-rtti",
                                        "-fno-strict-aliasing",
                                        "-fno-math-errno",
                                        "-ffp-contract=fast",
                                        "-I.",
                                        "-include",
                                        EMULATOR_DIR "/emulator.h",
                                        "-o",
                                        "image",
                                        "main.cu"};
    const char *arguments[MAX_ARGUMENTS];
    char macros[MAX_ARGUMENTS][128];
    int n = 0;
    for (size_t i = 0; i < sizeof fixed / sizeof fixed[0]; i++) arguments[n++] = fixed[i];
    /* Tests run each of its many forms for a moment. */
    if (strstr(source, "ops/sampling/sampling.cu")) arguments[n++] = "-O0";
    if (num_options > MAX_ARGUMENTS) num_options = MAX_ARGUMENTS;
    add_options(num_options, options, arguments, &n, macros);
    arguments[n] = NULL;
    return run(folder, (char *const *)(void *)arguments);
}

EXPORT nvrtcResult nvrtcCompileProgram(program *p, int num_options, const char *const *options)
{
    const char *root = getenv("TMPDIR");
    char folder[PATH_BYTES];
    size_t log_bytes;
    snprintf(folder, sizeof folder, "%s/emulator-XXXXXX", root && *root ? root : "/tmp");
    if (!mkdtemp(folder)) return INVALID_INPUT;
    const bool compiled =
        write_program(p, folder) && compile(folder, p->source, num_options, options);
    p->log = read_file(folder, "log", &log_bytes);
    if (compiled) p->image = read_file(folder, "image", &p->image_bytes);
    if (!getenv("QKV_EMULATOR_KEEP")) nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    return p->image ? SUCCESS : COMPILATION;
}

EXPORT nvrtcResult nvrtcGetProgramLogSize(program *p, size_t *bytes)
{
    *bytes = p->log ? strlen(p->log) + 1 : 1;
    return SUCCESS;
}

EXPORT nvrtcResult nvrtcGetProgramLog(program *p, char *log)
{
    strcpy(log, p->log ? p->log : "");
    return SUCCESS;
}

EXPORT nvrtcResult nvrtcGetCUBINSize(program *p, size_t *bytes)
{
    *bytes = p->image_bytes;
    return SUCCESS;
}

EXPORT nvrtcResult nvrtcGetCUBIN(program *p, char *image)
{
    memcpy(image, p->image, p->image_bytes);
    return SUCCESS;
}

EXPORT nvrtcResult nvrtcGetPTXSize(program *p, size_t *bytes)
{
    return nvrtcGetCUBINSize(p, bytes);
}

EXPORT nvrtcResult nvrtcGetPTX(program *p, char *image)
{
    return nvrtcGetCUBIN(p, image);
}
