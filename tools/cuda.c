/* cuda.c - see cuda.h. No header of CUDA is needed: handles are pointers, and what a versioned symbol of
 * the driver takes does not change.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

typedef uint64_t address;

/* name here, symbol, version of its ABI, arguments */
#define DRIVER(X)                                                                                  \
    X(init, "cuInit", 2000, (unsigned flags))                                                      \
    X(driver_version, "cuDriverGetVersion", 2020, (int *version))                                  \
    X(error_string, "cuGetErrorString", 6000, (int result, const char **text))                     \
    X(device_get, "cuDeviceGet", 2000, (int *device, int ordinal))                                 \
    X(device_name, "cuDeviceGetName", 2000, (char *name, int bytes, int device))                   \
    X(device_attribute, "cuDeviceGetAttribute", 2000, (int *value, int attribute, int device))     \
    X(primary_retain, "cuDevicePrimaryCtxRetain", 7000, (void **context, int device))              \
    X(primary_release, "cuDevicePrimaryCtxRelease", 11000, (int device))                           \
    X(context_set, "cuCtxSetCurrent", 4000, (void *context))                                       \
    X(memory_info, "cuMemGetInfo", 3020, (size_t * free_bytes, size_t * all_bytes))                \
    X(memory_alloc, "cuMemAlloc", 3020, (address * p, size_t bytes))                               \
    X(memory_free, "cuMemFree", 3020, (address p))                                                 \
    X(copy, "cuMemcpyAsync", 4000, (address to, address from, size_t bytes, void *stream))         \
    X(set, "cuMemsetD8Async", 3020, (address to, unsigned char byte, size_t bytes, void *stream))  \
    X(stream_create, "cuStreamCreate", 2000, (void **stream, unsigned flags))                      \
    X(stream_destroy, "cuStreamDestroy", 4000, (void *stream))                                     \
    X(stream_synchronize, "cuStreamSynchronize", 2000, (void *stream))                             \
    X(capture, "cuStreamBeginCapture", 10010, (void *stream, int mode))                            \
    X(captured, "cuStreamEndCapture", 10000, (void *stream, void **graph))                         \
    X(graph_instantiate, "cuGraphInstantiateWithFlags", 11040,                                     \
      (void **executable, void *graph, uint64_t flags))                                            \
    X(graph_destroy, "cuGraphDestroy", 10000, (void *graph))                                       \
    X(graph_launch, "cuGraphLaunch", 10000, (void *executable, void *stream))                      \
    X(executable_destroy, "cuGraphExecDestroy", 10000, (void *executable))                         \
    X(event_create, "cuEventCreate", 2000, (void **event, unsigned flags))                         \
    X(event_destroy, "cuEventDestroy", 4000, (void *event))                                        \
    X(event_record, "cuEventRecord", 2000, (void *event, void *stream))                            \
    X(event_synchronize, "cuEventSynchronize", 2000, (void *event))                                \
    X(event_elapsed, "cuEventElapsedTime", 2000, (float *ms, void *start, void *end))              \
    X(library_load, "cuLibraryLoadData", 12000,                                                    \
      (void **library, const void *image, void *jit_options, void **jit_values, unsigned num_jit,  \
       void *options, void **values, unsigned num_options))                                        \
    X(library_kernel, "cuLibraryGetKernel", 12000,                                                 \
      (void **kernel, void *library, const char *name))                                            \
    X(kernel_function, "cuKernelGetFunction", 12000, (void **function, void *kernel))              \
    X(launch, "cuLaunchKernel", 4000,                                                              \
      (void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,        \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream, void **arguments,  \
       void **extra))

static struct {
#define X(name, symbol, version, args) int(*name) args;
    DRIVER(X)
#undef X
} driver;

struct cuda {
    int device, version, num_sms, l2_bytes;
    char name[96];
    void *context, *stream, *marks[CUDA_MARKS];
};

enum { NUM_SMS = 16, L2_BYTES = 38 }; /* attributes of a device */
enum { NON_BLOCKING = 1 };            /* of a stream */
enum { CAPTURE_THIS_THREAD = 1 };

static void check(int result, const char *call)
{
    const char *text = NULL;
    if (result == 0) return;
    if (driver.error_string(result, &text) != 0 || !text) text = "no text for it";
    tool_die(EXIT_WRONG, "CUDA driver: %.*s: error %d, %s", (int)strcspn(call, "("), call, result,
             text);
}
#define CHECK(call) check(driver.call, #call)

static void load_driver(void)
{
    typedef int (*get_address)(const char *symbol, void **function, int version, uint64_t flags,
                               int *status);
    static const struct {
        const char *name;
        int version;
    } symbols[] = {
#define X(name, symbol, version, args) {symbol, version},
        DRIVER(X)
#undef X
    };
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) tool_die(EXIT_WRONG, "--device: expected NVIDIA's driver: %s", dlerror());
    void *found = dlsym(library, "cuGetProcAddress_v2");
    get_address get;
    memcpy(&get, &found, sizeof get); /* C has no cast for this */
    if (!get) tool_die(EXIT_WRONG, "--device: expected a driver of CUDA 12 or newer");
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *function = NULL;
        int status;
        if (get(symbols[i].name, &function, symbols[i].version, 0, &status) != 0 || !function)
            tool_die(EXIT_WRONG, "--device: the CUDA driver has no %s", symbols[i].name);
        memcpy((char *)&driver + i * sizeof function, &function, sizeof function);
    }
}

