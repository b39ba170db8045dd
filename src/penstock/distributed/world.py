"""The ranks of one run and the few collectives the project needs. At world size 1 each of them returns at once.

Ranks come from torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE); the backend from the device: NCCL on a GPU,
gloo on a CPU.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.distributed import heartbeat, shared_memory
from penstock.errors import ResourceError, UserError

PATIENCE = datetime.timedelta(hours=2)
"""How long a rank waits for others that are alive: one of them may be writing a large checkpoint."""
# Since torch 2.13 their names end in _single, and the former ones warn.
_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
LARGE = 1 << 16
"""Elements from which a sum is worth two exchanges."""
_pulse: heartbeat.Pulse | None = None
"""Of the process group that `World.join` began: there is one per process, as torch has it."""
_mailboxes: shared_memory.Mailboxes | None = None
"""Of the same group, where it computes on the CPUs of one machine."""


@dataclass(frozen=True)
class World:
    """This process among its peers. Example: World(rank=0, size=1, device=device("cpu"))."""

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def join(device: str | None = None) -> "World":
        """Joins torchrun's process group, or stands alone. `device` None takes the accelerator if there is one.

        Raises UserError for a device that this machine does not have.
        """
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        there = ["cpu", accelerator.type] if accelerator else ["cpu"]
        kind, _, index = (device or there[-1]).partition(":")
        if kind not in there or not (index or "0").isdecimal():
            raise UserError(f"--device {device}: this machine has {' and '.join(there)}; see penstock doctor.")
        here = torch.device(device or kind)
        if here.type == "cuda":
            if size > 1 or here.index is None:
                here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            if here.index >= torch.cuda.device_count():
                raise UserError(f"{here}: this machine has {torch.cuda.device_count()} GPUs; see penstock doctor.")
            torch.cuda.set_device(here)
        if size > 1 and not dist.is_initialized():
            _begin("nccl" if here.type == "cuda" else "gloo", rank, size)
        return World(rank, size, here)

    def leave(self, well: bool = True) -> None:
        """Ends the process group that `join` began. `well` False: the others must not wait for this rank."""
        global _pulse, _mailboxes
        if self.size > 1 and dist.is_initialized():
            if _pulse is not None:
                _pulse.leave(well)
                _pulse = None
            _mailboxes = None
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """True on the one rank that writes files and talks to the user."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds the tensor up over ranks, in place."""
        if self.size > 1 and tensor.numel() >= LARGE and tensor.is_contiguous() and _in_reach(tensor):
            flat = tensor.view(-1)
            even = flat[: flat.numel() // self.size * self.size]
            self.join_shards(self.sum_shards(even), even)
            if len(even) < len(flat):
                self.sum(flat[len(even) :])
        elif self.size > 1:
            with _together():
                dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Takes the maximum over ranks, in place."""
        if self.size > 1:
            with _together():
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def sum_shards(self, whole: Tensor) -> Tensor:
        """[n] on every rank -> [n / size]: this rank's part of the sum over ranks."""
        mine = whole.new_empty(whole.numel() // self.size)
        with _together():
            if boxes := _in_reach(whole):
                boxes.sum(whole.view(self.size, -1), mine)
            else:
                _reduce_scatter(mine, whole)
        return mine

    def join_shards(self, mine: Tensor, out: Tensor | None = None) -> Tensor:
        """[n] on every rank -> [n * size], in rank order, on every rank; `out` is where, if given, and `mine` may be
        this rank's place in it."""
        whole = mine.new_empty(mine.numel() * self.size) if out is None else out
        with _together():
            if boxes := _in_reach(mine):
                boxes.join(mine, whole.view(self.size, -1))
            else:
                _gather(whole.view(torch.uint8), mine.view(torch.uint8))  # int16 is unknown to NCCL
        return whole

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on every rank. For small Python objects and CPU tensors."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with _together():
            dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Any) -> Any:
        """The first rank's item, on every rank."""
        if self.size == 1:
            return item
        box = [item]
        with _together():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def share_of(self, items: list[Any]) -> list[Any]:
        """This rank's share of a list that every rank holds: every size-th item, so long and short rows mix."""
        return items[self.rank :: self.size]


def _in_reach(tensor: Tensor) -> shared_memory.Mailboxes | None:
    """What to send it through, where all ranks are processes of one machine and it lies in its memory."""
    return _mailboxes if tensor.device.type == "cpu" else None


def _begin(backend: str, rank: int, size: int) -> None:
    global _pulse, _mailboxes
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=PATIENCE))
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    finally:
        _pulse = heartbeat.Pulse(dist.PrefixStore("pulse", store), rank, size)
    if backend == "gloo":
        _mailboxes = shared_memory.Mailboxes.among(rank, size)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """A collective is inside: what its backend says of a lost connection becomes the name of the rank that is gone.

    Raises ResourceError then. An error that has another cause stays as it is.
    """
    try:
        yield
    except RuntimeError as error:
        found = _pulse.missing() if _pulse is not None else None
        if found is None:
            raise
        raise ResourceError(heartbeat.advice(found)) from error
