"""Tensors without memory, ranks without processes: the engine runs as it is, and only the arithmetic is left out.

Inside `pretend()` weights, activations and gradients are fake (shapes, dtypes, devices); whole numbers that decide what
happens next (lengths, masks, permutations) stay real, so the very code that trains can be run, for models of any size.
A number that is read from a fake tensor is 1.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # collectives on fake tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.distributed.world import World
from penstock.memory.tiers import PAGE, Disk, DiskHome, Tier

aten = torch.ops.aten


@contextlib.contextmanager
def pretend(world: World) -> Iterator[None]:
    """Inside, this process is the first of the ranks, which all hold the same, and its tensors take no memory."""
    if world.size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world.size)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Control():
            yield
    finally:
        if world.size > 1:
            dist.destroy_process_group()


class PretendWorld(World):
    """Ranks that are all like this one."""

    def gather(self, item: Any) -> list[Any]:
        """The same item from everybody."""
        return [item] * self.size

    def broadcast(self, item: Any) -> Any:
        """This one's item."""
        return item


class PretendDisk(Disk):
    """A disk that counts what it would hold, read and write."""

    def __init__(self, budget: int | None = None) -> None:
        Tier.__init__(self, "disk", budget)

    def home(self, numel: int, dtype: torch.dtype, what: str) -> DiskHome:
        """A place without a file."""
        self.take(-(-numel * dtype.itemsize // PAGE) * PAGE, what)
        return DiskHome(self, 0, numel, dtype)

    def transfer(self, offset: int, memory: Tensor, write: bool) -> None:
        """Nothing but the count."""
        if write:
            self.bytes_written += memory.nbytes
        else:
            self.bytes_read += memory.nbytes


class _Control(TorchDispatchMode):
    """Keeps whole numbers and random draws real; everything else goes on to be fake."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for more often than anything else
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()))
        if any(isinstance(x, FakeTensor) for x in tensors):
            if func is aten._local_scalar_dense.default:
                return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
            if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
                args = (args[0], _positions(args[1]), *args[2:])
            return func(*args, **kwargs)
        if tensors or kwargs.get("dtype") in (torch.int64, torch.bool) or func.__name__.startswith(("arange", "rand")):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _tensors(given: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for one in given:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, tuple | list):
            found += _tensors(one)
    return found


def _positions(index: Any) -> list[Any]:
    """Masks as the positions they mean: real masks say how many, fake ones could not."""
    found: list[Any] = []
    for one in index:
        if isinstance(one, Tensor) and one.dtype == torch.bool and not isinstance(one, FakeTensor):
            with unset_fake_temporarily():
                found += one.nonzero().unbind(1)
        else:
            found.append(one)
    return found
