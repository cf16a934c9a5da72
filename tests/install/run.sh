#!/usr/bin/env bash
# Installs the build into a fresh prefix and uses it as an outsider would: C and C++, pkg-config and
# CMake, shared and static; checks what the libraries export and need.
# usage: run.sh BUILD_DIR
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
export LC_ALL=C # sort as the pinned list is
here=$(cd "$(dirname "$0")" && pwd)
build=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "FAILED: $*" >&2; exit 1; }

cmake --install "$build" --prefix "$work/prefix" >/dev/null
lib=$(dirname "$(find "$work/prefix" -name libqkv.so)")
export PKG_CONFIG_PATH=$lib/pkgconfig LD_LIBRARY_PATH=$lib
[ "$(objdump -p "$lib/libqkv.so" | awk '/SONAME/ {print $2}')" = libqkv.so.0 ] || fail "SONAME"

# Exports: qkv_*, under tvm-ffi's prefix too, and nothing else, the same list from both libraries as the pinned one.
nm -D --defined-only "$lib/libqkv.so" | awk '{print $3}' | sort >"$work/shared"
nm -g --defined-only "$lib/libqkv.a" | awk 'NF == 3 {print $3}' | sort >"$work/static"
diff "$here/../abi/symbols.txt" "$work/shared" || fail "libqkv.so exports other symbols than tests/abi/symbols.txt"
diff "$here/../abi/symbols.txt" "$work/static" || fail "libqkv.a exports other symbols than tests/abi/symbols.txt"
objdump -p "$lib/libqkv.so" | awk '/NEEDED/ {print $2}' | grep -vE '^(libc|libm|libpthread)\.so|^ld-linux' &&
  fail "libqkv.so needs more than libc, libm and threads"

flags=$(pkg-config --cflags qkv)
for std in "cc -std=c11 -x c" "c++ -std=c++11 -x c++" "c++ -std=c++20 -x c++"; do
  ${std} -Wall -Wextra -Wpedantic -Werror $flags "$here/user.c" -x none $(pkg-config --libs qkv) -o "$work/shared_user"
  "$work/shared_user" >/dev/null || fail "$std, shared"
  ${std} -Wall -Wextra -Wpedantic -Werror $flags "$here/user.c" -x none "$lib/libqkv.a" -lpthread -lm -o "$work/static_user"
  (unset LD_LIBRARY_PATH; "$work/static_user") >/dev/null || fail "$std, static"
done
cmake -S "$here" -B "$work/cmake" -DCMAKE_PREFIX_PATH="$work/prefix" >/dev/null
cmake --build "$work/cmake" >/dev/null
for program in "$work"/cmake/user_*; do [ -x "$program" ] && [ -f "$program" ] && "$program" >/dev/null || fail "$program"; done
# The tutorial's program, typed in as it stands; the README's excerpt, line by line in the example.
sed -n '/^```c$/,/^```$/p' "$here/../../docs/tutorial.md" | grep -v '^```' >"$work/paged.c"
cc -std=c11 -Wall $flags "$work/paged.c" $(pkg-config --libs qkv) -o "$work/paged"
[ "$("$work/paged" | grep -c 'keys: o = [01]\(\.9\)\?')" -eq 21 ] || fail "docs/tutorial.md"
sed -n '/^```c$/,/^```$/p' "$here/../../README.md" | grep -v '^```' | grep -v '^$' | while IFS= read -r line; do
  grep -qF -- "$line" "$here/../../examples/decode.c" || fail "README.md: not in examples/decode.c: $line"
done
# The programs of docs/variants.md, which is also examples/variant.c, and of docs/sampling.md.
sed -n '/^```c$/,/^```$/p' "$here/../../docs/variants.md" | grep -v '^```' >"$work/variant.c"
cc -std=c11 -Wall $flags "$work/variant.c" $(pkg-config --libs qkv) -lm -o "$work/variant"
QKV_CACHE_DIR=$work/cache "$work/variant" | grep -q OK || fail "docs/variants.md"
sed -n '/^```c$/,/^```$/p' "$here/../../docs/sampling.md" | grep -v '^```' >"$work/sample.c"
cc -std=c11 -Wall $flags "$work/sample.c" $(pkg-config --libs qkv) -o "$work/sample"
QKV_CACHE_DIR=$work/cache "$work/sample" | grep -q OK || fail "docs/sampling.md"
"$(find "$work/prefix" -path '*/bin/qkv')" info >/dev/null || fail "qkv info"
echo "install: C and C++, pkg-config and CMake, shared and static: all run"
