/* boxes.h - tensors of attention as Hopper's copy engine takes boxes of them, for the kernels that load so.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QI_ATTENTION_BOXES_H
#define QI_ATTENTION_BOXES_H

#include "core/launch.h"
#include "ops/attention/attention_params.h"

/* Keys of a box: as many as lie side by side in every page and divide a tile's. 0: they are no whole 8 rows. */
i32 qi_box_keys(i32 page_size, i32 tile);

/* Does the engine take a tensor at this address with these n strides, in elements of `bytes`? */
int qi_box_fits(const void *base, const i64 *strides, int n, i32 bytes);

/* Does it take a run's keys and values? */
int qi_box_keys_fit(const attention_params *p);

/* Keys and values, [pages, heads, tokens of a page, dims], ragged ones as a single page; a box is `piece` tokens of a
 * head, 128 bytes wide. */
qi_box_tensor qi_box_of_keys(const attention_params *p, i32 piece, qi_tensor_map *map);
qi_box_tensor qi_box_of_values(const attention_params *p, i32 piece, qi_tensor_map *map);

/* The same in boxes of whole rows, which are multiples of 128 bytes: these are an axis of their own, past the tokens. */
qi_box_tensor qi_box_of_whole_rows(qi_box_tensor keys);

#endif
