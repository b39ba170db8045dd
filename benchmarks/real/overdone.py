"""Algorithms trained far too long on a real model: where hidden gold turns down, and what the run had said by then.

    python -m benchmarks overdone [SETTING ...] [--seeds 0] [--steps 160]

From SFT and the reward model that `python -m benchmarks demo --algorithms --real` left in .real/demo-SEED: PPO and GRPO
without a KL penalty, DPO and KTO over the same labels again and again, at the demo's rates. Gold, on which nothing is
trained, of 200 held-out questions at each tenth of the way; `proxy` is what the reward model says of such answers. Gold
has turned down where it is two standard errors below its best. Rows of benchmarks/results/overdone.json.
"""

import dataclasses
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.real import runs
from penstock.commands.align.stages import Stage, run_stage
from penstock.commands.demo_algorithms import algorithms
from penstock.commands.demo_real import packaged_model, real
from penstock.commands.demo_runs import Lesson, answer, flags_of_run, kl_of, proxies
from penstock.run.metrics import read_lines

SCALE = 2
"""Of the demo whose models these begin from."""
SETTINGS: dict[str, runs.Record] = {"ppo": {"kl_coef": 0.0}, "grpo": {"kl_coef": 0.0}, "dpo": {}, "kto": {}}
"""Flags that are other than the demo's, beside the steps."""


def experiment(setting: str, seed: int, steps: int) -> runs.Record:
    """One row."""
    out = runs.RUNS / f"demo-{seed}"
    lesson = real(seed, str(packaged_model()), SCALE)
    run = run_stage(stage_of(setting, out, seed, lesson, steps), out)
    folders = sorted((run / "checkpoints").glob("step-*"))
    curve = [point(out, out / "sft", 0, seed, lesson)]
    for folder in folders:
        curve.append(point(out, folder, int(folder.name.removeprefix("step-")), seed, lesson))
        print(setting, curve[-1], flush=True)
    best = max(curve, key=lambda row: row["gold"])
    down = [row["step"] for row in curve if row["step"] > best["step"] and is_below(row, best)]
    for folder in folders[:-1]:
        shutil.rmtree(folder)
    return {
        "curve": curve, "best_step": best["step"], "down_at": min(down, default=None), "warnings": warnings(run),
        "command": setting, "flags": SETTINGS[setting], **runs.cost(run),
    }  # fmt: skip


def stage_of(setting: str, out: Path, seed: int, lesson: Lesson, steps: int) -> Stage:
    """The demo's stage with so many steps, evaluated and kept ten times."""
    own = {**flags_of_run(out / "data" / "prompts.jsonl", seed), "max_new_tokens": lesson.how.tokens, **lesson.ppo}
    stage = Stage("ppo", own, "sft", "reward") if setting == "ppo" else algorithms(out, seed, lesson)[setting]
    every = max(steps // 10, 1)
    flags = {**stage.flags, **SETTINGS[setting], "steps": steps, "checkpoint_every": every, "keep": steps}
    if stage.judge:
        heldout = out / "data" / "heldout-prompts.jsonl"
        runs.write_lines(heldout, [{"prompt": question.prompt} for question in lesson.heldout])
        flags |= {"eval_data": [str(heldout)], "eval_every": every, "heldout": None, "max_eval_samples": None}
    return dataclasses.replace(stage, flags=flags, name=f"overdone-{setting}")


def point(out: Path, model: Path, step: int, seed: int, lesson: Lesson) -> dict[str, Any]:
    """What a checkpoint's answers to the held-out questions are like."""
    answers, texts = answer(model, lesson.heldout, seed + 2, how=lesson.how)
    golds = [lesson.world.gold(q, text, ended) for q, (text, ended) in zip(lesson.heldout, texts, strict=True)]
    error = statistics.stdev(golds) / math.sqrt(len(golds))
    proxy = statistics.mean(proxies(out / "reward", answers, lesson.how))
    own = {"step": step, "gold": statistics.mean(golds), "standard_error": error, "proxy": proxy}
    return {**own, "kl": kl_of(answers, out / "sft")}


def is_below(row: dict[str, Any], best: dict[str, Any]) -> bool:
    """By two standard errors of the difference."""
    return bool(best["gold"] - row["gold"] > 2 * math.hypot(best["standard_error"], row["standard_error"]))


def warnings(run: Path) -> dict[str, int]:
    """The first step of each of a run's warnings, by its name: what stands before its colon."""
    first: dict[str, int] = {}
    for row in read_lines(run / "health.jsonl"):
        if "text" in row:
            first.setdefault(row["text"].partition(":")[0], row["step"])
    return first


def main(arguments: list[str]) -> int:
    """Adds the rows that are missing."""
    return runs.collect("overdone", __doc__, arguments, list(SETTINGS), 160, experiment)
