/* find_library.h - NVIDIA's libraries beside the driver, where their users have them.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_DEVICE_FIND_LIBRARY_H
#define QI_DEVICE_FIND_LIBRARY_H

/* Offers every file NAME.so.MAJOR to open() until it returns 1: the loader's, those of CUDA toolkits, and
 * of NVIDIA's packages in the Python environment at hand. 1: one was opened. */
int qi_find_cuda_library(const char *name, int major, int (*open)(const char *path, void *user),
                         void *user);

#endif
