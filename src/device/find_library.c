/* find_library.c - see find_library.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "device/find_library.h"

#include <glob.h>
#include <stdio.h>
#include <stdlib.h>

/* The libraries that match a pattern of the shell, until one opens. */
static int open_matching(const char *pattern, int (*open)(const char *path, void *user), void *user)
{
    glob_t found;
    int opened = 0;
    if (glob(pattern, 0, NULL, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc && !opened; i++)
            opened = open(found.gl_pathv[i], user);
    globfree(&found);
    return opened;
}

int qi_find_cuda_library(const char *name, int major, int (*open)(const char *path, void *user),
                         void *user)
{
    static const struct {
        const char *variable, *below;
    } places[] = {{NULL, NULL}, /* the loader knows */
                  {"CUDA_HOME", "lib64"},
                  {"CUDA_PATH", "lib64"},
                  {NULL, "/usr/local/cuda/lib64"},
                  {NULL, "/usr/local/cuda-*/lib64"},
                  {"VIRTUAL_ENV", "lib/python3*/site-packages/nvidia/*/lib"},
                  {"CONDA_PREFIX", "lib"},
                  {"CONDA_PREFIX", "lib/python3*/site-packages/nvidia/*/lib"}};
    char path[1024];
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        const char *root = places[i].variable ? getenv(places[i].variable) : "";
        if (!root || (places[i].variable && !*root)) continue;
        if (!places[i].below) {
            snprintf(path, sizeof path, "%s.so.%d", name, major);
            if (open(path, user)) return 1;
            continue;
        }
        snprintf(path, sizeof path, "%.700s%s%s/%s.so.%d", root, *root ? "/" : "", places[i].below,
                 name, major);
        if (open_matching(path, open, user)) return 1;
    }
    return 0;
}
