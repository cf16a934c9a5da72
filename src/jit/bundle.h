/* bundle.h - kernel sources inside the library: what the JIT compiles. bundle.c has the assembler
 * include the files as they are.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_JIT_BUNDLE_H
#define QI_JIT_BUNDLE_H

#include <stddef.h>

#include <dlpack/dlpack.h>

/* Identifier and path below src/ of each file, for both kinds of device, the CPU, and CUDA;
 * CMakeLists.txt makes bundle.c depend on them. */
#define QI_BUNDLE_SHARED(X)                                                                        \
    X(abi, "kern/abi.h")                                                                           \
    X(plan, "kern/plan.h")                                                                         \
    X(rope, "kern/rope.h")                                                                         \
    X(scale, "kern/scale.h")                                                                       \
    X(variant, "kern/variant.h")                                                                   \
    X(attention_params, "ops/attention/attention_params.h")                                        \
    X(sampling_params, "ops/sampling/sampling_params.h")

#define QI_BUNDLE_CPU(X)                                                                           \
    X(rope_turns, "kern/rope_turns.h")                                                             \
    X(prelude, "kern/cpu/prelude.h")                                                               \
    X(amx, "kern/cpu/amx.h")                                                                       \
    X(e4m3, "kern/cpu/e4m3.h")                                                                     \
    X(simd, "kern/cpu/simd.h")                                                                     \
    X(tile, "kern/cpu/tile.h")                                                                     \
    X(cpu_rope, "kern/cpu/rope.h")                                                                 \
    X(attention_tile, "ops/attention/attention_tile.h")                                            \
    X(decode_tile, "ops/attention/decode_tile.h")                                                  \
    X(hooks, "ops/attention/hooks.cpu.h")                                                          \
    X(prefill_tile, "ops/attention/prefill_tile.h")                                                \
    X(attention, "ops/attention/attention.cpu.c")                                                  \
    X(user_stage, "ops/sampling/user_stage.cpu.c")

