"""`penstock eval`: the answers of two models to the same prompts, judged by a reward, a function or another model.

A win counts 1, a tie 0.5: the win rate is their mean. Judges prefer longer answers, so the rate is given for equal
lengths too: a logistic regression of the outcome on tanh of the difference in length, divided by its spread, read where
it is 0, as in length-controlled AlpacaEval (Dubois et al. 2024) without its terms for single instructions.

[Note: both orders] A model that judges prefers the answer that it reads first (Zheng et al. 2023, MT-Bench). It reads
each pair in both orders; two verdicts that contradict each other are a tie.
"""

import dataclasses
import functools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy

from penstock.commands.config import EvalConfig, GenerateConfig
from penstock.commands.generate import answered
from penstock.data.records import Prompt
from penstock.errors import ResourceError, UserError
from penstock.run import intervals
from penstock.run.directory import RunDirectory, refused
from penstock.run.evaluations import FILE
from penstock.run.metrics import Lines
from penstock.run.report import run_report

RIDGE = 1e-3
"""Penalty on the slope of the length: where the longer answer always wins, there is no largest likelihood."""
REQUESTS = 8
"""Questions that a judge gets at once."""
VERDICT = re.compile(r"\[\[(A|B|tie)\]\]", re.IGNORECASE)
QUESTION = """Two assistants answered the same user. Compare their last answers: are they right, do they help, do they
do what was asked? Their length and their order must not matter. Explain in one or two sentences, then end with your
verdict: [[A]] if answer A is better, [[B]] if answer B is better, [[tie]] if neither is.

The user's conversation:
{prompt}

Answer A:
{first}

Answer B:
{second}
"""

Side = list[tuple[Prompt, dict[str, Any]]]
"""The prompts that a model answered, each with a line as `penstock generate` writes it."""


