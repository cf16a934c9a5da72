/* cuda_api.c - see cuda_api.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "device/cuda_api.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/status.h"

qi_cuda_api qi_cuda;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static char missing[256]; /* why the table is empty */

static void load(void)
{
    typedef int (*get_address)(const char *symbol, void **function, int version, u64 flags,
                               int *status);
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!driver) {
        snprintf(missing, sizeof missing, "%s", dlerror());
        return;
    }
    void *symbol = dlsym(driver, "cuGetProcAddress_v2");
    get_address get;
    memcpy(&get, &symbol, sizeof get); /* C has no cast for this */
    if (!get) {
        snprintf(missing, sizeof missing, "it is older than CUDA 12");
        return;
    }
    static const struct {
        const char *name;
        size_t offset;
        int version;
    } table[] = {
#define X(name, symbol, version, args) {symbol, offsetof(qi_cuda_api, name), version},
        QI_CUDA_API(X)
#undef X
    };
    qi_cuda_api api;
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        void *function = NULL;
        int status = 0;
        if (get(table[i].name, &function, table[i].version, 0, &status) != CU_SUCCESS ||
            !function) {
            snprintf(missing, sizeof missing, "it has no %s of CUDA %d.%d", table[i].name,
                     table[i].version / 1000, table[i].version % 1000 / 10);
            return;
        }
        memcpy((char *)&api + table[i].offset, &function, sizeof function);
    }
    qi_cuda = api;
}

qkv_status qi_cuda_load(void)
{
    pthread_once(&once, load);
    if (!qi_cuda.init)
        QI_FAIL(QKV_ERR_UNSUPPORTED,
                "device: expected NVIDIA's driver (libcuda.so.1) of CUDA 12 or newer for kDLCUDA: "
                "%s",
                missing);
    return QKV_OK;
}

/* The driver's name of the call that this text makes: of "qi_cuda.launch(&config)", cuLaunchKernelEx. */
static const char *symbol_of(const char *call)
{
    static const struct {
        const char *text, *symbol;
    } table[] = {
#define X(name, symbol, version, args) {"qi_cuda." #name, symbol},
        QI_CUDA_API(X)
#undef X
    };
    const size_t length = strcspn(call, "(");
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (strlen(table[i].text) == length && strncmp(table[i].text, call, length) == 0)
            return table[i].symbol;
    return call;
}

qkv_status qi_cuda_check(int result, const char *call, const char *file, int line)
{
    const char *text = NULL;
    if (qi_cuda.error_string(result, &text) != CU_SUCCESS || !text) text = "no text for it";
    return qi_fail(result == CU_OUT_OF_MEMORY ? QKV_ERR_MEMORY : QKV_ERR_DEVICE, file, line,
                   "CUDA driver: %s: error %d, %s", symbol_of(call), result, text);
}
