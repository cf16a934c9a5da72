/* sink.h - a learned logit that takes part in the softmax but has no value: a row may attend to
 * nothing. The same as QKV_ATTENTION_HAS_SINK.
 *
 *   o_i = sum_j exp(x(i,j)) v_j / (exp(sink[head]) + sum_j exp(x(i,j)))
 *
 * Parameters
 *   sink  tensor f32 [num_qo_heads]
 *
 * Source: gpt-oss, arXiv:2508.10925; the idea is in Xiao et al. 2023, arXiv:2309.17453.
 * SPDX-License-Identifier: Apache-2.0 */
#define VARIANT_STATE 1
QI_FN float variant_state(const variant_params *v, qi_pos pos)
{
    return v->sink.data[pos.qo_head * v->sink.stride[0]];
}
