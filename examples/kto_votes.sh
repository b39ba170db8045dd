#!/usr/bin/env bash
# KTO: learn from single votes, thumbs up or down. `penstock data export --votes` writes those of the chat page.
set -euo pipefail
data=$(cd "$(dirname "$0")/data" && pwd)
model=${MODEL:-Qwen/Qwen3-0.6B} steps=${STEPS:-50} out=${OUT:-runs/kto}

# {"prompt", "response", "label": true or false}: no pair is needed.
penstock data check "$data/votes.jsonl"

penstock kto --model "$model" --data "$data/votes.jsonl" --out "$out" --lora 8 \
    --steps "$steps" --batch-size 4 --heldout 0.2
