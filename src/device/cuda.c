/* cuda.c - see cuda.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "device/cuda.h"

#include <stdio.h>
#include <string.h>

#include "base/status.h"

/* Most often the device is current already, and the driver's get is cheap. */
int qi_cuda_enter(const qi_cuda_device *device, cu_context *before)
{
    if (!device->context) return CU_NOT_INITIALIZED; /* QKV_JIT_FILL */
    const int result = qi_cuda.context_current(before);
    if (result != CU_SUCCESS || *before == device->context) return result;
    return qi_cuda.context_set(device->context);
}

void qi_cuda_leave(const qi_cuda_device *device, cu_context before)
{
    if (before != device->context) qi_cuda.context_set(before);
}

/* One driver call with the device current. */
#define ON_DEVICE(device, call)                                                                    \
    do {                                                                                           \
        cu_context before_;                                                                        \
        if (!(device)->context)                                                                    \
            QI_FAIL(QKV_ERR_UNSUPPORTED,                                                           \
                    "ctx: expected a context of a device, got one of QKV_JIT_FILL");               \
        const int entered_ = qi_cuda_enter((device), &before_);                                    \
        if (entered_ != CU_SUCCESS)                                                                \
            return qi_cuda_check(entered_, "cuCtxSetCurrent", __FILE__, __LINE__);                 \
        const int result_ = (call);                                                                \
        qi_cuda_leave((device), before_);                                                          \
        if (result_ != CU_SUCCESS) return qi_cuda_check(result_, #call, __FILE__, __LINE__);       \
    } while (0)

static qkv_status read_attributes(qi_cuda_device *d)
{
    const struct {
        int *value, attribute;
    } wanted[] = {{&d->major, CU_DEVICE_MAJOR},
                  {&d->minor, CU_DEVICE_MINOR},
                  {&d->num_sms, CU_DEVICE_NUM_SMS},
                  {&d->l2_bytes, CU_DEVICE_L2_BYTES},
                  {&d->shared_bytes, CU_DEVICE_MAX_SHARED_BYTES_PER_BLOCK_OPTIN}};
    for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++)
        QI_CUDA_TRY(qi_cuda.device_attribute(wanted[i].value, wanted[i].attribute, d->device));
    QI_CUDA_TRY(qi_cuda.device_name(d->name, (int)sizeof d->name, d->device));
    QI_CUDA_TRY(qi_cuda.driver_version(&d->driver));
    return QKV_OK;
}

qkv_status qi_cuda_open(int ordinal, qi_cuda_device *out)
{
    QI_TRY(qi_cuda_load());
    const int result = qi_cuda.init(0);
    if (result == CU_NOT_INITIALIZED)
        QI_FAIL(QKV_ERR_DEVICE,
                "device: the CUDA driver cannot be used in this process: it was forked from one "
                "that had used it (start such processes by spawn)");
    int count = 0;
    if (result != CU_SUCCESS && result != CU_NO_DEVICE)
        return qi_cuda_check(result, "cuInit", __FILE__, __LINE__);
    if (result == CU_SUCCESS) QI_CUDA_TRY(qi_cuda.device_count(&count));
    if (ordinal < 0 || ordinal >= count)
        QI_FAIL(QKV_ERR_UNSUPPORTED, "device: expected a device_id below %d CUDA devices, got %d",
                count, ordinal);
    qi_cuda_device d = {.ordinal = ordinal};
    QI_CUDA_TRY(qi_cuda.device_get(&d.device, ordinal));
    QI_TRY(read_attributes(&d));
    if (d.major < 8)
        QI_FAIL(QKV_ERR_UNSUPPORTED,
                "device: expected compute capability 8.0 or newer, got %d.%d (%s)", d.major,
                d.minor, d.name);
    QI_CUDA_TRY(qi_cuda.primary_retain(&d.context, d.device));
    *out = d;
    return QKV_OK;
}

void qi_cuda_close(qi_cuda_device *device)
{
    if (device->context) qi_cuda.primary_release(device->device);
    device->context = NULL;
}

/* A device's shared memory follows its architecture; of multiprocessors, those of a large one. */
qkv_status qi_cuda_describe(const char *isa, qi_cuda_device *out)
{
    static const struct {
        int major, minor, num_sms, shared_bytes, l2_bytes;
    } known[] = {
        {8, 0, 108, 166912, 40 << 20},   {8, 6, 84, 101376, 6 << 20},
        {8, 7, 16, 166912, 4 << 20},     {8, 9, 142, 101376, 96 << 20},
        {9, 0, 132, 232448, 50 << 20},   {10, 0, 148, 232448, 126 << 20},
        {10, 3, 148, 232448, 126 << 20}, {12, 0, 170, 101376, 96 << 20},
        {12, 1, 48, 101376, 24 << 20},
    };
    char names[256] = "";
    size_t at = 0;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        char name[16];
        snprintf(name, sizeof name, "sm_%d%d%s", known[i].major, known[i].minor,
                 known[i].major >= 9 ? "a" : "");
        *out = (qi_cuda_device){.major = known[i].major,
                                .minor = known[i].minor,
                                .num_sms = known[i].num_sms,
                                .shared_bytes = known[i].shared_bytes,
                                .l2_bytes = known[i].l2_bytes};
        snprintf(out->name, sizeof out->name, "%s", name);
        if (isa && strcmp(isa, name) == 0) return QKV_OK;
        at += (size_t)snprintf(names + at, sizeof names - at, "%s%s", at ? ", " : "", name);
    }
    QI_FAIL(QKV_ERR_INVALID, "isa: expected one of %s with QKV_JIT_FILL, got %s", names,
            isa ? isa : "NULL");
}

