"""Shared by the tests of the Python package: random data from a seed that is printed, and references.

Run with the package on the path: PYTHONPATH=build/python pytest tests/python. QKV_TEST_SEED=n repeats a run.
"""

import os
import random

import pytest

torch = pytest.importorskip("torch")
SEED = int(os.environ.get("QKV_TEST_SEED") or random.SystemRandom().randrange(2**31))


def pytest_report_header(config):
    return f"qkv: QKV_TEST_SEED={SEED}"


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU that torch can use")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(SEED)
    random.seed(SEED)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
def dtype(request):
    return request.param


def close(got, expected, dtype=None, scale=1.0):
    """got equals the float64 reference within the rounding of its dtype, times scale."""
    eps = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float8_e4m3fn: 0.07,
           torch.float8_e5m2: 0.13}[dtype or got.dtype] * scale
    torch.testing.assert_close(got.double().cpu(), expected.double().cpu(), rtol=eps, atol=eps)


def refused(text, call, kind=ValueError):
    """call() raises an exception of this kind with this text in its message."""
    with pytest.raises(kind) as error:
        call()
    assert text in str(error.value), str(error.value)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)
