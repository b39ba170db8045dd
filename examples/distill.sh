#!/usr/bin/env bash
# Distillation: a small model learns a larger one's probabilities; the teacher may be of any size, it is streamed.
set -euo pipefail
data=$(cd "$(dirname "$0")/data" && pwd)
student=${MODEL:-Qwen/Qwen3-0.6B} teacher=${TEACHER:-Qwen/Qwen3-4B} steps=${STEPS:-50} out=${OUT:-runs/distill}

# The two must read the same tokens. --precompute-teacher: the teacher reads all answers once, and is then gone.
penstock distill --model "$student" --teacher "$teacher" --data "$data/demonstrations.jsonl" --out "$out" \
    --precompute-teacher --steps "$steps" --batch-size 4 --heldout 0.2
