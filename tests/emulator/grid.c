/* grid.c - see grid.h. Threads are scheduled in the order of their numbers, a warp as long as it can go on,
 * or with QKV_EMULATOR_SEED at random wherever they wait; blocks likewise.
 * SPDX-License-Identifier: Apache-2.0 */
#include "grid.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fiber.h"
#include "shared.h"

typedef struct thread {
    emulator_index index;
    fiber_place place;
    unsigned mask; /* of the collective that it waits in */
    emulator_op op;
    copies copies;
} thread;

typedef struct warp {
    thread threads[LANES];
    void *operands[LANES];
    unsigned live, ready,
        collective;            /* lanes: not ended, able to run, waiting for others of the warp */
    unsigned at[NUM_BARRIERS]; /* waiting for others of the block */
} warp;

emulator_machine machine;

static warp warps[MAX_WARPS];
static unsigned num_threads, num_warps, num_live;
static unsigned ready_warps;           /* with lanes that are ready */
static unsigned arrived[NUM_BARRIERS]; /* threads, at a barrier */
static unsigned current_warp, current_lane;
static fiber_place outside;
static sigjmp_buf abandoned;
static const grid_launch *launch;
static bool running;

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

static void say_where(void)
{
    fprintf(stderr, "emulator: kernel %s, block (%u, %u, %u)", launch->name, machine.block.x,
            machine.block.y, machine.block.z);
}

_Noreturn void grid_fault(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    say_where();
    fprintf(stderr, ", thread %u: ", current_warp * LANES + current_lane);
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

/* Nobody can go on. */
static _Noreturn void report_deadlock(void)
{
    say_where();
    fprintf(stderr, ": threads wait for ever:\n");
    for (unsigned w = 0; w < num_warps; w++) {
        const warp *at = &warps[w];
        if (at->live == 0) continue;
        fprintf(stderr, "emulator:   warp %u:", w);
        for (unsigned b = 0; b < NUM_BARRIERS; b++)
            if (at->at[b]) fprintf(stderr, " lanes %08x at barrier %u;", at->at[b], b);
        for (unsigned rest = at->collective; rest; rest &= rest - 1) {
            const unsigned lane = (unsigned)__builtin_ctz(rest);
            const thread *t = &at->threads[lane];
            fprintf(stderr, " lane %u in %s for lanes %08x;", lane, warp_op_names[t->op], t->mask);
        }
        fprintf(stderr, "\n");
    }
    siglongjmp(abandoned, 1);
}

/* ---- scheduling ----------------------------------------------------------------------------- */

static void make_ready(unsigned w, unsigned lanes)
{
    warps[w].ready |= lanes;
    if (lanes) ready_warps |= 1u << w;
}

/* Marks the running thread as one that waits; resume() then finds another. */
static void make_wait(void)
{
    warp *w = &warps[current_warp];
    w->ready &= ~(1u << current_lane);
    if (w->ready == 0) ready_warps &= ~(1u << current_warp);
}

static const fiber_place *choose(void)
{
    if (ready_warps == 0) return &outside;
    if (grid_is_random() || !(ready_warps >> current_warp & 1)) {
        const unsigned later = ready_warps & ~0u << current_warp;
        current_warp = pick(later && !grid_is_random() ? later : ready_warps);
    }
    current_lane = pick(warps[current_warp].ready);
    machine.thread = &warps[current_warp].threads[current_lane].index;
    return &warps[current_warp].threads[current_lane].place;
}

/* Goes on with a thread that is ready; returns when the running one is, and is chosen. */
static void resume(void)
{
    thread *self = &warps[current_warp].threads[current_lane];
    const fiber_place *next = choose();
    if (next != &self->place) fiber_switch(&self->place, next);
}

static void yield(void)
{
    warp *w = &warps[current_warp];
    const unsigned lane = current_lane, self = 1u << lane;
    thread *before = &w->threads[lane];
    if (grid_is_random()) {
        resume();
        return;
    }
    make_wait(); /* the others first, each up to where it waits */
    if (ready_warps == 0) {
        make_ready(current_warp, self);
        return;
    }
    const unsigned of_warp = current_warp;
    const fiber_place *next = choose();
    make_ready(of_warp, self);
    fiber_switch(&before->place, next);
}

copies *grid_copies(void)
{
    return &warps[current_warp].threads[current_lane].copies;
}

/* ---- barriers ------------------------------------------------------------------------------- */

static void release(unsigned barrier)
{
    for (unsigned w = 0; w < num_warps; w++) {
        make_ready(w, warps[w].at[barrier]);
        warps[w].at[barrier] = 0;
    }
    arrived[barrier] = 0;
    if (barrier == 0) {
        machine.vote_result = machine.votes;
        machine.votes = 0;
    }
}

static void sync_block(unsigned barrier, unsigned threads, int waits)
{
    if (barrier >= NUM_BARRIERS || threads % LANES)
        grid_fault("barrier %u for %u threads", barrier, threads);
    const unsigned expected = threads ? threads : num_live;
    if (++arrived[barrier] >= expected) {
        release(barrier);
        if (grid_is_random()) resume();
        return;
    }
    if (!waits) return;
    warps[current_warp].at[barrier] |= 1u << current_lane;
    make_wait();
    resume();
}

/* ---- warps ---------------------------------------------------------------------------------- */

/* Performs the collective that a lane waits in, if all of its lanes that have not ended do. */
static bool try_collective(unsigned of_warp, unsigned lane)
{
    warp *w = &warps[of_warp];
    const unsigned mask = w->threads[lane].mask, lanes = mask & w->live;
    const emulator_op op = w->threads[lane].op;
    if ((w->collective & lanes) != lanes) return false;
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const thread *other = &w->threads[__builtin_ctz(rest)];
        if (other->op != op || other->mask != mask) return false;
    }
    warp_perform(op, w->operands, lanes);
    w->collective &= ~lanes;
    make_ready(of_warp, lanes);
    return true;
}

