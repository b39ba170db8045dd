"""Fixed slots of device memory that chunks pass through: allocated once, cut once, addresses never change.

All models of a run share one arena. A slot keeps its last chunk until another chunk needs the slot, so an arena with
enough slots is a resident model, and one with two is a stream.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penstock.errors import ResourceError
from penstock.memory import schedule
from penstock.memory.chunks import Chunk, Weight
from penstock.memory.homes import ChunkHome, views, weight_on
from penstock.memory.program import owners
from penstock.memory.tiers import Offload, Ram
from penstock.units import show_bytes


class Slot(schedule.Slot):
    """One run of device memory; `key` is the ChunkHome that it is filled from."""

    def __init__(self, memory: Tensor) -> None:
        """memory: [nbytes] uint8, on a page."""
        super().__init__(len(memory))
        self.memory = memory
        self.landing: Callable[[], None] | None = None
        """Waits for the copy that fills the slot; None once it has landed."""
        self.leaving: Offload | None = None
        """The copy that takes gradients home; whoever writes next waits for it."""
        self.bound_for: object = None
        """Which stream and chunk `parameters` were made for."""
        self.parameters: list[nn.Parameter] = []
        """The chunk's weights on this memory: cut once while it stays."""

    def wait(self) -> None:
        """Returns when the chunk's bytes have landed."""
        if self.landing is not None:
            self.landing()  # an error stays, for whoever comes next
            self.landing = None


class Arena(schedule.SlotTable[Slot]):
    """Slots of a few sizes on one tier. `sizes` are bytes, one entry per slot."""

    def __init__(
        self, tier: Ram, sizes: Iterable[int], purpose: str = "slots",
        together: Callable[[Any], Hashable] = lambda home: home,
    ) -> None:  # fmt: skip
        homes = [tier.home(nbytes, torch.uint8, purpose) for nbytes in sorted(sizes)]
        super().__init__((Slot(home.tensor) for home in homes), together)
        self._tier = tier

    def close(self) -> None:
        """Gives the memory back; no slot may be in use."""
        self.forget(lambda home: True)
        self._tier.give(sum(slot.nbytes for slot in self.slots))
        schedule.SlotTable.__init__(self, ())

    def too_small(self, nbytes: int) -> ResourceError:
        """The error for a chunk that has no slot to go to."""
        sizes = ", ".join(show_bytes(slot.nbytes) for slot in self.slots)
        return ResourceError(
            f"--device-memory: a chunk of {show_bytes(nbytes)} must be in device memory and all slots ({sizes}) are "
            "smaller or in use; give more device memory or a smaller --chunk-size."
        )


@dataclass
class Hold:
    """A chunk in use: what `lease` took and `_release` gives back."""

    home: ChunkHome
    slot: Slot | None
    gradient_slot: Slot | None
    gradients: bool
    opened: bool = False
    """Autograd may add to the gradient slot."""


class Parameters:
    """A model's own parameters: see [Note: parameters are rebound] in stream.py."""

    def __init__(self, model: nn.Module, homes: Sequence[ChunkHome]) -> None:
        places = {name: (module._parameters, own) for name, (module, own) in owners(model).items()}
        self._bound: dict[str, tuple[dict[str, Any], str]] = places
        """Where modules keep their parameters: a visit binds each twice, and nn.Module.__setattr__ is slow."""
        self._empty = {
            weight.name: nn.Parameter(torch.empty_like(self.now(weight), device="meta"), home.chunk.trained)
            for home in homes
            for weight in home.chunk.weights
        }
        """Parameters without memory, bound while weights are elsewhere: shapes and dtypes."""
        self._graph: dict[ChunkHome, list[nn.Parameter]] = {}
        """The parameters of moving chunks in a graph that is kept. See [Note: a kept graph]."""

    def bind(self, chunk: Chunk, weights: Tensor) -> list[nn.Parameter]:
        """The model's own parameters become views of `weights`. Trained ones ask for gradients in every visit, as they
        do where they stay: torch's matmul takes another product for others, which rounds otherwise on some CPUs."""
        bound = [weight_on(view, chunk.trained) for view in views(chunk, weights)]
        self._put(chunk, bound)
        return bound

    def bind_slot(self, home: ChunkHome, slot: Slot) -> None:
        """The same for a chunk in a slot. While it stays there it is cut once: decoding visits it for every token."""
        if slot.bound_for != (self, home):
            weights = slot.memory[: home.chunk.nbytes].view(home.dtype)
            slot.bound_for, slot.parameters = (self, home), self.bind(home.chunk, weights)
        else:
            self._put(home.chunk, slot.parameters)

    def bind_graph(self, home: ChunkHome, slot: Slot) -> None:
        """The same parameters whenever the chunk comes, on its current memory. See [Note: a kept graph]."""
        weights = slot.memory[: home.chunk.nbytes].view(home.dtype)
        cut = [view.data for view in views(home.chunk, weights)]  # .data has no version: slots are rewritten
        if home not in self._graph:
            self._graph[home] = [weight_on(view, home.chunk.trained) for view in cut]
        for parameter, view in zip(self._graph[home], cut, strict=True):
            parameter.data = view
        self._put(home.chunk, self._graph[home])

    def bind_gradients(self, chunk: Chunk, grads: Tensor) -> None:
        """The bound parameters' gradients become views of `grads`: autograd adds in place, so the views survive."""
        for weight, view in zip(chunk.weights, views(chunk, grads), strict=True):
            self.now(weight).grad = view

    def unbind(self, chunk: Chunk) -> None:
        self._put(chunk, [self._empty[weight.name] for weight in chunk.weights])

    def _put(self, chunk: Chunk, parameters: Sequence[nn.Parameter]) -> None:
        """The model's modules get these in the place of the chunk's weights."""
        for weight, parameter in zip(chunk.weights, parameters, strict=True):
            where, name = self._bound[weight.name]
            where[name] = parameter

    def now(self, weight: Weight) -> nn.Parameter:
        """What the module has in its place."""
        where, name = self._bound[weight.name]
        return where[name]
