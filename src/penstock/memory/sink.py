"""Where gradients go: summed at home chunk by chunk, clipped by one norm, and used for an update where the optimizer's
state lives.

States on a disk pass through three sets of small buffers in RAM: one is read ahead, one is updated, one is written.

[Note: updates overlap] The clip factor needs the norm, so no update can begin before backward has ended. But
what follows does not need all chunks at once: a forward needs them one after the other. So where updates do not run on
the device that computes, or wait for a disk, a thread makes them in the order of the next forward. Whoever reads a
chunk, or writes to memory that its update still reads (actor and critic share theirs), waits for that chunk's update
alone. The bits are those of the serial order. Updates that end in a collective stay where they were: ranks must not
differ in the order of collectives. On a CPU an update in host memory stays too: the same cores would make it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from penstock.distributed.world import World
from penstock.memory.adamw import AdamW, join, narrow, split, sum_of_squares, widen
from penstock.memory.chunks import Weight
from penstock.memory.homes import CPU, ChunkHome, bring, rounded, unrounded
from penstock.memory.plan import PIECE, SETS
from penstock.memory.prepare import Homes
from penstock.memory.tiers import DiskHome, Home, Offload, RamHome, bring_home, copy_ahead, worker

SAVED = ("master", "exp_avg", "exp_avg_sq")
"""What a checkpoint keeps per weight, fp32, whatever the strategy and the world."""


@dataclass(eq=False)
class Update:
    """One chunk's part in an update that another thread makes."""

    home: ChunkHome
    graded: bool
    """`ChunkHome.graded` when the update was asked for: a next step may have begun."""
    done: Future = field(default_factory=Future)


