"""The ranks of one run and the few collectives the project needs. At world size 1 each of them returns at once.

Ranks come from torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE); the backend from the device: NCCL on a GPU,
gloo on a CPU.
"""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.errors import UserError

PATIENCE = datetime.timedelta(hours=2)
"""How long a rank waits for the others: one of them may be writing a large checkpoint."""


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
            dist.init_process_group(
                "nccl" if here.type == "cuda" else "gloo", rank=rank, world_size=size, timeout=PATIENCE
            )
        return World(rank, size, here)

    def leave(self) -> None:
        """Ends the process group that `join` began."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """True on the one rank that writes files and talks to the user."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds the tensor up over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Takes the maximum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on every rank. For small Python objects and CPU tensors."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Any) -> Any:
        """The first rank's item, on every rank."""
        if self.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def mine(self, items: list[Any]) -> list[Any]:
        """This rank's share of a list that every rank holds: every size-th item, so long and short rows mix."""
        return items[self.rank :: self.size]
