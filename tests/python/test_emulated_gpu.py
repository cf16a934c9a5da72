"""GPU paths where no GPU is: the emulated driver of tests/emulator, found beside a package in a build folder."""

import os
import pathlib
import subprocess
import sys

import pytest

import qkv

EMULATOR = pathlib.Path(qkv.__file__).resolve().parents[2] / "emulator"


@pytest.mark.skipif(not (EMULATOR / "libcuda.so.1").exists(), reason="the emulator is not built (QKV_BUILD_TESTS)")
def test_streams_plans_and_graphs():
    here = pathlib.Path(__file__).parent
    environment = os.environ | dict(
        LD_LIBRARY_PATH=str(EMULATOR), QKV_NVRTC=str(EMULATOR / "libnvrtc.so.13"), QKV_CACHE_DIR=str(EMULATOR / "cache")
    )
    subprocess.run([sys.executable, here / "emulated_gpu.py"], env=environment, check=True, timeout=600)