class Sink:
    """The gradients and optimizer states of one model. `homes` are its trained chunks, in order."""

    def __init__(self, homes: Sequence[ChunkHome], world: World, rule: AdamW, memory: Homes) -> None:
        """`memory`: what all models of the rank share."""
        self.homes, self.world, self.rule = list(homes), world, rule
        self.steps = 0
        """Updates so far: AdamW's count."""
        self._memory = memory
        self._squares: dict[ChunkHome, Tensor] = {}
        """Sums of squares of gradients that were whole when they left, fp64 scalars where they were."""
        self._leaving: dict[ChunkHome, Offload] = {}
        """Gradients on their way to host memory."""
        self._reader = worker("update-read")
        self._writer = worker("update-write")

    # --- gradients ----------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Before a step: the homes' gradients become invalid."""
        self._squares.clear()
        for home in self.homes:
            home.graded = False

    def zero(self, home: ChunkHome) -> None:
        """Before a step's first visit: zeroes gradients that autograd adds to where they live."""
        if home.in_place and not home.graded:
            assert home.grads is not None
            home.reader.wait()
            home.grads.tensor.zero_()

    def open(self, home: ChunkHome, grads: Tensor) -> None:
        """Before a visit: makes `grads`, [numel] fp32 on the device, ready for autograd to add to."""
        if home.graded and self.world.size == 1:
            assert home.grads is not None
            if home in self._leaving:
                self._leaving[home].wait()
            unrounded(grads, home.grads)  # a second visit goes on adding where the first one stopped
        else:
            grads.zero_()

    def settle(self, home: ChunkHome, grads: Tensor, last: bool = False) -> Offload | None:
        """After a visit: takes its gradients home, reduced over ranks in fp32, this rank's shard. `last`: more will not
        be added in this step, and the norm's squares are taken while they are at hand.

        Returns the copy that the next writer to `grads` must wait for; None: the copy is done.
        """
        assert home.grads is not None
        home.reader.wait()
        graded, home.graded = home.graded, True
        if self.world.size > 1:
            grads = self.world.sum(grads) if home.grads_whole else self.world.sum_shards(grads)
            if graded:
                grads += self._on_device(home.grads)
        grads = rounded(grads, home.grads.tensor.dtype)
        self._squares.pop(home, None)
        if last:
            self._squares[home] = sum_of_squares(grads[home.share] if home.grads_whole else grads)
        if self.world.size == 1 and grads.device.type != "cpu":
            self._leaving[home] = Offload(grads, home.grads.tensor, home.grads.tier)
            return self._leaving[home]
        with record_function("link.settle"):
            home.grads.write(grads)
        return None

    def sum_over_ranks(self) -> None:
        """After the backward passes: gradients become the sum over ranks; those that passed through a slot are it."""
        for leaving in self._leaving.values():
            leaving.arrive()
        self._leaving.clear()
        for home in self.homes:
            self.zero(home)  # those that no loss depends on
            if home.in_place and self.world.size > 1:
                assert home.grads is not None
                self.world.sum(home.grads.tensor)

    def norm(self) -> Tensor:
        """Global 2-norm over everything trained and over ranks, fp32 scalar (PPO.md 17).

        Squares are added up chunk by chunk in fp64, in the same order on every tier.
        """
        squares = torch.zeros((), dtype=torch.float64, device=self.world.exact)
        for home in self.homes:
            own = self._squares.get(home)
            if own is None:  # where the gradients are: a number travels, not the chunk
                own = sum_of_squares(self._own_gradients(home, home.graded))
            squares += own.to(squares.device)
        if any(not home.grads_whole or home.split for home in self.homes):
            squares = self.world.sum(squares)
        return squares.sqrt().float().to(self.world.device)

    def _own_gradients(self, home: ChunkHome, graded: bool) -> Tensor:
        """The gradients of this rank's share of the chunk, summed over ranks, where they are."""
        assert home.grads is not None
        if not (graded or home.in_place):  # no loss depends on this chunk
            return torch.zeros(home.share_numel, dtype=home.grads.tensor.dtype, device=home.grads.tensor.device)
        return home.grads.tensor[home.share] if home.grads_whole else home.grads.tensor

    @contextlib.contextmanager
    def _gradients_at(self, grads: Tensor, home: ChunkHome, tier: str) -> Iterator[Tensor]:
        """Inside, a piece of a home's gradients is in the memory where the update runs."""
        assert home.grads is not None
        if home.grads.tier.name == tier:
            yield grads
        elif tier == "device":
            yield self._on_device(RamHome(home.grads.tier, grads))
        else:
            with self._memory.passing:
                landed = self._memory.landing()[: grads.nbytes].view(grads.dtype)
                bring_home(grads, landed, self._memory.host)
                yield landed

    def _on_device(self, grads: RamHome) -> Tensor:
        """A home's gradients: itself, or a copy."""
        if grads.tier.name == "device":
            return grads.tensor
        copied = torch.empty_like(grads.tensor, device=self.world.device)
        grads.read(copied)
        return copied

    # --- update -------------------------------------------------------------------------------------------------------

    def update(self, lr: float, scale: float) -> None:
        """One AdamW update of every chunk, where its state lives, with gradients times `scale`. It may return while a
        thread goes on: see [Note: updates overlap]."""
        self.wait()  # an update that failed is not followed by another
        self.steps += 1
        move = {"lr": lr, "scale": scale, "step": self.steps}
        later = [Update(home, home.graded) for home in self.homes if overlaps(home, self.world.device)]
        if later:
            if any(_on_disk(update.home) for update in later):
                self._memory.update_buffers()  # raises where they have no room
            for update in later:
                update.home.update.future = update.home.reader.future = update.done
            self._memory.updates.submit(self._update_in_thread, later, move)
        for home in self.homes:
            if not overlaps(home, self.world.device):
                self._update_in_ram(home, home.graded, move)

    def wait(self) -> None:
        """Returns when every update is done. Raises what one of them raised."""
        for home in self.homes:
            home.update.wait()

    def _update_in_thread(self, updates: Sequence[Update], move: dict[str, Any]) -> None:
        """In a thread of its own: those in RAM, then those on a disk, each in visit order.

        An error goes to whoever waits for a chunk whose update did not end.
        """
        device = self.world.device
        try:
            # Copies between host and device on a stream of their own do not wait for what computes.
            with contextlib.nullcontext() if device.type == "cpu" else self._memory.update_stream:
                for update in updates:
                    if not _on_disk(update.home):
                        self._update_in_ram(update.home, update.graded, move)
                        if device.type != "cpu":
                            torch.accelerator.current_stream(device).synchronize()  # a shadow's copy to the device
                        update.done.set_result(None)
            self._update_on_disk([update for update in updates if _on_disk(update.home)], move)
        except BaseException as error:
            self._reader.submit(bool).result()  # behind what still reads and writes: buffers are free then
            self._writer.submit(_fail, updates, error).result()

    def _update_in_ram(self, home: ChunkHome, graded: bool, move: dict[str, Any]) -> None:
        with record_function(f"update.{home.chunk.group}"):
            self._move_in_ram(home, graded, move)

    def _move_in_ram(self, home: ChunkHome, graded: bool, move: dict[str, Any]) -> None:
        states = {name: state for name, state in home.states.items() if isinstance(state, RamHome)}
        tier = next(iter(states.values())).tier.name
        weights = home.own_weights if home.shadow is None else home.shadow.tensor
        grads = self._own_gradients(home, graded)
        assert home.grads is not None
        length = home.share_numel if home.grads.tier.name == tier else PIECE
        for start in range(0, home.share_numel, length):
            stop = min(start + length, home.share_numel)
            parts = {
                name: state.tensor[start // home.per(name) : stop // home.per(name)] for name, state in states.items()
            }
            with self._gradients_at(grads[start:stop], home, tier) as piece:
                self._apply(home, start, weights[start:stop], parts, piece, move)
        if home.shadow is not None:
            copy_ahead(weights, home.own_weights, home.shadow.tier)()  # the device waits for it, not Python
        if home.whole and home.split:  # ZeRO-1 and 2: every rank has all weights and moves its share of them
            assert isinstance(home.weights, RamHome)
            self.world.join_shards(home.own_weights, home.weights.tensor)

    def _apply(
        self, home: ChunkHome, start: int, weights: Tensor, states: dict[str, Tensor], grads: Tensor,
        move: dict[str, Any],
    ) -> None:  # fmt: skip
        """Moves the elements from `start` on of this rank's share, all tensors in one memory."""
        self.rule.decay(weights, states, _decaying(home, start, start + len(weights)), move["lr"])
        self.rule.update(weights, states, grads, **move)

    def _update_on_disk(self, updates: Sequence[Update], move: dict[str, Any]) -> None:
        """Piece by piece; while one is updated the next is read and the last one is written."""
        pieces = [
            (update, start, min(start + PIECE, update.home.share_numel))
            for update in updates
            for start in range(0, update.home.share_numel, PIECE)
        ]
        writing: list[Future | None] = [None] * SETS
        of_chunk: list[Future] = []

        def read(i: int) -> dict[str, Tensor]:
            update, start, stop = pieces[i]
            home = update.home
            written = writing[i % SETS]
            if written is not None:
                written.result()  # the buffers' previous piece is on the disk
            tensors, at = {}, 0
            for name, part in _tensor_homes(home).items():
                first, last = start // home.per(name), stop // home.per(name)
                if isinstance(part, RamHome) and part.tier.name == "host":
                    tensors[name] = part.tensor[first:last]
                else:
                    end = at + (last - first) * part.dtype.itemsize
                    tensors[name] = buffers[i % SETS][at:end].view(part.dtype)
                    part.read(tensors[name], first)
                    at = end
                    if isinstance(part, RamHome):  # weights on the device come down
                        self._memory.host.bytes_written += tensors[name].nbytes
            return tensors

        if not pieces:
            return
        buffers = self._memory.update_buffers()
        reading: Future | None = self._reader.submit(read, 0)
        for i, (update, start, stop) in enumerate(pieces):
            assert reading is not None
            home = update.home
            tensors = reading.result()
            reading = self._reader.submit(read, i + 1) if i + 1 < len(pieces) else None
            if start == 0:
                gradients = self._own_gradients(home, update.graded)
            states = {name: tensor for name, tensor in tensors.items() if name != "weights"}
            piece = self._gradients_at(gradients[start:stop], home, "host")
            with record_function(f"update.{home.chunk.group}"), piece as grads:
                self._apply(home, start, tensors["weights"], states, grads, move)
            of_chunk.append(self._writer.submit(self._write, home, tensors, start))
            writing[i % SETS] = of_chunk[-1]
            if stop == home.share_numel:
                self._writer.submit(_end, update, of_chunk)
                of_chunk = []
        for written in writing:
            if written is not None:
                written.result()

    def _write(self, home: ChunkHome, tensors: dict[str, Tensor], start: int) -> None:
        for name, part in _tensor_homes(home).items():
            if isinstance(part, DiskHome) or part.tier.name == "device":
                part.write(tensors[name], start // home.per(name))
                if isinstance(part, RamHome):
                    self._memory.host.bytes_read += tensors[name].nbytes

    # --- states by weight name ----------------------------------------------------------------------------------------

    def saved_states(self) -> Iterator[Tensor]:
        """Every weight's `SAVED` states, whole, fp32, on the CPU. Where ranks share, all of them go through it."""
        for home in self.homes:
            whole = _saved(home.whole_weights(self.world), home.whole_states(self.world))
            for weight, offset in zip(home.chunk.weights, home.chunk.offsets, strict=True):
                for name in SAVED:
                    yield whole[name][offset : offset + weight.numel].view(weight.shape)

    def load_states(self, read: Callable[[str, str], Tensor]) -> None:
        """Inverse of `saved_states`, bit by bit: `read(weight name, state name)` gives a whole tensor.

        Raises ValueError when they belong to another model.
        """
        self.wait()
        for home in self.homes:
            whole = {name: torch.zeros(home.chunk.numel) for name in SAVED}
            for weight, offset in zip(home.chunk.weights, home.chunk.offsets, strict=True):
                for name, tensor in whole.items():
                    saved = read(weight.name, name)
                    if saved.shape != weight.shape:
                        raise ValueError("the optimizer state in the checkpoint belongs to a model of another size")
                    tensor[offset : offset + weight.numel] = saved.flatten()
            weights = whole.pop("master")
            if "remainder" in home.states:
                high = torch.empty(home.chunk.numel, dtype=home.dtype)
                whole["remainder"] = torch.empty(home.chunk.numel, dtype=torch.int16)
                split(weights, high, whole["remainder"])
                weights = high
            if "exp_avg_scale" in home.states:
                whole = narrow(whole)
            for name, state in home.states.items():
                state.write(whole[name][home.share.start // home.per(name) : home.share.stop // home.per(name)])
            home.weights.write(weights if home.whole else weights[home.share])
            if home.shadow is not None:
                home.shadow.write(weights[home.share])

    def shards(self) -> dict[str, Tensor]:
        """This rank's parts of what `saved_states` gives whole, by weight.state, where they are PyTorch's own tensors,
        which it writes and reads as they lie; else nothing, see `own_states`."""
        return {}

    staged = False
    """Whether host memory has room for copies of `shards`: a checkpoint is then written from them, beside training."""

    @property
    def collective(self) -> bool:
        """Whether `saved_states` is a collective."""
        return any(not home.whole or home.split for home in self.homes)

    @property
    def weights(self) -> list[Weight]:
        """The trained weights, in the order of `saved_states`."""
        return [weight for home in self.homes for weight in home.chunk.weights]


def own_states(home: ChunkHome) -> dict[str, Tensor]:
    """This rank's share of the chunk's `SAVED` states, fp32 on the CPU: [share_numel] each."""
    home.update.wait()
    weights = bring(home.weights, CPU)
    states = {name: bring(state, CPU) for name, state in home.states.items()}
    return _saved(weights[home.share] if home.whole else weights, states)


def _saved(weights: Tensor, states: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint keeps of a run of weights, by SAVED."""
    saved = widen(states)
    if "remainder" in saved:
        master = torch.empty(len(weights))
        join(weights, saved.pop("remainder"), master)
        weights = master
    return {**saved, "master": weights}


def _tensor_homes(home: ChunkHome) -> dict[str, Home]:
    return {"weights": home.weights, **home.states}


def _decaying(home: ChunkHome, start: int, stop: int) -> Iterator[slice]:
    """Runs of elements that decay, of those from `start` to `stop` of this rank's share."""
    begin = home.share.start + start
    for run in home.chunk.decaying:
        part = slice(max(run.start - begin, 0), min(run.stop - begin, stop - start))
        if part.start < part.stop:
            yield part


def _on_disk(home: ChunkHome) -> bool:
    return any(isinstance(part, DiskHome) for part in _tensor_homes(home).values())


def overlaps(home: ChunkHome, device: torch.device) -> bool:
    """Whether a chunk's update need not keep what computes on `device` waiting."""
    if home.whole and home.split:  # it ends in a collective
        return False
    in_ram = (state.tensor for state in home.states.values() if isinstance(state, RamHome))
    return _on_disk(home) or any(tensor.device.type != device.type for tensor in in_ram)


def _end(update: Update, writes: Sequence[Future]) -> None:
    """Behind a chunk's last write."""
    for write in writes:
        write.result()
    update.done.set_result(None)


def _fail(updates: Sequence[Update], error: BaseException) -> None:
    for update in updates:
        if not update.done.done():
            update.done.set_exception(error)
