"""What decides: whether new votes may be learned, how, and whether what learned from them is served. No model here.

A model's agreement with a label is a number from 0 to 1, one half by chance. Of a comparison it is the share of its
pairs whose better answer has the higher score. Of a vote it is 1 where a liked answer scores above the median of all
judged answers, or a disliked one below: one half by chance whatever the share of liked ones. Labels of one conversation
are not independent, so intervals are of means of conversations.

[Note: what a candidate's score is] log p(y|x) of the candidate less that of the served model. To first order the
expected value of answers, under any taste, rises by its covariance with this score over answers of the served model
(the policy gradient; Rafailov et al. 2023 call it the implicit reward). So a candidate that moves with held-out votes
is better for those who voted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from penstock.commands.align.choice import ENOUGH
from penstock.commands.align.evaluation import in_order, pairs
from penstock.commands.improve.labels import Label
from penstock.run import intervals
from penstock.run.versions import REFUSED, TRUSTED, WAITING

CHANCE = 0.5
FEWEST = 20
"""Conversations from which a mean says something."""

Scores = Sequence[Sequence[float | None]]
"""Per label a score of each of its answers; None where the model could not read one."""


@dataclass(frozen=True)
class Agreement:
    """Of scores with labels. Example: Agreement(0.71, (0.66, 0.76), 240)."""

    mean: float
    interval: tuple[float, float]
    """95 %."""
    conversations: int

    @staticmethod
    def of(values: Any) -> "Agreement":
        """Of values [conversations] in 0 .. 1."""
        if not len(values):
            return Agreement(CHANCE, (0.0, 1.0), 0)
        low, high = intervals.of_share(values)
        return Agreement(float(values.mean()), (low, high), len(values))

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "interval": list(self.interval), "conversations": self.conversations}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.1%} ({low:.1%} to {high:.1%} of {self.conversations} conversations)"


def agreement(labels: Sequence[Label], scores: Scores) -> Agreement:
    """How far scores agree with labels; see the module."""
    judged = [row[0] for label, row in zip(labels, scores, strict=True) if label.kind == "votes" and row[0] is not None]
    middle = float(numpy.median(judged)) if judged else 0.0
    by_opening: dict[str, list[float]] = {}
    for label, row in zip(labels, scores, strict=True):
        if label.kind == "votes":
            sign = 1 if label.record.label else -1
            values = [(numpy.sign(score - middle) * sign + 1) / 2 for score in row if score is not None]
        else:
            values = [in_order(*pair) for pair in pairs(label.record.ranks, row)]
        if values:
            by_opening.setdefault(label.opening, []).append(float(numpy.mean(values)))
    return Agreement.of(numpy.array([numpy.mean(values) for values in by_opening.values()]))


# --- may new votes be learned? ----------------------------------------------------------------------------------------


def knows(known: Agreement) -> bool:
    """Whether what earlier votes taught orders earlier votes that it did not learn better than chance."""
    return known.interval[0] > CHANCE


def verdict(new: Agreement | None, known: Agreement | None) -> tuple[str, str]:
    """The state of new votes, and why. `new`: of what earlier votes taught with these; `known`: with earlier votes that
    it did not learn. None: there is nothing yet that could judge.

    Votes that are flipped agree as often as honest ones disagree, so they are below one half.
    """
    if new is None or known is None:
        return TRUSTED, "nothing was learned before that could judge them"
    if not knows(known):
        return TRUSTED, f"what earlier votes taught orders votes it has not seen no better than chance, {known}"
    if new.interval[1] < CHANCE:
        return REFUSED, f"they contradict earlier votes: what those taught agrees with {new}"
    if new.interval[0] <= CHANCE:
        return WAITING, f"they neither agree with earlier votes nor contradict them: {new}"
    return TRUSTED, f"they agree with what earlier votes taught: {new}"


# --- how are they learned? --------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """How labels are learned. Example: Way(("dpo",), "300 comparisons teach the model directly")."""

    stages: tuple[str, ...]
    why: str


def ways(unlearned: Mapping[str, int], trusted: Mapping[str, int], known_worse: bool = False) -> list[Way]:
    """The ways that fit what there is, the best first; those behind it are for machines on which it does not fit.

    unlearned: labels that the served model has not learned, by kind; trusted: all; known_worse: see below. A comparison
    says as much as two votes, and is about answers to one prompt.
    """
    compared, voted, judged = unlearned["comparisons"], unlearned["votes"], trusted["comparisons"]
    possible = []
    if judged >= ENOUGH and not known_worse:
        why = f"{judged:,} comparisons make a reward model"
        possible += [Way(("reward", "ppo"), why), Way(("reward", "grpo"), f"{why}; PPO's critic does not fit")]
    if compared and 2 * compared >= voted:
        possible.append(Way(("dpo",), f"{compared:,} comparisons teach the model directly"))
    else:
        both = f", and {compared:,} comparisons as votes" * bool(compared)
        possible.append(Way(("kto",), f"{voted:,} votes on single answers{both}"))
    return possible


def known_worse(examined: Mapping[str, Any]) -> bool:
    """Whether what earlier votes taught orders the newest, on answers of the version that is served, less often right
    than earlier ones that it had not seen either, surely. There a reward model does not know what it judges, and what
    maximises it gets worse: of the demo's seven steps of PPO the five of which this is not so raised the hidden gold by
    0.88 to 1.20, the two of which it is lowered it. Nor does one of held-out votes know it: it gave a step of PPO that
    lost 0.71 of gold 64 % of the answers, and one of DPO that gained 0.16 45 %."""
    return bool(examined) and examined["new"]["interval"][1] < examined["known"]["interval"][0]


# --- is what was made served? -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One condition of a promotion, as it was met or not."""

    name: str
    passed: bool
    shown: str

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "shown": self.shown}


