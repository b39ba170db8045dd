"""The end against the start, on records that no stage saw: by a score of their answers, else by how likely the better
answers are to each.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from penstock.algorithms import functional as fn
from penstock.algorithms.setup import encode_all, encoder_of, placed, strategy_of
from penstock.algorithms.sft import Rows, response_logprobs, rows_of
from penstock.commands.config import EvalConfig, GenerateConfig
from penstock.commands.evaluate import answers_of, evaluate
from penstock.commands.generate import answered
from penstock.config import DataFlags, EngineFlags
from penstock.data import formats
from penstock.data.chat import Encoder, Example
from penstock.data.records import Kind
from penstock.models.roles import Actor
from penstock.run import intervals
from penstock.run.directory import resolve_model

SHOWN = 8
"""Prompts whose answers are in the report."""
TOGETHER = 8
"""Rows of a pass."""


@dataclass(frozen=True)
class Judge:
    """What scores answers to held-out prompts."""

    prompts: Path
    flags: dict[str, Any]
    """--reward, --reward-fn and how prompts are read, as `penstock eval` takes them."""
    own: bool = False
    """Whether it is the reward model that the run made, and was optimised against."""

    @property
    def name(self) -> str:
        return ", ".join([*filter(None, [self.flags.get("reward")]), *self.flags.get("reward_fn", ())])

    def config(self, model: str, **changes: Any) -> EvalConfig:
        flags = {**self.flags, "model": model, "data": str(self.prompts), **changes}
        return EvalConfig.of(**{name: value for name, value in flags.items() if value not in (None, ())})


def sampled(judge: Judge, model: str, count: int) -> list[dict[str, Any]]:
    """A few sampled answers of a model with their scores."""
    with first_of(judge.prompts, count) as few:
        return [line for _, line in answers_of(judge.config(model, data=str(few), temperature=1.0), model)]


@contextlib.contextmanager
def first_of(prompts: Path, count: int) -> Iterator[Path]:
    """A file with the first few lines of another."""
    rows = prompts.read_text(encoding="utf-8").split("\n")[:count]  # a prompt may hold other ends of lines
    few = prompts.with_name("few-prompts.jsonl")
    few.write_text("\n".join(rows), encoding="utf-8")
    try:
        yield few
    finally:
        few.unlink()


def side_by_side(prompts: Path, models: Sequence[str], flags: Mapping[str, Any]) -> list[list[str]]:
    """A few held-out prompts, each with every model's likeliest answer."""
    columns: list[list[str]] = []
    with first_of(prompts, SHOWN) as few:
        for model in models:
            config = GenerateConfig.of(model=model, data=str(few), temperature=0.0, batch_size=SHOWN, **flags)
            lines = [line for _, line in answered(config, lambda text: None)[1]]
            columns.append([line["response"] or str(line["response_ids"]) for line in lines])
    asked = [line["prompt"] or str(line["prompt_ids"]) for line in lines]
    return [[prompt, *answers] for prompt, *answers in zip(asked, *columns, strict=True)]


def compare(judge: Judge, end: Path, start: str, out: Path) -> dict[str, Any]:
    """`penstock eval` of the end against the start: its result, which the end's run keeps too."""
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the plan and the result
        evaluate(judge.config(str(end), against=start, out=str(out)))
    return json.loads(out.read_text(encoding="utf-8"))


LIKELIHOOD: dict[Kind, str] = {
    "demonstrations": "log-probability per token of held-out answers",
    "comparisons": "nats per token by which held-out better answers are likelier than worse ones",
    "votes": "held-out votes that it moved with: liked answers likelier, disliked ones less",
}
"""What is measured without a score, by kind of data; more is better."""


def likelihoods(kind: Kind, file: Path, start: str, end: Path, flags: tuple[DataFlags, EngineFlags]) -> dict[str, Any]:
    """How likely held-out answers are to start and end: of each the mean, and the difference's 95 % interval."""
    before, after = (_values(kind, file, str(model), *flags) for model in (start, end))
    records = formats.read([str(file)], kind).records
    if kind == "votes":
        signs = numpy.array([1.0 if record.label else -1.0 for record in records])
        after, before = (numpy.sign((after - before) * signs) + 1) / 2, numpy.full(len(signs), 0.5)
    gain = after - before
    interval = intervals.of_change if kind == "votes" else intervals.of_mean  # votes are shares
    return {
        "by": LIKELIHOOD[kind], "records": len(gain), "start": float(before.mean()), "end": float(after.mean()),
        "gain": float(gain.mean()), "gain_interval": interval(gain),
    }  # fmt: skip


