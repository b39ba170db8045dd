"""Rows that are not trained on: which they are, how often they are evaluated, and which evaluation was the best."""

import math
from dataclasses import dataclass
from typing import Any

from penstock.algorithms.setup import read
from penstock.config import EvalFlags
from penstock.data.batching import split_by_prompt
from penstock.data.chat import Encoder
from penstock.data.formats import Reads, reads_none
from penstock.data.records import Kind
from penstock.run.session import Session

Rows = tuple[list[Any], list[Any]]
"""Records, and the tokens of each."""


def read_sides(
    session: Session, encoder: Encoder, kind: Kind, config: Any, *, fewest: int = 1, reads: Reads = reads_none
) -> tuple[Rows, Rows]:
    """What is trained on, and what is held out of it or stands in --eval-data; never more than --max-eval-samples.

    fewest: where --heldout is fewer prompts than that, none are held out. reads: as in `setup.read`. Says which prompts
    are repeated.
    """
    evaluation: EvalFlags = config
    records, rows = read(session.say, encoder, config.data.data, kind, config.data, reads)
    keys = [record.prompt_key for record in records]
    if repeated := len(keys) - len(set(keys)):
        session.say(f"{repeated} of {len(keys)} rows repeat the prompt of another row")
    most = evaluation.max_eval_samples
    if evaluation.eval_data:
        other, other_rows = read(session.say, encoder, evaluation.eval_data, kind, config.data, reads)
        if most is not None and len(other) > most:
            session.say(f"--eval-data: the first {most} of {len(other)} rows are evaluated (--max-eval-samples)")
            other, other_rows = other[:most], other_rows[:most]
        if shared := sum(record.prompt_key in set(keys) for record in other):
            session.warn(f"duplicate prompts: {shared} of {len(other)} rows of --eval-data are trained on as well")
        return (records, rows), (other, other_rows)
    fraction = evaluation.heldout if fewest == 1 or evaluation.heldout * len(set(keys)) >= fewest else 0.0
    train, heldout = split_by_prompt(keys, fraction, config.run.seed, most=most)
    sides = [([records[i] for i in side], [rows[i] for i in side]) for side in (train, heldout)]
    return sides[0], sides[1]


def interval(config: EvalFlags, total: int, count: int, batch_size: int, session: Session) -> int:
    """Steps between two evaluations of `count` rows: about 20 times in `total` steps, by default.

    In a short run less often: an evaluation reads no more rows than were trained on since the last.
    """
    steps = interval_of(config.eval_every, total, count, batch_size)
    times = math.ceil(total / steps)
    session.say(
        f"held out: {count} rows, evaluated {times} times, every {steps} steps" if count else "nothing held out"
    )
    return steps


def interval_of(eval_every: int | None, total: int, count: int, batch_size: int) -> int:
    """`interval`, without a word."""
    return eval_every or max(math.ceil(total / 20), math.ceil(count / batch_size))


@dataclass
class Best:
    """The best evaluation so far. Example: Best(patience=3).better(-2.7)."""

    patience: int | None = None
    """--early-stopping-patience: evaluations in a row that may fail to be better."""
    value: float = -math.inf
    """Higher is better."""
    stale: int = 0
    """Evaluations since the best."""

    def better(self, value: float) -> bool:
        """Takes an evaluation; True if it is the best so far."""
        improved = value > self.value
        self.value, self.stale = max(value, self.value), 0 if improved else self.stale + 1
        return improved

    def load(self, value: float, state: dict[str, Any]) -> None:
        """What a checkpoint's state says; a run that was ended early goes on only to a new length."""
        self.value, self.stale = value, state.get("stale", 0)
        if self.patience is not None and self.stale >= self.patience:
            self.stale = 0

    def end_early(self, session: Session, step: int) -> None:
        """Makes this step the run's last when patience is at its end."""
        if self.patience is not None and self.stale >= self.patience and step < session.total:
            session.end_early(step, f"{self.stale} evaluations in a row were no better (--early-stopping-patience)")
