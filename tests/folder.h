/* folder.h - a folder of a test's own.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_FOLDER_H
#define QKV_TESTS_FOLDER_H

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>

#include "support.h"

static int remove_entry(const char *path, const struct stat *info, int type, struct FTW *walk)
{
    (void)info, (void)type, (void)walk;
    return remove(path);
}

/* A fresh folder in $TMPDIR; path has room for 256 bytes. */
static inline void folder_new(char *path)
{
    const char *root = getenv("TMPDIR");
    snprintf(path, 256, "%s/qkv-test-XXXXXX", root ? root : "/tmp");
    assert_non_null(mkdtemp(path));
}

static inline void folder_free(const char *path)
{
    nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

#endif
