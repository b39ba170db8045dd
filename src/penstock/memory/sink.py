"""Where gradients go: summed at home chunk by chunk, clipped by one norm, and used for an update where the optimizer's
state lives.

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
from penstock.memory.homes import CPU, ChunkHome, bring, gather, put_back, rounded, unrounded
from penstock.memory.plan import PIECE, SETS
from penstock.memory.tiers import DiskHome, Home, Offload, RamHome, worker

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
        """Before a step: the homes' gradients become zero or invalid."""
        for home in self.homes:
            home.graded = False
            if home.in_place:
                assert home.grads is not None
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

    def settle(self, home: ChunkHome, grads: Tensor) -> Offload | None:
        """After a visit: takes its gradients home, reduced over ranks in fp32, this rank's shard.

        Returns the copy that the next writer to `grads` must wait for; None: the copy is done.
        """
        assert home.grads is not None
        graded, home.graded = home.graded, True
        if self.world.size > 1:
            grads = self.world.sum(grads) if home.grads_whole else self.world.sum_shards(grads)
            if graded:
                grads += bring(home.grads, grads.device)
        grads = rounded(grads, home.grads.tensor.dtype)
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
            if home.in_place and self.world.size > 1:
                assert home.grads is not None
                self.world.sum(home.grads.tensor)

    def norm(self) -> Tensor:
        """Global 2-norm over everything trained and over ranks, fp32 scalar (PPO.md 17).

        Squares are added up chunk by chunk in fp64, in the same order on every tier.
        """
        squares = torch.zeros((), dtype=torch.float64, device=self.world.exact)
        for home in self.homes:
            # Where the gradients are: 4 bytes travel, not the chunk.
            device = CPU if home.grads is None else home.grads.tensor.device
            squares += sum_of_squares(self._own_gradients(home, device)).to(squares.device)
        if any(not home.grads_whole or home.split for home in self.homes):
            squares = self.world.sum(squares)
        return squares.sqrt().float().to(self.world.device)

    def _own_gradients(self, home: ChunkHome, device: torch.device) -> Tensor:
        """The gradients of this rank's share of the chunk, summed over ranks."""
        assert home.grads is not None
        if not (home.graded or home.in_place):  # no loss depends on this chunk
            return torch.zeros(home.share_numel, dtype=home.grads.tensor.dtype, device=device)
        if home.grads_whole:
            return home.grads.tensor[home.share].to(device)
        return bring(home.grads, device)

    # --- update -------------------------------------------------------------------------------------------------------

    def update(self, lr: float, scale: float) -> None:
        """One AdamW update of every chunk, where its state lives, with gradients times `scale`."""
        self.steps += 1
        move = {"lr": lr, "scale": scale, "step": self.steps}
        for home in self.homes:
            if not _on_disk(home):
                with record_function(f"update.{home.chunk.group}"):
                    self._update_in_ram(home, move)
        self._update_on_disk([home for home in self.homes if _on_disk(home)], move)

    def _update_in_ram(self, home: ChunkHome, move: dict[str, Any]) -> None:
        device = next(state.tensor.device for state in home.states.values() if isinstance(state, RamHome))
        states = {name: bring(state, device) for name, state in home.states.items()}
        whole = bring(home.weights, device)
        weights = whole[home.share] if home.whole else whole
        self.rule.decay(weights, states, _decaying(home, 0, home.share_numel), move["lr"])
        self.rule.update(weights, states, self._own_gradients(home, device), **move)
        if home.whole and home.split:  # ZeRO-1 and 2: every rank has all weights and moves its share of them
            if whole.device.type == self.world.device.type:
                self.world.join_shards(weights, whole)
            else:
                whole = gather(weights, self.world)
        put_back(home.weights, whole)

    def _update_on_disk(self, homes: Sequence[ChunkHome], move: dict[str, Any]) -> None:
        """Piece by piece; while one is updated the next is read and the last one is written."""
        pieces = [
            (home, start, min(start + PIECE, home.share_numel))
            for home in homes
            for start in range(0, home.share_numel, PIECE)
        ]
        writing: list[Future | None] = [None] * SETS

        def read(i: int) -> dict[str, Tensor]:
            home, start, stop = pieces[i]
            written = writing[i % SETS]
            if written is not None:
                written.result()  # the buffers' previous piece is on the disk
            tensors, at = {}, 0
            for name, part in _tensor_homes(home).items():
                first, last = start // home.per(name), stop // home.per(name)
                if isinstance(part, RamHome):
                    tensors[name] = part.tensor[first:last]
                else:
                    end = at + (last - first) * part.dtype.itemsize
                    tensors[name] = buffers[i % SETS][at:end].view(part.dtype)
                    part.read(tensors[name], first)
                    at = end
            return tensors

        if not pieces:
            return
        buffers = self._buffers()
        reading: Future | None = self._reader.submit(read, 0)
        gradients: tuple[ChunkHome, Tensor] | None = None
        for i, (home, start, stop) in enumerate(pieces):
            assert reading is not None
            tensors = reading.result()
            reading = self._reader.submit(read, i + 1) if i + 1 < len(pieces) else None
            if gradients is None or gradients[0] is not home:
                gradients = (home, self._own_gradients(home, CPU))
            states = {name: tensor for name, tensor in tensors.items() if name != "weights"}
            with record_function(f"update.{home.chunk.group}"):
                self.rule.decay(tensors["weights"], states, _decaying(home, start, stop), move["lr"])
                self.rule.update(tensors["weights"], states, gradients[1][start:stop], **move)
            writing[i % SETS] = self._writer.submit(_write, home, tensors, start)
        for written in writing:
            if written is not None:
                written.result()

    # --- states by weight name ----------------------------------------------------------------------------------------

    def saved_states(self) -> Iterator[Tensor]:
        """Every weight's `SAVED` states, whole, fp32, on the CPU. Where ranks share, all of them go through it."""
        for home in self.homes:
            whole = widen(home.whole_states(self.world))
            weights = home.whole_weights(self.world)
            if "remainder" in whole:
                master = torch.empty(home.chunk.numel)
                join(weights, whole.pop("remainder"), master)
                weights = master
            whole["master"] = weights
            for weight, offset in zip(home.chunk.weights, home.chunk.offsets, strict=True):
                for name in SAVED:
                    yield whole[name][offset : offset + weight.numel].view(weight.shape)

    def load_states(self, read: Callable[[str, str], Tensor]) -> None:
        """Inverse of `saved_states`, bit by bit: `read(weight name, state name)` gives a whole tensor.

        Raises ValueError when they belong to another model.
        """
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

    def shards(self) -> dict[str, Tensor]:
        """This rank's parts of what `saved_states` gives whole, by weight.state, where PyTorch can write and read them
        as they lie; else nothing."""
        return {}

    @property
    def collective(self) -> bool:
        """Whether `saved_states` is a collective."""
        return any(not home.whole or home.split for home in self.homes)

    @property
    def weights(self) -> list[Weight]:
        """The trained weights, in the order of `saved_states`."""
        return [weight for home in self.homes for weight in home.chunk.weights]


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


def _write(home: ChunkHome, tensors: dict[str, Tensor], start: int) -> None:
    for name, part in _tensor_homes(home).items():
        if isinstance(part, DiskHome):
            part.write(tensors[name], start // home.per(name))
