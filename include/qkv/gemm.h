/* gemm.h - matrix products with row-major weights, as linear layers store them.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_GEMM_H
#define QKV_GEMM_H

#include "qkv/context.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * qkv_gemm - out[m, n] = sum_k x[m, k] * w[n, k].
 *
 *   out  [m, n]  f32|f16|bf16; must not overlap x, w or, by its strides, itself
 *   x    [m, k]  f32|f16|bf16
 *   w    [n, k]  f32|f16|bf16
 *
 * Products and sums in f32 (f16 and bf16 inputs are exact in f32), rounded once to out's dtype. k =
 * 0 gives zeros. On the CPU, and on a GPU with batch_invariant in the context's options, a row of out
 * depends on its row of x alone, not on m: the same bits for a token whatever it is batched with.
 *
 * On a GPU cuBLASLt multiplies where it is at hand and takes the dtypes and strides, else kernels of this
 * library. It is asked for an algorithm at the first call of a size and layout; calls after that allocate
 * nothing and may be captured, and so may the first one. Some algorithms work in memory that the context
 * allocates for each stream, 32 MB, when one is first needed; a graph keeps that of the stream it was
 * captured on, so two graphs captured on one stream must not run at the same time.
 *
 * Allocates nothing else; CPU scratch belongs to the context. Errors: INVALID (shape, dtype, overlap);
 * DEVICE.
 */
QKV_API qkv_status qkv_gemm(qkv_context *ctx, DLTensor *out, const DLTensor *x, const DLTensor *w,
                            void *stream);

/* How weights are packed, in blocks of 32 along a row, as GGUF files hold them. d and min: f16. */
typedef enum qkv_weight_format {
    QKV_WEIGHT_Q8_0 = 0, /* 34 bytes: d, codes of i8.              w = d * code */
    QKV_WEIGHT_Q4_0 = 1, /* 18 bytes: d, codes of 4 bits.          w = d * (code - 8) */
    QKV_WEIGHT_Q4_1 = 2  /* 20 bytes: d, min, codes of 4 bits.     w = d * code + min
                            4-bit codes: byte i holds code i below and code i + 16 above */
} qkv_weight_format;

/*
 * qkv_gemm_quantized - out[m, n] = sum_k x[m, k] * w[n, k], w packed and multiplied as it is.
 *
 *   out     [m, n]  f32|f16|bf16; must not overlap x, w or, by its strides, itself
 *   x       [m, k]  f32|f16|bf16; k a multiple of 32
 *   w       [n, k / 32 * block bytes]  u8; rows may lie any number of bytes apart, at any address
 *   format  of w
 *
 * x is not quantised: it counts with the precision of f32 or, where the CPU multiplies integers
 * faster, of 24 bits below the largest of each 32 elements. Each block gives d * sum(code * x), and for
 * 4 bits + min * sum(x), where min of Q4_0 is -8 d; sums in f32, rounded once to out's dtype. An x that
 * is not finite makes no element of its row of out finite. k = 0 gives zeros. A row of out depends on
 * its row of x alone, not on m: the same bits for a token whatever it is batched with. Allocates
 * nothing; CPU scratch belongs to the context.
 *
 * Errors: INVALID (format, shape, dtype, overlap). Source: the GGUF specification and ggml's blocks
 * of these names (ggml-common.h).
 */
QKV_API qkv_status qkv_gemm_quantized(qkv_context *ctx, DLTensor *out, const DLTensor *x,
                                      const DLTensor *w, qkv_weight_format format, void *stream);

#ifdef __cplusplus
}
#endif
#endif
