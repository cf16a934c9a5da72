#!/usr/bin/env bash
# clang-tidy with the checks of .clang-tidy over every source, from a configuration of its own.
# usage: tidy.sh BUILD_DIR JOBS
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -S . -B "$1" -DCMAKE_C_COMPILER=clang -DQKV_BUILD_PYTHON=ON >/dev/null
# A kernel stands in the compilation database once per level; clang-tidy would read it each time.
python3 - "$1/compile_commands.json" <<'PYTHON'
import json, sys
path = sys.argv[1]
first = {}
for command in json.load(open(path)):
    first.setdefault(command["file"], command)
json.dump(list(first.values()), open(path, "w"))
PYTHON
# user_stage.cpu.c is compiled with a user's text alone.
git ls-files --cached --others --exclude-standard 'src/*.c' 'tools/*.c' 'examples/*.c' 'python/qkv/*.c' |
  grep -v '/user_stage\.cpu\.c$' |
  xargs -P "$2" -n 1 clang-tidy --quiet --warnings-as-errors='*' -p "$1" 2> >(grep -vE ' warnings? (generated|treated)' >&2)
