#!/usr/bin/env bash
# What is to be done on a machine with a GPU: the tests, some of them under compute-sanitizer, the benches.
# usage: gpu.sh BUILD_DIR OUT_DIR [tests|sanitize|bench|all]
#   BUILD_DIR  a build with tests, which may have been made elsewhere (libcmocka.so.0 may stand in it); made
#              here if there is none
#   OUT_DIR    gets a log of each program, and tests.jsonl, sanitize.jsonl and bench.jsonl, whose first
#              lines name the device, the versions and the date: ready for bench/results/
# environment: SECONDS_TESTS (400), SECONDS_SANITIZE (150), SECONDS_BENCH (150): a part's time; what does
#   not fit is said to be missing. TESTS="test_norm ...", PROBLEMS=FILE, DEVICE=cuda:N for benches,
#   QKV_TEST_CASES (1000): random cases of a test, LINES_EACH (12): of the errors of a failed test
# SPDX-License-Identifier: Apache-2.0
set -uo pipefail
export LC_ALL=C
case ${3-all} in
tests | sanitize | bench | all) ;;
*) set -- ;;
esac
[ $# -ge 2 ] || { sed -n "3,10s/^# \\{0,1\\}//p" "$0"; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd) part=${3-all} device=${DEVICE-cuda} failed=0
mkdir -p "$1"
build=$(cd "$1" && pwd)

tests="test_norm test_activation test_rope test_page test_append_options test_merge test_gemm
  test_sampling test_sampling_filters test_sampling_stages test_sampling_equality test_sampling_statistics
  test_top_k test_log_probs test_verify test_logits_pipe test_attention_edge test_attention_grid test_attention_levels test_attention_bsr
  test_attention_low_precision test_attention_properties test_attention_invariance test_variants test_hopper test_cluster
  test_cuda_calls test_cuda_graphs test_cuda_streams test_cuda_faults test_device_plan"

# ---- what a program needs ------------------------------------------------------------------------

make_build() {
  [ -x "$build/qkv" ] && return
  local tests_too=ON
  [ -e /usr/include/cmocka.h ] || { tests_too=OFF; echo "no cmocka here: built without tests"; }
  cmake -S "$here" -B "$build" -DQKV_BUILD_TESTS=$tests_too >"$out/build.log" 2>&1 &&
    cmake --build "$build" -j "$(nproc)" >>"$out/build.log" 2>&1 || { tail -20 "$out/build.log"; exit 1; }
}

# NVIDIA's libraries that the loader may not find by itself: beside nvcc, or of a Python's packages.
find_libraries() {
  local folder nvcc packages folders=$build
  nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
  packages=$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null)
  for folder in "$(dirname "$nvcc")/../lib64" "${packages:-/none}"/*/lib; do
    if compgen -G "$folder/libnvrtc.so.*" >/dev/null || compgen -G "$folder/libcublasLt.so.*" >/dev/null; then
      folders=$folders:$folder
    fi
  done
  export LD_LIBRARY_PATH="$folders${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
}

now() { date +%s.%N; }
since() { awk "BEGIN {printf \"%.1f\", $(now) - $1}"; }
left() { awk "BEGIN {x = $1 - ($(now) - $2); print (x > 0 ? int(x + 0.5) : 0)}"; } # seconds of $1 since $2

# What a file of results begins with.
header() {
  local info commit name driver
  info=$("$build/qkv" info --device "$device") || exit 1
  commit=$(git -C "$here" rev-parse --short HEAD 2>/dev/null || echo unknown)
  name=$(sed -nE 's/^gpu +(.*), [0-9]+ multiprocessors, driver of (.*)$/\1/p' <<<"$info")
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1)
  printf '{"gpu": "%s", "driver": "%s", "%s", "compiler": "%s", "qkv": "%s", "commit": "%s", "date": "%s"}\n' \
    "$name" "${driver:-unknown}" \
    "$(sed -nE 's/^gpu .*driver of (CUDA) (.*)$/cuda": "\2/p' <<<"$info")" \
    "$(sed -nE 's/^compiler +//p' <<<"$info")" "$(sed -nE 's/^qkv +//p' <<<"$info")" "$commit" \
    "$(date -u +%Y-%m-%d)"
}

# run NAME SECONDS COMMAND...: the log in OUT/NAME.log, a line here and a line of JSON in $results.
run() {
  local name=$1 limit=$2 start rc ok bad
  shift 2
  start=$(now)
  if [ "$limit" -le 0 ]; then
    rc=-1 && : >"$out/$name.log"
  else
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    rc=$?
  fi
  ok=$(grep -c '^\[       OK' "$out/$name.log") bad=$(grep -c '^\[  FAILED  \] [a-z]' "$out/$name.log")
  case $rc in
  -1) printf '%-44s not run: no time left\n' "$name" ;;
  *) printf '%-44s rc=%d %6.1f s  %s ok, %s failed\n' "$name" $rc "$(since "$start")" "$ok" "$bad" ;;
  esac
  printf '{"name": "%s", "rc": %d, "seconds": %s, "ok": %d, "failed": %d}\n' "$name" $rc \
    "$(since "$start")" "$ok" "$bad" >>"$results"
  [ $rc -eq 0 ] && return
  failed=1
  grep -E 'ERROR: |error: |WRONG|=========|QKV_TEST_SEED|TEST_CASE' "$out/$name.log" | cut -c1-400 |
    head -"${LINES_EACH:-12}"
}

# ---- parts ---------------------------------------------------------------------------------------

run_tests() {
  local start budget=${SECONDS_TESTS:-400} seconds
  results=$out/tests.jsonl start=$(now)
  header >"$results"
  echo "tests, $budget s:"
  for test in ${TESTS:-$tests}; do
    seconds=$(left "$budget" "$start")
    QKV_TEST_DEVICE=cuda QKV_TEST_CASES=${QKV_TEST_CASES-1000} run "$test" \
      $((seconds < 120 ? seconds : 120)) "$build/$test"
  done
  if [ -z "${TESTS:-}" ] && command -v python3 >/dev/null; then
    QKV_TEST_DEVICE=cuda run cli "$(left "$budget" "$start")" \
      python3 "$here/tests/tools/test_cli.py" "$build/qkv"
  fi
}

# The benches' small problems have memory of exact sizes, the tests many forms.
run_sanitizer() {
  local start budget=${SECONDS_SANITIZE:-150} tool
  results=$out/sanitize.jsonl start=$(now)
  header >"$results"
  if ! command -v compute-sanitizer >/dev/null; then
    echo "sanitize: no compute-sanitizer on the PATH"
    return
  fi
  if ! timeout 60 compute-sanitizer --error-exitcode 9 "$build/qkv" bench --device "$device" --seconds 0 \
    rmsnorm tokens=1,data=cache >"$out/sanitize.log" 2>&1; then
    failed=1
    echo "sanitize: compute-sanitizer does not work on this device: $(grep = "$out/sanitize.log" | head -3)"
    return
  fi
  echo "sanitize, $budget s:"
  # The same cases first without a tool: their kernels are compiled then, which takes longest.
  export QKV_TEST_DEVICE=cuda QKV_TEST_CASES=${QKV_TEST_CASES-10} QKV_TEST_SEED=${QKV_TEST_SEED-1}
  for tool in plain memcheck racecheck; do
    local with=() bench=("$build/qkv" bench --device "$device" \
      --seconds 0 --file "$here/bench/problems/smoke.txt")
    [ $tool = plain ] || with=(compute-sanitizer --tool $tool --error-exitcode 9)
    run "$tool-bench" "$(left "$budget" "$start")" "${with[@]}" "${bench[@]}"
    for test in ${TESTS:-test_norm test_sampling test_sampling_stages test_merge test_attention_edge test_attention_levels test_attention_properties}; do
      run "$tool-$test" "$(left "$budget" "$start")" "${with[@]}" "$build/$test"
    done
  done
}

# Problems of a file to OUT/bench.jsonl; one that fails is named there, and the next one follows.
run_bench() {
  local start budget=${SECONDS_BENCH:-150} rc next=1 num error
  local file=${PROBLEMS:-$here/bench/problems/gpu.txt}
  results=$out/bench.jsonl start=$(now)
  header >"$results"
  grep -vE '^[[:space:]]*(#|$)' "$file" >"$out/problems.txt"
  num=$(wc -l <"$out/problems.txt")
  echo "bench, $budget s, $num problems:"
  while [ "$next" -le "$num" ] && [ "$(left "$budget" "$start")" -gt 0 ]; do
    tail -n +"$next" "$out/problems.txt" >"$out/rest.txt"
    timeout "$(left "$budget" "$start")" "$build/qkv" bench --device "$device" --json --file "$out/rest.txt" \
      >"$out/part.jsonl" 2>"$out/bench.log"
    rc=$?
    cat "$out/part.jsonl" >>"$results"
    next=$((next + $(wc -l <"$out/part.jsonl")))
    [ $rc -eq 0 ] || [ $rc -eq 124 ] && break
    failed=1
    error=$( (grep '^qkv: ' "$out/bench.log" || tail -1 "$out/bench.log") | tail -1 | tr -cd '[:print:]' | tr -d '\\"' | cut -c1-300)
    printf '{"problem": "%s", "error": "%s"}\n' "$(sed -n "${next}p" "$out/problems.txt")" "$error" >>"$results"
    next=$((next + 1))
  done
  rm -f "$out/problems.txt" "$out/rest.txt" "$out/part.jsonl"
  bench_table <"$results"
  [ "$next" -gt "$num" ] || echo "$((num - next + 1)) problems not run: no time left"
  echo "$(since "$start") s"
}

bench_table() {
  sed -nE 's/.*"op": "([^"]*)", "problem": "([^"]*)", "row": "([^"]*)", "us": ([0-9.]*), .*"host_us": ([0-9.]*), .*"gbps": ([^,]*), "gflops": ([^,]*), .*"ceiling_name": "([^"]*)".*"share": ([^,]*),.*/\1\t\3\t\4\t\5\t\6\t\7\t\9\t\8\t\2/p
    s/.*"problem": "(.*)", "error": "(.*)".*/FAILED\t\1\t\2/p' |
    awk -F '\t' 'NR == 1 { printf "%-8s %-22s %10s %8s %8s %10s %7s\n", "op", "row", "us", "host us", "GB/s", "GFLOP/s", "share" }
      $1 == "FAILED" { print; next }
      { split($9, keys, ","); short = ""
        for (i = 1; i in keys; i++)
          if (keys[i] !~ /^(head_dim=128|layout=NHD|[qo]=bf16|kv=bf16|mask=causal|window=-1|cap=0|dist=fixed|shared=0|form=flat|invariant=no|writes=appends|data=dram|heads=32\/8|dtype=bf16|x=bf16|w=bf16|out=bf16|residual=no|rotary=0|style=neox|act=silu|top_k=0|top_p=1|min_p=0|temperature=1|dtype=f32|vocab=128256)$/)
            short = short (short ? "," : "") keys[i]
        printf "%-8s %-22s %10.1f %8.2f %8.0f %10.0f %6.1f%% of %-16s %s\n", $1, $2, $3, $4, $5, $6, 100 * $7, $8, short }'
}

make_build
find_libraries
export QKV_CACHE_DIR=${QKV_CACHE_DIR-$build/cache-gpu}
echo "$(header)"
[ "$part" = tests ] || [ "$part" = all ] && run_tests
[ "$part" = sanitize ] || [ "$part" = all ] && run_sanitizer
[ "$part" = bench ] || [ "$part" = all ] && run_bench
exit $failed
