"""Sampling from logits [batch, vocab] or probabilities, and their renormalisation.

Draws are qkv.sample's: Philox keyed by (seed, offset) of each row, in descending order of
probability; among equal probabilities at the edge of top-k or top-p the lower indices stay.
Numbers therefore differ from FlashInfer's, distributions do not. seed and offset are numbers, or
tensors of one or [batch] entries: with one for all, each row has a stream of its own; a row's own
pair gives the same draw whatever it is batched with. Without them seeds come from the generator.
`deterministic` is accepted: draws always are."""

from __future__ import annotations

from typing import Any

import torch

import qkv

from ._missing import missing

Param = float | torch.Tensor

# Distance of two rows' draw numbers under one seed.
_ROW = 1 << 40


def _seeds(
    batch: int,
    device: torch.device,
    seed: int | torch.Tensor | None,
    offset: int | torch.Tensor | None,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """i64 [batch] each."""
    if seed is None:
        seed = torch.randint(2**63 - 1, (batch,), generator=generator, device=device)
        return seed, torch.zeros(batch, dtype=torch.int64, device=device)
    rows = torch.arange(batch, dtype=torch.int64, device=device)
    seed, offset = (
        x.to(device).view(torch.int64)
        if isinstance(x, torch.Tensor)
        else torch.full((1,), x & (2**63 - 1), dtype=torch.int64, device=device)
        for x in (seed, 0 if offset is None else offset)
    )
    if seed.numel() == 1:
        offset = offset + rows * _ROW
    return seed.expand(batch), offset.expand(batch)


def _draw(logits: torch.Tensor, seeds: tuple[torch.Tensor, torch.Tensor], **params: Any) -> Any:
    seed, offset = (x.contiguous().view(torch.uint64) for x in seeds)
    return qkv.sample(logits, seed=seed, offset=offset, **params)


def _sample(
    logits: torch.Tensor,
    indices: torch.Tensor | None,
    generator: torch.Generator | None,
    check_nan: bool,
    seed: int | torch.Tensor | None,
    offset: int | torch.Tensor | None,
    return_valid: bool,
    **params: Param,
) -> Any:
    if check_nan and bool(torch.isnan(logits).any()):
        raise ValueError("expected no NaN among the inputs, got some")
    if indices is not None:
        logits = logits[indices.long()]
    batch, device = logits.shape[0], logits.device
    for name, dtype in (("top_k", torch.int32), ("top_p", torch.float32), ("min_p", torch.float32)):
        if isinstance(params.get(name), torch.Tensor):
            params[name] = params[name].to(device, dtype).reshape(-1).expand(batch).contiguous()
    tokens = _draw(logits, _seeds(batch, device, seed, offset, generator), **params)
    if indices is not None:
        tokens = tokens.to(indices.dtype)
    if return_valid:
        return tokens, (logits > -torch.inf).any(-1)
    return tokens


def _column(x: Param, like: torch.Tensor) -> Param:
    """A tensor as [1 or batch, 1] on the device of like, a number as it is."""
    return x.to(like.device).reshape(-1, 1) if isinstance(x, torch.Tensor) else x


def softmax(logits: torch.Tensor, temperature: Param | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """f32 softmax(logits / temperature); temperature 0 gives equal probabilities to all logits but
    -inf."""
    x = logits.float()
    if isinstance(temperature, torch.Tensor):
        t = _column(temperature, x).float()
        x = torch.where(x == -torch.inf, x, x * torch.where(t == 0, 0.0, 1.0 / t))
    elif temperature is not None:
        x = x / temperature if temperature else torch.where(x == -torch.inf, x, 0.0)
    return torch.softmax(x, -1)


def sampling_from_logits(
    logits: torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    return_valid: bool = False,
) -> Any:
    """i32 [batch] tokens drawn from softmax(logits). indices [batch]: the row of logits that each
    token is drawn from. With return_valid (tokens, bool [batch]): had the row a chance?"""
    return _sample(logits, indices, generator, check_nan, seed, offset, return_valid)


def sampling_from_probs(
    probs: torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    return_valid: bool = False,
) -> Any:
    """sampling_from_logits of log(probs)."""
    logits = probs.float().log()
    return _sample(logits, indices, generator, check_nan, seed, offset, return_valid)


def top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_p: Param,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    return_valid: bool = False,
) -> Any:
    """Of the smallest set of likeliest tokens whose probabilities reach top_p."""
    logits = probs.float().log()
    return _sample(logits, indices, generator, check_nan, seed, offset, return_valid, top_p=top_p)


def top_k_sampling_from_probs(
    probs: torch.Tensor,
    top_k: int | torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    return_valid: bool = False,
) -> Any:
    """Of the top_k likeliest tokens."""
    logits = probs.float().log()
    return _sample(logits, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k)


def min_p_sampling_from_probs(
    probs: torch.Tensor,
    min_p: Param,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    return_valid: bool = False,
) -> Any:
    """Of the tokens at least min_p times as likely as the likeliest."""
    logits = probs.float().log()
    return _sample(logits, indices, generator, check_nan, seed, offset, return_valid, min_p=min_p)


def _top_p(probs: torch.Tensor, top_p: Param) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 probs [batch, vocab] in descending order, and how many of them it takes to reach top_p,
    [batch, 1]."""
    ordered = probs.float().sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    return ordered, (before < _column(top_p, probs)).sum(-1, keepdim=True).clamp(min=1)


def _joint_top_k(probs: torch.Tensor, top_k: Param, top_p: Param) -> torch.Tensor:
    """The number of tokens that top-k and top-p, each of all probabilities, both keep. Both keep a
    head of the same order, so that the shorter is the intersection."""
    return _top_p(probs, top_p)[1].clamp(max=_column(top_k, probs)).reshape(-1)


def _top_k_top_p(
    logits: torch.Tensor,
    probs: torch.Tensor | None,
    top_k: Param,
    top_p: Param,
    indices: torch.Tensor | None,
    order: str,
    *draw: Any,
) -> Any:
    if order not in ("top_k_first", "joint"):
        raise ValueError(f"filter_apply_order: expected top_k_first or joint, got {order!r}")
    if order == "joint":
        probs = softmax(logits) if probs is None else probs
        top_k = _joint_top_k(probs if indices is None else probs[indices.long()], top_k, top_p)
        return _sample(logits, indices, *draw, top_k=top_k)
    return _sample(logits, indices, *draw, top_k=top_k, top_p=top_p)


def top_k_top_p_sampling_from_logits(
    logits: torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: Param,
    indices: torch.Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    return_valid: bool = False,
) -> Any:
    """top_k_first: top_p of the top_k likeliest, renormalised. joint: both of all tokens."""
    draw = (generator, check_nan, seed, offset, return_valid)
    return _top_k_top_p(logits, None, top_k, top_p, indices, filter_apply_order, *draw)


def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: Param,
    indices: torch.Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    return_valid: bool = False,
) -> Any:
    """As top_k_top_p_sampling_from_logits."""
    probs = probs.float()
    draw = (generator, check_nan, seed, offset, return_valid)
    return _top_k_top_p(probs.log(), probs, top_k, top_p, indices, filter_apply_order, *draw)


def _of_top_k(x: torch.Tensor, top_k: int | torch.Tensor) -> torch.Tensor:
    """bool: is an element among the top_k largest of its row? All of those that tie are."""
    vocab = x.shape[-1]
    if isinstance(top_k, torch.Tensor):
        ordered = x.sort(-1, descending=True).values
        k = _column(top_k, x).long().clamp(1, vocab).expand(x.shape[0], 1)
        return x >= ordered.gather(-1, k - 1)
    return x >= x.topk(min(top_k, vocab), -1).values[:, -1:]


def _renormalised(probs: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    kept = torch.where(keep, probs.float(), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def top_k_renorm_probs(probs: torch.Tensor, top_k: int | torch.Tensor, **options: Any) -> torch.Tensor:
    """probs with all but the top_k largest set to 0, divided by their sum."""
    return _renormalised(probs, _of_top_k(probs, top_k)).to(probs.dtype)


def top_p_renorm_probs(probs: torch.Tensor, top_p: Param, **options: Any) -> torch.Tensor:
    """f32 probs with all but the smallest set of largest that reaches top_p set to 0, divided by
    their sum."""
    ordered, count = _top_p(probs, top_p)
    return _renormalised(probs, probs >= ordered.gather(-1, count - 1))


def top_k_mask_logits(logits: torch.Tensor, top_k: int | torch.Tensor, **options: Any) -> torch.Tensor:
    """logits with all but the top_k largest set to -inf."""
    return logits.masked_fill(~_of_top_k(logits, top_k), -torch.inf)


top_k_renorm_prob = top_k_renorm_probs
top_p_renorm_prob = top_p_renorm_probs


def chain_speculative_sampling(
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    target_probs: torch.Tensor,
    maybe_output_accepted_token_num: torch.Tensor | None = None,
    maybe_output_emitted_draft_token_num: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accepts or replaces a chain of drafted tokens, so that what comes out is distributed as the
    target. draft_probs [batch, n, vocab], draft_token_ids [batch, n], target_probs [batch, n + 1,
    vocab].

    Draft i is accepted with probability min(1, target / draft). Up to the first rejection the
    drafts are kept; there a token is drawn from max(target - draft, 0), or after all of them from
    the last target. Returns (ids i32 [batch, n + 1], -1 from there on; accepted i32 [batch]: how
    many drafts pass, each by itself; emitted i32 [batch]: how many are kept). Given tensors are
    added to. Source: Leviathan et al. 2023, arXiv:2211.17192."""
    batch, n, vocab = draft_probs.shape
    device = draft_probs.device
    drafted = draft_token_ids.to(device, torch.int64).clamp(min=0)[..., None]
    draft, target = draft_probs.float(), target_probs.float()
    p, q = target[:, :n].gather(-1, drafted)[..., 0], draft.gather(-1, drafted)[..., 0]
    chance = torch.where(q > 0, p / q, torch.where(p > 0, 1.0, 0.0)).clamp(max=1.0)
    row_seed, first = _seeds(batch, device, seed, offset, generator)
    # One draw for each draft, then one for the token: n + 1 draw numbers of each row's stream.
    draws = first[:, None] + torch.arange(n + 1, device=device)
    coins = torch.stack([1.0 - chance, chance], -1).log().reshape(batch * n, 2)
    seeds = (row_seed.repeat_interleave(n), draws[:, :n].reshape(-1))
    passed = (_draw(coins, seeds) if n else coins.new_zeros(0)).reshape(batch, n).bool()
    kept = passed.long().cumprod(-1).sum(-1)
    rows = torch.arange(batch, device=device)
    padded = torch.cat([draft, draft.new_zeros(batch, 1, vocab)], 1)
    rest = (target[rows, kept] - padded[rows, kept]).clamp(min=0.0)
    last = _draw(rest.log(), (row_seed, draws[:, n]))
    place = torch.arange(n + 1, device=device)
    ids = torch.cat([drafted[..., 0], drafted.new_zeros(batch, 1)], 1)
    ids = torch.where(place == kept[:, None], last[:, None].long(), ids)
    ids = torch.where(place <= kept[:, None], ids, -1).to(torch.int32)
    counts = []
    given = (maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num)
    for total, count in zip(given, (passed.sum(-1), kept)):
        counts.append(count.to(torch.int32) if total is None else total.add_(count))
    return ids, counts[0], counts[1]


__getattr__ = missing(__name__)
