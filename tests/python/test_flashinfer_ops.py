"""The operators of qkv.flashinfer beside attention, and sampling, against float64 arithmetic."""

import math

import numpy as np
import pytest
import torch
from flashinfer_reference import Paged, close, indptr, queries

import qkv.flashinfer as fi
from qkv.flashinfer import sampling


def test_get_seq_lens_and_positions(device):
    ptr = torch.tensor([0, 0, 1, 4, 6], dtype=torch.int32, device=device)
    last = torch.tensor([0, 3, 2, 0], dtype=torch.int32, device=device)
    assert fi.get_seq_lens(ptr, last, 4).tolist() == [0, 3, 10, 8]
    append = torch.tensor([0, 0, 2, 5], dtype=torch.int32, device=device)
    lens = torch.tensor([4, 9, 3], dtype=torch.int32, device=device)
    batch, positions = fi.get_batch_indices_positions(append, lens, 7)
    assert batch.tolist() == [1, 1, 2, 2, 2, -1, -1]
    assert positions.tolist() == [7, 8, 0, 1, 2, 0, 0]
    assert batch.dtype == positions.dtype == torch.int32
    given = [torch.full((9,), 5, dtype=torch.int32, device=device) for _ in range(2)]
    found = fi.get_batch_indices_positions(append, lens, 7, *given)
    assert found[0] is given[0] and given[1].tolist() == [7, 8, 0, 1, 2, 0, 0, 5, 5]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("combined", [True, False])
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_append(device, layout, combined, page_size):
    lens, appended = [3, 0, 18, 7], [2, 0, 18, 1]
    paged = Paged(lens, page_size, 2, 64, torch.float16, layout, combined, device)
    expected = paged.cache
    if combined:
        cache = torch.full_like(expected, math.nan)
    else:
        cache = tuple(torch.full_like(x, math.nan) for x in expected)
    k, v = (torch.cat([x[n - a :] for x, n, a in zip(each, lens, appended)]).to(device) for each in (paged.k, paged.v))
    table = [x.to(device) for x in (paged.indices, paged.indptr, paged.last)]
    ends = indptr(appended).to(device)
    rows, positions = fi.get_batch_indices_positions(ends, fi.get_seq_lens(table[1], table[2], page_size), len(k) + 2)
    padding = torch.full((2, 2, 64), 7.0, device=device).half()
    fi.append_paged_kv_cache(
        torch.cat([k, padding]), torch.cat([v, padding]), rows, positions, cache, *table, kv_layout=layout
    )
    written = 0
    for got, want in zip(cache, expected) if not combined else [(cache, expected)]:
        there = ~got.isnan()
        assert torch.equal(got[there], want[there])
        written += int(there.sum())
    assert written == 2 * sum(appended) * 2 * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 111), (3, 4, 128)])
@pytest.mark.parametrize("gemma", [False, True])
def test_norms(device, dtype, shape, gemma):
    x = torch.randn(shape).to(dtype).to(device)
    w = torch.randn(shape[-1]).to(dtype).to(device)
    residual = torch.randn(shape).to(dtype).to(device)

    def norm(x):
        scale = w.cpu().double() + gemma
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * scale

    plain = fi.gemma_rmsnorm if gemma else fi.rmsnorm
    fused = fi.gemma_fused_add_rmsnorm if gemma else fi.fused_add_rmsnorm
    close(plain(x, w, 1e-5), norm(x.cpu().double()))
    out = torch.empty_like(x)
    assert plain(x, w, 1e-5, out=out) is out
    close(out, norm(x.cpu().double()))
    if len(shape) == 3:  # heads of a wider row
        wide = torch.randn(3, 9, 128).to(dtype).to(device)
        close(plain(wide[:, 2:6], w, 1e-5), norm(wide[:, 2:6].cpu().double()))
    total = x.cpu().double() + residual.cpu().double()
    assert fused(x, residual, w, 1e-5) is None
    close(residual, total)
    close(x, norm(total))


