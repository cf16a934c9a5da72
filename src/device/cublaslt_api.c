/* cublaslt_api.c - see cublaslt_api.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "device/cublaslt_api.h"

#include <dlfcn.h>
#include <pthread.h>
#include <string.h>

#include "device/find_library.h"

enum { OLDEST_MAJOR = 12 };

/* Fills the table from the library at path; 0 if that is none, or too old. */
static int open_library(const char *path, void *user)
{
    static const struct {
        const char *symbol;
        size_t offset;
    } table[] = {
#define X(name, symbol, result, args) {symbol, offsetof(qi_cublaslt_api, name)},
        QI_CUBLASLT_API(X)
#undef X
    };
    qi_cublaslt_api *api = user;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return 0;
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        void *function = dlsym(library, table[i].symbol);
        if (!function) goto close;
        memcpy((char *)api + table[i].offset, &function, sizeof function);
    }
    if (api->version() / 10000 >= OLDEST_MAJOR) return 1;

close:
    dlclose(library);
    return 0;
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static qi_cublaslt_api found;
static int looked, opened;

const qi_cublaslt_api *qi_cublaslt_find(int driver)
{
    pthread_mutex_lock(&lock);
    for (int major = driver / 1000; !looked && !opened && major >= OLDEST_MAJOR; major--)
        opened = qi_find_cuda_library("libcublasLt", major, open_library, &found);
    looked = 1;
    pthread_mutex_unlock(&lock);
    return opened ? &found : NULL;
}
