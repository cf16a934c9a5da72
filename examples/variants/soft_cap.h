/* soft_cap.h - logits squeezed into (-cap, cap); the same as QKV_FEATURE_SOFT_CAP.
 *
 *   x' = cap * tanh(x / cap)
 *
 * Parameters
 *   cap  f32  > 0; Gemma 2 takes 50
 *
 * Source: Gemma 2, arXiv:2408.00118, section 2.
 * SPDX-License-Identifier: Apache-2.0 */
#define VARIANT_LOGIT 1
QI_FN float variant_logit(const variant_params *v, qi_pos pos, float logit)
{
    (void)pos;
    return v->cap * qi_tanh(logit / v->cap);
}
