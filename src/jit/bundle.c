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

const qi_bundle_file *qi_bundle(int i)
{
    static qi_bundle_file files[] = {
#define FILE(id, path) {path, qi_bundle_##id, 0},
        QI_BUNDLE(FILE)
#undef FILE
    };
    static const char *const ends[] = {
#define END(id, path) qi_bundle_##id##_end,
        QI_BUNDLE(END)
#undef END
    };
    if (i < 0 || i >= (int)(sizeof files / sizeof files[0])) return NULL;
    files[i].bytes = (size_t)(ends[i] - files[i].text); /* the same value from every thread */
    return &files[i];
}
