"""A task that can be checked, on a real model: the times table by GRPO and PPO with the built-in reward `number`.

    python -m benchmarks times [SETTING ...] [--seeds 0 1 2] [--steps 60]

SmolLM2-135M-Instruct is asked for products in several wordings; the reward is 1 where the last number of its answer is
right. Pairs of factors that are held out are trained on in neither order and no wording. Their accuracy before and
after, sampled as in training, with Wilson's interval, goes to benchmarks/results/times.json.
"""

import random
import statistics
from pathlib import Path

from benchmarks.real import runs
from penstock.run.intervals import of_share
from penstock.run.metrics import read_lines
from tests.smollm2 import directory

WORDINGS = ("What is {} times {}?", "Multiply {} by {}.", "{} x {} = ?", "How much is {} times {}?", "Compute {} * {}.")
HELDOUT_PAIRS, SAMPLES = 16, 2
TOKENS = 32
SETTINGS: dict[str, tuple[str, runs.Record]] = {
    "grpo lora": ("grpo", {"lora": 16, "lr": 3e-4}),
    "ppo lora": ("ppo", {"lora": 16, "lr": 3e-4}),
}


def questions() -> tuple[list[runs.Record], list[runs.Record]]:
    """Records to train on and held out, with their `answer`: 2 to 12 times 2 to 12."""
    rng = random.Random("times table")
    pairs = [(a, b) for a in range(2, 13) for b in range(a, 13)]
    heldout = set(rng.sample(pairs, HELDOUT_PAIRS))
    sides: tuple[list[runs.Record], list[runs.Record]] = [], []
    for pair in pairs:
        for a, b in {pair, pair[::-1]}:
            for wording in WORDINGS:
                record = {"messages": [{"role": "user", "content": wording.format(a, b)}], "answer": str(a * b)}
                sides[pair in heldout].append(record)
    for side in sides:
        rng.shuffle(side)
    return sides


def accuracy(model: Path, heldout: Path, seed: int) -> runs.Record:
    """Of SAMPLES answers to each held-out question."""
    scores = [row["score"] for row in runs.answers(model, heldout, TOKENS, reward_fn="number", seed=seed, n=SAMPLES)]
    low, high = of_share(scores)
    return {"accuracy": statistics.mean(scores), "low": low, "high": high, "answers": len(scores)}


def experiment(setting: str, seed: int, steps: int) -> runs.Record:
    """One row."""
    command, settings = SETTINGS[setting]
    asked, heldout = (
        runs.write_lines(runs.RUNS / f"times-{name}.jsonl", side)
        for name, side in zip(("train", "heldout"), questions(), strict=True)
    )
    run = runs.train(
        f"times-{setting.replace(' ', '-')}-{seed}", command, model=directory(), data=asked, eval_data=heldout,
        seed=seed, reward_fn="number", steps=steps, dtype="bf16", batch_size=64, micro_batch_size=16,
        max_new_tokens=TOKENS, max_length=96, missing_eos_penalty="none", eval_every=10, checkpoint_every=10, keep=1,
        **settings,
    )  # fmt: skip
    curve = [[row["step"], row["objective/scores"]] for row in read_lines(run / "metrics.jsonl")]
    before, after = (accuracy(model, heldout, seed) for model in (directory(), runs.last(run)))
    gain = after["accuracy"] - before["accuracy"]
    return {"before": before, "after": after, "gain": gain, **runs.cost(run), "curve": curve, "flags": settings}


def main(arguments: list[str]) -> int:
    """Adds the rows that are missing."""
    return runs.collect("times", __doc__, arguments, list(SETTINGS), 60, experiment)
