#!/usr/bin/env bash
# PPO against a reward function: answers of about twelve words that end by themselves.
set -euo pipefail
data=$(cd "$(dirname "$0")/data" && pwd)
model=${MODEL:-Qwen/Qwen3-0.6B} steps=${STEPS:-50} out=${OUT:-runs/ppo}

mkdir -p "$(dirname "$out")"
cat >"$(dirname "$out")/twelve_words.py" <<'PYTHON'
def score(prompts, responses, *, finish_reason, **_):
    """Lists in, a number per answer out; `finish_reason`, `step` and the records' fields are there by name."""
    words = [len(response.split()) for response in responses]
    return [-abs(count - 12) / 12 + (end == "stop") for count, end in zip(words, finish_reason)]
PYTHON

# The critic starts from the actor, KL is measured from its start; docs/ppo.md has every detail.
penstock ppo --model "$model" --data "$data/prompts.jsonl" --out "$out" \
    --reward-fn "$(dirname "$out")/twelve_words.py:score" \
    --steps "$steps" --batch-size 8 --max-new-tokens 32 --heldout 0 --samples 2
