"""Calls run without the interpreter's lock, and threads may share contexts and operators."""

import gc
import subprocess
import sys
import sysconfig
import threading
import time

import numpy
import pytest
import torch

import qkv
import qkv.attention
from qkv.logits_processor import LogitsPipe, Sample, Softmax, Temperature


def in_threads(*functions):
    """Runs the functions at once; raises what one of them raised."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_the_lock_is_released():
    """A thread that only counts goes on while another is inside one long call."""
    x, w = torch.randn(1024, 1024), torch.randn(2048, 1024)
    ctx = qkv.Context("cpu", num_threads=1)
    out = torch.empty(1024, 2048)
    inside, counts = threading.Event(), []

    def compute():
        inside.set()
        begin = time.perf_counter()
        while time.perf_counter() - begin < 0.3:
            qkv.gemm(x, w, out=out, ctx=ctx)
        inside.clear()

    def count():
        inside.wait()
        while inside.is_set():
            counts.append(time.perf_counter())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # the lock changes hands only where it is released
    try:
        in_threads(compute, count)
    finally:
        sys.setswitchinterval(interval)
    assert len(counts) > 100


def test_two_contexts_compute_at_once():
    """Two threads overlap: each is inside a call while the other is."""
    x, w = torch.randn(512, 1024), torch.randn(1024, 1024)
    barrier, spans = threading.Barrier(2), {}

    def compute(name):
        ctx, out = qkv.Context("cpu", num_threads=1), torch.empty(512, 1024)
        qkv.gemm(x, w, out=out, ctx=ctx)
        barrier.wait()
        begin = time.perf_counter()
        for _ in range(5):
            qkv.gemm(x, w, out=out, ctx=ctx)
        spans[name] = (begin, time.perf_counter())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)
    try:
        in_threads(lambda: compute(0), lambda: compute(1))
    finally:
        sys.setswitchinterval(interval)
    assert max(s[0] for s in spans.values()) < min(s[1] for s in spans.values())


def test_many_threads_share_a_context():
    ctx = qkv.Context("cpu", num_threads=2)
    x, w = torch.randn(8, 16, 64), torch.randn(64)
    expected = [qkv.rmsnorm(a, w) for a in x]

    def work(i):
        for _ in range(300):
            assert torch.equal(qkv.rmsnorm(x[i], w, ctx=ctx), expected[i])
            with pytest.raises(qkv.InvalidError, match=r"expected shape \[64\], got \[%d\]" % (i + 1)):
                qkv.rmsnorm(x[i], w[: i + 1], ctx=ctx)  # each thread gets its own message

    in_threads(*(lambda i=i: work(i) for i in range(8)))


def test_many_threads_share_an_operator():
    attention = qkv.attention.Attention(num_qo_heads=2, num_kv_heads=1, head_dim_qk=8, page_size=0, dtype_q="f32", mask="custom", max_requests=2, max_tokens=16, max_kv_len=64)
    k, v = torch.randn(2, 4, 1, 8)
    q = torch.randn(1, 2, 8)
    allowed = [v[0, 0], v[1, 0]]

    def work(i):
        for _ in range(300):
            attention.plan(qo_indptr=[0, 1], kv_indptr=[0, 4], mask_indptr=[0, 1], mask_bits=numpy.array([1 << i], "uint8"))
            out = attention.run(q, k, v)[0, 0]
            assert any(torch.allclose(out, a) for a in allowed)  # whichever plan was the last

    in_threads(lambda: work(0), lambda: work(1), lambda: work(0), lambda: work(1))


VARIANT = qkv.Variant(
    "threads",
    """
    #define VARIANT_LOGIT 1
    QI_FN float variant_logit(const variant_params *v, qi_pos pos, float logit)
    {
        return logit + v->factor * v->table.data[(pos.kv_pos % 4) * v->table.stride[0]];
    }
    """,
    params=(("factor", "f32"), ("table", "f32", 1)),
)
SPEC = dict(num_qo_heads=2, num_kv_heads=1, head_dim_qk=8, page_size=2, dtype_q="f32", max_requests=2, max_tokens=16, max_kv_len=64, max_pages=64)


def test_dicts_may_change_under_a_call():
    """A call keeps what it reads of a dict, although the dict lets go of it meanwhile."""
    shared = qkv.attention.Attention(**SPEC, variant=VARIANT)
    q, pool = torch.randn(2, 2, 8), torch.randn(8, 2, 2, 1, 8)
    level, args = {}, {}

    def renew():
        level.update(qo_indptr=[0, 1, 2], block_table=numpy.array([[3, 1], [0, 2]], "int32"), kv_lens=[3, 2])
        args.update(factor=float("0.5"), table=numpy.arange(4, dtype="float32"))

    renew()
    shared.plan(levels=[level])
    expected = shared.run(q, pool, args=args)
    done = threading.Event()

    def change():
        while not done.is_set():
            renew()

    def work():
        for _ in range(1000):
            shared.plan(levels=[level])
            assert torch.equal(shared.run(q, pool, args=args), expected)

    def all_work():
        try:
            in_threads(work, work)
        finally:
            done.set()

    in_threads(change, all_work)


def test_a_mixture_of_everything():
    """Threads that share a context and an operator, make and drop their own, and get the exact results of one alone,
    with arrays of two frameworks, errors, and a collector that runs all the while."""
    ctx = qkv.Context("cpu", num_threads=2)
    shared = qkv.attention.Attention(**SPEC, ctx=ctx)
    plan = dict(qo_indptr=[0, 1, 3], block_table=[[3, 1], [0, 2]], kv_lens=[3, 4])
    q, pool = torch.randn(3, 2, 8), torch.randn(4, 2, 2, 1, 8)
    x, w = numpy.random.randn(4, 64).astype("float32"), numpy.random.randn(64).astype("float32")
    shared.plan(**plan)
    o, normed, tokens = shared.run(q, pool), qkv.rmsnorm(x, w), qkv.sample(x, seed=[1, 2, 3, 4])
    pipes = [LogitsPipe([Temperature(1.0), Softmax(), Sample()], compile=compile) for compile in (True, False)]

    def work(i):
        own = own_ctx = None
        for n in range(200):
            if n % 20 == 0:
                own_ctx = qkv.Context("cpu", num_threads=1) if i % 2 else ctx
                own = qkv.attention.Attention(**SPEC, ctx=own_ctx)
            own.plan(**plan)
            assert torch.equal(own.run(q, pool), o)
            shared.plan(levels=[plan])
            assert torch.equal(shared.run(q, pool), o)
            assert (qkv.rmsnorm(x, w, ctx=ctx) == normed).all()
            assert (qkv.sample(x, seed=[1, 2, 3, 4], ctx=own_ctx) == tokens).all()
            rows = numpy.tile(x, (1 + n // 50, 1))  # more of them: an unfused pipe is made anew
            assert (pipes[n % 2](rows, seed=[1, 2, 3, 4] * (1 + n // 50), ctx=ctx)[:4] == tokens).all()
            with pytest.raises(qkv.InvalidError, match="kv_lens"):
                shared.plan(qo_indptr=[0, 1, 3], block_table=[[3, 1], [0, 2]], kv_lens=[3, 4 + 100 * (i + 1)])

    def collect():
        for _ in range(20):
            gc.collect()
            time.sleep(0.01)

    in_threads(collect, *(lambda i=i: work(i) for i in range(6)))


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this interpreter is not a free-threaded build")
def test_the_lock_stays_off():
    """An extension that did not say that it needs no lock would bring it back for the whole process."""
    program = "import sys, qkv; qkv.context('cpu'); assert not sys._is_gil_enabled()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_default_contexts_are_made_once():
    program = """
import threading, qkv
found, barrier = [], threading.Barrier(8)
def work():
    barrier.wait()
    found.append(qkv.context("cpu"))
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(found) == 8 and all(f is found[0] for f in found)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
