"""What the memory engine knows of a model: an ordered list of parts, and which groups of weights each part reads.

[Note: one code path for weights] `feed.visit(...)` brackets each part, the head and the score, and does nothing for a
plain model. So generating, saving and evaluating run under every strategy; training adds only that several
micro-batches share a visit.
"""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from penstock.memory.tiers import Offload, Ram, RamHome, copy_ahead


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
    """Whether any weight comes and goes."""
    fixed = True
    """Whether all weights have fixed addresses now."""
    leased = 0
    """Where weights move: the number of the lease under which all of them are here. 0: there is none."""

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


# --- what a pass holds between parts ----------------------------------------------------------------------------------


class Inputs:
    """What parts read, one tensor per micro-batch, from forward to backward; with `host`, in that tier meanwhile.

    [Note: inputs of blocks in host memory] Backward runs a block once more, and needs what it read. Where a device
    budget cannot hold that of all blocks, the plan has it leave for host memory while its block computes, and come back
    while the block behind it, which comes first in backward, computes. The last block's stays: it is needed at once.
    The device then holds what two blocks read, however many there are. The bits are the same.
    """

    def __init__(self, host: Ram | None, parts: int) -> None:
        """`parts`: how many keep what they read."""
        self._host, self._left = host, parts
        self._kept: list[_Kept] = []
        self._room: Tensor | None = None
        """[n] uint8 in host memory, for what comes."""

    def keep(self, tensors: list[Tensor]) -> None:
        """Before a part's forward, which reads these."""
        self._left -= 1
        self._kept.append(_Kept(tensors))
        if self._host is None or not self._left or not all(x.is_floating_point() for x in tensors):
            return  # the last part's, and tokens
        nbytes = sum(x.nbytes for x in tensors)
        if self._room is None and nbytes:  # all parts of a decoder read as much
            self._room = self._host.lend(nbytes * self._left, "inputs of blocks", self, zeroed=False)
        if self._room is not None and nbytes <= len(self._room):
            self._kept[-1].offload(self._room[:nbytes], self._host)
            self._room = self._room[nbytes:]

    def leave(self) -> None:
        """After its forward: what leaves is on the device no more."""
        if self._kept and self._kept[-1].homes:
            self._kept[-1].leave()

    def take(self) -> list[Tensor]:
        """Before a part's backward, the last part first: what it read, on the device. The part before it follows."""
        kept = self._kept.pop()
        kept.bring()
        if self._kept:
            self._kept[-1].bring()
        return kept.landed()


@dataclass
class _Kept:
    """What one part read."""

    tensors: list[Tensor]
    """Empty while they are away."""
    homes: list[RamHome] = field(default_factory=list)
    """[n] each, in host memory; empty where they stay."""
    leaving: list[tuple[Tensor, Offload]] = field(default_factory=list)
    """What is copied there, and the copies."""
    landing: list[Callable[[], None]] = field(default_factory=list)
    """Each waits for a tensor that comes back."""
    read: list[tuple[torch.Size, torch.device, bool]] = field(default_factory=list)
    """Of what leaves: its shape, where it was, and whether it has a gradient."""

    def offload(self, room: Tensor, host: Ram) -> None:
        """Begins to copy them to `room`, [n] uint8."""
        for x in self.tensors:
            home, room = RamHome(host, room[: x.nbytes].view(x.dtype)), room[x.nbytes :]
            self.homes.append(home)
            self.read.append((x.shape, x.device, x.requires_grad))
            flat = x.detach().reshape(-1)
            if x.device.type == "cpu":
                home.write(flat)
            else:
                self.leaving.append((flat, Offload(flat, home.tensor, host)))

    def leave(self) -> None:
        """Lets go of the device's memory, which is written again when the copies are done."""
        for _, leaving in self.leaving:
            leaving.wait()
        self.leaving.clear()
        self.tensors = []

    def bring(self) -> None:
        """Begins to copy them back, once."""
        if not self.homes or self.landing:
            return
        for home, (shape, device, _) in zip(self.homes, self.read, strict=True):
            x = torch.empty(shape, dtype=home.dtype, device=device)
            self.landing.append(copy_ahead(home.tensor, x.view(-1), home.tier))
            self.tensors.append(x)

    def landed(self) -> list[Tensor]:
        """They, when they are there."""
        for landed in self.landing:
            landed()
        if self.homes:
            for x, (_, _, has_gradient) in zip(self.tensors, self.read, strict=True):
                x.requires_grad_(has_gradient)
        return self.tensors


@dataclass
class Wave:
    """Micro-batches that go through the model together, and the tensors between its parts: one per micro-batch."""

    micro_batches: Sequence[Any]
    contexts: list[Any]
    states: list[Tensor]
    """What the next part reads."""
    inputs: Inputs
    """Of the parts from the first trained one on."""
    outputs: list[list[Tensor]] = field(default_factory=list)
    """The same: what it returned, with its graph; empty where backward runs the part again."""
    state_grads: list[Tensor | None] = field(default_factory=list)
    """Gradients of the states that backward has come to; None: the loss does not depend on them."""


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
