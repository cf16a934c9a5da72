/* cc.c - compiling in a folder of its own under $TMPDIR: the bundled sources and the variant's text are
 * written there, the compiler runs, its output is read back, and the folder goes.
 * SPDX-License-Identifier: Apache-2.0 */
#include "jit/cc.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/env.h"
#include "jit/bundle.h"

/* ---- finding it --------------------------------------------------------------------------- */

/* The executable that a shell would run for this name. */
static int find_in_path(const char *name, char out[QI_PATH_MAX])
{
    struct stat st;
    if (strchr(name, '/')) {
        snprintf(out, QI_PATH_MAX, "%s", name);
        return access(out, X_OK) == 0 && stat(out, &st) == 0 && S_ISREG(st.st_mode);
    }
    const char *path = getenv("PATH");
    for (const char *at = path ? path : "/usr/bin:/bin"; *at;) {
        const size_t n = strcspn(at, ":");
        snprintf(out, QI_PATH_MAX, "%.*s/%s", (int)n, at, name);
        if (n > 0 && access(out, X_OK) == 0 && stat(out, &st) == 0 && S_ISREG(st.st_mode)) return 1;
        at += n + (at[n] == ':');
    }
    return 0;
}

void qi_cc_find(const char *wanted, qi_cc *out)
{
    static const char *const usual[] = {"cc", "gcc", "clang"};
    if (!wanted) wanted = qi_env(QI_ENV_CC);
    int found = 0;
    if (wanted && *wanted)
        found = find_in_path(wanted, out->path);
    else
        for (int i = 0; i < 3 && !found; i++) found = find_in_path(usual[i], out->path);
    out->identity[0] = '\0';
    if (!found) {
        out->path[0] = '\0';
        return;
    }
    char real[PATH_MAX];
    struct stat st = {0};
    if (!realpath(out->path, real) || stat(real, &st) != 0) snprintf(real, sizeof real, "?");
    snprintf(out->identity, sizeof out->identity, "%.1000s %lld %lld.%ld", real,
             (long long)st.st_size, (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
}

const char *qi_cc_flags(const char *level)
{
    static const struct {
        const char *level, *flags;
    } table[] = {QI_LEVEL_FLAGS};
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (strcmp(level, table[i].level) == 0) return table[i].flags;
    return NULL;
}

/* ---- a folder to work in ------------------------------------------------------------------ */

static qkv_status write_file(const char *folder, const char *name, const char *const *parts,
                             const size_t *bytes, int num_parts)
{
    char path[2 * QI_PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    for (char *slash = path + strlen(folder) + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = '\0';
        mkdir(path, 0700);
        *slash = '/';
    }
    FILE *file = fopen(path, "w");
    int good = file != NULL;
    for (int i = 0; good && i < num_parts; i++)
        good = fwrite(parts[i], 1, bytes[i], file) == bytes[i];
    if (file && fclose(file) != 0) good = 0;
    if (!good)
        QI_FAIL(QKV_ERR_COMPILE, "cannot write %s, a source of the kernel: %s", path,
                strerror(errno));
    return QKV_OK;
}

/* Removes what this file, or the compiler, made. */
static void remove_folder(const char *folder)
{
    static const char *const others[] = {"qi_variant.h", "main.c",   "kernel.so",
                                         "log",          "kern/cpu", "ops/attention",
                                         "ops/sampling", "kern",     "ops"};
    char path[2 * QI_PATH_MAX];
    qi_bundle_file file;
    for (int i = 0; qi_bundle(kDLCPU, i, &file); i++) {
        snprintf(path, sizeof path, "%s/%s", folder, file.path);
        unlink(path);
    }
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, others[i]);
        if (unlink(path) != 0) rmdir(path);
    }
    rmdir(folder);
}

static qkv_status write_sources(const char *folder, const qi_jit_job *job)
{
    qi_bundle_file file;
    for (int i = 0; qi_bundle(kDLCPU, i, &file); i++)
        QI_TRY(write_file(folder, file.path, &file.text, &file.bytes, 1));
    const size_t header_bytes = strlen(job->header);
    QI_TRY(write_file(folder, "qi_variant.h", &job->header, &header_bytes, 1));
    const char *main[] = {job->defines, "#include \"", job->main, "\"\n"};
    const size_t bytes[] = {strlen(main[0]), strlen(main[1]), strlen(main[2]), strlen(main[3])};
    return write_file(folder, "main.c", main, bytes, 4);
}

/* A whole file, malloc'ed with a zero byte behind it; NULL and errno if it cannot be read. */
static char *read_file(const char *folder, const char *name, size_t *bytes)
{
    char path[2 * QI_PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "r");
    struct stat st;
    if (!file) return NULL;
    char *text = NULL;
    if (fstat(fileno(file), &st) == 0 && (text = malloc((size_t)st.st_size + 1))) {
        *bytes = fread(text, 1, (size_t)st.st_size, file);
        text[*bytes] = '\0';
    }
    fclose(file);
    return text;
}

/* ---- running it --------------------------------------------------------------------------- */

/* Runs the compiler in `folder`, its words going to the file "log". 0: it says that all went well. */
static int run(const qi_cc *cc, const char *folder, const char *level, int *spawn_error)
{
    enum { MAX_ARGS = 40 };
    char flags[512], include[QI_PATH_MAX + 8], source[QI_PATH_MAX + 16], output[QI_PATH_MAX + 16],
        log[QI_PATH_MAX + 16], define[64];
    snprintf(flags, sizeof flags, "%s %s %s",
             strstr(cc->identity, "gcc") ? QI_OPTIMISE_GNU : QI_OPTIMISE, QI_KERNEL_FLAGS,
             qi_cc_flags(level));
    snprintf(include, sizeof include, "-I%s", folder);
    snprintf(source, sizeof source, "%s/main.c", folder);
    snprintf(output, sizeof output, "%s/kernel.so", folder);
    snprintf(log, sizeof log, "%s/log", folder);
    snprintf(define, sizeof define, "-DQI_LEVEL=%s", level);
    const char *args[MAX_ARGS] = {cc->path};
    int n = 1;
    char *rest_of_flags;
    for (char *word = strtok_r(flags, " ", &rest_of_flags); word && n < MAX_ARGS - 12;
         word = strtok_r(NULL, " ", &rest_of_flags))
        args[n++] = word;
    const char *const rest[] = {"-std=c11", "-D_GNU_SOURCE", "-DQI_VARIANT", define,
                                include,    "-fPIC",         "-shared",      "-o",
                                output,     source,          "-lm"};
    for (size_t i = 0; i < sizeof rest / sizeof rest[0]; i++) args[n++] = rest[i];

    posix_spawn_file_actions_t actions;
    pid_t pid = -1;
    int error = posix_spawn_file_actions_init(&actions);
    if (!error) error = posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    if (!error)
        error =
            posix_spawn_file_actions_addopen(&actions, 1, log, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (!error) error = posix_spawn_file_actions_adddup2(&actions, 1, 2);
    if (!error) error = posix_spawn(&pid, cc->path, &actions, NULL, (char *const *)args, environ);
    posix_spawn_file_actions_destroy(&actions);
    *spawn_error = error;
    if (*spawn_error) return -1;
    int status = 0;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR) return 0; /* the engine reaps all children: the output will tell */
    return status;
}

static qkv_status compile_in(const qi_cc *cc, const char *folder, const qi_jit_job *job,
                             void **image, size_t *bytes)
{
    QI_TRY(write_sources(folder, job));
    int spawn_error;
    const int status = run(cc, folder, job->level, &spawn_error);
    if (spawn_error)
        QI_FAIL(QKV_ERR_COMPILE, "%s: cannot run %s: %s", job->what, cc->path,
                strerror(spawn_error));
    *image = status == 0 ? read_file(folder, "kernel.so", bytes) : NULL;
    if (*image) return QKV_OK;
    if (status == 0 && errno == ENOMEM)
        QI_FAIL(QKV_ERR_MEMORY, "%s: out of memory for the compiled kernel", job->what);
    size_t log_bytes = 0;
    char *log = read_file(folder, "log", &log_bytes), lines[1024] = "";
    if (log) qi_first_lines(log, lines, sizeof lines);
    free(log);
    QI_FAIL(QKV_ERR_COMPILE, "%s: %s failed: %s", job->what, cc->path,
            lines[0] ? lines : "it said nothing");
}

qkv_status qi_cc_compile(const qi_cc *cc, const qi_jit_job *job, void **image, size_t *bytes)
{
    if (!cc->path[0])
        QI_FAIL(QKV_ERR_COMPILE,
                "%s: expected a C compiler (options.compiler, QKV_CC, or cc, gcc or clang in PATH) "
                "to compile it with, found none; built-in kernels need none",
                job->what);
    if (!qi_cc_flags(job->level))
        QI_FAIL(QKV_ERR_INTERNAL, "%s: no flags for level %s", job->what, job->level);
    const char *tmp = getenv("TMPDIR");
    char folder[QI_PATH_MAX];
    snprintf(folder, sizeof folder, "%.900s/qkv-XXXXXX", tmp && *tmp ? tmp : "/tmp");
    if (!mkdtemp(folder))
        QI_FAIL(QKV_ERR_COMPILE, "%s: cannot make a folder to compile in, %s: %s", job->what,
                folder, strerror(errno));
    const qkv_status status = compile_in(cc, folder, job, image, bytes);
    remove_folder(folder);
    return status;
}
