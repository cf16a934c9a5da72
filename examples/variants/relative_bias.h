/* relative_bias.h - a learned bias for each distance; distances beyond the table take its ends.
 *
 *   d = min(max(kv_pos - qo_pos, -max_distance), max_distance)
 *   x' = x + table[head, d + max_distance]
 *
 * Parameters
 *   table         tensor f32 [num_qo_heads, 2 * max_distance + 1]
 *   max_distance  i32  >= 0
 *
 * T5's buckets of distances are this table with equal entries within a bucket (and its logits are not
 * scaled: sm_scale = 1). Source: Raffel et al. 2019, arXiv:1910.10683, section 2.1.
 * SPDX-License-Identifier: Apache-2.0 */
#define VARIANT_LOGIT 1
QI_FN float variant_logit(const variant_params *v, qi_pos pos, float logit)
{
    const int max = v->max_distance, d = pos.kv_pos - pos.qo_pos;
    const int above = d < -max ? -max : d, clamped = above > max ? max : above;
    const float *table = v->table.data + pos.qo_head * v->table.stride[0];
    return logit + table[(clamped + max) * v->table.stride[1]];
}
