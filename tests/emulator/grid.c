/* grid.c - see grid.h. Threads are scheduled in the order of their numbers, a block and in it a warp as long as it
 * can go on, or with QKV_EMULATOR_SEED at random wherever they wait; clusters likewise. A block without a cluster is
 * one of a single block.
 * SPDX-License-Identifier: Apache-2.0 */
#include "grid.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"
#include "fiber.h"
#include "shared.h"

typedef struct thread {
    emulator_index index;
    fiber_place place;
    unsigned mask; /* of the collective that it waits in */
    emulator_op op;
    copies copies;
    const void *awaits;    /* of grid_sleep() */
    unsigned came_to;      /* the last of the cluster's barriers that it has arrived at */
    bool has_waited_there; /* or had none */
} thread;

typedef struct warp {
    thread threads[LANES];
    void *operands[LANES];
    unsigned live, ready,
        collective; /* lanes: not ended, able to run, waiting for others of the warp */
    unsigned at[NUM_BARRIERS + 1]; /* waiting for others of the block; the last: for their turn */
    unsigned at_cluster;           /* waiting for others of the cluster */
    unsigned asleep;               /* by grid_sleep() */
} warp;

typedef struct block {
    emulator_index index;
    warp warps[MAX_WARPS];
    unsigned num_live;
    unsigned ready_warps;                /* with lanes that are ready */
    unsigned arrived[NUM_BARRIERS + 1];  /* threads, at a barrier */
    unsigned expected[NUM_BARRIERS + 1]; /* there, as the first of them has it; 0: all */
    unsigned votes, vote_result;         /* sums of what threads bring to barrier 0 */
    /* Barriers that the cluster had met when another block last used its shared memory, 0: none did; when it ended. */
    unsigned used_at, ended_at;
} block;

emulator_machine machine;

static block blocks[MAX_CLUSTER];
static unsigned num_blocks, num_warps, num_threads; /* of the cluster; of each block */
static unsigned ready_blocks;                       /* with warps that are ready */
static unsigned num_arrived, num_met; /* threads at the cluster's barrier; those that are over */
static unsigned num_pauses;           /* since anybody got further */
static unsigned current_block, current_warp, current_lane; /* of the running thread */
static warp *here;
static thread *self;
static unsigned blamed;
static fiber_place outside;
static sigjmp_buf abandoned;
static const grid_launch *launch;
static bool running;

enum { MAX_PAUSES = 1 << 24 };

/* ---- chance ------------------------------------------------------------------------------- */

static uint64_t random_state;

bool grid_is_random(void)
{
    return random_state != 0;
}

unsigned grid_random(unsigned n)
{
    random_state ^= random_state << 13; /* xorshift64 */
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)((random_state >> 32) * n >> 32);
}

static void read_seed(void)
{
    static bool read;
    const char *seed = getenv("QKV_EMULATOR_SEED");
    if (!read && seed && *seed)
        random_state = (strtoull(seed, NULL, 0) + 1) * 0x9e3779b97f4a7c15u | 1;
    read = true;
}

/* One of the bits of mask, which has one at least. */
static unsigned pick(unsigned mask)
{
    if (grid_is_random())
        for (unsigned skip = grid_random((unsigned)__builtin_popcount(mask)); skip > 0; skip--)
            mask &= mask - 1;
    return (unsigned)__builtin_ctz(mask);
}

/* ---- errors ------------------------------------------------------------------------------- */

/* The block whose shared memory and errors are meant. */
static unsigned meant_block(void)
{
    return blamed == NOBODY ? current_block : blamed / MAX_THREADS;
}

static void say_where(void)
{
    const emulator_index at = blocks[meant_block()].index;
    fprintf(stderr, "emulator: kernel %s, block (%u, %u, %u)", launch->name, at.x, at.y, at.z);
}

_Noreturn void grid_fault(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    say_where();
    fprintf(stderr, ", thread %u: ",
            blamed == NOBODY ? current_warp * LANES + current_lane : blamed % MAX_THREADS);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    siglongjmp(abandoned, 1);
}

static void fault(const char *what)
{
    grid_fault("%s", what);
}

