/* test_cache.c - the disk cache, and SHA-256 that it stands on: what is cut off, changed or foreign is absent.
 * SPDX-License-Identifier: Apache-2.0 */
#include <grp.h>

#include "cache_folder.h"

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

enum { OTHER_USER = 65534 };

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
        TEST_IN_FOLDER(cache_gives_back_what_was_written),
        TEST_IN_FOLDER(cache_makes_its_folder_for_one_user),
        TEST_IN_FOLDER(cache_misses_what_is_absent),
        TEST_IN_FOLDER(cache_misses_every_truncated_entry),
        TEST_IN_FOLDER(cache_misses_every_flipped_bit),
        TEST_IN_FOLDER(cache_misses_an_entry_of_another_key),
        TEST_IN_FOLDER(cache_refuses_what_others_may_write),
        TEST_IN_FOLDER(cache_trusts_root_and_oneself),
        TEST_IN_FOLDER(cache_reads_only_regular_files),
        cmocka_unit_test(cache_dir_is_the_first_that_is_named),
    };
    test_seed();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
