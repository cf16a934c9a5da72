/* replay.h - a trace against the clock: what its requests would have waited for.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_REPLAY_H
#define GENERATE_REPLAY_H

#include "console.h"
#include "trace.h"

/* Serves the trace's requests as they arrive, to the lengths that it says, and reports; with json also
 * to standard output. What is done once (kernels that are compiled, memory that is touched) is done
 * before the clock starts. */
bool replay(qkv_context *ctx, const model *m, const engine_options *options, trace *t, double speed,
            bool json, console *terminal, char error[GGUF_ERROR]);

#endif
