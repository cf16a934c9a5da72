#!/usr/bin/env bash
# A small trained model answers a batch of questions that share a system prompt.
# usage: demo.sh QKV_GENERATE DEVICE [MODEL]
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
generate=$1
device=$2
model=${3:-}
[ -n "$model" ] || model=$("$(dirname "$0")/fetch_model.sh")

system="You are a helpful assistant. You answer in a few short, simple sentences."
questions=(
  "What is the capital of France?"
  "Why is the sky blue?"
  "Give me three tips for learning to cook."
  "Write a short poem about the sea."
  "What does a computer's memory do?"
  "Tell me a fact about elephants."
)

options=()
for i in "${!questions[@]}"; do
  echo "$((i + 1)). ${questions[i]}" >&2
  options+=(-p "${questions[i]}")
done
echo >&2
# In f32 every machine and device writes the same text: what bf16 rounds away decides between words.
exec "$generate" "$model" --device "$device" --dtype f32 --chat --system "$system" -n 96 "${options[@]}"
