/* test_cache.c - the disk cache, and SHA-256 that it stands on: what is cut off, changed or foreign is
 * absent, and neither a crowd of processes nor a killed writer nor a full disk costs more than a
 * rebuild.
 * SPDX-License-Identifier: Apache-2.0 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <grp.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/sha256.h"
#include "jit/cache.h"
#include "support.h"

/* ---- a system that makes trouble ----------------------------------------------------------- */

static struct {
    int choppy;          /* reads and writes do a part, every third is interrupted */
    const char *failing; /* the name of a call that finds the disk full */
} trouble;

static int fails(const char *call)
{
    if (!trouble.failing || strcmp(call, trouble.failing) != 0) return 0;
    errno = ENOSPC;
    return 1;
}

/* How much of so many bytes is done this time; -1: none, a signal came. */
static ssize_t portion(size_t bytes)
{
    static int calls;
    if (!trouble.choppy || bytes == 0) return (ssize_t)bytes;
    if (++calls % 3 != 0) return 1 + test_below((int64_t)bytes);
    errno = EINTR;
    return -1;
}

/* The library's calls end up here, for a program's symbols go before libc's. */
ssize_t read(int fd, void *to, size_t bytes)
{
    const ssize_t n = portion(bytes);
    return n < 0 ? n : syscall(SYS_read, fd, to, (size_t)n);
}

ssize_t write(int fd, const void *from, size_t bytes)
{
    const ssize_t n = portion(bytes);
    return n < 0 ? n : syscall(SYS_write, fd, from, (size_t)n);
}

int fsync(int fd)
{
    return fails("fsync") ? -1 : (int)syscall(SYS_fsync, fd);
}

int close(int fd)
{
    const int status = (int)syscall(SYS_close, fd);
    return fails("close") ? -1 : status;
}

int rename(const char *from, const char *to)
{
    return fails("rename") ? -1 : renameat(AT_FDCWD, from, AT_FDCWD, to);
}

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

enum { MAX_FILES = 1000, OTHER_USER = 65534, HEADER = 152 };

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

static int remove_file(const char *path, const struct stat *info, int type, struct FTW *walk)
{
    (void)info, (void)type, (void)walk;
    return remove(path);
}

static int open_files;

static int set_up(void **state)
{
    (void)state;
    const char *root = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/qkv-test-XXXXXX", root ? root : "/tmp");
    open_files = list("/proc/self/fd");
    return mkdtemp(folder) ? 0 : -1;
}

/* No test may leave a descriptor open. */
static int tear_down(void **state)
{
    (void)state;
    nftw(folder, remove_file, 16, FTW_DEPTH | FTW_PHYS);
    return list("/proc/self/fd") == open_files ? 0 : -1;
}

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

enum { KEYS = 3, MOST = 20000 };

/* A payload of key n % KEYS, told apart from any other by n in front; returns its size. */
static size_t make_payload(uint64_t n, size_t most, unsigned char *out)
{
    const size_t size = sizeof n + (size_t)(n / KEYS) % most;
    for (size_t i = 0; i < size; i++) out[i] = (unsigned char)((n >> i % 8 * 8) ^ i / 8 * 37);
    return size;
}

static int write_payload(int key, size_t most)
{
    unsigned char *bytes = malloc(most + sizeof(uint64_t));
    if (!bytes) return 0;
    const uint64_t n = test_u64() / KEYS / 2 * KEYS + (uint64_t)key;
    const int good = qi_cache_write(folder, key_of(key), bytes, make_payload(n, most, bytes));
    free(bytes);
    return good;
}

/* HIT: what is there is one of the key's payloads, all of it. */
static int look_payload(int key, size_t most)
{
    void *got;
    size_t size;
    if (!qi_cache_read(folder, key_of(key), &got, &size)) return MISS;
    uint64_t n = KEYS;
    unsigned char *bytes = malloc(most + sizeof n);
    if (bytes && size >= sizeof n) memcpy(&n, got, sizeof n);
    const int same = bytes && n % KEYS == (uint64_t)key && make_payload(n, most, bytes) == size &&
                     memcmp(got, bytes, size) == 0;
    free(bytes);
    free(got);
    return same ? HIT : WRONG;
}

