#!/usr/bin/env bash
# Online DPO: the model answers twice, a judge says which is better, and it learns from that pair at once.
set -euo pipefail
data=$(cd "$(dirname "$0")/data" && pwd)
model=${MODEL:-Qwen/Qwen3-0.6B} steps=${STEPS:-50} out=${OUT:-runs/online-dpo}

# The judge: a reward model (--reward runs/reward), functions (--reward-fn), or a weighted sum of several.
penstock dpo --online --model "$model" --data "$data/prompts.jsonl" --out "$out" --lora 8 \
    --reward-fn regex:water length:24 --reward-weights 1 0.5 --group-size 2 \
    --steps "$steps" --batch-size 4 --max-new-tokens 32 --heldout 0 --samples 2