static void on_signal(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (!running) { /* another thread's */
        signal(number, SIG_DFL);
        raise(number);
    }
    grid_fault("%s at address %p%s",
               number == SIGILL ? "misaligned access, or a number out of range" : strsignal(number),
               info->si_addr, shared_describe(info->si_addr));
}

enum { NUM_SIGNALS = 4, ALTERNATE_BYTES = 64 << 10 };
static const int signals[NUM_SIGNALS] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};

/* Catches what a thread does wrong, on a stack of its own: the thread's may be what ran out. */
static void catch_signals(struct sigaction before[NUM_SIGNALS], stack_t *stack_before)
{
    static char alternate[ALTERNATE_BYTES];
    const stack_t stack = {.ss_sp = alternate, .ss_size = sizeof alternate};
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    sigaltstack(&stack, stack_before);
    for (int i = 0; i < NUM_SIGNALS; i++) sigaction(signals[i], &action, &before[i]);
}

static void restore_signals(const struct sigaction before[NUM_SIGNALS], const stack_t *stack_before)
{
    for (int i = 0; i < NUM_SIGNALS; i++) sigaction(signals[i], &before[i], NULL);
    sigaltstack(stack_before, NULL);
}

/* Lanes that wait for the same are reported together. */
static void report_asleep(const warp *w)
{
    for (unsigned rest = w->asleep, lanes; rest; rest &= ~lanes) {
        const void *what = w->threads[__builtin_ctz(rest)].awaits;
        char text[160];
        lanes = 0;
        for (unsigned l = 0; l < LANES; l++)
            if (rest >> l & 1 && w->threads[l].awaits == what) lanes |= 1u << l;
        if (wgmma_is_awaited(what))
            snprintf(text, sizeof text,
                     "products (wgmma) that not all warps of theirs have committed");
        else
            mbarrier_describe(what, text, sizeof text);
        fprintf(stderr, " lanes %08x at %s;", lanes, text);
    }
}

static void report_block(unsigned number)
{
    blamed = number * MAX_THREADS;
    say_where();
    fprintf(stderr, ": threads wait for ever:\n");
    for (unsigned w = 0; w < num_warps; w++) {
        const warp *at = &blocks[number].warps[w];
        if (at->live == 0) continue;
        fprintf(stderr, "emulator:   warp %u:", w);
        for (unsigned b = 0; b <= NUM_BARRIERS; b++)
            if (at->at[b]) fprintf(stderr, " lanes %08x at barrier %u;", at->at[b], b);
        if (at->at_cluster)
            fprintf(stderr, " lanes %08x at the cluster's barrier;", at->at_cluster);
        report_asleep(at);
        if (at->ready) fprintf(stderr, " lanes %08x look again and again;", at->ready);
        for (unsigned rest = at->collective; rest; rest &= rest - 1) {
            const unsigned lane = (unsigned)__builtin_ctz(rest);
            const thread *t = &at->threads[lane];
            fprintf(stderr, " lane %u in %s for lanes %08x;", lane, warp_op_names[t->op], t->mask);
        }
        fprintf(stderr, "\n");
    }
}

/* Nobody can go on. */
static _Noreturn void report_deadlock(void)
{
    for (unsigned b = 0; b < num_blocks; b++)
        if (blocks[b].num_live > 0) report_block(b);
    siglongjmp(abandoned, 1);
}

/* ---- scheduling ----------------------------------------------------------------------------- */

static void make_ready(unsigned b, unsigned w, unsigned lanes)
{
    blocks[b].warps[w].ready |= lanes;
    if (lanes == 0) return;
    blocks[b].ready_warps |= 1u << w;
    ready_blocks |= 1u << b;
    num_pauses = 0;
}

/* Marks the running thread as one that waits; resume() then finds another. */
static void make_wait(void)
{
    block *b = &blocks[current_block];
    here->ready &= ~(1u << current_lane);
    if (here->ready == 0) b->ready_warps &= ~(1u << current_warp);
    if (b->ready_warps == 0) ready_blocks &= ~(1u << current_block);
}

static void go_to_block(unsigned b)
{
    current_block = b;
    machine.rank = b;
    machine.block = blocks[b].index;
    machine.shared = shared_dynamic(b);
}

static const fiber_place *go_to(unsigned b, unsigned w, unsigned lane)
{
    if (b != current_block) go_to_block(b);
    current_warp = w;
    current_lane = lane;
    here = &blocks[b].warps[w];
    self = &here->threads[lane];
    machine.thread = &self->index;
    return &self->place;
}

