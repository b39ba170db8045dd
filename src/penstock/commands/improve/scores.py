"""What models say of judged answers: a reward model's scores, and log-probabilities less those of another model."""

from collections.abc import Sequence
from typing import NamedTuple

from penstock.algorithms.reward import score_rows
from penstock.algorithms.setup import encoder_of, placed, strategy_of
from penstock.commands.align.evaluation import TOGETHER, answer_logprobs, answer_rows
from penstock.commands.improve.labels import KINDS, Label
from penstock.commands.improve.rule import Scores
from penstock.config import DataFlags, EngineFlags
from penstock.models.roles import RewardModel
from penstock.run.directory import resolve_model


class Reading(NamedTuple):
    """How models read."""

    data: DataFlags
    engine: EngineFlags


def of_reward_model(model: str, labels: Sequence[Label], reading: Reading) -> Scores:
    """A reward model's score of each answer."""
    source, strategy = resolve_model(model), strategy_of(placed(reading.engine))
    with strategy.init():
        judge = RewardModel.trained(source).eval().requires_grad_(False)
    encoder = encoder_of(source, judge.decoder.config, reading.data)
    stream = strategy.prepare(judge)
    scores: dict[int, list[float | None]] = {}
    for kind in KINDS:
        records, rows = answer_rows(encoder, [label.record for label in labels if label.kind == kind], kind)
        tokens = [example.tokens for row in rows for example in row if example is not None]
        with strategy.phase("score"):
            values = iter(score_rows(strategy, stream, tokens, TOGETHER))
        for record, row in zip(records, rows, strict=True):
            scores[id(record)] = [None if example is None else next(values) for example in row]
    return [scores.get(id(label.record), _unread(label)) for label in labels]


def log_ratios(model: str, other: str, labels: Sequence[Label], reading: Reading) -> Scores:
    """Of each answer its log-probability under a model less that under another."""
    first, second = (_logprobs(each, labels, reading) for each in (model, other))
    return [
        [None if a is None or b is None else a - b for a, b in zip(*rows, strict=True)]
        for rows in zip(first, second, strict=True)
    ]


def _logprobs(model: str, labels: Sequence[Label], reading: Reading) -> Scores:
    sums: dict[int, list[float | None]] = {}
    for kind in KINDS:
        own = [label.record for label in labels if label.kind == kind]
        if own:
            for record, row in zip(*answer_logprobs(kind, own, model, *reading), strict=True):
                sums[id(record)] = [None if answer is None else answer[0] for answer in row]
    return [sums.get(id(label.record), _unread(label)) for label in labels]


def _unread(label: Label) -> list[float | None]:
    """Of a label that the model cannot read."""
    return [None] * (len(label.record.ranks) if label.kind == "comparisons" else 1)
