"""The memories of one rank: device, host and disk, each with a byte budget that is never passed.

A tier hands out *homes*: a fixed number of bytes for one run of elements. RAM homes are tensors and can be used where
they lie; a disk home is read and written in blocks, past the page cache where the file system allows it (O_DIRECT), by
a few threads (preadv and pwritev release the GIL).

[Note: a file without a name] The disk tier's file is unlinked while open. Whatever kills a run, nothing is left behind
and nothing half-written is ever read.

[Note: pinned byte for byte] Host memory that a GPU copies from is anonymous pages registered with the driver
(cudaHostRegister): PyTorch's own pinned allocator rounds up to powers of two. A driver that refuses costs speed only.

[Note: pages stay pinned] Touching and pinning a KV cache's pages can take as long as a rollout. What `Ram.lend` has
lent stays pinned, and counted, for the next one, until the budget needs the room.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import queue
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from penstock.errors import ResourceError, UserError
from penstock.units import show_bytes

PAGE = 4096
BLOCK = 8 << 20
"""Bytes per disk request: enough for the disk's full speed, and few enough to share among threads."""
THREADS = 4


class Tier:
    """A memory with a byte budget (None: only the machine's own)."""

    def __init__(self, name: str, budget: int | None = None) -> None:
        self.name, self.budget = name, budget
        self.used = self.peak = 0
        self.bytes_read = self.bytes_written = 0

    def check(self, nbytes: int, what: str) -> None:
        """Raises ResourceError when so many bytes more would pass the budget."""
        if self.budget is not None and self.used + nbytes > self.budget:
            flag = "--disk" if self.name == "disk" else f"--{self.name}-memory"
            raise ResourceError(
                f"{flag} {show_bytes(self.budget)}: {what} would bring it to {show_bytes(self.used + nbytes)}; give at "
                "least that, or a strategy that keeps more elsewhere."
            )

    def take(self, nbytes: int, what: str) -> None:
        """Counts bytes in use. Raises ResourceError instead of passing the budget."""
        self.check(nbytes, what)
        self.used += nbytes
        self.peak = max(self.peak, self.used)

    def give(self, nbytes: int) -> None:
        """Counts bytes no longer in use."""
        self.used -= nbytes
        assert self.used >= 0


class Ram(Tier):
    """Device memory, or host memory. `pins`: memory that travels to a GPU is registered with the driver."""

    def __init__(self, name: str, device: torch.device, budget: int | None = None, pins: bool = False) -> None:
        super().__init__(name, budget)
        self.device, self._pins = device, pins
        self.pinned = 0
        """Bytes that the driver was asked to pin."""
        self._spare: list[Tensor] = []
        """Pages that came back from loans, the smallest first. See [Note: pages stay pinned]."""

    def home(self, numel: int, dtype: torch.dtype, what: str, travels: bool = False) -> "RamHome":
        """Zeroed memory for `numel` elements. `travels`: its contents are copied to the device or from there."""
        nbytes = numel * dtype.itemsize
        self.take(nbytes, what)
        self.pinned += nbytes if self._pins and travels else 0
        return RamHome(self, empty_pages(nbytes, self.device, pinned=self._pins and travels).view(dtype))

    def check(self, nbytes: int, what: str) -> None:
        """As Tier.check, after spare pages that are in the way have been given back."""
        self.make_room(nbytes)
        super().check(nbytes, what)

    def make_room(self, nbytes: int) -> None:
        """Gives spare pages back where so many bytes more would pass the budget."""
        while self._spare and self.budget is not None and self.used + nbytes > self.budget:
            self.drop(self._spare.pop(0))

    def lend(self, nbytes: int, what: str, borrower: Any, zeroed: bool = True) -> Tensor:
        """[nbytes] uint8, for contents that travel, until the borrower dies; then the pages are spare. Without `zeroed`
        they hold what the last borrower left."""
        fits = next((i for i, pages in enumerate(self._spare) if pages.numel() >= nbytes), None)
        if fits is not None:
            pages = self._spare.pop(fits)
            if zeroed:
                pages[:nbytes].zero_()
        else:
            if self._spare:
                self.drop(self._spare.pop())
            pages = self.home(nbytes, torch.uint8, what, travels=True).tensor
        weakref.finalize(borrower, self._take_back, pages)
        return pages[:nbytes]

    def _take_back(self, pages: Tensor) -> None:
        self._spare = sorted([*self._spare, pages], key=len)

    def drop(self, pages: Tensor) -> None:
        """Counts pages that travelled no longer."""
        self.give(pages.numel())
        self.pinned -= pages.numel() if self._pins else 0


