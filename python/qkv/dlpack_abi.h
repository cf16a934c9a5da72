/* dlpack_abi.h - what DLPack 1.x adds to DLTensor: versioned tensors and the table of C functions by which a
 * framework lends and makes arrays. Written down here because <dlpack/dlpack.h> may be older (0.6 has
 * neither), under names of our own because it may be newer.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_PYTHON_DLPACK_ABI_H
#define QKV_PYTHON_DLPACK_ABI_H

#include <dlpack/dlpack.h>

#include <stdint.h>

typedef struct dlpack_version {
    uint32_t major, minor;
} dlpack_version;

/* In capsules named "dltensor_versioned". With another major version only deleter may be used. */
typedef struct managed_tensor {
    dlpack_version version;
    void *manager;
    void (*deleter)(struct managed_tensor *self); /* may be NULL */
    uint64_t flags;
    DLTensor tensor;
} managed_tensor;
enum { READ_ONLY = 1 }; /* of flags */

/* In the capsule "dlpack_exchange_api" of a type's attribute __dlpack_c_exchange_api__; lives as long as
 * the process. Functions return 0, or -1 with a Python exception; none of them waits for a stream. */
typedef struct exchange_api {
    dlpack_version version;
    struct exchange_api *older; /* with a smaller major version, or NULL */
    int (*allocate)(DLTensor *prototype, managed_tensor **out, void *user,
                    void (*set_error)(void *user, const char *kind, const char *message));
    int (*lend)(void *object, managed_tensor **out);   /* keeps the array alive */
    int (*import)(managed_tensor *tensor, void **out); /* takes the tensor over */
    int (*borrow)(void *object, DLTensor *out);        /* valid while the object is; may be NULL */
    int (*current_stream)(DLDeviceType type, int32_t id, void **out);
} exchange_api;

#endif
