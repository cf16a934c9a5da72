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

#include "driver.h"
#include "fiber.h"
#include "shared.h"

typedef struct thread {
    emulator_index index;
    fiber_place place;
    unsigned mask; /* of the collective that it waits in */
    emulator_op op;
    copies copies;
    const void *awaits; /* of grid_sleep() */
} thread;

typedef struct warp {
    thread threads[LANES];
    void *operands[LANES];
    unsigned live, ready,
        collective; /* lanes: not ended, able to run, waiting for others of the warp */
    unsigned at[NUM_BARRIERS + 1]; /* waiting for others of the block; the last: for their turn */
    unsigned asleep;               /* by grid_sleep() */
} warp;

emulator_machine machine;

static warp warps[MAX_WARPS];
static unsigned num_threads, num_warps, num_live;
static unsigned ready_warps;                /* with lanes that are ready */
static unsigned arrived[NUM_BARRIERS + 1];  /* threads, at a barrier */
static unsigned expected[NUM_BARRIERS + 1]; /* there, as the first of them has it; 0: all */
static unsigned num_pauses;                 /* since anybody got further */
static unsigned current_warp, current_lane;
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
    fprintf(stderr,
            ", thread %u: ", blamed == NOBODY ? current_warp * LANES + current_lane : blamed);
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

/* Nobody can go on. */
static _Noreturn void report_deadlock(void)
{
    say_where();
    fprintf(stderr, ": threads wait for ever:\n");
    for (unsigned w = 0; w < num_warps; w++) {
        const warp *at = &warps[w];
        if (at->live == 0) continue;
        fprintf(stderr, "emulator:   warp %u:", w);
        for (unsigned b = 0; b <= NUM_BARRIERS; b++)
            if (at->at[b]) fprintf(stderr, " lanes %08x at barrier %u;", at->at[b], b);
        report_asleep(at);
        if (at->ready) fprintf(stderr, " lanes %08x look again and again;", at->ready);
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
    if (lanes == 0) return;
    ready_warps |= 1u << w;
    num_pauses = 0;
}

/* Marks the running thread as one that waits; resume() then finds another. */
static void make_wait(void)
{
    warp *w = &warps[current_warp];
    w->ready &= ~(1u << current_lane);
    if (w->ready == 0) ready_warps &= ~(1u << current_warp);
}

static const fiber_place *go_to(unsigned w, unsigned lane)
{
    current_warp = w;
    current_lane = lane;
    machine.thread = &warps[w].threads[lane].index;
    return &warps[w].threads[lane].place;
}

static const fiber_place *choose(void)
{
    while (ready_warps == 0)
        if (!wgmma_perform_awaited() && !tensor_perform_awaited()) return &outside;
    unsigned w = current_warp;
    if (grid_is_random() || !(ready_warps >> current_warp & 1)) {
        const unsigned later = ready_warps & ~0u << current_warp;
        w = pick(later && !grid_is_random() ? later : ready_warps);
    }
    return go_to(w, pick(warps[w].ready));
}

/* Goes on with a thread that is ready; returns when the running one is, and is chosen. */
static void resume(void)
{
    thread *self = &warps[current_warp].threads[current_lane];
    const fiber_place *next = choose();
    if (next != &self->place) fiber_switch(&self->place, next);
}

/* The thread after the running one, so that all come before one does again. */
static const fiber_place *choose_next(void)
{
    const unsigned lanes = warps[current_warp].ready & ~1u << current_lane;
    if (lanes) return go_to(current_warp, (unsigned)__builtin_ctz(lanes));
    const unsigned later = ready_warps & ~1u << current_warp;
    const unsigned w = (unsigned)__builtin_ctz(later ? later : ready_warps);
    return go_to(w, (unsigned)__builtin_ctz(warps[w].ready));
}

/* Products and copies go on while threads look again and again: nobody need be stuck for them to be due. */
void grid_pause(void)
{
    thread *self = &warps[current_warp].threads[current_lane];
    if (++num_pauses > MAX_PAUSES) report_deadlock();
    if (!wgmma_perform_awaited()) tensor_perform_awaited();
    const fiber_place *next = grid_is_random() ? choose() : choose_next();
    if (next != &self->place) fiber_switch(&self->place, next);
}

void grid_sleep(const void *at)
{
    warps[current_warp].threads[current_lane].awaits = at;
    warps[current_warp].asleep |= 1u << current_lane;
    make_wait();
    resume();
}

void grid_wake(const void *at)
{
    num_pauses = 0;
    for (unsigned w = 0; w < num_warps; w++)
        for (unsigned rest = warps[w].asleep; rest; rest &= rest - 1) {
            const unsigned lane = (unsigned)__builtin_ctz(rest);
            if (warps[w].threads[lane].awaits != at) continue;
            warps[w].asleep &= ~(1u << lane);
            make_ready(w, 1u << lane);
        }
}

void grid_blame(unsigned number)
{
    blamed = number;
}

unsigned grid_warp(void)
{
    return current_warp;
}

unsigned grid_lane(void)
{
    return current_lane;
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
    if (barrier > NUM_BARRIERS || threads % LANES)
        grid_fault("barrier %u for %u threads", barrier, threads);
    if (arrived[barrier] == 0) expected[barrier] = threads;
    if (expected[barrier] != threads)
        grid_fault("barrier %u for %u threads, where others wait for %u", barrier, threads,
                   expected[barrier]);
    if (++arrived[barrier] >= (threads ? threads : num_live)) {
        release(barrier);
        if (grid_is_random()) resume();
        return;
    }
    if (!waits) return;
    warps[current_warp].at[barrier] |= 1u << current_lane;
    make_wait();
    resume();
}

/* ---- the launch before ------------------------------------------------------------------------ */

static emulator_launch_before *before_this;
static void *user_of_before;
static bool has_ended; /* for the running block */

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
        copies_perform(&warps[i / LANES].threads[i % LANES].copies);
    before_this(user_of_before, 1);
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
    num_pauses = 0;
    wgmma_end_thread();
    make_wait();
    if (arrived[0] > 0 && arrived[0] == num_live) release(0);
    for (unsigned rest = w->collective; rest; rest &= (rest - 1) & w->collective)
        try_collective(current_warp, (unsigned)__builtin_ctz(rest));
    fiber_place nowhere;
    fiber_switch(&nowhere, choose());
    abort(); /* nobody comes back here */
}

