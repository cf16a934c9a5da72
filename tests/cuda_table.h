/* cuda_table.h - the driver's table (device/cuda_api.h) with functions of the test's in front of it: each
 * call is counted, and the n-th of one entry fails at will without reaching the driver. For one file of a
 * test; one thread's calls at a time.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_CUDA_TABLE_H
#define QKV_TESTS_CUDA_TABLE_H

#include <stdatomic.h>

#include "cuda_ops.h"
#include "device/cuda_api.h"

/* Of every entry. */
enum {
#define X(name, symbol, version, args) TABLE_##name,
    QI_CUDA_API(X)
#undef X
        TABLE_COUNT
};

static const char *const table_names[] = {/* the driver's */
#define X(name, symbol, version, args) symbol,
                                          QI_CUDA_API(X)
#undef X
};

static qi_cuda_api table_driver; /* what stood there */
static int table_calls[TABLE_COUNT];
static atomic_long
    *table_allocs; /* NULL, or a count of allocations that the driver's own leave as it is */

/* What fails: calls [skip, skip + times) of an entry, from table_fail() on, by this result. */
enum { TABLE_NONE = -1, TABLE_ANY = TABLE_COUNT };
static struct {
    int entry, skip, times, result;
    bool hit; /* has one failed? */
} table_fault = {.entry = TABLE_NONE};

static inline int table_enter(int entry)
{
    table_calls[entry]++;
    const bool any = table_fault.entry == TABLE_ANY && entry != TABLE_error_string;
    if ((entry != table_fault.entry && !any) || table_fault.skip-- > 0 || table_fault.times <= 0)
        return CU_SUCCESS;
    table_fault.times--;
    table_fault.hit = true;
    return table_fault.result;
}

static inline void table_fail(int entry, int skip, int times, int result)
{
    table_fault.entry = entry;
    table_fault.skip = skip;
    table_fault.times = times;
    table_fault.result = result;
    table_fault.hit = false;
}

/* Nothing fails any more. Has anything? */
static inline bool table_heal(void)
{
    table_fault.entry = TABLE_NONE;
    return table_fault.hit;
}

#define COUNTED(name, params, args)                                                                \
    static int counted_##name params                                                               \
    {                                                                                              \
        int result = table_enter(TABLE_##name);                                                    \
        const long allocs = table_allocs ? *table_allocs : 0;                                      \
        if (result == CU_SUCCESS) result = table_driver.name args;                                 \
        if (table_allocs) *table_allocs = allocs;                                                  \
        return result;                                                                             \
    }
COUNTED(init, (unsigned a), (a))
COUNTED(driver_version, (int *a), (a))
COUNTED(error_string, (int a, const char **b), (a, b))
COUNTED(device_count, (int *a), (a))
COUNTED(device_get, (int *a, int b), (a, b))
COUNTED(device_name, (char *a, int b, int c), (a, b, c))
COUNTED(device_attribute, (int *a, int b, int c), (a, b, c))
COUNTED(primary_retain, (cu_context * a, int b), (a, b))
COUNTED(primary_release, (int a), (a))
COUNTED(context_current, (cu_context * a), (a))
COUNTED(context_set, (cu_context a), (a))
COUNTED(library_load,
        (cu_library * a, const void *b, void *c, void **d, unsigned e, void *f, void **g,
         unsigned h),
        (a, b, c, d, e, f, g, h))
COUNTED(library_unload, (cu_library a), (a))
COUNTED(library_kernel, (cu_kernel * a, cu_library b, const char *c), (a, b, c))
COUNTED(kernel_function, (cu_function * a, cu_kernel b), (a, b))
COUNTED(function_get, (int *a, int b, cu_function c), (a, b, c))
COUNTED(function_set, (cu_function a, int b, int c), (a, b, c))
COUNTED(occupancy, (int *a, cu_function b, int c, size_t d), (a, b, c, d))
COUNTED(launch, (const cu_launch_config *a, cu_function b, void **c, void **d), (a, b, c, d))
COUNTED(memory_alloc, (cu_ptr * a, size_t b), (a, b))
COUNTED(memory_free, (cu_ptr a), (a))
COUNTED(host_alloc, (void **a, size_t b, unsigned c), (a, b, c))
COUNTED(host_free, (void *a), (a))
COUNTED(copy_async, (cu_ptr a, cu_ptr b, size_t c, cu_stream d), (a, b, c, d))
COUNTED(memset_async, (cu_ptr a, unsigned char b, size_t c, cu_stream d), (a, b, c, d))
COUNTED(stream_synchronize, (cu_stream a), (a))
COUNTED(stream_capturing, (cu_stream a, int *b), (a, b))
COUNTED(capture_mode, (int *a), (a))
COUNTED(event_create, (cu_event * a, unsigned b), (a, b))
COUNTED(event_destroy, (cu_event a), (a))
COUNTED(event_record, (cu_event a, cu_stream b), (a, b))
COUNTED(event_synchronize, (cu_event a), (a))
COUNTED(encode_tensor_map,
        (void *a, int b, u32 c, void *d, const u64 *e, const u64 *f, const u32 *g, const u32 *h,
         int i, int j, int k, int l),
        (a, b, c, d, e, f, g, h, i, j, k, l))

/* From here on calls are counted. An entry without a function above does not compile: it is not used. */
static inline void table_interpose(void)
{
    EXPECT_OK(qi_cuda_load());
    table_driver = qi_cuda;
#define X(name, symbol, version, args) qi_cuda.name = counted_##name;
    QI_CUDA_API(X)
#undef X
}

static inline void table_zero(void)
{
    memset(table_calls, 0, sizeof table_calls);
}

/* Fails unless only these entries were called: a list that ends with -1. */
static inline void table_expect_only(const char *what, const int *allowed)
{
    for (int i = 0; i < TABLE_COUNT; i++) {
        const int *a = allowed;
        while (*a >= 0 && *a != i) a++;
        if (*a < 0 && table_calls[i]) fail_msg("%s: calls %s of the driver", what, table_names[i]);
    }
}

#endif