/* One of the bits of mask: the current one if it is there, otherwise the next, round about; or any one. */
static unsigned pick_after(unsigned mask, unsigned current)
{
    const unsigned later = mask & ~0u << current;
    return pick(later && !grid_is_random() ? later : mask);
}

static const fiber_place *choose(void)
{
    while (ready_blocks == 0)
        if (!wgmma_perform_awaited() && !tensor_perform_awaited()) return &outside;
    const unsigned b = pick_after(ready_blocks, current_block);
    const unsigned w = pick_after(blocks[b].ready_warps, b == current_block ? current_warp : 0);
    return go_to(b, w, pick(blocks[b].warps[w].ready));
}

/* Goes on with a thread that is ready; returns when the running one is, and is chosen. */
static void resume(void)
{
    fiber_place *place = &self->place;
    const fiber_place *next = choose();
    if (next != place) fiber_switch(place, next);
}

/* The thread after the running one, so that all come before one does again. */
static const fiber_place *choose_next(void)
{
    const unsigned lanes = here->ready & ~1u << current_lane;
    if (lanes) return go_to(current_block, current_warp, (unsigned)__builtin_ctz(lanes));
    const unsigned later_warps = blocks[current_block].ready_warps & ~1u << current_warp;
    const unsigned later_blocks = ready_blocks & ~1u << current_block;
    const unsigned b = later_warps
                           ? current_block
                           : (unsigned)__builtin_ctz(later_blocks ? later_blocks : ready_blocks);
    const unsigned w = (unsigned)__builtin_ctz(later_warps ? later_warps : blocks[b].ready_warps);
    return go_to(b, w, (unsigned)__builtin_ctz(blocks[b].warps[w].ready));
}

/* Products and copies go on while threads look again and again: nobody need be stuck for them to be due. */
void grid_pause(void)
{
    fiber_place *place = &self->place;
    if (++num_pauses > MAX_PAUSES) report_deadlock();
    if (!wgmma_perform_awaited()) tensor_perform_awaited();
    const fiber_place *next = grid_is_random() ? choose() : choose_next();
    if (next != place) fiber_switch(place, next);
}

void grid_sleep(const void *at)
{
    self->awaits = at;
    here->asleep |= 1u << current_lane;
    make_wait();
    resume();
}

void grid_wake(const void *at)
{
    num_pauses = 0;
    for (unsigned i = 0; i < num_blocks * num_warps; i++) {
        const unsigned b = i / num_warps, of_block = i % num_warps;
        warp *w = &blocks[b].warps[of_block];
        for (unsigned rest = w->asleep; rest; rest &= rest - 1) {
            const unsigned lane = (unsigned)__builtin_ctz(rest);
            if (w->threads[lane].awaits != at) continue;
            w->asleep &= ~(1u << lane);
            make_ready(b, of_block, 1u << lane);
        }
    }
}

void grid_blame(unsigned number)
{
    blamed = number;
}

unsigned grid_warp(void)
{
    return current_block * MAX_WARPS + current_warp;
}

unsigned grid_lane(void)
{
    return current_lane;
}

copies *grid_copies(void)
{
    return &self->copies;
}

/* ---- barriers ------------------------------------------------------------------------------- */

static void release(unsigned barrier)
{
    block *b = &blocks[current_block];
    for (unsigned w = 0; w < num_warps; w++) {
        make_ready(current_block, w, b->warps[w].at[barrier]);
        b->warps[w].at[barrier] = 0;
    }
    b->arrived[barrier] = 0;
    if (barrier == 0) {
        b->vote_result = b->votes;
        b->votes = 0;
    }
}

static void sync_block(unsigned barrier, unsigned threads, int waits)
{
    block *b = &blocks[current_block];
    if (barrier > NUM_BARRIERS || threads % LANES)
        grid_fault("barrier %u for %u threads", barrier, threads);
    if (b->arrived[barrier] == 0) b->expected[barrier] = threads;
    if (b->expected[barrier] != threads)
        grid_fault("barrier %u for %u threads, where others wait for %u", barrier, threads,
                   b->expected[barrier]);
    if (++b->arrived[barrier] >= (threads ? threads : b->num_live)) {
        release(barrier);
        if (grid_is_random()) resume();
        return;
    }
    if (!waits) return;
    here->at[barrier] |= 1u << current_lane;
    make_wait();
    resume();
}

