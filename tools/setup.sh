#!/usr/bin/env bash
# Makes sure that the system packages for a goal are there: installs what is missing where it may (as
# root, or with a sudo that asks nothing), else says what to type and stops.
# usage: setup.sh build|demo|check|check-model
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

# command or file to look for : Debian/Ubuntu package
build="cc:gcc cmake:cmake make:make /usr/include/dlpack/dlpack.h:libdlpack-dev
       /usr/include/pcre2.h:libpcre2-dev python3:python3"
demo="$build python3-pip:python3-pip"
check="$build /usr/include/cmocka.h:libcmocka-dev clang:clang clang-format:clang-format
       clang-tidy:clang-tidy c++:g++ pkg-config:pkg-config doxygen:doxygen git:git
       python3-numpy:python3-numpy python3-pip:python3-pip python3-venv:python3-venv python3-dev:python3-dev"
case $(uname -m) in
x86_64) check="$check aarch64-linux-gnu-gcc:gcc-aarch64-linux-gnu aarch64-linux-gnu-ld:libc6-dev-arm64-cross
         qemu-aarch64:qemu-user" ;;
esac
model="$demo python3-numpy:python3-numpy bible:bible-kjv openblas:libopenblas0-pthread"
case ${1:-build} in
build) wanted=$build ;;
demo) wanted=$demo ;;
check) wanted=$check ;;
check-model) wanted=$model ;;
*) echo "usage: setup.sh build|demo|check|check-model" >&2; exit 2 ;;
esac

have() {
  case $1 in
  /*) [ -e "$1" ] ;;
  python3-pip) python3 -m pip --version >/dev/null 2>&1 ;;
  python3-venv) python3 -c 'import ensurepip, venv' 2>/dev/null ;;
  python3-dev) [ -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ;;
  python3-numpy) python3 -c 'import numpy' 2>/dev/null || /usr/bin/python3 -c 'import numpy' 2>/dev/null ;;
  openblas) ldconfig -p | grep -q libopenblas ;;
  *) command -v "$1" >/dev/null ;;
  esac
}

missing=()
for entry in $wanted; do
  have "${entry%%:*}" || missing+=("${entry#*:}")
done
[ ${#missing[@]} -eq 0 ] && exit 0

line="apt-get install -y ${missing[*]}"
if ! command -v apt-get >/dev/null; then
  echo "Missing: ${missing[*]} (Debian's names). Install them with this system's package manager." >&2
  exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
  sudo=
elif sudo -n true 2>/dev/null; then
  sudo="sudo -n"
else
  printf 'These packages are missing and this user may not install them. Type:\n\n    sudo %s\n\n' "$line" >&2
  exit 1
fi
echo "Installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
$sudo $line -qq >/dev/null || { printf 'It failed. Type:\n\n    sudo %s\n\n' "$line" >&2; exit 1; }
