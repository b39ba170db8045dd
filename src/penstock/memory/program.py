"""What the memory engine knows of a model: an ordered list of parts, and which groups of weights each part reads.

[Note: one code path for weights] `feed.visit(...)` brackets each part, the head and the score, and does nothing for a
plain model. So generating, saving and evaluating run under every strategy; training adds only that several
micro-batches share a visit.
"""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """One step of a program. Example: Part(("blocks.0",), run) with run(x, context) -> x."""

    groups: tuple[str, ...]
    """Groups of weights that must be on the device while it runs."""
    run: Callable[[Tensor, Any], Tensor]
    choices: tuple[str, ...] = ()
    """Of `groups`, those of which tokens choose: where a pass chooses (`Feed.start`), `run` visits the chosen ones."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Groups that every token needs."""
        return self.groups[: len(self.groups) - len(self.choices)]


class Feed(Protocol):
    """Brings weights to the device."""

    def start(self, tokens: int) -> bool:
        """Called before a pass without gradients over so many tokens: whether its parts visit what was chosen."""

    def visit(self, *groups: str) -> AbstractContextManager[None]:
        """Inside, the weights of these groups are on the device."""


class AlwaysThere:
    """The feed of a model whose weights never leave the device."""

    device: torch.device | None = None
    """None: the device of its parameters."""
    dtype: torch.dtype | None = None
    """None: its parameters' own."""
    collective = False
    """Whether a visit is a collective."""
    moves = False
    """Whether any weight comes and goes: if none does, all have fixed addresses."""

    def start(self, tokens: int) -> bool:
        """All groups are there."""
        return False

    def visit(self, *groups: str) -> AbstractContextManager[None]:
        """Does nothing."""
        return contextlib.nullcontext()

    def any_rank_busy(self, busy: bool) -> bool:
        """Whether any rank still uses this model: each rank decides alone."""
        return busy

    def max_over_ranks(self, count: int) -> int:
        """The largest count of the ranks that must visit together: this rank alone."""
        return count

    def __deepcopy__(self, memo: dict) -> "AlwaysThere":
        return self


ALWAYS_THERE = AlwaysThere()


class Program(Protocol):
    """A model that the engine can train and evaluate. Every weight belongs to exactly one group."""

    feed: Any
    """A `Feed`: ALWAYS_THERE, or the engine's Stream."""

    def groups(self) -> list[tuple[str, list[str]]]:
        """(group, names of its parameters), in operational order."""

    def parts(self) -> Sequence[Part]:
        """The program, first part to last: the first takes a micro-batch's tokens, the last gives what is read."""

    def reads(self) -> tuple[str, ...]:
        """Groups that the head needs, besides the last part's own, to make losses or numbers of the last states."""

    padding_free: bool
    """Whether it may compute rows without their padding."""

    def begin(self, tokens: Tensor, batch: Any = None, *, learns: bool = False) -> Any:
        """The context of a micro-batch, for every part: it depends on positions alone, not on weights. `batch`: the
        micro-batch; `learns`: a backward follows."""

    def learn(self, micro_batches: Sequence[Any], world: Any) -> None:
        """Called before the first forward of an update, with all of this rank's micro-batches."""

    def turn(self, world: Any) -> None:
        """Called on all ranks together where all micro-batches of an update have gone forward and none backward."""

    def measured(self) -> dict[str, float]:
        """What to log of the update that was made, by metric."""

    def slice(self, budget: int) -> None:
        """From now on, whole rows hold at most so many bytes inside a block; see autochunk.api."""

    def recipe(self, name: str) -> Hashable:
        """Identifies this parameter's initial value: equal recipes and names mean equal bytes. None: not comparable."""

    def filling(self) -> AbstractContextManager[None]:
        """Around several calls of `fill`, so that files need not be opened for each."""

    def fill(self, weights: dict[str, Tensor]) -> None:
        """Writes the initial values of these parameters, by name, from the checkpoint or the random recipe."""


def owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Parameter name -> the module and attribute that hold it."""
    return {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }


def visits_of(program: Program) -> list[tuple[str, ...]]:
    """Groups that are needed at once, in order: the parts', the last of them with what reads its states."""
    parts = program.parts()
    return [*(part.groups for part in parts[:-1]), (*parts[-1].groups, *program.reads())]


def first_trained(parts: Sequence[Part], groups: AbstractSet[str]) -> int:
    """The first part that reads one of these groups, which are trained; nothing before it needs a gradient."""
    return next((i for i, part in enumerate(parts) if not groups.isdisjoint(part.groups)), len(parts) - 1)
