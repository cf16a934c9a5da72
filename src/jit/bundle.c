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
QI_BUNDLE(INCLUDE)

int qi_bundle(int i, qi_bundle_file *out)
{
    static const struct {
        const char *path, *begin, *end;
    } files[] = {
#define FILE(id, path) {path, qi_bundle_##id, qi_bundle_##id##_end},
        QI_BUNDLE(FILE)
#undef FILE
    };
    if (i < 0 || i >= (int)(sizeof files / sizeof files[0])) return 0;
    *out = (qi_bundle_file){.path = files[i].path,
                            .text = files[i].begin,
                            .bytes = (size_t)(files[i].end - files[i].begin)};
    return 1;
}