/* ---- SHA-256 ------------------------------------------------------------------------------- */

static void sha256_agrees_with_the_standard(void **state)
{
    (void)state;
    static const struct {
        const char *why, *text;
        int times;
        const char *hex;
    } cases[] = {
        {"nothing", "", 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"one block", "abc", 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"448 bits: the length needs a block",
         "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1,
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {"a million letters", "a", 1000000,
         "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"},
    };
    char hex[65];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        qi_sha256 hash;
        qi_sha256_init(&hash);
        for (int t = 0; t < cases[i].times; t++)
            qi_sha256_add(&hash, cases[i].text, strlen(cases[i].text));
        qi_sha256_hex(&hash, hex);
        if (strcmp(hex, cases[i].hex) != 0) fail_msg("%s: %s", cases[i].why, hex);
    }
}

/* The digest of the digests of 0, 1, ... 199 bytes 0, 1, 2, ...: every padding. The expected one is
 * another implementation's (hashlib). */
static void sha256_pads_every_length(void **state)
{
    (void)state;
    unsigned char bytes[200];
    char hex[65];
    qi_sha256 all, hash;
    qi_sha256_init(&all);
    for (size_t n = 0; n < sizeof bytes; n++) {
        bytes[n] = (unsigned char)n;
        qi_sha256_init(&hash);
        qi_sha256_add(&hash, bytes, n);
        qi_sha256_hex(&hash, hex);
        qi_sha256_add(&all, hex, 64);
    }
    qi_sha256_hex(&all, hex);
    assert_string_equal(hex, "7a38a844c9e159de39f0862ee2e28569a8250831150a3fbf0a59c001129b2fb2");
}

static void sha256_does_not_see_how_data_is_split(void **state)
{
    (void)state;
    unsigned char bytes[400];
    for (int round = 0; round < 2000; round++) {
        const size_t size = (size_t)test_below(sizeof bytes + 1);
        for (size_t i = 0; i < size; i++) bytes[i] = (unsigned char)test_u64();
        qi_sha256 whole, split;
        qi_sha256_init(&whole);
        qi_sha256_add(&whole, bytes, size);
        qi_sha256_init(&split);
        for (size_t at = 0, n; at < size; at += n) {
            n = (size_t)test_below((int64_t)(size - at) + 1); /* may be none */
            qi_sha256_add(&split, bytes + at, n);
        }
        char a[65], b[65];
        qi_sha256_hex(&whole, a);
        qi_sha256_hex(&split, b);
        assert_string_equal(a, b);
    }
}

/* ---- one process --------------------------------------------------------------------------- */

static void cache_gives_back_what_was_written(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 63, 64, 4096, 5 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        unsigned char *bytes = malloc(sizes[i] + 1);
        assert_non_null(bytes);
        for (int again = 0; again < 2; again++) { /* the second replaces the first */
            for (size_t b = 0; b < sizes[i]; b++) bytes[b] = (unsigned char)test_u64();
            assert_int_equal(qi_cache_write(folder, key_of((int)i), bytes, sizes[i]), 1);
            assert_int_equal(look(folder, key_of((int)i), bytes, sizes[i]), HIT);
        }
        free(bytes);
        assert_int_equal(list(folder), i + 1);
    }
}

static void cache_makes_its_folder_for_one_user(void **state)
{
    (void)state;
    char deep[300];
    struct stat st;
    const mode_t mask = umask(0);
    snprintf(deep, sizeof deep, "%s/a/b//c", folder);
    assert_int_equal(qi_cache_write(deep, key_of(0), "x", 1), 1);
    umask(mask);
    assert_int_equal(look(deep, key_of(0), "x", 1), HIT);
    for (int i = 0; i < 3; i++) {
        static const char *const made[] = {"a", "a/b", "a/b/c"};
        assert_int_equal(stat(in_folder(made[i]), &st), 0);
        assert_int_equal(st.st_mode & 07777, 0700);
    }
}

