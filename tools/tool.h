/* tool.h - what the files of the qkv tool share: ending with a message, and the clock.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_TOOL_H
#define QKV_TOOLS_TOOL_H

#include "qkv/qkv.h"

enum { EXIT_WRONG = 1 /* a failed check or call */, EXIT_USAGE = 2 };

/* Prints "qkv: ..." to standard error and exits. */
__attribute__((format(printf, 2, 3), noreturn)) void tool_die(int code, const char *format, ...);

/* Dies with the library's message if status is not QKV_OK. */
void tool_check(qkv_status status, const char *call);

double tool_seconds(void); /* monotonic */

/* Ascending. */
void tool_sort(double *x, size_t n);

#endif
