/* machine.h - what emulated kernels and the machine that runs them know of each other. Kernels are shared
 * objects, C++ compiled by nvrtc.c; the machine is C, in libcuda.so.1. Neither may include a header here:
 * kernels have none.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMULATOR_MACHINE_H
#define EMULATOR_MACHINE_H

typedef struct emulator_index {
    unsigned x, y, z;
} emulator_index;

/* What a warp does together. The last of the lanes to arrive does it for all of them: operands are pointers
 * to structs on the lanes' stacks. */
typedef enum emulator_op {
    EMULATOR_SYNCWARP,
    EMULATOR_SHUFFLE,
    EMULATOR_VOTE,
    EMULATOR_MATCH,
    EMULATOR_REDUCE,
    EMULATOR_LDMATRIX,
    EMULATOR_LDMATRIX_TRANS,
    EMULATOR_MOVMATRIX,
    EMULATOR_MMA_F16,
    EMULATOR_MMA_BF16,
    EMULATOR_NUM_OPS
} emulator_op;

typedef struct emulator_shuffle {
    unsigned long long value;
    int source; /* lane; its own where the shuffle leads out of its segment */
    unsigned long long result;
} emulator_shuffle;

typedef struct emulator_vote {
    int predicate;
    unsigned ballot;
} emulator_vote;

typedef struct emulator_match {
    unsigned long long value;
    unsigned lanes; /* with the same value */
} emulator_match;

typedef enum emulator_reduction {
    EMULATOR_ADD,
    EMULATOR_MIN,
    EMULATOR_MAX,
    EMULATOR_MIN_SIGNED,
    EMULATOR_MAX_SIGNED,
    EMULATOR_AND,
    EMULATOR_OR,
    EMULATOR_XOR
} emulator_reduction;

typedef struct emulator_reduce {
    emulator_reduction by;
    unsigned value, result;
} emulator_reduce;

typedef struct emulator_ldmatrix {
    const void *row;
    int count;   /* matrices: 1, 2 or 4 */
    unsigned *r; /* [count] */
} emulator_ldmatrix;

typedef struct emulator_movmatrix {
    unsigned value, result;
} emulator_movmatrix;

typedef struct emulator_mma { /* m16n8k16 */
    float *d;
    const unsigned *a;
    unsigned b[2];
} emulator_mma;

typedef struct emulator_machine {
    const emulator_index *thread; /* of the running thread */
    emulator_index block, block_dim, grid_dim;
    unsigned long shared_bytes; /* dynamic, as launched */
    char *shared;
    /* All threads of the block at barrier 0 (threads 0), or so many at another; waits 0 only counts. */
    void (*sync_block)(unsigned barrier, unsigned threads, int waits);
    unsigned votes, vote_result; /* sums of what threads bring to barrier 0 */
    void (*sync_warp)(unsigned mask, emulator_op op, void *operands);
    void (*pause)(void); /* others may run */
    void (*copy_async)(void *to, const void *from, unsigned bytes, unsigned size);
    void (*commit_group)(void);
    void (*wait_group)(unsigned n);
    void (*fault)(const char *what); /* ends the launch; does not return */
} emulator_machine;

/* Of each kernel, under its name. */
typedef struct emulator_kernel {
    void (*run)(const void *params);
    unsigned long params_bytes;
    unsigned max_threads;
} emulator_kernel;

/* Of each shared object, as `emulator_module`. */
typedef struct emulator_module {
    emulator_machine **machine;      /* to be set after loading */
    char *shared_begin, *shared_end; /* all __shared__ variables */
} emulator_module;

#endif