static void cache_misses_what_is_absent(void **state)
{
    (void)state;
    assert_int_equal(look(in_folder("none"), key_of(0), "", 0), MISS);
    assert_int_equal(look(folder, key_of(0), "", 0), MISS);
    assert_int_equal(qi_cache_write(folder, key_of(0), "x", 1), 1);
    assert_int_equal(look(folder, key_of(1), "x", 1), MISS);
    assert_int_equal(look(folder, key_of(0), "x", 1), HIT);

    static const char *const nowhere[] = {"/dev/null/x", "/dev/null"};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(qi_cache_write(nowhere[i], key_of(0), "x", 1), 0);
        assert_int_equal(look(nowhere[i], key_of(0), "x", 1), MISS);
    }
}

static const char small[] = "a payload of some bytes";
static unsigned char genuine[HEADER + sizeof small]; /* the entry of `small` under key 0 */

static void make_genuine(void)
{
    assert_int_equal(qi_cache_write(folder, key_of(0), small, sizeof small), 1);
    assert_int_equal(slurp(in_folder(key_of(0)), genuine, sizeof genuine), sizeof genuine);
}

/* A miss, and the entry is gone; the genuine one in its place hits. */
static void expect_bad_entry(const char *why, size_t at, const void *bytes, size_t size)
{
    spill(in_folder(key_of(0)), bytes, size, 0600);
    const int found = look(folder, key_of(0), small, sizeof small), left = list(folder);
    if (found != MISS || left != 0) fail_msg("%s %zu: %d, %d files", why, at, found, left);
    spill(in_folder(key_of(0)), genuine, sizeof genuine, 0600);
    assert_int_equal(look(folder, key_of(0), small, sizeof small), HIT);
}

static void cache_misses_every_truncated_entry(void **state)
{
    (void)state;
    unsigned char longer[sizeof genuine + 1] = {0};
    make_genuine();
    for (size_t n = 0; n < sizeof genuine; n++) expect_bad_entry("cut off at", n, genuine, n);
    memcpy(longer, genuine, sizeof genuine);
    expect_bad_entry("one byte more than", sizeof genuine, longer, sizeof longer);
}

static void cache_misses_every_flipped_bit(void **state)
{
    (void)state;
    unsigned char flipped[sizeof genuine];
    make_genuine();
    for (size_t bit = 0; bit < 8 * sizeof genuine; bit++) {
        memcpy(flipped, genuine, sizeof genuine);
        flipped[bit / 8] ^= (unsigned char)(1 << bit % 8);
        expect_bad_entry("flipped bit", bit, flipped, sizeof flipped);
    }
}

static void cache_misses_an_entry_of_another_key(void **state)
{
    (void)state;
    make_genuine();
    char from[512];
    snprintf(from, sizeof from, "%s", in_folder(key_of(0)));
    assert_int_equal(rename(from, in_folder(key_of(1))), 0);
    assert_int_equal(look(folder, key_of(1), small, sizeof small), MISS);
}

/* ---- whom it trusts ------------------------------------------------------------------------ */

static void cache_refuses_what_others_may_write(void **state)
{
    (void)state;
    static const struct {
        const char *why;
        mode_t folder, entry;
        int reads, writes;
    } cases[] = {
        {"private", 0700, 0600, 1, 1},
        {"all may read", 0755, 0644, 1, 1},
        {"the group may write the entry", 0700, 0620, 0, 1},
        {"others may write the entry", 0700, 0602, 0, 1},
        {"the group may write the folder", 0720, 0600, 0, 0},
        {"others may write the folder", 0702, 0600, 0, 0},
        {"a folder for everyone", 01777, 0600, 0, 0},
    };
    make_genuine();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        spill(in_folder(key_of(0)), genuine, sizeof genuine, cases[i].entry);
        assert_int_equal(chmod(folder, cases[i].folder), 0);
        const int hit = look(folder, key_of(0), small, sizeof small);
        const int written = qi_cache_write(folder, key_of(1), small, sizeof small);
        if (hit != (cases[i].reads ? HIT : MISS) || written != cases[i].writes)
            fail_msg("%s: read %d, written %d", cases[i].why, hit, written);
        assert_int_equal(chmod(folder, 0700), 0);
        /* what is not believed is removed, but not from a folder that is not believed */
        assert_int_equal(list(folder), 1 + (cases[i].reads && cases[i].writes));
        unlink(in_folder(key_of(1)));
    }
}

