/* streaming.h - StreamingLLM: the first keys of all, and the last ones before the row.
 *
 *   key j is visible  iff  kv_pos < sink_tokens  or  qo_pos - kv_pos < window
 *
 * Parameters
 *   sink_tokens  i32  keys at the beginning that every row sees
 *   window       i32  keys up to and with the row's own
 *
 * With QKV_MASK_CAUSAL for the keys after the row. Positions stay those of the text (the paper counts
 * them within the cache). Source: Xiao et al. 2023, arXiv:2309.17453.
 * SPDX-License-Identifier: Apache-2.0 */
#define VARIANT_MASK 1
QI_FN int variant_mask(const variant_params *v, qi_pos pos)
{
    return (pos.kv_pos < v->sink_tokens) | (pos.qo_pos - pos.kv_pos < v->window);
}
