/* cuda.h - a GPU through NVIDIA's driver, which is opened at run time: memory, copies, graphs, times and
 * the few kernels that measure it. All work goes to one stream. Every function dies on failure.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_TOOLS_CUDA_H
#define QKV_TOOLS_CUDA_H

#include <stddef.h>
#include <stdint.h>

typedef struct cuda cuda;
typedef struct cuda_graph cuda_graph;
typedef struct cuda_kernel cuda_kernel;

/* Opens device `ordinal`: its primary context, which the library uses too, is current from here on. */
cuda *cuda_open(int ordinal);
void cuda_close(cuda *c);

const char *cuda_name(const cuda *c); /* "NVIDIA H100 80GB HBM3" */
int cuda_driver(const cuda *c);       /* 1000 major + 10 minor of the CUDA that the driver brings */
int cuda_num_sms(const cuda *c);
size_t cuda_l2_bytes(const cuda *c);
size_t cuda_free_bytes(const cuda *c); /* of memory */
void *cuda_stream(const cuda *c);

/* ---- memory -------------------------------------------------------------------------------- */

/* bytes as a double: products of sizes do not overflow before they are checked. */
void *cuda_alloc(cuda *c, double bytes);
void cuda_free(cuda *c, void *p);

/* To or from the device, or within it; done on return but for copies within. */
void cuda_copy(cuda *c, void *to, const void *from, size_t bytes);
void cuda_set(cuda *c, void *to, unsigned char byte, size_t bytes);
/* Repeats the first bytes until all are written. */
void cuda_repeat(cuda *c, void *p, size_t first_bytes, size_t bytes);
void cuda_wait(cuda *c);

/* ---- time ---------------------------------------------------------------------------------- */

/* What is enqueued between the two becomes a graph. */
void cuda_capture(cuda *c);
cuda_graph *cuda_captured(cuda *c);
void cuda_graph_free(cuda *c, cuda_graph *graph);
void cuda_replay(cuda *c, cuda_graph *graph);

/* Marks in the stream, of which there are so many, and the seconds on the device from one to another,
 * which it waits for. */
enum { CUDA_MARKS = 128 };
void cuda_mark(cuda *c, int i);
double cuda_between(cuda *c, int first, int last);

/* ---- kernels ------------------------------------------------------------------------------- */

/* A kernel of PTX text, which stays loaded; NULL: the driver does not take it. */
cuda_kernel *cuda_load(cuda *c, const char *ptx, const char *name);
void cuda_launch(cuda *c, cuda_kernel *kernel, unsigned grid, unsigned block, void **arguments);

#endif