static int become_other_user(void)
{
    return setgroups(0, NULL) == 0 && setgid(OTHER_USER) == 0 && setuid(OTHER_USER) == 0;
}

/* As another user: what root wrote is believed, and the folder can only be read. */
static int read_as_other_user(const void *arg)
{
    (void)arg;
    CHECK(become_other_user());
    if (access(folder, X_OK) != 0) return SKIPPED;
    CHECK(look(folder, key_of(0), small, sizeof small) == HIT);
    CHECK(qi_cache_write(folder, key_of(0), "x", 1) == 0);
    CHECK(qi_cache_write(folder, key_of(1), "x", 1) == 0);
    CHECK(look(folder, key_of(0), small, sizeof small) == HIT);
    CHECK(list(folder) == 1);
    return GOOD;
}

static void cache_trusts_root_and_oneself(void **state)
{
    (void)state;
    if (geteuid() != 0) {
        printf("skipped: only root can give files to another user\n");
        return;
    }
    make_genuine();
    assert_int_equal(chmod(folder, 0755), 0);
    assert_int_equal(chmod(in_folder(key_of(0)), 0644), 0);
    run_child("another user reads root's", read_as_other_user, NULL);

    assert_int_equal(chown(folder, OTHER_USER, OTHER_USER), 0);
    assert_int_equal(look(folder, key_of(0), small, sizeof small), MISS);
    assert_int_equal(qi_cache_write(folder, key_of(1), small, sizeof small), 0);
    assert_int_equal(list(folder), 1);
    assert_int_equal(chown(folder, 0, 0), 0);
    assert_int_equal(look(folder, key_of(0), small, sizeof small), HIT);

    assert_int_equal(chown(in_folder(key_of(0)), OTHER_USER, OTHER_USER), 0);
    assert_int_equal(look(folder, key_of(0), small, sizeof small), MISS);
}

static void cache_reads_only_regular_files(void **state)
{
    (void)state;
    char aside[512];
    make_genuine();
    snprintf(aside, sizeof aside, "%s", in_folder("aside"));
    spill(aside, genuine, sizeof genuine, 0600);

    unlink(in_folder(key_of(0)));
    assert_int_equal(symlink(aside, in_folder(key_of(0))), 0);
    assert_int_equal(look(folder, key_of(0), small, sizeof small), MISS);
    unlink(in_folder(key_of(0)));
    assert_int_equal(link(aside, in_folder(key_of(0))), 0); /* the same bytes, no symbolic link */
    assert_int_equal(look(folder, key_of(0), small, sizeof small), HIT);

    unlink(in_folder(key_of(0)));
    assert_int_equal(mkfifo(in_folder(key_of(0)), 0600),
                     0); /* nobody writes: a reader must not wait */
    assert_int_equal(look(folder, key_of(0), small, sizeof small), MISS);
    assert_int_equal(qi_cache_write(folder, key_of(0), small, sizeof small), 1);

    unlink(in_folder(key_of(0)));
    assert_int_equal(mkdir(in_folder(key_of(0)), 0700), 0);
    assert_int_equal(look(folder, key_of(0), small, sizeof small), MISS);
    assert_int_equal(qi_cache_write(folder, key_of(0), small, sizeof small), 0);
    assert_int_equal(list(folder), 2); /* aside, and the folder */
}

/* ---- many processes ------------------------------------------------------------------------ */

enum { PROCESSES = 8, ROUNDS = 300 };

typedef struct member {
    uint64_t number;
    int may_miss;
} member;

static int use_together(const void *arg)
{
    const member *m = arg;
    int hits = 0;
    test_state += m->number << 32;
    for (int round = 0; round < ROUNDS; round++) {
        const int key = (int)test_below(KEYS);
        if (test_below(4) == 0) {
            CHECK(write_payload(key, MOST));
        } else {
            const int found = look_payload(key, MOST);
            CHECK(found == HIT || (found == MISS && m->may_miss));
            hits += found == HIT;
        }
    }
    CHECK(hits > 0);
    return GOOD;
}

