/* graphs.h - CUDA graphs in tests, by the driver that cuda.h finds.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TESTS_GRAPHS_H
#define QKV_TESTS_GRAPHS_H

#include "support.h"

/* A stream that waits for no other, nor others for it. */
static inline void *graph_stream(void)
{
    enum { NON_BLOCKING = 1 };
    int (*create)(void **, unsigned);
    void *stream = NULL;
    *(void **)&create = test_driver("cuStreamCreate");
    assert_int_equal(create(&stream, NON_BLOCKING), 0);
    return stream;
}

/* Calls from here on become a graph; only this thread's are watched. */
static inline void graph_begin(void *stream)
{
    enum { THREAD_LOCAL = 1 };
    int (*begin)(void *, int);
    *(void **)&begin = test_driver("cuStreamBeginCapture_v2");
    assert_int_equal(begin(stream, THREAD_LOCAL), 0);
}

/* The graph, ready to be launched. */
static inline void *graph_end(void *stream)
{
    int (*end)(void *, void **), (*instantiate)(void **, void *, unsigned long long),
        (*destroy)(void *);
    void *graph = NULL, *executable = NULL;
    *(void **)&end = test_driver("cuStreamEndCapture");
    *(void **)&instantiate = test_driver("cuGraphInstantiateWithFlags");
    *(void **)&destroy = test_driver("cuGraphDestroy");
    assert_int_equal(end(stream, &graph), 0);
    assert_int_equal(instantiate(&executable, graph, 0), 0);
    assert_int_equal(destroy(graph), 0);
    return executable;
}

static inline void graph_launch(void *executable, void *stream)
{
    int (*launch)(void *, void *), (*synchronize)(void *);
    *(void **)&launch = test_driver("cuGraphLaunch");
    *(void **)&synchronize = test_driver("cuStreamSynchronize");
    assert_int_equal(launch(executable, stream), 0);
    assert_int_equal(synchronize(stream), 0);
}

static inline void graph_free(void *executable, void *stream)
{
    int (*destroy)(void *), (*destroy_stream)(void *);
    *(void **)&destroy = test_driver("cuGraphExecDestroy");
    *(void **)&destroy_stream = test_driver("cuStreamDestroy_v2");
    assert_int_equal(destroy(executable), 0);
    assert_int_equal(destroy_stream(stream), 0);
}

#endif
