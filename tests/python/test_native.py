"""The functions of the C library through Python, against torch in float64."""

import inspect
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import close, i32

import qkv


def rope_reference(x, positions, rotary_dim, interleaved=False, theta=10000.0):
    """Rotates the last axis of x [nnz, heads, dim] in float64."""
    x = x.double()
    half = rotary_dim // 2
    angles = positions.double()[:, None, None] * theta ** (-2 * torch.arange(half).double() / rotary_dim)
    a, b = (x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]) if interleaved else (x[..., :half], x[..., half:rotary_dim])
    a, b = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned, x[..., rotary_dim:]], -1)


def rmsnorm_reference(x, weight, eps, bias):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (bias + weight.double())


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 33), (5, 4096)])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_rmsnorm(shape, bias, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(shape[1], device=device).to(dtype)
    expected = rmsnorm_reference(x, weight, 1e-5, bias)
    got = qkv.rmsnorm(x, weight, 1e-5, bias)
    assert got.dtype == dtype and got.device == x.device
    close(got, expected, scale=4)
    assert qkv.rmsnorm(x, weight, eps=1e-5, weight_bias=bias, out=x) is x
    close(x, expected, scale=4)


def test_add_rmsnorm(dtype, device):
    x, residual = torch.randn(2, 7, 64, device=device).to(dtype)
    weight = torch.randn(64, device=device)
    total = x.double() + residual.double()
    out = qkv.add_rmsnorm(x, residual, weight)
    close(residual, total)
    close(out, rmsnorm_reference(total, weight, 1e-6, 0), scale=4)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gated_activation_of_the_halves_of_one_array(kind, dtype, device):
    both = torch.randn(5, 96, device=device).to(dtype)
    gate, up = both.chunk(2, -1)
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    expected = functions[kind](gate.double()) * up.double()
    close(qkv.gated_activation(gate, up, kind), expected, scale=4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 16])
def test_rope(interleaved, rotary_dim, dtype, device):
    q, k = torch.randn(6, 4, 32).to(dtype), torch.randn(6, 2, 32).to(dtype)
    positions = i32(0, 1, 5, 1000, 70000, 3)
    expected = [rope_reference(x, positions, rotary_dim or 32, interleaved, 5e5) for x in (q, k)]
    q, k, positions = q.to(device), k.to(device), positions.to(device)
    got = qkv.rope(q, k, positions=positions, rotary_dim=rotary_dim, interleaved=interleaved, theta=5e5)
    for a, b in zip(got, expected):
        close(a, b, scale=2)


def test_rope_by_requests_in_place_and_of_queries_alone():
    q = torch.randn(5, 2, 8)
    expected = rope_reference(q, i32(10, 11, 12, 3, 4), 8)
    got, none = qkv.rope(q, indptr=[0, 3, 5], offsets=[10, 3], q_out=q)
    assert got is q and none is None
    close(q, expected)


def test_rope_scales_as_llama_3():
    """Wave lengths below old_context / high_freq stay, those above old_context / low_freq grow by scale."""
    x = torch.randn(1, 1, 16)
    spec = dict(scale=8.0, low_freq=1.0, high_freq=4.0, old_context=8192.0)
    got, _ = qkv.rope(x, positions=i32(1000), **spec)
    frequency = 10000.0 ** (-torch.arange(8).double() / 8)
    share = ((8192 * frequency / (2 * torch.pi) - 1) / (4 - 1)).clamp(0, 1)
    assert (share == 0).any() and (share == 1).any() and ((share > 0) & (share < 1)).any()
    turn = torch.polar(torch.ones(8).double(), 1000 * frequency * (share + (1 - share) / 8))
    turned = torch.complex(x[..., :8].double(), x[..., 8:].double()) * turn
    close(got, torch.cat([turned.real, turned.imag], -1), scale=50)
    cache = torch.zeros(1, 1, 1, 16)
    qkv.kv_append_slots(cache, cache.clone(), x, x, [0], positions=[1000], rope=qkv.Rope(**spec))
    assert torch.equal(cache[0], got)


