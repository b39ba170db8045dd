"""What a round made, measured on what nothing learned from: held-out votes, regression sets, and whether it ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from penstock.commands.align.evaluation import answer_logprobs, in_order, values
from penstock.commands.align.inventory import prompts_of
from penstock.commands.config import EvalConfig
from penstock.commands.evaluate import Side, answers_of
from penstock.commands.improve import scores
from penstock.commands.improve.config import ImproveConfig
from penstock.commands.improve.judges import Judge
from penstock.commands.improve.labels import Label, write
from penstock.commands.improve.rule import (
    FEWEST,
    Agreement,
    Check,
    agreement,
    fresh_answers_win,
    moves_with_votes,
    no_worse,
)
from penstock.commands.improve.scores import Reading
from penstock.data import formats
from penstock.errors import UserError
from penstock.run import intervals

PROMPTS = 256
"""Held-out prompts that both models answer: a share of so many is known to within 6 %."""
ENDED_MARGIN = 0.1
"""How much rarer answers may end by themselves."""


class Models(NamedTuple):
    """What is compared: the candidate, the version that is served, the model to start from."""

    candidate: str
    served: str
    start: str


def held_out_votes(models: Models, heldout: Sequence[Label], newest: int, reading: Reading) -> tuple[list[Check], Any]:
    """Whether the candidate moves with held-out votes; and the figures."""
    moved = scores.log_ratios(models.candidate, models.served, heldout, reading)
    everyone = agreement(heldout, moved)
    parts = [
        agreement(*zip(*pairs, strict=True)) if pairs else None
        for pairs in (
            [pair for pair in zip(heldout, moved, strict=True) if (pair[0].version == newest) is new]
            for new in (False, True)
        )
    ]
    named = zip(("all", "earlier", "new"), (everyone, *parts), strict=True)
    return moves_with_votes(everyone, parts[0]), {name: part.as_dict() for name, part in named if part is not None}


def regressions(config: ImproveConfig, models: Models, reading: Reading) -> list[Check]:
    """No regression set may get worse, against the served version and against the start: many small steps down are one
    large."""
    checks = []
    for file in config.regression:
        kind = formats.kind_of(file)
        if kind not in ("comparisons", "demonstrations"):
            raise UserError(f"--regression {file}: has {kind}; give comparisons or demonstrations.")
        records = formats.read(file, kind).records
        of_model = {
            model: values(kind, *answer_logprobs(kind, records, model, *reading), in_order)
            for model in dict.fromkeys(models)
        }
        if not len(of_model[models.start]):
            raise UserError(f"--regression {file}: the model can read none of it; give a larger --max-length.")
        for name, other in (("served version", models.served), ("start", models.start)):
            change = of_model[models.candidate] - of_model[other]
            bounds = intervals.of_mean(change)
            label = f"{Path(file).name} against the {name}"
            checks.append(no_worse(label, float(change.mean()), (bounds[0], bounds[1]), config.margin))
    return checks


def answers(
    config: ImproveConfig, models: Models, heldout: Sequence[Label], judge: Judge | None, knows: Agreement | None,
    folder: Path, state: Mapping[str, Any],
) -> tuple[list[Check], dict[str, Any]]:  # fmt: skip
    """Both models answer held-out prompts: whether the candidate's still end by themselves, their length, and, by a
    reward model of held-out votes that agrees so far with learned ones, their scores and whose are better. state: how
    the candidate was made, as align.json keeps it."""
    prompts = prompts_of([label.record for label in heldout])[:PROMPTS]
    file = write(folder / "data" / "heldout-prompts.jsonl", prompts)
    score = {"reward": judge.model} if judge else {}
    names = ("system", "template_args", "eos", "device", "seed")
    shared = {name: value for name in names if (value := getattr(config, name)) not in (None, ())}
    shared |= {name: state[name] for name in ("max_new_tokens", "apply_chat_template")}

    def of(model: str) -> Side:
        options = {"data": str(file), "temperature": 1.0, "skip_bad": True, **shared, **score}
        return answers_of(EvalConfig.of(model=model, **options), model)

    sides = [[line for _, line in of(model)] for model in (models.served, models.candidate)]
    ended = [numpy.array([line["finish_reason"] == "stop" for line in side], dtype=float) for side in sides]
    change = ended[1] - ended[0]
    low, high = intervals.of_mean(change)
    figures: dict[str, Any] = {"prompts": len(prompts), "ended": [float(part.mean()) for part in ended]}
    figures["tokens"] = [float(numpy.mean([len(line["response_ids"]) for line in side])) for side in sides]
    checks = [no_worse("answers end by themselves", float(change.mean()), (low, high), ENDED_MARGIN)]
    if judge and knows:
        scored = [numpy.array([line["score"] for line in side]) for side in sides]
        figures["score"] = [float(side.mean()) for side in scored]
        wins = Agreement.of((numpy.sign(scored[1] - scored[0]) + 1) / 2)
        figures |= {"wins": wins.as_dict(), "judge": knows.as_dict()}
        checks += fresh_answers_win(wins, knows, state["way"])
    return checks if len(prompts) >= FEWEST else [], figures
