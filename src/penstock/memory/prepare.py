"""Models become homes: each chunk's weights, optimizer states and gradients get memory, and weights their first values.

`Homes` is what all models of a rank have in common here: frozen chunks that several models are made of, memory for
gradients, buffers between a disk and the update.

[Note: shared bases] A weight on `meta` has a recipe: a checkpoint, or a seed. Frozen chunks of equal recipes are one
`ChunkHome`, whichever models they are for: actor, reference, critic and reward model with adapters, or full models that
freeze the same first blocks (trained blocks are copies). Where such weights move, these models go through them side by
side (`Strategy.step_all`), and each block is fetched once for all.
"""

import functools
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from penstock.distributed.world import World
from penstock.memory import plan
from penstock.memory.adamw import states_of
from penstock.memory.chunks import Chunk, Weight
from penstock.memory.homes import ChunkHome, Pending
from penstock.memory.placement import Row
from penstock.memory.program import owners
from penstock.memory.schedule import together_of
from penstock.memory.tiers import Disk, Home, Ram, RamHome, Ring, empty_pages, worker

CPU = torch.device("cpu")


def groups_of(model: Any) -> list[tuple[str, list[Weight]]]:
    """What the plan needs to know of a model's weights, group by group."""
    owner_of = owners(model)
    return [(group, [_weight(model, name, owner_of[name]) for name in names]) for group, names in model.groups()]


def _weight(model: Any, name: str, owner: tuple[nn.Module, str]) -> Weight:
    parameter = getattr(*owner)
    dtype = str(parameter.dtype).removeprefix("torch.")
    return Weight(name, tuple(parameter.shape), dtype, parameter.requires_grad, model.recipe(name))