/* ---- the launch before ------------------------------------------------------------------------ */

static emulator_launch_before *before_this;
static void *user_of_before;
static bool has_ended; /* for the running cluster */

EXPORT void emulator_set_launch_before(emulator_launch_before *before, void *user)
{
    before_this = before;
    user_of_before = user;
}

/* What a block has asked for by then comes as memory is before that launch ends. */
static void await_turn(void)
{
    if (!before_this) return;
    sync_block(NUM_BARRIERS, num_threads, 1);
    if (has_ended) return;
    has_ended = true;
    tensor_perform_loads();
    for (unsigned i = 0; i < num_threads; i++)
        copies_perform(&blocks[current_block].warps[i / LANES].threads[i % LANES].copies);
    before_this(user_of_before, 1);
}

static unsigned count_block(unsigned vote)
{
    blocks[current_block].votes += vote;
    sync_block(0, 0, 1);
    return blocks[current_block].vote_result;
}

/* ---- clusters ------------------------------------------------------------------------------- */

static void check_clusters(void)
{
    if (device_arch() < 90) grid_fault("clusters, which sm_%u has not", device_arch());
}

/* Ends the cluster's barrier if all threads that are left have arrived. */
static void try_cluster(void)
{
    unsigned num_live = 0;
    if (num_arrived == 0) return;
    for (unsigned b = 0; b < num_blocks; b++) num_live += blocks[b].num_live;
    if (num_arrived < num_live) return;
    num_arrived = 0;
    num_met++;
    for (unsigned i = 0; i < num_blocks * num_warps; i++) {
        warp *w = &blocks[i / num_warps].warps[i % num_warps];
        make_ready(i / num_warps, i % num_warps, w->at_cluster);
        w->at_cluster = 0;
    }
}

static void cluster_arrive(void)
{
    check_clusters();
    if (!self->has_waited_there)
        grid_fault("cluster_arrive, where a cluster_wait for the last one is missing");
    self->came_to = num_met;
    self->has_waited_there = false;
    num_arrived++;
    try_cluster();
    if (grid_is_random()) resume();
}

static void cluster_wait(void)
{
    check_clusters();
    if (self->has_waited_there) grid_fault("cluster_wait without a cluster_arrive");
    self->has_waited_there = true;
    if (self->came_to < num_met) return;
    here->at_cluster |= 1u << current_lane;
    make_wait();
    resume();
}

static void *memory_of(const void *p, unsigned rank)
{
    check_clusters();
    if (rank >= num_blocks) grid_fault("cluster_at: block %u of a cluster of %u", rank, num_blocks);
    void *there = shared_at(p, current_block, rank);
    if (!there) grid_fault("cluster_at: %p is not this block's shared memory", p);
    if (rank == current_block) return there;
    if (num_met == 0 || (!self->has_waited_there && self->came_to == 0))
        grid_fault("cluster_at: block %u, before the first barrier of the cluster", rank);
    return there;
}

static void *cluster_at(const void *p, unsigned rank)
{
    void *const there = memory_of(p, rank);
    if (rank != current_block) blocks[rank].used_at = num_met;
    return there;
}

/* Needs no barrier of the cluster after it: the block is there as long as somebody in it waits for the bytes; so it
 * was for what its memory was used for before. */
static void store_async(void *p, unsigned long long value, void *barrier, unsigned rank)
{
    void *const there = memory_of(p, rank);
    if (blocks[rank].num_live == 0) grid_fault("store_async: block %u has ended", rank);
    blocks[rank].used_at = 0;
    memcpy(there, &value, sizeof value);
    mbarrier_complete(memory_of(barrier, rank), sizeof value);
}

/* ---- warps ---------------------------------------------------------------------------------- */

