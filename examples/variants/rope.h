/* rope.h - rotary position embedding of q and k, pairs (i, i + head_dim/2) as in GPT-NeoX and Llama;
 * the same as QKV_FEATURE_ROPE. The cache holds keys that are not rotated.
 *
 *   (x, y) -> (x cos a - y sin a, x sin a + y cos a),  a = position * theta^(-2i / head_dim)
 *
 * Parameters
 *   theta     f32  base, mostly 10000
 *   head_dim  i32  head_dim_qk
 *
 * Angles in f32: a is off by a few 2^-24 of itself, so for long texts the built-in is more exact.
 * Source: Su et al. 2021, arXiv:2104.09864.
 * SPDX-License-Identifier: Apache-2.0 */
#define VARIANT_PAIR_HALF 1
QI_FN qi_pair rope_rotate(const variant_params *v, int position, int dim, qi_pair p)
{
    const float exponent = (float)(-2 * dim) / (float)v->head_dim;
    const float a = (float)position * qi_exp2(exponent * qi_log2(v->theta));
    const float c = qi_cos(a), s = qi_sin(a);
    const qi_pair rotated = {p.x * c - p.y * s, p.x * s + p.y * c};
    return rotated;
}

#define VARIANT_QUERY 1
QI_FN qi_pair variant_query(const variant_params *v, qi_pos pos, int dim, qi_pair x)
{
    return rope_rotate(v, pos.qo_pos, dim, x);
}

#define VARIANT_KEY 1
QI_FN qi_pair variant_key(const variant_params *v, qi_pos pos, int dim, qi_pair x)
{
    return rope_rotate(v, pos.kv_pos, dim, x);
}
