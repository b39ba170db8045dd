#!/usr/bin/env bash
# DPO: learn from comparisons directly, here with an adapter, so that the reference is the base itself.
set -euo pipefail
data=$(cd "$(dirname "$0")/data" && pwd)
model=${MODEL:-Qwen/Qwen3-0.6B} steps=${STEPS:-50} out=${OUT:-runs/dpo}

# --loss takes ipo, hinge, robust, simpo, orpo and cpo as well: docs/align.md says which to take when.
penstock dpo --model "$model" --data "$data/comparisons.jsonl" --out "$out" --lora 8 --beta 0.1 \
    --steps "$steps" --batch-size 4 --heldout 0.2

# A directory that transformers loads, with the adapter merged into the weights.
penstock export "$out" --out "$out-merged" --merge
