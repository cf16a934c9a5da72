"""References: nothing is kept that need not be, and what the library borrows is kept."""

import gc
import sys
import weakref

import numpy
import pytest
import torch
from conftest import i32

import qkv
from qkv.logits_processor import LogitsPipe, Sample, Softmax, Temperature


def operator(**changes):
    spec = dict(num_qo_heads=2, num_kv_heads=1, head_dim_qk=8, page_size=2, dtype_q="f32", max_requests=4, max_tokens=16, max_kv_len=64, max_pages=64)
    return qkv.attention.Attention(**(spec | changes))


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def grows(call, repeats=3000, limit=4 << 20):
    for _ in range(200):
        call()
    gc.collect()
    before = resident_bytes()
    for _ in range(repeats):
        call()
    gc.collect()
    return resident_bytes() - before > limit


@pytest.mark.parametrize("make", [torch.randn, lambda *shape: numpy.random.randn(*shape).astype("float32")], ids=["torch", "numpy"])
def test_arrays_are_released(make):
    x, w = make(4, 8), make(8)
    counts = sys.getrefcount(x), sys.getrefcount(w)
    for _ in range(100):
        out = qkv.rmsnorm(x, w)
    assert (sys.getrefcount(x), sys.getrefcount(w)) == counts
    assert sys.getrefcount(out) == 2
    watched = weakref.ref(out)
    del out
    assert watched() is None


def test_results_given_are_the_arrays_given():
    x, out = torch.randn(4, 8), torch.empty(4, 8)
    count = sys.getrefcount(out)
    assert qkv.rmsnorm(x, x[0], out=out) is out
    assert sys.getrefcount(out) == count


@pytest.mark.parametrize("library", ["torch", "numpy", "jax"])
def test_memory_does_not_grow(library):
    """1 MB a call: a leak of the output or an input would pass the limit in a few calls."""
    numbers = numpy.random.randn(4, 65536).astype("float32")
    if library == "torch":
        numbers = torch.tensor(numbers)
    elif library == "jax":
        numbers = pytest.importorskip("jax").numpy.asarray(numbers)
    assert not grows(lambda: qkv.rmsnorm(numbers, numbers[0]), repeats=200)


def test_failures_do_not_leak():
    x, w, short = torch.randn(4, 65536), torch.randn(65536), numpy.zeros(3, "float32")

    def fail():
        for bad in (lambda: qkv.rmsnorm(x, short), lambda: qkv.rmsnorm(x, w, out=short), lambda: qkv.rmsnorm(x, "w"), lambda: qkv.sample(x, seed=[1, 2])):
            with pytest.raises((qkv.Error, TypeError)):
                bad()

    count = sys.getrefcount(short)
    assert not grows(fail, repeats=200)
    assert sys.getrefcount(short) == count


def test_sampling_and_pipes_do_not_leak():
    x = torch.randn(4, 4096)
    ctx = qkv.Context("cpu", num_threads=1)
    count = sys.getrefcount(ctx)
    pipe = LogitsPipe([Temperature(0.5), Softmax(), Sample()], compile=False)

    def work():
        qkv.renormalize(x, temperature=[1, 2, 3, 4], valid=True, ctx=ctx)
        qkv.log_probs(x, qkv.top_k(x, 5)[1], ranks=True)
        pipe(x, seed=1, ctx=ctx)
        LogitsPipe([Softmax(), Sample(seed=[1])], compile=False)(x)
        with pytest.raises(qkv.Error):
            pipe(x, seed=1, temperature=-1.0, ctx=ctx)
        with pytest.raises(qkv.Error):
            pipe(x, ctx=ctx)

    assert not grows(work, repeats=200)
    assert sys.getrefcount(ctx) == count + 1  # the pipe keeps it
    del pipe
    assert sys.getrefcount(ctx) == count


def test_plans_and_runs_do_not_leak():
    attention = operator()
    k, v = torch.randn(2, 8, 2, 1, 8)
    q = torch.randn(3, 2, 8)

    def step():
        attention.plan(qo_indptr=[0, 3], block_table=[[1, 2]], kv_lens=i32(4))
        attention.run(q, k, v, lse=True)

    assert not grows(step)
    assert not grows(lambda: attention.plan(levels=[dict(qo_indptr=[0, 3], block_table=[[1, 2]], kv_lens=[4])]))