def _values(kind: Kind, file: Path, model: str, data: DataFlags, engine: EngineFlags) -> Any:
    """`values` of the records in a file."""
    return values(kind, *answer_logprobs(kind, formats.read([str(file)], kind).records, model, data, engine))


def lead(better: float, worse: float) -> float:
    """How far two answers of a pair are apart: it moves where a share of few pairs would not."""
    return better - worse


def in_order(better: float, worse: float) -> float:
    """Whether the better answer of a pair has the higher value: one half where they are equal."""
    return (better > worse) + (better == worse) / 2


def values(
    kind: Kind, records: Sequence[Any], answers: Sequence[Sequence[tuple[float, int] | None]],
    of_pair: Callable[[float, float], float] = lead,
) -> Any:  # fmt: skip
    """Of each record its answer's log-probability per token; of each comparison the mean over its pairs."""
    per_token = [[None if answer is None else answer[0] / answer[1] for answer in row] for row in answers]
    if kind != "comparisons":
        return numpy.array([row[-1] for row in per_token])  # the last answer of a conversation
    of_records = [
        [of_pair(*pair) for pair in pairs(record.ranks, row)] for record, row in zip(records, per_token, strict=True)
    ]
    return numpy.array([numpy.mean(row) if row else of_pair(0.0, 0.0) for row in of_records])


def pairs(ranks: Sequence[int], row: Sequence[float | None]) -> Iterator[tuple[float, float]]:
    """The values of each pair of answers of different rank, the better one's first."""
    read = [(rank, value) for rank, value in zip(ranks, row, strict=True) if value is not None]
    return ((a, b) for better, a in read for worse, b in read if better < worse)


def answer_logprobs(
    kind: Kind, records: Sequence[Any], model: str, data: DataFlags, engine: EngineFlags
) -> tuple[list[Any], list[list[tuple[float, int] | None]]]:
    """The records that a model can read, and of each its answers' log-probabilities, summed, and their tokens: None for
    an answer that does not fit."""
    source, strategy = resolve_model(model), strategy_of(placed(engine))
    with strategy.init():
        actor = Actor.from_pretrained(source).eval().requires_grad_(False)
    encoder = encoder_of(source, actor.decoder.config, data)
    records, rows = answer_rows(encoder, records, kind)
    stream = strategy.prepare(actor)

    def read(hidden: torch.Tensor, batch: Rows) -> torch.Tensor:
        return fn.unpack(response_logprobs(actor, hidden, batch), batch.trained.sum(1)).sum(1).double().cpu()

    examples = [example for row in rows for example in row if example is not None]
    batches = [rows_of(examples[i : i + TOGETHER], strategy.world.device) for i in range(0, len(examples), TOGETHER)]
    with strategy.phase("score"):
        sums = iter(torch.cat(strategy.evaluate(stream, batches, read)).tolist() if batches else ())
    tokens = [[None if example is None else sum(example.trained) for example in row] for row in rows]
    return records, [[None if count is None else (next(sums), count) for count in row] for row in tokens]


def answer_rows(encoder: Encoder, records: Sequence[Any], kind: Kind) -> tuple[list[Any], list[list[Example | None]]]:
    """The records that a model can read, each once, and the rows of their answers: None for one that does not fit."""
    kept, encoded, _, _ = encode_all(encoder, records, kind)
    if kind != "comparisons":
        rows: dict[int, list[Example | None]] = {}
        for record, example in zip(kept, encoded, strict=True):
            rows.setdefault(id(record), []).append(example)
        return [*{id(record): record for record in kept}.values()], [*rows.values()]
    return kept, [
        [Example([*prompt, *ids], [False] * len(prompt) + [True] * len(ids)) if ids else None for ids in answers]
        for prompt, answers in encoded
    ]
