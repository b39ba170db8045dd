"""One chunk at home on this rank: where its weights, optimizer states and gradients lie between visits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.distributed.world import World
from penstock.memory.chunks import Chunk
from penstock.memory.tiers import DiskHome, Home, RamHome, empty_pages

CPU = torch.device("cpu")


@dataclass(eq=False)
class ChunkHome:
    """The homes of one chunk; models that share it hold the same one."""

    chunk: Chunk
    weights: Home
    """Whole, or this rank's shard."""
    whole: bool
    states: dict[str, Home]
    """AdamW's, for this rank's share of the elements; empty when frozen."""
    grads: Home | None
    """Whole or a shard; None when frozen."""
    grads_whole: bool
    share: slice
    """The elements of the chunk whose optimizer state is here."""
    graded: bool = False
    """`grads` holds a part of this step's gradient."""

    @property
    def share_numel(self) -> int:
        """Elements of the share."""
        return self.share.stop - self.share.start

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and gradients."""
        return getattr(torch, self.chunk.dtype)

    def per(self, name: str) -> int:
        """Elements of the weights per element of that state; 1 for the weights themselves."""
        home = self.states.get(name)
        if home is None:
            return 1
        numel = home.tensor.numel() if isinstance(home, RamHome) else home.numel
        return self.share_numel // numel

    @property
    def resident(self) -> bool:
        """Weights are used where they lie."""
        return self.whole and isinstance(self.weights, RamHome) and self.weights.tier.name == "device"

    @property
    def in_place(self) -> bool:
        """Autograd adds straight into the home of the gradients."""
        return self.grads_whole and isinstance(self.grads, RamHome) and self.grads.tier.name == "device"

    @property
    def split(self) -> bool:
        """Each rank updates a share of the chunk only."""
        return self.share_numel < self.chunk.numel

    def whole_weights(self, world: World) -> Tensor:
        """All elements on the CPU. Where ranks hold shards, all of them call it."""
        part = bring(self.weights, CPU)
        return part if self.whole else gather(part, world)

    def whole_states(self, world: World) -> dict[str, Tensor]:
        """All elements of every state on the CPU. Where ranks hold shares, all of them call it."""
        parts = {name: bring(home, CPU) for name, home in self.states.items()}
        return {name: gather(part, world) for name, part in parts.items()} if self.split else parts


def bring(home: Home, device: torch.device) -> Tensor:
    """A home's elements on `device`: the home itself where it lies there, else a copy."""
    if isinstance(home, RamHome):
        return home.tensor if home.tensor.device.type == device.type else home.tensor.to(device)
    tensor = empty_pages(home.numel * home.dtype.itemsize, CPU).view(home.dtype)
    home.read(tensor)
    return tensor.to(device)


def put_back(home: Home, tensor: Tensor) -> None:
    """Writes the result of `bring` to its home where it is a copy."""
    if isinstance(home, DiskHome) or home.tensor is not tensor:
        home.write(tensor)


def gather(part: Tensor, world: World) -> Tensor:
    """Every rank's part, in rank order, where `part` is."""
    return world.join_shards(part.to(world.device).contiguous()).to(part.device)
