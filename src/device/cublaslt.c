/* cublaslt.c - see cublaslt.h.
 *
 * cuBLASLt's matrices are column-major, so out^T = w x^T is computed: a is w, [k, n] transposed; b is x,
 * [k, m]; d is out, [n, m].
 * SPDX-License-Identifier: Apache-2.0 */
#include "device/cublaslt.h"

#include <stdlib.h>
#include <string.h>

#include "base/status.h"

enum { SETS = 256, WAYS = 4, CACHE = SETS * WAYS };
enum { STREAMS = 16 };                    /* room of qi_cublaslt.workspaces */
enum { WORKSPACE_BYTES = 32 << 20 };      /* what NVIDIA recommends for Hopper and newer */
#define STREAM_OF_EACH_THREAD ((void *)2) /* CU_STREAM_PER_THREAD: many streams behind one name */

struct qi_cublaslt_entry {
    qi_matmul problem; /* m 0: none */
    lt_algorithm algorithm;
    size_t workspace_bytes;
    int offered; /* 0: cuBLASLt has no algorithm for it */
    int ran;     /* its kernel is loaded */
};

void qi_cublaslt_init(qi_cublaslt *lt)
{
    *lt = (qi_cublaslt){.api = NULL};
    pthread_mutex_init(&lt->lock, NULL);
}

void qi_cublaslt_free(qi_cublaslt *lt, const qi_cuda_device *device)
{
    cu_context before;
    if (lt->handle && device && qi_cuda_enter(device, &before) == CU_SUCCESS) {
        for (int i = 0; i < lt->num_workspaces; i++) qi_cuda_free(device, lt->workspaces[i].memory);
        if (lt->preference) lt->api->preference_destroy(lt->preference);
        if (lt->out) lt->api->layout_destroy(lt->out);
        if (lt->x) lt->api->layout_destroy(lt->x);
        if (lt->w) lt->api->layout_destroy(lt->w);
        if (lt->operation) lt->api->operation_destroy(lt->operation);
        lt->api->destroy(lt->handle);
        qi_cuda_leave(device, before);
    }
    free(lt->entries);
    pthread_mutex_destroy(&lt->lock);
}

/* What may load code or allocate would end a capture that is under way, but of a thread in this mode: none of
 * it touches a stream. Returns the mode before, -1 if that did not change. */
static int relax(void)
{
    int mode = CU_CAPTURE_RELAXED;
    return qi_cuda.capture_mode(&mode) == CU_SUCCESS ? mode : -1;
}

static void restore(int mode)
{
    if (mode >= 0) qi_cuda.capture_mode(&mode);
}

/* ---- opening ------------------------------------------------------------------------------ */

static int make_objects(qi_cublaslt *lt)
{
    const i32 transposed = LT_TRANSPOSED;
    const u32 reductions = LT_REDUCTION_COMPUTE_TYPE;
    const qi_cublaslt_api *api = lt->api;
    return api->create(&lt->handle) == LT_SUCCESS &&
           api->operation_create(&lt->operation, LT_COMPUTE_F32, LT_F32) == LT_SUCCESS &&
           api->operation_set(lt->operation, LT_OPERATION_TRANSPOSE_A, &transposed,
                              sizeof transposed) == LT_SUCCESS &&
           api->layout_create(&lt->w, LT_F32, 1, 1, 1) == LT_SUCCESS &&
           api->layout_create(&lt->x, LT_F32, 1, 1, 1) == LT_SUCCESS &&
           api->layout_create(&lt->out, LT_F32, 1, 1, 1) == LT_SUCCESS &&
           api->preference_create(&lt->preference) == LT_SUCCESS &&
           api->preference_set(lt->preference, LT_REDUCTIONS, &reductions, sizeof reductions) ==
               LT_SUCCESS;
}

