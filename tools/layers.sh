#!/usr/bin/env bash
# Checks who includes whom (docs/design.md): include/qkv <- base <- device <- jit <- core <- ops; kernels see
# kern/ and params; ops never see each other; tools, examples and bench only the public headers.
# usage: layers.sh [ROOT]      exit 1 and one line per violation; --self-test proves that it can fail
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

# check GLOB... -- ALLOWED: every quoted include of the files must match the extended regex ALLOWED.
bad=0
check() {
  local files=() allowed line
  while [ "$1" != -- ]; do files+=("$1"); shift; done
  allowed=$2
  for file in "${files[@]}"; do
    [ -f "$file" ] || continue
    while IFS= read -r line; do
      if ! [[ $line =~ ^($allowed)$ ]]; then
        echo "$file: may not include \"$line\""
        bad=1
      fi
    done < <(sed -nE 's/^[[:space:]]*#[[:space:]]*include[[:space:]]*"([^"]+)".*/\1/p' "$file")
  done
}

check_tree() {
  cd "$1"
  shopt -s nullglob globstar
  local op
  check include/qkv/*.h -- 'qkv/[a-z_]+\.h'
  check src/base/* -- 'qkv/[a-z_]+\.h|base/.*|kern/(abi|kv_view|rope|scale)\.h'
  check src/device/* -- 'qkv/[a-z_]+\.h|(base|device)/.*|kern/(abi|tensor_map)\.h'
  check src/jit/* -- 'qkv/[a-z_]+\.h|(base|device|jit)/.*|kern/abi\.h'
  check src/core/* -- 'qkv/[a-z_]+\.h|(base|device|jit|core)/.*|kern/abi\.h'
  check src/ffi/* -- 'qkv/[a-z_]+\.h'
  check src/kern/**/*.h src/kern/**/*.cuh -- 'kern/.*'
  check src/ops/*.c -- 'core/launch\.h'
  for op in src/ops/*/; do
    op=${op#src/}
    op=${op%/}
    local kernels=("src/$op"/*.cpu.[ch] "src/$op"/*_tile.h "src/$op"/*.cu "src/$op"/*.cuh
                   "src/$op"/verify.h "src/$op"/weights.h)
    local hosts=()
    for file in "src/$op"/*.[ch]; do
      [[ " ${kernels[*]} " == *" $file "* ]] || hosts+=("$file")
    done
    check "${kernels[@]}" -- "kern/.*|$op/[a-z_]+((_params|_tile|\\.cpu)\\.h|\\.cuh)|$op/(lanes|planner|schedule|strips|team|tiles|verify|weights)\\.h|$op/(groups|schedule)\\.c|qi_variant\\.h"
    check "${hosts[@]}" -- "qkv/[a-z_]+\\.h|base/.*|core/launch\\.h|kern/(abi|plan|kv_view|rope|rope_turns|scale|tensor_map)\\.h|$op/.*"
  done
  check python/qkv/*.[ch] -- 'qkv/[a-z_]+\.h|[a-z_]+\.h'
  check tools/*.[ch] examples/*.c examples/*/*.[ch] -- 'qkv/[a-z_]+\.h|[a-z_]+\.h'
}

if [ "${1:-}" = --self-test ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work/src/base" "$work/src/ops/a" "$work/src/ops/b"
  echo '#include "core/launch.h"' >"$work/src/base/up.c"
  echo '#include "ops/b/b.h"' >"$work/src/ops/a/sideways.c"
  echo '#include "device/cpu.h"' >"$work/src/ops/b/deep.c"
  echo '#include "base/status.h"' >"$work/src/ops/b/host.cpu.c"
  found=$("$0" "$work" | wc -l || true)
  [ "$found" -eq 4 ] || { echo "layers.sh: found $found of 4 planted violations"; exit 1; }
  exit 0
fi
check_tree "${1:-$(dirname "$0")/..}"
exit $bad
