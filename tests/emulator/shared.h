/* shared.h - the shared memory of a cluster's blocks, by their ranks: __shared__ variables of an object for each, and
 * what a launch asks for besides, between bytes that nobody may change and memory that nobody may touch.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMULATOR_SHARED_H
#define EMULATOR_SHARED_H

#include <stdbool.h>
#include <stddef.h>

#include "machine.h"

enum { SHARED_POISON = 0xcb, SHARED_ROOM = 256 << 10 };

/* All of it becomes poison. */
void shared_begin(unsigned rank, const emulator_module *module, size_t dynamic_bytes);
char *shared_dynamic(unsigned rank);
const char *
shared_window(unsigned rank); /* SHARED_ROOM bytes, in which it is, from a page's beginning */
bool shared_has(unsigned rank, const void *p, size_t bytes);

/* Where block `to` has what block `from` has at p; NULL: it is no shared memory of that. */
void *shared_at(const void *p, unsigned from, unsigned to);

/* What is wrong after a block has run, NULL: nothing. */
const char *shared_check(unsigned rank);

/* Takes it from the rest of the cluster: dynamic shared memory cannot be touched, variables become poison. Of these
 * shared_check_ended says later whether somebody has written there. */
void shared_end(unsigned rank);
const char *shared_check_ended(unsigned rank);

/* "", or that an address is near the end of dynamic shared memory, or in that of a block that has ended. */
const char *shared_describe(const void *address);

#endif
