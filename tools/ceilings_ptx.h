/* ceilings_ptx.h - kernels that measure a GPU, as PTX, which the driver compiles: they need no compiler.
 * Each takes (from, to, repeats). A block of 256 threads moves BLOCK_BYTES of memory, and with repeats
 * those of another block each time, so that nothing of it can be kept in registers; or multiplies.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_CEILINGS_PTX_H
#define QKV_TOOLS_CEILINGS_PTX_H

enum { CEILING_BLOCK = 256, CEILING_BLOCK_BYTES = 32768, CEILING_MMA_FLOPS = 8 * 8 * 4096 };

/* %rd1 = from, %rd2 = to, %r9 = repeats, %rd5 = this thread's first byte of a block's. */
#define CEILING_BEGIN(name)                                                                        \
    ".visible .entry " name "(.param .u64 from, .param .u64 to, .param .u32 repeats)\n"            \
    "{\n"                                                                                          \
    ".reg .pred %p<4>;\n"                                                                          \
    ".reg .b32 %r<64>;\n"                                                                          \
    ".reg .b64 %rd<12>;\n"                                                                         \
    "ld.param.u64 %rd1, [from];\n"                                                                 \
    "ld.param.u64 %rd2, [to];\n"                                                                   \
    "ld.param.u32 %r9, [repeats];\n"                                                               \
    "cvta.to.global.u64 %rd1, %rd1;\n"                                                             \
    "cvta.to.global.u64 %rd2, %rd2;\n"                                                             \
    "mov.u32 %r0, %ctaid.x;\n"                                                                     \
    "mov.u32 %r1, %nctaid.x;\n"                                                                    \
    "mov.u32 %r2, %tid.x;\n"                                                                       \
    "mul.wide.u32 %rd5, %r2, 16;\n"                                                                \
    "mov.u32 %r8, 0;\n"

/* Moves on to the next block's bytes, and back to AGAIN if there are repeats left. */
#define CEILING_AGAIN                                                                              \
    "add.u32 %r0, %r0, 1;\n"                                                                       \
    "setp.eq.u32 %p1, %r0, %r1;\n"                                                                 \
    "selp.u32 %r0, 0, %r0, %p1;\n"                                                                 \
    "sub.u32 %r9, %r9, 1;\n"                                                                       \
    "setp.ne.u32 %p2, %r9, 0;\n"                                                                   \
    "@%p2 bra AGAIN;\n"

/* %rd3 = what this thread reads, %rd4 = what it writes. */
#define CEILING_PLACE                                                                              \
    "AGAIN:\n"                                                                                     \
    "mul.wide.u32 %rd6, %r0, 32768;\n"                                                             \
    "add.u64 %rd6, %rd6, %rd5;\n"                                                                  \
    "add.u64 %rd3, %rd1, %rd6;\n"                                                                  \
    "add.u64 %rd4, %rd2, %rd6;\n"

#define CEILING_LOAD(a, b, c, d, offset)                                                           \
    "ld.global.cg.v4.u32 {%r" #a ", %r" #b ", %r" #c ", %r" #d "}, [%rd3+" #offset "];\n"
#define CEILING_STORE(a, b, c, d, offset)                                                          \
    "st.global.cg.v4.u32 [%rd4+" #offset "], {%r" #a ", %r" #b ", %r" #c ", %r" #d "};\n"
#define CEILING_OR(a, b, c, d)                                                                     \
    "or.b32 %r" #a ", %r" #a ", %r" #b ";\n"                                                       \
    "or.b32 %r" #c ", %r" #c ", %r" #d ";\n"                                                       \
    "or.b32 %r" #a ", %r" #a ", %r" #c ";\n"                                                       \
    "xor.b32 %r8, %r8, %r" #a ";\n"
#define CEILING_EIGHT(X)                                                                           \
    X(16, 17, 18, 19, 0)                                                                           \
    X(20, 21, 22, 23, 4096)                                                                        \
    X(24, 25, 26, 27, 8192)                                                                        \
    X(28, 29, 30, 31, 12288)                                                                       \
    X(32, 33, 34, 35, 16384)                                                                       \
    X(36, 37, 38, 39, 20480)                                                                       \
    X(40, 41, 42, 43, 24576)                                                                       \
    X(44, 45, 46, 47, 28672)