static void nap(int64_t most_us)
{
    nanosleep(&(struct timespec){.tv_nsec = 1000 * test_below(most_us)}, NULL);
}

/* Cuts entries off, or makes them longer, under the eyes of those who read them. */
static int spoil(const void *arg)
{
    (void)arg;
    for (;;) {
        const int status = truncate(in_folder(key_of((int)test_below(KEYS))), test_below(MOST));
        CHECK(status == 0 || errno == ENOENT);
        nap(1000);
    }
}

static void use_in_a_crowd(int with_vandal)
{
    pid_t pids[PROCESSES];
    member members[PROCESSES];
    int status[PROCESSES];
    for (int key = 0; key < KEYS; key++) assert_int_equal(write_payload(key, MOST), 1);
    for (int i = 0; i < PROCESSES; i++) {
        members[i] = (member){.number = (uint64_t)i, .may_miss = with_vandal};
        pids[i] = spawn(use_together, &members[i]);
    }
    const pid_t vandal = with_vandal ? spawn(spoil, NULL) : 0;
    for (int i = 0; i < PROCESSES; i++) status[i] = join(pids[i]);
    if (vandal) {
        kill(vandal, SIGKILL);
        assert_int_equal(join(vandal), -SIGKILL);
    }
    for (int i = 0; i < PROCESSES; i++) assert_int_equal(status[i], GOOD);
    for (int key = 0; key < KEYS; key++) assert_int_not_equal(look_payload(key, MOST), WRONG);
    assert_true(list(folder) <= KEYS);
}

/* An entry that stands is replaced, but never absent in between. */
static void cache_is_shared_by_processes(void **state)
{
    (void)state;
    use_in_a_crowd(0);
    assert_int_equal(list(folder), KEYS);
}

static void cache_shows_no_torn_payload_to_anyone(void **state)
{
    (void)state;
    use_in_a_crowd(1);
}

enum { LARGE = 1 << 20 };

static int write_until_killed(const void *arg)
{
    test_state += *(const uint64_t *)arg << 32;
    for (;;) CHECK(write_payload(0, LARGE));
}

/* The kernel kills it in the midst of a file. */
static int write_too_much(const void *arg)
{
    static unsigned char bytes[10000];
    (void)arg;
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    setrlimit(RLIMIT_FSIZE, &(struct rlimit){5000, 5000});
    qi_cache_write(folder, key_of(1), bytes, sizeof bytes);
    return BAD;
}

static void make_older(const char *name, int seconds)
{
    const time_t then = time(NULL) - seconds;
    const struct timespec times[2] = {{.tv_sec = then}, {.tv_sec = then}};
    assert_int_equal(utimensat(AT_FDCWD, in_folder(name), times, 0), 0);
}

static void cache_survives_killed_writers(void **state)
{
    (void)state;
    int stands = 0;
    for (uint64_t round = 0; round < 100; round++) {
        if (test_below(2) == 0) {
            unlink(in_folder(key_of(0)));
            stands = 0;
        }
        const pid_t writer = spawn(write_until_killed, &round);
        nap(10000);
        kill(writer, SIGKILL);
        assert_int_equal(join(writer), -SIGKILL);
        const int found = look_payload(0, LARGE);
        if (found == WRONG || (found == MISS && stands)) fail_msg("%d, stood: %d", found, stands);
        stands = found == HIT;
    }
    for (int i = 0; i < 4; i++) assert_int_equal(join(spawn(write_too_much, NULL)), -SIGXFSZ);
    assert_int_equal(look_payload(1, LARGE), MISS);
    unlink(in_folder(key_of(0)));

    const int left = list(folder), old = left / 2;
    printf("%d killed writers left a file\n", left);
    assert_true(left >= 4);
    for (int i = 0; i < left; i++) make_older(names[i], i < old ? 3700 : 3500);
    assert_int_equal(write_payload(0, LARGE), 1);
    assert_int_equal(list(folder), left - old + 1);
    assert_int_equal(look_payload(0, LARGE), HIT);
}

