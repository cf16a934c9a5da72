/* console.c - SPDX-License-Identifier: Apache-2.0 */
#include "console.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "clock.h"

console console_open(void)
{
    return (console){.is_terminal = isatty(STDERR_FILENO) == 1};
}

void console_progress(console *c, const char *format, ...)
{
    if (!c->is_terminal) return;
    const double ms = now_ms();
    if (c->shown && ms - c->last_ms < 100) return;
    c->last_ms = ms;
    c->shown = true;
    char line[80]; /* longer lines would wrap, and a wrapped line cannot be replaced */
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    fprintf(stderr, "\r\033[K%s", line);
    fflush(stderr);
}

void console_clear(console *c)
{
    if (!c->shown) return;
    fputs("\r\033[K", stderr);
    fflush(stderr);
    c->shown = false;
}

void console_say(console *c, const char *format, ...)
{
    va_list args;
    console_clear(c);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}
