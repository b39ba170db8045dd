"""`penstock demo`: base model, SFT, labellers, reward model, PPO, and a report.

Every stage runs as a user would run it, chained as `penstock align` chains them. What is taught, a `Lesson` says: the
small world's (`demo_toy`) or a real model's (`demo_real`). Gold scores are measured here, on questions that no stage
ever saw, and hidden from every stage (PPO.md 25).
"""

import dataclasses
import json
import math
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.commands.align.stages import Stage, run_stage
from penstock.commands.config import DemoConfig
from penstock.commands.demo_algorithms import compare
from penstock.commands.demo_real import packaged_model, real
from penstock.commands.demo_runs import Lesson, World, answer, best_of, flags_of_run, write_lines
from penstock.commands.demo_toy import toy
from penstock.data.labellers import comparisons
from penstock.errors import UserError
from penstock.run.directory import refused
from penstock.run.metrics import peak_rss_bytes, read_lines
from penstock.run.report import Curve, Curves, Samples, Section, Table, Text, page
from penstock.run.session import StoppedError

MARK = ".penstock-demo"
"""Holds the flags of the demo that made the directory; only a directory that holds it is ever replaced."""


def demo(config: DemoConfig) -> Path:
    """Runs all seeds and writes report.html and report.json in `config.out`. A demo of the same flags that was stopped
    there goes on: its runs do, and what lies between them, which depends on nothing else, is done again."""
    lesson_of = lessons(config)
    says, out = lesson_of(config.seed).says, Path(config.out)
    begin(config, out)
    results = []
    try:
        for seed in range(config.seed, config.seed + config.seeds):
            directory = out if config.seeds == 1 else out / f"seed-{seed}"
            results.append(one_seed(directory, seed, lesson_of(seed), config.algorithms))
            print(summary(results[-1].facts), flush=True)
    except StoppedError as error:
        text = f"{out}: stopped; the same penstock demo command goes on ({error})."
        raise StoppedError(text, error.exit_code - 128) from error
    report = {
        "seeds": [result.facts for result in results],
        "curves": [result.curves for result in results],
        "peak_rss_bytes": peak_rss_bytes(),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "report.html").write_text(page_of(results, says), encoding="utf-8")
    print(json.dumps(report["seeds"]) if config.json else f"wrote {out / 'report.html'}")
    return out


def begin(config: DemoConfig, out: Path) -> None:
    """Makes `out` empty, but for an unfinished demo of the same flags. Raises UserError where no demo made what is
    there."""
    flags = {**dataclasses.asdict(config), "out": "", "json": False}
    mark = out / MARK
    try:
        if out.exists() and any(out.iterdir()):
            if not mark.exists():
                raise UserError(f"--out {out}: is not empty and no demo made it; choose another --out.")
            if mark.read_text(encoding="utf-8") == json.dumps(flags) and not (out / "report.html").exists():
                print(f"{out}: goes on with the demo that was stopped in it", file=sys.stderr, flush=True)
                return
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(flags), encoding="utf-8")
    except OSError as error:
        raise refused(f"--out {out}", error) from error


def lessons(config: DemoConfig) -> Callable[[int], Lesson]:
    """What each seed is taught. Raises UserError for flags that the other world has."""
    if not config.real:
        if config.model:
            raise UserError("--model: the small world makes its own model; add --real.")
        if config.scale > 1:
            raise UserError("--scale: the small world has one size; add --real.")
        return toy
    source = str(packaged_model()) if config.model is None else config.model
    return lambda seed: real(seed, source, config.scale)


def summary(facts: dict[str, Any]) -> str:
    """A seed's gold by stage with its 95 % interval, and what it took."""
    names = {"base": "base", "sft": "sft", "best_of": f"best of {facts['best_of']}", "ppo": "ppo"}
    golds = ", ".join(f"{name} {interval(facts, key)}" for key, name in names.items())
    return (
        f"seed {facts['seed']}: gold {golds} (95 % of {facts['heldout']} held-out answers; se of ppo - sft "
        f"{facts['gold_se']:.2f}); reward model {facts['rm_accuracy']:.3f} of {facts['rm_ceiling']:.3f}; "
        f"kl {facts['kl']:.1f} nats; {facts['seconds']:.0f} s"
    )


def interval(facts: dict[str, Any], key: str) -> str:
    """Example: "+1.34 +/- 0.20"."""
    return f"{facts[f'{key}_gold']:+.2f} +/- {1.96 * facts[f'{key}_se']:.2f}"


@dataclasses.dataclass
class SeedResult:
    """One repetition: the facts of report.json, and what its part of the page shows."""

    facts: dict[str, Any]
    """seed, best_of and heldout (counts), rm_accuracy, rm_ceiling, kl, seconds (of the process that finished it),
    gold_se (the standard error of ppo_gold - sft_gold); of base, sft, best_of and ppo NAME_gold and its standard error
    NAME_se."""
    curves: dict[str, dict[str, Curve]]
    """Title of a picture -> name of a line -> its points; also in report.json, for those who draw their own."""
    answers: list[tuple[str, dict[str, tuple[str, float | None]]]]
    """Per held-out question, what base, sft and ppo answered, with gold."""
    golds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """By model, of each held-out question."""


