"""Is PPO blind to a constant and a factor in the reward? One task under nine rewards, offset + scale * 2 * count('e').

    python -m benchmarks reward_scale [--seeds 3] [--steps 25]

A tiny model with random weights learns to write one token. Writes reward_scale.json: for each offset, scale and seed
the score of the task itself (without offset and scale) and the answers' length, as means over the last 5 steps. Returns
1 when a combination is further from offset 0, scale 1 than 2 standard errors of their difference, or its answers are
longer or shorter by a fifth.
"""

import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.facts import flags, write
from penstock.algorithms.ppo import ppo
from penstock.config import DataFlags, OptimFlags, PPOConfig, PPOFlags, RunFlags
from penstock.models import presets, pretrained
from penstock.models.decoder import Decoder
from penstock.run.metrics import read_lines

OFFSETS, SCALES = (-50, 0, 50), (0.1, 1, 10)
LAST = 5
"""Steps of which the final score and length are means."""
SHAPE = dataclasses.replace(
    presets.named("s"), vocab_size=16, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32,
    max_length=32, hf={"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
)  # fmt: skip
E_TOKEN = 5


def final(offset: float, scale: float, seed: int, steps: int) -> dict[str, float]:
    """One run; the score in units of the task."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        pretrained.save(Decoder(SHAPE, generator=torch.Generator().manual_seed(seed)), path / "model")
        rows = [{"prompt_ids": [1, 3 + i]} for i in range(12)]
        (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        score = f"[{offset} + {scale} * 2 * ids.count({E_TOKEN}) for ids in response_ids]"
        function = f"def score(prompts, responses, *, response_ids, **_):\n    return {score}\n"
        (path / "reward.py").write_text(function, encoding="utf-8")
        config = PPOConfig(
            actor=str(path / "model"), reward_fn=f"{path}/reward.py:score",
            data=DataFlags(data=(str(path / "prompts.jsonl"),), max_length=32),
            run=RunFlags(out=str(path / "run"), seed=seed, checkpoint_every=10_000),
            optim=OptimFlags(lr=5e-3, batch_size=64, micro_batch_size=64, epochs=2, steps=steps),
            ppo=PPOFlags(max_new_tokens=12), samples=0,
        )  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()):
            rows = read_lines(ppo(config) / "metrics.jsonl")[-LAST:]
    raw = statistics.mean(row["objective/scores"] for row in rows)
    length = statistics.mean(row["objective/response_length"] for row in rows)
    return {"score": (raw - offset) / scale, "length": length}


def summary_of(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Per combination: means over the seeds, and the distance to offset 0, scale 1 in standard errors."""
    plain, rows = runs["0, 1"], {}
    for name, seeds in runs.items():
        scores, plain_scores = ([run["score"] for run in side] for side in (seeds, plain))
        error = ((statistics.variance(scores) + statistics.variance(plain_scores)) / len(scores)) ** 0.5
        lengths, plain_lengths = (statistics.mean(run["length"] for run in side) for side in (seeds, plain))
        rows[name] = {
            "score": statistics.mean(scores),
            "standard_error": statistics.stdev(scores) / len(scores) ** 0.5,
            "from_plain_in_standard_errors": abs(statistics.mean(scores) - statistics.mean(plain_scores)) / error,
            "length": lengths,
            "length_of_plain": lengths / plain_lengths,
        }
    return rows


def main(arguments: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for offset in OFFSETS:
            for scale in SCALES:
                run = final(offset, scale, seed, options.steps)
                runs.setdefault(f"{offset}, {scale}", []).append(run)
                print(f"offset {offset}, scale {scale}, seed {seed}: {run}", flush=True)
    rows = summary_of(runs)
    write("reward_scale", {"steps": options.steps, "rows": rows, "runs": runs})
    good = all(
        row["from_plain_in_standard_errors"] <= 2 and 0.8 <= row["length_of_plain"] <= 1.2 for row in rows.values()
    )
    return int(not good)
