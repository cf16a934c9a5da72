/* console.h - standard error: a progress line on a terminal, and lines that stay.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_CONSOLE_H
#define GENERATE_CONSOLE_H

#include <stdbool.h>

typedef struct console {
    bool is_terminal, shown;
    double last_ms;
} console;

console console_open(void);

/* Replaces the progress line; not more than ten times a second, and on a terminal alone. */
void console_progress(console *c, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Takes the progress line away, so that other text may be written. */
void console_clear(console *c);

/* One line that stays. */
void console_say(console *c, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
