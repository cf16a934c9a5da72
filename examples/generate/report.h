/* report.h - how the run went, in figures.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_REPORT_H
#define GENERATE_REPORT_H

#include "console.h"
#include "engine.h"

/* One line, while it runs. */
void report_progress(const engine *e, console *terminal);

/* Some lines at the end. */
bool report_write(const engine *e, console *terminal, char error[GGUF_ERROR]);

/* The same for the trace of this name, with percentiles; with json also an object on standard output. */
bool report_trace(const engine *e, const char *name, bool json, console *terminal,
                  char error[GGUF_ERROR]);

#endif
