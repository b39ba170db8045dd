"""Fixed slots of device memory through which chunks pass: allocated once, cut once, addresses never change.

All models of a run share one arena. A slot keeps the chunk it last held until somebody needs its place, so an arena
with enough slots is a resident model, and one with two is a stream.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from penstock.errors import ResourceError
from penstock.memory.plan import choose
from penstock.memory.tiers import Ram
from penstock.memory.transfer import Offload
from penstock.units import show_bytes

Key = Any
"""What a slot holds: a memory.homes.Stored."""


@dataclass
class Slot:
    """One run of device memory. Free: key None. Cached: a key, nobody uses it. Leased: users > 0."""

    memory: Tensor
    """[nbytes] uint8, on a page."""
    key: Key | None = None
    users: int = 0
    landing: Callable[[], None] | None = None
    """Waits for the copy that fills the slot; None once it has landed."""
    leaving: Offload | None = None
    """The copy that takes gradients home from here; whoever writes next waits for it."""
    age: int = field(default=0)
    views: tuple[object, list[nn.Parameter]] = (None, [])
    """The chunk's weights as parameters on this memory, and what they were made for: cut once while it stays."""

    @property
    def nbytes(self) -> int:
        """How much it can hold."""
        return len(self.memory)

    def wait(self) -> None:
        """Returns when the chunk's bytes are there."""
        if self.landing is not None:
            landing, self.landing = self.landing, None
            landing()


class Arena:
    """Slots of a few sizes on one tier. `sizes` are bytes, one entry per slot."""

    def __init__(self, tier: Ram, sizes: Iterable[int], what: str = "slots") -> None:
        homes = [tier.home(nbytes, torch.uint8, what) for nbytes in sorted(sizes)]
        self.slots = [Slot(home.tensor) for home in homes]
        self._tier = tier
        self._clock = 0

    def find(self, key: Key) -> Slot | None:
        """The slot that holds the chunk, landed or on its way."""
        return next((slot for slot in self.slots if slot.key == key), None)

    def claim(self, key: Key, nbytes: int, next_use: Callable[[Key], int], before: int = -1) -> Slot | None:
        """A slot for a chunk of `nbytes`, by the plan's rule, or None when there is none to give."""
        slot = choose(self.slots, nbytes, next_use, before)
        if slot is None:
            return None
        slot.wait()  # a prefetch that nobody came for must not write into the next chunk
        self._clock += 1
        slot.key, slot.age = key, self._clock
        return slot

    def forget(self, belongs: Callable[[Key], bool]) -> None:
        """Empties the slots of chunks whose homes have changed."""
        for slot in self.slots:
            if slot.key is not None and belongs(slot.key):
                assert not slot.users
                slot.wait()
                slot.key = None

    def close(self) -> None:
        """Gives the memory back; nobody may be using a slot."""
        self.forget(lambda key: True)
        self._tier.give(sum(len(slot.memory) for slot in self.slots))
        self.slots = []

    def too_small(self, nbytes: int) -> ResourceError:
        """What to say when a chunk has no slot to go to."""
        have = ", ".join(show_bytes(len(slot.memory)) for slot in self.slots)
        return ResourceError(
            f"--device-memory: a chunk of {show_bytes(nbytes)} must be in device memory and all slots ({have}) are "
            "smaller or in use; give more device memory or a smaller --chunk-size."
        )
