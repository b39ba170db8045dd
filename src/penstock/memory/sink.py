"""Where gradients go: added up at home, chunk by chunk, clipped by one norm, and turned into an update where the
optimizer's state lives.

States on a disk pass through three sets of small buffers in RAM: one is read ahead, one is updated, one is written.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from penstock.distributed.world import World
from penstock.memory.adamw import AdamW, join, narrow, split, sum_of_squares, widen
from penstock.memory.chunks import Weight
from penstock.memory.homes import CPU, ChunkHome, bring, gather, put_back
from penstock.memory.plan import PIECE, SETS
from penstock.memory.tiers import DiskHome, Home, RamHome, worker
from penstock.memory.transfer import Offload

SAVED = ("master", "exp_avg", "exp_avg_sq")
"""What a checkpoint keeps per weight, fp32, whatever the strategy and the world."""


class Sink:
    """The gradients and optimizer states of one model. `homes` are its trained chunks, in order."""

    def __init__(
        self, homes: Sequence[ChunkHome], world: World, rule: AdamW, buffers: Callable[[], list[Tensor]]
    ) -> None:
        self.homes, self.world, self.rule = list(homes), world, rule
        self.steps = 0
        """Updates so far: AdamW's count."""
        self._buffers = buffers
        """plan.SETS runs of plan.SET_BYTES in RAM, shared by all models."""
        self._leaving: dict[ChunkHome, Offload] = {}
        """Gradients on their way to host memory."""
        self._reader = worker("update-read")
        self._writer = worker("update-write")

    # --- gradients ----------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Before a step: what the homes of gradients hold no longer counts."""
        for one in self.homes:
            one.graded = False
            if one.in_place:
                assert isinstance(one.grads, RamHome)
                one.grads.tensor.zero_()

    def open(self, one: ChunkHome, grads: Tensor) -> None:
        """Before a visit: makes `grads`, [numel] on the device, ready for autograd to add to."""
        if one.graded and self.world.size == 1:
            assert one.grads is not None
            if one in self._leaving:
                self._leaving[one].wait()
            one.grads.read(grads)  # a second visit goes on adding where the first one stopped
        else:
            grads.zero_()

    def settle(self, one: ChunkHome, grads: Tensor) -> Offload | None:
        """After a visit: takes its gradients home, reduced over ranks, this rank's shard.

        Returns what whoever writes to `grads` next must wait for; None: they have left.
        """
        assert one.grads is not None
        graded, one.graded = one.graded, True
        if self.world.size == 1 and grads.device.type != "cpu" and isinstance(one.grads, RamHome):
            self._leaving[one] = Offload(grads, one.grads.tensor, one.grads.tier)
            return self._leaving[one]
        if self.world.size > 1:
            mine = self.world.sum_shards(grads)
            if graded:
                mine += bring(one.grads, mine.device)
            grads = mine
        with record_function("link.settle"):
            one.grads.write(grads)
        return None

    def sum_over_ranks(self) -> None:
        """After the backward passes: whole gradients become the sum over ranks; sharded ones are that already."""
        for leaving in self._leaving.values():
            leaving.arrive()
        self._leaving.clear()
        for one in self.homes:
            if one.grads_whole and self.world.size > 1:
                assert isinstance(one.grads, RamHome)
                self.world.sum(one.grads.tensor)

    def norm(self) -> Tensor:
        """Global 2-norm over everything trained and over ranks, fp32 scalar (PPO.md 17).

        Squares are added up chunk by chunk in fp64, in the same order on every tier.
        """
        shared = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for one in self.homes:
            here = one.grads.tensor.device if isinstance(one.grads, RamHome) else CPU  # 4 bytes travel, not the chunk
            shared += sum_of_squares(self._own_gradients(one, here)).to(shared.device)
        if any(not one.grads_whole or one.split for one in self.homes):
            shared = self.world.sum(shared)
        return shared.sqrt().float()

    def _own_gradients(self, one: ChunkHome, device: torch.device) -> Tensor:
        """The gradients of this rank's share of the chunk, summed over ranks."""
        assert one.grads is not None
        if not (one.graded or one.in_place):  # nothing of this chunk took part
            return torch.zeros(one.share.stop - one.share.start, dtype=one.dtype, device=device)
        if one.grads_whole and isinstance(one.grads, RamHome):
            return one.grads.tensor[one.share].to(device)
        return bring(one.grads, device)

    # --- update -------------------------------------------------------------------------------------------------------

    def update(self, lr: float, scale: float) -> None:
        """One AdamW update of every chunk, where its state lives, with gradients times `scale`."""
        self.steps += 1
        move = {"lr": lr, "scale": scale, "step": self.steps}
        for one in self.homes:
            if not _homes_on_disk(one):
                with record_function(f"update.{one.chunk.group}"):
                    self._update_in_ram(one, move)
        self._update_on_disk([one for one in self.homes if _homes_on_disk(one)], move)

    def _update_in_ram(self, one: ChunkHome, move: dict[str, Any]) -> None:
        device = next(home.tensor.device for home in one.states.values() if isinstance(home, RamHome))
        states = {name: bring(home, device) for name, home in one.states.items()}
        whole = bring(one.weights, device)
        weights = whole[one.share] if one.whole else whole
        self.rule.update(weights, states, self._own_gradients(one, device), **move)
        if one.whole and one.split:  # ZeRO-1 and 2: every rank has all weights and moves its share of them
            if whole.device.type == self.world.device.type:
                self.world.join_shards(weights, whole)
            else:
                whole = gather(weights, self.world)
        put_back(one.weights, whole)

    def _update_on_disk(self, stored: Sequence[ChunkHome], move: dict[str, Any]) -> None:
        """Piece by piece; while one is updated the next is read and the last one written."""
        pieces = [
            (one, start, min(start + PIECE, one.share.stop - one.share.start))
            for one in stored
            for start in range(0, one.share.stop - one.share.start, PIECE)
        ]
        writing: list[Future | None] = [None] * SETS

        def read(i: int) -> dict[str, Tensor]:
            one, start, stop = pieces[i]
            written = writing[i % SETS]
            if written is not None:
                written.result()  # the buffers' previous piece is on the disk
            here, at = {}, 0
            for name, home in _homes(one).items():
                first, last = start // one.per(name), stop // one.per(name)
                if isinstance(home, RamHome):
                    here[name] = home.tensor[first:last]
                else:
                    end = at + (last - first) * home.dtype.itemsize
                    here[name] = buffers[i % SETS][at:end].view(home.dtype)
                    home.read(here[name], first)
                    at = end
            return here

        if not pieces:
            return
        buffers = self._buffers()
        reading: Future | None = self._reader.submit(read, 0)
        gradients: tuple[ChunkHome, Tensor] | None = None
        for i, (one, start, stop) in enumerate(pieces):
            assert reading is not None
            here = reading.result()
            reading = self._reader.submit(read, i + 1) if i + 1 < len(pieces) else None
            if gradients is None or gradients[0] is not one:
                gradients = (one, self._own_gradients(one, CPU))
            states = {name: tensor for name, tensor in here.items() if name != "weights"}
            with record_function(f"update.{one.chunk.group}"):
                self.rule.update(here["weights"], states, gradients[1][start:stop], **move)
            writing[i % SETS] = self._writer.submit(_write, one, here, start)
        for last in writing:
            if last is not None:
                last.result()

    # --- states by weight name ----------------------------------------------------------------------------------------

    def saved_states(self) -> Iterator[Tensor]:
        """Every weight's `SAVED` states, whole, fp32, on the CPU. Where ranks share, all of them go through it."""
        for one in self.homes:
            whole = widen(one.whole_states(self.world))
            weights = one.whole_weights(self.world)
            if "remainder" in whole:
                master = torch.empty(one.chunk.numel)
                join(weights, whole.pop("remainder"), master)
                weights = master
            whole["master"] = weights
            for weight, offset in zip(one.chunk.weights, one.chunk.offsets, strict=True):
                for name in SAVED:
                    yield whole[name][offset : offset + weight.numel].view(weight.shape)

    def load_states(self, read: Callable[[str, str], Tensor]) -> None:
        """Inverse of `saved_states`, bit by bit: `read(weight name, state name)` gives a whole tensor.

        Raises ValueError when they belong to another model.
        """
        for one in self.homes:
            whole = {name: torch.zeros(one.chunk.numel) for name in SAVED}
            for weight, offset in zip(one.chunk.weights, one.chunk.offsets, strict=True):
                for name, tensor in whole.items():
                    found = read(weight.name, name)
                    if found.shape != weight.shape:
                        raise ValueError("the optimizer state in the checkpoint belongs to a model of another size")
                    tensor[offset : offset + weight.numel] = found.flatten()
            weights = whole.pop("master")
            if "remainder" in one.states:
                high = torch.empty(one.chunk.numel, dtype=one.dtype)
                whole["remainder"] = torch.empty(one.chunk.numel, dtype=torch.int16)
                split(weights, high, whole["remainder"])
                weights = high
            if "exp_avg_scale" in one.states:
                whole = narrow(whole)
            for name, home in one.states.items():
                home.write(whole[name][one.share.start // one.per(name) : one.share.stop // one.per(name)])
            one.weights.write(weights if one.whole else weights[one.share])

    @property
    def weights(self) -> list[Weight]:
        """The trained weights, in the order of `saved_states`."""
        return [weight for one in self.homes for weight in one.chunk.weights]


def _homes(one: ChunkHome) -> dict[str, Home]:
    return {"weights": one.weights, **one.states}


def _homes_on_disk(one: ChunkHome) -> bool:
    return any(isinstance(home, DiskHome) for home in _homes(one).values())


def _write(one: ChunkHome, here: dict[str, Tensor], start: int) -> None:
    for name, home in _homes(one).items():
        if isinstance(home, DiskHome):
            home.write(here[name], start // one.per(name))
