"""One chunk at home on this rank: where its weights, optimizer states and gradients lie between visits."""

from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from penstock.distributed.world import World
from penstock.memory import plan
from penstock.memory.chunks import Chunk
from penstock.memory.tiers import DiskHome, Home, RamHome, copy_after, copy_ahead, empty_pages, read_ahead

CPU = torch.device("cpu")
SUMS: torch.dtype = getattr(torch, plan.SUMS)
HEAD = 1 << 16
"""Elements that `rounded` and `unrounded` copy on their own."""


@dataclass(eq=False)
class Pending:
    """An update that another thread makes. See [Note: updates overlap] in sink.py. Several threads may wait for it, and
    the main thread alone names the next one."""

    future: Future | None = None
    """None: there was none yet."""

    def wait(self) -> None:
        """Returns when it is done. Raises what it raised, to everyone who asks."""
        if (future := self.future) is not None and self.running:
            with record_function("optimizer.wait"):
                future.result()

    @property
    def running(self) -> bool:
        """Whether `wait` would wait, or raise."""
        return self.future is not None and not (self.future.done() and self.future.exception() is None)


@dataclass(eq=False)
class ChunkHome:
    """The homes of one chunk; models that share it hold the same one."""

    chunk: Chunk
    weights: Home
    """Whole, or this rank's shard."""
    whole: bool
    states: dict[str, Home]
    """AdamW's, for this rank's share of the elements; empty when frozen."""
    grads: RamHome | None
    """Whole or a shard; None when frozen. See [Note: gradients add up in fp32] in plan.py."""
    grads_whole: bool
    share: slice
    """The elements of the chunk whose optimizer state is here."""
    shadow: RamHome | None = None
    """The share's weights in host memory. See [Note: a shadow on the host] in plan.py."""
    visits: Hashable = None
    """Homes with equal ones are needed at the same visits."""
    graded: bool = False
    """`grads` holds a part of this step's gradient."""
    update: Pending = field(default_factory=Pending)
    """Of this chunk: who reads its weights or states waits for it."""
    reader: Pending = field(default_factory=Pending)
    """The update that reads the memory of `grads`, which several models use: who writes there waits for it."""

    @property
    def share_numel(self) -> int:
        """Elements of the share."""
        return self.share.stop - self.share.start

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return getattr(torch, self.chunk.dtype)

    def per(self, name: str) -> int:
        """Elements of the weights per element of that state; 1 for the weights themselves."""
        home = self.states.get(name)
        if home is None:
            return 1
        numel = home.tensor.numel() if isinstance(home, RamHome) else home.numel
        return self.share_numel // numel

    @property
    def own_weights(self) -> Tensor:
        """The share's weights where the chunk's are, in RAM."""
        assert isinstance(self.weights, RamHome)
        return self.weights.tensor[self.share] if self.whole else self.weights.tensor

    @property
    def resident(self) -> bool:
        """Weights are used where they lie."""
        return self.whole and isinstance(self.weights, RamHome) and self.weights.tier.name == "device"

    @property
    def in_place(self) -> bool:
        """Autograd adds straight into the home of the gradients."""
        grads = self.grads
        return grads is not None and self.grads_whole and grads.tier.name == "device" and grads.tensor.dtype == SUMS

    @property
    def split(self) -> bool:
        """Each rank updates a share of the chunk only."""
        return self.share_numel < self.chunk.numel

    def whole_weights(self, world: World) -> Tensor:
        """All elements on the CPU. Where ranks hold shards, all of them call it."""
        self.update.wait()
        part = bring(self.weights, CPU)
        return part if self.whole else gather(part, world)

    def whole_states(self, world: World) -> dict[str, Tensor]:
        """All elements of every state on the CPU. Where ranks hold shares, all of them call it."""
        self.update.wait()
        parts = {name: bring(home, CPU) for name, home in self.states.items()}
        return {name: gather(part, world) for name, part in parts.items()} if self.split else parts


def fetch(home: ChunkHome, out: Tensor, reader: Executor) -> Callable[[], None]:
    """Starts to fill `out` with the weights that are here; calling the result waits for them, on the device where it
    can. `reader`: the thread that reads from a disk.

    Weights whose update is under way are not there yet: that thread waits for them.
    """
    weights = home.weights
    if isinstance(weights, DiskHome):
        waiting, reading = reader.submit(home.update.wait), read_ahead(weights, out, reader)  # one after the other
        return lambda: (waiting.result(), reading())[1]
    if not home.update.running:
        return copy_ahead(weights.tensor, out, weights.tier)
    return copy_after(home.update.wait, weights, out, reader)


def bring(home: Home, device: torch.device) -> Tensor:
    """A home's elements on `device`: the home itself where it lies there, else a copy."""
    if isinstance(home, RamHome):
        return home.tensor if home.tensor.device.type == device.type else home.tensor.to(device)
    tensor = empty_pages(home.numel * home.dtype.itemsize, CPU).view(home.dtype)
    home.read(tensor)
    return tensor.to(device)


def gather(part: Tensor, world: World) -> Tensor:
    """Every rank's part [n], in rank order, where `part` is. plan.GATHER_BYTES at once pass through the device."""
    whole = part.new_empty(world.size, len(part))
    step = max(plan.GATHER_BYTES // (world.size * part.itemsize), 1)
    for pieces, piece in zip(whole.split(step, dim=1), part.split(step), strict=True):
        pieces.copy_(world.join_shards(piece.to(world.device)).view(world.size, -1))
    return whole.flatten()


def rounded(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """sums [n] fp32 in `dtype` (of 16 bits, or its own), in the first bytes of the same memory.

    Each copy reads what lies behind all that it writes: it takes no memory, on any device.
    """
    if sums.dtype == dtype:
        return sums
    result = sums.view(dtype)[: len(sums)]
    result[:HEAD] = sums[:HEAD].to(dtype)
    start = HEAD
    while start < len(sums):
        result[start : 2 * start] = sums[start : 2 * start]
        start *= 2
    return result


def unrounded(sums: Tensor, home: RamHome) -> None:
    """The inverse: fills sums [n] fp32 with what is at home, which lies in the last bytes of the same memory first."""
    if sums.dtype == home.tensor.dtype:
        home.read(sums)
        return
    narrow = sums.view(home.tensor.dtype)[-len(sums) :]
    home.read(narrow)
    start = 0
    while len(sums) - start > HEAD:
        stop = (len(sums) + start) // 2
        sums[start:stop] = narrow[start:stop]
        start = stop
    sums[start:] = narrow[start:].clone()


def views(chunk: Chunk, memory: Tensor) -> list[Tensor]:
    """The chunk's weights, or their gradients, in a run of memory that holds them end to end."""
    return [
        memory[offset : offset + weight.numel].view(weight.shape)
        for weight, offset in zip(chunk.weights, chunk.offsets, strict=True)
    ]


def weight_on(memory: Tensor, trained: bool) -> nn.Parameter:
    """A weight whose gradient autograd adds up in fp32, if it is trained."""
    parameter = nn.Parameter(memory, requires_grad=trained)
    if trained:
        parameter.grad_dtype = SUMS
    return parameter
