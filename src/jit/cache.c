/* cache.c - see cache.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "jit/cache.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/env.h"
#include "base/sha256.h"

/* In front of the payload. Another format gets another magic. */
typedef struct entry_header {
    char magic[16];
    char key[64];
    char sha256[64]; /* of the payload, hex */
    uint64_t size;   /* of the payload */
} entry_header;
_Static_assert(sizeof(entry_header) == 152, "no padding: every byte of an entry is checked");

static const char magic[16] = "qkv kernel v1\n";

#define TEMPORARY ".tmp-" /* begins the names of files being written */

/* ---- places ------------------------------------------------------------------------------- */

int qi_cache_dir(const char *option, char *out, size_t out_bytes)
{
    const char *below = "", *dir = option ? option : qi_env(QI_ENV_CACHE_DIR);
    if (!dir && (dir = getenv("XDG_CACHE_HOME"))) below = "/qkv";
    if (!dir || (!*dir && *below)) dir = getenv("HOME"), below = "/.cache/qkv";
    const int n = dir && *dir ? snprintf(out, out_bytes, "%s%s", dir, below) : 0;
    if (n > 0 && (size_t)n < out_bytes) return 1;
    out[0] = '\0';
    return 0;
}

static int entry_path(const char *dir, const char *name, char out[PATH_MAX])
{
    const int n = snprintf(out, PATH_MAX, "%s/%s", dir, name);
    return n > 0 && n < PATH_MAX;
}

/* Could only the effective user, or root, have written it? */
static int is_trusted(const struct stat *st)
{
    return (st->st_uid == geteuid() || st->st_uid == 0) && (st->st_mode & (S_IWGRP | S_IWOTH)) == 0;
}

static int is_trusted_dir(const char *dir)
{
    struct stat st;
    return stat(dir, &st) == 0 && S_ISDIR(st.st_mode) && is_trusted(&st);
}

/* The folder and those above it, the last for this user alone. */
static int make_dir(const char *dir)
{
    char path[PATH_MAX];
    if (!entry_path(dir, "", path)) return 0;
    for (char *slash = path + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = '\0';
        if (mkdir(path, 0700) != 0 && errno != EEXIST) return 0;
        *slash = '/';
    }
    return is_trusted_dir(dir);
}

/* ---- reading ------------------------------------------------------------------------------ */

static int read_all(int fd, void *to, size_t bytes)
{
    for (size_t at = 0; at < bytes;) {
        const ssize_t n = read(fd, (char *)to + at, bytes - at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return 0;
        at += (size_t)n;
    }
    return 1;
}

static void hash_hex(const void *bytes, size_t size, char out[65])
{
    qi_sha256 hash;
    qi_sha256_init(&hash);
    qi_sha256_add(&hash, bytes, size);
    qi_sha256_hex(&hash, out);
}

/* The payload of an open entry: 1, 0 for a bad one, -1 out of memory. */
static int read_entry(int fd, const char *key, void **bytes, size_t *size)
{
    struct stat st;
    entry_header h;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || !is_trusted(&st)) return 0;
    if (st.st_size < (off_t)sizeof h || !read_all(fd, &h, sizeof h)) return 0;
    if (memcmp(h.magic, magic, sizeof magic) != 0 || memcmp(h.key, key, sizeof h.key) != 0 ||
        h.size != (uint64_t)st.st_size - sizeof h)
        return 0;
    void *payload = malloc((size_t)h.size + 1);
    char hex[65];
    if (!payload) return -1;
    if (read_all(fd, payload, (size_t)h.size)) {
        hash_hex(payload, (size_t)h.size, hex);
        if (memcmp(h.sha256, hex, sizeof h.sha256) == 0) {
            *bytes = payload;
            *size = (size_t)h.size;
            return 1;
        }
    }
    free(payload);
    return 0;
}