def moves_with_votes(everyone: Agreement, earlier: Agreement | None) -> list[Check]:
    """It must move with held-out votes of all rounds, above chance; and, where there are enough, not against those of
    earlier rounds, whatever the newest say."""
    checks = [Check("moves with held-out votes of all rounds", everyone.interval[0] > CHANCE, str(everyone))]
    if earlier is not None and earlier.conversations >= FEWEST:
        checks.append(Check("not against those of earlier rounds", earlier.mean >= CHANCE, str(earlier)))
    return checks


def fresh_answers_win(wins: Agreement, knows: Agreement, way: Sequence[str]) -> list[Check]:
    """Votes are on answers that served versions gave: they cannot see where a candidate goes that nobody has judged. So
    its fresh answers must not lose, below chance, by a judge that no training has seen; and must win, above chance,
    where it was made by a reward model: what maximises that goes where it errs (Gao et al. 2023). A judge that orders
    learned votes no better than chance is not asked."""
    if knows.interval[0] <= CHANCE:
        return []
    shown = f"{wins}; the judge orders learned votes right by {knows}"
    if "reward" in way:
        return [Check("its fresh answers win by a judge of held-out votes", wins.interval[0] > CHANCE, shown)]
    return [Check("its fresh answers do not lose by a judge of held-out votes", wins.interval[1] >= CHANCE, shown)]


def against(agreements: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a candidate moves against held-out votes of earlier rounds, below chance: then what it learned does."""
    earlier = agreements.get("earlier")
    return earlier is not None and earlier["conversations"] >= FEWEST and earlier["interval"][1] < CHANCE


def no_worse(name: str, change: float, bounds: tuple[float, float], margin: float) -> Check:
    """A regression set, or the share of answers that end: the lower bound of the change is above -margin."""
    low, high = bounds
    return Check(name, low > -margin, f"{change:+.3f} ({low:+.3f} to {high:+.3f}); allowed: -{margin:g}")


def promoted(checks: Sequence[Check]) -> tuple[bool, str]:
    """Whether all conditions are met, and the first that is not."""
    failed = next((check for check in checks if not check.passed), None)
    if failed is None:
        return True, "; ".join(f"{check.name}: {check.shown}" for check in checks)
    return False, f"not met: {failed.name}: {failed.shown}"