@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 64)])
def test_activations(device, shape):
    x = torch.randn(shape).to(torch.bfloat16).to(device)
    a, b = x.cpu().double().chunk(2, -1)
    functional = torch.nn.functional
    for run, expected in (
        (fi.silu_and_mul, functional.silu(a)),
        (fi.gelu_and_mul, functional.gelu(a)),
        (fi.gelu_tanh_and_mul, functional.gelu(a, approximate="tanh")),
    ):
        close(run(x), expected * b)
        out = torch.empty(*shape[:-1], shape[-1] // 2, dtype=x.dtype, device=device)
        assert run(x, out) is out
        close(out, expected * b)


def rope_reference(x, positions, rotary_dim, interleave, freq):
    x = x.detach().cpu().double()
    angle = positions.double()[:, None, None] * freq
    part, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    a, b = (part[..., ::2], part[..., 1::2]) if interleave else part.chunk(2, -1)
    pair = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    turned = torch.stack(pair, -1).flatten(-2) if interleave else torch.cat(pair, -1)
    return torch.cat([turned, rest], -1)


@pytest.mark.parametrize("rotary_dim", [None, 32])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("llama31", [False, True])
def test_rope(device, rotary_dim, interleave, llama31):
    q, k = queries(6, 4, 64, device=device), queries(6, 2, 64, device=device)
    ends = torch.tensor([0, 2, 2, 6], dtype=torch.int32, device=device)
    offsets = torch.tensor([100, 7, 3], dtype=torch.int32, device=device)
    positions = torch.tensor([100, 101, 3, 4, 5, 6])
    dim = rotary_dim or 64
    freq = (5e5 if llama31 else 1e4) ** (-torch.arange(0, dim, 2).double() / dim)
    scale = {}
    if llama31:
        blend = (freq * 8192 / (2 * math.pi) - 1) / 3
        blend = blend.clamp(0, 1)
        freq = (1 - blend) * freq / 8 + blend * freq
    else:
        scale = {"rope_scale": 2.0}
        freq = freq / 2
    name = "apply_llama31_rope" if llama31 else "apply_rope"
    options = {"rotary_dim": rotary_dim, "interleave": interleave, **scale}
    expected = [rope_reference(x, positions, dim, interleave, freq) for x in (q, k)]
    for suffix, where in (("", (ends, offsets)), ("_pos_ids", (positions.to(device),))):
        for got, want in zip(getattr(fi, name + suffix)(q, k, *where, **options), expected):
            close(got, want)
        copies = q.clone(), k.clone()
        assert getattr(fi, f"{name}{suffix}_inplace")(*copies, *where, **options) is None
        for got, want in zip(copies, expected):
            close(got, want)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [64, 32])
def test_rope_with_cache(device, is_neox, rotary_dim):
    q, k = queries(5, 4, 64, device=device), queries(5, 2, 64, device=device)
    positions = torch.tensor([0, 9, 3, 3, 19])
    freq = 1e4 ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    angle = torch.arange(20).double()[:, None] * freq
    cache = torch.cat([angle.cos(), angle.sin()], -1).float().to(device)
    expected = [rope_reference(x, positions, rotary_dim, not is_neox, freq) for x in (q, k)]
    flat = q.flatten(1), k.flatten(1)
    found = fi.apply_rope_with_cos_sin_cache(positions.to(device), *flat, 64, cache, is_neox)
    for got, want in zip(found, expected):
        close(got, want.flatten(1))
    copies = [x.clone() for x in flat]
    fi.apply_rope_with_cos_sin_cache_inplace(
        positions=positions.to(device),
        query=copies[0],
        key=copies[1],
        head_size=64,
        cos_sin_cache=cache,
        is_neox=is_neox,
    )
    assert all(map(torch.equal, copies, found))
    with pytest.raises(ValueError, match="cos_sin_cache"):
        fi.apply_rope_with_cos_sin_cache(positions, *flat, 64, cache.half(), is_neox)


@pytest.mark.parametrize("order", ["big", "little"])
def test_packbits(device, order):
    x = torch.rand(77) < 0.5
    packed = fi.packbits(x.to(device), order)
    assert packed.cpu().numpy().tolist() == np.packbits(x.numpy(), bitorder=order).tolist()
    ends = torch.tensor([0, 5, 5, 21, 61, 77], dtype=torch.int32, device=device)
    packed, starts = fi.segment_packbits(x.to(device), ends, order)
    assert starts.tolist() == [0, 1, 1, 3, 8, 10] and starts.dtype == torch.int32
    pieces = [x[a:b].numpy() for a, b in zip(ends.tolist(), ends.tolist()[1:])]
    expected = np.concatenate([np.packbits(p, bitorder=order) for p in pieces])
    assert packed.cpu().numpy().tolist() == expected.tolist()
    assert fi.packbits(torch.zeros(0, dtype=torch.bool)).numel() == 0
    with pytest.raises(ValueError, match="bitorder"):
        fi.packbits(x, "middle")


DRAWS = 20000


def frequencies(tokens, vocab):
    return torch.bincount(tokens.cpu().long(), minlength=vocab).double() / len(tokens)