@pytest.mark.parametrize("shape", [(0, 4, 8), (1, 1, 1), (3, 5, 0), (17, 33, 65)])
def test_gemm(shape, dtype, device):
    m, n, k = shape
    x, w = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    expected = x.double() @ w.double().T
    close(qkv.gemm(x, w), expected, scale=8)
    out = torch.empty(m, n, device=device)
    assert qkv.gemm(x, w, out=out) is out
    close(out, expected, scale=20)


def test_gemm_quantized_q8_0():
    codes = torch.randint(-127, 128, (6, 2, 32), dtype=torch.int8)
    scales = torch.rand(6, 2, 1).half()
    packed = torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], -1).reshape(6, 68)
    x = torch.randn(3, 64)
    expected = x.double() @ (scales.double() * codes.double()).reshape(6, 64).T
    close(qkv.gemm_quantized(x, packed, "q8_0"), expected, scale=200)


def test_argmax_takes_the_lowest_of_equals(device):
    logits = torch.tensor([[0.0, 2.0, 2.0], [float("nan"), -1.0, -5.0], [float("nan")] * 3], device=device)
    out = qkv.argmax(logits)
    assert out.tolist() == [1, 1, 0] and out.dtype == torch.int32


def test_sample_takes_numbers_lists_and_arrays(device):
    logits = torch.randn(4, 100, device=device)
    top = logits.argmax(-1).tolist()
    assert qkv.sample(logits, seed=1, temperature=0.0).tolist() == top
    assert qkv.sample(logits, seed=2**64 - 1, top_k=1).tolist() == top
    a = qkv.sample(logits, seed=5, offset=9, temperature=2.0, top_p=0.9, min_p=0.01)
    b = qkv.sample(
        logits,
        seed=torch.full((4,), 5, device=device),
        offset=torch.full((4,), 9, device=device),
        temperature=torch.full((4,), 2.0, device=device),
        top_p=torch.full((4,), 0.9, device=device),
        min_p=torch.full((4,), 0.01, device=device),
    )
    assert torch.equal(a, b)
    if device == "cpu":
        assert torch.equal(a, qkv.sample(logits, seed=[5] * 4, offset=[9] * 4, temperature=[2] * 4, top_p=[0.9] * 4, min_p=[0.01] * 4))


@pytest.mark.parametrize("name", ["seed", "temperature", "top_k"])
def test_sample_refuses_none_for_a_row(name):
    with pytest.raises(ValueError, match=f"{name}: expected numbers, got None"):
        qkv.sample(torch.randn(2, 8), **{"seed": 0, name: [1, None]})


def test_sample_draws_from_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(20000, 4)
    tokens = qkv.sample(logits, seed=list(range(20000)))
    shares = torch.bincount(tokens.long(), minlength=4) / 20000
    assert (shares - torch.tensor([0.5, 0.3, 0.2, 0.0])).abs().max() < 0.02


@pytest.mark.parametrize("form", ["csr", "table", "slots"])
@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_kv_append(form, combined, layout, device):
    """Request 0 adds 3 tokens across a page boundary, request 1 none, request 2 one."""
    shape = (6, 2, 4, 2, 8) if layout == "NHD" else (6, 2, 2, 4, 8)
    cache = torch.full(shape, float("nan"), device=device)
    k_cache, v_cache = (cache, None) if combined else (cache[:, 0], cache[:, 1])
    k, v = torch.randn(2, 4, 2, 8, device=device)
    slots = [3 * 4 + 2, 3 * 4 + 3, 5 * 4 + 0, 1 * 4 + 3]
    index = dict(qo_indptr=[0, 3, 3, 4])
    if form == "csr":
        index |= dict(kv_indptr=[0, 2, 2, 3], kv_indices=[3, 5, 1], kv_last_page_len=[1, 0, 4])
    else:
        index |= dict(block_table=[[3, 5], [-1, -1], [1, -1]], kv_lens=[5, 0, 4])
    if device == "cuda":
        index = {name: torch.tensor(value, dtype=torch.int32, device=device) for name, value in index.items()}
    if form == "slots":
        mapping = torch.tensor(slots, device=device)
        assert qkv.kv_append_slots(k_cache, v_cache, k, v, mapping, kv_layout=layout) is None
    else:
        assert qkv.kv_append(k_cache, v_cache, k, v, **index, kv_layout=layout) is None
    for i, slot in enumerate(slots):
        page, at = divmod(slot, 4)
        for half, x in enumerate((k, v)):
            stored = cache[page, half, at] if layout == "NHD" else cache[page, half, :, at]
            assert torch.equal(stored, x[i])
    assert cache.isnan().sum() == cache.numel() - k.numel() - v.numel()


