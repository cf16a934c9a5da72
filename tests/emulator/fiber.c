/* fiber.c - see fiber.h. What a function call preserves is all that a change of stacks has to keep;
 * swapcontext() would also call the kernel, for the signal mask.
 * SPDX-License-Identifier: Apache-2.0 */
#include "fiber.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__x86_64__)

enum {
    FRAME = 8,
    RETURN_AT = 6
}; /* words: six registers, the address to return to, one to align */

__asm__(".text\n"
        ".globl fiber_switch\n"
        ".hidden fiber_switch\n"
        ".type fiber_switch, @function\n"
        "fiber_switch:\n"
        "    push %rbp\n"
        "    push %rbx\n"
        "    push %r12\n"
        "    push %r13\n"
        "    push %r14\n"
        "    push %r15\n"
        "    mov %rsp, (%rdi)\n"
        "    mov (%rsi), %rsp\n"
        "    pop %r15\n"
        "    pop %r14\n"
        "    pop %r13\n"
        "    pop %r12\n"
        "    pop %rbx\n"
        "    pop %rbp\n"
        "    ret\n"
        ".size fiber_switch, . - fiber_switch\n");

#elif defined(__aarch64__)

enum { FRAME = 20, RETURN_AT = 11 }; /* words: x19 to x30, d8 to d15 */

__asm__(".text\n"
        ".globl fiber_switch\n"
        ".hidden fiber_switch\n"
        ".type fiber_switch, @function\n"
        "fiber_switch:\n"
        "    sub sp, sp, #160\n"
        "    stp x19, x20, [sp, #0]\n"
        "    stp x21, x22, [sp, #16]\n"
        "    stp x23, x24, [sp, #32]\n"
        "    stp x25, x26, [sp, #48]\n"
        "    stp x27, x28, [sp, #64]\n"
        "    stp x29, x30, [sp, #80]\n"
        "    stp d8, d9, [sp, #96]\n"
        "    stp d10, d11, [sp, #112]\n"
        "    stp d12, d13, [sp, #128]\n"
        "    stp d14, d15, [sp, #144]\n"
        "    mov x2, sp\n"
        "    str x2, [x0]\n"
        "    ldr x2, [x1]\n"
        "    mov sp, x2\n"
        "    ldp x19, x20, [sp, #0]\n"
        "    ldp x21, x22, [sp, #16]\n"
        "    ldp x23, x24, [sp, #32]\n"
        "    ldp x25, x26, [sp, #48]\n"
        "    ldp x27, x28, [sp, #64]\n"
        "    ldp x29, x30, [sp, #80]\n"
        "    ldp d8, d9, [sp, #96]\n"
        "    ldp d10, d11, [sp, #112]\n"
        "    ldp d12, d13, [sp, #128]\n"
        "    ldp d14, d15, [sp, #144]\n"
        "    add sp, sp, #160\n"
        "    ret\n"
        ".size fiber_switch, . - fiber_switch\n");

#else
#error "fiber_switch is written for x86-64 and AArch64"
#endif

fiber_place fiber_begin(void *top, void (*entry)(void))
{
    uintptr_t *frame = (uintptr_t *)top - FRAME;
    memset(frame, 0, FRAME * sizeof *frame);
    frame[RETURN_AT] = (uintptr_t)entry;
    return (fiber_place){.stack_pointer = frame};
}

enum { STACK_BYTES = 128 << 10, GUARD_BYTES = 4 << 10 };

void *fiber_stack(unsigned i)
{
    static char *stacks;
    static unsigned num_guarded;
    if (!stacks) {
        void *map = mmap(NULL, (size_t)MAX_STACKS * STACK_BYTES, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (map == MAP_FAILED) return NULL;
        stacks = map;
    }
    for (; num_guarded <= i; num_guarded++)
        if (mprotect(stacks + (size_t)num_guarded * STACK_BYTES, GUARD_BYTES, PROT_NONE) != 0)
            return NULL;
    const size_t shift =
        i % 16 * 272; /* the same depth of many stacks is not of the same cache set */
    return stacks + (size_t)(i + 1) * STACK_BYTES - shift;
}
