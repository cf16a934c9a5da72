/* clock.h - milliseconds of a clock that is never set back.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef GENERATE_CLOCK_H
#define GENERATE_CLOCK_H

#include <time.h>

static inline double now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

#endif
