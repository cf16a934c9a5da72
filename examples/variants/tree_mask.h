/* tree_mask.h - speculative decoding with a tree of drafts: the request's last qo_len keys are the
 * tree's nodes, one a row; a row sees its ancestors and itself, and all keys before the tree.
 *
 *   node = kv_pos - (kv_len - qo_len)
 *   key j is visible to row i  iff  node < 0  or  tree[request, i, node] != 0
 *
 * Parameters
 *   tree  tensor i32 [requests, max qo_len, max qo_len]  1 where node is row i or an ancestor of it
 *
 * Source: Miao et al. 2023, arXiv:2305.09781 (SpecInfer).
 * SPDX-License-Identifier: Apache-2.0 */
#define VARIANT_MASK 1
QI_FN int variant_mask(const variant_params *v, qi_pos pos)
{
    const int *sees =
        v->tree.data + pos.request * v->tree.stride[0] + pos.qo_idx * v->tree.stride[1];
    const int node = pos.kv_pos - (pos.kv_len - pos.qo_len);
    return (node < 0) | sees[(node < 0 ? 0 : node) * v->tree.stride[2]];
}