/* NULL, or why cuBLASLt cannot be used. The caller has made the device current. */
static const char *open_library(qi_cublaslt *lt, const qi_cuda_device *device)
{
    if (!lt->api) lt->api = qi_cublaslt_find(device->driver);
    if (!lt->api) return lt->unusable = "no libcublasLt of version 12 or newer was found";
    if (!make_objects(lt)) return lt->unusable = "libcublasLt cannot be used on this device";
    lt->entries = calloc(CACHE, sizeof *lt->entries);
    if (!lt->entries) lt->unusable = "out of memory";
    return lt->unusable;
}

/* ---- problems ----------------------------------------------------------------------------- */

static int type_of(qi_dtype dtype)
{
    return dtype == QI_F32 ? LT_F32 : dtype == QI_F16 ? LT_F16 : LT_BF16;
}

static int set_layout(const qi_cublaslt *lt, lt_layout layout, qi_dtype dtype, i64 rows,
                      i64 columns, i64 pitch)
{
    const u32 type = (u32)type_of(dtype);
    return lt->api->layout_set(layout, LT_TYPE, &type, sizeof type) == LT_SUCCESS &&
           lt->api->layout_set(layout, LT_ROWS, &rows, sizeof rows) == LT_SUCCESS &&
           lt->api->layout_set(layout, LT_COLUMNS, &columns, sizeof columns) == LT_SUCCESS &&
           lt->api->layout_set(layout, LT_PITCH, &pitch, sizeof pitch) == LT_SUCCESS;
}

static int set_layouts(const qi_cublaslt *lt, const qi_matmul *p)
{
    return set_layout(lt, lt->w, p->dtype, p->k, p->n, p->w_stride) &&
           set_layout(lt, lt->x, p->dtype, p->k, p->m, p->x_stride) &&
           set_layout(lt, lt->out, p->dtype_out, p->n, p->m, p->out_stride);
}

static int set_preference(const qi_cublaslt *lt, const qi_matmul *p)
{
    const struct {
        int attribute;
        u32 value;
    } alignments[] = {{LT_ALIGNMENT_A, p->w_alignment},
                      {LT_ALIGNMENT_B, p->x_alignment},
                      {LT_ALIGNMENT_C, p->out_alignment},
                      {LT_ALIGNMENT_D, p->out_alignment}};
    const u64 bytes = p->workspace ? WORKSPACE_BYTES : 0;
    int good = lt->api->preference_set(lt->preference, LT_MAX_WORKSPACE, &bytes, sizeof bytes) ==
               LT_SUCCESS;
    for (size_t i = 0; good && i < sizeof alignments / sizeof alignments[0]; i++)
        good = lt->api->preference_set(lt->preference, alignments[i].attribute,
                                       &alignments[i].value, sizeof(u32)) == LT_SUCCESS;
    return good;
}

static void choose(const qi_cublaslt *lt, qi_cublaslt_entry *entry)
{
    lt_choice choice = {.state = LT_SUCCESS};
    int count = 0;
    const int mode = relax();
    entry->offered = set_layouts(lt, &entry->problem) && set_preference(lt, &entry->problem) &&
                     lt->api->choose(lt->handle, lt->operation, lt->w, lt->x, lt->out, lt->out,
                                     lt->preference, 1, &choice, &count) == LT_SUCCESS &&
                     count == 1 && choice.state == LT_SUCCESS;
    restore(mode);
    entry->algorithm = choice.algorithm;
    entry->workspace_bytes = choice.workspace_bytes;
}

/* The problem's entry, made if it is not there. */
static qi_cublaslt_entry *find(qi_cublaslt *lt, const qi_matmul *problem, u32 workspace)
{
    qi_matmul p = *problem;
    p.workspace = workspace;
    u64 words[sizeof p / sizeof(u64)], hash = 0xcbf29ce484222325u;
    _Static_assert(sizeof words == sizeof p, "whole words, and no padding");
    memcpy(words, &p, sizeof p);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15u, hash ^= hash >> 32;
    qi_cublaslt_entry *set = &lt->entries[hash % SETS * WAYS];
    for (int i = 0; i < WAYS; i++)
        if (memcmp(&set[i].problem, &p, sizeof p) == 0) return &set[i];
    qi_cublaslt_entry *entry = &set[lt->turn++ % WAYS];
    *entry = (qi_cublaslt_entry){.problem = p};
    choose(lt, entry);
    return entry;
}