def distributed_as(tokens, p):
    """Within 6 standard deviations in every token, and never one of probability 0."""
    p = p.double().cpu()
    found = frequencies(tokens, len(p))
    assert not found[p == 0].any()
    bound = 6 * (p * (1 - p) / len(tokens)).sqrt() + 1e-12
    assert ((found - p).abs() <= bound).all(), (found, p)


def row(device):
    p = torch.tensor([0.02, 0.3, 0.0, 0.25, 0.13, 0.2, 0.06, 0.04])
    return p.to(device), p.log().to(device)


def kept(p, keep):
    p = torch.where(keep, p.cpu(), 0.0)
    return p / p.sum()


def test_sampling_distributions(device):
    p, logits = row(device)
    many, many_logits = p.expand(DRAWS, -1), logits.expand(DRAWS, -1)
    order = p.argsort(descending=True).cpu()  # 1 3 5 4 6 7 0 2
    generator = torch.Generator(device).manual_seed(torch.initial_seed())

    def head(n):
        keep = torch.zeros(8, dtype=torch.bool)
        keep[order[:n]] = True
        return kept(p, keep)

    draw = {"generator": generator}
    distributed_as(sampling.sampling_from_probs(many, **draw), p)
    distributed_as(sampling.sampling_from_logits(many_logits, **draw), p)
    distributed_as(sampling.top_k_sampling_from_probs(many, 3, **draw), head(3))
    distributed_as(sampling.top_p_sampling_from_probs(many, 0.6, **draw), head(3))
    distributed_as(sampling.min_p_sampling_from_probs(many, 0.4, **draw), head(4))
    # 0.8 of the first three, renormalised, are all three; of all tokens two are not enough
    for top_k, top_p, first, joint in ((4, 0.7, 3, 3), (3, 0.8, 3, 3), (3, 0.7, 2, 3), (2, 0.9, 2, 2)):
        for name, given in (("probs", many), ("logits", many_logits)):
            run = getattr(sampling, f"top_k_top_p_sampling_from_{name}")
            distributed_as(run(given, top_k, top_p, **draw), head(first))
            distributed_as(run(given, top_k, top_p, filter_apply_order="joint", **draw), head(joint))


