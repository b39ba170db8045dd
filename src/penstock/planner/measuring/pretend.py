"""Tensors without memory, on which the engine and the models run as they are: for the dry run, and for measuring models
whose layers are not ours.

[Note: what is fake] Weights, activations and gradients are fake (shape, dtype, device). Whole numbers that decide what
happens next (lengths, masks, permutations) stay real. A number that is read from a fake tensor is 1.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # registers collectives on fake tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.distributed.world import World
from penstock.memory.tiers import PAGE, Disk, DiskHome, Tier

aten = torch.ops.aten


@contextmanager
def pretend(world: World) -> Iterator[None]:
    """Inside, this process is the first of the world's ranks, and its tensors take no memory."""
    if world.size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world.size)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Control():
            yield
    finally:
        if world.size > 1:
            dist.destroy_process_group()


class PretendWorld(World):
    """Ranks that all hold what this rank holds."""

    def gather(self, item: Any) -> list[Any]:
        return [item] * self.size

    def broadcast(self, item: Any) -> Any:
        return item


class PretendDisk(Disk):
    """A disk that counts what it would hold, read and write."""

    def __init__(self, budget: int | None = None) -> None:
        Tier.__init__(self, "disk", budget)

    def home(self, numel: int, dtype: torch.dtype, what: str) -> DiskHome:
        self.take(-(-numel * dtype.itemsize // PAGE) * PAGE, what)
        return DiskHome(self, 0, numel, dtype)

    def transfer(self, offset: int, memory: Tensor, write: bool) -> None:
        if write:
            self.bytes_written += memory.nbytes
        else:
            self.bytes_read += memory.nbytes


class _Control(TorchDispatchMode):
    """Keeps whole numbers and random draws real; every other tensor becomes fake."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # the most frequent call
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()))
        if any(isinstance(x, FakeTensor) for x in tensors):
            if func is aten._local_scalar_dense.default:
                return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
            if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
                args = (args[0], _positions(args[1]), *args[2:])
            if func is aten._grouped_mm.default:  # torch's own shape function refuses fp32
                return args[0].new_empty(_grouped(*args[:3]))
            return func(*args, **kwargs)
        if tensors or kwargs.get("dtype") in (torch.int64, torch.bool) or func.__name__.startswith(("arange", "rand")):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None) -> tuple[int, ...]:
    """The shape of torch's product of a and b group by group, whose ends `offs` are."""
    if a.dim() == b.dim() == 2:
        assert offs is not None
        return len(offs), a.shape[0], b.shape[1]
    return (*a.shape[:-1], b.shape[-1]) if a.dim() <= b.dim() else (a.shape[1], b.shape[1])


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, tuple | list):
            tensors += _tensors(argument)
    return tensors


def _positions(index: Any) -> list[Any]:
    """The index with real masks replaced by the positions that they select; a fake index cannot say how many."""
    positions: list[Any] = []
    for part in index:
        if isinstance(part, Tensor) and part.dtype == torch.bool and not isinstance(part, FakeTensor):
            with unset_fake_temporarily():
                positions += part.nonzero().unbind(1)
        else:
            positions.append(part)
    return positions