/* ---- memory ------------------------------------------------------------------------------- */

qkv_status qi_cuda_alloc(const qi_cuda_device *device, size_t bytes, void **out)
{
    cu_ptr ptr = 0;
    *out = NULL;
    ON_DEVICE(device, qi_cuda.memory_alloc(&ptr, bytes ? bytes : 1));
    memcpy(out, &ptr, sizeof *out);
    return QKV_OK;
}

static cu_ptr ptr_of(const void *memory)
{
    return (cu_ptr)(uintptr_t)memory;
}

/* Failures are of no use to who frees. */
static int free_on(const qi_cuda_device *device, void *memory, int pinned)
{
    cu_context before;
    const int result = qi_cuda_enter(device, &before);
    if (result != CU_SUCCESS) return result;
    if (pinned)
        qi_cuda.host_free(memory);
    else
        qi_cuda.memory_free(ptr_of(memory));
    qi_cuda_leave(device, before);
    return CU_SUCCESS;
}

void qi_cuda_free(const qi_cuda_device *device, void *memory)
{
    if (memory) free_on(device, memory, 0);
}

qkv_status qi_cuda_alloc_pinned(const qi_cuda_device *device, size_t bytes, void **out)
{
    *out = NULL;
    ON_DEVICE(device, qi_cuda.host_alloc(out, bytes ? bytes : 1, 0));
    return QKV_OK;
}

void qi_cuda_free_pinned(const qi_cuda_device *device, void *memory)
{
    if (memory) free_on(device, memory, 1);
}

/* ---- kernels ------------------------------------------------------------------------------ */

/* Is it the image that the driver does not take? */
static int is_of_image(int result)
{
    static const int results[] = {
        CU_INVALID_IMAGE,          CU_NO_BINARY_FOR_GPU,       CU_INVALID_PTX,
        CU_JIT_COMPILER_NOT_FOUND, CU_UNSUPPORTED_PTX_VERSION, CU_JIT_COMPILATION_DISABLED,
        CU_INVALID_SOURCE};
    for (size_t i = 0; i < sizeof results / sizeof results[0]; i++)
        if (result == results[i]) return 1;
    return 0;
}

qkv_status qi_cuda_load_image(const void *image, void **out, const char **error)
{
    cu_library library = NULL;
    const int result = qi_cuda.library_load(&library, image, NULL, NULL, 0, NULL, NULL, 0);
    *out = NULL;
    if (result == CU_SUCCESS)
        *out = library;
    else if (!is_of_image(result))
        return qi_cuda_check(result, "cuLibraryLoadData", __FILE__, __LINE__);
    else if (qi_cuda.error_string(result, error) != CU_SUCCESS)
        *error = "no text for it";
    return QKV_OK;
}

qkv_status qi_cuda_find(void *library, const char *name, void **out)
{
    cu_kernel kernel = NULL;
    const int result = qi_cuda.library_kernel(&kernel, library, name);
    *out = kernel;
    if (result == CU_SUCCESS || result == CU_NOT_FOUND) return QKV_OK;
    return qi_cuda_check(result, "cuLibraryGetKernel", __FILE__, __LINE__);
}

i32 qi_cuda_most_clustered(const qi_cuda_device *device)
{
    /* Hopper and Blackwell of data centres have at most 8 groups, of pairs of multiprocessors: of more than 8 x 14 one
     * group has 16. Parts of such a GPU, and lesser ones, may have none. */
    const int is_large = device->major == 9 || device->major == 10;
    return is_large && device->num_sms > 8 * 14 ? 16 : device->major > 8 ? 8 : 1;
}

qkv_status qi_cuda_function(const qi_cuda_device *device, void *kernel, cu_function *out)
{
    int fixed = 0; /* what the kernel has without asking for more at launch */
    ON_DEVICE(device, qi_cuda.kernel_function(out, kernel));
    ON_DEVICE(device, qi_cuda.function_get(&fixed, CU_FUNCTION_SHARED_BYTES, *out));
    ON_DEVICE(device, qi_cuda.function_set(*out, CU_FUNCTION_MAX_DYNAMIC_SHARED_BYTES,
                                           device->shared_bytes - fixed));
    if (qi_cuda_most_clustered(device) > 8)
        ON_DEVICE(device, qi_cuda.function_set(*out, CU_FUNCTION_ANY_CLUSTER_SIZE, 1));
    return QKV_OK;
}

