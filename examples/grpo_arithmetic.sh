#!/usr/bin/env bash
# GRPO on arithmetic with a verifier: no reward model, no critic; right answers are the reward.
set -euo pipefail
model=${MODEL:-Qwen/Qwen3-0.6B} steps=${STEPS:-100} out=${OUT:-runs/grpo}

mkdir -p "$(dirname "$out")"
python - >"$(dirname "$out")/sums.jsonl" <<'PYTHON'
import json, random

for _ in range(200):
    a, b = random.randint(2, 99), random.randint(2, 99)
    print(json.dumps({"prompt": f"What is {a} + {b}? End with the number.\n", "answer": a + b}))
PYTHON

# number: the last number of the answer equals the record's `answer`. length: and that within 32 tokens.
penstock grpo --model "$model" --data "$(dirname "$out")/sums.jsonl" --out "$out" \
    --reward-fn number length:32 --reward-weights 1 0.1 --group-size 4 \
    --steps "$steps" --batch-size 16 --max-new-tokens 48 --heldout 0.05 --samples 2
