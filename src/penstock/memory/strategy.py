"""A strategy is a named placement: where weights, gradients and optimizer states live, and whether ranks share them.

Algorithms see a few verbs: `init()` to make models, `prepare()` to give a model its home, `phase()` to say what comes
next, `evaluate()` and `step()` to use and to train it. All rows of the table are run by one engine (`stream.py`), but
those that stay on several GPUs by PyTorch's (`fsdp.py`).
"""

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import record_function

from penstock.distributed.world import World
from penstock.errors import ResourceError, UserError
from penstock.kernels import compile as compiler
from penstock.kernels.machine import available_ram
from penstock.memory import plan
from penstock.memory.adamw import AdamW
from penstock.memory.arena import Arena
from penstock.memory.chunks import layout
from penstock.memory.homes import ChunkHome
from penstock.memory.placement import AUTO, PYTORCH, Budgets, bits_of, known, refused, tiers_of
from penstock.memory.prepare import Homes, groups_of
from penstock.memory.program import visits_of
from penstock.memory.sink import Sink
from penstock.memory.stream import Losses, LossOf, Result, Stream, Visits
from penstock.memory.tiers import Disk, Ram
from penstock.units import show_bytes

Work = tuple[Stream, Sequence[Any], Callable[[Tensor, Any], Any]]
"""A model, its micro-batches, and what is read of each: `evaluate`'s arguments."""
Phase = Literal["rollout", "score", "train"]

