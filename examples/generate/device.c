/* device.c - see device.h. The driver's functions are looked up by name, so that neither a CUDA header
 * nor its library is needed to build; pointers and handles are its documented ABI.
 * SPDX-License-Identifier: Apache-2.0 */
#include "device.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- the driver ------------------------------------------------------------------------------ */

typedef uint64_t cuda_address;

/* name, symbol, the version of CUDA that has it in this form, arguments */
#define DRIVER(X)                                                                                  \
    X(init, "cuInit", 2000, (unsigned flags))                                                      \
    X(error_string, "cuGetErrorString", 6000, (int result, const char **text))                     \
    X(device_get, "cuDeviceGet", 2000, (int *device, int ordinal))                                 \
    X(context_retain, "cuDevicePrimaryCtxRetain", 7000, (void **context, int device))              \
    X(context_release, "cuDevicePrimaryCtxRelease", 11000, (int device))                           \
    X(context_set, "cuCtxSetCurrent", 4000, (void *context))                                       \
    X(memory_info, "cuMemGetInfo", 3020, (size_t * unused, size_t * total))                        \
    X(memory_alloc, "cuMemAlloc", 3020, (cuda_address * block, size_t bytes))                      \
    X(memory_free, "cuMemFree", 3020, (cuda_address block))                                        \
    X(host_alloc, "cuMemHostAlloc", 2020, (void **block, size_t bytes, unsigned flags))            \
    X(host_free, "cuMemFreeHost", 2000, (void *block))                                             \
    X(copy, "cuMemcpyAsync", 4000,                                                                 \
      (cuda_address to, cuda_address from, size_t bytes, void *stream))                            \
    X(wait, "cuStreamSynchronize", 2000, (void *stream))

static struct {
#define X(name, symbol, version, args) int(*name) args;
    DRIVER(X)
#undef X
} driver;

static char missing[160]; /* why the table is empty */

static void load_driver(void)
{
    static const struct {
        const char *symbol;
        int version;
    } names[] = {
#define X(name, symbol, version, args) {symbol, version},
        DRIVER(X)
#undef X
    };
    enum { COUNT = sizeof names / sizeof names[0] };
    void *functions[COUNT];
    int (*look_up)(const char *symbol, void **function, int version, uint64_t flags, int *status);
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    void *symbol = library ? dlsym(library, "cuGetProcAddress_v2") : NULL;
    if (!symbol) {
        snprintf(missing, sizeof missing, "%s", library ? "it is older than CUDA 12" : dlerror());
        return;
    }
    memcpy(&look_up, &symbol, sizeof look_up); /* C has no cast for this */
    for (int i = 0; i < COUNT; i++) {
        int status;
        if (look_up(names[i].symbol, &functions[i], names[i].version, 0, &status) == 0 &&
            functions[i])
            continue;
        snprintf(missing, sizeof missing, "it has no %s", names[i].symbol);
        return;
    }
    memcpy(&driver, functions, sizeof driver);
}

/* True for the driver's 0; else what was tried, and the driver's own words. */
static bool succeeds(int result, const char *what, char error[GGUF_ERROR])
{
    const char *text = NULL;
    if (result == 0) return true;
    if (driver.error_string(result, &text) != 0 || !text) text = "no text for it";
    return fail(error, "CUDA driver: %s: error %d, %s", what, result, text);
}

static cuda_address address_of(const void *block)
{
    return (cuda_address)(uintptr_t)block;
}

static bool copy(const compute_device *d, void *to, const void *from, size_t bytes,
                 const char *what, char error[GGUF_ERROR])
{
    if (bytes == 0) return true;
    if (d->where.device_type == kDLCUDA)
        return succeeds(driver.copy(address_of(to), address_of(from), bytes, NULL), what, error);
    memcpy(to, from, bytes);
    return true;
}

/* ---- the device ------------------------------------------------------------------------------ */

bool device_open(compute_device *d, DLDevice where, char error[GGUF_ERROR])
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    void *context;
    compute_device opened = {.where = where};
    if (where.device_type == kDLCUDA) {
        pthread_once(&once, load_driver);
        if (!driver.init) return fail(error, "NVIDIA's driver (libcuda.so.1): %s", missing);
        if (!succeeds(driver.init(0), "init", error) ||
            !succeeds(driver.device_get(&opened.ordinal, where.device_id), "device", error) ||
            !succeeds(driver.context_retain(&context, opened.ordinal), "context", error))
            return false;
        if (!succeeds(driver.context_set(context), "context", error)) {
            driver.context_release(opened.ordinal);
            return false;
        }
    }
    *d = opened;
    return true;
}

void device_close(compute_device *d)
{
    if (d->where.device_type == kDLCUDA) driver.context_release(d->ordinal);
    *d = (compute_device){.ordinal = 0};
}

bool device_memory(const compute_device *d, size_t *bytes, char error[GGUF_ERROR])
{
    size_t total;
    if (d->where.device_type == kDLCUDA)
        return succeeds(driver.memory_info(bytes, &total), "free memory", error);
    *bytes = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    return true;
}

void *device_alloc(const compute_device *d, size_t bytes)
{
    cuda_address block = 0;
    if (d->where.device_type != kDLCUDA) return allocate(bytes);
    if (driver.memory_alloc(&block, bytes ? bytes : 1) != 0) return NULL;
    return (void *)(uintptr_t)block;
}

void device_free(const compute_device *d, void *block)
{
    if (d->where.device_type != kDLCUDA)
        free(block);
    else if (block)
        driver.memory_free(address_of(block));
}

bool device_upload(const compute_device *d, void *to, const void *from, size_t bytes,
                   char error[GGUF_ERROR])
{
    return copy(d, to, from, bytes, "copy to the device", error) && device_wait(d, error);
}

bool device_download(const compute_device *d, void *to, const void *from, size_t bytes,
                     char error[GGUF_ERROR])
{
    return copy(d, to, from, bytes, "copy from the device", error) && device_wait(d, error);
}

bool device_copy(const compute_device *d, void *to, const void *from, size_t bytes,
                 char error[GGUF_ERROR])
{
    return copy(d, to, from, bytes, "copy on the device", error);
}

bool device_wait(const compute_device *d, char error[GGUF_ERROR])
{
    return d->where.device_type != kDLCUDA || succeeds(driver.wait(NULL), "wait", error);
}

/* ---- mirrors --------------------------------------------------------------------------------- */

bool mirror_create(const compute_device *d, size_t bytes, mirror *m)
{
    *m = (mirror){.there = device_alloc(d, bytes)};
    if (d->where.device_type != kDLCUDA)
        m->host = m->there;
    else if (driver.host_alloc(&m->host, bytes ? bytes : 1, 0) != 0)
        m->host = NULL;
    if (m->host && m->there) return true;
    mirror_destroy(d, m);
    return false;
}

void mirror_destroy(const compute_device *d, mirror *m)
{
    if (d->where.device_type == kDLCUDA && m->host) driver.host_free(m->host);
    device_free(d, m->there);
    *m = (mirror){.there = NULL};
}

bool mirror_upload(const compute_device *d, const mirror *m, size_t bytes, char error[GGUF_ERROR])
{
    return m->host == m->there || copy(d, m->there, m->host, bytes, "copy to the device", error);
}

bool mirror_download(const compute_device *d, const mirror *m, size_t bytes, char error[GGUF_ERROR])
{
    return m->host == m->there || device_download(d, m->host, m->there, bytes, error);
}
