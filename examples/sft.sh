#!/usr/bin/env bash
# SFT: a model learns to answer from demonstrations. MODEL=..., STEPS=..., OUT=... change the defaults.
set -euo pipefail
data=$(cd "$(dirname "$0")/data" && pwd)
model=${MODEL:-Qwen/Qwen3-0.6B} steps=${STEPS:-50} out=${OUT:-runs/sft}

# One JSON object per line: {"prompt": ..., "response": ...}, {"messages": [...]}, or any format of docs/train.md.
penstock data check "$data/demonstrations.jsonl"

# The loss is on the answers alone. The best checkpoint by held-out loss is what later stages read from $out.
penstock sft --model "$model" --data "$data/demonstrations.jsonl" --out "$out" \
    --steps "$steps" --batch-size 4 --heldout 0.2 --samples 2 --max-new-tokens 32

penstock generate --model "$out" --prompt "What is a weir?
" --max-new-tokens 32
