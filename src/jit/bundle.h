/* bundle.h - kernel sources inside the library: what the JIT compiles again. bundle.c has the
 * assembler include the files as they are.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_JIT_BUNDLE_H
#define QI_JIT_BUNDLE_H

#include <stddef.h>

/* Identifier and path below src/ of each file; CMakeLists.txt makes bundle.c depend on them. */
#define QI_BUNDLE(X)                                                                               \
    X(abi, "kern/abi.h")                                                                           \
    X(plan, "kern/plan.h")                                                                         \
    X(rope, "kern/rope.h")                                                                         \
    X(rope_turns, "kern/rope_turns.h")                                                             \
    X(variant, "kern/variant.h")                                                                   \
    X(prelude, "kern/cpu/prelude.h")                                                               \
    X(amx, "kern/cpu/amx.h")                                                                       \
    X(e4m3, "kern/cpu/e4m3.h")                                                                     \
    X(simd, "kern/cpu/simd.h")                                                                     \
    X(tile, "kern/cpu/tile.h")                                                                     \
    X(cpu_rope, "kern/cpu/rope.h")                                                                 \
    X(attention_params, "ops/attention/attention_params.h")                                        \
    X(attention_tile, "ops/attention/attention_tile.h")                                            \
    X(decode_tile, "ops/attention/decode_tile.h")                                                  \
    X(hooks, "ops/attention/hooks.cpu.h")                                                          \
    X(prefill_tile, "ops/attention/prefill_tile.h")                                                \
    X(attention, "ops/attention/attention.cpu.c")

typedef struct qi_bundle_file {
    const char *path;
    const char *text;
    size_t bytes;
} qi_bundle_file;

/* File i; 0 past the last. */
int qi_bundle(int i, qi_bundle_file *out);

#endif
