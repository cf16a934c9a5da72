#!/usr/bin/env bash
# Holds qkv-generate against independent programs on a real model: its tokens against the tokenizers
# package (fetched once into the cache folder), its logits, texts and perplexity against NumPy.
# usage: check_model.sh QKV_GENERATE DEVICE [MODEL]
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
generate=$1
device=$2
model=${3:-}
[ -n "$model" ] || model=$("$here/fetch_model.sh")

for python in python3 /usr/bin/python3; do # Debian's NumPy is for Debian's Python
  "$python" -c 'import numpy' 2>/dev/null && break
done
packages=${XDG_CACHE_HOME:-$HOME/.cache}/qkv/python
export PYTHONPATH=$packages PIP_ROOT_USER_ACTION=ignore
"$python" -c 'import tokenizers' 2>/dev/null ||
  "$python" -m pip install --quiet --disable-pip-version-check --target "$packages" tokenizers==0.23.3
"$python" "$here/../tests/python/check_tokenizer.py" "$generate" "$model"
"$python" "$here/../tests/python/check_model.py" --generate "$generate" --model "$model" --device "$device"
