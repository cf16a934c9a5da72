/* rope_spec.c - see rope_spec.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/rope_spec.h"

#include <math.h>

qkv_status qi_rope_read(const qkv_rope_spec *spec, const char *name, int64_t head_dim, qi_rope *out)
{
    qkv_rope_spec s;
    QI_TRY(qi_read_struct(&s, sizeof s, spec, name));
    const int64_t rotary = s.rotary_dim ? s.rotary_dim : head_dim;
    QI_REQUIRE(rotary > 0 && rotary % 2 == 0 && rotary <= head_dim &&
                   rotary <= 2 * QI_ROPE_MAX_PAIRS,
               "rotary_dim: expected an even number up to head_dim = %lld and %d, got %lld",
               (long long)head_dim, 2 * QI_ROPE_MAX_PAIRS, (long long)rotary);
    QI_REQUIRE(s.interleaved == 0 || s.interleaved == 1, "interleaved: expected 0 or 1, got %d",
               (int)s.interleaved);
    if (s.theta == 0.f) s.theta = 10000.f;
    if (s.scale == 0.f) s.scale = 1.f;
    QI_REQUIRE(s.theta >= 1.f && isfinite(s.theta), "theta: expected >= 1, or 0 for 10000, got %g",
               (double)s.theta);
    QI_REQUIRE(s.scale >= 1.f && isfinite(s.scale), "scale: expected >= 1, or 0 for none, got %g",
               (double)s.scale);
    if (s.low_freq != 0.f || s.high_freq != 0.f) {
        QI_REQUIRE(s.low_freq > 0.f && s.high_freq > s.low_freq && isfinite(s.high_freq),
                   "low_freq, high_freq: expected 0 < low_freq < high_freq, got %g, %g",
                   (double)s.low_freq, (double)s.high_freq);
        QI_REQUIRE(s.old_context > 0.f && isfinite(s.old_context),
                   "old_context: expected > 0 with low_freq, got %g", (double)s.old_context);
    }
    const i32 pairs = (i32)(rotary / 2);
    *out = (qi_rope){.num_pairs = pairs,
                     .interleaved = s.interleaved,
                     .theta = (double)s.theta,
                     .scale = (double)s.scale,
                     .low_freq = (double)s.low_freq,
                     .high_freq = (double)s.high_freq,
                     .old_context = (double)s.old_context,
                     .octaves = log2((double)s.theta) / pairs,
                     .inverse_scale = 1 / (double)s.scale,
                     .inverse_range =
                         s.low_freq == 0.f ? 0 : 1 / ((double)s.high_freq - (double)s.low_freq)};
    return QKV_OK;
}
