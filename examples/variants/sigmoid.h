/* sigmoid.h - sigmoid attention: each weight on its own, nothing normalised.
 *
 *   o_i = sum_j sigmoid(x(i,j) + bias) v_j
 *
 * Parameters
 *   bias  f32  added to every logit; the paper takes -log(number of keys)
 *
 * Source: Ramapuram et al. 2024, arXiv:2409.04431.
 * SPDX-License-Identifier: Apache-2.0 */
#define VARIANT_NO_SOFTMAX 1
#define VARIANT_LOGIT      1
QI_FN float variant_logit(const variant_params *v, qi_pos pos, float logit)
{
    (void)pos;
    return qi_sigmoid(logit + v->bias);
}