/* Performs the collective that a lane waits in, if all of its lanes that have not ended do. */
static bool try_collective(unsigned of_warp, unsigned lane)
{
    warp *w = &blocks[current_block].warps[of_warp];
    const unsigned mask = w->threads[lane].mask, lanes = mask & w->live;
    const emulator_op op = w->threads[lane].op;
    if ((w->collective & lanes) != lanes) return false;
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const thread *other = &w->threads[__builtin_ctz(rest)];
        if (other->op != op || other->mask != mask) return false;
    }
    warp_perform(op, w->operands, lanes);
    w->collective &= ~lanes;
    make_ready(current_block, of_warp, lanes);
    return true;
}

static void sync_warp(unsigned mask, emulator_op op, void *operands)
{
    if (!(mask >> current_lane & 1))
        grid_fault("%s for lanes %08x, which this one is not of", warp_op_names[op], mask);
    self->mask = mask;
    self->op = op;
    here->operands[current_lane] = operands;
    here->collective |= 1u << current_lane;
    if (try_collective(current_warp, current_lane)) {
        if (grid_is_random()) resume();
        return;
    }
    make_wait();
    resume();
}

/* ---- blocks --------------------------------------------------------------------------------- */

/* Nobody may use its shared memory any more. */
static void end_block(void)
{
    const char *wrong = shared_check(current_block);
    if (wrong) grid_fault("%s", wrong);
    blocks[current_block].ended_at = num_met;
    tensor_check(current_block);
    if (num_blocks > 1) shared_end(current_block);
}

/* A thread's last step. Others may have waited for it alone. */
static _Noreturn void end_thread(void)
{
    block *b = &blocks[current_block];
    here->live &= ~(1u << current_lane);
    num_pauses = 0;
    wgmma_end_thread();
    make_wait();
    if (--b->num_live == 0) end_block();
    if (!self->has_waited_there && self->came_to == num_met) num_arrived--;
    try_cluster();
    if (b->arrived[0] > 0 && b->arrived[0] == b->num_live) release(0);
    for (unsigned rest = here->collective; rest; rest &= (rest - 1) & here->collective)
        try_collective(current_warp, (unsigned)__builtin_ctz(rest));
    fiber_place nowhere;
    fiber_switch(&nowhere, choose());
    abort(); /* nobody comes back here */
}

/* The running launch's: tensor maps in it are aligned. */
static _Alignas(64) char params[MAX_PARAMS];

static void thread_main(void)
{
    launch->copies[current_block].kernel->run(params);
    end_thread();
}

_Static_assert(MAX_STACKS >= MAX_CLUSTER * MAX_THREADS, "each thread of a cluster has one");

static void begin_block(unsigned rank, emulator_index index)
{
    const emulator_index size = launch->block;
    block *b = &blocks[rank];
    for (unsigned i = 0; i < num_warps * LANES; i++) {
        warp *w = &b->warps[i / LANES];
        thread *t = &w->threads[i % LANES];
        if (i % LANES == 0) {
            const unsigned left = num_threads - i;
            w->live = left >= LANES ? ~0u : (1u << left) - 1;
            w->ready = w->live;
            w->collective = w->asleep = w->at_cluster = 0;
            memset(w->at, 0, sizeof w->at);
        }
        if (i >= num_threads) break;
        t->index = (emulator_index){i % size.x, i / size.x % size.y, i / size.x / size.y};
        t->place = fiber_begin(fiber_stack(rank * MAX_THREADS + i), thread_main);
        t->has_waited_there = true;
        copies_begin(&t->copies);
    }
    b->index = index;
    b->num_live = num_threads;
    b->ready_warps = num_warps == 32 ? ~0u : (1u << num_warps) - 1;
    memset(b->arrived, 0, sizeof b->arrived);
    b->votes = b->used_at = 0;
    shared_begin(rank, launch->copies[rank].module, launch->shared_bytes);
}

/* Block `first` and those after it in x. */
static void run_cluster(emulator_index first)
{
    for (unsigned b = 0; b < num_blocks; b++)
        begin_block(b, (emulator_index){first.x + b, first.y, first.z});
    ready_blocks = (1u << num_blocks) - 1;
    num_arrived = num_met = 0;
    num_pauses = 0;
    blamed = NOBODY;
    go_to_block(0);
    current_warp = 0;
    mbarrier_begin();
    tensor_begin();
    wgmma_begin(num_blocks);
    has_ended = false;
    if (before_this) before_this(user_of_before, 0);
    fiber_switch(&outside, choose());
    for (unsigned b = 0; b < num_blocks; b++)
        if (blocks[b].num_live > 0) report_deadlock();
    for (unsigned b = 0; b < num_blocks && num_blocks > 1; b++) {
        grid_blame(b * MAX_THREADS);
        const char *wrong = shared_check_ended(b);
        if (wrong) grid_fault("%s", wrong);
        if (blocks[b].used_at > 0 && blocks[b].used_at == blocks[b].ended_at)
            grid_fault(
                "another block used its shared memory after the last barrier of the cluster");
    }
}

