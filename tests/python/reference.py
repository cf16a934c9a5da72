"""Attention in float64, one request at a time and written from the formula of qkv/attention.h: what the tests of
several files compare with.

SPDX-License-Identifier: Apache-2.0
"""

import math

import torch


def rotate(x, positions, theta=10000.0, scale=1.0):
    """RoPE of x [n, heads, dim], pairs (i, i + dim / 2)."""
    half = x.shape[-1] // 2
    freq = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half) / scale
    angle = positions.double()[:, None, None] * freq
    a, b = x.double().split(half, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def distances(rows, keys):
    """[rows, keys]: how far a key lies after a row; the rows are the last of the keys' positions."""
    return torch.arange(keys) - torch.arange(keys - rows, keys)[:, None]


def visible(rows, keys, left=-1, right=-1):
    """bool [rows, keys]: keys at most so many before and after the row, -1 = all; right=0 is causal."""
    at = distances(rows, keys)
    return (at >= (-left if left >= 0 else -keys)) & (at <= (right if right >= 0 else rows + keys))


def attention(q, k, v, *, allowed=None, sm_scale=None, soft_cap=0.0, rope=None, slopes=None, logit=None, sink=None):
    """One request: q [rows, heads, dim], k and v [keys, kv heads, dim], of any dtype and device.

    allowed       bool [rows, keys], None = all
    rope          (theta, scale): rows and keys are rotated
    slopes, sink  [heads]
    logit         what a variant makes of the logits [heads, rows, keys] and the distances [rows, keys]

    Returns o [rows, heads, dim of v] and the natural lse [rows, heads], on the CPU.
    """
    q, k, v = (x.detach().cpu().double() for x in (q, k, v))
    rows, keys, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    if rope is not None:
        q, k = rotate(q, torch.arange(keys - rows, keys), *rope), rotate(k, torch.arange(keys), *rope)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    x = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    if soft_cap:
        x = soft_cap * (x / soft_cap).tanh()
    if slopes is not None:
        x = x + slopes.cpu().double()[:, None, None] * distances(rows, keys)
    if logit is not None:
        x = logit(x, distances(rows, keys))
    if allowed is not None:
        x = x.masked_fill(~allowed.cpu(), -math.inf)
    if sink is not None:
        x = torch.cat([x, sink.cpu().double()[:, None, None].expand(-1, rows, 1)], -1)
    lse = x.logsumexp(-1)
    weights = (x - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()[..., :keys]
    return torch.einsum("hij,jhd->ihd", weights, v), lse.T