def test_operators_and_contexts_do_not_leak():
    assert not grows(lambda: operator(max_tokens=4096), repeats=300)
    ctx = qkv.Context("cpu", num_threads=1)
    count = sys.getrefcount(ctx)
    attention = operator(ctx=ctx)
    assert attention.ctx is ctx
    assert sys.getrefcount(ctx) == count + 1
    del attention
    assert sys.getrefcount(ctx) == count


def test_an_operator_keeps_its_context():
    attention = operator(ctx=qkv.Context("cpu", num_threads=1))
    gc.collect()
    attention.plan(qo_indptr=[0, 1], block_table=[[0]], kv_lens=[1])
    cache = torch.randn(1, 2, 2, 1, 8)
    out = attention.run(torch.randn(1, 2, 8), cache)
    torch.testing.assert_close(out[0], cache[0, 1, 0].expand(2, 8))


def test_index_arrays_are_free_after_plan():
    attention = operator()
    arrays = dict(qo_indptr=i32(0, 1), kv_indptr=i32(0, 1), kv_indices=i32(3), kv_last_page_len=i32(1))
    counts = [sys.getrefcount(a) for a in arrays.values()]
    attention.plan(**arrays)
    assert [sys.getrefcount(a) for a in arrays.values()] == counts


@pytest.mark.parametrize("make", [lambda a: torch.tensor(a), lambda a: a, lambda a: a.tolist()], ids=["torch", "numpy", "list"])
def test_the_mask_is_kept_until_the_next_plan(make):
    attention = operator(mask="custom", page_size=0)
    k, v = torch.randn(2, 5, 1, 8)
    q = torch.randn(1, 2, 8)
    bits = make(numpy.array([0b01101], "uint8"))
    plan = dict(qo_indptr=[0, 1], kv_indptr=[0, 5], mask_indptr=[0, 1])
    attention.plan(**plan, mask_bits=bits)
    watched = weakref.ref(bits) if not isinstance(bits, list) else None
    del bits
    gc.collect()
    junk = [numpy.full(1, 255, "uint8") for _ in range(1000)]  # would land in the freed memory
    seen = torch.tensor([0, 2, 3])
    weights = (q[0].double() @ k[seen, 0].double().T / 8**0.5).softmax(-1)
    torch.testing.assert_close(attention.run(q, k, v)[0].double(), weights @ v[seen, 0].double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(qkv.InvalidError):  # a failed plan changes nothing
        attention.plan(qo_indptr=[0, 99], kv_indptr=[0, 5], mask_indptr=[0, 1], mask_bits=[0])
    assert watched is None or watched() is not None
    attention.plan(**plan, mask_bits=[31])
    assert watched is None or watched() is None
    del junk


def test_operators_in_cycles_are_collected():
    class Mask(torch.Tensor):
        pass

    attention = operator(mask="custom", page_size=0)
    bits = torch.tensor([31], dtype=torch.uint8).as_subclass(Mask)
    bits.owner = attention
    attention.plan(qo_indptr=[0, 1], kv_indptr=[0, 5], mask_indptr=[0, 1], mask_bits=bits)
    watched = weakref.ref(bits)
    del attention, bits
    gc.collect()
    assert watched() is None


@pytest.mark.gpu
def test_arrays_of_captured_plans_stay():
    attention = operator(device="cuda", dtype_q="f16")
    cache = torch.randn(8, 2, 2, 1, 8, device="cuda").half()
    q = torch.randn(1, 2, 8, device="cuda").half()
    arrays = dict(qo_indptr=i32(0, 1).cuda(), block_table=torch.tensor([[3, 5]], dtype=torch.int32, device="cuda"), kv_lens=i32(3).cuda())
    attention.plan(**arrays, max_tokens=1)
    o = attention.run(q, cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.plan(**arrays, max_tokens=1)
        attention.run(q, cache, o=o)
    table = weakref.ref(arrays["block_table"])
    lens = arrays["kv_lens"]
    del arrays
    attention.plan(qo_indptr=i32(0, 1).cuda(), block_table=torch.zeros(1, 2, dtype=torch.int32, device="cuda"), kv_lens=i32(1).cuda(), max_tokens=1)
    assert table() is not None
    lens.fill_(1)
    graph.replay()
    torch.testing.assert_close(o[0], cache[3, 1, 0].expand(2, 8))
    del graph, attention
    assert table() is None
