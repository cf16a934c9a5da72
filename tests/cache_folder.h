/* cache_folder.h - what the tests of the disk cache share: a private folder for each, from which no descriptor is
 * left open, entries in it, and processes that use it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_CACHE_FOLDER_H
#define QKV_TESTS_CACHE_FOLDER_H

#include <dirent.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/sha256.h"
#include "folder.h"
#include "jit/cache.h"
#include "support.h"

/* ---- processes of their own ---------------------------------------------------------------- */

enum { GOOD, BAD, SKIPPED };

/* An assertion of cmocka's would go on with the next test in the child. */
#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);                             \
            return BAD;                                                                            \
        }                                                                                          \
    } while (0)

typedef int child_fn(const void *arg);

static pid_t spawn(child_fn *body, const void *arg)
{
    fflush(stdout);
    const pid_t pid = fork();
    if (pid == 0) _exit(body(arg));
    assert_true(pid > 0);
    return pid;
}

static int join(pid_t pid)
{
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/* It must not be BAD. */
static void run_child(const char *why, child_fn *body, const void *arg)
{
    const int status = join(spawn(body, arg));
    if (status == SKIPPED) printf("skipped: this user may not try: %s\n", why);
    if (status != GOOD && status != SKIPPED) fail_msg("%s: %d", why, status);
}

/* ---- files --------------------------------------------------------------------------------- */

enum { MAX_FILES = 1000, HEADER = 152 };

static char folder[256]; /* of one test, private */
static char names[MAX_FILES][80];

/* The files in a folder; their names go to `names`. */
static int list(const char *path)
{
    int n = 0;
    DIR *dir = opendir(path);
    if (!dir) return 0;
    for (const struct dirent *e; n < MAX_FILES && (e = readdir(dir));)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            snprintf(names[n++], sizeof *names, "%.79s", e->d_name);
    closedir(dir);
    return n;
}

static const char *in_folder(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%.200s", folder, name);
    return path;
}

static void spill(const char *path, const void *bytes, size_t size, mode_t mode)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, size, f), size);
    assert_int_equal(fclose(f), 0);
    assert_int_equal(chmod(path, mode), 0);
}

static size_t slurp(const char *path, void *bytes, size_t most)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    const size_t size = fread(bytes, 1, most, f);
    fclose(f);
    return size;
}

static int open_files;

static int set_up(void **state)
{
    (void)state;
    folder_new(folder);
    open_files = list("/proc/self/fd");
    return 0;
}

/* No test may leave a descriptor open. */
static int tear_down(void **state)
{
    (void)state;
    folder_free(folder);
    return list("/proc/self/fd") == open_files ? 0 : -1;
}

#define TEST_IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

/* ---- entries ------------------------------------------------------------------------------- */

enum { MISS, HIT, WRONG };

static const char *key_of(int n)
{
    static char key[65];
    qi_sha256 hash;
    qi_sha256_init(&hash);
    qi_sha256_add(&hash, &n, sizeof n);
    qi_sha256_hex(&hash, key);
    return key;
}

static int look(const char *dir, const char *key, const void *bytes, size_t size)
{
    void *got;
    size_t got_size;
    if (!qi_cache_read(dir, key, &got, &got_size)) return MISS;
    const int same = got_size == size && memcmp(got, bytes, size) == 0;
    free(got);
    return same ? HIT : WRONG;
}

static const char small[] = "a payload of some bytes";
static unsigned char genuine[HEADER + sizeof small]; /* the entry of `small` under key 0 */

static void make_genuine(void)
{
    assert_int_equal(qi_cache_write(folder, key_of(0), small, sizeof small), 1);
    assert_int_equal(slurp(in_folder(key_of(0)), genuine, sizeof genuine), sizeof genuine);
}

#endif
