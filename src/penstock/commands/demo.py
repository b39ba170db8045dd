"""`penstock demo`: base model, SFT, labellers, reward model, PPO, and a report, on Toyland.

Every stage runs as a user would run it, chained as `penstock align` chains them; only the base model's corpus, the
demonstrations and the labels come from Toyland. Gold scores are measured here, on questions that no stage ever
saw, and hidden from every stage (PPO.md 25).
"""

import dataclasses
import json
import math
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from penstock.commands.align.stages import Stage, run_stage
from penstock.commands.config import DemoConfig
from penstock.commands.demo_algorithms import compare
from penstock.commands.demo_runs import (
    BEST_OF,
    RESPONSE_TOKENS,
    answer,
    best_of,
    flags_of_run,
    write_lines,
)
from penstock.data.labellers import comparisons
from penstock.data.toyland import Question, Toyland, save_tokenizer
from penstock.errors import UserError
from penstock.models import presets, pretrained
from penstock.models.decoder import Decoder
from penstock.rollout.sampling import Sampling
from penstock.run.directory import refused
from penstock.run.metrics import peak_rss_bytes, read_lines
from penstock.run.report import Curve, Curves, Samples, Section, Table, Text, page

HELDOUT = 256
"""Questions that nothing is trained on."""
LABEL_NOISE = 0.7
"""Standard deviation of a labeller's judgement, in units of gold."""
MARK = ".penstock-demo"
"""Only a directory that holds this file is ever replaced."""


def demo(config: DemoConfig) -> Path:
    """Runs all seeds and writes report.html and report.json in `config.out`."""
    out = Path(config.out)
    try:
        if out.exists() and any(out.iterdir()):
            if not (out / MARK).exists():
                raise UserError(f"--out {out}: is not empty and no demo made it; choose another --out.")
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()
    except OSError as error:
        raise refused(f"--out {out}", error) from error
    results = []
    for seed in range(config.seed, config.seed + config.seeds):
        results.append(one_seed(out if config.seeds == 1 else out / f"seed-{seed}", seed, config.algorithms))
        result = results[-1].facts
        print(
            f"seed {seed}: gold base {result['base_gold']:+.2f}, sft {result['sft_gold']:+.2f}, "
            f"best of {BEST_OF} {result['best_of_gold']:+.2f}, "
            f"ppo {result['ppo_gold']:+.2f} (se {result['gold_se']:.2f}); reward model {result['rm_accuracy']:.3f} of "
            f"{result['rm_ceiling']:.3f}; kl {result['kl']:.1f} nats; {result['seconds']:.0f} s",
            flush=True,
        )
    report = {
        "seeds": [result.facts for result in results],
        "curves": [result.curves for result in results],
        "peak_rss_bytes": peak_rss_bytes(),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "report.html").write_text(page_of(results), encoding="utf-8")
    print(json.dumps(report["seeds"]) if config.json else f"wrote {out / 'report.html'}")
    return out


@dataclasses.dataclass
class SeedResult:
    """One repetition: the facts of report.json, and what its part of the page shows."""

    facts: dict[str, Any]
    """seed, base_gold, sft_gold, best_of_gold, ppo_gold, gold_se, rm_accuracy, rm_ceiling, kl, seconds; gold_se is the
    standard error of ppo_gold - sft_gold."""
    curves: dict[str, dict[str, Curve]]
    """Title of a picture -> name of a line -> its points; also in report.json, for those who draw their own."""
    answers: list[tuple[str, dict[str, tuple[str, float | None]]]]
    """Per held-out question, what base, sft and ppo answered, with gold."""
    golds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """By model, of each held-out question."""


def one_seed(out: Path, seed: int, algorithms: bool = False) -> SeedResult:
    """The whole way once."""
    started = time.perf_counter()
    world, rng = Toyland(seed), random.Random(f"demo {seed}")
    trained_on, heldout = world.split(seed, HELDOUT)
    base, tuned = taught(out, seed, world, trained_on, rng)
    data = out / "data"

    # Stage 2: labellers rank K = 4 answers of the SFT model by gold plus noise; the reward model sees ranks only.
    labels = label(world, tuned, trained_on[1500:3000], seed + 1, rng)
    write_lines(data / "comparisons.jsonl", labels)
    flags = {"lr": 3e-4, "batch_size": 16, "micro_batch_size": 64, "heldout": 0.15, "eval_every": 40}
    judge = run_stage(Stage("reward", {**flags_of_run(data / "comparisons.jsonl", seed), **flags}, begins="sft"), out)

    # Stage 3: PPO sees prompts and the reward model.
    write_lines(data / "prompts.jsonl", [{"prompt": q.prompt} for q in trained_on[3000:]])
    flags = {"lr": 3e-4, "critic_lr": 1e-3, "batch_size": 64, "micro_batch_size": 64, "epochs": 2, "steps": 28}
    flags |= {"max_new_tokens": RESPONSE_TOKENS, "kl_coef": 0.1, "samples": 64}
    flags |= {"heldout": 0.0}  # the world holds questions out by itself
    learner = Stage("ppo", {**flags_of_run(data / "prompts.jsonl", seed), **flags}, begins="sft", judge="reward")
    aligned = run_stage(learner, out)
    runs = {"base": base, "sft": tuned, "ppo": aligned}
    result = measure(out, seed, world, heldout, runs, judge, started)
    if algorithms:
        best = result.golds[f"best of {BEST_OF}"]
        result.facts["algorithms"] = compare(out, seed, world, heldout, best)
    return result


