"""Which stages align a model, and how long: the rules of `penstock align`, as tables and pure functions. No torch here.

What fits a machine is not known here: `routes` gives every way that the data allow, the best first, and the planner
takes the first that fits.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.data.records import Kind
from penstock.errors import UserError

KIND: dict[str, Kind] = {
    "sft": "demonstrations", "reward": "comparisons", "dpo": "comparisons", "kto": "votes", "ppo": "prompts",
    "grpo": "prompts",
}  # fmt: skip
"""What each stage learns from."""
SAMPLES = ("ppo", "grpo")
"""Stages that learn from the model's own answers, which something must score."""
ENOUGH = 1000
"""Comparisons from which a reward model is made: fewer order held-out answers hardly better than chance, and what is
learned against such a score is its faults."""
FEWEST_STEPS = 10
"""A stage of fewer steps does not learn: a budget leaves at least so many, or all where there are fewer."""
HALF = 0.5
"""Of a stage's steps, so many must be left before a cheaper algorithm is better."""


@dataclass(frozen=True)
class Facts:
    """What the choice depends on. Example: Facts({"comparisons": 180}, None, chats=True)."""

    counts: Mapping[Kind, int]
    """Records to train on, by kind; as prompts count those of every other kind too where no file has prompts alone."""
    score: Literal["model", "function", "answers"] | None
    """What scores an answer: --reward, --reward-fn, or a verifier that reads the records' own answers."""
    chats: bool
    """Whether the model has a chat template: it has learned to answer."""

    def has(self, kind: Kind) -> bool:
        return self.counts.get(kind, 0) > 0


@dataclass(frozen=True)
class Rule:
    """A way to improve a model beyond its demonstrations."""

    stages: tuple[str, ...]
    applies: Callable[[Facts], bool]
    why: str
    lacks: Callable[[Facts], str] = lambda facts: ""
    """What the data would need for it, where that is near; empty where it says nothing."""


def _judged(facts: Facts) -> bool:
    return facts.score is not None and facts.has("prompts")


def _comparisons_lack(facts: Facts) -> str:
    count = facts.counts.get("comparisons", 0)
    return f"with {ENOUGH:,} comparisons instead of {count:,}" if 0 < count < ENOUGH else ""


RULES = (
    Rule(
        ("grpo",), _judged,
        "answers can be scored, so the model learns from its own, several to a prompt, and needs no critic",
        lambda facts: "with a score (--reward-fn, or answers that can be checked)" if facts.has("prompts") else "",
    ),
    Rule(
        ("reward", "ppo"), lambda facts: facts.counts.get("comparisons", 0) >= ENOUGH,
        f"{ENOUGH:,} comparisons or more make a reward model, and PPO goes beyond the answers in the data",
        _comparisons_lack,
    ),
    Rule(
        ("reward", "grpo"), lambda facts: facts.counts.get("comparisons", 0) >= ENOUGH,
        "a reward model without PPO's critic: one model less in memory",
    ),
    Rule(
        ("dpo",), lambda facts: facts.has("comparisons"),
        "comparisons teach the model directly: one short run, and a reference beside it",
    ),
    Rule(("kto",), lambda facts: facts.has("votes"), "votes on single answers are what KTO learns from"),
    Rule((), lambda facts: facts.has("demonstrations"), "there is nothing but demonstrations to learn from"),
)  # fmt: skip
"""The best first: what learns from its own fresh answers goes furthest (docs/align.md)."""


@dataclass(frozen=True)
class Route:
    """Stages to run, and why these."""

    stages: tuple[str, ...]
    why: tuple[str, ...]
    """A line per decision."""
    better: tuple[str, ...] = ()
    """Routes before this one that the data do not allow: what they would need."""


def routes(facts: Facts) -> list[Route]:
    """Every way that the data allow, the best first. Raises UserError where there is none."""
    first: tuple[str, ...] = ("sft",)
    why = "demonstrations are learned first (sft): they show how to answer"
    if not facts.has("demonstrations"):
        first = ()
        why = (
            "no sft: there are no demonstrations, and the model has a chat template, so it answers already"
            if facts.chats
            else "no sft: there are no demonstrations; a model without a chat template would be better for some"
        )
    possible: list[Route] = []
    better: list[str] = []
    for rule in RULES:
        if rule.applies(facts):
            possible.append(Route((*first, *rule.stages), (why, rule.why), tuple(better)))
        elif need := rule.lacks(facts):
            better.append(f"{' + '.join(rule.stages)} {need}")
    if not possible:
        raise UserError(
            "--data: has prompts alone, and nothing that says which answer is good; give --reward MODEL, --reward-fn "
            "file.py:name or number (for records with an answer), comparisons, votes or demonstrations."
        )
    return possible


