/* grid.h - running a kernel's clusters of blocks, one after the other, each with its threads as fibers.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMULATOR_GRID_H
#define EMULATOR_GRID_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "machine.h"

enum { MAX_THREADS = 1024, LANES = 32, MAX_WARPS = MAX_THREADS / LANES, NUM_BARRIERS = 16 };
enum { MAX_CLUSTER = 16, PORTABLE_CLUSTER = 8 }; /* blocks; those of every kernel */
enum { SHARED_DEFAULT = 48 << 10, MAX_PARAMS = 4096 };

/* The kernel, of an object loaded for the blocks of one rank alone: so each has its own __shared__ variables. */
typedef struct grid_copy {
    const emulator_kernel *kernel;
    const emulator_module *module;
} grid_copy;

typedef struct grid_launch {
    const char *name; /* of the kernel */
    grid_copy copies[MAX_CLUSTER];
    emulator_index grid, block;
    unsigned cluster; /* blocks, along x; 1: none */
    unsigned shared_bytes;
    const void *params;
} grid_launch;

/* Runs all of it; 0 if it was abandoned for an error, of which stderr has a line. */
bool grid_run(const grid_launch *launch);

/* Exported: what a test does in place of a launch that the following ones overlap. It is called before each of their
 * blocks begins (ended 0), and when all of its threads wait for that launch (1). NULL: nothing. */
typedef void emulator_launch_before(void *user, int ended);
void emulator_set_launch_before(emulator_launch_before *before, void *user);

/* ---- between the parts of the machine ------------------------------------------------------- */

extern emulator_machine machine;

/* Ends the launch from within a thread; text as printf has it. */
_Noreturn void grid_fault(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The running thread's warp, by its number in the cluster, of MAX_WARPS for each block, and lane. */
unsigned grid_warp(void);
unsigned grid_lane(void);

/* Lets others run. */
void grid_pause(void);

/* Has the running thread wait for an mbarrier or for products, until it is woken. */
void grid_sleep(const void *at);
void grid_wake(const void *at);

/* Whom errors are of, and whose block's shared memory is meant, while something of this thread's is done later: by
 * its warp * LANES + lane. */
enum { NOBODY = MAX_CLUSTER * MAX_THREADS };
void grid_blame(unsigned number);

/* Whether [p, p + bytes) is shared memory of the running block. */
bool grid_is_shared(const void *p, size_t bytes);
const char *grid_window(void); /* shared_window() of it */

/* driver.c: of the GPU, 90 for compute capability 9.0. */
unsigned device_arch(void);

/* A number below n: 0 where QKV_EMULATOR_SEED is not set. */
bool grid_is_random(void);
unsigned grid_random(unsigned n);

/* warp.c: performs op for the lanes of a mask. */
extern const char *const warp_op_names[EMULATOR_NUM_OPS];
void warp_perform(emulator_op op, void *const operands[LANES], unsigned lanes);

/* copies.c: the asynchronous copies of a thread. */
typedef struct copy {
    char *to;
    const char *from;
    unsigned bytes, size, group;
} copy;

typedef struct copies {
    copy *list; /* oldest first */
    unsigned count, room;
    unsigned group; /* the open one */
} copies;

copies *grid_copies(void); /* of the running thread */
void copies_begin(copies *c);
void copies_add(void *to, const void *from, unsigned bytes, unsigned size);
void copies_commit(void);
void copies_wait(unsigned n);
void copies_perform(copies *c); /* all */

/* wgmma.c: warpgroups' products. */
void wgmma_begin(unsigned blocks); /* a cluster */
void wgmma_end_thread(void);
void wgmma_add(const emulator_wgmma *what);
void wgmma_commit(void);
void wgmma_wait(unsigned n);
void wgmma_collect_commit(unsigned lanes);
bool wgmma_perform_awaited(void);      /* those of a warpgroup that waits for them, if any */
bool wgmma_is_awaited(const void *at); /* whether grid_sleep() is for products */

/* mbarrier.c */
void mbarrier_begin(void); /* a cluster */
void mbarrier_init(void *at, int count);
void mbarrier_inval(void *at);
void mbarrier_arrive(void *at, int bytes);
int mbarrier_test(void *at, unsigned parity);
void mbarrier_wait(void *at, unsigned parity);
void mbarrier_check(const void *at); /* that there is one */
void mbarrier_complete(void *at, int bytes);
bool mbarrier_is_awaited(const void *at);
void mbarrier_describe(const void *at, char *text, size_t bytes);

/* tensor.c: copies of tensors' boxes. */
void tensor_begin(void);          /* a cluster */
void tensor_check(unsigned rank); /* a block that has ended */
void tensor_load(void *to, const void *map, void *barrier, unsigned rank, const int *at);
void tensor_store(const void *map, const void *from, unsigned rank, const int *at);
void tensor_await_stores(void);
void tensor_perform(const void *barrier); /* all whose bytes count there */
void tensor_perform_loads(void);
bool tensor_perform_awaited(void); /* those of a barrier that a thread waits at, if any */

#endif
