/* fiber.h - stacks that one OS thread changes between.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMULATOR_FIBER_H
#define EMULATOR_FIBER_H

#include <stddef.h>

/* Where a fiber that does not run stands. */
typedef struct fiber_place {
    void *stack_pointer;
} fiber_place;

/* Leaves the running fiber, whose place is stored, for another. */
void fiber_switch(fiber_place *from, const fiber_place *to);

/* A fiber that will run entry() below top; entry must not return. */
fiber_place fiber_begin(void *top, void (*entry)(void));

/* The top of stack i below MAX_STACKS, of some 120 KiB above memory that may not be touched; NULL: no memory. */
enum { MAX_STACKS = 16 << 10 };
void *fiber_stack(unsigned i);

#endif