def chosen(stages: Sequence[str], facts: Facts) -> Route:
    """The route that --stages names. Raises UserError where the data do not allow it."""
    for i, stage in enumerate(stages):
        kind, spelled = KIND[stage], f"--stages {' '.join(stages)}"
        if stage in stages[:i]:
            raise UserError(f"{spelled}: {stage} twice; give each stage once.")
        if not facts.has(kind):
            raise UserError(f"{spelled}: {stage} learns from {kind}, and --data has none; add some, or leave it out.")
        if stage in SAMPLES and facts.score is None and "reward" not in stages[:i]:
            raise UserError(
                f"{spelled}: {stage} needs a score; put reward before it, or give --reward MODEL or --reward-fn."
            )
    if tuple(stages) == ("reward",):
        raise UserError("--stages reward: makes a score and aligns nothing; penstock reward does that, or add ppo.")
    return Route(tuple(stages), ("--stages says so",))


def unused(route: Route, facts: Facts) -> list[str]:
    """Lines on the data that these stages do not learn from."""
    used = {KIND[stage] for stage in route.stages}
    own = {kind: count for kind, count in facts.counts.items() if kind not in used and kind != "prompts" and count}
    users = {kind: " or ".join(stage for stage, of in KIND.items() if of == kind) for kind in own}
    return [f"{count:,} {kind} are not learned from; --stages can name {users[kind]}" for kind, count in own.items()]


def batch_of(command: str, count: int) -> int:
    """Rows per step: 32, or 16 of a reward model's one pass, or less where a pass over the data would be fewer than
    FEWEST_STEPS."""
    if command in SAMPLES:
        return 64
    if count < FEWEST_STEPS:
        return min(4, count)
    most = 16 if command == "reward" else 32
    return min(most, max(4, 1 << (count // FEWEST_STEPS).bit_length() - 1))


def epochs_of(command: str, count: int) -> int:
    """Passes over the data: one over much data and of a reward model, which learns its labels by heart (Ouyang et al.
    2022), three over few."""
    return 1 if command == "reward" or count >= 10_000 else 3


def steps_of(command: str, count: int, batch_size: int, epochs: int, group: int = 8) -> int:
    """Steps of a stage on so many records: two passes over prompts, 20 to 500 steps; else passes over the data."""
    if command in SAMPLES:
        prompts = max(batch_size // (group if command == "grpo" else 1), 1)
        return min(max(math.ceil(2 * count / prompts), 20), 500)
    return math.ceil(epochs * count / batch_size)


def micro_batch_of(batch_size: int, length: int) -> int:
    """Rows of at most so many tokens that make about 4,096 together: a power of two, at most the batch."""
    rows = max(4096 // max(length, 1), 1)
    return min(1 << rows.bit_length() - 1, batch_size)


SMALL_LR = {"sft": 1.5e-3, "reward": 3e-4, "ppo": 3e-4, "grpo": 3e-4, "dpo": 5e-5, "kto": 3e-5}
"""Learning rates at which a model of a million parameters learns: the demo's, measured on its hidden gold score."""


def lr_of(command: str, default: float, parameters: int) -> float:
    """A command's default is for models of 1B parameters and more, SMALL_LR for those of 1M and less; between them it
    is a straight line in logarithms."""
    share = min(max(math.log(1e9 / parameters, 1000), 0.0), 1.0)
    return float(f"{default ** (1 - share) * SMALL_LR[command] ** share:.2g}")


def answer_tokens(lengths: Collection[int], room: int) -> int:
    """Tokens per sampled answer: half as many again as 95 % of the given answers have, 16 to 256; 128 where no answer
    is given. `room`: the most that the model holds behind its prompts."""
    if not lengths:
        return max(min(128, room), 1)
    high = sorted(lengths)[int(len(lengths) * 0.95) if len(lengths) > 1 else 0]
    return max(min(max(16, math.ceil(high * 1.5 / 16) * 16), 256, room), 1)


# --- time -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Duration:
    """Seconds of one stage. Example: Duration(steps=60, per_step=2.0, fixed=15.0)."""

    steps: int
    per_step: float
    fixed: float
    """Loading, evaluations, the first and last answers, checkpoints."""

    @property
    def fewest(self) -> int:
        return min(self.steps, FEWEST_STEPS)

    def seconds(self, steps: int | None = None) -> float:
        return self.fixed + self.per_step * (self.steps if steps is None else steps)


def trimmed(stages: Sequence[Duration], seconds: float) -> list[int] | None:
    """Steps of each stage, so that all take at most so many seconds: the same share of each, but at least `fewest`.
    None where even these take longer."""
    if sum(stage.seconds() for stage in stages) <= seconds:
        return [stage.steps for stage in stages]
    if least(stages) > seconds:
        return None

    def at(share: float) -> list[int]:
        return [max(int(stage.steps * share), stage.fewest) for stage in stages]

    low, high = 0.0, 1.0
    for _ in range(30):  # bisection: seconds rise with the share
        middle = (low + high) / 2
        fits = sum(s.seconds(n) for s, n in zip(stages, at(middle), strict=True)) <= seconds
        low, high = (middle, high) if fits else (low, middle)
    return at(low)


def least(stages: Sequence[Duration]) -> float:
    """Seconds of the fewest steps of each stage."""
    return sum(stage.seconds(stage.fewest) for stage in stages)


def kept_share(stages: Sequence[Duration], steps: Sequence[int]) -> float:
    """The smallest share of its steps that any stage keeps."""
    return min((n / stage.steps for stage, n in zip(stages, steps, strict=True)), default=1.0)