class RamHome:
    """A run of elements in RAM, used where it lies."""

    def __init__(self, tier: Ram, tensor: Tensor) -> None:
        self.tier, self.tensor, self.dtype = tier, tensor, tensor.dtype

    def read(self, out: Tensor, start: int = 0) -> None:
        """Fills `out` with the elements from `start` on."""
        self.tier.bytes_read += out.nbytes
        out.copy_(self.tensor[start : start + out.numel()])

    def write(self, source: Tensor, start: int = 0) -> None:
        """Replaces the elements from `start` on by `source`."""
        self.tier.bytes_written += source.nbytes
        self.tensor[start : start + source.numel()].copy_(source)


class Ring:
    """Pinned buffers between a disk and a device: while one is copied to the device, others are read from the disk."""

    def __init__(self, memory: Tensor) -> None:
        """memory: [n * BLOCK] uint8, on a page."""
        self._free: queue.SimpleQueue[tuple[Tensor, torch.Event | None]] = queue.SimpleQueue()
        """Buffers, the one that was used first in front, each with the copy out of it."""
        for buffer in memory.split(BLOCK):
            self._free.put((buffer, None))

    def pass_on(self, read: Callable[[Tensor], None], out: Tensor, copy: "Copy") -> torch.Event:
        """Begins to fill `out`, [n <= BLOCK] uint8 on the device, with what `read` reads. In any thread."""
        buffer, gone = self._free.get()
        try:
            if gone is not None:
                gone.synchronize()
            read(buffer[: -(-out.numel() // PAGE) * PAGE])
            gone = copy(buffer[: out.numel()], out)
            return gone
        finally:
            self._free.put((buffer, gone))


class Disk(Tier):
    """A preallocated file in a directory. See [Note: a file without a name]."""

    ring: Ring | None = None
    """What weights pass through on their way to a device that is no CPU."""

    def __init__(self, directory: str | Path, budget: int | None = None) -> None:
        super().__init__("disk", budget)
        self.directory = Path(directory)
        self.direct = True
        """Whether reads and writes go past the page cache; False where the file system refuses."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(prefix="penstock-", suffix=".tier", dir=self.directory)
        except OSError as error:
            raise UserError(f"--disk {directory}: {error.strerror}; name a directory that can be written.") from error
        self._buffered = handle
        try:
            self._file = os.open(path, os.O_RDWR | getattr(os, "O_DIRECT", 0))
            self.direct = hasattr(os, "O_DIRECT")
        except OSError:  # tmpfs and some network file systems
            self._file, self.direct = os.dup(handle), False
        os.unlink(path)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="disk")
        self._end = 0

    def home(self, numel: int, dtype: torch.dtype, what: str) -> "DiskHome":
        """A zeroed extent of the file; its blocks are reserved now, so that no write can meet a full disk later."""
        nbytes = numel * dtype.itemsize
        padded = -(-nbytes // PAGE) * PAGE
        self.take(padded, what)
        try:
            os.posix_fallocate(self._file, self._end, padded)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise ResourceError(
                f"--disk {self.directory}: there is no room for {show_bytes(self._end + padded)} ({what}): "
                f"{error.strerror}; free some space or name another disk."
            ) from error
        home = DiskHome(self, self._end, numel, dtype)
        self._end += padded
        return home

    def close(self) -> None:
        """Gives the space back."""
        self._threads.shutdown()
        os.close(self._file)
        os.close(self._buffered)

    def transfer(self, offset: int, memory: Tensor, write: bool) -> None:
        """Moves all of `memory` (contiguous, on the CPU) to or from the file; blocks side by side."""
        data = memory.view(-1).view(torch.uint8)
        if self.direct and (data.data_ptr() % PAGE or data.numel() % PAGE):  # O_DIRECT wants whole, aligned pages
            padded = -(-data.numel() // PAGE) * PAGE
            bounce = empty_pages(padded, torch.device("cpu"))
            if write:
                bounce[: data.numel()] = data
            self.transfer(offset, bounce, write)
            if not write:
                data.copy_(bounce[: data.numel()])
            return
        blocks = [(offset + at, data[at : at + BLOCK]) for at in range(0, data.numel(), BLOCK)]
        for _ in self._threads.map(lambda block: self._move(block[0], block[1], write), blocks):
            pass  # raises a thread's exception
        if write:
            self.bytes_written += data.numel()
        else:
            self.bytes_read += data.numel()

    def pass_on(self, offset: int, out: Tensor, copy: "Copy") -> list[torch.Event]:
        """Reads all of `out` (contiguous, on a device) through the ring; returns the copies, which may be on their way.

        Blocks are read side by side, and copied in the order in which they come.
        """
        assert self.ring is not None
        ring, data = self.ring, out.view(-1).view(torch.uint8)

        def pass_block(at: int) -> torch.Event:
            return ring.pass_on(lambda buffer: self._move(offset + at, buffer, False), data[at : at + BLOCK], copy)

        copies = [*self._threads.map(pass_block, range(0, data.numel(), BLOCK))]
        self.bytes_read += data.numel()
        return copies

    def _move(self, offset: int, block: Tensor, write: bool) -> None:
        view = memoryview((ctypes.c_char * block.numel()).from_address(block.data_ptr())).cast("B")
        move = os.pwritev if write else os.preadv
        done = 0
        while done < len(view):
            moved = move(self._file, [view[done:]], offset + done)
            if moved <= 0:
                raise ResourceError(f"--disk {self.directory}: the file ended early; was it cut by someone else?")
            done += moved


class DiskHome:
    """An extent of the disk tier's file."""

    def __init__(self, tier: Disk, offset: int, numel: int, dtype: torch.dtype) -> None:
        self.tier, self.offset, self.numel, self.dtype = tier, offset, numel, dtype

    def read(self, out: Tensor, start: int = 0) -> None:
        """Fills `out`, on the CPU, with the elements from `start` on (a page's first)."""
        self.tier.transfer(self.offset + start * self.dtype.itemsize, out, write=False)

    def write(self, source: Tensor, start: int = 0) -> None:
        """Replaces the elements from `start` on (a page's first) by `source`."""
        memory = source.to("cpu", self.dtype).contiguous()
        self.tier.transfer(self.offset + start * self.dtype.itemsize, memory, write=True)


Home = RamHome | DiskHome


class _AtOnce(Executor):
    """Runs a task in the caller's thread: fake tensors cannot be used in another."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """The result, in a future that is done."""
        future: Future = Future()
        future.set_result(function(*args, **kwargs))
        return future


def worker(name: str) -> Executor:
    """An executor with one thread."""
    return _AtOnce() if _pretending() else ThreadPoolExecutor(1, thread_name_prefix=name)


def _pretending() -> bool:
    """Whether tensors are fake: in a dry run."""
    return torch._guards.detect_fake_mode() is not None


def empty_pages(nbytes: int, device: torch.device, pinned: bool = False) -> Tensor:
    """[nbytes] uint8, zeroed; on the CPU it begins on a page and costs no memory until it is written or pinned."""
    if device.type != "cpu" or nbytes == 0 or _pretending():
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared pages cannot be huge
    if pinned and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # all of it is touched now, which is faster in pages of 2 MB
    pages = (ctypes.c_ubyte * nbytes).from_buffer(memory)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)
    if pinned:
        tensor.fill_(0)  # by all threads: the driver would touch page after page
        _pin(pages)
    return tensor


def _pin(pages: ctypes.Array) -> None:
    """Registers pages with the driver: a GPU then copies them beside its work, at the link's full speed.

    Where the driver refuses (containers, limits on locked memory, too little RAM), it warns, and copies are slow.
    See [Note: pinned byte for byte].
    """
    driver, address = torch.cuda.cudart(), ctypes.addressof(pages)
    refused = driver.cudaHostRegister(address, ctypes.sizeof(pages), 1)  # 1: for every device
    if int(refused) == 0:
        weakref.finalize(pages, driver.cudaHostUnregister, address).atexit = False
        return
    # The runtime keeps the error for the next kernel's check, whoever launches it. This kernel takes it away.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
    warnings.warn(
        f"the driver would not pin {show_bytes(ctypes.sizeof(pages))} of host memory ({refused}): weights travel to "
        "the GPU at a fraction of the link's speed, and nothing else changes. Leave more RAM free (--host-memory), or "
        "raise the container's limit on locked memory.",
        stacklevel=2,
    )


# --- copies between host memory and a GPU, beside its work ------------------------------------------------------------

# Weights come on one stream, gradients leave on another. A copy begins when all work that was queued on the device
# before it is done. Later work waits for the copy, on the device; Python never waits. On a CPU a copy runs when it is
# needed, for the same cores do it.


def copy_ahead(source: Tensor, out: Tensor, tier: Ram) -> Callable[[], None]:
    """Starts copying a tier's host memory to the device; calling the result makes the device wait for it."""
    if out.device.type == "cpu":
        return lambda: _fetch(source, out, tier)  # when it is needed
    side = _side_stream(out.device, "in")
    with _SWITCHING, side:
        _fetch(source, out, tier)
        landed = side.record_event()
    return lambda: torch.accelerator.current_stream(out.device).wait_event(landed)


def copy_after(wait: Callable[[], None], source: RamHome, out: Tensor, reader: Executor) -> Callable[[], None]:
    """`copy_ahead` of a home that is whole when `wait` returns; `reader` calls it."""
    copy = copies_to(out)
    if copy is None:

        def fetched() -> None:  # when it is needed
            wait()
            _fetch(source.tensor, out, source.tier)

        return fetched

    def follow() -> torch.Event:
        wait()
        source.tier.bytes_read += out.nbytes
        return copy(source.tensor, out)

    copying = reader.submit(follow)
    return lambda: copying.result().wait()


def read_ahead(source: DiskHome, out: Tensor, reader: Executor) -> Callable[[], None]:
    """Starts reading a home to the device; calling the result returns when all is read, and on a device that is no CPU
    makes it wait for the copies."""
    copy = copies_to(out)
    if copy is None:
        return reader.submit(source.read, out).result
    reading = reader.submit(source.tier.pass_on, source.offset, out, copy)

    def land() -> None:
        for copied in reading.result():
            copied.wait()

    return land


Copy = Callable[[Tensor, Tensor], torch.Event]
"""(source, out) -> a copy that has begun."""


def copies_to(out: Tensor) -> Copy | None:
    """Copies into the memory of `out`, beside the device's work and after all that is queued on it; None on a CPU.

    Any thread may begin them.
    """
    if out.device.type == "cpu":
        return None
    side = _side_stream(out.device, "in")

    def copy(source: Tensor, target: Tensor) -> torch.Event:
        with _SWITCHING, side, record_function("link.fetch"):
            target.copy_(source, non_blocking=True)
            return side.record_event()

    return copy


def bring_home(source: Tensor, out: Tensor, tier: Ram) -> None:
    """Copies from the device to a tier's host memory, and returns when the bytes are there."""
    if source.device.type == "cpu":
        tier.bytes_written += source.nbytes
        out.copy_(source)
    else:
        Offload(source, out, tier).arrive()


class Offload:
    """A copy from the device on its way to host memory."""

    def __init__(self, source: Tensor, out: Tensor, tier: Ram) -> None:
        """Starts it. `source` must keep its values until `wait`, and `out` is not to be read before `arrive`."""
        self._device = source.device
        tier.bytes_written += source.nbytes
        side = _side_stream(source.device, "out")
        with _SWITCHING, side, record_function("link.settle"):
            out.copy_(source, non_blocking=True)
            self._gone = side.record_event()

    def wait(self) -> None:
        """Makes the device wait before its next work."""
        torch.accelerator.current_stream(self._device).wait_event(self._gone)

    def arrive(self) -> None:
        """Returns when the bytes are in host memory."""
        self._gone.synchronize()


def _fetch(source: Tensor, out: Tensor, tier: Ram) -> None:
    tier.bytes_read += source.nbytes
    with record_function("link.fetch"):
        out.copy_(source, non_blocking=True)


_SIDE: dict[tuple[torch.device, str], torch.Stream] = {}
_SWITCHING = threading.Lock()
"""Held inside `with stream`: a torch.Stream keeps the stream that it replaces in itself, and serves one thread."""


def _side_stream(device: torch.device, direction: str) -> torch.Stream:
    """The stream of that direction, after all work queued on the device so far."""
    if (device, direction) not in _SIDE:
        _SIDE[device, direction] = torch.Stream(device)
    side = _SIDE[device, direction]
    side.wait_stream(torch.accelerator.current_stream(device))
    return side
