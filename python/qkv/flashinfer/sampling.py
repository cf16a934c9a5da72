"""Sampling from logits [batch, vocab] or probabilities, and their renormalisation.

Draws are qkv.sample's: Philox keyed by (seed, offset) of each row; among equal probabilities at the
edge of top-k or top-p the lower indices stay. Numbers therefore differ from FlashInfer's,
distributions do not. seed and offset are numbers, or tensors of one or [batch] entries: with one for
all, each row has a stream of its own; a row's own pair gives the same draw whatever it is batched
with. Without them seeds come from the generator.
`deterministic` is accepted: draws always are."""

from __future__ import annotations

from typing import Any

import torch

import qkv

from ._missing import missing

Param = float | torch.Tensor

# Distance of two rows' draw numbers under one seed.
_ROW = 1 << 40
# A temperature at which finite logits are as good as equal.
_FLAT = 1e30


def _seeds(
    batch: int,
    device: torch.device,
    seed: int | torch.Tensor | None,
    offset: int | torch.Tensor | None,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """i64 [batch] or [1] each."""
    if seed is None:
        seed = torch.randint(2**63 - 1, (batch,), generator=generator, device=device)
        return seed, torch.zeros(1, dtype=torch.int64, device=device)
    seed, offset = (
        x.to(device).view(torch.int64).reshape(-1)
        if isinstance(x, torch.Tensor)
        else torch.full((1,), x & (2**63 - 1), dtype=torch.int64, device=device)
        for x in (seed, 0 if offset is None else offset)
    )
    if seed.numel() == 1:
        offset = offset + torch.arange(batch, dtype=torch.int64, device=device) * _ROW
    return seed, offset


def _stages(device: torch.device, **params: Param | None) -> dict[str, Any]:
    """Tensors as [1 or batch] of what qkv takes, numbers as they are."""
    return {
        name: x.to(device, torch.int32 if name == "top_k" else torch.float32).reshape(-1)
        if isinstance(x, torch.Tensor)
        else x
        for name, x in params.items()
    }


def _sample(
    kind: str,
    rows: torch.Tensor,
    indices: torch.Tensor | None,
    generator: torch.Generator | None,
    check_nan: bool,
    seed: int | torch.Tensor | None,
    offset: int | torch.Tensor | None,
    return_valid: bool,
    order: str = "top_k_first",
    **params: Param,
) -> Any:
    if check_nan and bool(torch.isnan(rows).any()):
        raise ValueError("expected no NaN among the inputs, got some")
    batch = len(rows if indices is None else indices)
    row_seed, first = _seeds(batch, rows.device, seed, offset, generator)
    drawn = qkv.sample(
        rows,
        seed=row_seed,
        offset=first,
        kind=kind,
        order=order,
        indices=None if indices is None else indices.to(rows.device, torch.int32),
        valid=return_valid,
        **_stages(rows.device, **params),
    )
    tokens, valid = drawn if return_valid else (drawn, None)
    if indices is not None:
        tokens = tokens.to(indices.dtype)
    return (tokens, valid) if return_valid else tokens


def softmax(logits: torch.Tensor, temperature: Param | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """f32 softmax(logits / temperature); temperature 0 gives equal probabilities to all logits but
    -inf."""
    if isinstance(temperature, torch.Tensor):
        temperature = torch.where(temperature == 0, _FLAT, temperature.float())
    elif temperature == 0:
        temperature = _FLAT
    return _renormalize(logits, torch.float32, temperature=temperature)


def _renormalize(rows: torch.Tensor, dtype: torch.dtype, kind: str = "logits", **params: Param | None) -> torch.Tensor:
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    return qkv.renormalize(rows, kind=kind, out=out, **_stages(rows.device, **params))


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
    return _sample("logits", logits, indices, generator, check_nan, seed, offset, return_valid)


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
    """The same from probabilities."""
    return _sample("probs", probs, indices, generator, check_nan, seed, offset, return_valid)


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
    return _sample("probs", probs, indices, generator, check_nan, seed, offset, return_valid, top_p=top_p)


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
    return _sample("probs", probs, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k)


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
    return _sample("probs", probs, indices, generator, check_nan, seed, offset, return_valid, min_p=min_p)


def _top_k_top_p(kind: str, rows: torch.Tensor, top_k: Param, top_p: Param, indices: Any, order: str, *draw: Any) -> Any:
    if order not in ("top_k_first", "joint"):
        raise ValueError(f"filter_apply_order: expected top_k_first or joint, got {order!r}")
    return _sample(kind, rows, indices, *draw, order=order, top_k=top_k, top_p=top_p)


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
    return _top_k_top_p("logits", logits, top_k, top_p, indices, filter_apply_order, *draw)


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
    draw = (generator, check_nan, seed, offset, return_valid)
    return _top_k_top_p("probs", probs, top_k, top_p, indices, filter_apply_order, *draw)


def top_k_renorm_probs(probs: torch.Tensor, top_k: int | torch.Tensor, **options: Any) -> torch.Tensor:
    """probs with all but the top_k largest set to 0, divided by their sum."""
    return _renormalize(probs, probs.dtype, "probs", top_k=top_k)


def top_p_renorm_probs(probs: torch.Tensor, top_p: Param, **options: Any) -> torch.Tensor:
    """f32 probs with all but the smallest set of largest that reaches top_p set to 0, divided by
    their sum."""
    return _renormalize(probs, torch.float32, "probs", top_p=top_p)


def top_k_mask_logits(logits: torch.Tensor, top_k: int | torch.Tensor, **options: Any) -> torch.Tensor:
    """logits with all but the top_k largest set to -inf."""
    return qkv.mask_logits(logits, **_stages(logits.device, top_k=top_k))


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
    batch, n, _ = draft_probs.shape
    device = target_probs.device
    drafted = draft_token_ids.to(device, torch.int32)
    row_seed, first = _seeds(batch, device, seed, offset, generator)
    draft = draft_probs.to(target_probs.dtype)
    _, emitted, ids = qkv.verify(target_probs, drafted, draft, seed=row_seed, offset=first)
    accepted = emitted + _pass_later(draft, drafted, target_probs, emitted, row_seed, first + n + 1)
    counts = []
    given = (maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num)
    for total, count in zip(given, (accepted, emitted)):
        counts.append(count if total is None else total.add_(count))
    return ids, counts[0], counts[1]


def _pass_later(
    draft: torch.Tensor,
    drafted: torch.Tensor,
    target: torch.Tensor,
    emitted: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
) -> torch.Tensor:
    """i32 [batch]: how many drafts after the first rejected one would pass, each by itself. They are
    not needed for tokens; offset is that of the draws for them."""
    batch, n = drafted.shape
    at = drafted.long().clamp(min=0)[..., None]
    p, q = (x.gather(-1, at)[..., 0].float() for x in (target[:, :n], draft))
    chance = torch.where(q > 0, p / q, (p > 0).float()).clamp(max=1.0).reshape(-1)
    places = torch.arange(n, device=drafted.device)
    passes = qkv.sample(
        torch.stack([1.0 - chance, chance], -1),
        kind="probs",
        seed=seed.expand(batch).repeat_interleave(n),
        offset=(offset.expand(batch)[:, None] + places).reshape(-1),
    )
    later = places > emitted[:, None]
    return (passes.reshape(batch, n) * later).sum(-1, dtype=torch.int32)


__getattr__ = missing(__name__)
