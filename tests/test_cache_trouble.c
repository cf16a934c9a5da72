/* test_cache_trouble.c - the disk cache where others use it and the system does not play along: neither a crowd of
 * processes nor a killed writer nor a full disk costs more than a rebuild.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include "cache_folder.h"

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

/* ---- payloads ------------------------------------------------------------------------------ */

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
    folder_free(folder);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
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
    };
    test_seed();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