/* With the device current and the lock held. */
static const char *declines(qi_cublaslt *lt, const qi_cuda_device *device, const qi_matmul *problem)
{
    if (!lt->entries) {
        const int mode = relax();
        const char *why = open_library(lt, device);
        restore(mode);
        if (why) return why;
    }
    return find(lt, problem, 1)->offered ? NULL : "cuBLASLt has no algorithm for it";
}

const char *qi_cublaslt_declines(qi_cublaslt *lt, const qi_cuda_device *device,
                                 const qi_matmul *problem)
{
    cu_context before;
    if (qi_cuda_enter(device, &before) != CU_SUCCESS) return "the device cannot be made current";
    pthread_mutex_lock(&lt->lock);
    const char *why = lt->unusable ? lt->unusable : declines(lt, device, problem);
    pthread_mutex_unlock(&lt->lock);
    qi_cuda_leave(device, before);
    return why;
}

/* ---- running ------------------------------------------------------------------------------ */

/* The stream's block; NULL where it has none. */
static void *workspace_of(qi_cublaslt *lt, const qi_cuda_device *device, void *stream)
{
    for (int i = 0; i < lt->num_workspaces; i++)
        if (lt->workspaces[i].stream == stream) return lt->workspaces[i].memory;
    if (lt->num_workspaces == STREAMS || stream == STREAM_OF_EACH_THREAD) return NULL;
    void *memory;
    const int mode = relax();
    const qkv_status status = qi_cuda_alloc(device, WORKSPACE_BYTES, &memory);
    restore(mode);
    if (status != QKV_OK) return NULL;
    lt->workspaces[lt->num_workspaces].stream = stream;
    lt->workspaces[lt->num_workspaces++].memory = memory;
    return memory;
}

static int multiply(qi_cublaslt *lt, const qi_cuda_device *device, const qi_matmul *problem,
                    void *out, const void *x, const void *w, void *stream)
{
    const float one = 1.f, zero = 0.f;
    qi_cublaslt_entry *entry = find(lt, problem, 1);
    void *workspace = NULL;
    if (entry->workspace_bytes > 0 && !(workspace = workspace_of(lt, device, stream)))
        entry = find(lt, problem, 0);
    if (!entry->offered || !set_layouts(lt, problem)) return LT_ALLOC_FAILED;
    const int mode = entry->ran ? -1 : relax(); /* the first run loads the kernel */
    const int result = lt->api->multiply(lt->handle, lt->operation, &one, w, lt->w, x, lt->x, &zero,
                                         out, lt->out, out, lt->out, &entry->algorithm, workspace,
                                         workspace ? WORKSPACE_BYTES : 0, stream);
    restore(mode);
    entry->ran = 1;
    return result;
}

qkv_status qi_cublaslt_multiply(qi_cublaslt *lt, const qi_cuda_device *device,
                                const qi_matmul *problem, void *out, const void *x, const void *w,
                                void *stream)
{
    cu_context before;
    QI_CUDA_TRY(qi_cuda_enter(device, &before));
    pthread_mutex_lock(&lt->lock);
    const int result = multiply(lt, device, problem, out, x, w, stream);
    pthread_mutex_unlock(&lt->lock);
    qi_cuda_leave(device, before);
    if (result == LT_SUCCESS) return QKV_OK;
    QI_FAIL(result == LT_ALLOC_FAILED ? QKV_ERR_MEMORY : QKV_ERR_DEVICE,
            "cuBLASLt: cublasLtMatmul: status %d", result);
}
