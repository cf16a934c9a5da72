/* options.h - the command line.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_OPTIONS_H
#define GENERATE_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "engine.h"

/* A -p or -f, in the order given. */
typedef struct prompt_source {
    const char *text; /* the text itself, or the file's name */
    bool is_file;
} prompt_source;

typedef enum prompt_form { FORM_DEFAULT, FORM_RAW, FORM_CHAT } prompt_form;

typedef struct options {
    const char *model;
    prompt_source *prompts; /* [num_prompts], to be freed */
    int32_t num_prompts;
    const char *system;      /* NULL = the model's own */
    const char *logits_file; /* NULL = not wanted */
    const char *trace_file;  /* NULL = prompts are given */
    float trace_speed;
    bool json, tokenize, perplexity;
    prompt_form form;
    DLDataType dtype;
    DLDevice device;
    int32_t num_threads; /* 0 = all */
    int32_t max_new;
    int32_t max_tokens; /* of --perplexity */
    engine_options engine;
} options;

/* What is left to do after parsing: go on, or exit with this status. */
enum { OPTIONS_GO = -1, EXIT_USAGE = 2 };

/* Fills *o; prints help, version or what is wrong with the line. */
int options_parse(options *o, int argc, char **argv);

#endif
