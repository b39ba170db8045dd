"""What the memory engine knows of a model: an ordered list of parts, and which groups of weights each part reads."""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """One step of a program. Example: Part(("blocks.0",), run) with run(x, context) -> x."""

    groups: tuple[str, ...]
    """Groups of weights that must be there while it runs."""
    run: Callable[[Tensor, Any], Tensor]


class Feed(Protocol):
    """Who brings weights to the device."""

    def visit(self, *groups: str) -> AbstractContextManager[None]:
        """Inside, the weights of these groups are there."""


class AlwaysThere:
    """The feed of a model whose weights never leave the device."""

    device: torch.device | None = None
    """Where they are then: wherever its parameters are."""
    collective = False
    """Whether a visit brings ranks together."""
    moves = False
    """Whether any weight comes and goes: if none does, all have fixed addresses."""

    def visit(self, *groups: str) -> AbstractContextManager[None]:
        """Nothing to do."""
        return contextlib.nullcontext()

    def any_rank_busy(self, busy: bool) -> bool:
        """Whether any rank still needs this model's weights: here, whether this one does."""
        return busy

    def max_over_ranks(self, count: int) -> int:
        """The largest of all ranks' counts: here, its own."""
        return count

    def __deepcopy__(self, memo: dict) -> "AlwaysThere":
        return self


ALWAYS_THERE = AlwaysThere()


class Program(Protocol):
    """A model that the engine can train and evaluate. Every weight belongs to exactly one group."""

    feed: Any
    """Who brings the weights: ALWAYS_THERE, or the engine's Stream."""

    def groups(self) -> list[tuple[str, list[str]]]:
        """(group, names of its parameters), in operational order."""

    def parts(self) -> Sequence[Part]:
        """The program, first part to last: the first takes a micro-batch's tokens, the last gives what is read."""

    def reads(self) -> tuple[str, ...]:
        """Groups that turning the last states into losses or numbers needs, beside the last part's own."""

    def begin(self, tokens: Tensor) -> Any:
        """The context of a micro-batch, for every part: what depends on positions alone, and no weights."""

    def slice(self, budget: int) -> None:
        """From now on, whole rows hold at most so many bytes inside a block; see autochunk.api."""

    def recipe(self, name: str) -> Hashable:
        """Where this parameter's initial value comes from: equal recipes and names, equal bytes. None: ask nobody."""

    def fill(self, weights: dict[str, Tensor]) -> None:
        """Writes the initial values of these parameters, by name, from the checkpoint or the random recipe."""


def owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Parameter name -> the module and attribute that hold it."""
    return {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
