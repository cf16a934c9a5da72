/* user_stage.cpu.c - a pipe's user stage over a block of values; compiled at run time with its text, never
 * into the library.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kern/cpu/prelude.h"
#include "kern/variant.h"
#include "ops/sampling/sampling_params.h"
#include "qi_variant.h"

QI_CPU_KERNEL(user_stage)
{
    (void)task;
    const stage_block *b = params;
    float *restrict logits = b->logits;
    const float *restrict elements = b->elements;
    const float value = b->value;
    if (elements)
        for (int i = 0; i < (int)b->count; i++)
            logits[i] = logits_stage(logits[i], value, elements[i], b->first_token + i, b->request);
    else
        for (int i = 0; i < (int)b->count; i++)
            logits[i] = logits_stage(logits[i], value, 0.f, b->first_token + i, b->request);
}
