/* bundle.c - see bundle.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "jit/bundle.h"

#define INCLUDE(id, path)                                                                          \
    __asm__(".pushsection .rodata\n"                                                               \
            "qi_bundle_" #id ": .incbin \"" QI_SOURCE_DIR "/" path "\"\n"                          \
            "qi_bundle_" #id "_end: .byte 0\n"                                                     \
            ".popsection\n");                                                                      \
    extern const char qi_bundle_##id[] __attribute__((visibility("hidden")));                      \
    extern const char qi_bundle_##id##_end[] __attribute__((visibility("hidden")));
QI_BUNDLE_SHARED(INCLUDE)
QI_BUNDLE_CPU(INCLUDE)
QI_BUNDLE_CUDA(INCLUDE)

enum { CPU = 1, CUDA = 2 };

int qi_bundle(DLDeviceType device, int i, qi_bundle_file *out)
{
    static const struct {
        const char *path, *begin, *end;
        int devices;
    } files[] = {
#define SHARED(id, path)  {path, qi_bundle_##id, qi_bundle_##id##_end, CPU | CUDA},
#define OF_CPU(id, path)  {path, qi_bundle_##id, qi_bundle_##id##_end, CPU},
#define OF_CUDA(id, path) {path, qi_bundle_##id, qi_bundle_##id##_end, CUDA},
        QI_BUNDLE_SHARED(SHARED) QI_BUNDLE_CPU(OF_CPU) QI_BUNDLE_CUDA(OF_CUDA)
#undef SHARED
#undef OF_CPU
#undef OF_CUDA
    };
    const int wanted = device == kDLCUDA ? CUDA : CPU;
    for (size_t f = 0; f < sizeof files / sizeof files[0]; f++) {
        if (!(files[f].devices & wanted) || i-- > 0) continue;
        *out = (qi_bundle_file){.path = files[f].path,
                                .text = files[f].begin,
                                .bytes = (size_t)(files[f].end - files[f].begin)};
        return 1;
    }
    return 0;
}
