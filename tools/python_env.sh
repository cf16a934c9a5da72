#!/usr/bin/env bash
# Prints the path of a Python that has what the tests of the Python package need, in an environment of its own
# that is made once in the cache folder.
# usage: python_env.sh
# environment: QKV_TEST_PYTHON=PATH takes that Python as it is
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
torch=2.15.0
packages="numpy==2.4.6 pytest==9.2.0 mypy==2.4.1 transformers==5.24.0 matplotlib==3.11.2 scikit-build-core==1.1.2 \
  apache-tvm-ffi==0.1.15.post2"
# Of torch: itself, what it needs of Python, and the libraries that a CUDA toolkit does not bring.
pure="filelock typing-extensions setuptools>=77 sympy networkx jinja2 fsspec"
parts="nvidia-cufile nvidia-cusparselt-cu13==0.8.1 nvidia-nvshmem-cu13==3.7.2 nvidia-nccl-cu13==2.30.7"

if [ -n "${QKV_TEST_PYTHON:-}" ]; then
  echo "$QKV_TEST_PYTHON"
  exit 0
fi
key=$(printf '%s' "$(python3 -V) $torch $packages $pure $parts" | sha256sum | cut -c1-12)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/qkv/python-$key
python=$folder/bin/python
mkdir -p "$(dirname "$folder")"
exec 9>"$folder.lock"
flock 9 # one makes it, others wait
if [ ! -e "$folder/complete" ]; then
  echo "Making a Python environment with torch $torch in $folder: minutes, once" >&2
  rm -rf "$folder"
  python3 -m venv "$folder"
  # What is imported is compiled then: a third of so many files.
  pip() { "$python" -m pip install --quiet --disable-pip-version-check --no-compile "$@" >&2; }
  # torch's own list is some gigabytes of CUDA, most of which a toolkit has and the CPU never uses.
  pip --no-deps "torch==$torch" $parts
  pip $pure $packages
  "$python" -c 'import torch' 2>/dev/null || pip "torch==$torch"
  touch "$folder/complete"
fi
echo "$python"