bool grid_is_shared(const void *p, size_t bytes)
{
    return shared_has(meant_block(), p, bytes);
}

const char *grid_window(void)
{
    return shared_window(meant_block());
}

static unsigned shared_offset(const void *p)
{
    const char *window = grid_window();
    if (!grid_is_shared(p, 1) || (const char *)p < window ||
        (const char *)p >= window + SHARED_ROOM)
        grid_fault("%p is not dynamic shared memory", p);
    return (unsigned)((const char *)p - window);
}

/* The i-th cluster to run of n, by a permutation: i * step + first, where step and n have no common divisor. */
static uint64_t permute(uint64_t i, uint64_t n, uint64_t step, uint64_t first)
{
    return (i * step + first) % n; /* below 2^62 */
}

static uint64_t choose_step(uint64_t n)
{
    for (;;) {
        const uint64_t step = 1 + grid_random((unsigned)(n < 1u << 30 ? n : 1u << 30));
        uint64_t a = step, b = n;
        while (b) {
            const uint64_t rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1) return step;
    }
}

static void run_clusters(void)
{
    const emulator_index g = {launch->grid.x / num_blocks, launch->grid.y, launch->grid.z};
    const uint64_t n = (uint64_t)g.x * g.y * g.z;
    const uint64_t step = grid_is_random() ? choose_step(n) : 1;
    const uint64_t first =
        grid_is_random() ? grid_random((unsigned)(n < 1u << 30 ? n : 1u << 30)) : 0;
    for (uint64_t i = 0; i < n; i++) {
        const uint64_t at = permute(i, n, step, first);
        run_cluster((emulator_index){(unsigned)(at % g.x) * num_blocks, (unsigned)(at / g.x % g.y),
                                     (unsigned)(at / g.x / g.y)});
    }
}

bool grid_run(const grid_launch *l)
{
    struct sigaction before[NUM_SIGNALS];
    stack_t stack_before;
    read_seed();
    launch = l;
    memcpy(params, l->params, l->copies[0].kernel->params_bytes);
    num_blocks = l->cluster;
    num_threads = l->block.x * l->block.y * l->block.z;
    num_warps = (num_threads + LANES - 1) / LANES;
    machine.grid_dim = l->grid;
    machine.block_dim = l->block;
    machine.shared_bytes = l->shared_bytes;
    machine.sync_block = sync_block;
    machine.count_block = count_block;
    machine.cluster_arrive = cluster_arrive;
    machine.cluster_wait = cluster_wait;
    machine.cluster_at = cluster_at;
    machine.sync_warp = sync_warp;
    machine.pause = grid_pause;
    machine.copy_async = copies_add;
    machine.commit_group = copies_commit;
    machine.wait_group = copies_wait;
    machine.shared_offset = shared_offset;
    machine.wgmma = wgmma_add;
    machine.wgmma_commit = wgmma_commit;
    machine.wgmma_wait = wgmma_wait;
    machine.mbarrier_init = mbarrier_init;
    machine.mbarrier_inval = mbarrier_inval;
    machine.mbarrier_arrive = mbarrier_arrive;
    machine.store_async = store_async;
    machine.mbarrier_test = mbarrier_test;
    machine.mbarrier_wait = mbarrier_wait;
    machine.tensor_load = tensor_load;
    machine.tensor_store = tensor_store;
    machine.tensor_await_stores = tensor_await_stores;
    machine.await_turn = await_turn;
    machine.fault = fault;
    for (unsigned b = 0; b < num_blocks; b++) *l->copies[b].module->machine = &machine;
    catch_signals(before, &stack_before);
    const bool whole = sigsetjmp(abandoned, 1) == 0;
    running = true;
    if (whole) run_clusters();
    running = false;
    restore_signals(before, &stack_before);
    return whole;
}
