/* shared.h - the shared memory of a block: __shared__ variables of the kernel's object, and what a launch
 * asks for besides, between bytes that nobody may change and memory that nobody may touch.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMULATOR_SHARED_H
#define EMULATOR_SHARED_H

#include <stdbool.h>
#include <stddef.h>

#include "machine.h"

enum { SHARED_POISON = 0xcb, SHARED_ROOM = 256 << 10 };

/* All of it becomes poison. */
void shared_begin(const emulator_module *module, size_t dynamic_bytes);
char *shared_dynamic(void);
const char *shared_window(void); /* SHARED_ROOM bytes, in which it is, from a page's beginning */
bool shared_has(const emulator_module *module, const void *p, size_t bytes);

/* What is wrong after a block has run, NULL: nothing. */
const char *shared_check(void);

/* "", or that an address is near the end of dynamic shared memory. */
const char *shared_describe(const void *address);

#endif
