/* cublaslt_api.h - cuBLASLt, opened at run time: what of it the library uses, in one table.
 *
 * No header of CUDA is needed to build: objects are opaque pointers made by the library itself, and the
 * numbers and the one struct below are its ABI, the same in versions 12 and 13.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_DEVICE_CUBLASLT_API_H
#define QI_DEVICE_CUBLASLT_API_H

#include <stddef.h>

#include "device/cuda_api.h"

typedef struct lt_handle *lt_handle;
typedef struct lt_operation *lt_operation;   /* cublasLtMatmulDesc_t */
typedef struct lt_layout *lt_layout;         /* cublasLtMatrixLayout_t */
typedef struct lt_preference *lt_preference; /* cublasLtMatmulPreference_t */

enum { LT_SUCCESS = 0, LT_ALLOC_FAILED = 3 };
enum { LT_F32 = 0, LT_F16 = 2, LT_BF16 = 14 };                   /* cudaDataType_t */
enum { LT_COMPUTE_F32 = 68 };                                    /* cublasComputeType_t */
enum { LT_TRANSPOSED = 1 };                                      /* cublasOperation_t */
enum { LT_OPERATION_TRANSPOSE_A = 3 };                           /* of an operation */
enum { LT_TYPE = 0, LT_ROWS = 2, LT_COLUMNS = 3, LT_PITCH = 4 }; /* of a layout */
enum {                                                           /* of a preference */
       LT_MAX_WORKSPACE = 1,
       LT_REDUCTIONS = 3,
       LT_ALIGNMENT_A = 5,
       LT_ALIGNMENT_B = 6,
       LT_ALIGNMENT_C = 7,
       LT_ALIGNMENT_D = 8
};
enum { LT_REDUCTION_COMPUTE_TYPE = 2 }; /* parts of a sum meet in f32 */

typedef struct lt_algorithm {
    u64 data[8];
} lt_algorithm;

/* What the heuristic answers: cublasLtMatmulHeuristicResult_t. */
typedef struct lt_choice {
    lt_algorithm algorithm;
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
} lt_choice;

/* name in the table, symbol, result, arguments. Matrices are column-major: d = a b, with a transposed. */
#define QI_CUBLASLT_API(X)                                                                         \
    X(version, "cublasLtGetVersion", size_t, (void))                                               \
    X(create, "cublasLtCreate", int, (lt_handle * handle))                                         \
    X(destroy, "cublasLtDestroy", int, (lt_handle handle))                                         \
    X(operation_create, "cublasLtMatmulDescCreate", int,                                           \
      (lt_operation * operation, int compute_type, int scale_type))                                \
    X(operation_destroy, "cublasLtMatmulDescDestroy", int, (lt_operation operation))               \
    X(operation_set, "cublasLtMatmulDescSetAttribute", int,                                        \
      (lt_operation operation, int attribute, const void *value, size_t bytes))                    \
    X(layout_create, "cublasLtMatrixLayoutCreate", int,                                            \
      (lt_layout * layout, int type, u64 rows, u64 columns, i64 pitch))                            \
    X(layout_destroy, "cublasLtMatrixLayoutDestroy", int, (lt_layout layout))                      \
    X(layout_set, "cublasLtMatrixLayoutSetAttribute", int,                                         \
      (lt_layout layout, int attribute, const void *value, size_t bytes))                          \
    X(preference_create, "cublasLtMatmulPreferenceCreate", int, (lt_preference * preference))      \
    X(preference_destroy, "cublasLtMatmulPreferenceDestroy", int, (lt_preference preference))      \
    X(preference_set, "cublasLtMatmulPreferenceSetAttribute", int,                                 \
      (lt_preference preference, int attribute, const void *value, size_t bytes))                  \
    X(choose, "cublasLtMatmulAlgoGetHeuristic", int,                                               \
      (lt_handle handle, lt_operation operation, lt_layout a, lt_layout b, lt_layout c,            \
       lt_layout d, lt_preference preference, int wanted, lt_choice *choices, int *count))         \
    X(multiply, "cublasLtMatmul", int,                                                             \
      (lt_handle handle, lt_operation operation, const void *alpha, const void *a, lt_layout of_a, \
       const void *b, lt_layout of_b, const void *beta, const void *c, lt_layout of_c, void *d,    \
       lt_layout of_d, const lt_algorithm *algorithm, void *workspace, size_t workspace_bytes,     \
       cu_stream stream))

typedef struct qi_cublaslt_api {
#define X(name, symbol, result, args) result(*name) args;
    QI_CUBLASLT_API(X)
#undef X
} qi_cublaslt_api;

/* The library for a driver (1000 major + 10 minor): of its major version, else of an older one that it
 * runs too. NULL: there is none of version 12 or newer. The first call looks for it. */
const qi_cublaslt_api *qi_cublaslt_find(int driver);

#endif
