/* env.h - the environment variables, read once.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_BASE_ENV_H
#define QI_BASE_ENV_H

/* Variable             Values                                                                  */
#define QI_ENV(X)                                                                                  \
    X(VERBOSE,                                                                                     \
      "QKV_VERBOSE")        /* error,dispatch,plan,run or all: lines to the log                */  \
    X(DEVICE, "QKV_DEVICE") /* cpu or cpu:LEVEL: the CPU level of every context */                 \
    X(CACHE_DIR, "QKV_CACHE_DIR") /* folder of compiled variants; empty: none */                   \
    X(CC, "QKV_CC")               /* the C compiler that variants go through */                    \
    X(NVRTC, "QKV_NVRTC")         /* path of the libnvrtc to use */

enum {
#define X(id, name) QI_ENV_##id,
    QI_ENV(X)
#undef X
        QI_NUM_ENV
};

/* The value when the library first asked, or NULL. */
const char *qi_env(int id);

#endif
