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
    EMULATOR_STMATRIX,
    EMULATOR_MOVMATRIX,
    EMULATOR_MMA_F16,
    EMULATOR_MMA_BF16,
    EMULATOR_WGMMA_COMMIT,
    EMULATOR_WGMMA_WAIT,
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

typedef struct emulator_stmatrix {
    void *row;
    int count;
    const unsigned *r; /* [count] */
} emulator_stmatrix;

typedef struct emulator_movmatrix {
    unsigned value, result;
} emulator_movmatrix;

typedef struct emulator_mma { /* m16n8k16 */
    float *d;
    const unsigned *a;
    unsigned b[2];
} emulator_mma;

typedef enum emulator_type { EMULATOR_F16, EMULATOR_BF16, EMULATOR_E4M3 } emulator_type;

/* m64nNk16, of e4m3 k32. a and b are descriptors of shared memory as the GPU has them, their addresses the machine's
 * offsets; a is a[4] where `registers`, and b of 16 bits MN-major then, otherwise all are K-major. */
typedef struct emulator_wgmma {
    float *d; /* [n / 2] */
    unsigned n;
    emulator_type type;
    unsigned accumulate, registers;
    unsigned long long a, b;
    unsigned a_registers[4];
} emulator_wgmma;

typedef struct emulator_machine {
    const emulator_index *thread; /* of the running thread */
    emulator_index block, block_dim, grid_dim;
    unsigned long shared_bytes; /* dynamic, as launched */
    char *shared;
    unsigned rank; /* of the running thread's block in its cluster */
    /* All threads of the block at barrier 0 (threads 0), or so many at another; waits 0 only counts. */
    void (*sync_block)(unsigned barrier, unsigned threads, int waits);
    unsigned (*count_block)(unsigned vote); /* barrier 0; the sum of what its threads bring */
    void (*cluster_arrive)(void);
    void (*cluster_wait)(void);
    void *(*cluster_at)(const void *p, unsigned rank);
    void (*store_async)(void *p, unsigned long long value, void *barrier, unsigned rank);
    void (*sync_warp)(unsigned mask, emulator_op op, void *operands);
    void (*pause)(void); /* others may run */
    void (*copy_async)(void *to, const void *from, unsigned bytes, unsigned size);
    void (*commit_group)(void);
    void (*wait_group)(unsigned n);
    unsigned (*shared_offset)(const void *p); /* in dynamic shared memory's address space */
    void (*wgmma)(const emulator_wgmma *product);
    void (*wgmma_commit)(void);
    void (*wgmma_wait)(unsigned n);
    void (*mbarrier_init)(void *barrier, int count);
    void (*mbarrier_inval)(void *barrier);
    void (*mbarrier_arrive)(void *barrier, int bytes); /* that are expected from now on */
    int (*mbarrier_test)(void *barrier, unsigned parity);
    void (*mbarrier_wait)(void *barrier, unsigned parity);
    void (*tensor_load)(void *to, const void *map, void *barrier, unsigned rank, const int *at);
    void (*tensor_store)(const void *map, const void *from, unsigned rank, const int *at);
    void (*tensor_await_stores)(void); /* this thread's */
    void (*await_turn)(void);          /* griddepcontrol.wait */
    void (*fault)(const char *what);   /* ends the launch; does not return */
} emulator_machine;

/* Of each kernel, under its name. */
typedef struct emulator_kernel {
    void (*run)(const void *params);
    unsigned long params_bytes;
    unsigned max_threads;
} emulator_kernel;

/* Of each shared object, as `emulator_module_record`. */
typedef struct emulator_module {
    emulator_machine **machine;      /* to be set after loading */
    char *shared_begin, *shared_end; /* all __shared__ variables */
    const unsigned *alignments_begin,
        *alignments_end; /* that dynamic shared memory is declared with */
} emulator_module;

#endif
