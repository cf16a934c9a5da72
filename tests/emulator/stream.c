/* stream.c - streams, their capture into graphs, and events. Work is done when it is enqueued, so that there
 * is nothing to wait for; what may not be done under capture fails as the driver says.
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "driver.h"

struct CUgraph_st {
    work *list;
    size_t count, room;
};

enum { GLOBAL, THREAD_LOCAL, RELAXED }; /* modes of a capture */
enum { NONE, ACTIVE, INVALIDATED };
enum { NON_BLOCKING = 1 };

typedef struct capture {
    CUgraph graph;
    CUstream origin;
    int mode, invalidated, ended;
    pthread_t thread;
    struct capture *next;
} capture;

struct CUstream_st {
    unsigned flags;
    capture *capture; /* NULL: does work at once */
};

struct CUevent_st {
    unsigned flags;
    struct timespec time;
    capture *capture; /* what it was last recorded in */
};

static capture *captures; /* all */
static _Thread_local int thread_mode = GLOBAL;
static struct CUstream_st legacy;

static CUstream stream_of(CUstream handle)
{
    return (uintptr_t)handle <= 2 ? &legacy
                                  : handle; /* NULL, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD */
}

/* The capture that a stream takes part in. */
static capture *capture_of(CUstream s)
{
    if (s->capture && s->capture->ended) s->capture = NULL; /* it had joined */
    return s->capture;
}

/* ---- capturing ------------------------------------------------------------------------------ */

static bool keep(CUgraph g, const work *w)
{
    if (g->count == g->room) {
        g->room = g->room ? 2 * g->room : 16;
        work *grown = realloc(g->list, g->room * sizeof *grown);
        if (!grown) return false;
        g->list = grown;
    }
    work own = *w;
    if (w->kind == WORK_LAUNCH) {
        own.params = malloc(w->function->kernel->params_bytes);
        if (!own.params) return false;
        memcpy(own.params, w->params, w->function->kernel->params_bytes);
    }
    g->list[g->count++] = own;
    return true;
}

static void free_graph(CUgraph g)
{
    for (size_t i = 0; g && i < g->count; i++)
        if (g->list[i].kind == WORK_LAUNCH) free(g->list[i].params);
    if (g) free(g->list);
    free(g);
}

/* The legacy stream would wait for streams that capture. */
static CUresult check_legacy(void)
{
    CUresult result = SUCCESS;
    for (capture *c = captures; c; c = c->next)
        if (!(c->origin->flags & NON_BLOCKING)) {
            c->invalidated = 1;
            result = STREAM_CAPTURE_IMPLICIT;
        }
    return result;
}

CUresult stream_do(CUstream handle, const work *w)
{
    const CUstream s = stream_of(handle);
    const CUresult result = s == &legacy ? check_legacy() : SUCCESS;
    if (result != SUCCESS) return result;
    capture *c = capture_of(s);
    if (!c) return driver_do(w);
    if (c->invalidated) return STREAM_CAPTURE_INVALIDATED;
    return keep(c->graph, w) ? SUCCESS : OUT_OF_MEMORY;
}

CUresult stream_unsafe(void)
{
    CUresult result = SUCCESS;
    for (capture *c = captures; c && thread_mode != RELAXED; c = c->next)
        if ((c->mode == GLOBAL && thread_mode == GLOBAL) ||
            (c->mode != RELAXED && pthread_equal(c->thread, pthread_self()))) {
            c->invalidated = 1;
            result = STREAM_CAPTURE_UNSUPPORTED;
        }
    return result;
}

static CUresult begin_capture(CUstream s, int mode)
{
    if (s == &legacy) return STREAM_CAPTURE_UNSUPPORTED;
    if (capture_of(s) || mode < GLOBAL || mode > RELAXED) return INVALID_VALUE;
    capture *c = calloc(1, sizeof *c);
    CUgraph graph = calloc(1, sizeof *graph);
    if (!c || !graph) return OUT_OF_MEMORY;
    *c = (capture){
        .graph = graph, .origin = s, .mode = mode, .thread = pthread_self(), .next = captures};
    captures = s->capture = c;
    return SUCCESS;
}

static CUresult end_capture(CUstream s, CUgraph *graph)
{
    capture *c = capture_of(s);
    *graph = NULL;
    if (!c || c->origin != s) return INVALID_VALUE;
    s->capture = NULL;
    capture **at = &captures;
    while (*at != c) at = &(*at)->next;
    *at = c->next;
    c->ended = 1; /* it stays, for events and streams that still name it */
    if (c->invalidated) {
        free_graph(c->graph);
        return STREAM_CAPTURE_INVALIDATED;
    }
    *graph = c->graph;
    return SUCCESS;
}

EXPORT CUresult cuStreamBeginCapture_v2(CUstream stream, int mode)
{
    ENTER();
    LEAVE(begin_capture(stream_of(stream), mode));
}

EXPORT CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph)
{
    ENTER();
    LEAVE(end_capture(stream_of(stream), graph));
}

EXPORT CUresult cuStreamIsCapturing(CUstream stream, int *status)
{
    ENTER();
    const CUstream s = stream_of(stream);
    const CUresult result = s == &legacy ? check_legacy() : SUCCESS;
    const capture *c = capture_of(s);
    *status = !c ? NONE : c->invalidated ? INVALIDATED : ACTIVE;
    LEAVE(result);
}

EXPORT CUresult cuThreadExchangeStreamCaptureMode(int *mode)
{
    const int before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return SUCCESS;
}