#define QI_BUNDLE_CUDA(X)                                                                          \
    X(tensor_map, "kern/tensor_map.h")                                                             \
    X(kv_view, "kern/kv_view.h")                                                                   \
    X(cuda_ptx, "kern/cuda/ptx.cuh")                                                               \
    X(cuda_cluster, "kern/cuda/cluster.cuh")                                                       \
    X(cuda_tma, "kern/cuda/tma.cuh")                                                               \
    X(cuda_mma_sm90, "kern/cuda/mma_sm90.cuh")                                                     \
    X(cuda_prelude, "kern/cuda/prelude.cuh")                                                       \
    X(cuda_rope, "kern/cuda/rope.cuh")                                                             \
    X(rmsnorm_params, "ops/norm/rmsnorm_params.h")                                                 \
    X(rmsnorm, "ops/norm/rmsnorm.cu")                                                              \
    X(gated_params, "ops/activation/gated_params.h")                                               \
    X(gated, "ops/activation/gated.cu")                                                            \
    X(rope_params, "ops/rope/rope_params.h")                                                       \
    X(rope_kernel, "ops/rope/rope.cu")                                                             \
    X(append_params, "ops/page/append_params.h")                                                   \
    X(append, "ops/page/append.cu")                                                                \
    X(copy_pages_params, "ops/page/copy_pages_params.h")                                           \
    X(copy_pages, "ops/page/copy_pages.cu")                                                        \
    X(merge_params, "ops/attention/merge_params.h")                                                \
    X(merge, "ops/attention/merge.cu")                                                             \
    X(cuda_hooks, "ops/attention/hooks.cuh")                                                       \
    X(cuda_rows, "ops/attention/rows.cuh")                                                         \
    X(cuda_merge_rows, "ops/attention/merge_rows.cuh")                                             \
    X(mma_types, "ops/attention/mma_types.cuh")                                                    \
    X(mma_params, "ops/attention/mma_params.h")                                                    \
    X(decode_stream, "ops/attention/decode_stream.cuh")                                            \
    X(decode_loads, "ops/attention/decode_loads.cuh")                                              \
    X(prefill_notes, "ops/attention/prefill_notes.cuh")                                            \
    X(decode_ahead, "ops/attention/decode_ahead.cuh")                                              \
    X(decode_mma, "ops/attention/decode_mma.cuh")                                                  \
    X(attention_mma, "ops/attention/attention_mma.cu")                                             \
    X(cuda_attention, "ops/attention/attention.cu")                                                \
    X(lanes, "ops/attention/lanes.h")                                                              \
    X(schedule_h, "ops/attention/schedule.h")                                                      \
    X(tiles_h, "ops/attention/tiles.h")                                                            \
    X(strips_h, "ops/attention/strips.h")                                                          \
    X(schedule_c, "ops/attention/schedule.c")                                                      \
    X(groups_h, "ops/attention/groups.h")                                                          \
    X(groups_c, "ops/attention/groups.c")                                                          \
    X(plan_params, "ops/attention/plan_params.h")                                                  \
    X(planner, "ops/attention/planner.h")                                                          \
    X(cuda_plan, "ops/attention/plan.cu")                                                          \
    X(prefill_loads, "ops/attention/prefill_loads.cuh")                                            \
    X(prefill_store, "ops/attention/prefill_store.cuh")                                            \
    X(prefill_mma, "ops/attention/prefill_mma.cuh")                                                \
    X(wgmma_params, "ops/attention/wgmma_params.h")                                                \
    X(wgmma_items, "ops/attention/wgmma_items.cuh")                                                \
    X(wgmma_ahead, "ops/attention/wgmma_ahead.cuh")                                                \
    X(wgmma_loads, "ops/attention/wgmma_loads.cuh")                                                \
    X(wgmma_scores, "ops/attention/wgmma_scores.cuh")                                              \
    X(wgmma_store, "ops/attention/wgmma_store.cuh")                                                \
    X(wgmma_tile, "ops/attention/wgmma_tile.cuh")                                                  \
    X(wgmma_transpose, "ops/attention/wgmma_transpose.cuh")                                        \
    X(attention_wgmma, "ops/attention/attention_wgmma.cu")                                         \
    X(gemm_params, "ops/gemm/gemm_params.h")                                                       \
    X(gemm_thin, "ops/gemm/gemm_thin.cu")                                                          \
    X(gemm_mma, "ops/gemm/gemm_mma.cu")                                                            \
    X(gemm_tile, "ops/gemm/gemm_tile.cu")                                                          \
    X(philox, "kern/philox.h")                                                                     \
    X(argmax, "ops/sampling/argmax.cu")                                                            \
    X(sampling_weights, "ops/sampling/weights.h")                                                  \
    X(sampling_exchange, "ops/sampling/exchange.cuh")                                              \
    X(sampling_pieces, "ops/sampling/pieces.cuh")                                                  \
    X(sampling_stage_list, "ops/sampling/stage_list.cuh")                                          \
    X(sampling_row, "ops/sampling/row.cuh")                                                        \
    X(sampling_find, "ops/sampling/find.cuh")                                                      \
    X(sampling_list, "ops/sampling/list.cuh")                                                      \
    X(sampling_guess, "ops/sampling/guess.cuh")                                                    \
    X(sampling_top_p, "ops/sampling/top_p.cuh")                                                    \
    X(sampling_stream, "ops/sampling/stream.cuh")                                                  \
    X(sampling_stream_row, "ops/sampling/stream_row.cuh")                                          \
    X(sampling, "ops/sampling/sampling.cu")                                                        \
    X(top_k_params, "ops/sampling/top_k_params.h")                                                 \
    X(top_k, "ops/sampling/top_k.cu")                                                              \
    X(log_probs_params, "ops/sampling/log_probs_params.h")                                         \
    X(log_probs, "ops/sampling/log_probs.cu")                                                      \
    X(sampling_mass, "ops/sampling/mass.cuh")                                                      \
    X(sampling_maxima, "ops/sampling/maxima.cuh")                                                  \
    X(verify_params, "ops/sampling/verify_params.h")                                               \
    X(verify_h, "ops/sampling/verify.h")                                                           \
    X(verify, "ops/sampling/verify.cu")

typedef struct qi_bundle_file {
    const char *path;
    const char *text; /* a zero byte follows */
    size_t bytes;
} qi_bundle_file;

/* File i of those for a kind of device; 0 past the last. */
int qi_bundle(DLDeviceType device, int i, qi_bundle_file *out);

#endif
