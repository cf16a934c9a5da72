"""Streams, plans and captured graphs on an emulated GPU; test_emulated_gpu.py runs it with the driver in place."""

import ctypes
import gc
import sys
import types
import weakref

import numpy
from test_dlpack import Array

import qkv
from qkv.attention import Attention
from qkv.logits_processor import LogitsPipe, Sample, Softmax, Temperature, UserStage

cuda = ctypes.CDLL("libcuda.so.1")
handle = ctypes.c_void_p()
assert not cuda.cuInit(0) and not cuda.cuDevicePrimaryCtxRetain(ctypes.byref(handle), 0) and not cuda.cuCtxSetCurrent(handle)


class Pinned(Array):
    """Like torch's arrays of pinned memory: lent as memory of the host."""

    def is_pinned(self):
        return True


def on_gpu(values, kind=Array, device=(2, 0)):
    """An array of a framework nobody knows; memory that the host can look into stays allocated."""
    memory = ctypes.c_void_p()
    assert not cuda.cuMemHostAlloc(ctypes.byref(memory), ctypes.c_size_t(values.nbytes), 0)
    view = numpy.frombuffer((ctypes.c_char * values.nbytes).from_address(memory.value), values.dtype).reshape(values.shape)
    view[...] = values
    return kind(view, device=device)


stream, graph, replay = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
assert not cuda.cuStreamCreate(ctypes.byref(stream), 1)

# The protocol is told of the stream: 1 is the legacy default one.
x, w = numpy.random.randn(3, 64).astype("f2"), numpy.random.randn(64).astype("f2")
expected = x.astype("f8") / numpy.sqrt((x.astype("f8") ** 2).mean(-1, keepdims=True) + 1e-6) * w
for given, asked in ((None, 1), (stream.value, stream.value)):
    dx, dw, out = on_gpu(x), on_gpu(w), on_gpu(x * 0)
    assert qkv.rmsnorm(dx, dw, out=out, stream=given) is out
    assert not cuda.cuCtxSynchronize()
    numpy.testing.assert_allclose(out.values, expected, atol=4e-3)
    assert [a.asked[0]["stream"] for a in (dx, dw, out)] == [asked] * 3
for call, message in (
    (lambda: qkv.rmsnorm(dx, w, out=out), "weight: expected a tensor on CUDA device 0"),
    (lambda: qkv.rmsnorm(dx, dw), "out: expected an array"),
    (lambda: qkv.sample(dx, seed=1), "out: expected an array"),
):
    try:
        call()
    except qkv.Error as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

# Outputs are made by the framework.
class Known(Array):
    __module__ = "cupy"


sys.modules["cupy"] = types.SimpleNamespace(
    empty=lambda shape, dtype: on_gpu(numpy.empty(shape, dtype), Known),
    cuda=types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=stream.value)),
    int32=numpy.int32, bool_=numpy.bool_,
)
logits = on_gpu(numpy.random.randn(3, 64).astype("f4"), Known)
tokens, valid = qkv.sample(logits, seed=2**64 - 1, temperature=0.0, valid=True)
assert type(tokens) is type(valid) is Known and logits.asked[-1]["stream"] == stream.value
assert not cuda.cuStreamSynchronize(stream)
assert (tokens.values == logits.values.argmax(-1)).all() and valid.values.all()
del sys.modules["cupy"]

# Numbers are read by the call, on any stream: nothing is made of them, so that it can be captured.
stage = UserStage(
    "QI_FN float logits_stage(float logit, float value, float element, int token, int request) { return logit - value * element; }",
    value="strength", tensor="cost", default=2.0)
pipe, cost = LogitsPipe([stage, Temperature(0.0), Softmax(), Sample()]), on_gpu(numpy.random.randn(1, 64).astype("f4"))
seeds = on_gpu(numpy.arange(3))
drawn, piped = (on_gpu(numpy.zeros(3, "i4")) for _ in range(2))


def draw():
    qkv.sample(logits, seed=3, offset=1, temperature=0.0, top_k=5, out=drawn, stream=stream.value)
    pipe(logits, seed=seeds, cost=cost, out=piped, stream=stream.value)


draw()
assert not cuda.cuStreamSynchronize(stream)
assert not cuda.cuStreamBeginCapture_v2(stream, 2)
draw()
assert not cuda.cuStreamEndCapture(stream, ctypes.byref(graph))
assert not cuda.cuGraphInstantiateWithFlags(ctypes.byref(replay), graph, ctypes.c_ulonglong(0))
logits.values[...] = numpy.random.randn(3, 64)
assert not cuda.cuGraphLaunch(replay, stream) and not cuda.cuStreamSynchronize(stream)
assert (drawn.values == logits.values.argmax(-1)).all()
assert (piped.values == (logits.values - 2 * cost.values).argmax(-1)).all()
assert not cuda.cuGraphExecDestroy(replay)