def taught(out: Path, seed: int, world: Toyland, trained_on: list[Question], rng: random.Random) -> tuple[Path, Path]:
    """The runs of a base model and of stage 1, which learns to answer from demonstrations."""
    data, untrained = out / "data", out / "untrained"
    data.mkdir(parents=True, exist_ok=True)

    # The base model has read about animals but never answered anybody.
    corpus = [world.text(rng) for _ in range(9600)]
    demonstrators = [(q, world.demonstration(q, rng)) for q in trained_on[:1500]]
    save_untrained(untrained, corpus[:2000] + [q.prompt + a for q, a in demonstrators[:500]], seed)
    write_lines(data / "corpus.jsonl", [{"prompt": "", "response": text} for text in corpus])
    flags = {"model": str(untrained), "lr": 5e-3, "heldout": 0.02, "samples": 0}
    base = run_stage(Stage("sft", {**flags_of_run(data / "corpus.jsonl", seed), **flags}, name="base"), out)

    write_lines(data / "demonstrations.jsonl", [{"prompt": q.prompt, "response": a} for q, a in demonstrators])
    flags = {"lr": 1.5e-3, "epochs": 3, "max_new_tokens": RESPONSE_TOKENS}
    tuned = run_stage(Stage("sft", {**flags_of_run(data / "demonstrations.jsonl", seed), **flags}, begins="base"), out)
    return base, tuned


