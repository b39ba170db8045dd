"""Collectives of ranks on one machine's CPUs, through memory that they share.

gloo sends tensors over a socket, on the cores that should compute, at several times the cost of a copy. Here every rank
has a *mailbox* that the other ranks map: one half is written while the other half is read, and only a barrier per piece
uses the socket. The memory has no name and is opened through /proc, so nothing is left behind whatever ends a rank, and
a container's small /dev/shm suffices. Ranks that cannot open each other's mailboxes use gloo's own collectives.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

HALF = 8 << 20
"""Bytes of half a mailbox, the piece between two barriers: large against a barrier's cost, and it fits a cache."""


class Mailboxes:
    """Every rank's mailbox, in rank order, as this rank sees them: [2, HALF] of uint8 each."""

    def __init__(self, rank: int, boxes: Sequence[Tensor]) -> None:
        self._rank, self._boxes = rank, [box.view(2, HALF) for box in boxes]
        self._half = 0
        self._token = torch.zeros(1)

    @staticmethod
    def among(rank: int, size: int) -> "Mailboxes | None":
        """Opens them; every rank of the process group calls it. None on all ranks where one cannot open another's."""
        handle, address = _make()
        addresses: list[tuple | None] = [None] * size
        dist.all_gather_object(addresses, address)
        boxes = [_open(*address) for address in addresses if address is not None]
        opened = [box for box in boxes if box is not None]
        agreed: list[bool] = [False] * size
        dist.all_gather_object(agreed, len(opened) == size)
        if handle is not None:
            os.close(handle)  # the mapped memory lives on
        return Mailboxes(rank, opened) if all(agreed) else None

    def join(self, shard: Tensor, whole: Tensor) -> None:
        """Fills whole[i], [n], with rank i's `shard`, [n], which may be this rank's row of `whole`."""
        if whole[self._rank].data_ptr() != shard.data_ptr():
            whole[self._rank].copy_(shard)
        room = HALF // shard.element_size()
        for start in range(0, len(shard), room):
            rows = whole[:, start : start + room]
            boxes = [half.view(shard.dtype)[: rows.shape[1]] for half in self._turn()]
            boxes[self._rank].copy_(rows[self._rank])
            self._wait()
            for rank, box in enumerate(boxes):
                if rank != self._rank:
                    rows[rank].copy_(box)

    def sum(self, shards: Tensor, out: Tensor) -> None:
        """shards[i], [n], is this rank's part for rank i; `out`, [n], becomes the sum of the ranks' parts for this one,
        in rank order, bf16 in fp32."""
        wide = torch.float32 if out.dtype == torch.bfloat16 else out.dtype
        room = HALF // (len(shards) * wide.itemsize)
        for start in range(0, len(out), room):
            rows = shards[:, start : start + room]
            boxes = [half.view(out.dtype)[: rows.numel()].view(rows.shape) for half in self._turn()]
            boxes[self._rank].copy_(rows)
            self._wait()
            total = boxes[0][self._rank].to(wide, copy=True)
            for box in boxes[1:]:
                total = total.add_(box[self._rank])
            out[start : start + room].copy_(total)

    def _wait(self) -> None:
        """Returns when every rank has called it."""
        dist.all_reduce(self._token)

    def _turn(self) -> list[Tensor]:
        """The halves for the next piece. All ranks have read their last contents: before the barrier that followed."""
        self._half = 1 - self._half
        return [box[self._half] for box in self._boxes]


def _make() -> tuple[int | None, tuple | None]:
    """A mailbox's file and its address for other ranks; (None, None) where the system has no memory without a name."""
    if not hasattr(os, "memfd_create"):
        return None, None
    try:
        handle = os.memfd_create("penstock-mailbox")
        os.posix_fallocate(handle, 0, 2 * HALF)
        status, machine = os.fstat(handle), Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return None, None
    return handle, (machine, f"/proc/{os.getpid()}/fd/{handle}", status.st_dev, status.st_ino)


def _open(machine: str, path: str, device: int, inode: int) -> Tensor | None:
    """[2 * HALF] of uint8; None where this process cannot open that file."""
    try:
        if machine != Path("/proc/sys/kernel/random/boot_id").read_text():
            return None
        status = os.stat(path)
        if (status.st_dev, status.st_ino) != (device, inode):  # another container's process with that number
            return None
        return torch.from_file(path, shared=True, size=2 * HALF, dtype=torch.uint8)
    except (OSError, RuntimeError):
        return None
