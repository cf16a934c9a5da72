#!/usr/bin/env bash
# Runs the tests on this machine's GPU, then its benchmarks: a line a test, the whole log in OUT.
# usage: gpu.sh BUILD_DIR OUT_DIR      a build with tests; it may come from another machine
# SPDX-License-Identifier: Apache-2.0
set -uo pipefail
build=$1 out=$2
mkdir -p "$out"
export QKV_TEST_DEVICE=cuda QKV_TEST_CASES=${QKV_TEST_CASES-1000} QKV_CACHE_DIR=${QKV_CACHE_DIR-$(mktemp -d)}

tests="test_norm test_activation test_rope test_page test_append_options test_merge test_gemm
  test_sampling test_attention_edge test_attention_grid test_attention_levels test_attention_bsr
  test_attention_low_precision test_attention_properties test_attention_invariance test_variants
  test_device_plan"

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
failed=0
for test in ${TESTS:-$tests}; do
  start=$(date +%s.%N)
  timeout 120 "$build/$test" >"$out/$test.log" 2>&1
  rc=$?
  printf '%-32s rc=%d %6.1f s  %s\n' "$test" $rc "$(awk "BEGIN {print $(date +%s.%N) - $start}")" \
    "$(grep -c '^\[       OK' "$out/$test.log") ok, $(grep -c '^\[  FAILED  \] [a-z]' "$out/$test.log") failed"
  if [ $rc -ne 0 ]; then
    failed=1
    grep -E 'ERROR: |error: |QKV_TEST_SEED|TEST_CASE' "$out/$test.log" | cut -c1-400 | head -${LINES_EACH:-12}
  fi
done
exit $failed
