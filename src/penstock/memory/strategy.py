"""A strategy is a named placement: where weights, gradients and optimizer states live, and whether ranks share them.

Algorithms see a few verbs: `init()` to make models, `prepare()` to give a model its home, `phase()` to say what comes
next, `evaluate()` and `step()` to use and to train it. All rows of the table are run by one engine (`stream.py`).
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from penstock.distributed.world import World
from penstock.errors import ResourceError, UserError
from penstock.kernels import compile as compiler
from penstock.memory import plan
from penstock.memory.adamw import AdamW, states_of
from penstock.memory.arena import Arena
from penstock.memory.chunks import Chunk, Weight, layout
from penstock.memory.homes import ChunkHome
from penstock.memory.placement import AUTO, Row, bits_of, known, tiers_of
from penstock.memory.program import owners
from penstock.memory.sink import Sink
from penstock.memory.stream import Losses, LossOf, Result, Stream, Visits, interleave, visits_of
from penstock.memory.tiers import Disk, Home, Ram, RamHome, empty_pages
from penstock.units import parse_bytes, show_bytes

Work = tuple[Stream, Sequence[Any], Callable[[Tensor, Any], Any]]
"""A model, its micro-batches, and what is read of each: `evaluate`'s arguments."""
Phase = Literal["rollout", "score", "train"]