class Homes:
    """The homes of all models of one rank."""

    def __init__(self, world: World, tiers: Mapping[str, Ram | Disk]) -> None:
        self.world, self.tiers = world, tiers
        self._shared: dict[Hashable, ChunkHome] = {}
        """Frozen chunks by `Chunk.shared`."""
        self._gradients: list[RamHome] = []
        """Memory for one chunk's gradients each; one model at a time uses it."""
        self._readers: list[Pending] = []
        """Of each of them, the update that still reads it."""
        self._groups: list[tuple[set[Hashable], set[int]]] = []
        """Trained models that share weights: keys of these, and which of `_gradients` such models use."""
        self._models = 0
        """So many were made."""
        self._buffers: list[Tensor] = []
        self._landing: Tensor | None = None
        self.passing = threading.Lock()
        """Held while gradients pass through `landing`: a thread and whoever updates beside it have one."""
        self._staging: Tensor | None = None
        """Where first values are made that belong elsewhere than in host memory; only while models are prepared."""

    def check(self, placed: Sequence[plan.Placed], owner: str) -> None:
        """Raises ResourceError where a model's homes would pass a tier's budget."""
        used = self._used_gradients(placed)
        pooled = sum(home.tensor.nbytes for i, home in enumerate(self._gradients) if i not in used)
        for tier, nbytes in plan.homes([placed], self.world.size, pooled, self._shared).items():
            self.tiers[tier].check(nbytes, owner)

    def make(self, model: Any, placed: Sequence[plan.Placed], visits: Sequence[Sequence[str]]) -> list[ChunkHome]:
        """A model's homes on this rank, with its first weights in them; `visits` as in plan.Layout."""
        before = self._used_gradients(placed)
        used, owner_of, together = set(before), owners(model), together_of(visits)
        self._models += 1
        homes = []
        with model.filling():
            for chunk, row in ((each.chunk, each.row) for each in placed):
                home = None if chunk.shared is None else self._shared.get(chunk.shared)
                if home is None:
                    fill = partial(first_values, model, owner_of, chunk)
                    home = self._home(fill, chunk, row, used, f"of {type(model).__name__} {chunk.group}")
                    home.visits = (self._models, together.get(chunk.group))
                    if chunk.shared is not None:
                        self._shared[chunk.shared] = home
                homes.append(home)
        if used != before:
            self._groups.append((plan.shared_keys(each.chunk for each in placed), used))
        return homes

    def end(self) -> None:
        """All models are made: first values need no staging memory any more."""
        self._staging = None

    def update_buffers(self) -> list[Tensor]:
        """What states on a disk pass through on their way to an update and back."""
        while len(self._buffers) < plan.SETS:
            purpose = "buffers between disk and optimizer"
            self._buffers.append(self.host.home(plan.SET_BYTES, torch.uint8, purpose).tensor)
        return self._buffers

    def landing(self) -> Tensor:
        """[plan.LANDING_BYTES] uint8 of host memory: gradients come from the device to an update through it."""
        if self._landing is None:
            purpose = "gradients on their way to an update"
            self._landing = self.host.home(plan.LANDING_BYTES, torch.uint8, purpose, travels=True).tensor
        return self._landing

    @property
    def host(self) -> Ram:
        """The tier of host memory."""
        host = self.tiers["host"]
        assert isinstance(host, Ram)
        return host

    @functools.cached_property
    def updates(self) -> Executor:
        """The thread that makes updates beside what follows: one for all models, for they share buffers."""
        return worker("update")

    @functools.cached_property
    def update_stream(self) -> torch.Stream:
        """That thread's, one for all updates: torch has 32, and gives the one of a CUDA graph again after the last."""
        return torch.Stream(self.world.device)

    def _used_gradients(self, placed: Sequence[plan.Placed]) -> set[int]:
        """Memory for gradients that models with some of the same weights use: all of them may step side by side."""
        keys = [plan.shared_keys(each.chunk for each in placed), *(keys for keys, _ in self._groups)]
        group = next(group for group in plan.sharing_groups(keys) if 0 in group)
        return {i for index in group[1:] for i in self._groups[index - 1][1]}

    def _home(self, fill: Callable[[Tensor], None], chunk: Chunk, row: Row, used: set[int], of_chunk: str) -> ChunkHome:
        size, rank = self.world.size, self.world.rank
        shard = slice(rank * (chunk.numel // size), (rank + 1) * (chunk.numel // size))
        dtype = getattr(torch, chunk.dtype)
        whole = not row.params.sharded or size == 1
        if isinstance(disk := self.tiers[row.params.tier], Disk) and disk.ring is None:
            purpose = "buffers between disk and device"
            disk.ring = Ring(self.host.home(plan.RING_BYTES, torch.uint8, purpose, travels=True).tensor)
        weights = _weights_home(
            self.tiers[row.params.tier], chunk.numel // (1 if whole else size), dtype, f"the weights {of_chunk}"
        )
        if isinstance(weights, RamHome) and whole and weights.tensor.device.type == "cpu":
            fill(weights.tensor)
        else:
            staged = self._stage(chunk.numel, dtype)
            fill(staged)
            weights.write(staged if whole else staged[shard])
        states: dict[str, Home] = {}
        grads, reader = None, Pending()
        share = shard if row.optimizer.sharded else slice(0, chunk.numel)
        grads_whole = not row.grads.sharded or size == 1
        if chunk.trained:
            tier, count = self.tiers[row.optimizer.tier], share.stop - share.start
            states = {
                name: tier.home(count // per, state_dtype, f"the optimizer states {of_chunk}")
                for name, (state_dtype, per) in states_of(dtype, row.bits).items()
            }
            numel, sums = chunk.numel // (1 if grads_whole else size), getattr(torch, plan.gradient_dtype(chunk, row))
            grads, reader = self._gradient_home(row.grads.tier, numel, sums, f"the gradients {of_chunk}", used)
        home = ChunkHome(chunk, weights, whole, states, grads, grads_whole, share, reader=reader)
        if chunk.trained and plan.shadowed(row):
            purpose = f"the weights {of_chunk} that updates write"
            home.shadow = self.host.home(home.share_numel, dtype, purpose, travels=True)
            home.shadow.write(home.own_weights)
        return home

    def _stage(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeroed host memory for a chunk's first values on their way elsewhere: the same for all, pinned for a GPU."""
        nbytes = numel * dtype.itemsize
        if self._staging is None or self._staging.numel() < nbytes:
            self._staging = empty_pages(nbytes, CPU, pinned=self.world.device.type == "cuda")
        return self._staging[:nbytes].zero_().view(dtype)

    def _gradient_home(
        self, tier: str, numel: int, dtype: torch.dtype, purpose: str, used: set[int]
    ) -> tuple[RamHome, Pending]:
        """The smallest memory for gradients that fits and is not in `used`, which it joins; new where there is none.

        Of equal ones the last: an update frees a model's memory from its first chunk on, and the next model's backward
        fills its own from the last chunk on.
        """
        nbytes = numel * dtype.itemsize
        free = [
            i
            for i, home in enumerate(self._gradients)
            if i not in used and home.tier.name == tier and home.tensor.numel() >= nbytes
        ]
        if free:
            index = min(free, key=lambda i: (self._gradients[i].tensor.numel(), -i))
        else:
            ram, index = self.tiers[tier], len(self._gradients)
            assert isinstance(ram, Ram)
            self._gradients.append(ram.home(nbytes, torch.uint8, purpose, travels=True))
            self._readers.append(Pending())
        used.add(index)
        home = self._gradients[index]
        return RamHome(home.tier, home.tensor[:nbytes].view(dtype)), self._readers[index]


def first_values(model: Any, owner_of: dict[str, tuple[nn.Module, str]], chunk: Chunk, flat: Tensor) -> None:
    """Fills `flat`, [numel] on the CPU, from the model's parameters; those on `meta` by the model's recipes."""
    recipes: dict[str, Tensor] = {}
    for weight, offset in zip(chunk.weights, chunk.offsets, strict=True):
        view = flat[offset : offset + weight.numel].view(weight.shape)
        parameter = getattr(*owner_of[weight.name])
        if parameter.is_meta:
            recipes[weight.name] = view
        else:
            view.copy_(parameter.detach())
    if recipes:
        model.fill(recipes)


def _weights_home(tier: Ram | Disk, numel: int, dtype: torch.dtype, purpose: str) -> Home:
    """In RAM it is pinned, for the device fetches weights from it."""
    if isinstance(tier, Ram):
        return tier.home(numel, dtype, purpose, travels=True)
    return tier.home(numel, dtype, purpose)
