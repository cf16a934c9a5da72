/* test_cluster.c - launches of clusters, and kern/cuda/cluster.cuh: ranks, other blocks' shared memory, barriers; what
 * is refused. On the emulated GPU also that it finds what a kernel does wrong.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cluster_params.h"
#include "device/cuda.h"
#include "gpu_process.h"

static int arch; /* of the GPU, 90 for compute capability 9.0; 0: none */

/* ---- in a process ----------------------------------------------------------------------------- */

static int report_arch(const void *unused)
{
    (void)unused;
    return 10 * attribute(CU_DEVICE_MAJOR) + attribute(CU_DEVICE_MINOR);
}

/* Compiled once for all processes on the emulated GPU; NVIDIA's compiler may open the driver, after which no process
 * that forks off can. */
static void *image(void)
{
    static void *compiled;
    char level[QI_ARCH_BYTES];
    qi_nvrtc_level(qi_nvrtc_find(0), arch / 10, arch % 10, level);
    if (!compiled) compiled = compile_kernels("cluster.cu", "cluster_params.h", level, "");
    return compiled;
}

static qi_cuda_device *device(void)
{
    static qi_cuda_device d;
    if (!d.context) MUST((int)qi_cuda_open(0, &d));
    return &d;
}

static qkv_status launch(const char *name, qi_grid grid, const cluster_params *p)
{
    const char *error;
    void *library, *kernel;
    cu_function function;
    MUST((int)qi_cuda_load_image(image(), &library, &error));
    MUST((int)qi_cuda_find(library, name, &kernel));
    MUST((int)qi_cuda_function(device(), kernel, &function));
    grid.threads = THREADS;
    QI_TRY(qi_cuda_launch(device(), function, &grid, p, NULL));
    return qi_cuda_wait(device(), NULL);
}

/* ---- exchange ----------------------------------------------------------------------------------- */

typedef struct exchange_case {
    const char *why;
    qi_grid grid;
    i32 rounds, mode;
} exchange_case;

static i32 blocks_of(const qi_grid *g)
{
    return (i32)(g->x * (g->y ? g->y : 1) * (g->z ? g->z : 1));
}

static i32 expected(i32 block, i32 size, i32 round, i32 thread)
{
    const i32 rank = block % size, first = block - rank;
    i32 sum = 0;
    for (i32 r = 0; r < size; r++) {
        sum += message(first + r, rank, thread, round) +
               notice(first + r, (thread + r) % THREADS, round);
        for (i32 t = 0; t < THREADS; t++)
            for (i32 before = 0; before <= round; before++) sum += share(first + r, t, before);
    }
    for (i32 t = 0; t < THREADS; t++) sum += votes(block, t);
    return sum;
}

static int run_exchange(const void *argument)
{
    const exchange_case *c = argument;
    const i32 blocks = blocks_of(&c->grid), size = c->grid.cluster ? (i32)c->grid.cluster : 1;
    if (size > qi_cuda_most_clustered(device())) return SUCCEEDED;
    const size_t bytes = (size_t)(blocks * c->rounds * THREADS) * sizeof(i32);
    const cluster_params p = {.out = device_memory(bytes, NULL),
                              .cluster_size = size,
                              .rounds = c->rounds,
                              .mode = c->mode};
    qi_grid grid = c->grid;
    grid.shared_bytes = (u32)(size * THREADS) * (u32)sizeof(i32);
    MUST((int)launch("exchange", grid, &p));
    i32 *out = malloc(bytes);
    read_back(out, p.out, bytes);
    for (i32 i = 0; i < blocks * c->rounds * THREADS; i++) {
        const i32 thread = i % THREADS, round = i / THREADS % c->rounds;
        const i32 block = i / THREADS / c->rounds, want = expected(block, size, round, thread);
        if (out[i] == want) continue;
        fprintf(stderr, "block %d, round %d, thread %d: got %d, want %d\n", block, round, thread,
                out[i], want);
        return FAILED;
    }
    return SUCCEEDED;
}

static void blocks_reach_each_other(void **state)
{
    (void)state;
    static const exchange_case cases[] = {
        {"no clusters", {.x = 3}, 3, NOTHING},
        {"clusters of one", {.x = 3, .cluster = 1}, 3, NOTHING},
        {"one of two", {.x = 2, .cluster = 2}, 5, NOTHING},
        {"of four, of a grid of three axes", {.x = 12, .y = 2, .z = 2, .cluster = 4}, 3, NOTHING},
        {"the largest of all GPUs", {.x = 16, .cluster = 8}, 5, NOTHING},
        {"of 16, where there are", {.x = 32, .cluster = 16}, 2, NOTHING},
        {"with overlap", {.x = 8, .cluster = 2, .overlaps_before = 1}, 2, NOTHING},
    };
    if (arch < 90) skip();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (int seed = 0; seed < 5; seed++) {
            const outcome out = run_process(run_exchange, &cases[i], seed);
            expect_success(cases[i].why, &out);
        }
}

static void a_missing_barrier_is_found(void **state)
{
    (void)state;
    if (arch < 90 || !test_is_emulated()) skip();
    for (i32 mode = FORGETS_BEFORE; mode <= FORGETS_AFTER; mode++) {
        const exchange_case c = {"", {.x = 4, .cluster = 4}, 2, mode};
        bool found = false;
        for (int seed = 0; seed < 8 && !found; seed++)
            found = run_process(run_exchange, &c, seed).code == FAILED;
        if (!found) fail_msg("mode %d: not found", (int)mode);
    }
}

