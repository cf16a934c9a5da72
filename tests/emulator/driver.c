/* driver.c - the emulated CUDA driver, libcuda.so.1: one GPU with few multiprocessors, of
 * compute capability 9.0 or $QKV_EMULATOR_ARCH; work is done when it is asked for, by the calling
 * thread.
 * SPDX-License-Identifier: Apache-2.0 */
#include "driver.h"

#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct CUctx_st {
    int retained;
};

/* The first object is there from loading on; others when a cluster has a block of their rank. */
struct CUlib_st {
    void *objects[MAX_CLUSTER];
    const emulator_module *modules[MAX_CLUSTER];
    void *image;
    CUkernel kernels;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pid_t owner; /* the process that called cuInit */
static struct CUctx_st primary;
static CUresult failure; /* of a kernel: all that follows fails, too */
static _Thread_local CUcontext current;

CUresult driver_enter(void)
{
    if (owner != getpid()) return NOT_INITIALIZED;
    if (!current) return INVALID_CONTEXT;
    pthread_mutex_lock(&lock);
    if (failure == SUCCESS) return SUCCESS;
    pthread_mutex_unlock(&lock);
    return failure;
}

void driver_leave(void)
{
    pthread_mutex_unlock(&lock);
}

EXPORT const int emulator_is_here = 1; /* tests ask for it, to do less */

/* ---- the driver and the device ---------------------------------------------------------------- */

/* Compute capability, and what a multiprocessor has; it keeps 1 KB of shared memory for each block. */
typedef struct gpu {
    int arch, shared_bytes, threads, blocks;
} gpu;

enum { SHARED_RESERVED = 1 << 10 };

static const gpu *the_gpu(void)
{
    static const gpu gpus[] = {
        {90, 228 << 10, 2048, 32},  {75, 64 << 10, 1024, 16},  {80, 164 << 10, 2048, 32},
        {86, 100 << 10, 1536, 16},  {89, 100 << 10, 1536, 24}, {100, 228 << 10, 2048, 32},
        {120, 100 << 10, 1536, 24},
    };
    static const gpu *found;
    const char *arch = found ? NULL : getenv("QKV_EMULATOR_ARCH");
    if (!found && (!arch || !*arch)) found = &gpus[0];
    for (size_t i = 0; !found && i < sizeof gpus / sizeof gpus[0]; i++)
        if (gpus[i].arch == atoi(arch)) found = &gpus[i];
    return found;
}

/* Of a block. */
static int shared_optin(void)
{
    return the_gpu()->shared_bytes - SHARED_RESERVED;
}

static int num_multiprocessors(void)
{
    const char *text = getenv("QKV_EMULATOR_SMS");
    return text && atoi(text) > 0 ? atoi(text) : 4;
}

unsigned device_arch(void)
{
    return (unsigned)the_gpu()->arch;
}

EXPORT CUresult cuInit(unsigned flags)
{
    if (flags) return INVALID_VALUE;
    if (!the_gpu()) {
        fprintf(stderr, "emulator: QKV_EMULATOR_ARCH: no such GPU here\n");
        return INVALID_DEVICE;
    }
    if (owner && owner != getpid()) return NOT_INITIALIZED; /* a child of one that had called it */
    owner = getpid();
    return SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int *version)
{
    *version = 13000;
    return SUCCESS;
}

static const struct {
    int value;
    const char *name, *text;
} results[] = {
#define X(value, name, text) {value, "CUDA_ERROR_" #name, text},
    RESULTS(X)
#undef X
};

EXPORT CUresult cuGetErrorString(int result, const char **text)
{
    for (size_t i = 0; i < sizeof results / sizeof results[0]; i++)
        if (results[i].value == result) {
            *text = results[i].text;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

EXPORT CUresult cuGetErrorName(int result, const char **text)
{
    for (size_t i = 0; i < sizeof results / sizeof results[0]; i++)
        if (results[i].value == result) {
            *text = results[i].name;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

EXPORT CUresult cuDeviceGetCount(int *count)
{
    *count = 1;
    return owner == getpid() ? SUCCESS : NOT_INITIALIZED;
}

EXPORT CUresult cuDeviceGet(int *device, int ordinal)
{
    *device = 0;
    return owner != getpid() ? NOT_INITIALIZED : ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetName(char *name, int bytes, int device)
{
    if (device != 0) return INVALID_DEVICE;
    snprintf(name, (size_t)bytes, "emulated GPU");
    return SUCCESS;
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    *bytes = (size_t)16 << 30;
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, int device)
{
    const gpu *g = the_gpu();
    const struct {
        int attribute, value;
    } table[] = {
        {1, MAX_THREADS},    /* threads of a block */
        {2, MAX_THREADS},    /* in x */
        {3, MAX_THREADS},    /* in y */
        {4, 64},             /* in z */
        {5, 0x7fffffff},     /* blocks of a grid in x */
        {6, 65535},          /* in y */
        {7, 65535},          /* in z */
        {8, SHARED_DEFAULT}, /* shared memory of a block */
        {10, LANES},         /* warp size */
        {12, 65536},         /* registers of a block */
        {13, 1000000},       /* kHz */
        {16, num_multiprocessors()},
        {18, 1},                /* integrated */
        {19, 1},                /* maps host memory */
        {36, 1000000},          /* memory kHz */
        {37, 512},              /* memory bus bits */
        {38, 4 << 20},          /* L2 cache */
        {39, g->threads},       /* threads of a multiprocessor */
        {41, 1},                /* one address space */
        {75, g->arch / 10},     /* compute capability, major */
        {76, g->arch % 10},     /* and minor */
        {81, g->shared_bytes},  /* shared memory of a multiprocessor */
        {82, 65536},            /* registers of a multiprocessor */
        {83, 1},                /* managed memory */
        {88, 0},                /* pageable memory is not the GPU's */
        {95, 1},                /* cooperative launches */
        {97, shared_optin()},   /* shared memory of a block that asks for more */
        {106, g->blocks},       /* blocks of a multiprocessor */
        {111, SHARED_RESERVED}, /* shared memory reserved of a block */
        {120, g->arch >= 90},   /* clusters */
    };
    if (device != 0) return INVALID_DEVICE;
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (table[i].attribute == attribute) {
            *value = table[i].value;
            return SUCCESS;
        }
    fprintf(stderr, "emulator: device attribute %d is not in its table\n", attribute);
    return INVALID_VALUE;
}

/* ---- contexts --------------------------------------------------------------------------------- */

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, int device)
{
    if (owner != getpid()) return NOT_INITIALIZED;
    if (device != 0) return INVALID_DEVICE;
    pthread_mutex_lock(&lock);
    primary.retained++;
    pthread_mutex_unlock(&lock);
    *context = &primary;
    return SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(int device)
{
    if (owner != getpid()) return NOT_INITIALIZED;
    if (device != 0) return INVALID_DEVICE;
    pthread_mutex_lock(&lock);
    const bool held = primary.retained > 0;
    if (held) primary.retained--;
    pthread_mutex_unlock(&lock);
    return held ? SUCCESS : INVALID_CONTEXT;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context)
{
    if (owner != getpid()) return NOT_INITIALIZED;
    *context = current;
    return SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context)
{
    if (owner != getpid()) return NOT_INITIALIZED;
    if (context && (context != &primary || primary.retained == 0)) return INVALID_CONTEXT;
    current = context;
    return SUCCESS;
}

EXPORT CUresult cuCtxSynchronize(void)
{
    ENTER();
    LEAVE(stream_unsafe());
}

/* ---- kernels ---------------------------------------------------------------------------------- */

/* How long an image is: its section headers come last. */
static size_t image_bytes(const void *image)
{
    const Elf64_Ehdr *header = image;
    if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return 0;
    return header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
}

/* Opens it from a file of its own: the loader tells objects apart by their paths. */
static void *open_image(const void *image)
{
    const char *root = getenv("TMPDIR");
    const size_t bytes = image_bytes(image);
    char path[512];
    snprintf(path, sizeof path, "%.400s/emulator-XXXXXX", root && *root ? root : "/tmp");
    const int file = bytes ? mkstemp(path) : -1;
    if (file < 0) return NULL;
    const bool written = write(file, image, bytes) == (ssize_t)bytes;
    void *object = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
    close(file);
    unlink(path);
    return object;
}

static bool open_object(CUlibrary library, unsigned rank)
{
    void **object = &library->objects[rank];
    if (!*object) *object = open_image(library->image);
    if (*object) library->modules[rank] = dlsym(*object, "emulator_module_record");
    if (library->modules[rank]) return true;
    const char *error = dlerror();
    fprintf(stderr, "emulator: image: %s\n", error ? error : "not one of this emulator's");
    return false;
}

static CUresult load(CUlibrary *out, const void *image)
{
    CUlibrary library = calloc(1, sizeof *library);
    const size_t bytes = image_bytes(image);
    if (library) library->image = calloc(1, bytes + sizeof(Elf64_Ehdr));
    if (!library || !library->image) {
        free(library);
        return OUT_OF_MEMORY;
    }
    memcpy(library->image, image, bytes);
    if (open_object(library, 0)) {
        *out = library;
        return SUCCESS;
    }
    free(library->image);
    free(library);
    return INVALID_IMAGE;
}

EXPORT CUresult cuLibraryLoadData(CUlibrary *library, const void *image, void *jit_options,
                                  void **jit_values, unsigned num_jit, void *options, void **values,
                                  unsigned num_options)
{
    (void)jit_options, (void)jit_values, (void)num_jit;
    (void)options, (void)values, (void)num_options;
    if (owner != getpid()) return NOT_INITIALIZED;
    pthread_mutex_lock(&lock);
    const CUresult safe = stream_unsafe();
    LEAVE(safe == SUCCESS ? load(library, image) : safe);
}

EXPORT CUresult cuLibraryUnload(CUlibrary library)
{
    pthread_mutex_lock(&lock);
    for (CUkernel k = library->kernels, next; k; k = next) {
        next = k->next;
        free(k);
    }
    for (unsigned rank = 0; rank < MAX_CLUSTER && library->objects[rank]; rank++)
        dlclose(library->objects[rank]);
    free(library->image);
    free(library);
    LEAVE(SUCCESS);
}

static CUresult find_kernel(CUkernel *out, CUlibrary library, const char *name)
{
    for (CUkernel k = library->kernels; k; k = k->next)
        if (strcmp(k->name, name) == 0) {
            *out = k;
            return SUCCESS;
        }
    const emulator_kernel *kernel = dlsym(library->objects[0], name);
    if (!kernel) return NOT_FOUND;
    CUkernel k = calloc(1, sizeof *k);
    if (!k) return OUT_OF_MEMORY;
    *k = (struct CUkern_st){.library = library,
                            .kernel = kernel,
                            .max_shared_bytes = SHARED_DEFAULT,
                            .next = library->kernels};
    snprintf(k->name, sizeof k->name, "%s", name);
    library->kernels = k;
    *out = k;
    return SUCCESS;
}

EXPORT CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name)
{
    pthread_mutex_lock(&lock);
    LEAVE(find_kernel(kernel, library, name));
}

EXPORT CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel)
{
    ENTER();
    *function = kernel;
    LEAVE(kernel ? SUCCESS : INVALID_HANDLE);
}

static bool has_large_clusters(void)
{
    return device_arch() / 10 == 9 || device_arch() / 10 == 10;
}

static int fixed_shared_bytes(CUfunction f)
{
    const emulator_module *m = f->library->modules[0];
    return (int)(m->shared_end - m->shared_begin);
}

EXPORT CUresult cuFuncGetAttribute(int *value, int attribute, CUfunction f)
{
    ENTER();
    switch (attribute) {
    case 0: *value = (int)f->kernel->max_threads; break;
    case 1: *value = fixed_shared_bytes(f); break;
    case 2:                     /* constants */
    case 3: *value = 0; break;  /* local memory */
    case 4: *value = 64; break; /* registers */
    case 8: *value = (int)f->max_shared_bytes; break;
    default: LEAVE(INVALID_VALUE);
    }
    LEAVE(SUCCESS);
}

EXPORT CUresult cuFuncSetAttribute(CUfunction f, int attribute, int value)
{
    ENTER();
    if (attribute == 9) LEAVE(SUCCESS); /* carveout: a hint */
    if (attribute == 14 && has_large_clusters()) {
        f->any_cluster = value != 0;
        LEAVE(SUCCESS);
    }
    if (attribute != 8 || value < 0 || value + fixed_shared_bytes(f) > shared_optin())
        LEAVE(INVALID_VALUE);
    f->max_shared_bytes = (unsigned)value;
    LEAVE(SUCCESS);
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction f, int threads,
                                                            size_t shared_bytes)
{
    ENTER();
    if (threads < 1 || threads > MAX_THREADS) LEAVE(INVALID_VALUE);
    const gpu *g = the_gpu();
    const size_t shared = shared_bytes + (size_t)fixed_shared_bytes(f) + SHARED_RESERVED;
    const int by_threads = g->threads / threads;
    const int by_shared = (int)((size_t)g->shared_bytes / shared);
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    if (*blocks > g->blocks) *blocks = g->blocks;
    LEAVE(SUCCESS);
}

static CUresult check_launch(const CUlaunchConfig *c, CUfunction f)
{
    const uint64_t threads = (uint64_t)c->block.x * c->block.y * c->block.z;
    if (!f) return INVALID_HANDLE;
    if (c->grid.x == 0 || c->grid.x > 0x7fffffff || c->grid.y == 0 || c->grid.y > 65535 ||
        c->grid.z == 0 || c->grid.z > 65535 || threads == 0 || threads > MAX_THREADS ||
        c->block.z > 64 || c->shared_bytes > f->max_shared_bytes ||
        f->kernel->params_bytes > MAX_PARAMS)
        return INVALID_VALUE;
    return threads > f->kernel->max_threads ? LAUNCH_OUT_OF_RESOURCES : SUCCESS;
}

/* *blocks: of a cluster, 1 without one. Those along other axes than x are not emulated. */
static CUresult find_cluster(const CUlaunchConfig *c, CUfunction f, unsigned *blocks)
{
    enum { CLUSTER_DIMENSION = 4 };
    *blocks = 1;
    for (unsigned i = 0; i < c->num_attributes; i++) {
        const emulator_index size = c->attributes[i].value.cluster;
        if (c->attributes[i].id != CLUSTER_DIMENSION) continue;
        if (device_arch() < 90 || size.y != 1 || size.z != 1) return NOT_SUPPORTED;
        if (size.x == 0 || size.x > (f->any_cluster ? MAX_CLUSTER : PORTABLE_CLUSTER))
            return INVALID_CLUSTER_SIZE;
        if (c->grid.x % size.x) return INVALID_VALUE;
        *blocks = size.x;
    }
    return SUCCESS;
}

static CUresult launch_on(const CUlaunchConfig *c, CUfunction f, void **params)
{
    unsigned cluster;
    CUresult result = check_launch(c, f);
    if (result == SUCCESS) result = find_cluster(c, f, &cluster);
    if (result != SUCCESS) return result;
    for (unsigned rank = 0; rank < cluster; rank++)
        if (!open_object(f->library, rank)) return OUT_OF_MEMORY;
    return stream_do(c->stream, &(work){.kind = WORK_LAUNCH,
                                        .function = f,
                                        .grid = c->grid,
                                        .block = c->block,
                                        .shared_bytes = c->shared_bytes,
                                        .cluster = cluster,
                                        .params = params[0]});
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params,
                                 void **extra)
{
    ENTER();
    LEAVE(extra ? INVALID_VALUE : launch_on(config, function, params));
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                               unsigned grid_z, unsigned block_x, unsigned block_y,
                               unsigned block_z, unsigned shared_bytes, CUstream stream,
                               void **params, void **extra)
{
    const CUlaunchConfig config = {.grid = {grid_x, grid_y, grid_z},
                                   .block = {block_x, block_y, block_z},
                                   .shared_bytes = shared_bytes,
                                   .stream = stream};
    return cuLaunchKernelEx(&config, function, params, extra);
}

/* ---- work ------------------------------------------------------------------------------------- */

static void fill(const work *w)
{
    char *to = w->to;
    if (w->bytes == 0) return;
    memcpy(to, &w->value, w->size);
    for (size_t done = w->size, n; done < w->bytes; done += n) { /* twice as many each time */
        n = done < w->bytes - done ? done : w->bytes - done;
        memcpy(to + done, to, n);
    }
}

/* Every word of the parameters that is an address is taken for a pointer, but for what looks like a small number beside
 * padding. */
static bool check_pointers(const CUfunction f, const char *params)
{
    for (size_t at = 0; at + sizeof(uintptr_t) <= f->kernel->params_bytes;
         at += sizeof(uintptr_t)) {
        uintptr_t word;
        memcpy(&word, params + at, sizeof word);
        if ((uint32_t)word < 1 << 16 || !memory_is_unshared((const void *)word)) continue;
        fprintf(
            stderr,
            "emulator: kernel %s: byte %zu of its parameters is %#zx, memory of the host's that "
            "the GPU was not given\n",
            f->name, at, (size_t)word);
        return false;
    }
    return true;
}

static bool run_kernel(const work *w)
{
    const CUfunction f = w->function;
    if (!check_pointers(f, w->params)) return false;
    grid_launch launch = {.name = f->name,
                          .grid = w->grid,
                          .block = w->block,
                          .cluster = w->cluster,
                          .shared_bytes = w->shared_bytes,
                          .params = w->params};
    for (unsigned rank = 0; rank < w->cluster; rank++)
        launch.copies[rank] = (grid_copy){.kernel = dlsym(f->library->objects[rank], f->name),
                                          .module = f->library->modules[rank]};
    return grid_run(&launch);
}

CUresult driver_do(const work *w)
{
    bool done = true;
    memory_open();
    if (w->kind == WORK_COPY)
        memmove(w->to, w->from, w->bytes);
    else if (w->kind == WORK_FILL)
        fill(w);
    else
        done = run_kernel(w);
    memory_close();
    if (!done) failure = LAUNCH_FAILED;
    return failure;
}

/* ---- symbols ---------------------------------------------------------------------------------- */

/* The newest version's of a name that this library has: callers ask for none that is older. */
EXPORT CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version,
                                    uint64_t flags, int *status)
{
    static const char *const suffixes[] = {"_v2", ""};
    (void)version, (void)flags;
    Dl_info self;
    char name[128];
    *function = NULL;
    if (dladdr((void *)(uintptr_t)&cuGetProcAddress_v2, &self) != 0) {
        void *library = dlopen(self.dli_fname, RTLD_NOW | RTLD_LOCAL);
        for (size_t i = 0; library && !*function && i < sizeof suffixes / sizeof suffixes[0]; i++) {
            snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
            *function = dlsym(library, name);
        }
        if (library) dlclose(library);
    }
    if (status) *status = *function ? 0 : 1; /* found, or not */
    return *function ? SUCCESS : NOT_FOUND;
}