static void sync_warp(unsigned mask, emulator_op op, void *operands)
{
    warp *w = &warps[current_warp];
    thread *t = &w->threads[current_lane];
    if (!(mask >> current_lane & 1))
        grid_fault("%s for lanes %08x, which this one is not of", warp_op_names[op], mask);
    t->mask = mask;
    t->op = op;
    w->operands[current_lane] = operands;
    w->collective |= 1u << current_lane;
    if (try_collective(current_warp, current_lane)) {
        if (grid_is_random()) resume();
        return;
    }
    make_wait();
    resume();
}

/* ---- blocks --------------------------------------------------------------------------------- */

/* A thread's last step. Others may have waited for it alone. */
static _Noreturn void end_thread(void)
{
    warp *w = &warps[current_warp];
    w->live &= ~(1u << current_lane);
    num_live--;
    make_wait();
    if (arrived[0] > 0 && arrived[0] == num_live) release(0);
    for (unsigned rest = w->collective; rest; rest &= (rest - 1) & w->collective)
        try_collective(current_warp, (unsigned)__builtin_ctz(rest));
    fiber_place nowhere;
    fiber_switch(&nowhere, choose());
    abort(); /* nobody comes back here */
}

static void thread_main(void)
{
    launch->kernel->run(launch->params);
    end_thread();
}

static void begin_block(void)
{
    const emulator_index size = launch->block;
    for (unsigned i = 0; i < num_warps * LANES; i++) {
        warp *w = &warps[i / LANES];
        thread *t = &w->threads[i % LANES];
        if (i % LANES == 0) {
            const unsigned left = num_threads - i;
            w->live = left >= LANES ? ~0u : (1u << left) - 1;
            w->ready = w->live;
            w->collective = 0;
            memset(w->at, 0, sizeof w->at);
        }
        if (i >= num_threads) break;
        t->index = (emulator_index){i % size.x, i / size.x % size.y, i / size.x / size.y};
        t->place = fiber_begin(fiber_stack(i), thread_main);
        copies_begin(&t->copies);
    }
    num_live = num_threads;
    ready_warps = num_warps == 32 ? ~0u : (1u << num_warps) - 1;
    memset(arrived, 0, sizeof arrived);
    machine.votes = 0;
    current_warp = 0;
    shared_begin(launch->module, launch->shared_bytes);
    machine.shared = shared_dynamic();
}

static void run_block(void)
{
    begin_block();
    fiber_switch(&outside, choose());
    if (num_live > 0) report_deadlock();
    const char *wrong = shared_check();
    if (wrong) grid_fault("%s", wrong);
}

bool grid_is_shared(const void *p, size_t bytes)
{
    return shared_has(launch->module, p, bytes);
}

/* The i-th block to run of n, by a permutation: i * step + first, where step and n have no common divisor. */
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

static void run_blocks(void)
{
    const emulator_index g = launch->grid;
    const uint64_t n = (uint64_t)g.x * g.y * g.z;
    const uint64_t step = grid_is_random() ? choose_step(n) : 1;
    const uint64_t first =
        grid_is_random() ? grid_random((unsigned)(n < 1u << 30 ? n : 1u << 30)) : 0;
    for (uint64_t i = 0; i < n; i++) {
        const uint64_t at = permute(i, n, step, first);
        machine.block = (emulator_index){(unsigned)(at % g.x), (unsigned)(at / g.x % g.y),
                                         (unsigned)(at / g.x / g.y)};
        run_block();
    }
}

bool grid_run(const grid_launch *l)
{
    struct sigaction before[NUM_SIGNALS];
    stack_t stack_before;
    read_seed();
    launch = l;
    num_threads = l->block.x * l->block.y * l->block.z;
    num_warps = (num_threads + LANES - 1) / LANES;
    machine.grid_dim = l->grid;
    machine.block_dim = l->block;
    machine.shared_bytes = l->shared_bytes;
    machine.sync_block = sync_block;
    machine.sync_warp = sync_warp;
    machine.pause = yield;
    machine.copy_async = copies_add;
    machine.commit_group = copies_commit;
    machine.wait_group = copies_wait;
    machine.fault = fault;
    *l->module->machine = &machine;
    catch_signals(before, &stack_before);
    const bool whole = sigsetjmp(abandoned, 1) == 0;
    running = true;
    if (whole) run_blocks();
    running = false;
    restore_signals(before, &stack_before);
    return whole;
}
