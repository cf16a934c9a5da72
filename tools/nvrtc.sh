#!/usr/bin/env bash
# Prints the path of an NVRTC for the tests where the library finds none by itself (device/find_library.c):
# that of NVIDIA's Python package, fetched once into the cache folder. Prints nothing where there is one.
# usage: nvrtc.sh
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
version=13.0.88

found() {
  python3 - <<'PYTHON'
import ctypes, glob, os, sys
places = ["/usr/local/cuda/lib64", "/usr/local/cuda-*/lib64"]
for variable, below in (("CUDA_HOME", "lib64"), ("CUDA_PATH", "lib64"), ("CONDA_PREFIX", "lib"),
                        ("CONDA_PREFIX", "lib/python3*/site-packages/nvidia/*/lib"),
                        ("VIRTUAL_ENV", "lib/python3*/site-packages/nvidia/*/lib")):
    if os.environ.get(variable):
        places.append(os.environ[variable] + "/" + below)
names = ["libnvrtc.so.%d" % major for major in (14, 13, 12)]
names += [path for place in places for name in names for path in glob.glob(place + "/" + name)]
for name in names:
    try:
        library, major, minor = ctypes.CDLL(name), ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    except (OSError, AttributeError):
        continue
    if (major.value, minor.value) >= (12, 8):
        sys.exit(0)
sys.exit(1)
PYTHON
}

if [ -n "${QKV_NVRTC:-}" ]; then
  echo "$QKV_NVRTC"
  exit 0
fi
found && exit 0
packages=${XDG_CACHE_HOME:-$HOME/.cache}/qkv/nvrtc-$version
library=$packages/nvidia/cu13/lib/libnvrtc.so.13
if [ ! -e "$library" ]; then
  echo "Installing: nvidia-cuda-nvrtc $version, into $packages" >&2
  PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$packages" "nvidia-cuda-nvrtc==$version" >&2 ||
    { echo "It failed: tests that compile for GPUs will be skipped." >&2; exit 0; }
fi
echo "$library"