/* ---- locks --------------------------------------------------------------------------------- */

enum { LONG_MS = 20000 };

/* Nobody else is in between. */
static int lock_and_unlock(const void *arg)
{
    (void)arg;
    char busy[512];
    snprintf(busy, sizeof busy, "%s", in_folder("busy"));
    for (int i = 0; i < 20; i++) {
        const int lock = qi_cache_lock(folder, key_of(0), LONG_MS);
        CHECK(lock >= 0);
        const int file = open(busy, O_CREAT | O_EXCL | O_WRONLY, 0600);
        CHECK(file >= 0);
        nap(300);
        CHECK(close(file) == 0 && unlink(busy) == 0);
        qi_cache_unlock(folder, key_of(0), lock);
    }
    return GOOD;
}

static int lock_for_ever(const void *arg)
{
    const int fd = *(const int *)arg;
    CHECK(qi_cache_lock(folder, key_of(0), LONG_MS) >= 0);
    CHECK(write(fd, "x", 1) == 1);
    for (;;) pause();
}

static void cache_locks_have_one_holder(void **state)
{
    (void)state;
    enum { NUM_PROCESSES = 6 };
    pid_t pids[NUM_PROCESSES];
    for (int i = 0; i < NUM_PROCESSES; i++) pids[i] = spawn(lock_and_unlock, NULL);
    for (int i = 0; i < NUM_PROCESSES; i++) assert_int_equal(join(pids[i]), GOOD);
    assert_int_equal(list(folder), 0); /* they are gone when nobody needs them */
}

static void cache_locks_end_with_their_holder(void **state)
{
    (void)state;
    int ends[2];
    char byte;
    assert_int_equal(pipe(ends), 0);
    const pid_t holder = spawn(lock_for_ever, &ends[1]);
    assert_int_equal(read(ends[0], &byte, 1), 1);
    assert_int_equal(qi_cache_lock(folder, key_of(0), 50), -1);
    const int other = qi_cache_lock(folder, key_of(1), 0);
    assert_true(other >= 0); /* another key's */
    kill(holder, SIGKILL);
    assert_int_equal(join(holder), -SIGKILL);
    const int lock = qi_cache_lock(folder, key_of(0), LONG_MS);
    assert_true(lock >= 0);
    qi_cache_unlock(folder, key_of(0), lock);
    qi_cache_unlock(folder, key_of(1), other);
    assert_int_equal(list(folder), 0);
    close(ends[0]), close(ends[1]);
}

static void cache_locks_are_no_condition(void **state)
{
    (void)state;
    spill(in_folder("file"), "x", 1, 0600);
    const char *const places[] = {"", "/proc/none", in_folder("file")};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        assert_int_equal(qi_cache_lock(places[i], key_of(0), LONG_MS), -1);
        qi_cache_unlock(places[i], key_of(0), -1);
    }
}

/* ---- disks that are full, read-only or slow ------------------------------------------------ */

/* A file system of this process alone on the folder. */
static int mount_private(const char *options)
{
    return unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
           mount("qkv-test", folder, "tmpfs", 0, options) == 0;
}

/* Writes larger and larger entries. Some fit, some do not, and those leave everything as it was. */
static int fill_up(const void *options)
{
    static unsigned char bytes[64 * 1000];
    if (options && !mount_private(options)) return SKIPPED;
    if (!options) {
        signal(SIGXFSZ, SIG_IGN);
        CHECK(setrlimit(RLIMIT_FSIZE, &(struct rlimit){16384, 16384}) == 0);
    }
    int written = 0, refused = 0;
    for (int i = 0; i < 64; i++) {
        const size_t size = 1000 * (size_t)i;
        memset(bytes, i, size);
        const int good = qi_cache_write(folder, key_of(i), bytes, size);
        CHECK(look(folder, key_of(i), bytes, size) == (good ? HIT : MISS));
        good ? written++ : refused++;
        CHECK(list(folder) == written);
    }
    CHECK(written > 0 && refused > 0);
    CHECK(qi_cache_write(folder, key_of(0), bytes, sizeof bytes) == 0);
    CHECK(look(folder, key_of(0), "", 0) == HIT); /* as before */
    CHECK(list(folder) == written);
    return GOOD;
}