qkv_status qi_cuda_launch(const qi_cuda_device *device, cu_function function, const qi_grid *grid,
                          const void *params, void *stream)
{
    cu_launch_attribute attributes[2];
    u32 num_attributes = 0;
    if (grid->cluster > 1) {
        if (device->major < 9)
            QI_FAIL(QKV_ERR_UNSUPPORTED,
                    "launch: expected compute capability 9.0 or newer for clusters, got %d.%d",
                    device->major, device->minor);
        attributes[num_attributes++] = (cu_launch_attribute){
            .id = CU_LAUNCH_CLUSTER, .value = {.cluster = {grid->cluster, 1, 1}}};
    }
    if (grid->overlaps_before && device->major >= 9)
        attributes[num_attributes++] =
            (cu_launch_attribute){.id = CU_LAUNCH_PROGRAMMATIC, .value = {.flag = 1}};
    const cu_launch_config config = {
        .grid = {grid->x, grid->y ? grid->y : 1, grid->z ? grid->z : 1},
        .block = {grid->threads, 1, 1},
        .shared_bytes = grid->shared_bytes,
        .stream = stream,
        .attributes = attributes,
        .num_attributes = num_attributes,
    };
    void *arguments[] = {(void *)(uintptr_t)params}; /* read, though not declared so */
    ON_DEVICE(device, qi_cuda.launch(&config, function, arguments, NULL));
    return QKV_OK;
}

static int encode_maps(const qi_box_tensor *tensors, i32 count)
{
    static const u32 steps[5] = {1, 1, 1, 1, 1};
    int result = CU_SUCCESS;
    for (const qi_box_tensor *t = tensors; t < tensors + count && result == CU_SUCCESS; t++)
        result = qi_cuda.encode_tensor_map(t->map, t->element_bytes == 1 ? CU_MAP_U8 : CU_MAP_U16,
                                           t->axes, t->base, t->sizes, t->strides, t->box, steps, 0,
                                           CU_MAP_SWIZZLE_128B, CU_MAP_PROMOTE_128B, 0);
    return result;
}

qkv_status qi_cuda_tensor_maps(const qi_cuda_device *device, const qi_box_tensor *tensors,
                               i32 count)
{
    int result = CU_SUCCESS;
    ON_DEVICE(device, (result = encode_maps(tensors, count), CU_SUCCESS));
    return result == CU_SUCCESS
               ? QKV_OK
               : qi_cuda_check(result, "cuTensorMapEncodeTiled", __FILE__, __LINE__);
}

/* ---- streams ------------------------------------------------------------------------------ */

qkv_status qi_cuda_capturing(const qi_cuda_device *device, void *stream, int *capturing)
{
    ON_DEVICE(device, qi_cuda.stream_capturing(stream, capturing));
    *capturing = *capturing != CU_CAPTURE_NONE;
    return QKV_OK;
}

qkv_status qi_cuda_event_create(const qi_cuda_device *device, cu_event *out)
{
    ON_DEVICE(device, qi_cuda.event_create(out, CU_EVENT_NO_TIMING));
    return QKV_OK;
}

void qi_cuda_event_destroy(const qi_cuda_device *device, cu_event event)
{
    cu_context before;
    if (!event || qi_cuda_enter(device, &before) != CU_SUCCESS) return;
    qi_cuda.event_destroy(event);
    qi_cuda_leave(device, before);
}

qkv_status qi_cuda_event_record(const qi_cuda_device *device, cu_event event, void *stream)
{
    ON_DEVICE(device, qi_cuda.event_record(event, stream));
    return QKV_OK;
}

qkv_status qi_cuda_event_wait(const qi_cuda_device *device, cu_event event)
{
    ON_DEVICE(device, qi_cuda.event_synchronize(event));
    return QKV_OK;
}

qkv_status qi_cuda_copy(const qi_cuda_device *device, void *dst, const void *src, size_t bytes,
                        void *stream)
{
    ON_DEVICE(device, qi_cuda.copy_async(ptr_of(dst), ptr_of(src), bytes, stream));
    return QKV_OK;
}

qkv_status qi_cuda_zero(const qi_cuda_device *device, void *dst, size_t bytes, void *stream)
{
    ON_DEVICE(device, qi_cuda.memset_async(ptr_of(dst), 0, bytes, stream));
    return QKV_OK;
}

qkv_status qi_cuda_wait(const qi_cuda_device *device, void *stream)
{
    ON_DEVICE(device, qi_cuda.stream_synchronize(stream));
    return QKV_OK;
}
