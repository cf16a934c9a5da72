#!/usr/bin/env bash
# Cross-compiles library and tool for AArch64, then lets the tool verify every operator under an
# emulator (each bench compares its operator with a computation of its own before it times anything).
# On an AArch64 machine there is nothing to do: all else here ran natively.
# usage: check_aarch64.sh BUILD_DIR JOBS
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(uname -m)" != aarch64 ] || exit 0
cmake -S . -B "$1" -DCMAKE_TOOLCHAIN_FILE="$PWD/cmake/aarch64.cmake" -DQKV_WERROR=ON \
  -DQKV_BUILD_TESTS=OFF -DQKV_BUILD_EXAMPLES=OFF >/dev/null
cmake --build "$1" -j "$2"
emulator="qemu-aarch64 -L /usr/aarch64-linux-gnu"
$emulator "$1/qkv" info
$emulator "$1/qkv" bench --seconds 0 --file bench/problems/smoke.txt
