/* team.h - the tasks of a launch share its rows, and the chunks of a row where there are more tasks than rows.
 *
 * A task takes rows one by one. One that finds none left lends a hand: who runs a row opens each of its passes over
 * chunks, and whoever is free takes blocks of them. A task waits for nothing but a block that another has begun, so
 * that tasks may as well run one after the other. What a chunk gives is stored by chunk and added up as integers: the
 * same bits whoever did it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_SAMPLING_TEAM_H
#define QI_SAMPLING_TEAM_H

#include <sched.h>
#include <stdatomic.h>

#include "kern/abi.h"

enum {
    TEAM_SEATS = 32,    /* tasks whose passes are open to others */
    TEAM_BLOCK = 16,    /* chunks that are taken at a time */
    TEAM_PATIENCE = 512 /* looks around without work, after which a helper leaves: some 10 us */
};

/* A loop over chunks. */
typedef struct team_pass {
    void (*run)(void *arg, i64 begin, i64 end);
    void *arg;
    i64 chunks;
} team_pass;

typedef struct team_seat {
    _Alignas(64) _Atomic(const team_pass *) open; /* NULL: none */
    _Atomic i64 next;                             /* chunk of it that nobody has taken */
    _Atomic i32 helpers;                          /* who may look at it */
} team_seat;

typedef struct team {
    i64 rows;
    _Atomic i64 next_row, done;
    team_seat seats[TEAM_SEATS];
} team;

/* What a kernel whose tasks are a team is launched with. */
typedef struct team_launch {
    const void *params;
    team *team;
} team_launch;

/* As many tasks as find work in rows of so many tokens. */
static inline i64 team_tasks(i64 rows, i64 tokens)
{
    return rows * (1 + tokens / 16384);
}

static inline void team_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield");
#endif
}

static inline int team_take_blocks(team_seat *s, const team_pass *p)
{
    int taken = 0;
    for (i64 c; (c = atomic_fetch_add(&s->next, TEAM_BLOCK)) < p->chunks; taken = 1)
        p->run(p->arg, c, c + TEAM_BLOCK < p->chunks ? c + TEAM_BLOCK : p->chunks);
    return taken;
}

/* Runs a pass, with whoever is free. index: of the task. */
static inline void team_run(team *t, i32 index, void (*run)(void *, i64, i64), void *arg,
                            i64 chunks)
{
    if (index >= TEAM_SEATS || chunks < 2 * TEAM_BLOCK || atomic_load(&t->next_row) < t->rows) {
        run(arg, 0, chunks);
        return;
    }
    team_seat *const s = &t->seats[index];
    const team_pass p = {run, arg, chunks};
    atomic_store(&s->next, 0);
    atomic_store(&s->open, &p);
    team_take_blocks(s, &p);
    atomic_store(&s->open, NULL);
    for (int i = 0; atomic_load(&s->helpers) > 0; i++) {
        if (i < TEAM_PATIENCE)
            team_relax();
        else
            sched_yield(); /* to a helper that lost its CPU */
    }
}

/* Helps the others until all rows are done. A helper counts itself before it looks for a pass, and who opened one
 * closes it before looking for helpers: one of them sees the other. */
static inline void team_help(team *t, qi_task task)
{
    const i32 seats = task.count < TEAM_SEATS ? task.count : TEAM_SEATS;
    for (int i = 0; i < TEAM_PATIENCE && atomic_load(&t->done) < t->rows; i++) {
        team_seat *const s = &t->seats[(task.index + i) % seats];
        if (atomic_load(&s->open)) {
            atomic_fetch_add(&s->helpers, 1);
            const team_pass *const p = atomic_load(&s->open);
            if (p && team_take_blocks(s, p)) i = 0;
            atomic_fetch_sub(&s->helpers, 1);
        }
        team_relax();
    }
}

#endif
