/* grid.h - running a kernel's blocks, one after the other, each with its threads as fibers.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMULATOR_GRID_H
#define EMULATOR_GRID_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "machine.h"

enum { MAX_THREADS = 1024, LANES = 32, MAX_WARPS = MAX_THREADS / LANES, NUM_BARRIERS = 16 };
enum { SHARED_OPTIN = 227 << 10, SHARED_DEFAULT = 48 << 10 };

typedef struct grid_launch {
    const char *name; /* of the kernel */
    const emulator_kernel *kernel;
    const emulator_module *module;
    emulator_index grid, block;
    unsigned shared_bytes;
    const void *params;
} grid_launch;

/* Runs all of it; 0 if it was abandoned for an error, of which stderr has a line. */
bool grid_run(const grid_launch *launch);

/* ---- between the parts of the machine ------------------------------------------------------- */

extern emulator_machine machine;

/* Ends the launch from within a thread; text as printf has it. */
_Noreturn void grid_fault(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Whether [p, p + bytes) is shared memory of the running block. */
bool grid_is_shared(const void *p, size_t bytes);

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

#endif