/* A result that hardly ever is keeps the loads and products alive. */
#define CEILING_END                                                                                \
    "setp.eq.u32 %p3, %r8, 0x9e3779b9;\n"                                                          \
    "@%p3 st.global.u32 [%rd2], %r8;\n"                                                            \
    "ret;\n"                                                                                       \
    "}\n"

#define CEILING_MMA(a, b, c, d)                                                                    \
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r" #a ", %r" #b ", %r" #c ", %r" #d     \
    "}, {%r2, %r3, %r4, %r5}, {%r6, %r7}, {%r" #a ", %r" #b ", %r" #c ", %r" #d "};\n"
#define CEILING_MMA_EIGHT                                                                          \
    CEILING_MMA(16, 17, 18, 19)                                                                    \
    CEILING_MMA(20, 21, 22, 23)                                                                    \
    CEILING_MMA(24, 25, 26, 27)                                                                    \
    CEILING_MMA(28, 29, 30, 31)                                                                    \
    CEILING_MMA(32, 33, 34, 35)                                                                    \
    CEILING_MMA(36, 37, 38, 39)                                                                    \
    CEILING_MMA(40, 41, 42, 43)                                                                    \
    CEILING_MMA(44, 45, 46, 47)
#define CEILING_ZERO(a, b, c, d)                                                                   \
    "mov.b32 %r" #a ", 0;\n"                                                                       \
    "mov.b32 %r" #b ", 0;\n"                                                                       \
    "mov.b32 %r" #c ", 0;\n"                                                                       \
    "mov.b32 %r" #d ", 0;\n"
#define CEILING_ZERO_EIGHT                                                                         \
    CEILING_ZERO(16, 17, 18, 19)                                                                   \
    CEILING_ZERO(20, 21, 22, 23)                                                                   \
    CEILING_ZERO(24, 25, 26, 27)                                                                   \
    CEILING_ZERO(28, 29, 30, 31)                                                                   \
    CEILING_ZERO(32, 33, 34, 35)                                                                   \
    CEILING_ZERO(36, 37, 38, 39)                                                                   \
    CEILING_ZERO(40, 41, 42, 43)                                                                   \
    CEILING_ZERO(44, 45, 46, 47)
#define CEILING_READ_AND_OR(a, b, c, d, offset) CEILING_OR(a, b, c, d)

#define CEILING_HEAD ".version 7.0\n.target sm_80\n.address_size 64\n"

static const char ceiling_read[] =
    CEILING_HEAD CEILING_BEGIN("read_memory") CEILING_PLACE CEILING_EIGHT(CEILING_LOAD)
        CEILING_EIGHT(CEILING_READ_AND_OR) CEILING_AGAIN CEILING_END;

static const char ceiling_copy[] =
    CEILING_HEAD CEILING_BEGIN("copy_memory") CEILING_PLACE CEILING_EIGHT(CEILING_LOAD)
        CEILING_EIGHT(CEILING_STORE) CEILING_AGAIN CEILING_END;

static const char ceiling_write[] =
    CEILING_HEAD CEILING_BEGIN("write_memory") CEILING_ZERO_EIGHT CEILING_PLACE CEILING_EIGHT(
        CEILING_STORE)
CEILING_AGAIN CEILING_END;

/* Each of the 8 warps multiplies numbers near 1 that depend on its threads. */
static const char ceiling_multiply[] = CEILING_HEAD CEILING_BEGIN("multiply") CEILING_ZERO_EIGHT
    "or.b32 %r2, %r2, 0x3f803f80;\n"
    "xor.b32 %r3, %r2, 0x00010002;\n"
    "xor.b32 %r4, %r2, 0x00110022;\n"
    "xor.b32 %r5, %r2, 0x00210012;\n"
    "xor.b32 %r6, %r2, 0x80158000;\n"
    "xor.b32 %r7, %r2, 0x00008023;\n"
    "AGAIN:\n" CEILING_MMA_EIGHT "sub.u32 %r9, %r9, 1;\n"
    "setp.ne.u32 %p2, %r9, 0;\n"
    "@%p2 bra AGAIN;\n" CEILING_OR(16, 20, 24, 28) CEILING_OR(32, 36, 40, 44) CEILING_END;

#endif