SMALL = 2 * 10**9
"""Bytes of a device budget under which a GPU's libraries get workspaces of 4 MiB."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Strategy:
    """One row of the table at work on one rank. Make it with `Strategy.named`."""

    name: str
    world: World
    dtype: torch.dtype
    recompute: bool | None = None
    """Run each block again in backward instead of keeping what is inside it; None: where weights move. False where
    they do: micro-batches go one after the other, and weights move for each of them."""
    chunk_size: int | None = None
    """Elements per chunk at most; None: a block is a chunk."""
    activation_budget: int | None = None
    """Bytes that a block's activations may take per micro-batch; its blocks are recomputed then. None: no end."""
    reserve: int | None = None
    """Bytes of device memory that are left to activations; None: a quarter of what is left."""
    swapped: int = 0
    """Bytes of host memory that are left to a KV cache."""
    ahead: int = 1
    """Visits whose weights are fetched beforehand."""
    tiers: dict[str, Ram | Disk] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds spent in each phase since `take_seconds`."""
    streams: list[Stream] = field(default_factory=list)
    models: list[plan.Model] = field(default_factory=list)
    """What the plan knows of the streams' models, in the same order."""
    shared: dict[tuple[Weight, ...], ChunkHome] = field(default_factory=dict)
    """Frozen chunks that more than one model may be made of: each has one home."""
    apart: list[tuple[set[Any], set[int]]] = field(default_factory=list)
    """Of trained models that share weights: which, and their gradients."""
    gradients: list[RamHome] = field(default_factory=list)
    """Bytes for one chunk's gradients each; one model at a time uses them."""
    buffers: list[Tensor] = field(default_factory=list)
    latest: Phase | None = None
    """The phase that ran last."""
    staging: Tensor | None = None
    """Where weights are made that live elsewhere than in host memory; only while models are prepared."""
    arenas: tuple[Arena, Arena] | None = None
    """Slots for weights and for gradients, shared by all models; cut when the first of them is needed."""

    @staticmethod
    def named(
        name: str = "ddp",
        *,
        dtype: str = "fp32",
        device: str | None = None,
        device_memory: str | None = None,
        host_memory: str | None = None,
        disk: str | None = None,
        recompute: bool | None = None,
        chunk_size: int | None = None,
        activation_budget: str | None = None,
    ) -> "Strategy":
        """The strategy of that name, after joining torchrun's ranks.

        Budgets are per rank: "6GB", and PATH or PATH:200GB for the disk. Raises UserError for what does not exist.
        """
        name = known(name)
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype}: weights compute in {' or '.join(DTYPES)}.")
        on_disk = "disk" in tiers_of(name)
        if bits_of(name)[0] != AUTO and on_disk and disk is None:
            raise UserError(f"--strategy {name} keeps weights on a disk; give --disk PATH or --disk PATH:200GB.")
        budget = _budget(device_memory, "--device-memory")
        if budget is not None and budget < SMALL:
            # On Hopper cuBLAS keeps 32 MiB for every stream that multiplies, whatever the budget says of it.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:1")
            os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "4096")
        world = World.join(device)
        if bits_of(name)[0] == "naive" and world.size > 1:
            raise UserError(f"--strategy naive is one process and torchrun started {world.size}; use --strategy ddp.")
        tiers: dict[str, Ram | Disk] = {
            "device": Ram("device", world.device, budget),
            "host": Ram(
                "host", torch.device("cpu"), _budget(host_memory, "--host-memory"), pins=world.device.type == "cuda"
            ),
        }
        if on_disk and disk is not None:
            directory, _, size = disk.rpartition(":")
            if not directory or "/" in size:  # no budget: a colon in a path is a path's
                directory, size = disk, ""
            tiers["disk"] = Disk(directory, _budget(size or None, "--disk"))
        activations = _budget(activation_budget, "--activation-budget")
        return Strategy(
            name,
            world,
            DTYPES[dtype],
            True if activations is not None else recompute,
            chunk_size,
            activations,
            tiers=tiers,
        )

    @contextlib.contextmanager
    def init(self) -> Iterator[None]:
        """Models made inside are recipes, in the strategy's dtype: on `meta`, no memory is taken until `prepare`."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device("meta"):
                yield
        finally:
            torch.set_default_dtype(before)

    def groups_of(self, model: Any) -> list[tuple[str, list[Weight]]]:
        """What the plan needs to know of a model's weights, group by group, before it is prepared."""
        where = owners(model)
        return [(group, [_weight(model, name, where) for name in names]) for group, names in model.groups()]

    def prepare(self, model: Any, **adamw: Any) -> Stream:
        """`prepare_all` for one model."""
        return self.prepare_all(model, **adamw)[0]

    def prepare_all(self, *models: Any, **adamw: Any) -> list[Stream]:
        """Makes the models' weights, chunk by chunk, where the strategy keeps them; trained ones get a sink each.

        A model is a module and a `Program`. A weight on `meta` is made from the recipe; any other is taken as it is,
        and must be the same on every rank. Under gemini_auto the models of one call are placed together. Raises
        ResourceError when a tier's budget is too small.
        """
        for arena in self.arenas or ():  # cut again when next needed: these models pass through it too
            arena.close()
        self.arenas = None
        laid = []
        for model in models:
            laid.append(
                (layout(self.groups_of(model), world=self.world.size, max_numel=self.chunk_size), visits_of(model))
            )
        room = {name: None if tier.budget is None else tier.budget - tier.used for name, tier in self.tiers.items()}
        if (host := room["host"]) is not None:
            room["host"] = max(host - self.swapped, 0)
        placed = plan.place(self.name, laid, self.world.size, room, self.reserve)  # type: ignore[arg-type]
        for model, one in zip(models, placed, strict=True):
            taken = self._taken(one)
            pooled = sum(home.tensor.nbytes for i, home in enumerate(self.gradients) if i not in taken)
            for tier, nbytes in plan.homes(
                [one], self.world.size, pooled, self.shared
            ).items():  # before anything is made
                self.tiers[tier].check(nbytes, f"{type(model).__name__} under --strategy {self.name}")
        # Under gemini_auto models differ; where some are too large to stay, none may keep what is inside its blocks.
        moves = bits_of(self.name)[0] == AUTO and not all(
            plan.resident(it.row, self.world.size) for one in placed for it in one
        )
        streams = [
            self._stream(model, one, visits, moves, adamw)
            for model, one, (_, visits) in zip(models, placed, laid, strict=True)
        ]
        self.staging = None
        return streams

    def _stream(
        self,
        model: Any,
        placed: Sequence[plan.Placed],
        visits: list[tuple[str, ...]],
        moves: bool,
        adamw: dict[str, Any],
    ) -> Stream:
        taken = self._taken(placed)
        before = set(taken)
        stored = [self._shared(model, one, taken) for one in placed]
        if taken != before:
            self.apart.append(({one.chunk.shared for one in placed} - {None}, taken))
        model.train(any(one.chunk.trained for one in placed))
        moves = moves or not all(one.resident for one in stored)
        trained = [one for one in stored if one.chunk.trained]
        stream = Stream(
            model,
            stored,
            self.world,
            sink=Sink(trained, self.world, AdamW(**adamw), self._update_buffers) if trained else None,
            recompute=plan.recomputes(moves, self.recompute),
            ahead=self.ahead,
            arenas=self._cut_arenas,
        )
        if self.activation_budget is not None:
            model.slice(self.activation_budget)
        self.streams.append(stream)
        self.models.append(plan.Model(type(model).__name__, tuple(placed), tuple(visits)))
        return stream

    def _taken(self, placed: Sequence[plan.Placed]) -> set[int]:
        """Gradient homes of models that stand on the same weights: all of them may step side by side."""
        mine = {one.chunk.shared for one in placed}
        return {home for weights, homes in self.apart if weights & mine for home in homes}

    def _shared(self, model: Any, placed: plan.Placed, taken: set[int]) -> ChunkHome:
        """The chunk's homes: made now, or the ones that another model of the same frozen weights has."""
        key = placed.chunk.shared
        if key is None:
            return self._store(model, placed.chunk, placed.row, taken)
        if key not in self.shared:
            self.shared[key] = self._store(model, placed.chunk, placed.row, taken)
        return self.shared[key]

    def _store(self, model: Any, chunk: Chunk, row: Row, taken: set[int]) -> ChunkHome:
        """Homes for one chunk on this rank, with its first weights in them."""
        size, rank = self.world.size, self.world.rank
        shard = slice(rank * (chunk.numel // size), (rank + 1) * (chunk.numel // size))
        dtype = getattr(torch, chunk.dtype)
        what = f"the weights of {type(model).__name__} {chunk.group}"
        whole = not row.params.sharded or size == 1
        weights = _home(self.tiers[row.params.tier], chunk.numel // (1 if whole else size), dtype, what)
        here = isinstance(weights, RamHome) and whole and weights.tensor.device.type == "cpu"
        flat = weights.tensor if here and isinstance(weights, RamHome) else self._stage(chunk.numel, dtype)
        self._first_values(model, chunk, flat)
        if not here:
            weights.write(flat if whole else flat[shard])
        states, grads = {}, None
        share = shard if row.optimizer.sharded else slice(0, chunk.numel)
        if chunk.trained:
            what = f"the optimizer states of {type(model).__name__} {chunk.group}"
            states = {
                name: self.tiers[row.optimizer.tier].home((share.stop - share.start) // per, kind, what)
                for name, (kind, per) in states_of(dtype, row.bits).items()
            }
            grads_whole = not row.grads.sharded or size == 1
            what = f"the gradients of {type(model).__name__} {chunk.group}"
            numel = chunk.numel // (1 if grads_whole else size)
            grads = self._gradient_home(row.grads.tier, numel, dtype, what, taken)
        return ChunkHome(chunk, weights, whole, states, grads, not row.grads.sharded or size == 1, share)

    def _stage(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeroed host memory for a chunk's first values on their way elsewhere: one place for all, pinned on a GPU."""
        nbytes = numel * dtype.itemsize
        if self.staging is None or self.staging.numel() < nbytes:
            self.staging = empty_pages(nbytes, torch.device("cpu"), pinned=self.world.device.type == "cuda")
        return self.staging[:nbytes].zero_().view(dtype)

    def _gradient_home(self, tier: str, numel: int, dtype: torch.dtype, what: str, taken: set[int]) -> Home:
        """A home for gradients, which all models share: no two of them step at the same time."""
        nbytes = numel * dtype.itemsize
        free = [
            home
            for i, home in enumerate(self.gradients)
            if i not in taken and home.tier.name == tier and home.tensor.numel() >= nbytes
        ]
        home = min(free, key=lambda one: one.tensor.numel(), default=None)
        if home is None:
            ram = self.tiers[tier]
            assert isinstance(ram, Ram)
            home = ram.home(nbytes, torch.uint8, what, travels=True)
            self.gradients.append(home)
        taken.add(next(i for i, one in enumerate(self.gradients) if one is home))
        return RamHome(home.tier, home.tensor[:nbytes].view(dtype))

    def _first_values(self, model: Any, chunk: Chunk, flat: Tensor) -> None:
        where = owners(model)
        recipes: dict[str, Tensor] = {}
        for weight, offset in zip(chunk.weights, chunk.offsets, strict=True):
            view = flat[offset : offset + weight.numel].view(weight.shape)
            parameter = getattr(*where[weight.name])
            if parameter.is_meta:
                recipes[weight.name] = view
            else:
                view.copy_(parameter.detach())
        if recipes:
            model.fill(recipes)

    def _update_buffers(self) -> list[Tensor]:
        """What states on a disk pass through on their way to an update and back."""
        host = self.tiers["host"]
        assert isinstance(host, Ram)
        while len(self.buffers) < plan.SETS:
            self.buffers.append(host.home(plan.SET_BYTES, torch.uint8, "buffers between disk and optimizer").tensor)
        return self.buffers

    def _cut_arenas(self) -> tuple[Arena, Arena]:
        """The two arenas, allocated when first needed: by then all models are known."""
        if self.arenas is None:
            tier = self.tiers["device"]
            assert isinstance(tier, Ram)
            room = None if tier.budget is None else tier.budget - tier.used
            slots = plan.cut(self.models, self.world.size, room, self.reserve, self.ahead)
            least = slots.least + (self.reserve or 0)
            if room is not None and least > room:
                beside = "with their activations" if self.reserve else "activations not counted"
                raise ResourceError(
                    f"--device-memory {show_bytes(tier.used + room)}: under --strategy {self.name} these models need "
                    f"at least {show_bytes(tier.used + least)}, {beside}; give more than that."
                )
            self.arenas = (
                Arena(tier, slots.weights, "the slots that weights pass through"),
                Arena(tier, slots.gradients, "the slots that gradients pass through"),
            )
        return self.arenas

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Says which phase runs now; without gradients unless it is `train`. Its wall time is kept for timing/*."""
        started = time.perf_counter()
        if name == "train" and self.latest not in (None, "train") and self.world.device.type == "cpu":
            compiler.give_back()  # training holds the most; what other phases freed lies between what is in use
        self.latest = name
        with record_function(f"phase.{name}"), torch.set_grad_enabled(name == "train"):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def take_seconds(self) -> dict[str, float]:
        """Seconds per phase since the last call, as timing/* metrics."""
        taken = {f"timing/{name}_seconds": seconds for name, seconds in self.seconds.items()}
        self.seconds.clear()
        return taken

    def evaluate(self, stream: Stream, micro_batches: Sequence[Any], read: Callable[[Tensor, Any], Any]) -> list[Any]:
        """read(last states [B, T, D], micro-batch) of each micro-batch, without gradients; each has `.tokens`."""
        return self.evaluate_all([(stream, micro_batches, read)])[0]

    def evaluate_all(self, works: Sequence[Work]) -> list[list[Any]]:
        """`evaluate` of several models; those that share weights that move go through them side by side."""
        with torch.no_grad():
            return _interleaved(
                [stream for stream, _, _ in works],
                lambda i: works[i][0].evaluation(works[i][1], works[i][2]),
                lambda i, result: result,
            )

    def step(
        self, stream: Stream, micro_batches: Sequence[Any], loss_of: LossOf, *, lr: float, max_grad_norm: float = 1.0
    ) -> "StepStats":
        """One optimizer step: backward through every micro-batch, one sum over ranks, one clip, one update.

        A micro-batch has `.tokens` [B, T] on the device. `loss_of` gets its last states and returns its part of the
        loss, already divided by the *global* token count, so that the gradient is a sum whatever the micro-batch size
        or world (PPO.md 15), and statistics to be summed (or, named max_*, maximised). Gradients add up in the
        weights' dtype: with bf16 weights, hundreds of micro-batches lose the smallest parts. A non-finite loss or
        gradient leaves the weights alone on all ranks (PPO.md 20): that is known before the first chunk is updated.
        """
        return self.step_all([Step(stream, micro_batches, loss_of, lr)], max_grad_norm=max_grad_norm)[0]

    def step_all(self, steps: Sequence["Step"], *, max_grad_norm: float = 1.0) -> list["StepStats"]:
        """`step` of several models; those that share weights that move go through them side by side."""

        def begin(i: int) -> Visits[list[Losses]]:
            sink = steps[i].stream.sink
            assert sink is not None, "a frozen model takes no steps"
            sink.clear()
            return steps[i].stream.backward(steps[i].micro_batches, steps[i].loss_of)

        return _interleaved(
            [one.stream for one in steps], begin, lambda i, losses: self._update(steps[i], losses, max_grad_norm)
        )

    def _update(self, step: "Step", losses: list[Losses], max_grad_norm: float) -> "StepStats":
        sink = step.stream.sink
        assert sink is not None
        sums: dict[str, Tensor] = {}
        for loss, stats in losses:
            for key, value in {"loss": loss, **stats}.items():
                value = value.detach().to(self.world.device, torch.float32)
                if key not in sums:
                    sums[key] = value
                else:
                    sums[key] = torch.maximum(sums[key], value) if key.startswith("max_") else sums[key] + value
        sums = self._over_ranks(sums)
        sink.sum_over_ranks()
        norm = sink.norm()
        finite = bool(torch.isfinite(norm) & torch.isfinite(sums["loss"]))  # sync: the only one of a step
        if finite:
            with record_function("optimizer"):
                step.stream.update(step.lr, float(torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0)))
        return StepStats(finite, float(norm), {key: float(value) for key, value in sums.items()})

    def _over_ranks(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds up (max_*: maximises) statistics; a rank whose share was empty still takes part."""
        if self.world.size == 1:
            return sums
        keys = sorted({key for keys in self.world.gather(sorted(sums)) for key in keys})
        zero = torch.zeros((), device=self.world.device)
        summed = self.world.sum(torch.stack([zero if k.startswith("max_") else sums.get(k, zero) for k in keys]))
        highest = self.world.max(torch.stack([sums.get(k, zero) for k in keys]))
        return {k: (highest if k.startswith("max_") else summed)[i] for i, k in enumerate(keys)}


def _interleaved(
    streams: Sequence[Stream], begin: Callable[[int], Visits[Any]], end: Callable[[int, Any], Result]
) -> list[Result]:
    """Begins every stream's pass and ends it with its result: one sharing group after the other, each interleaved.

    Shared weights that stay on the device do not count: there, one model after the other holds fewer states at once.
    """
    results: dict[int, Result] = {}
    for group in plan.sharing_groups([{stream, *stream.moving_homes} for stream in streams]):
        passed = interleave([begin(i) for i in group])
        results |= {i: end(i, result) for i, result in zip(group, passed, strict=True)}
    return [results[i] for i in range(len(streams))]


@dataclass(frozen=True)
class Step:
    """One model's part in `Strategy.step_all`."""

    stream: Stream
    micro_batches: Sequence[Any]
    loss_of: LossOf
    lr: float


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did. Example: StepStats(True, 0.8, {"loss": 2.1})."""

    applied: bool
    """False: something was not finite and the weights did not move."""
    grad_norm: float
    """Before clipping."""
    sums: dict[str, float]
    """The statistics of `loss_of` over all micro-batches and ranks, and `loss`."""


def _budget(text: str | None, flag: str) -> int | None:
    return None if text is None else parse_bytes(text, flag)


def _home(tier: Ram | Disk, numel: int, dtype: torch.dtype, what: str) -> Home:
    """For weights: the device fetches them from there."""
    return tier.home(numel, dtype, what, travels=True) if isinstance(tier, Ram) else tier.home(numel, dtype, what)


def _weight(model: Any, name: str, where: dict[str, tuple[nn.Module, str]]) -> Weight:
    parameter = getattr(*where[name])
    dtype = str(parameter.dtype).removeprefix("torch.")
    return Weight(name, tuple(parameter.shape), dtype, parameter.requires_grad, model.recipe(name))