FREE = 0.9
"""The share of a GPU's free memory that gemini_auto takes by default; the rest is for its libraries."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Strategy:
    """One row of the table at work on one rank. Make it with `Strategy.named`."""

    name: str
    world: World
    dtype: torch.dtype
    recompute: bool | None = None
    """Run each block again in backward instead of keeping what is inside it. Default: where weights move. False where
    they do: micro-batches go one after the other, and weights move for each of them."""
    chunk_size: int | None = None
    """Elements per chunk at most. Default: a block is a chunk."""
    activation_budget: int | None = None
    """Bytes that a block's activations may take per micro-batch; its blocks are recomputed then. Default: no limit."""
    reserve: int | None = None
    """Bytes of device memory that are left to activations. Default: a quarter of what is left."""
    padding_free: bool = False
    """Whether rows of a micro-batch are computed without their padding."""
    swapped: int = 0
    """Bytes of host memory that are left to a KV cache."""
    offloaded: int = 0
    """The same, to inputs of blocks between forward and backward. 0: these stay on the device."""
    further: int = 0
    """Of these, what models that go side by side have on top of the one with most."""
    ahead: int = 1
    """Visits whose weights are prefetched."""
    few_tokens: int = 0
    """Tokens of a pass without gradients up to which only the experts that they choose come; see plan.few_tokens."""
    gathers_once: bool | None = None
    """Whether a device budget holds the whole actor while FSDP2 answers. None: free memory decides."""
    tiers: dict[str, Ram | Disk] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds spent in each phase since `take_perf`."""
    models: list[plan.Model] = field(default_factory=list)
    """All models that were prepared."""
    streams: "weakref.WeakSet[Stream]" = field(default_factory=weakref.WeakSet)
    """Executors of all models that were prepared."""
    mesh: Any = None
    """The ranks of models on FSDP2 (a DeviceMesh), once there is one."""
    latest: Phase | None = None
    """The phase that ran last."""
    arenas: tuple[Arena, Arena] | None = None
    """Slots for weights and for gradients, shared by all models; cut when the first of them is needed."""

    def __post_init__(self) -> None:
        self.homes = Homes(self.world, self.tiers)

    @staticmethod
    def named(
        name: str = "ddp",
        *,
        dtype: str = "fp32",
        device: str | None = None,
        recompute: bool | None = None,
        chunk_size: int | None = None,
        padding_free: bool = False,
        **budgets: str | None,
    ) -> "Strategy":
        """The strategy of that name, after joining torchrun's ranks.

        `budgets` are per rank, named as in `Budgets`: device_memory="6GB", host_memory, disk, activation_budget. Raises
        UserError for what does not exist.
        """
        name = known(name)
        limits = Budgets(**budgets)
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype}: weights compute in {' or '.join(DTYPES)}.")
        on_disk = "disk" in tiers_of(name)
        if bits_of(name)[0] != AUTO and on_disk and limits.disk is None:
            raise UserError(f"--strategy {name} keeps weights on a disk; give --disk PATH or --disk PATH:200GB.")
        device_bytes = limits.nbytes("device_memory")
        if device_bytes is not None and device_bytes < plan.SMALL_BUDGET:
            # On Hopper cuBLAS keeps 32 MiB for every stream that multiplies, outside of any budget.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:1")
            os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "4096")
        world = World.join(device)
        if bits_of(name)[0] == "naive" and world.size > 1:
            raise UserError(f"--strategy naive is one process and torchrun started {world.size}; use --strategy ddp.")
        pins = world.device.type == "cuda"
        if pins and device_bytes is None and bits_of(name)[0] == AUTO:  # it places what does not fit elsewhere
            device_bytes = int(torch.cuda.mem_get_info(world.device)[0] * FREE)
        host_bytes = limits.nbytes("host_memory")
        if world.size > 1:  # its machine's ranks share what is free; and all place alike, so all have the least
            own = available_ram() // world.local_size if host_bytes is None else host_bytes
            devices, hosts = zip(*world.gather((device_bytes, own)), strict=True)
            device_bytes, host_bytes = None if device_bytes is None else min(devices), min(hosts)
        tiers: dict[str, Ram | Disk] = {
            "device": Ram("device", world.device, device_bytes),
            "host": Ram("host", torch.device("cpu"), host_bytes, pins=pins),
        }
        if on_disk and limits.disk is not None:
            tiers["disk"] = Disk(limits.disk_directory, limits.nbytes("disk"))
        activations = limits.nbytes("activation_budget")
        recompute = recompute if activations is None else True
        return Strategy(
            name, world, DTYPES[dtype], recompute, chunk_size, activations, padding_free=padding_free, tiers=tiers
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

    def prepare(self, model: Any, **adamw: Any) -> Stream:
        """`prepare_all` for one model."""
        return self.prepare_all(model, **adamw)[0]

    def prepare_all(self, *models: Any, **adamw: Any) -> list[Stream]:
        """Makes the models' weights, chunk by chunk, where the strategy keeps them; trained ones get a sink each.

        A model is a module and a `Program`. A weight on `meta` is made from the recipe; any other is taken as it is,
        and must be the same on every rank. Under gemini_auto the models of one call are placed together. Raises
        ResourceError when a tier's budget is too small.
        """
        for model in models:
            model.padding_free = self.padding_free
        streams = self._prepared(models, adamw)
        self.streams.update(streams)
        return streams

    def _prepared(self, models: Sequence[Any], adamw: dict[str, Any]) -> list[Stream]:
        if self.name in PYTORCH and self.world.size > 1:
            return [self._on_fsdp(model, adamw) for model in models]
        for arena in self.arenas or ():  # cut again when next needed: these models pass through it too
            arena.close()
        self.arenas = None
        size = self.world.size
        layouts = [
            (layout(groups_of(model), world=size, max_numel=self.chunk_size), visits_of(model)) for model in models
        ]
        left: dict[Any, int | None] = {
            name: None if tier.budget is None else tier.budget - tier.used for name, tier in self.tiers.items()
        }
        if (host := left["host"]) is not None:
            left["host"] = max(host - max(self.swapped, self.offloaded), 0)
        placed = plan.place(self.name, layouts, size, left, self.reserve, self.recompute)
        for model, chunks in zip(models, placed, strict=True):  # before anything is made
            self.homes.check(chunks, f"{type(model).__name__} under --strategy {self.name}")
        # Under gemini_auto models differ; where some are too large to stay, none may keep what is inside its blocks.
        moves = bits_of(self.name)[0] == AUTO and not all(
            plan.resident(each.row, size) for chunks in placed for each in chunks
        )
        streams = []
        for model, chunks, (_, visits) in zip(models, placed, layouts, strict=True):
            self.models.append(plan.Model(type(model).__name__, tuple(chunks), tuple(visits)))
            streams.append(self._stream(model, self.homes.make(model, chunks, visits), moves, adamw))
        self.homes.end()
        return streams

    def _on_fsdp(self, model: Any, adamw: dict[str, Any]) -> Stream:
        """The model on PyTorch's engine."""
        from penstock.memory import fsdp  # slow to import

        packed = any(weight.dtype not in ("float32", "bfloat16") for _, group in groups_of(model) for weight in group)
        limits: Any = {"chunk_size": self.chunk_size, "activation_budget": self.activation_budget}
        if reason := refused(self.name, self.world.size, visits=[visits_of(model)], packed=packed, **limits):
            raise UserError(reason)
        if self.mesh is None:
            self.mesh = fsdp.mesh_of(self.name, self.world)
        recompute = plan.recomputes(True, self.recompute)
        return fsdp.prepare(
            model, self.world, self.mesh, self.tiers, dtype=self.dtype, recompute=recompute,
            gathers_once=self.gathers_once, adamw=adamw,
        )  # fmt: skip

    def _stream(self, model: Any, homes: list[ChunkHome], moves: bool, adamw: dict[str, Any]) -> Stream:
        trained = [home for home in homes if home.chunk.trained]
        model.train(bool(trained))
        moves = moves or not all(home.resident for home in homes)
        stream = Stream(
            model,
            homes,
            self.world,
            sink=Sink(trained, self.world, AdamW(**adamw), self.homes) if trained else None,
            recompute=plan.recomputes(moves, self.recompute),
            ahead=self.ahead,
            few_tokens=self.few_tokens,
            arenas=self._cut_arenas,
        )
        stream.offload = self.homes.host if self.offloaded else None
        if self.activation_budget is not None:
            model.slice(self.activation_budget)
        return stream

    def _cut_arenas(self) -> tuple[Arena, Arena]:
        """The two arenas, allocated when first needed: by then all models are known."""
        if self.arenas is None:
            tier = self.tiers["device"]
            assert isinstance(tier, Ram)
            room = None if tier.budget is None else tier.budget - tier.used
            slots = plan.cut(self.models, self.world.size, room, self.reserve, self.ahead)
            least = slots.least + (self.reserve or 0)
            if room is not None and least > room:
                counted = "with their activations" if self.reserve else "activations not counted"
                raise ResourceError(
                    f"--device-memory {show_bytes(tier.used + room)}: under --strategy {self.name} these models need "
                    f"at least {show_bytes(tier.used + least)}, {counted}; give more than that."
                )
            self.arenas = (
                Arena(tier, slots.weights, "the slots that weights pass through", _visits),
                Arena(tier, slots.gradients, "the slots that gradients pass through", _visits),
            )
        return self.arenas

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Inside, this phase runs: without gradients unless it is `train`. Its wall time is kept for timing/*."""
        started = time.perf_counter()
        if self.latest not in (None, name) and self.world.device.type == "cpu":
            compiler.give_back()  # what the other phase freed is scattered among live blocks; a KV cache fits in none
        self.latest = name
        if name != "rollout":  # a KV cache's spare pages, which one model takes, may be in the way
            self.homes.host.make_room(plan.UPDATE_ROOM + self.further)
        for stream in self.streams:
            stream.leasing = stream.moves and name == "rollout"
        try:
            with record_function(f"phase.{name}"), torch.set_grad_enabled(name == "train"):
                yield
        finally:
            for stream in self.streams:
                stream.end_lease()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def take_perf(self) -> dict[str, float]:
        """Seconds per phase since the last call, as timing/* metrics, and the most bytes that each tier has held."""
        taken = {f"timing/{name}_seconds": seconds for name, seconds in self.seconds.items()}
        taken |= {f"perf/{name}_tier_bytes": float(tier.peak) for name, tier in self.tiers.items() if tier.peak}
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
        or world (PPO.md 15), and statistics to be summed (or, named max_*, maximised). Gradients add up in fp32: see
        [Note: gradients add up in fp32] in plan.py. A non-finite loss or gradient leaves the weights alone on all ranks
        (PPO.md 20): that is known before the first chunk is updated.
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
            [step.stream for step in steps], begin, lambda i, losses: self._update(steps[i], losses, max_grad_norm)
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
        else:
            sink.clear()  # FSDP2's gradients would stay beside a rollout
        measured = step.stream.program.measured()
        return StepStats(finite, float(norm), {key: float(value) for key, value in sums.items()}, measured)

    def _over_ranks(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds up (max_*: maximises) statistics; a rank whose share was empty still takes part."""
        if self.world.size == 1:
            return sums
        keys = sorted({key for keys in self.world.gather(sorted(sums)) for key in keys})
        zero = torch.zeros((), device=self.world.device)
        summed = self.world.sum(torch.stack([zero if k.startswith("max_") else sums.get(k, zero) for k in keys]))
        highest = self.world.max(torch.stack([sums.get(k, zero) for k in keys]))
        return {k: (highest if k.startswith("max_") else summed)[i] for i, k in enumerate(keys)}


def _visits(home: ChunkHome) -> Hashable:
    return home.visits


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


def interleave(passes: Sequence[Visits[Result]]) -> list[Result]:
    """Several models' passes, one visit of each in turn: weights that they share are fetched once for all."""
    results: dict[int, Result] = {}
    while len(results) < len(passes):
        for i, visits in enumerate(passes):
            if i not in results:
                try:
                    next(visits)
                except StopIteration as end:
                    results[i] = end.value
    return [results[i] for i in range(len(passes))]


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
    measured: dict[str, float] = field(default_factory=dict)
    """What the model itself has to log."""

    @property
    def metrics(self) -> dict[str, float]:
        """What every stage logs of a step."""
        return {"grad_norm": self.grad_norm, **self.measured}
