#!/usr/bin/env bash
# Reward model: a score learned from comparisons, and used to pick the best of several answers.
set -euo pipefail
data=$(cd "$(dirname "$0")/data" && pwd)
model=${MODEL:-Qwen/Qwen3-0.6B} steps=${STEPS:-50} out=${OUT:-runs/reward}

# {"prompt", "chosen", "rejected"}; rankings of up to nine answers are read too.
penstock reward --model "$model" --data "$data/comparisons.jsonl" --out "$out" \
    --steps "$steps" --batch-size 4 --heldout 0.2

# transformers loads $out as AutoModelForSequenceClassification, and --reward takes others' as well.
penstock generate --model "$model" --data "$data/prompts.jsonl" --reward "$out" --best-of 4 \
    --max-new-tokens 32 --out "$out/best-of-4.jsonl"