def one_seed(out: Path, seed: int, lesson: Lesson, algorithms: bool = False) -> SeedResult:
    """The whole way once."""
    started, rng = time.perf_counter(), random.Random(f"demo {seed}")
    base, tuned = lesson.teach(out, rng)
    data = out / "data"

    # Stage 2: labellers rank K = 4 answers of the SFT model by gold plus noise; the reward model sees ranks only.
    write_lines(data / "comparisons.jsonl", label(lesson, tuned, seed + 1, rng))
    own = {**flags_of_run(data / "comparisons.jsonl", seed), **lesson.reward}
    judge = run_stage(Stage("reward", own, begins="sft"), out)

    # Stage 3: PPO sees prompts and the reward model.
    write_lines(data / "prompts.jsonl", [{"prompt": q.prompt} for q in lesson.trained_on[lesson.practised]])
    own = {**flags_of_run(data / "prompts.jsonl", seed), "max_new_tokens": lesson.how.tokens}
    own |= {"heldout": 0.0, **lesson.ppo}  # the world holds questions out by itself
    aligned = run_stage(Stage("ppo", own, begins="sft", judge="reward"), out)
    result = measure(out, seed, lesson, {"base": base, "sft": tuned, "ppo": aligned}, judge)
    result.facts["seconds"] = time.perf_counter() - started
    if algorithms:
        result.facts["algorithms"] = compare(out, seed, lesson, result.golds[best_name(lesson)])
    return result


def best_name(lesson: Lesson) -> str:
    return f"best of {lesson.how.best_of}"


def label(lesson: Lesson, run: Path, seed: int, rng: random.Random) -> list[dict[str, Any]]:
    """Rankings of four answers of the run's model to each question, by gold plus a labeller's noise."""
    questions, world = lesson.trained_on[lesson.labelled], lesson.world
    _, answers = answer(run, questions, seed, 4, lesson.how)
    fours = [answers[4 * i : 4 * i + 4] for i in range(len(questions))]
    golds = [[world.gold(q, text, ended) for text, ended in four] for q, four in zip(questions, fours, strict=True)]
    return comparisons([q.prompt for q in questions], fours, golds, lesson.noise, rng)


def measure(out: Path, seed: int, lesson: Lesson, runs: dict[str, Path], judge: Path) -> SeedResult:
    """Gold of base, SFT, the best of several of SFT and PPO on the held-out questions, one answer each, and what the
    runs logged."""
    world, heldout, best = lesson.world, lesson.heldout, best_name(lesson)
    answers = {name: answer(run, heldout, seed + 2, how=lesson.how)[1] for name, run in runs.items()}
    answers[best] = best_of(out, runs["sft"], heldout, judge, seed + 2, lesson.how)
    answers = {name: answers[name] for name in ("base", "sft", best, "ppo")}
    golds = {
        name: [world.gold(q, text, ended) for q, (text, ended) in zip(heldout, answered, strict=True)]
        for name, answered in answers.items()
    }
    error = {name: statistics.stdev(values) / math.sqrt(len(values)) for name, values in golds.items()}
    judged = read_lines(judge / "metrics.jsonl")[-1]
    keys = {"base": "base", "sft": "sft", best: "best_of", "ppo": "ppo"}
    facts = {
        "seed": seed,
        "best_of": lesson.how.best_of,
        **{f"{key}_gold": statistics.mean(golds[name]) for name, key in keys.items()},
        **{f"{key}_se": error[name] for name, key in keys.items()},
        "gold_se": math.hypot(error["sft"], error["ppo"]),
        "heldout": len(heldout),
        "rm_accuracy": judged["heldout/accuracy"],
        "rm_ceiling": noise_ceiling(world, out / "data" / "comparisons.jsonl"),
        "kl": read_lines(runs["ppo"] / "metrics.jsonl")[-1]["objective/kl"],
    }
    shown: list[tuple[str, dict[str, tuple[str, float | None]]]] = [
        (q.text, {name: (answers[name][i][0], golds[name][i]) for name in answers}) for i, q in enumerate(heldout[:10])
    ]
    return SeedResult(facts, curves_of(world, runs["ppo"]), shown, golds)


