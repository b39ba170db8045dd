"""Fixed slots of device memory that chunks pass through: allocated once, cut once, addresses never change.

All models of a run share one arena. A slot keeps its last chunk until another chunk needs the slot, so an arena with
enough slots is a resident model, and one with two is a stream.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from penstock.errors import ResourceError
from penstock.memory import schedule
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
        """Which stream, chunk and use `parameters` were made for."""
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
