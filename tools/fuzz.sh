#!/usr/bin/env bash
# Runs every fuzzer of tests/fuzz for a while; what it finds stays in the corpus folder of its name.
# usage: fuzz.sh BUILD_DIR [SECONDS_EACH]
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -S . -B "$1" -DCMAKE_C_COMPILER=clang -DQKV_BUILD_FUZZERS=ON -DQKV_SANITIZE=address,undefined \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo >/dev/null
cmake --build "$1" -j "$(nproc)"
for fuzzer in "$1"/fuzz_*; do
  [ -x "$fuzzer" ] && [ -f "$fuzzer" ] || continue
  corpus=$1/corpus/$(basename "$fuzzer")
  mkdir -p "$corpus"
  case $fuzzer in *gguf) cp "$1/tiny.gguf" "$corpus/" ;; esac
  "$fuzzer" -max_total_time="${2:-60}" -print_final_stats=0 -verbosity=0 "$corpus"
  echo "$(basename "$fuzzer"): no finding"
done
