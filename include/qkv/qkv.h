/* qkv.h - the whole public interface.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QKV_QKV_H
#define QKV_QKV_H

#include "qkv/activation.h"
#include "qkv/attention.h"
#include "qkv/base.h"
#include "qkv/context.h"
#include "qkv/gemm.h"
#include "qkv/norm.h"
#include "qkv/page.h"
#include "qkv/rope.h"
#include "qkv/sampling.h"

#endif
