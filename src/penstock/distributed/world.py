"""The ranks of one run and the few collectives the project needs. At world size 1 each of them returns at once.

Ranks come from torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE); the backend from the device: NCCL on a GPU,
gloo on a CPU.

[Note: a name per attempt] torchrun restarts all ranks when one fails, and the store that they meet in stays: it is the
launcher's. The second attempt would read the first one's keys (who has joined, who is gone). TORCHELASTIC_RESTART_COUNT
does not tell attempts apart: every host counts its own failures alone. So the first rank makes a name up, and goes on
when all others have answered to that name; an answer to an older one is never read.

[Note: one order of gathers] A chunk's shards are joined while the chunk before it computes. Ranks must begin the
collectives of a process group in one order, and they differ in when their own shard has come from its home. So these
gathers have a group of their own, and a thread that waits for one shard after the other in the order in which the
schedule asked for them, which is that of all ranks. What the main thread sends (sums of gradients, lengths) keeps its
own order, in the group of all else.
"""

import contextlib
import datetime
import functools
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.distributed import cores, heartbeat, shared_memory
from penstock.errors import ResourceError, UserError

PATIENCE = datetime.timedelta(hours=2)
"""How long a rank waits for others that are alive: one of them may be writing a large checkpoint."""
# Since torch 2.13 their names end in _single, and the former ones warn.
_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
LARGE = 1 << 16
"""Elements from which a sum is worth two exchanges."""
_heartbeat: heartbeat.Heartbeat | None = None
"""Of the process group that `World.join` began: a process has one, like torch's."""
_mailboxes: shared_memory.Mailboxes | None = None
"""Of the same group, where it computes on the CPUs of one machine."""
_gathers: "Gathers | None" = None
"""Of the same ranks, once they have gathered ahead."""
_background: Any = None
"""All ranks' group for a thread beside the main one; see `World.background`."""


def device_types() -> list[str]:
    """Kinds of devices of this machine, the default one last: cpu, and an accelerator's if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu", accelerator.type] if accelerator else ["cpu"]


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
        types = device_types()
        device_type, _, index = (device or types[-1]).partition(":")
        if device_type not in types or not (index or "0").isdecimal():
            raise UserError(f"--device {device}: this machine has {' and '.join(types)}; see penstock doctor.")
        own = torch.device(device or device_type)
        if own.type == "cuda":
            if size > 1 or own.index is None:
                own = torch.device("cuda", _local_index())
            if own.index >= torch.cuda.device_count():
                raise UserError(f"{own}: this machine has {torch.cuda.device_count()} GPUs; see penstock doctor.")
            torch.cuda.set_device(own)
        if size > 1 and not dist.is_initialized():
            _use_cores(own)
            _begin("nccl" if own.type == "cuda" else "gloo", rank, size)
        return World(rank, size, own)

    def leave(self, well: bool = True) -> None:
        """Ends the process group that `join` began. `well` False: this rank failed, and counts as gone."""
        global _heartbeat, _mailboxes, _gathers, _background
        if self.size > 1 and dist.is_initialized():
            if _gathers is not None:
                _gathers.close(well)
                _gathers = None
            if _heartbeat is not None:
                _heartbeat.leave(well)
                _heartbeat = None
            _mailboxes = _background = None
            dist.destroy_process_group()

    @property
    def exact(self) -> torch.device:
        """Where sums in fp64 are taken; see `exact_beside`."""
        return exact_beside(self.device)

    @property
    def first(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """Ranks on this machine, as torchrun says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds the tensor up over ranks, in place."""
        if self.size > 1 and tensor.numel() >= LARGE and tensor.is_contiguous() and _mailboxes_for(tensor):
            flat = tensor.view(-1)
            even = flat[: flat.numel() // self.size * self.size]
            self.join_shards(self.sum_shards(even), even)
            if len(even) < len(flat):
                self.sum(flat[len(even) :])
        elif self.size > 1:
            with naming_lost_ranks():
                dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Takes the maximum over ranks, in place."""
        if self.size > 1:
            with naming_lost_ranks():
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def sum_shards(self, whole: Tensor) -> Tensor:
        """[n] on every rank -> [n / size]: this rank's part of the sum over ranks."""
        shard = whole.new_empty(whole.numel() // self.size)
        with naming_lost_ranks():
            if boxes := _mailboxes_for(whole):
                boxes.sum(whole.view(self.size, -1), shard)
            else:
                _reduce_scatter(shard, whole)
        return shard

    def join_shards(self, shard: Tensor, out: Tensor | None = None) -> Tensor:
        """[n] on every rank -> [n * size], in rank order, on every rank; `out`, if given, is filled, and `shard` may be
        this rank's part of it."""
        whole = shard.new_empty(shard.numel() * self.size) if out is None else out
        with naming_lost_ranks():
            if boxes := _mailboxes_for(shard):
                boxes.join(shard, whole.view(self.size, -1))
            else:
                _gather(whole.view(torch.uint8), shard.view(torch.uint8))  # int16 is unknown to NCCL
        return whole

    def join_ahead(self, arrive: Callable[[], None], shard: Tensor, out: Tensor) -> Callable[[], None]:
        """`join_shards` of a shard on its way, beside what computes: `arrive` waits for it, on the device where it can,
        and calling the result waits for `out`. All ranks call this in one order, whatever else they send in between.

        On the CPUs of one machine shards are joined when the result is called: the same cores would do it.
        """
        if gathers := _gathers_for(shard):
            return gathers.start(arrive, shard, out)

        def join() -> None:
            arrive()
            self.join_shards(shard, out)

        return join

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on every rank. For small Python objects and CPU tensors."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with naming_lost_ranks():
            dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Any) -> Any:
        """The first rank's item, on every rank."""
        if self.size == 1:
            return item
        box = [item]
        with naming_lost_ranks():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def background(self) -> Any:
        """All ranks' process group on their CPUs, for collectives of one other thread: in a group of their own they
        cannot be taken for those of training. The first call makes it, on all ranks together."""
        global _background
        if _background is None:
            _background = dist.new_group(backend="gloo", timeout=PATIENCE)
        return _background

    def share_of(self, items: list[Any]) -> list[Any]:
        """This rank's share of a list that every rank holds: every size-th item, so long and short rows mix."""
        return items[self.rank :: self.size]


