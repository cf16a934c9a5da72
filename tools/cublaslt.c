/* cublaslt.c - see cublaslt.h. The numbers are those of the library's header.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cublaslt.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { R_32F = 0, R_16BF = 14, COMPUTE_32F = 68, TRANSA = 3, OP_T = 1, MAX_WORKSPACE = 1 };
enum { WAYS = 4, WORKSPACE = 64 << 20 };

typedef struct way {
    uint64_t algorithm[8];
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
} way;

#define API(X)                                                                                     \
    X(create, "cublasLtCreate", (void **handle))                                                   \
    X(destroy, "cublasLtDestroy", (void *handle))                                                  \
    X(desc_create, "cublasLtMatmulDescCreate", (void **desc, int compute, int scale))              \
    X(desc_set, "cublasLtMatmulDescSetAttribute",                                                  \
      (void *desc, int attribute, const void *value, size_t bytes))                                \
    X(desc_destroy, "cublasLtMatmulDescDestroy", (void *desc))                                     \
    X(layout_create, "cublasLtMatrixLayoutCreate",                                                 \
      (void **layout, int type, uint64_t rows, uint64_t columns, int64_t pitch))                   \
    X(layout_destroy, "cublasLtMatrixLayoutDestroy", (void *layout))                               \
    X(preference_create, "cublasLtMatmulPreferenceCreate", (void **preference))                    \
    X(preference_set, "cublasLtMatmulPreferenceSetAttribute",                                      \
      (void *preference, int attribute, const void *value, size_t bytes))                          \
    X(preference_destroy, "cublasLtMatmulPreferenceDestroy", (void *preference))                   \
    X(heuristic, "cublasLtMatmulAlgoGetHeuristic",                                                 \
      (void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference, int wanted, \
       way *ways, int *found))                                                                     \
    X(matmul, "cublasLtMatmul",                                                                    \
      (void *handle, void *desc, const void *alpha, const void *a, void *layout_a, const void *b,  \
       void *layout_b, const void *beta, const void *c, void *layout_c, void *d, void *layout_d,   \
       const void *algorithm, void *workspace, size_t workspace_bytes, void *stream))

struct cublaslt {
    struct {
#define X(name, symbol, args) int(*name) args;
        API(X)
#undef X
    } api;
    cuda *gpu;
    void *library, *handle, *desc, *layout, *preference, *workspace;
    int num_ways;
    way ways[WAYS];
};

/* Of the symbol table; 0 if one is missing. */
static int load_symbols(cublaslt *l)
{
    static const char *const symbols[] = {
#define X(name, symbol, args) symbol,
        API(X)
#undef X
    };
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *function = dlsym(l->library, symbols[i]);
        if (!function) return 0;
        memcpy((char *)&l->api + i * sizeof function, &function, sizeof function);
    }
    return 1;
}

static void *open_library(void)
{
    static const char *const folders[] = {"", "/usr/local/cuda/lib64/"};
    const char *wanted = getenv("QKV_CUBLASLT");
    void *library = NULL;
    if (wanted) return dlopen(wanted, RTLD_NOW | RTLD_LOCAL);
    for (int major = 14; major >= 12 && !library; major--)
        for (int i = 0; i < 2 && !library; i++) {
            char path[64];
            snprintf(path, sizeof path, "%slibcublasLt.so.%d", folders[i], major);
            library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        }
    return library;
}

/* Rows of [n, n] in C's order are columns for the library: out^T = b a^T, and b comes transposed. */
static int describe(cublaslt *l, uint64_t n)
{
    const int transpose = OP_T;
    const size_t room = WORKSPACE;
    return l->api.create(&l->handle) == 0 &&
           l->api.desc_create(&l->desc, COMPUTE_32F, R_32F) == 0 &&
           l->api.desc_set(l->desc, TRANSA, &transpose, sizeof transpose) == 0 &&
           l->api.layout_create(&l->layout, R_16BF, n, n, (int64_t)n) == 0 &&
           l->api.preference_create(&l->preference) == 0 &&
           l->api.preference_set(l->preference, MAX_WORKSPACE, &room, sizeof room) == 0 &&
           l->api.heuristic(l->handle, l->desc, l->layout, l->layout, l->layout, l->layout,
                            l->preference, WAYS, l->ways, &l->num_ways) == 0 &&
           l->num_ways > 0;
}

cublaslt *cublaslt_open(cuda *c, int64_t n)
{
    cublaslt *l = calloc(1, sizeof *l);
    if (!l) return NULL;
    l->gpu = c;
    l->library = open_library();
    if (!l->library || !load_symbols(l) || !describe(l, (uint64_t)n)) {
        cublaslt_close(l);
        return NULL;
    }
    l->workspace = cuda_alloc(c, WORKSPACE);
    return l;
}

void cublaslt_close(cublaslt *l)
{
    if (!l) return;
    cuda_free(l->gpu, l->workspace);
    if (l->preference) l->api.preference_destroy(l->preference);
    if (l->layout) l->api.layout_destroy(l->layout);
    if (l->desc) l->api.desc_destroy(l->desc);
    if (l->handle) l->api.destroy(l->handle);
    if (l->library) dlclose(l->library);
    free(l);
}

int cublaslt_num_ways(const cublaslt *l)
{
    return l->num_ways;
}

int cublaslt_multiply(cublaslt *l, int i, void *out, const void *a, const void *b)
{
    const float one = 1, zero = 0;
    return l->api.matmul(l->handle, l->desc, &one, b, l->layout, a, l->layout, &zero, out,
                         l->layout, out, l->layout, l->ways[i].algorithm, l->workspace, WORKSPACE,
                         cuda_stream(l->gpu)) == 0;
}