def test_sampling_parameters_of_each_row(device):
    p, logits = row(device)
    many = p.expand(DRAWS, -1)
    top_k = torch.tensor([1, 1 << 30], device=device).repeat(DRAWS // 2)
    tokens = sampling.top_k_sampling_from_probs(many, top_k)
    assert (tokens[::2] == 1).all()
    distributed_as(tokens[1::2], p)
    top_p = torch.tensor([1.0, 0.1], device=device).repeat(DRAWS // 2)
    tokens = sampling.top_k_top_p_sampling_from_probs(many, top_k, top_p)
    assert (tokens == 1).all()
    tokens = sampling.top_k_top_p_sampling_from_probs(many, top_k.flip(0), top_p, filter_apply_order="joint")
    distributed_as(tokens[::2], p)
    # a map from outputs to rows, whose dtype the tokens take
    rows = torch.tensor([1, 0, 1], device=device)
    two = torch.eye(8, device=device)[[3, 6]]
    tokens, valid = sampling.sampling_from_probs(two, indices=rows, return_valid=True)
    assert tokens.tolist() == [6, 3, 6] and tokens.dtype == torch.int64 and valid.all()
    assert sampling.sampling_from_probs(two).dtype == torch.int32


def test_sampling_of_hopeless_rows(device):
    p = torch.tensor([[0.0, 0, 0], [math.nan] * 3, [0, 0, 1]], device=device)
    tokens, valid = sampling.top_p_sampling_from_probs(p, 0.9, return_valid=True)
    assert tokens.tolist() == [0, 0, 2] and valid.tolist() == [False, False, True]
    with pytest.raises(ValueError, match="NaN"):
        sampling.sampling_from_probs(p, check_nan=True)


def test_sampling_seeds(device):
    p, _ = row(device)
    many = p.expand(64, -1)
    run = sampling.sampling_from_probs
    assert torch.equal(run(many, seed=5, offset=2), run(many, seed=5, offset=2))
    assert not torch.equal(run(many, seed=5, offset=2), run(many, seed=6, offset=2))
    assert not torch.equal(run(many, seed=5, offset=2), run(many, seed=5, offset=3))
    distributed_as(run(p.expand(DRAWS, -1), seed=5, offset=0), p)
    one = torch.tensor([5], device=device), torch.tensor([2], device=device)
    assert torch.equal(run(many, seed=one[0], offset=one[1]), run(many, seed=5, offset=2))
    # each row its own: the same wherever it stands
    seeds = torch.arange(64, device=device) + 2**62
    offsets = torch.arange(64, device=device) % 3
    tokens = run(many, seed=seeds, offset=offsets)
    again = run(many[:7], seed=seeds[20:27].view(torch.uint64), offset=offsets[20:27])
    assert torch.equal(again, tokens[20:27])
    a = run(many, generator=torch.Generator(device).manual_seed(3))
    assert torch.equal(a, run(many, generator=torch.Generator(device).manual_seed(3)))
    torch.manual_seed(9)
    a = run(many)
    assert not torch.equal(a, run(many))
    torch.manual_seed(9)
    assert torch.equal(a, run(many))


def test_renormalisation(device):
    p = torch.rand(4, 50, device=device)
    p = p / p.sum(-1, keepdim=True)
    top_k = torch.tensor([1, 7, 50, 99], device=device)
    top_p = torch.tensor([0.1, 0.5, 0.9, 1.0], device=device)
    for name, value in (("k", 7), ("k", top_k), ("p", 0.5), ("p", top_p)):
        got = getattr(sampling, f"top_{name}_renorm_probs")(p, value)
        for r in range(4):
            each = value if not torch.is_tensor(value) else value[r].item()
            ordered, order = p[r].cpu().double().sort(descending=True)
            before = ordered.cumsum(0) - ordered
            keep = torch.arange(50) < each if name == "k" else before < each - 1e-9
            expected = torch.zeros(50).double()
            expected[order[keep]] = ordered[keep] / ordered[keep].sum()
            torch.testing.assert_close(got[r].cpu().double(), expected, rtol=1e-5, atol=1e-6)
    masked = sampling.top_k_mask_logits(p.log(), top_k)
    assert (~masked.isneginf()).sum(-1).tolist() == [1, 7, 50, 50]
    assert sampling.top_k_mask_logits(p.half(), 5).dtype == torch.float16
    close(sampling.softmax(masked), sampling.top_k_renorm_probs(p, top_k))
    ties = torch.tensor([[0.2, 0.3, 0.2, 0.3]], device=device)
    assert (sampling.top_k_renorm_probs(ties, 3) > 0).tolist() == [[True, True, False, True]]  # the first of equals
    x = torch.randn(3, 9, device=device).bfloat16()
    x[0, 2] = -math.inf
    t = torch.tensor([0.5, 2.0, 0.0], device=device)
    got = sampling.softmax(x, t)
    assert got.dtype == torch.float32
    close(got[:2], torch.softmax(x[:2].cpu().double() / t[:2, None].cpu().double(), -1))
    close(got[2], torch.full((9,), 1 / 9))
    close(sampling.softmax(x, temperature=0.5), torch.softmax(x.cpu().double() / 0.5, -1))


def test_chain_speculative_sampling(device):
    """What comes out first is distributed as the target, whatever was drafted."""
    p, _ = row(device)
    drafts = torch.tensor([[0.5, 0.1, 0.1, 0.05, 0.1, 0.05, 0.1, 0.0]] * 2, device=device)
    target = torch.stack([p, p.flip(0), p])
    batch = DRAWS
    drafted = torch.stack([torch.multinomial(d, batch, replacement=True) for d in drafts], 1)
    accepted = torch.full((batch,), 10, dtype=torch.int32, device=device)
    ids, counted, emitted = fi.chain_speculative_sampling(
        drafts.expand(batch, 2, 8),
        drafted.int(),
        target.expand(batch, 3, 8),
        maybe_output_accepted_token_num=accepted,
        seed=3,
        offset=0,
    )
    assert counted is accepted and emitted.dtype == torch.int32
    distributed_as(ids[:, 0], target[0])
    distributed_as(ids[emitted >= 1][:, 1], target[1])
    distributed_as(ids[emitted == 2][:, 2], target[2])
    places = torch.arange(3, device=device)
    assert ((ids == -1) == (places > emitted[:, None])).all()
    alive = places[:2] < emitted[:, None]
    assert torch.equal(ids[:, :2][alive], drafted.int()[alive])
    assert ((accepted - 10) >= emitted).all() and (accepted - 10).max() <= 2
    # each draft by itself passes as often as the distributions overlap
    overlap = sum(torch.minimum(target[i], drafts[i]).sum().item() for i in range(2))
    assert abs((accepted - 10).float().mean().item() - overlap) < 0.06
    same = drafts[None].expand(5, -1, -1)
    ids, _, emitted = fi.chain_speculative_sampling(same, drafted[:5], torch.cat([same, same[:, :1]], 1))
    assert (emitted == 2).all() and torch.equal(ids[:, :2], drafted[:5].int())
