/* scale_spec.c - see scale_spec.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/scale_spec.h"

#include <math.h>

qkv_status qi_scale_read(const qkv_scale *in, const char *name, int64_t heads, qi_scale *out)
{
    qi_scale s = {.value = in->value == 0.f ? 1.f : in->value};
    QI_REQUIRE(s.value > 0.f && isfinite(s.value), "%s: expected > 0, or 0 for 1, got %g", name,
               (double)in->value);
    if (in->tensor) {
        QI_TRY(qi_expect(in->tensor, name, QKV_F32, QI_SHAPE(QI_ANY)));
        const int64_t n = in->tensor->shape[0];
        QI_REQUIRE(n == 1 || n == heads, "%s: expected [1] or [%lld], got [%lld]", name,
                   (long long)heads, (long long)n);
        s.tensor = qi_data(in->tensor);
        s.step = n > 1;
        for (int64_t i = 0; qi_host_reads() && i < n; i++)
            QI_REQUIRE(s.tensor[i] > 0.f && isfinite(s.tensor[i]),
                       "%s: expected > 0, got %g (head %lld)", name, (double)s.tensor[i],
                       (long long)i);
    }
    *out = s;
    return QKV_OK;
}
