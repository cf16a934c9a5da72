"""The exports of libqkv under tvm-ffi's prefix, called through apache-tvm-ffi: the results are those of the package."""

import os
import threading

import numpy
import pytest
import torch
from conftest import i32

import qkv
from qkv import _native

tvm_ffi = pytest.importorskip("tvm_ffi")


@pytest.fixture(scope="module")
def lib():
    return tvm_ffi.load_module(_native.__file__)  # finds what the library behind it exports


def test_norms(lib, device):
    x, w = torch.randn(4, 64, device=device), torch.randn(64, device=device)
    out = torch.empty_like(x)
    assert lib.qkv_rmsnorm(out, x, w) is None
    assert torch.equal(out, qkv.rmsnorm(x, w))
    lib.qkv_rmsnorm(out, x, w, 1e-2, 1)  # an integer serves as a number
    assert torch.equal(out, qkv.rmsnorm(x, w, 1e-2, 1.0))
    residual = torch.randn(4, 64, device=device)
    copy = residual.clone()
    lib.qkv_add_rmsnorm(out, residual, x, w)
    assert torch.equal(out, qkv.add_rmsnorm(x, copy, w)) and torch.equal(residual, copy)


def test_numpy_and_strides(lib):
    x, w, out = numpy.random.randn(4, 32).astype("float32"), numpy.ones(32, "float32"), numpy.empty((4, 32), "float32")
    lib.qkv_rmsnorm(out, x, w)
    assert (out == qkv.rmsnorm(x, w)).all()
    wide = torch.randn(4, 64)
    out = torch.empty(4, 32)
    lib.qkv_gated_activation(out, wide[:, :32], wide[:, 32:], 1)
    assert torch.equal(out, qkv.gated_activation(wide[:, :32], wide[:, 32:], "gelu"))


def test_products(lib, device):
    x, w, out = torch.randn(3, 64, device=device), torch.randn(5, 64, device=device), torch.empty(3, 5, device=device)
    lib.qkv_gemm(out, x, w)
    assert torch.equal(out, qkv.gemm(x, w))
    if device == "cuda":
        return  # has no products with packed weights
    packed = torch.randint(256, (5, 2 * 18), dtype=torch.uint8)
    packed[:, 1::18] = 0x3C  # the scales: finite
    lib.qkv_gemm_quantized(out, x, packed, 1)
    assert torch.equal(out, qkv.gemm_quantized(x, packed, "q4_0"))


def test_rope(lib, device):
    q, positions = torch.randn(3, 2, 8, device=device), torch.arange(3, dtype=torch.int32, device=device)
    out = torch.empty_like(q)
    lib.qkv_rope(out, q, None, None, positions, None, None, 4, True, 500.0)
    assert torch.equal(out, qkv.rope(q, positions=positions, rotary_dim=4, interleaved=True, theta=500.0)[0])


def test_sampling(lib, device):
    logits, tokens = torch.randn(4, 100, device=device), torch.empty(4, dtype=torch.int32, device=device)
    lib.qkv_argmax(tokens, logits)
    assert torch.equal(tokens, qkv.argmax(logits))
    seed, top_k = torch.arange(4, device=device), torch.full((4,), 7, dtype=torch.int32, device=device)
    lib.qkv_sample(tokens, logits, 0, None, top_k, None, None, seed.view(torch.uint64))
    assert torch.equal(tokens, qkv.sample(logits, seed=seed, top_k=top_k))
    bias, valid, out = torch.randn(1, 100, device=device), torch.empty(4, dtype=torch.uint8, device=device), torch.empty_like(logits)
    rest = [None] * 4 + [1] + [None] * 7 + [bias, None, None, valid]  # top_p to order, typical_p to prompt, bias to valid
    lib.qkv_renormalize(out, logits, 0, None, top_k, *rest)
    expected, told = qkv.renormalize(logits, top_k=top_k, order="joint", bias=bias, valid=True)
    assert torch.equal(out, expected) and torch.equal(valid.bool(), told)
    lib.qkv_mask_logits(out, logits, 0, None, top_k)
    assert torch.equal(out, qkv.mask_logits(logits, top_k=top_k))
    indices = torch.empty(4, 3, dtype=torch.int32, device=device)
    lib.qkv_top_k(None, indices, logits, 1)  # values are not wanted: the device is that of the next tensor
    assert torch.equal(indices, qkv.top_k(logits, 3)[1])
    chosen = torch.empty(4, 3, device=device)
    lib.qkv_log_probs(chosen, None, logits, indices)
    assert torch.equal(chosen, qkv.log_probs(logits, indices))
    target, drafted = torch.rand(4, 4, 100, device=device), indices.contiguous()
    results = [torch.empty(4, 4, dtype=torch.int32, device=device), torch.empty(4, dtype=torch.int32, device=device), torch.empty(4, 4, dtype=torch.int32, device=device)]
    lib.qkv_verify(*results, target, drafted, None, None, seed.view(torch.uint64))
    assert all(map(torch.equal, results, qkv.verify(target, drafted, seed=seed)))


def test_appends(lib, device):
    k, v = torch.randn(2, 3, 1, 8, device=device)
    caches = [torch.zeros(4, 2, 1, 8, device=device) for _ in range(6)]
    table, lens, indptr = i32(1, 2).view(1, 2).to(device), i32(3).to(device), i32(0, 3).to(device)
    qkv.kv_append(caches[0], caches[1], k, v, qo_indptr=indptr, block_table=table, kv_lens=lens, v_scale=0.5)
    lib.qkv_kv_append(caches[2], caches[3], 0, k, v, indptr, None, None, None, table, lens, None, None, 0.5)
    slots = torch.tensor([2, 3, 4], device=device)
    lib.qkv_kv_append_slots(caches[4], caches[5], 0, k, v, slots, None, torch.full((1,), 0.5, device=device))
    for got in (caches[2:4], caches[4:6]):
        assert torch.equal(got[0], caches[0]) and torch.equal(got[1], caches[1])
    lib.qkv_kv_copy_pages(caches[2], None, i32(1).to(device), i32(3).to(device))
    assert torch.equal(caches[2][3], caches[0][1])


def test_errors_are_raised_with_their_message(lib):
    x, w, out = torch.randn(4, 64), torch.randn(64), torch.empty(4, 64)
    for error, message, args in (
        (ValueError, r"weight: expected shape \[64\], got \[8\]", (out, x, w[:8])),
        (TypeError, "qkv_rmsnorm: expected a tensor as argument 3", (out, x)),
        (TypeError, "qkv_rmsnorm: expected a tensor as argument 1", (None, x, w)),
        (TypeError, "qkv_rmsnorm: expected a number as argument 4", (out, x, w, "1e-6")),
        (TypeError, "qkv_rmsnorm: expected at most 5 arguments, got 6", (out, x, w, 0.1, 0.0, 0)),
    ):
        with pytest.raises(error, match=message):
            lib.qkv_rmsnorm(*args)
    with pytest.raises(TypeError, match="expected an integer of 32 bits as argument 4"):
        lib.qkv_gated_activation(out, x, x, 1 << 40)


def test_threads_and_forks(lib):
    x, w = torch.randn(4, 64), torch.randn(64)
    expected = qkv.rmsnorm(x, w)
    wrong = []

    def work():
        out = torch.empty_like(x)
        for _ in range(200):
            lib.qkv_rmsnorm(out, x, w)
        if not torch.equal(out, expected):
            wrong.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    child = os.fork()
    if not child:
        work()
        os._exit(bool(wrong))
    assert os.waitpid(child, 0)[1] == 0