def curves_of(world: World, run: Path) -> dict[str, dict[str, Curve]]:
    """What PPO did on the way; gold is of the answers that it learned from."""
    asked = {question.text: question for question in world.questions}
    gold_by_step: dict[int, list[float]] = {}
    for row in read_lines(run / "samples.jsonl"):
        if row["kind"] == "rollout":
            ended = row["finish_reason"] == "stop"
            question = next(asked[line] for line in row["prompt"].splitlines() if line in asked)
            gold_by_step.setdefault(row["step"], []).append(world.gold(question, row["response"], ended))
    learned = read_lines(run / "metrics.jsonl")
    steps = [row["step"] for row in learned]
    return {
        "gold (hidden) and proxy scores": {
            "gold": (list(gold_by_step), [statistics.mean(values) for values in gold_by_step.values()]),
            "proxy": (steps, [row["objective/scores"] for row in learned]),
        },
        "KL from the SFT model, nats per answer": {"kl": (steps, [row["objective/kl"] for row in learned])},
        "answer length, tokens": {"length": (steps, [row["objective/response_length"] for row in learned])},
    }


def noise_ceiling(world: World, labels: Path) -> float:
    """The pair accuracy that gold itself would reach on the noisy labels; a tie in gold is a coin toss."""
    asked = {json.dumps(question.prompt): question for question in world.questions}
    right = pairs = 0.0
    for row in read_lines(labels):
        question, cut = asked[json.dumps(row["prompt"])], row.get("finish_reason", ["stop"] * len(row["responses"]))
        golds = [world.gold(question, text, end == "stop") for text, end in zip(row["responses"], cut, strict=True)]
        places = {i: place for place, group in enumerate(row["ranking"]) for i in group}
        for i, a in enumerate(golds):
            for j, b in enumerate(golds):
                if places[i] < places[j]:
                    right += 1.0 if a > b else 0.5 if a == b else 0.0
                    pairs += 1
    return right / pairs


def page_of(results: list[SeedResult], says: str) -> str:
    """The report; `says` tells what was taught."""
    sections: list[Section] = [
        Text(
            f"{says} A reward model learned from noisy rankings of four answers; PPO learned from the reward model. "
            "The hidden gold function was shown to nobody, and measured all of them on questions that nothing was "
            "trained on; behind +/- is the half of its 95 % interval."
        )
    ]
    count, best = results[0].facts["heldout"], results[0].facts["best_of"]
    header = ("seed", "gold: base", "gold: sft", f"gold: best of {best}", "gold: ppo",
              "se of ppo - sft", "ppo - sft in se", "reward accuracy",
              "noise ceiling", "KL, nats", "seconds")  # fmt: skip
    rows = []
    for facts in (result.facts for result in results):
        gain = facts["ppo_gold"] - facts["sft_gold"]
        rows.append(
            (str(facts["seed"]), *(interval(facts, key) for key in ("base", "sft", "best_of", "ppo")),
             f"{facts['gold_se']:.3f}", f"{gain / max(facts['gold_se'], 1e-9):+.1f}", f"{facts['rm_accuracy']:.3f}",
             f"{facts['rm_ceiling']:.3f}", f"{facts['kl']:.1f}", f"{facts['seconds']:.0f}")
        )  # fmt: skip
    sections.append(Table(f"Gold scores on {count} held-out questions", header, rows))
    for facts in (result.facts for result in results if "algorithms" in result.facts):
        title = f"Algorithms, seed {facts['seed']}: as many answers as PPO, or the reward model's own labels"
        names = ("algorithm", "gold", "above sft in se", "reward model's score", "KL from sft, nats", "seconds")
        lines = [
            (row["name"], f"{row['gold']:+.2f}", f"{row['se_above_sft']:+.1f}", f"{row['proxy']:+.2f}",
             f"{row['kl']:.1f}", "" if row["seconds"] is None else f"{row['seconds']:.0f}")
            for row in facts["algorithms"]
        ]  # fmt: skip
        sections.append(Table(title, names, lines))
    for result in results:
        seed = result.facts["seed"]
        scores = result.curves["gold (hidden) and proxy scores"]
        if over_optimised(scores):
            sections.append(Text(f"Seed {seed}: the proxy score rose while gold fell: over-optimisation.", loud=True))
        sections.append(Curves(f"PPO, seed {seed}", result.curves))
        sections.append(Samples(f"Answers to held-out questions, seed {seed} (gold)", result.answers))
    return page("penstock demo", "base model, SFT, reward model and PPO", sections)


def over_optimised(scores: dict[str, Curve]) -> bool:
    """True when, over the second half of PPO, the proxy rose and gold fell: by more than two standard errors each."""
    return trend(scores["proxy"]) > 2 and trend(scores["gold"]) < -2


def trend(curve: Curve) -> float:
    """The slope of a curve's second half in standard errors, which the scatter around the line gives."""
    xs, ys = (list(values)[len(values) // 2 :] for values in curve)
    slope, intercept = statistics.linear_regression(xs, ys)
    around = [y - slope * x - intercept for x, y in zip(xs, ys, strict=True)]
    error = math.sqrt(sum(y * y for y in around) / (len(xs) - 2) / (len(xs) * statistics.pvariance(xs)))
    return slope / max(error, 1e-12)
