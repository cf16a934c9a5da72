/* output.h - completions on standard output, in the order of the prompts, as they come.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_OUTPUT_H
#define GENERATE_OUTPUT_H

#include "bytes.h"
#include "console.h"
#include "engine.h"
#include "prompts.h"

typedef struct output {
    const engine *e;
    const prompt *prompts;
    const tokenizer *text;
    console *terminal;
    bool json;
    bool whole_lines;  /* it shares a terminal with the progress line, which needs a line's start */
    int32_t current;   /* the request being written; those before it are */
    int32_t num_taken; /* its generated tokens that are in pending, or written */
    bytes pending;     /* its text that is not written yet */
} output;

output output_open(const engine *e, const prompt *prompts, const tokenizer *text, bool json,
                   console *terminal);

/* Writes what the last step made writable. False and a message if standard output does not take
 * it, or memory runs out. */
bool output_update(output *o, char error[GGUF_ERROR]);

/* May the progress line be shown? Not after text that did not end its line. */
bool output_at_line_start(const output *o);

void output_close(output *o);

#endif