int qi_cache_read(const char *dir, const char *key, void **bytes, size_t *size)
{
    char path[PATH_MAX];
    if (!entry_path(dir, key, path) || !is_trusted_dir(dir)) return 0;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) return 0;
    const int found = read_entry(fd, key, bytes, size);
    close(fd);
    if (found == 0) unlink(path);
    return found;
}

/* ---- writing ------------------------------------------------------------------------------ */

static int write_all(int fd, const void *from, size_t bytes)
{
    for (size_t at = 0; at < bytes;) {
        const ssize_t n = write(fd, (const char *)from + at, bytes - at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return 0;
        at += (size_t)n;
    }
    return 1;
}

/* Removes what killed writers left: temporaries of more than an hour ago. */
static void remove_leftovers(const char *dir)
{
    char path[PATH_MAX];
    struct stat st;
    DIR *folder = opendir(dir);
    if (!folder) return;
    const time_t now = time(NULL);
    for (const struct dirent *e; (e = readdir(folder));)
        if (strncmp(e->d_name, TEMPORARY, strlen(TEMPORARY)) == 0 &&
            entry_path(dir, e->d_name, path) && lstat(path, &st) == 0 && now - st.st_mtime > 3600)
            unlink(path);
    closedir(folder);
}

int qi_cache_write(const char *dir, const char *key, const void *bytes, size_t size)
{
    char path[PATH_MAX], temporary[PATH_MAX], hex[65];
    if (!entry_path(dir, key, path) || !entry_path(dir, TEMPORARY "XXXXXX", temporary)) return 0;
    if (!make_dir(dir)) return 0;
    const int fd = mkostemp(temporary, O_CLOEXEC); /* mode 0600 */
    if (fd < 0) return 0;
    entry_header h = {.size = size};
    memcpy(h.magic, magic, sizeof magic);
    memcpy(h.key, key, sizeof h.key);
    hash_hex(bytes, size, hex);
    memcpy(h.sha256, hex, sizeof h.sha256);
    int good = write_all(fd, &h, sizeof h) && write_all(fd, bytes, size) && fsync(fd) == 0;
    good = close(fd) == 0 && good;
    if (good && rename(temporary, path) == 0) {
        remove_leftovers(dir);
        return 1;
    }
    unlink(temporary);
    return 0;
}

/* ---- locks -------------------------------------------------------------------------------- */

static int lock_path(const char *dir, const char *key, char out[PATH_MAX])
{
    const int n = snprintf(out, PATH_MAX, "%s/" TEMPORARY "lock-%s", dir, key);
    return n > 0 && n < PATH_MAX;
}

/* Is the file still the one of that name? Its last holder may have removed it. */
static int stands(int fd, const char *path)
{
    struct stat held, named;
    return fstat(fd, &held) == 0 && stat(path, &named) == 0 && held.st_ino == named.st_ino &&
           held.st_dev == named.st_dev;
}

int qi_cache_lock(const char *dir, const char *key, int ms)
{
    enum { POLL_MS = 5 };
    const struct timespec nap = {.tv_nsec = POLL_MS * 1000000};
    char path[PATH_MAX];
    if (!*dir || !lock_path(dir, key, path) || !make_dir(dir)) return -1;
    for (;;) {
        const int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (fd < 0) return -1;
        int result;
        while ((result = flock(fd, LOCK_EX | LOCK_NB)) != 0 &&
               (errno == EWOULDBLOCK || errno == EINTR) && (ms -= POLL_MS) >= 0)
            nanosleep(&nap, NULL);
        if (result == 0 && stands(fd, path)) return fd;
        close(fd);
        if (result != 0) return -1;
    }
}

/* Children of fork() hold the same lock: it is given up by name, not by the last close. */
void qi_cache_unlock(const char *dir, const char *key, int lock)
{
    char path[PATH_MAX];
    if (lock < 0) return;
    if (lock_path(dir, key, path)) unlink(path);
    flock(lock, LOCK_UN);
    close(lock);
}
