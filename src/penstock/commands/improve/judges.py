"""Two judges: what the votes so far have taught judges new votes before anything learns from them, and what held-out
votes teach, which no training sees, judges fresh answers.

With comparisons each is a reward model of all trusted ones on its side, made anew when they change. Where a reward
model of a few hundred knows no more than chance, as at the last token of a long answer that was cut, or votes on single
answers make none, new votes are judged by the newest version that learned from trusted votes: the score is how its
log-probabilities differ from those of the model to start from, which is over all tokens of an answer. (SmolLM2, 150 to
600 comparisons: reward models ordered 46 to 56 % of new ones right, such versions 54 to 60 %.)
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from penstock.commands.align.command import STATE
from penstock.commands.improve import scores
from penstock.commands.improve.config import ImproveConfig
from penstock.commands.improve.labels import Label, digest_of, folder_of, write
from penstock.commands.improve.rule import Agreement, Scores, Way, agreement
from penstock.commands.improve.scores import Reading
from penstock.commands.improve.training import Say, learned
from penstock.run.versions import TRUSTED, Versions

FEWEST = 40
"""Comparisons that a reward model is made of at least; fewer say too little."""
READ = 1000
"""Comparisons that a judge reads at least, the same ones again: 153 of the demo's order 62 % of others right after two
passes, 68 % after six or twelve."""
JUDGED = {"learned": "new votes", "heldout": "fresh answers"}


class Judge(NamedTuple):
    """A model that scores answers as earlier votes would."""

    model: str
    reward: bool
    """Whether it is a reward model; else its log-probabilities are compared with those of the start."""
    start: str
    apply_chat_template: bool
    """How it reads plain prompts."""

    def scores(self, labels: Sequence[Label], reading: Reading) -> Scores:
        data = dataclasses.replace(reading.data, apply_chat_template=self.apply_chat_template)
        reading = reading._replace(data=data)
        if self.reward:
            return scores.of_reward_model(self.model, labels, reading)
        return scores.log_ratios(self.model, self.start, labels, reading)

    def agreement(self, labels: Sequence[Label], reading: Reading) -> Agreement:
        return agreement(labels, self.scores(labels, reading))


def judges_of(config: ImproveConfig, versions: Versions, trusted: Sequence[Label], say: Say) -> Iterator[Judge]:
    """What trusted labels of earlier rounds teach, made as they are asked for: a reward model of the comparisons, and
    the newest version that learned from such labels alone. None of them where there is too little."""
    judge = reward_model(config, versions, "learned", [label for label in trusted if not label.heldout], say)
    if judge is not None:
        yield judge
    for number, row in sorted(versions.numbered.items(), reverse=True):
        sources = versions.learned(number)
        if row.get("model") and sources and all(versions.states[source] == TRUSTED for source in sources):
            state = json.loads((folder_of(versions, number) / STATE).read_text(encoding="utf-8"))
            yield Judge(versions.model(number), False, versions.model(0), state["apply_chat_template"])
            return


def reward_model(
    config: ImproveConfig, versions: Versions, side: str, labels: Sequence[Label], say: Say
) -> Judge | None:
    """One of the comparisons among labels of a side ("learned" or "heldout"), made anew when they change; None where
    they are too few."""
    start, known = versions.model(0), [label for label in labels if label.kind == "comparisons"]
    if len(known) < FEWEST:
        return None
    out = versions.path / "judges" / side / digest_of(known)
    file = out / "comparisons.jsonl"
    if not file.exists():
        write(file, [label.record for label in known])
    for other in (folder for folder in out.parent.iterdir() if folder != out):
        shutil.rmtree(other)  # of fewer comparisons
    say(f"a reward model of {len(known):,} {side} comparisons judges {JUDGED[side]}")
    settings = (f"reward.epochs={max(2, math.ceil(READ / len(known)))}", *config.set)  # the last of a flag is taken
    config = dataclasses.replace(config, lr=None, batch_size=None, epochs=None, steps=None, set=settings)
    state = learned(config, start, [Way(("reward",), "it judges")], lambda stages: file, out, say)
    return Judge(str(out / "reward"), True, start, state["apply_chat_template"])