def save_untrained(directory: Path, texts: list[str], seed: int) -> None:
    """A small model with random weights, and a tokenizer made from the texts."""
    tokenizer = save_tokenizer(directory, texts)
    architecture = dataclasses.replace(
        presets.named("s"), vocab_size=len(tokenizer), d_model=160, num_layers=3, num_heads=5, num_kv_heads=5,
        head_dim=32, d_ff=640, max_length=64,
        hf={name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")},
    )  # fmt: skip
    pretrained.save(Decoder(architecture, generator=torch.Generator().manual_seed(seed)), directory)


def label(world: Toyland, run: Path, questions: list[Question], seed: int, rng: random.Random) -> list[dict[str, Any]]:
    """Rankings of four answers of the run's model to each question, by gold plus a labeller's noise."""
    _, answers = answer(run, questions, Sampling(max_new_tokens=RESPONSE_TOKENS, n=4, seed=seed))
    fours = [answers[4 * i : 4 * i + 4] for i in range(len(questions))]
    golds = [[world.gold(q, text, ended) for text, ended in four] for q, four in zip(questions, fours, strict=True)]
    return comparisons([q.prompt for q in questions], fours, golds, LABEL_NOISE, rng)


def measure(
    out: Path, seed: int, world: Toyland, heldout: list[Question], runs: dict[str, Path], judge: Path, started: float
) -> SeedResult:
    """Gold of base, SFT, the best of 8 of SFT and PPO on the held-out questions, one answer each, and what the runs
    logged."""
    sampling = Sampling(max_new_tokens=RESPONSE_TOKENS, seed=seed + 2)
    answers = {name: answer(run, heldout, sampling)[1] for name, run in runs.items()}
    best = best_of(out, runs["sft"], heldout, judge, seed + 2)
    answers = {"base": answers["base"], "sft": answers["sft"], f"best of {BEST_OF}": best, "ppo": answers["ppo"]}
    golds: dict[str, list[float]] = {}
    texts: dict[str, list[str]] = {}
    for name, answered in answers.items():
        texts[name] = [text for text, _ in answered]
        golds[name] = [world.gold(q, text, ended) for q, (text, ended) in zip(heldout, answered, strict=True)]
    mean = {name: statistics.mean(values) for name, values in golds.items()}
    variance = {name: statistics.variance(values) / len(values) for name, values in golds.items()}

    asked = {question.prompt: question for question in world.questions}
    learned = read_lines(runs["ppo"] / "metrics.jsonl")
    gold_by_step: dict[int, list[float]] = {}
    for row in read_lines(runs["ppo"] / "samples.jsonl"):
        if row["kind"] == "rollout":
            ended = row["finish_reason"] == "stop"
            gold_by_step.setdefault(row["step"], []).append(world.gold(asked[row["prompt"]], row["response"], ended))
    steps = [row["step"] for row in learned]
    curves: dict[str, dict[str, Curve]] = {
        "gold (hidden) and proxy scores": {
            "gold": (list(gold_by_step), [statistics.mean(values) for values in gold_by_step.values()]),
            "proxy": (steps, [row["objective/scores"] for row in learned]),
        },
        "KL from the SFT model, nats per answer": {"kl": (steps, [row["objective/kl"] for row in learned])},
        "answer length, tokens": {"length": (steps, [row["objective/response_length"] for row in learned])},
    }
    judged = read_lines(judge / "metrics.jsonl")[-1]
    facts = {
        "seed": seed,
        "base_gold": mean["base"],
        "sft_gold": mean["sft"],
        "best_of_gold": mean[f"best of {BEST_OF}"],
        "ppo_gold": mean["ppo"],
        "gold_se": math.sqrt(variance["sft"] + variance["ppo"]),
        "rm_accuracy": judged["heldout/accuracy"],
        "rm_ceiling": noise_ceiling(world, out / "data" / "comparisons.jsonl"),
        "kl": learned[-1]["objective/kl"],
        "seconds": time.perf_counter() - started,
    }
    shown: list[tuple[str, dict[str, tuple[str, float | None]]]] = [
        (q.prompt.strip(), {name: (texts[name][i], golds[name][i]) for name in answers})
        for i, q in enumerate(heldout[:10])
    ]
    return SeedResult(facts, curves, shown, golds)


def noise_ceiling(world: Toyland, comparisons: Path) -> float:
    """The pair accuracy that gold itself would reach on the noisy labels; a tie in gold is a coin toss."""
    asked = {question.prompt: question for question in world.questions}
    right = pairs = 0.0
    for row in read_lines(comparisons):
        golds = [world.gold(asked[row["prompt"]], text) for text in row["responses"]]
        places = {i: place for place, group in enumerate(row["ranking"]) for i in group}
        for i, a in enumerate(golds):
            for j, b in enumerate(golds):
                if places[i] < places[j]:
                    right += 1.0 if a > b else 0.5 if a == b else 0.0
                    pairs += 1
    return right / pairs


def page_of(results: list[SeedResult]) -> str:
    sections: list[Section] = [
        Text(
            "A small world of animals and people who ask about them. A base model learned plain text; SFT learned to "
            "answer from demonstrators of mixed care; a reward model learned from noisy rankings of four answers; PPO "
            "learned from the reward model. A hidden gold function (true, to the point, friendly, not too long) was "
            "shown to nobody, and measured all of them on questions that nothing was trained on."
        )
    ]
    header = ("seed", "gold: base", "gold: sft", f"gold: best of {BEST_OF}", "gold: ppo",
              "se of ppo - sft", "ppo - sft in se", "reward accuracy",
              "noise ceiling", "KL, nats", "seconds")  # fmt: skip
    rows = []
    for facts in (result.facts for result in results):
        gain = facts["ppo_gold"] - facts["sft_gold"]
        rows.append(
            (str(facts["seed"]), *(f"{facts[k]:+.2f}" for k in ("base_gold", "sft_gold", "best_of_gold", "ppo_gold")),
             f"{facts['gold_se']:.3f}", f"{gain / facts['gold_se']:+.1f}", f"{facts['rm_accuracy']:.3f}",
             f"{facts['rm_ceiling']:.3f}", f"{facts['kl']:.1f}", f"{facts['seconds']:.0f}")
        )  # fmt: skip
    sections.append(Table(f"Gold scores on {HELDOUT} held-out questions", header, rows))
    for facts in (result.facts for result in results if "algorithms" in result.facts):
        title = f"Algorithms, seed {facts['seed']}: as many answers as PPO, or the reward model's own labels"
        names = ("algorithm", "gold", "above sft in se", "KL from sft, nats", "seconds")
        lines = [
            (row["name"], f"{row['gold']:+.2f}", f"{row['se_above_sft']:+.1f}", f"{row['kl']:.1f}",
             "" if row["seconds"] is None else f"{row['seconds']:.0f}")
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
    return page("penstock demo", "base model, SFT, reward model and PPO on Toyland", sections)


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
