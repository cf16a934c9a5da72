#!/usr/bin/env bash
# Runs every fuzzer of tests/fuzz for a while; what it finds stays in the corpus folder of its name.
# usage: fuzz.sh BUILD_DIR [SECONDS_EACH]
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -S . -B "$1" -DCMAKE_C_COMPILER=clang -DQKV_BUILD_FUZZERS=ON -DQKV_SANITIZE=address,undefined \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo >"$1.log" 2>&1 && rm "$1.log" || { cat "$1.log"; exit 1; }
cmake --build "$1" -j "$(nproc)" --target fuzzers

# What a fuzzer begins from: files, problems, or long enough bytes for those that read choices.
seeds() {
  case $1 in
  fuzz_gguf) cp "$build/tiny.gguf" "$2/" ;;
  fuzz_problem) grep -hv '^#' bench/problems/*.txt | split --lines=1 --suffix-length=4 - "$2/" ;;
  fuzz_plan | fuzz_variant)
    for i in {1..50}; do head -c 400 /dev/urandom >"$2/random-$i"; done ;;
  esac
}

build=$1
run() {
  local name
  name=$(basename "$1")
  mkdir -p "$build/corpus/$name"
  seeds "$name" "$build/corpus/$name"
  # a hang is a finding too, but a busy machine is none
  if ! "$1" -max_total_time="$2" -timeout=60 -print_final_stats=1 -verbosity=0 \
    -artifact_prefix="$build/corpus/$name-" "$build/corpus/$name" >"$build/$name.log" 2>&1; then
    cat "$build/$name.log"
    exit 1
  fi
  echo "$name: no finding in $(sed -n 's/^stat::number_of_executed_units: //p' "$build/$name.log") runs"
}
export -f run seeds
export build

find "$build" -maxdepth 1 -name 'fuzz_*' -type f -executable -print0 | sort -z |
  xargs -0 -P "$(nproc)" -I{} bash -euo pipefail -c 'run "$1" "$2"' run {} "${2:-60}"
