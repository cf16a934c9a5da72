/* document_mask.h - several documents packed into one request: a row sees only its own.
 *
 *   key j is visible to row i  iff  document[request, qo_pos] == document[request, kv_pos]
 *
 * Parameters
 *   document  tensor i32 [requests, positions]  document of each token; every position of the
 *             request's rows and keys must be there
 *
 * Source: Llama 3, arXiv:2407.21783, section 3.2.
 * SPDX-License-Identifier: Apache-2.0 */
#define VARIANT_MASK 1
QI_FN int variant_mask(const variant_params *v, qi_pos pos)
{
    const int *document = v->document.data + pos.request * v->document.stride[0];
    return document[pos.kv_pos * v->document.stride[1]] ==
           document[pos.qo_pos * v->document.stride[1]];
}
