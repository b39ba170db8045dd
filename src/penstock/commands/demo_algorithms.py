"""`penstock demo --algorithms`: what aligns a model beside PPO, on the demo's world and from its SFT model.

Those that sample learn from as many answers as the demo's PPO, judged by the same reward model; DPO and KTO learn from
the labels that the reward model was made of. Gold and KL are measured on held-out questions, one answer each.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.algorithms.config import DPOConfig, DPOFlags, GRPOConfig, GRPOFlags, KTOConfig, KTOFlags
from penstock.algorithms.grpo import grpo
from penstock.algorithms.kto import kto
from penstock.algorithms.preference import dpo
from penstock.commands.demo_runs import RESPONSE_TOKENS, answer, data_flags, kl_of, run_flags, write_lines
from penstock.config import OptimFlags
from penstock.data.toyland import Question, Toyland
from penstock.rollout.sampling import Sampling
from penstock.run.metrics import read_lines

ANSWERS, STEPS = 64, 28
"""Answers per step and steps: the demo's PPO has as many."""


def compare(out: Path, seed: int, world: Toyland, heldout: list[Question], best: list[float]) -> list[dict[str, Any]]:
    """A row per algorithm: name, gold, se_above_sft (of gold - SFT's, in standard errors), kl (nats), seconds.

    out: where the demo's runs are; best: gold of the best of 8 answers of SFT's, by the reward model.
    """
    seconds, sft = {}, out / "sft"
    trained = {"sft": sft, "ppo": out / "ppo"}
    for name, (train, config) in algorithms(out, seed).items():
        started = time.perf_counter()
        trained[name] = train(config)
        seconds[name] = time.perf_counter() - started
    rows = [row_of("best of 8", best, math.log(8) - 7 / 8, None)]  # an upper bound (Stiennon et al. 2020, appendix G)
    sampling = Sampling(max_new_tokens=RESPONSE_TOKENS, seed=seed + 2)
    for name, run in trained.items():
        answers, texts = answer(run, heldout, sampling)
        golds = [world.gold(q, text, ended) for q, (text, ended) in zip(heldout, texts, strict=True)]
        rows.append(row_of(name, golds, kl_of(answers, sft), seconds.get(name)))
    base = next(row for row in rows if row["name"] == "sft")
    for row in rows:
        row["se_above_sft"] = (row["gold"] - base["gold"]) / max(math.hypot(row["se"], base["se"]), 1e-9)
    return rows


def row_of(name: str, golds: list[float], kl: float, seconds: float | None) -> dict[str, Any]:
    error = statistics.stdev(golds) / math.sqrt(len(golds))
    return {"name": name, "gold": statistics.mean(golds), "se": error, "kl": kl, "seconds": seconds}


def algorithms(out: Path, seed: int) -> dict[str, tuple[Callable[[Any], Path], Any]]:
    """Name -> command and its config. Learning rates are those of the demo's PPO, less where labels are learned from: a
    model of a million parameters learns at ten to a hundred times the defaults."""
    sft, judge = out / "sft", out / "reward"
    prompts, pairs = (data_flags(out / "data" / f"{name}.jsonl") for name in ("prompts", "comparisons"))
    write_lines(out / "data" / "votes.jsonl", votes(read_lines(out / "data" / "comparisons.jsonl")))

    def group(name: str, **flags: Any) -> tuple[Callable[[Any], Path], Any]:
        optim = OptimFlags(lr=3e-4, batch_size=ANSWERS, micro_batch_size=ANSWERS, epochs=2, steps=STEPS)
        own = GRPOFlags(max_new_tokens=RESPONSE_TOKENS, group_size=8, **flags)
        run = run_flags(out / name, seed)
        return grpo, GRPOConfig(
            model=str(sft), reward=str(judge), data=prompts, run=run, optim=optim, grpo=own, heldout=0.0, samples=8
        )

    def labelled(lr: float) -> OptimFlags:
        return OptimFlags(lr=lr, batch_size=32, micro_batch_size=32)

    return {
        "grpo": group("grpo", kl_coef=0.2),  # rewards are in units of a group's deviation, about a half
        "rloo": group("rloo", advantage="rloo", kl_in="reward", kl_estimator="k1", kl_coef=0.1),
        "dpo": (
            dpo,
            DPOConfig(
                model=str(sft), data=pairs, run=run_flags(out / "dpo", seed), optim=labelled(5e-5),
                dpo=DPOFlags(beta=0.1),
            ),
        ),
        "online dpo": (
            dpo,
            DPOConfig(
                model=str(sft), reward=str(judge), data=prompts, online=True, run=run_flags(out / "online-dpo", seed),
                optim=OptimFlags(lr=3e-4, batch_size=ANSWERS // 2, micro_batch_size=ANSWERS // 2, steps=STEPS),
                dpo=DPOFlags(beta=0.1, max_new_tokens=RESPONSE_TOKENS), heldout=0.0,
            ),
        ),
        "kto": (
            kto,
            KTOConfig(
                model=str(sft), data=data_flags(out / "data" / "votes.jsonl"), run=run_flags(out / "kto", seed),
                optim=labelled(3e-5), kto=KTOFlags(beta=0.1),
            ),
        ),
    }  # fmt: skip


def votes(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best answer of each ranking as liked, the worst as disliked; none where all tie."""
    rows = []
    for row in comparisons:
        levels = [level if isinstance(level, list) else [level] for level in row["ranking"]]
        for level, label in ((levels[0], True), (levels[-1], False)) if len(levels) > 1 else ():
            rows.append({"prompt": row["prompt"], "response": row["responses"][level[0]], "label": label})
    return rows
