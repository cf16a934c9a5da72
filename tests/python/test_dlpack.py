"""How arrays come in: DLPack's edge cases, with arrays of a framework that these tests write."""

import ctypes
import subprocess
import sys

import numpy
import pytest
import torch

import qkv

# ---- a framework: objects whose __dlpack__ says what a test wants ------------------------------------------


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device", Device), ("ndim", ctypes.c_int), ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", Tensor),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Array:
    """Memory of a NumPy array, lent as told. strides: True = given, None = NULL."""

    def __init__(self, values, *, name=b"dltensor_versioned", major=1, flags=0, byte_offset=0, strides=True, device=(1, 0), old=False):
        self.values = values
        self.shape = (ctypes.c_int64 * values.ndim)(*values.shape)
        self.strides = (ctypes.c_int64 * values.ndim)(*(s // values.itemsize for s in values.strides))
        self.name, self.device, self.old, self.asked = name, device, old, []
        tensor = Tensor(
            values.ctypes.data - byte_offset or None, Device(*device), values.ndim, {"i": 0, "u": 1, "f": 2, "b": 6}[values.dtype.kind],
            values.itemsize * 8, 1, self.shape, self.strides if strides else None, byte_offset,
        )
        self.managed = Versioned(major, 0, None, None, flags, tensor) if name == b"dltensor_versioned" else Managed(tensor)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        self.asked.append(options)
        if self.old and "max_version" in options:
            raise TypeError("unexpected keyword argument 'max_version'")
        return new_capsule(ctypes.addressof(self.managed), self.name, None)


x = numpy.random.randn(3, 8).astype("float32")
w = numpy.random.randn(8).astype("float32")
expected = qkv.rmsnorm(x, w)


def norm(array, **options):
    out = numpy.full_like(x, numpy.nan)
    assert qkv.rmsnorm(array, w, out=options.pop("out", out), **options) is not None
    return out


# ---- in ----------------------------------------------------------------------------------------------------


def test_versioned_capsules_are_asked_for():
    array = Array(x)
    assert (norm(array) == expected).all()
    assert array.asked == [{"max_version": (1, 3)}]


def test_old_capsules_are_read():
    array = Array(x, name=b"dltensor", old=True)
    assert (norm(array) == expected).all()
    assert array.asked == [{"max_version": (1, 3)}, {}]


def test_capsules_of_another_major_version_are_refused():
    with pytest.raises(qkv.InvalidError, match="x: expected DLPack version 1, got 2.0"):
        norm(Array(x, major=2))


@pytest.mark.parametrize("name", [b"used_dltensor", b"used_dltensor_versioned", b"something"])
def test_consumed_and_foreign_capsules_are_refused(name):
    array = Array(x, name=b"dltensor")
    array.name = name
    with pytest.raises(qkv.InvalidError, match="x: expected a DLPack capsule"):
        norm(array)


def test_something_that_is_no_capsule_is_refused():
    class Odd(Array):
        def __dlpack__(self, **options):
            return 5

    with pytest.raises(qkv.InvalidError, match="x: expected a DLPack capsule"):
        norm(Odd(x))


@pytest.mark.parametrize("error", [BufferError("locked"), RuntimeError("odd"), ValueError("no\nbacktrace")])
def test_what_dlpack_raises_is_passed_on_with_the_arguments_name(error):
    class Odd(Array):
        def __dlpack__(self, **options):
            raise error

    with pytest.raises(qkv.InvalidError, match=f"x: expected an array that DLPack can lend: {str(error)[:2]}") as caught:
        norm(Odd(x))
    assert caught.value.__cause__ is error and "backtrace" not in str(caught.value)


def test_interrupts_are_left_alone():
    class Odd(Array):
        def __dlpack__(self, **options):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        norm(Odd(x))


def test_a_device_that_is_no_pair_is_refused():
    array = Array(x)
    array.device = None
    with pytest.raises(qkv.InvalidError, match="x: .*expected a pair"):
        norm(array)


def test_byte_offset_and_missing_strides_count():
    assert (norm(Array(x, byte_offset=64)) == expected).all()
    assert (norm(Array(x, strides=None)) == expected).all()


def test_outer_strides_are_free():
    wide = numpy.random.randn(3, 20).astype("float32")
    wide[:, 4:12] = x
    assert (norm(wide[:, 4:12]) == expected).all()
    tensor = torch.tensor(wide)[:, 4:12]
    out = torch.empty(8, 3, 2)[:, :, 0].T.contiguous()
    assert (qkv.rmsnorm(tensor, torch.tensor(w), out=out).numpy() == expected).all()


def test_a_last_axis_with_gaps_is_refused():
    with pytest.raises(qkv.InvalidError, match="x: expected a contiguous last axis, got stride 2"):
        norm(numpy.zeros((3, 16), "float32")[:, ::2])
    with pytest.raises(qkv.InvalidError, match="x: expected a contiguous last axis, got stride 2"):
        qkv.rmsnorm(torch.zeros(3, 16)[:, ::2], torch.zeros(8))


def test_negative_strides_are_refused():
    with pytest.raises(qkv.InvalidError, match="x: .*stride"):
        norm(x[::-1])


@pytest.mark.parametrize("make", [numpy.zeros, torch.zeros])
def test_no_rows_are_fine(make):
    out = qkv.rmsnorm(make((0, 8), dtype=numpy.float32 if make is numpy.zeros else torch.float32), w if make is numpy.zeros else torch.tensor(w))
    assert tuple(out.shape) == (0, 8)


def test_frameworks_mix_on_one_device():
    assert (norm(torch.tensor(x)) == expected).all()
    assert (qkv.rmsnorm(x, torch.tensor(w)) == expected).all()


# ---- out ---------------------------------------------------------------------------------------------------


def test_read_only_arrays_are_read_but_not_written():
    locked = x.copy()
    locked.flags.writeable = False
    assert (norm(locked) == expected).all()
    for out in (locked, Array(x, flags=1)):
        with pytest.raises(qkv.InvalidError, match="out: expected an array that can be written, got a read-only one"):
            norm(x, out=out)
    assert (locked == x).all()


def test_outputs_of_a_framework_nobody_knows_must_be_given():
    array = Array(x)
    with pytest.raises(qkv.UnsupportedError, match="out: expected an array"):
        qkv.rmsnorm(array, w)
    out = Array(numpy.empty_like(x))
    assert qkv.rmsnorm(array, w, out=out) is out
    assert (out.values == expected).all()


def test_outputs_that_do_not_fit_in_memory():
    with pytest.raises(qkv.OutOfMemoryError, match="out: "):
        qkv.empty_like(torch.zeros(1), 1 << 50)
    with pytest.raises(MemoryError):
        qkv.empty_like(x, 1 << 50)


def test_subclasses_of_tensors_are_tensors():
    class Mine(torch.Tensor):
        pass

    assert (qkv.rmsnorm(torch.tensor(x).as_subclass(Mine), torch.tensor(w)).numpy() == expected).all()


# ---- devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [(4, 0), (10, 0), (2, -3), (2, 10**6)])
def test_devices_of_others_are_named(device):
    with pytest.raises(qkv.Error, match="device: |x: "):
        norm(Array(x, device=device))


def test_the_array_on_another_device_is_named():
    with pytest.raises(qkv.InvalidError, match="weight: .*(device|CUDA|cuda)"):
        qkv.rmsnorm(x, Array(w, device=(2, 0)), out=numpy.empty_like(x))


@pytest.mark.gpu
def test_arrays_on_a_gpu_and_the_host_do_not_mix():
    with pytest.raises(qkv.InvalidError, match="weight: "):
        qkv.rmsnorm(torch.tensor(x, device="cuda"), torch.tensor(w))


# ---- autograd ----------------------------------------------------------------------------------------------


def test_what_autograd_would_record_is_refused():
    weight = torch.nn.Parameter(torch.tensor(w))
    with pytest.raises(qkv.InvalidError, match="weight: expected an array outside of autograd"):
        qkv.rmsnorm(torch.tensor(x), weight)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert (qkv.rmsnorm(torch.tensor(x), weight).numpy() == expected).all()


def test_torch_without_an_exchange_table():
    """torch before 2.10 goes through __dlpack__, weights under no_grad() included."""
    program = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import qkv
x, w = torch.randn(3, 8), torch.nn.Parameter(torch.ones(8))
with torch.no_grad():
    out = qkv.rmsnorm(x, w)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
    assert qkv.gemm(x.bfloat16(), x).dtype == torch.bfloat16
    assert qkv.empty_like(x, 3, "e4m3").dtype == torch.float8_e4m3fn
try:
    qkv.rmsnorm(x, w)
except qkv.InvalidError as error:
    assert "weight: expected an array outside of autograd" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# ---- lists -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "src, error, message",
    [
        ([0, 2**31], ValueError, "src: expected integers from -2147483648 to 2147483647, got 2147483648"),
        ([0, 1.5], TypeError, "src: expected an integer, got 1.5"),
        ([0, None], ValueError, "src: expected numbers, got None"),
        ([[0, 1], [2]], qkv.InvalidError, "src: expected rows of one length"),
        ([[0, 1]], qkv.InvalidError, "src: expected"),
        ("01", TypeError, "src: expected an array"),
    ],
)
def test_lists_that_are_no_arrays(src, error, message):
    with pytest.raises(error, match=message):
        qkv.kv_copy_pages(numpy.zeros((9, 1, 1, 8), "float32"), None, src, [3, 4])


@pytest.mark.parametrize("form", [list, tuple, numpy.array, lambda pages: range(pages[0], pages[-1] + 1), torch.tensor])
def test_index_arrays_of_any_kind(form):
    cache = numpy.random.randn(9, 1, 1, 8).astype("float32")
    src, dst = form([1, 2]), [5, 7]
    if hasattr(src, "dtype"):
        src = src.astype("int32") if isinstance(src, numpy.ndarray) else src.int()
    qkv.kv_copy_pages(cache, None, src, dst)
    assert (cache[[5, 7]] == cache[[1, 2]]).all()