/* ---- faults ----------------------------------------------------------------------------------- */

static int run_fault(const void *argument)
{
    const cluster_params p = {.out = device_memory(THREADS * sizeof(i32), NULL),
                              .mode = *(const i32 *)argument};
    const qi_grid grid = {.x = 2, .cluster = 2, .shared_bytes = THREADS * sizeof(i32)};
    return launch("fault", grid, &p) == QKV_OK ? SUCCEEDED : FAILED;
}

static void faults_are_told(void **state)
{
    (void)state;
    static const struct {
        i32 mode;
        const char *text;
    } faults[] = {
        {FAULT_ARRIVES_TWICE, "a cluster_wait for the last one is missing"},
        {FAULT_WAITS_ALONE, "cluster_wait without a cluster_arrive"},
        {FAULT_NOT_SHARED, "is not this block's shared memory"},
        {FAULT_NO_SUCH_BLOCK, "cluster_at: block 2 of a cluster of 2"},
        {FAULT_NOT_ALL_ARRIVE, "lanes 00000001 at barrier 0; lanes ffffff9e at the cluster's"},
        {FAULT_NOT_ALL_ARRIVE, "block (1, 0, 0): threads wait for ever"},
        {FAULT_READS_AFTER_END, "shared memory of a block of the cluster that has ended"},
        {FAULT_WRITES_AFTER_END, "wrote to its shared memory after it had ended"},
        {FAULT_USES_FIRST, "cluster_at: block 1, before the first barrier of the cluster"},
        {FAULT_USES_LAST, "used its shared memory after the last barrier of the cluster"},
    };
    if (arch < 90 || !test_is_emulated()) skip();
    const i32 none = FAULT_NONE;
    const outcome right = run_process(run_fault, &none, 0);
    expect_success("nothing wrong", &right);
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++) {
        const outcome out = run_process(run_fault, &faults[i].mode, 0);
        if (out.code != FAILED || !strstr(out.said, faults[i].text))
            fail_msg("\"%s\": exit code %d: %s", faults[i].text, out.code, out.said);
    }
}

/* ---- refusals --------------------------------------------------------------------------------- */

static void older_devices_are_refused(void **state)
{
    (void)state;
    const qi_cuda_device old = {.major = 8, .minor = 6};
    const qi_grid grid = {.x = 2, .threads = THREADS, .cluster = 2};
    EXPECT_FAIL(QKV_ERR_UNSUPPORTED, "9.0 or newer for clusters, got 8.6",
                qi_cuda_launch(&old, NULL, &grid, NULL, NULL));
}

/* Each leaves the device as it was: the last launch is right. */
static int run_refusals(const void *unused)
{
    (void)unused;
    static const qi_grid grids[] = {
        {.x = 34, .cluster = 17}, {.x = 3, .cluster = 2}, {.x = 2, .cluster = 4}};
    const cluster_params p = {.out = device_memory(THREADS * sizeof(i32), NULL)};
    for (size_t i = 0; i < sizeof grids / sizeof grids[0]; i++)
        if (launch("alone", grids[i], &p) != QKV_ERR_DEVICE) {
            fprintf(stderr, "%u blocks in clusters of %u: not refused\n", grids[i].x,
                    grids[i].cluster);
            return FAILED;
        }
    MUST((int)launch("alone", (qi_grid){.x = 4, .cluster = 2}, &p));
    return SUCCEEDED;
}

/* The library does not ask such a one; kernels without clusters run. */
static int run_old_driver(const void *unused)
{
    (void)unused;
    const cluster_params p = {.out = device_memory(THREADS * sizeof(i32), NULL)};
    MUST((int)launch("alone", (qi_grid){.x = 2, .cluster = 1}, &p));
    device()->major = 12;
    const qkv_status status = launch("alone", (qi_grid){.x = 2, .cluster = 2}, &p);
    return status == QKV_ERR_DEVICE && strstr(qkv_last_error(), "not supported") ? SUCCEEDED
                                                                                 : FAILED;
}

static void the_driver_refuses_other_clusters(void **state)
{
    (void)state;
    if (arch == 0) skip();
    const outcome out = run_process(arch < 90 ? run_old_driver : run_refusals, NULL, 0);
    expect_success("refusals", &out);
}

/* ---- compilation ------------------------------------------------------------------------------ */

/* By NVIDIA's compiler, where there is one; older GPUs take the file as long as they use nothing of it. */
static void kernels_compile_for_every_generation(void **state)
{
    (void)state;
    static const char *const levels[] = {"sm_80", "sm_90a", "sm_100a", "sm_120a"};
    if (arch || !qi_nvrtc_find(0)) skip();
    for (size_t i = 0; i < sizeof levels / sizeof levels[0]; i++)
        free(compile_kernels("cluster.cu", "cluster_params.h", levels[i], ""));
}

/* ---- main ------------------------------------------------------------------------------------- */

int main(void)
{
    if (test_on_cuda()) {
        arch = run_process(report_arch, NULL, 0).code;
        if (test_is_emulated()) image();
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(older_devices_are_refused),
        cmocka_unit_test(the_driver_refuses_other_clusters),
        cmocka_unit_test(blocks_reach_each_other),
        cmocka_unit_test(a_missing_barrier_is_found),
        cmocka_unit_test(faults_are_told),
        cmocka_unit_test(kernels_compile_for_every_generation),
    };
    return cmocka_run_group_tests_name("cluster", tests, NULL, NULL);
}
