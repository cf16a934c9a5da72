/* engine.h - continuous batching: requests join and leave a running batch, one step at a time.
 *
 * A step takes the next token of every running request and, within --chunk tokens, pieces of
 * prompts: those of running requests first, then of new ones, in the order of arrival. All of it
 * goes through the layers as one batch. When the pool has no page left for a running request, the
 * youngest is preempted: its keys and values are copied to host memory and come back, bit by bit,
 * when there is room, before any newer request is let in. A request may be known before it arrives:
 * it is let in from then on, and where nothing else is to be done the step waits for it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_ENGINE_H
#define GENERATE_ENGINE_H

#include "forward.h"
#include "pages.h"
#include "tokenizer.h"

typedef enum request_state { WAITING, RUNNING, PREEMPTED, FINISHED } request_state;

typedef struct request {
    request_state state;
    int32_t *tokens;   /* [prompt_len + max_new] the prompt, then what was generated */
    double *token_ms;  /* [max_new] when each generated token was known */
    double arrival_ms; /* from start_ms on */
    int32_t prompt_len, max_new, num_tokens;
    int32_t num_cached; /* tokens whose keys are in the pages (or in saved) */
    int32_t *pages;     /* [num_pages] */
    int32_t num_pages;
    int32_t num_known;      /* pages at the front that are in the tree of known pages */
    bool private_from_here; /* its next page is not to be looked up, nor made known */
    void *saved;            /* PREEMPTED: num_pages pages of keys and values */
} request;

typedef struct engine_options {
    int32_t max_batch, chunk, page_size;
    int32_t num_pages; /* 0 = enough for the max_batch largest requests, within reason */
    bool share_prefixes, ignore_end;
    float temperature, top_p;
    int32_t top_k;
    uint64_t seed; /* of every request: what it draws does not depend on the others */
} engine_options;

/* What one request asks for, and when: milliseconds from engine_create on, none before the former
 * request's. tokens are borrowed for engine_create. */
typedef struct engine_prompt {
    const int32_t *tokens;
    int32_t num_tokens, max_new;
    double arrival_ms;
} engine_prompt;

typedef struct engine_counts {
    int64_t prompt_tokens, shared_tokens; /* computed; found in the pool */
    double prompt_ms;                     /* of steps that had prompt tokens */
    int64_t decode_tokens;                /* of the other steps */
    double decode_ms;
    int64_t preemptions;
} engine_counts;

typedef struct engine {
    const model *m;
    const tokenizer *text;
    qkv_context *ctx;
    engine_options options;
    forward *compute;
    page_pool *pool;
    request *requests; /* in order of arrival */
    int32_t num_requests, num_finished;
    request **running; /* [max_batch] oldest first */
    int32_t num_running;
    int32_t next; /* every unfinished request before this one is running */

    /* The step: which requests get a token from it, and the row that predicts it. */
    request **sampled; /* [max_batch], as all of these */
    int32_t *rows;
    mirror drawn;                /* i32, the tokens */
    mirror temperatures, top_ps; /* f32 */
    mirror top_ks;               /* i32 */
    mirror seeds, offsets;       /* u64 */
    int32_t num_sampled, step_prompt_tokens;

    double start_ms;
    engine_counts counts;
} engine;

/* text may be NULL with ignore_end. NULL and a message if a prompt is empty, does not fit the model's context or (with what it may
 * generate) the pool, or memory runs out. max_new is cut to what the context leaves. ctx, m and
 * text are borrowed. */
engine *engine_create(qkv_context *ctx, const model *m, const tokenizer *text,
                      const engine_options *options, const engine_prompt *prompts,
                      int32_t num_prompts, char error[GGUF_ERROR]);
/* NULL is fine. */
void engine_destroy(engine *e);

/* One step. Call it while engine_busy(); requests show what came out. */
bool engine_step(engine *e, char error[GGUF_ERROR]);
static inline bool engine_busy(const engine *e)
{
    return e->num_finished < e->num_requests;
}

/* Until the request arrives; not above 0 if it is there. */
double engine_ms_until(const engine *e, const request *r);
/* The request that is let in next, or NULL. */
request *engine_next(engine *e);
/* schedule.c: chooses the step's rows and gives them pages; fills the step of e->compute, sampled
 * and rows. */
bool engine_schedule(engine *e, char error[GGUF_ERROR]);
/* Pages that hold this many tokens. */
int32_t engine_pages_for(const engine *e, int32_t num_tokens);

#endif
