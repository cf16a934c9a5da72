/* thread.h - starting threads in other people's programs.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_BASE_THREAD_H
#define QI_BASE_THREAD_H

#include <pthread.h>

/* pthread_create() with a mask that blocks all signals, so that none of the program's handlers runs on the
 * thread; but not those of faults, which would kill without a report. Returns its error. */
int qi_thread_start(pthread_t *thread, void *(*run)(void *arg), void *arg);

#endif