/* The running launch's: tensor maps in it are aligned. */
static _Alignas(64) char params[MAX_PARAMS];

static void thread_main(void)
{
    launch->kernel->run(params);
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
            w->collective = w->asleep = 0;
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
    num_pauses = 0;
    blamed = NOBODY;
    current_warp = 0;
    mbarrier_begin();
    tensor_begin();
    wgmma_begin();
    shared_begin(launch->module, launch->shared_bytes);
    machine.shared = shared_dynamic();
    has_ended = false;
    if (before_this) before_this(user_of_before, 0);
}

static void run_block(void)
{
    begin_block();
    fiber_switch(&outside, choose());
    if (num_live > 0) report_deadlock();
    const char *wrong = shared_check();
    if (!wrong) wrong = tensor_check();
    if (wrong) grid_fault("%s", wrong);
}

bool grid_is_shared(const void *p, size_t bytes)
{
    return shared_has(launch->module, p, bytes);
}

static unsigned shared_offset(const void *p)
{
    if (!grid_is_shared(p, 1) || (const char *)p < shared_window() ||
        (const char *)p >= shared_window() + SHARED_ROOM)
        grid_fault("%p is not dynamic shared memory", p);
    return (unsigned)((const char *)p - shared_window());
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
    memcpy(params, l->params, l->kernel->params_bytes);
    num_threads = l->block.x * l->block.y * l->block.z;
    num_warps = (num_threads + LANES - 1) / LANES;
    machine.grid_dim = l->grid;
    machine.block_dim = l->block;
    machine.shared_bytes = l->shared_bytes;
    machine.sync_block = sync_block;
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
    machine.mbarrier_arrive = mbarrier_arrive;
    machine.mbarrier_test = mbarrier_test;
    machine.mbarrier_wait = mbarrier_wait;
    machine.tensor_load = tensor_load;
    machine.tensor_store = tensor_store;
    machine.tensor_await_stores = tensor_await_stores;
    machine.await_turn = await_turn;
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