def test_kv_append_rotates_quantises_and_returns_q(device):
    k_cache, v_cache = (torch.zeros(2, 4, 1, 8, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    k, v, q = torch.randn(2, 1, 8), torch.randn(2, 1, 8), torch.randn(2, 3, 8)
    positions = i32(4, 5)
    out = qkv.kv_append_slots(
        k_cache, v_cache, k.to(device), v.to(device), torch.tensor([0, 7], device=device),
        positions=positions.to(device), rope=qkv.Rope(), q=q.to(device), k_scale=0.5,
        v_scale=torch.tensor([2.0], device=device),
    )
    close(out, rope_reference(q, positions, 8))
    got = k_cache.float().cpu()
    close(torch.stack([got[0, 0], got[1, 3]]), rope_reference(k, positions, 8) / 0.5, torch.float8_e4m3fn)
    close(v_cache.float().cpu()[1, 3], v[1] / 2.0, torch.float8_e4m3fn)


def test_kv_copy_pages(device):
    cache = torch.randn(5, 2, 3, 1, 8, device=device)
    before = cache.clone()
    indices = [torch.tensor(pages, dtype=torch.int32, device=device) for pages in ([0, 4], [2, 1])]
    qkv.kv_copy_pages(cache, None, *indices)
    assert torch.equal(cache[[2, 1]], before[[0, 4]]) and torch.equal(cache[[0, 3, 4]], before[[0, 3, 4]])


def test_numpy_in_numpy_out():
    x, w = numpy.random.randn(3, 16).astype("float32"), numpy.random.randn(16).astype("float16")
    out = qkv.gemm(x, numpy.stack([w, w]))
    assert type(out) is numpy.ndarray and out.dtype == numpy.float32
    numpy.testing.assert_allclose(out, x.astype("float64") @ numpy.stack([w, w]).T.astype("float64"), rtol=1e-5, atol=1e-5)
    assert qkv.argmax(x).dtype == numpy.int32
    assert qkv.empty_like(x, (2, 0), "i8").dtype == numpy.int8


def test_jax_in_jax_out():
    jax = pytest.importorskip("jax")
    x = jax.numpy.arange(24, dtype=jax.numpy.bfloat16).reshape(3, 8)
    out = qkv.gemm(x, x)
    assert isinstance(out, jax.Array) and out.dtype == jax.numpy.bfloat16 and out.shape == (3, 3)
    numpy.testing.assert_allclose(numpy.asarray(out, "float64"), numpy.asarray(x, "float64") @ numpy.asarray(x, "float64").T, rtol=8e-3)
    with pytest.raises(qkv.InvalidError, match="out: .* JAX"):
        qkv.gemm(x, x, out=out)


@pytest.mark.parametrize("given", ["e4m3", "float8_e4m3fn", torch.float8_e4m3fn])
def test_empty_like(given):
    out = qkv.empty_like(torch.empty(2, 3), (4, 0, 1), given)
    assert out.shape == (4, 0, 1) and out.dtype == torch.float8_e4m3fn
    assert qkv.empty_like(out).shape == out.shape
    assert qkv.empty_like(out, 7, numpy.dtype("int32")).dtype == torch.int32
    assert qkv.empty_like(out, 7, numpy.float32).dtype == torch.float32


def test_errors_are_the_librarys_and_name_the_argument():
    x, w = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(qkv.InvalidError, match=r"weight: expected shape \[8\], got \[7\]") as caught:
        qkv.rmsnorm(x, w[:7])
    assert caught.value.status == 1 and isinstance(caught.value, (qkv.Error, ValueError))
    assert issubclass(qkv.UnsupportedError, NotImplementedError) and issubclass(qkv.OutOfMemoryError, MemoryError)
    assert [e.status for e in (qkv.UnsupportedError, qkv.OutOfMemoryError, qkv.CompileError, qkv.DeviceError, qkv.CommError, qkv.InternalError)] == [2, 3, 4, 5, 6, 7]
    with pytest.raises(qkv.InvalidError, match="eps"):
        qkv.rmsnorm(x, w, eps=-1.0)
    with pytest.raises(qkv.InvalidError, match='kind: expected "silu" or'):
        qkv.gated_activation(x, x, "relu")
    with pytest.raises(qkv.InvalidError, match="x: expected dtype"):
        qkv.rmsnorm(x.double(), w)
    for kind in ("\u00e9" * 600, "x" + "\u00e9" * 600):  # longer than messages get: one is cut within a character
        with pytest.raises(qkv.InvalidError, match="kind: expected .*\u00e9\u00e9"):
            qkv.gated_activation(x, x, kind)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, w: qkv.rmsnorm(x), "misses the argument 'weight'"),
        (lambda x, w: qkv.rmsnorm(x, w, 1e-6, 0.0, x), "takes 4 positional arguments, got 5"),
        (lambda x, w: qkv.rmsnorm(x, w, weigth=w), "no parameter 'weigth'"),
        (lambda x, w: qkv.rmsnorm(x, weight=w, x=x), "x is given twice"),
        (lambda x, w: qkv.rmsnorm(x, w, eps="small"), "eps: expected a number, got 'small'"),
        (lambda x, w: qkv.sample(x, seed=0.5), "seed: expected an integer, got 0.5"),
        (lambda x, w: qkv.sample(x, seed=[0, 0.5]), "seed: expected an integer, got 0.5"),
        (lambda x, w: qkv.rope(x, theta="big"), "theta: expected a number, got 'big'"),
        (lambda x, w: qkv.kv_append_slots(x, x, x, x, [0], rope=qkv.Rope(theta="big")), "rope.theta: expected a number"),
        (lambda x, w: qkv.rmsnorm(x, w, ctx="cpu"), "ctx: expected a qkv.Context"),
        (lambda x, w: qkv.rmsnorm(None, w), "x: expected an array"),
        (lambda x, w: qkv.rmsnorm(x, [1.0] * 8), "weight: expected an array"),
        (lambda x, w: qkv.kv_copy_pages(None, None, [0], [1]), "k_cache: expected an array"),
    ],
)
def test_wrong_calls_are_type_errors(call, message):
    with pytest.raises(TypeError, match=message):
        call(torch.randn(2, 8), torch.randn(8))


