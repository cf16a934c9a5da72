/* alibi.h - a penalty that grows with distance, at a slope of each head's own; the same as
 * QKV_FEATURE_ALIBI.
 *
 *   x' = x + slope[head] * (kv_pos - qo_pos)
 *
 * Parameters
 *   slopes  tensor f32 [num_qo_heads]  > 0; the paper takes 2^(-8 (head + 1) / num_qo_heads)
 *
 * Source: Press et al. 2021, arXiv:2108.12409.
 * SPDX-License-Identifier: Apache-2.0 */
#define VARIANT_LOGIT 1
QI_FN float variant_logit(const variant_params *v, qi_pos pos, float logit)
{
    const float slope = v->slopes.data[pos.qo_head * v->slopes.stride[0]];
    return logit + slope * (float)(pos.kv_pos - pos.qo_pos);
}
