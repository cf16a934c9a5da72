/* data.h - memory, random inputs and tensors for benches.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_DATA_H
#define QKV_TOOLS_DATA_H

#include "qkv/base.h"

/* How much memory inputs must rotate over to come from DRAM each time: a quarter more than the
 * last-level cache, 600 MB to 4 GB, and at most a quarter of what is free. */
size_t data_rotation_bytes(void);

/* Zeroed pages, huge ones where the system has them. Dies if the machine has not that much free.
 * count as a double: products of sizes do not overflow before they are checked. */
void *data_alloc(double count, size_t size);
void data_free(void *p);

/* ---- random numbers: a 64-bit counter, hashed ---------------------------------------------- */

typedef struct data_random {
    uint64_t state;
} data_random;

data_random data_seed(void); /* a fresh one */
uint64_t data_u64(data_random *r);
int64_t data_below(data_random *r, int64_t n); /* [0, n) */
void data_shuffle(data_random *r, int32_t *x, int64_t n);

/* Elements of a dtype, uniform in [-scale, scale). */
void data_fill(data_random *r, void *p, DLDataType dtype, int64_t n, double scale);

/* Normal, mean 0. */
void data_fill_normal(data_random *r, void *p, DLDataType dtype, int64_t n, double spread);

/* NaN in every element: what a kernel must overwrite. */
void data_poison(void *p, DLDataType dtype, int64_t n);

double data_get(const void *p, DLDataType dtype, int64_t i);
double data_eps(DLDataType dtype); /* relative error of rounding to it */

/* Bytes of n elements. */
static inline size_t data_bytes(DLDataType dtype, int64_t n)
{
    return dtype.bits / 8u * (size_t)n;
}

/* ---- tensors ------------------------------------------------------------------------------- */

/* A contiguous tensor with its shape beside it; t.shape points into it, so it must not be
 * copied. */
typedef struct data_tensor {
    DLTensor t;
    int64_t shape[5];
} data_tensor;

/* DATA_TENSOR(&x, p, QKV_F32, 2, 3): x over memory p as [2, 3]. */
void data_tensor_init(data_tensor *x, void *p, DLDataType dtype, int ndim, const int64_t *shape);
#define DATA_TENSOR(x, p, dtype, ...)                                                              \
    data_tensor_init((x), (p), (dtype), (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), \
                     (const int64_t[]){__VA_ARGS__})

#endif
