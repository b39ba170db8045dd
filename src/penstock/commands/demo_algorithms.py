"""`penstock demo --algorithms`: what aligns a model beside PPO, on the demo's world and from its SFT model.

Those that sample learn from as many answers as its PPO, judged by the same reward model; DPO and KTO learn from
the labels that the reward model was made of. Gold and KL are measured on held-out questions, one answer each.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from penstock.commands.align.stages import Stage, run_stage
from penstock.commands.demo_runs import Lesson, answer, flags_of_run, kl_of, proxies, write_lines
from penstock.run.metrics import read_lines

KINDS = {
    # name -> command, what it learns from, and whether the reward model judges what it samples
    "grpo": ("grpo", "prompts", True), "rloo": ("grpo", "prompts", True), "dpo": ("dpo", "comparisons", False),
    "online dpo": ("dpo", "prompts", True), "kto": ("kto", "votes", False),
}  # fmt: skip


def compare(out: Path, seed: int, lesson: Lesson, best: list[float]) -> list[dict[str, Any]]:
    """A row per algorithm: name, gold, se_above_sft (of gold - SFT's, in standard errors), proxy (the reward model's
    mean), kl (nats), seconds (of its steps), model_bytes: the most that its models, gradients and moments took.

    out: where the demo's runs are; best: gold of the best of several answers of SFT's, by the reward model.
    """
    sft = out / "sft"
    trained = {"sft": sft, "ppo": out / "ppo"}
    trained |= {name: run_stage(stage, out) for name, stage in algorithms(out, seed, lesson).items()}
    n = lesson.how.best_of  # KL: an upper bound (Stiennon et al. 2020, appendix G)
    scores = [row["score"] for row in read_lines(out / "data" / "best-of.jsonl")]
    rows = [row_of(f"best of {n}", best, scores, math.log(n) - (n - 1) / n)]
    for name, run in trained.items():
        answers, texts = answer(run, lesson.heldout, seed + 2, how=lesson.how)
        golds = [lesson.world.gold(q, text, ended) for q, (text, ended) in zip(lesson.heldout, texts, strict=True)]
        row = row_of(name, golds, proxies(out / "reward", answers, lesson.how), kl_of(answers, sft))
        perf = list(read_lines(run / "perf.jsonl"))
        seconds, nbytes = ([line[key] for line in perf] for key in ("timing/step_seconds", "perf/device_tier_bytes"))
        rows.append({**row, "seconds": sum(seconds), "model_bytes": int(max(nbytes))})
    base = next(row for row in rows if row["name"] == "sft")
    for row in rows:
        row["se_above_sft"] = (row["gold"] - base["gold"]) / max(math.hypot(row["se"], base["se"]), 1e-9)
    return rows


def row_of(name: str, golds: list[float], scores: list[float], kl: float) -> dict[str, Any]:
    error = statistics.stdev(golds) / math.sqrt(len(golds))
    own = {"name": name, "gold": statistics.mean(golds), "se": error, "proxy": statistics.mean(scores), "kl": kl}
    return {**own, "seconds": None, "model_bytes": None}


def algorithms(out: Path, seed: int, lesson: Lesson) -> dict[str, Stage]:
    """Name -> stage."""
    data = out / "data"
    write_lines(data / "votes.jsonl", votes(read_lines(data / "comparisons.jsonl")))

    def stage(name: str) -> Stage:
        command, kind, judged = KINDS[name]
        flags = {**flags_of_run(data / f"{kind}.jsonl", seed), **lesson.compared[name]}
        return Stage(command, flags, "sft", "reward" if judged else None, name.replace(" ", "-"))

    return {name: stage(name) for name in lesson.compared}


def votes(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best answer of each ranking as liked, the worst as disliked; none where all tie."""
    rows = []
    for row in comparisons:
        levels = [level if isinstance(level, list) else [level] for level in row["ranking"]]
        for level, label in ((levels[0], True), (levels[-1], False)) if len(levels) > 1 else ():
            rows.append({"prompt": row["prompt"], "response": row["responses"][level[0]], "label": label})
    return rows
