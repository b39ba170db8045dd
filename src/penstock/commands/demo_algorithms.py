"""`penstock demo --algorithms`: what aligns a model beside PPO, on the demo's world and from its SFT model.

Those that sample learn from as many answers as the demo's PPO, judged by the same reward model; DPO and KTO learn from
the labels that the reward model was made of. Gold and KL are measured on held-out questions, one answer each.
"""

import math
import statistics
import time
from pathlib import Path
from typing import Any

from penstock.commands.align.stages import Stage, run_stage
from penstock.commands.demo_runs import SMALL, Lesson, answer, flags_of_run, kl_of, write_lines
from penstock.run.metrics import read_lines

ANSWERS, STEPS = 64, 28
"""Answers per step and steps: the demo's PPO has as many."""


def compare(out: Path, seed: int, lesson: Lesson, best: list[float]) -> list[dict[str, Any]]:
    """A row per algorithm: name, gold, se_above_sft (of gold - SFT's, in standard errors), kl (nats), seconds.

    out: where the demo's runs are; best: gold of the best of 8 answers of SFT's, by the reward model.
    """
    seconds, sft = {}, out / "sft"
    trained = {"sft": sft, "ppo": out / "ppo"}
    for name, stage in algorithms(out, seed).items():
        started = time.perf_counter()
        trained[name] = run_stage(stage, out)
        seconds[name] = time.perf_counter() - started
    rows = [row_of("best of 8", best, math.log(8) - 7 / 8, None)]  # an upper bound (Stiennon et al. 2020, appendix G)
    for name, run in trained.items():
        answers, texts = answer(run, lesson.heldout, seed + 2)
        golds = [lesson.world.gold(q, text, ended) for q, (text, ended) in zip(lesson.heldout, texts, strict=True)]
        rows.append(row_of(name, golds, kl_of(answers, sft), seconds.get(name)))
    base = next(row for row in rows if row["name"] == "sft")
    for row in rows:
        row["se_above_sft"] = (row["gold"] - base["gold"]) / max(math.hypot(row["se"], base["se"]), 1e-9)
    return rows


def row_of(name: str, golds: list[float], kl: float, seconds: float | None) -> dict[str, Any]:
    error = statistics.stdev(golds) / math.sqrt(len(golds))
    return {"name": name, "gold": statistics.mean(golds), "se": error, "kl": kl, "seconds": seconds}


def algorithms(out: Path, seed: int) -> dict[str, Stage]:
    """Name -> stage. Learning rates are those of the demo's PPO, less where labels are learned from: a model of a
    million parameters learns at ten to a hundred times the defaults."""
    prompts, pairs, judged = (
        flags_of_run(out / "data" / f"{n}.jsonl", seed) for n in ("prompts", "comparisons", "votes")
    )
    write_lines(out / "data" / "votes.jsonl", votes(read_lines(out / "data" / "comparisons.jsonl")))
    sampled = {**prompts, "lr": 3e-4, "steps": STEPS, "max_new_tokens": SMALL.tokens, "heldout": 0.0}

    def group(name: str, **flags: Any) -> Stage:
        own = {"batch_size": ANSWERS, "micro_batch_size": ANSWERS, "epochs": 2, "group_size": 8, "samples": 8}
        return Stage("grpo", {**sampled, **own, **flags}, "sft", "reward", name)

    return {
        "grpo": group("grpo", kl_coef=0.2),  # rewards are in units of a group's deviation, about a half
        "rloo": group("rloo", advantage="rloo", kl_in="reward", kl_estimator="k1", kl_coef=0.1),
        "dpo": Stage("dpo", {**pairs, "lr": 5e-5, "beta": 0.1}, "sft"),
        "online dpo": Stage("dpo", {**sampled, "online": True, "beta": 0.1}, "sft", "reward", "online-dpo"),
        "kto": Stage("kto", {**judged, "lr": 3e-5, "beta": 0.1}, "sft"),
    }


def votes(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best answer of each ranking as liked, the worst as disliked; none where all tie."""
    rows = []
    for row in comparisons:
        levels = [level if isinstance(level, list) else [level] for level in row["ranking"]]
        for level, label in ((levels[0], True), (levels[-1], False)) if len(levels) > 1 else ():
            rows.append({"prompt": row["prompt"], "response": row["responses"][level[0]], "label": label})
    return rows