cuda *cuda_open(int ordinal)
{
    load_driver();
    cuda *c = calloc(1, sizeof *c);
    if (!c) tool_die(EXIT_WRONG, "out of memory");
    CHECK(init(0));
    CHECK(driver_version(&c->version));
    CHECK(device_get(&c->device, ordinal));
    CHECK(device_name(c->name, sizeof c->name, c->device));
    CHECK(device_attribute(&c->num_sms, NUM_SMS, c->device));
    CHECK(device_attribute(&c->l2_bytes, L2_BYTES, c->device));
    CHECK(primary_retain(&c->context, c->device));
    CHECK(context_set(c->context));
    CHECK(stream_create(&c->stream, NON_BLOCKING));
    for (int i = 0; i < CUDA_MARKS; i++) CHECK(event_create(&c->marks[i], 0));
    return c;
}

void cuda_close(cuda *c)
{
    if (!c) return;
    for (int i = 0; i < CUDA_MARKS; i++) CHECK(event_destroy(c->marks[i]));
    CHECK(stream_destroy(c->stream));
    CHECK(context_set(NULL));
    CHECK(primary_release(c->device));
    free(c);
}

const char *cuda_name(const cuda *c)
{
    return c->name;
}

int cuda_driver(const cuda *c)
{
    return c->version;
}

int cuda_num_sms(const cuda *c)
{
    return c->num_sms;
}

size_t cuda_l2_bytes(const cuda *c)
{
    return (size_t)c->l2_bytes;
}

size_t cuda_free_bytes(const cuda *c)
{
    (void)c;
    size_t free_bytes, all_bytes;
    CHECK(memory_info(&free_bytes, &all_bytes));
    return free_bytes;
}

void *cuda_stream(const cuda *c)
{
    return c->stream;
}

/* ---- memory -------------------------------------------------------------------------------- */

static address address_of(const void *p)
{
    return (address)(uintptr_t)p;
}

void *cuda_alloc(cuda *c, double bytes)
{
    const double room = 0.95 * (double)cuda_free_bytes(c);
    address p = 0;
    void *memory;
    if (bytes > room)
        tool_die(EXIT_WRONG, "the problem needs %.1f GB more memory on the GPU, %.1f GB are free",
                 bytes * 1e-9, room * 1e-9);
    CHECK(memory_alloc(&p, bytes < 1 ? 1 : (size_t)bytes));
    memcpy(&memory, &p, sizeof memory);
    return memory;
}

void cuda_free(cuda *c, void *p)
{
    (void)c;
    if (p) CHECK(memory_free(address_of(p)));
}

void cuda_copy(cuda *c, void *to, const void *from, size_t bytes)
{
    if (bytes == 0) return;
    CHECK(copy(address_of(to), address_of(from), bytes, c->stream));
    cuda_wait(c);
}

void cuda_set(cuda *c, void *to, unsigned char byte, size_t bytes)
{
    if (bytes) CHECK(set(address_of(to), byte, bytes, c->stream));
}

void cuda_repeat(cuda *c, void *p, size_t first_bytes, size_t bytes)
{
    for (size_t done = first_bytes; done < bytes; done *= 2) {
        const size_t part = done < bytes - done ? done : bytes - done;
        CHECK(copy(address_of(p) + done, address_of(p), part, c->stream));
    }
}

void cuda_wait(cuda *c)
{
    CHECK(stream_synchronize(c->stream));
}

/* ---- time ---------------------------------------------------------------------------------- */

void cuda_capture(cuda *c)
{
    CHECK(capture(c->stream, CAPTURE_THIS_THREAD));
}

cuda_graph *cuda_captured(cuda *c)
{
    void *graph, *executable;
    CHECK(captured(c->stream, &graph));
    CHECK(graph_instantiate(&executable, graph, 0));
    CHECK(graph_destroy(graph));
    return executable;
}

void cuda_graph_free(cuda *c, cuda_graph *graph)
{
    (void)c;
    CHECK(executable_destroy(graph));
}

void cuda_replay(cuda *c, cuda_graph *graph)
{
    CHECK(graph_launch(graph, c->stream));
}

void cuda_mark(cuda *c, int i)
{
    CHECK(event_record(c->marks[i], c->stream));
}

double cuda_between(cuda *c, int first, int last)
{
    float ms = 0;
    CHECK(event_synchronize(c->marks[last]));
    CHECK(event_elapsed(&ms, c->marks[first], c->marks[last]));
    return (double)ms * 1e-3;
}

/* ---- kernels ------------------------------------------------------------------------------- */

cuda_kernel *cuda_load(cuda *c, const char *ptx, const char *name)
{
    (void)c;
    void *library, *kernel, *function;
    if (driver.library_load(&library, ptx, NULL, NULL, 0, NULL, NULL, 0) != 0) return NULL;
    CHECK(library_kernel(&kernel, library, name));
    CHECK(kernel_function(&function, kernel));
    return function;
}

void cuda_launch(cuda *c, cuda_kernel *kernel, unsigned grid, unsigned block, void **arguments)
{
    CHECK(launch(kernel, grid, 1, 1, block, 1, 1, 0, c->stream, arguments, NULL));
}
