/* argmax.cpu.c - tasks share the rows; a row is read once for its largest value and once more, up
 * to that value's first place, for the index. Bound: memory, vocab x size bytes a row; the second
 * read comes out of a cache.
 * SPDX-License-Identifier: Apache-2.0 */
#include "ops/sampling/argmax.cpu.h"
#include "ops/sampling/sampling_params.h"

QI_INLINE void argmax_rows(const argmax_params *p, qi_task task, const qi_dtype t)
{
    i64 begin, end;
    qi_task_share(task, p->batch, 1, &begin, &end);
    for (i64 r = begin; r < end; r++) {
        const void *row = qi_at(p->logits, t, r * p->logits_stride);
        p->tokens[r] = (i32)argmax_find(row, p->vocab, t, argmax_value(row, p->vocab, t));
    }
}

QI_CPU_KERNEL(argmax)
{
    const argmax_params *p = params;
    switch (p->dtype) {
    case QI_F32: argmax_rows(p, task, QI_F32); break;
    case QI_F16: argmax_rows(p, task, QI_F16); break;
    default: argmax_rows(p, task, QI_BF16); break;
    }
}