def exact_beside(device: torch.device) -> torch.device:
    """The device itself, or the CPU beside one that has no fp64: Apple's GPU."""
    return torch.device("cpu") if device.type == "mps" else device


def _local_index() -> int:
    """Which of the GPUs that this process sees is its own. Slurm can give every rank one, and hide the others."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return 0 if len(visible) == 1 and torch.cuda.device_count() == 1 else local


def _use_cores(device: torch.device) -> None:
    """This rank's share of the machine's cores, near its GPU; nothing where the user has chosen himself."""
    count = cores.threads(dict(os.environ))
    if count is None:
        return
    if device.type == "cuda":
        facts: Any = torch.cuda.get_device_properties(device)
        near = cores.bind(f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0")
        count = min(count, len(near) or count)
    torch.set_num_threads(count)


def _mailboxes_for(tensor: Tensor) -> shared_memory.Mailboxes | None:
    """The mailboxes, where all ranks are processes of one machine and the tensor is in its memory."""
    return _mailboxes if tensor.device.type == "cpu" else None


class Gathers:
    """Gathers beside everything else, in a thread and a process group of their own: [Note: one order of gathers]."""

    def __init__(self, like: Tensor) -> None:
        """On all ranks together; `like` is on their device."""
        self._group = dist.new_group(timeout=PATIENCE)
        self._stream = None if like.device.type == "cpu" else torch.Stream(like.device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gather")
        # NCCL connects a group at its first collective: this one, while no other thread sends.
        byte = like.new_zeros(1, dtype=torch.uint8)
        _gather(byte.new_zeros(dist.get_world_size()), byte, group=self._group)

    def start(self, arrive: Callable[[], None], shard: Tensor, out: Tensor) -> Callable[[], None]:
        """As World.join_ahead."""
        starting = self._thread.submit(self._start, arrive, shard, out)

        def join() -> None:
            gathering = starting.result()
            with naming_lost_ranks():
                gathering.wait()

        return join

    def _start(self, arrive: Callable[[], None], shard: Tensor, out: Tensor) -> dist.Work:
        """In the thread. On a GPU the gather follows the shard on a stream, and the thread goes on."""
        with self._stream or contextlib.nullcontext():
            arrive()
            with naming_lost_ranks():
                return _gather(out.view(torch.uint8), shard.view(torch.uint8), group=self._group, async_op=True)

    def close(self, well: bool) -> None:
        """`well`: every rank has begun all gathers when this returns, those that nobody waited for too."""
        self._thread.shutdown(wait=well, cancel_futures=not well)


def _gathers_for(tensor: Tensor) -> Gathers | None:
    """Those of the group that `World.join` began, where gathering ahead pays."""
    global _gathers
    if _heartbeat is None or _mailboxes_for(tensor):
        return None
    if _gathers is None:
        with naming_lost_ranks():
            _gathers = Gathers(tensor)
    return _gathers


def _begin(backend: str, rank: int, size: int) -> None:
    global _heartbeat, _mailboxes
    with _said(f"rank {rank} waits for all {size} ranks to start, for up to {PATIENCE}; is one of them missing?"):
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=PATIENCE))
        store = dist.PrefixStore(attempt(store, rank, size), store)
    _heartbeat = heartbeat.Heartbeat(dist.PrefixStore("heartbeat", store), rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    if backend == "gloo":
        _mailboxes = shared_memory.Mailboxes.among(rank, size)


@contextlib.contextmanager
def _said(text: str) -> Iterator[None]:
    """Says so when what is inside has taken as long as a rank may be silent."""
    say = functools.partial(print, f"penstock: {text}", file=sys.stderr, flush=True)
    timer = threading.Timer(heartbeat.SILENCE * heartbeat.BEAT, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def attempt(store: dist.Store, rank: int, size: int) -> str:
    """A name on which the ranks of this attempt agree, and no earlier one had. See [Note: a name per attempt]."""
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", own)
        answers = [store.get(f"{own}/{other}").decode() for other in range(1, size)]  # each waits for its rank
        store.set(f"{own}/all", " ".join(answers))
        return own
    while True:
        name = store.get("attempt").decode()
        store.set(f"{name}/{rank}", own)
        if store.check([f"{name}/all"]) and own in store.get(f"{name}/all").decode():
            return name
        time.sleep(0.02)


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Wraps collectives, PyTorch's own among them (FSDP2's): an error of their backend becomes a ResourceError that
    names the rank that is gone. An error with another cause stays as it is."""
    try:
        yield
    except RuntimeError as error:
        lost = lost_ranks(error)
        if lost is None:
            raise
        raise lost from error


def lost_ranks(error: BaseException | None) -> ResourceError | None:
    """What names the rank that is gone, where an error (of a collective, or of nothing at all) may come of that."""
    gone = _heartbeat.missing() if _heartbeat is not None and isinstance(error, RuntimeError) else None
    return None if gone is None else ResourceError(heartbeat.advice(gone))
