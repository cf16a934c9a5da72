/* translate.h - the two declarations of CUDA C that no macro can turn into C++.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMULATOR_TRANSLATE_H
#define EMULATOR_TRANSLATE_H

/* The text with `extern "C" __global__ void __launch_bounds__(...) name(const __grid_constant__ type p)` and
 * `extern __shared__ type name[];` replaced by emulator.h's macros; lines keep their numbers. malloc'ed,
 * NULL: no memory. */
char *translate(const char *text);

#endif
