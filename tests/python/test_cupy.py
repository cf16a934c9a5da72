"""Arrays of CuPy, which know DLPack and streams of their own."""

import pytest

cupy = pytest.importorskip("cupy")

import qkv  # noqa: E402

pytestmark = pytest.mark.gpu


def expected(x):
    return x / cupy.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


def test_arrays_go_in_and_come_out():
    x = cupy.random.standard_normal((5, 64), dtype=cupy.float32)
    y = qkv.rmsnorm(x, cupy.ones(64, dtype=cupy.float32))
    assert isinstance(y, cupy.ndarray) and y.shape == x.shape and y.dtype == x.dtype
    cupy.testing.assert_allclose(y, expected(x), rtol=1e-5, atol=1e-6)
    out = cupy.empty_like(x)
    assert qkv.rmsnorm(x[::-1].copy(), cupy.ones(64, dtype=cupy.float32), out=out) is out
    cupy.testing.assert_allclose(out, expected(x)[::-1], rtol=1e-5, atol=1e-6)


def test_the_current_stream_is_used():
    stream = cupy.cuda.Stream(non_blocking=True)
    weight = cupy.ones(1 << 17, dtype=cupy.float32)
    cupy.cuda.Device().synchronize()
    with stream:
        x = cupy.random.standard_normal((8, 1 << 17), dtype=cupy.float32)
        for _ in range(20):
            x = qkv.rmsnorm(x, weight)  # each reads what the one before writes
        y = x * 2
    stream.synchronize()
    cupy.testing.assert_allclose((y / 2 * y / 2).mean(axis=-1), cupy.ones(8), rtol=1e-3)