# Plans of the host, of the device, and in a graph, which keeps the arrays of its plans.
attention = Attention(num_qo_heads=2, num_kv_heads=1, head_dim_qk=64, page_size=2, dtype_q="f16", max_requests=4, max_tokens=16, max_kv_len=64, max_pages=64, device="cuda")
pool, q = numpy.random.randn(8, 2, 2, 1, 64).astype("f2"), numpy.random.randn(1, 2, 64).astype("f2")
cache, queries, o = on_gpu(pool), on_gpu(q), on_gpu(q * 0)


def check(pages, keys):
    k, v = (pool[pages, half].reshape(-1, 64)[:keys].astype("f8") for half in (0, 1))
    weights = numpy.exp(q[0].astype("f8") @ k.T / 8)
    numpy.testing.assert_allclose(o.values[0], weights / weights.sum(-1, keepdims=True) @ v, atol=4e-3)
    o.values[...] = 0


attention.plan(qo_indptr=[0, 1], block_table=[[3, 5]], kv_lens=[3])
attention.run(queries, cache, o=o)
attention.status()
check([3, 5], 3)

arrays = {name: on_gpu(numpy.array(values, "i4")) for name, values in dict(qo_indptr=[0, 1], block_table=[[2, 6]], kv_lens=[4]).items()}
attention.plan(**arrays, max_tokens=1)
attention.run(queries, cache, o=o)
attention.status()
check([2, 6], 4)

assert not cuda.cuStreamBeginCapture_v2(stream, 2)
attention.plan(**arrays, max_tokens=1, stream=stream.value)
attention.run(queries, cache, o=o, stream=stream.value)
try:
    attention.plan(qo_indptr=[0, 1], block_table=[[3, 5]], kv_lens=[3], stream=stream.value)
except qkv.InvalidError as error:
    assert "captured" in str(error)
else:
    raise AssertionError("a host plan was captured")
assert not cuda.cuStreamEndCapture(stream, ctypes.byref(graph))
assert not cuda.cuGraphInstantiateWithFlags(ctypes.byref(replay), graph, ctypes.c_ulonglong(0))

table, lens = weakref.ref(arrays["block_table"]), arrays["kv_lens"]
del arrays
attention.plan(qo_indptr=[0, 1], block_table=[[3, 5]], kv_lens=[3])
gc.collect()
assert table() is not None
lens.values[0] = 3
assert not cuda.cuGraphLaunch(replay, stream) and not cuda.cuStreamSynchronize(stream)
check([2, 6], 3)
assert not cuda.cuGraphExecDestroy(replay)
del attention
gc.collect()
assert table() is None

# Kernels read a mask where it is, in pinned memory too; a graph of runs alone keeps the one that it was captured with.
attention = Attention(num_qo_heads=2, num_kv_heads=1, head_dim_qk=64, page_size=2, mask="custom", dtype_q="f16", max_requests=4, max_tokens=16, max_kv_len=64, max_pages=64, device="cuda")
step = dict(qo_indptr=[0, 1], block_table=[[3, 5]], kv_lens=[3], mask_indptr=[0, 1])
mask = on_gpu(numpy.array([0b011], "u1"), Pinned, (1, 0))
attention.plan(**step, mask_bits=mask)
assert not cuda.cuStreamBeginCapture_v2(stream, 2)
attention.run(queries, cache, o=o, stream=stream.value)
assert not cuda.cuStreamEndCapture(stream, ctypes.byref(graph))
assert not cuda.cuGraphInstantiateWithFlags(ctypes.byref(replay), graph, ctypes.c_ulonglong(0))
mask = weakref.ref(mask)
attention.plan(**step, mask_bits=on_gpu(numpy.array([0b111], "u1"), Pinned, (1, 0)))
assert mask() is not None
attention.run(queries, cache, o=o)
attention.status()
check([3, 5], 3)
assert not cuda.cuGraphLaunch(replay, stream) and not cuda.cuStreamSynchronize(stream)
check([3, 5], 2)
try:
    attention.plan(**step, mask_bits=[0b011])
except qkv.InvalidError as error:
    assert "mask_bits: expected a tensor on CUDA device 0" in str(error), error
else:
    raise AssertionError("a kernel cannot read a list")
assert not cuda.cuGraphExecDestroy(replay)
del attention
gc.collect()
assert mask() is None