def test_signatures_and_docstrings_are_there():
    for name in ("rmsnorm", "rope", "gemm", "sample", "kv_append", "kv_append_slots", "empty_like"):
        function = getattr(qkv, name)
        assert function.__doc__ and "..." not in str(inspect.signature(function))
    assert str(inspect.signature(qkv.gemm)) == "(x, w, *, out=None, ctx=None, stream=None)"
    assert list(inspect.signature(qkv.attention.Attention.run).parameters)[:4] == ["self", "q", "k", "v"]


def test_versions_agree():
    assert qkv.version() == tuple(map(int, qkv.__version__.split(".")))


def test_context():
    ctx = qkv.Context("cpu", num_threads=3)
    assert ctx.num_threads == 3 and ctx.device_name.startswith("cpu:") and isinstance(ctx.compiler, str)
    assert qkv.context("cpu") is qkv.context(torch.device("cpu"))
    x = torch.randn(2, 8)
    assert torch.equal(qkv.rmsnorm(x, x[0], ctx=ctx), qkv.rmsnorm(x, x[0]))
    with pytest.raises(qkv.InvalidError, match="device"):
        qkv.Context("tpu")
    with pytest.raises(qkv.InvalidError, match="jit_policy"):
        qkv.Context(jit_policy="maybe")
    with pytest.raises(qkv.Error, match="isa"):
        qkv.Context(isa="mmx")


def test_children_of_fork_get_a_context_of_their_own():
    program = """
import os, numpy, qkv
x = numpy.ones((2, 8), "float32")
expected = qkv.rmsnorm(x, x[0])
child = os.fork()
if child == 0:
    os._exit(0 if (qkv.rmsnorm(x, x[0]) == expected).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.gpu
def test_the_current_stream_of_torch_is_used():
    x, w = torch.randn(4096, 4096, device="cuda"), torch.randn(4096, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what runs on another stream would see the old x
        x.fill_(1.0)
        out = qkv.rmsnorm(x, w)
        seen = out.clone()
    side.synchronize()
    close(seen, w.expand_as(x), scale=4)