static void cache_leaves_no_trace_on_a_full_disk(void **state)
{
    (void)state;
    run_child("files of at most 16 KiB", fill_up, NULL);
    nftw(folder, remove_file, 16, FTW_DEPTH | FTW_PHYS);
    assert_int_equal(mkdir(folder, 0700), 0);
    run_child("a disk of 64 KiB", fill_up, "mode=0700,size=64k");
    run_child("a disk of 9 files", fill_up, "mode=0700,nr_inodes=10");
}

static int use_read_only_disk(const void *arg)
{
    (void)arg;
    if (!mount_private("mode=0700")) return SKIPPED;
    CHECK(qi_cache_write(folder, key_of(0), small, sizeof small) == 1);
    CHECK(qi_cache_write(folder, key_of(1), small, sizeof small) == 1);
    CHECK(truncate(in_folder(key_of(1)), 100) == 0);
    CHECK(mount(NULL, folder, NULL, MS_REMOUNT | MS_RDONLY, NULL) == 0);
    CHECK(look(folder, key_of(0), small, sizeof small) == HIT);
    CHECK(look(folder, key_of(1), small, sizeof small) == MISS); /* and cannot be removed */
    for (int i = 0; i < 3; i++) CHECK(qi_cache_write(folder, key_of(i), "x", 1) == 0);
    CHECK(qi_cache_write(in_folder("below"), key_of(0), "x", 1) == 0);
    CHECK(look(folder, key_of(0), small, sizeof small) == HIT);
    CHECK(list(folder) == 2);
    return GOOD;
}

/* Root is not held back by a folder's mode: cache_trusts_root_and_oneself writes as another user. */
static void cache_reads_from_a_read_only_folder(void **state)
{
    (void)state;
    run_child("a read-only disk", use_read_only_disk, NULL);
    if (geteuid() == 0) return;
    make_genuine();
    assert_int_equal(chmod(folder, 0500), 0);
    const int written = qi_cache_write(folder, key_of(1), "x", 1);
    const int found = look(folder, key_of(0), small, sizeof small);
    assert_int_equal(chmod(folder, 0700), 0);
    assert_int_equal(written, 0);
    assert_int_equal(found, HIT);
    assert_int_equal(list(folder), 1);
}

/* A disk may say that it is full at the very end. */
static void cache_keeps_the_old_entry_if_the_last_step_fails(void **state)
{
    (void)state;
    static const char *const steps[] = {"fsync", "close", "rename"};
    make_genuine();
    for (int i = 0; i < 3; i++) {
        trouble.failing = steps[i];
        const int over = qi_cache_write(folder, key_of(0), "x", 1);
        const int anew = qi_cache_write(folder, key_of(1), "x", 1);
        trouble.failing = NULL;
        if (over || anew || list(folder) != 1) fail_msg("%s: %d, %d", steps[i], over, anew);
        assert_int_equal(look(folder, key_of(0), small, sizeof small), HIT);
    }
}

static void cache_endures_signals_and_small_steps(void **state)
{
    (void)state;
    static unsigned char bytes[100000];
    for (int round = 0; round < 50; round++) {
        const size_t size = (size_t)test_below(sizeof bytes);
        for (size_t i = 0; i < size; i++) bytes[i] = (unsigned char)test_u64();
        trouble.choppy = 1;
        const int written = qi_cache_write(folder, key_of(0), bytes, size);
        const int found = look(folder, key_of(0), bytes, size);
        trouble.choppy = 0;
        assert_int_equal(written, 1);
        assert_int_equal(found, HIT);
    }
}

/* ---- where it is --------------------------------------------------------------------------- */

#define LONG_NAME                                                                                  \
    "/a/folder/with/a/name/that/is/longer/than/sixty-four/bytes/as/those/of/build/machines/often/" \
    "are"

typedef struct place {
    const char *why, *option, *variable, *xdg, *home;
    size_t room;
    const char *expected; /* empty: no cache */
} place;

