/* trace.h - requests as they came to a server: when, and how long they were.
 *
 * A trace is a text file, a request a line, in the order of arrival:
 *
 *   arrival_ms prompt_tokens output_tokens [prefix_id prefix_tokens]
 *
 * Numbers are separated by blanks; `#` and what follows it on a line is a comment. Prompts are random
 * tokens. The first prefix_tokens of a prompt are those of all prompts with that prefix_id: the same
 * text, of which each takes as much as it says.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_TRACE_H
#define GENERATE_TRACE_H

#include "engine.h"

typedef struct trace_request {
    double arrival_ms; /* since the trace's start */
    int32_t prompt_tokens, output_tokens;
    int32_t prefix_id, prefix_tokens; /* 0 tokens: no prefix */
    int32_t line;                     /* in the file, from 1 */
} trace_request;

typedef struct trace {
    const char *path;
    trace_request *requests; /* [count], count at least 1 */
    int32_t count;
    int32_t *tokens; /* of all prompts, once trace_prompts made them */
} trace;

/* False and a message that names the line if the file is none. path is borrowed. */
bool trace_read(const char *path, trace *t, char error[GGUF_ERROR]);
/* All zero is fine. */
void trace_free(trace *t);

/* The requests, to arrive speed times as fast: [count], to be freed; their tokens live in t. NULL and
 * a message if one does not fit the model. */
engine_prompt *trace_prompts(trace *t, const model_config *c, uint64_t seed, double speed,
                             char error[GGUF_ERROR]);

#endif