/* ---- streams -------------------------------------------------------------------------------- */

EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned flags)
{
    ENTER();
    *stream = calloc(1, sizeof **stream);
    if (*stream) (*stream)->flags = flags;
    LEAVE(*stream ? SUCCESS : OUT_OF_MEMORY);
}

EXPORT CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority)
{
    (void)priority;
    return cuStreamCreate(stream, flags);
}

EXPORT CUresult cuStreamDestroy_v2(CUstream stream)
{
    ENTER();
    free(stream);
    LEAVE(SUCCESS);
}

EXPORT CUresult cuStreamSynchronize(CUstream stream)
{
    ENTER();
    const CUstream s = stream_of(stream);
    if (s == &legacy) LEAVE(check_legacy());
    capture *c = capture_of(s);
    if (c) c->invalidated = 1;
    LEAVE(c ? STREAM_CAPTURE_UNSUPPORTED : SUCCESS);
}

EXPORT CUresult cuStreamQuery(CUstream stream)
{
    return cuStreamSynchronize(stream);
}

/* ---- graphs --------------------------------------------------------------------------------- */

/* An executable graph is a copy of the graph. */
static CUresult copy_graph(CUgraph *out, CUgraph graph)
{
    CUgraph new = calloc(1, sizeof *new);
    *out = NULL;
    if (!new) return OUT_OF_MEMORY;
    for (size_t i = 0; i < graph->count; i++)
        if (!keep(new, &graph->list[i])) {
            free_graph(new);
            return OUT_OF_MEMORY;
        }
    *out = new;
    return SUCCESS;
}

EXPORT CUresult cuGraphInstantiateWithFlags(CUgraph *executable, CUgraph graph, uint64_t flags)
{
    (void)flags;
    ENTER();
    LEAVE(copy_graph(executable, graph));
}

EXPORT CUresult cuGraphInstantiate(CUgraph *executable, CUgraph graph, uint64_t flags)
{
    return cuGraphInstantiateWithFlags(executable, graph, flags);
}

EXPORT CUresult cuGraphUpload(CUgraph executable, CUstream stream)
{
    (void)executable, (void)stream;
    ENTER();
    LEAVE(SUCCESS);
}

static CUresult launch_graph(CUgraph executable, CUstream stream)
{
    CUresult result = SUCCESS;
    for (size_t i = 0; i < executable->count && result == SUCCESS; i++)
        result = stream_do(stream, &executable->list[i]);
    return result;
}

EXPORT CUresult cuGraphLaunch(CUgraph executable, CUstream stream)
{
    ENTER();
    LEAVE(launch_graph(executable, stream));
}

/* How many nodes there are; they have no handles. */
EXPORT CUresult cuGraphGetNodes(CUgraph graph, void **nodes, size_t *count)
{
    ENTER();
    if (nodes) LEAVE(NOT_SUPPORTED);
    *count = graph->count;
    LEAVE(SUCCESS);
}

EXPORT CUresult cuGraphDestroy(CUgraph graph)
{
    ENTER();
    free_graph(graph);
    LEAVE(SUCCESS);
}

EXPORT CUresult cuGraphExecDestroy(CUgraph executable)
{
    return cuGraphDestroy(executable);
}

/* ---- events --------------------------------------------------------------------------------- */

EXPORT CUresult cuEventCreate(CUevent *event, unsigned flags)
{
    ENTER();
    *event = calloc(1, sizeof **event);
    if (*event) (*event)->flags = flags;
    LEAVE(*event ? SUCCESS : OUT_OF_MEMORY);
}

EXPORT CUresult cuEventDestroy_v2(CUevent event)
{
    ENTER();
    free(event);
    LEAVE(SUCCESS);
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream stream)
{
    ENTER();
    const CUstream s = stream_of(stream);
    const CUresult result = s == &legacy ? check_legacy() : SUCCESS;
    event->capture = capture_of(s);
    clock_gettime(CLOCK_MONOTONIC, &event->time);
    LEAVE(result);
}

EXPORT CUresult cuEventSynchronize(CUevent event)
{
    ENTER();
    if (event->capture) event->capture->invalidated = 1; /* though it may have ended */
    LEAVE(event->capture ? CAPTURED_EVENT : SUCCESS);
}

EXPORT CUresult cuEventQuery(CUevent event)
{
    return cuEventSynchronize(event);
}

EXPORT CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent begin, CUevent end)
{
    enum { NO_TIMING = 2 };
    ENTER();
    if ((begin->flags | end->flags) & NO_TIMING || begin->time.tv_sec == 0 || end->time.tv_sec == 0)
        LEAVE(INVALID_HANDLE);
    *milliseconds = (float)(end->time.tv_sec - begin->time.tv_sec) * 1e3f +
                    (float)(end->time.tv_nsec - begin->time.tv_nsec) * 1e-6f;
    LEAVE(SUCCESS);
}

EXPORT CUresult cuEventElapsedTime(float *milliseconds, CUevent begin, CUevent end)
{
    return cuEventElapsedTime_v2(milliseconds, begin, end);
}

/* A stream that waits for an event of a capture joins it. */
EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
    (void)flags;
    ENTER();
    const CUstream s = stream_of(stream);
    CUresult result = s == &legacy ? check_legacy() : SUCCESS;
    capture *c = event->capture && !event->capture->ended ? event->capture : NULL;
    if (result == SUCCESS && c && s == &legacy) result = STREAM_CAPTURE_IMPLICIT;
    if (result == SUCCESS && c) s->capture = c;
    LEAVE(result);
}
