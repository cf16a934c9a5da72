/* clock.h - milliseconds of a clock that is never set back, and sleep.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_CLOCK_H
#define GENERATE_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline double now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

/* May end early, by a signal. */
static inline void sleep_ms(double ms)
{
    const int64_t ns = (int64_t)(ms * 1e6) + 1;
    nanosleep(&(struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000}, NULL);
}

#endif