def evaluate(config: EvalConfig) -> None:
    """Prints what was measured; with a run as the model it is added to its evaluations.jsonl and its report."""
    if config.lm_eval:
        return keep_lm_eval(config)
    if config.data is None:
        raise UserError("eval: --data names the prompts to answer, or --lm-eval what lm-eval measured.")
    if config.judge and (config.reward or config.reward_fn):
        raise UserError("--judge: goes without --reward and --reward-fn; one of them decides who wins.")
    if config.judge and not (config.against and config.judge_model):
        raise UserError(
            "--judge compares two models: add --against MODEL, and --judge-model NAME of the one that judges."
        )
    if config.judge_model and not config.judge:
        raise UserError(f"--judge-model {config.judge_model}: nothing asks it; add --judge, the address of its server.")
    if not config.judge:
        config.need_score("eval")
    own = answers_of(config, config.model)
    result: dict[str, Any] = {"date": today(), "prompts": len(own)}
    result |= {"by": config.judge_model or ", ".join([*filter(None, [config.reward]), *config.reward_fn])}
    result |= {"data": config.data, "temperature": config.temperature, "seed": config.seed}
    if config.against is None:
        scores = numpy.array([line["score"] for _, line in own])
        result |= {"score": float(scores.mean()), "score_interval": intervals.of_mean(scores)}
    else:
        result |= {"against": config.against, **comparison(config, own, answers_of(config, config.against))}
    print(json.dumps(result) if config.json else as_text(config, result))
    if is_run(config.model):
        print(f"wrote {keep(Path(config.model), [result])}", file=sys.stderr)
    if config.out:
        try:
            Path(config.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise refused(f"--out {config.out}", error) from error


def is_run(model: str) -> bool:
    return (Path(model) / "config.toml").exists()


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def keep(run: Path, results: Sequence[Mapping[str, Any]]) -> Path:
    """Adds results to the run's evaluations.jsonl, and makes its report again, whose path it returns."""
    lines = Lines(run / FILE, (run / FILE).stat().st_size if (run / FILE).exists() else 0)
    for result in results:
        lines.write(result)
    lines.close()
    return run_report(run, RunDirectory.peek(run)["command"])


def keep_lm_eval(config: EvalConfig) -> None:
    """Adds what lm-eval wrote to the run that it measured, a line per task and metric, and prints it."""
    source = Path(str(config.lm_eval))
    for flag in ("data", "against", "judge", "reward", "reward_fn", "out"):
        if getattr(config, flag):
            name = flag.replace("_", "-")
            raise UserError(f"--{name}: is not used with --lm-eval, which answers nothing; leave it out.")
    files = [*source.rglob("results_*.json")] if source.is_dir() else [source]
    if not files:
        raise UserError(f"--lm-eval {source}: has no results_*.json; give the --output_path that lm-eval had.")
    if not is_run(config.model):
        raise UserError(f"eval {config.model}: is no run directory, so there is nowhere to keep what lm-eval measured.")
    try:
        newest = max(files, key=lambda file: file.stat().st_mtime)
        results = lm_eval_results(json.loads(newest.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--lm-eval {source}: is no result of lm-eval ({error!r}).") from error
    if not results:
        raise UserError(f"--lm-eval {source}: has no figure of any task in it.")
    for result in results:
        print(json.dumps(result) if config.json else f"{result['data']}, {result['by']}: {result['score']:.4f}")
    print(f"wrote {keep(Path(config.model), results)}", file=sys.stderr)


def lm_eval_results(written: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of a results file of lm-eval each task's metrics: `{"acc,none": 0.4, "acc_stderr,none": 0.02}` by task."""
    results = []
    for task, metrics in written["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or isinstance(value, bool | str) or metric.endswith("_stderr"):
                continue
            if not math.isfinite(value):
                print(f"{task}, {metric}: is {value} and is not kept", file=sys.stderr)
                continue
            by = f"lm-eval {metric}" + (f" ({filtered})" if filtered != "none" else "")
            count = written["n-samples"][task]["effective"] if task in written["n-samples"] else "all"  # of a group
            error = metrics.get(f"{metric}_stderr,{filtered}")
            known = {"standard_error": error} if isinstance(error, float) and math.isfinite(error) else {}
            results.append({"date": today(), "prompts": count, "by": by, "data": task, "score": value} | known)
    return results


def answers_of(config: EvalConfig, model: str) -> Side:
    """One answer to each prompt, with its score where a reward or a function gives one."""
    shared = {field.name for field in dataclasses.fields(GenerateConfig)} & {
        field.name for field in dataclasses.fields(config)
    }
    options = {name: getattr(config, name) for name in shared - {"model", "out", "json"}}
    print(f"{model} answers", file=sys.stderr)
    return [*answered(GenerateConfig(model=model, **options), functools.partial(print, file=sys.stderr))[1]]


def comparison(config: EvalConfig, own: Side, other: Side) -> dict[str, Any]:
    """Who wins how often. Prompts that only one of the two could read are left out, and counted."""
    others = {place: line for place, (_, line) in by_place(other).items()}
    pairs = [(*answer, others[place]) for place, answer in by_place(own).items() if place in others]
    if config.judge:
        verdicts = judged(config, pairs)
        kept = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is not None]
        pairs, outcomes = [pair for pair, _ in kept], numpy.array([verdict for _, verdict in kept])
        scores: dict[str, Any] = {"without_verdict": len(verdicts) - len(kept)}
    else:
        gaps = numpy.array([line["score"] - theirs["score"] for _, line, theirs in pairs])
        outcomes = (numpy.sign(gaps) + 1) / 2
        scores = {"score": float(numpy.mean([line["score"] for _, line, _ in pairs]))}
        scores |= {"score_against": float(numpy.mean([theirs["score"] for *_, theirs in pairs]))}
    if not pairs:
        raise ResourceError("eval: nothing could be compared; see above.")
    lengths = numpy.array([_length(line) - _length(theirs) for _, line, theirs in pairs], dtype=float)
    return {
        "prompts": len(pairs), "left_out": len(own) + len(other) - 2 * len(pairs), **scores,
        "wins": int((outcomes > 0.5).sum()), "ties": int((outcomes == 0.5).sum()),
        "win_rate": float(outcomes.mean()), "win_rate_interval": intervals.of_share(outcomes),
        "win_rate_length_controlled": length_controlled(outcomes, lengths),
        "longer_by": float(lengths.mean()),
    }  # fmt: skip


def by_place(side: Side) -> dict[tuple[str, int], tuple[Prompt, dict[str, Any]]]:
    """By where a prompt is, and which of its repetitions it is: --data 2*FILE asks everything twice."""
    seen: Counter[str] = Counter()
    places = {}
    for record, line in side:
        places[record.where, seen[record.where]] = record, line
        seen[record.where] += 1
    return places


def length_controlled(outcomes: Any, lengths: Any) -> float:
    """The win rate that answers of equal length would have: outcomes [n] in 0 .. 1, lengths [n] the differences."""
    spread = lengths.std()
    if not spread:
        return float(outcomes.mean())
    columns = numpy.stack([numpy.ones_like(lengths), numpy.tanh(lengths / spread)], axis=1)
    weights, penalty = numpy.zeros(2), numpy.diag([RIDGE, RIDGE])
    for _ in range(100):  # Newton's steps; the penalty makes the likelihood strictly concave
        rates = 1 / (1 + numpy.exp(-columns @ weights))
        slope = columns.T @ (outcomes - rates) - penalty @ weights
        curvature = (columns * (rates * (1 - rates))[:, None]).T @ columns + penalty
        step = numpy.linalg.solve(curvature, slope)
        weights = weights + numpy.clip(step, -1, 1)
        if abs(step).max() < 1e-9:
            break
    return float(1 / (1 + numpy.exp(-weights[0])))


def judged(config: EvalConfig, pairs: Sequence[tuple[Prompt, dict[str, Any], dict[str, Any]]]) -> list[float | None]:
    """Per pair 1 where the first answer wins, 0.5 for a tie, None without two verdicts. See [Note: both orders]."""
    try:
        import openai
    except ImportError as error:
        raise UserError("--judge: needs the openai package; pip install 'penstock[judge]'.") from error
    client = openai.OpenAI(base_url=config.judge, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=4)
    problems: list[str] = []

    def verdict(prompt: str, first: str, second: str) -> float | None:
        text = QUESTION.format(prompt=prompt, first=first, second=second)
        try:
            answer = client.chat.completions.create(
                model=str(config.judge_model), messages=[{"role": "user", "content": text}], temperature=0.0
            )
        except openai.OpenAIError as error:
            problems.append(f"{type(error).__name__}: {error}")
            return None
        words = VERDICT.findall(answer.choices[0].message.content or "")
        if not words:
            problems.append("an answer of the judge has no verdict in it")
            return None
        return {"a": 1.0, "b": 0.0}.get(words[-1].lower(), 0.5)

    def both(pair: tuple[Prompt, dict[str, Any], dict[str, Any]]) -> float | None:
        _, own, theirs = pair
        first = verdict(own["prompt"], own["response"], theirs["response"])
        second = verdict(own["prompt"], theirs["response"], own["response"])
        return None if first is None or second is None else (first + 1 - second) / 2

    with ThreadPoolExecutor(REQUESTS) as threads:
        verdicts = [None if v is None else 0.5 if v in (0.25, 0.5, 0.75) else v for v in threads.map(both, pairs)]
    if problems:
        lost = sum(verdict is None for verdict in verdicts)
        print(f"--judge: {lost} of {len(pairs)} pairs have no verdict; {problems[0]}", file=sys.stderr)
    return verdicts


def as_text(config: EvalConfig, result: dict[str, Any]) -> str:
    """For people."""
    about = f"{result['prompts']} prompts, by {result['by']}"
    if config.against is None:
        low, high = result["score_interval"]
        return f"{config.model}, {about}\n  score {result['score']:.3f} ({low:.3f} to {high:.3f})"
    low, high = result["win_rate_interval"]
    equal, longer = result["win_rate_length_controlled"], result["longer_by"]
    lines = [
        f"{config.model} against {config.against}, {about}",
        f"  wins {result['win_rate']:.1%} ({low:.1%} to {high:.1%}), {result['ties']} ties",
        f"  wins {equal:.1%} at equal lengths; its answers are {abs(longer):.0f} letters "
        + ("longer" if longer > 0 else "shorter"),
    ]
    if "score" in result:
        lines.append(f"  score {result['score']:.3f} against {result['score_against']:.3f}")
    return "\n".join(lines)


def _length(line: dict[str, Any]) -> int:
    """Letters of an answer; of one without a text its tokens."""
    return len(line["response"]) or len(line["response_ids"])