static void put_env(const char *name, const char *value)
{
    if (value)
        setenv(name, value, 1);
    else
        unsetenv(name);
}

static int find_place(const void *arg)
{
    const place *p = arg;
    char out[200];
    memset(out, '?', sizeof out);
    put_env("QKV_CACHE_DIR", p->variable);
    put_env("XDG_CACHE_HOME", p->xdg);
    put_env("HOME", p->home);
    const int found = qi_cache_dir(p->option, out, p->room);
    CHECK(memchr(out, '\0', p->room));
    if (strcmp(out, p->expected) != 0) fprintf(stderr, "%s: got \"%s\"\n", p->why, out);
    CHECK(strcmp(out, p->expected) == 0);
    CHECK(found == (p->expected[0] != '\0'));
    return GOOD;
}

/* Variables are read once in a process, so each case has its own. */
static void cache_dir_is_the_first_that_is_named(void **state)
{
    (void)state;
    static const place places[] = {
        {"the option goes first", "/o", "/v", "/x", "/h", 200, "/o"},
        {"an empty option: no cache", "", "/v", "/x", "/h", 200, ""},
        {"then the variable", NULL, "/v", "/x", "/h", 200, "/v"},
        {"a long one", NULL, LONG_NAME, "/x", "/h", 200, LONG_NAME},
        {"an empty variable: no cache", NULL, "", "/x", "/h", 200, ""},
        {"an option despite it", "/o", "", "/x", "/h", 200, "/o"},
        {"then the user's cache folder", NULL, NULL, "/x", "/h", 200, "/x/qkv"},
        {"empty is as good as none", NULL, NULL, "", "/h", 200, "/h/.cache/qkv"},
        {"then the home folder", NULL, NULL, NULL, "/h", 200, "/h/.cache/qkv"},
        {"an empty home is none", NULL, NULL, NULL, "", 200, ""},
        {"nothing at all", NULL, NULL, NULL, NULL, 200, ""},
        {"fits", NULL, NULL, NULL, "/home", 17, "/home/.cache/qkv"},
        {"does not fit", NULL, NULL, NULL, "/home", 16, ""},
        {"an option that does not fit", "/option", "/v", "/x", "/h", 7, ""},
    };
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++)
        run_child(places[i].why, find_place, &places[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sha256_agrees_with_the_standard),
        cmocka_unit_test(sha256_pads_every_length),
        cmocka_unit_test(sha256_does_not_see_how_data_is_split),
#define TEST_IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
        TEST_IN_FOLDER(cache_gives_back_what_was_written),
        TEST_IN_FOLDER(cache_makes_its_folder_for_one_user),
        TEST_IN_FOLDER(cache_misses_what_is_absent),
        TEST_IN_FOLDER(cache_misses_every_truncated_entry),
        TEST_IN_FOLDER(cache_misses_every_flipped_bit),
        TEST_IN_FOLDER(cache_misses_an_entry_of_another_key),
        TEST_IN_FOLDER(cache_refuses_what_others_may_write),
        TEST_IN_FOLDER(cache_trusts_root_and_oneself),
        TEST_IN_FOLDER(cache_reads_only_regular_files),
        TEST_IN_FOLDER(cache_is_shared_by_processes),
        TEST_IN_FOLDER(cache_shows_no_torn_payload_to_anyone),
        TEST_IN_FOLDER(cache_survives_killed_writers),
        TEST_IN_FOLDER(cache_locks_have_one_holder),
        TEST_IN_FOLDER(cache_locks_end_with_their_holder),
        TEST_IN_FOLDER(cache_locks_are_no_condition),
        TEST_IN_FOLDER(cache_leaves_no_trace_on_a_full_disk),
        TEST_IN_FOLDER(cache_reads_from_a_read_only_folder),
        TEST_IN_FOLDER(cache_keeps_the_old_entry_if_the_last_step_fails),
        TEST_IN_FOLDER(cache_endures_signals_and_small_steps),
        cmocka_unit_test(cache_dir_is_the_first_that_is_named),
    };
    test_seed();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
