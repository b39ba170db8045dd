"""Resident models on many cards: PyTorch's own FSDP2 behind the verbs of `stream.Stream`.

Every block is a `fully_shard` module, and what is left (embedding, last norm, heads) is the root's group. FSDP2 gathers
a block's weights before its forward and its backward, prefetches the next block's, and scatters the sums of gradients;
a checkpoint, a rollout or a score gathers blocks by hand (`lease`). Trained weights are fp32 shards, cast to the
strategy's dtype before they are gathered; gradients are reduced in fp32 (Rajbhandari et al. 2020, ZeRO stage 3; Zhao et
al. 2023, PyTorch FSDP).

[Note: one collective for all] FSDP2's gathers are collectives, so every rank runs the same parts equally often: a rank
with fewer micro-batches goes on with an empty one, whose gradients are zeros.

A rollout gathers the whole model once where it fits beside what is there: see [Note: one lease for a rollout] in
stream.py.
"""

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from penstock.autochunk.recompute import recomputing
from penstock.distributed.world import World
from penstock.errors import UserError
from penstock.memory import plan
from penstock.memory.adamw import AdamW, states_of, sum_of_squares
from penstock.memory.arena import Hold
from penstock.memory.chunks import Chunk, Weight, layout
from penstock.memory.homes import SUMS
from penstock.memory.prepare import Homes, first_values, groups_of
from penstock.memory.program import owners
from penstock.memory.sink import SAVED, Sink
from penstock.memory.stream import Losses, LossOf, Stream, Visits
from penstock.memory.tiers import Disk, Ram
from penstock.units import show_bytes

Groups = Sequence[tuple[str, Sequence[Weight]]]
ZEROS = "set_reduce_scatter_unused_params"
"""FSDPModule's, from torch 2.13 on: a weight that no token of a rank has used takes part with zeros."""


class Root(nn.Module):
    """What FSDP2 sees as the model: its forward is whatever is run inside it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Any]) -> Any:
        """run()."""
        return run()


class ShardedStream(Stream):
    """One model's executor on FSDP2. `prepare` makes it."""

    def __init__(
        self, model: Any, root: Root, modules: dict[str, FSDPModule], world: World, sink: "ShardedSink | None",
        recompute: bool, dtype: torch.dtype, gathers_once: bool | None,
    ) -> None:  # fmt: skip
        super().__init__(model, (), world, sink=sink, recompute=recompute, ahead=0, arenas=_no_arenas)
        self.dtype, self.moves = dtype, True
        self._root: Any = root
        self._modules, self._gathers_once = modules, gathers_once
        """`_modules`: the module that gathers each group."""
        self._users: dict[FSDPModule, int] = dict.fromkeys(modules.values(), 0)
        self._training = False
        """A pass of FSDP2's own is going on: its hooks gather."""
        self._root(lambda: None)  # FSDP2 takes the first module that runs for its root
        for module in self._users:
            module.set_reshard_after_forward(False, recurse=False)
            module.reshard()

    @property
    def fixed(self) -> bool:
        """Not for a recording: FSDP2's hooks wait for events when a block is called."""
        return False

    @property
    def collective(self) -> bool:
        """Whether a visit is a collective: not while all weights are here."""
        return not self.leased

    @contextlib.contextmanager
    def lease(self, groups: Sequence[str], gradients: bool, graph: bool = False) -> Iterator[list[Hold]]:
        """Inside, the weights of these groups are whole. FSDP2 itself sees to it while a model is trained."""
        modules = {} if self._training or self.leased else self._gathering(groups)
        for module in modules:
            if not self._users[module]:
                module.unshard()
            self._users[module] += 1
        try:
            yield []
        finally:
            for module in modules:
                self._users[module] -= 1
                if not self._users[module]:
                    module.reshard()

    def _gathering(self, groups: Sequence[str]) -> dict[FSDPModule, None]:
        """The modules that gather these groups; a group without weights needs none."""
        return dict.fromkeys(self._modules[group] for group in groups if group in self._modules)

    def _take_all(self) -> None:
        for module in self._users:
            module.unshard()

    def _give_all(self) -> None:
        for module in self._users:
            module.reshard()

    def _all_fits(self) -> bool:
        """Whether this rank has room for the whole model: as the plan says, or as much again stays free on a GPU."""
        if self._gathers_once is not None or self.device.type != "cuda":
            return self._gathers_once is not False
        assert self.dtype is not None
        nbytes = sum(weight.numel() for weight in self._root.parameters()) * self.dtype.itemsize
        return 2 * nbytes <= torch.cuda.mem_get_info(self.device)[0]

    # --- training -----------------------------------------------------------------------------------------------------

    def backward(self, micro_batches: Sequence[Any], loss_of: LossOf) -> Visits[list[Losses]]:
        """Forward and backward of every micro-batch, one after the other; gradients add up in the shards, in fp32."""
        losses: list[Losses] = []
        self.program.learn(micro_batches, self.world)
        count = int(self.world.max(torch.tensor(len(micro_batches), device=self.device)))
        self._training = True
        self._keep(False)
        try:
            for i in range(count):
                batch = micro_batches[i] if i < len(micro_batches) else None
                loss, stats = self._root(partial(self._loss, batch, loss_of))
                loss.backward()
                if batch is not None:
                    losses.append((loss.detach(), {key: value.detach() for key, value in stats.items()}))
                del loss, stats
                yield
        finally:
            self._training = False
            self._keep(True)
        return losses

    def _keep(self, keeps: bool) -> None:
        """Whether blocks stay whole after a forward: while FSDP2 trains they do not."""
        for module in self._users:
            if module is not self._root:
                module.set_reshard_after_forward(not keeps, recurse=False)
        if keeps:
            self._root.reshard()

    def _loss(self, batch: Any, loss_of: LossOf) -> Losses:
        """One micro-batch's; of none: 0, with a gradient of 0 for every weight."""
        tokens = torch.zeros(1, 1, dtype=torch.int64, device=self.device) if batch is None else batch.tokens
        context = self.program.begin(tokens, batch, learns=True)
        x = tokens
        for part in self.program.parts():
            if self.recompute and torch.is_floating_point(x):
                x = checkpoint(
                    part.run, x, context, use_reentrant=False, preserve_rng_state=False, context_fn=_recomputed
                )
            else:
                x = part.run(x, context)
        if batch is not None:
            return loss_of(x, batch)
        # The root's: those of blocks were used, and are shards again. Its score head, say, was not.
        whole = (weight for weight in self._root.parameters() if not isinstance(weight, DTensor))
        unused = [weight.sum().float() for weight in whole if weight.requires_grad]
        return torch.stack([x.sum().float(), *unused]).sum() * 0.0, {}


class ShardedSink(Sink):
    """Gradients and AdamW's states of one model's shards. `weights`: what is trained, by name."""

    def __init__(
        self, weights: dict[str, nn.Parameter], shapes: Sequence[Weight], world: World, rule: AdamW, staged: bool
    ) -> None:
        super().__init__((), world, rule, Homes(world, {}))
        self.staged = staged
        self._shapes = list(shapes)
        self._shards = [_Shard(weight.name, weights[weight.name]) for weight in shapes]

    def shards(self) -> dict[str, Tensor]:
        """Every state as a DTensor over the shards themselves, by weight.state: what is loaded into it is there."""
        return {f"{shard.name}.{kind}": shard.saved(kind) for shard in self._shards for kind in SAVED}

    @property
    def collective(self) -> bool:
        """Whether `saved_states` is a collective."""
        return True

    @property
    def weights(self) -> list[Weight]:
        """The trained weights, in the order of `saved_states`."""
        return self._shapes

    def clear(self) -> None:
        """Before a step."""
        for shard in self._shards:
            shard.parameter.grad = None

    def sum_over_ranks(self) -> None:
        """FSDP2 has summed the shards' gradients; those of weights that every rank has whole are summed here."""
        for shard in self._shards:
            if shard.mesh is None:
                shard.parameter.grad = self.world.sum(shard.gradient).view(shard.parameter.shape)

    def norm(self) -> Tensor:
        """Global 2-norm over everything trained and over ranks, fp32 scalar (PPO.md 17)."""
        squares = torch.zeros((), dtype=torch.float64, device=self.world.exact)
        for shard in self._shards:
            squares += sum_of_squares(shard.gradient).to(squares.device) / shard.copies(self.world)
        return self.world.sum(squares).sqrt().float().to(self.world.device)

    def update(self, lr: float, scale: float) -> None:
        """One AdamW update of every shard, where it lies."""
        self.steps += 1
        for shard in self._shards:
            runs = [slice(0, len(shard.weights))] if shard.parameter.dim() > 1 else []
            self.rule.decay(shard.weights, shard.states, runs, lr)
            self.rule.update(shard.weights, shard.states, shard.gradient, lr=lr, scale=scale, step=self.steps)
            shard.parameter.grad = None  # another model steps next, with gradients of its own

    def saved_states(self) -> Iterator[Tensor]:
        """Every weight's `SAVED` states, whole, fp32, on the CPU; all ranks go through it together."""
        for shard in self._shards:
            for kind in SAVED:
                saved = shard.saved(kind)
                yield (saved.full_tensor() if isinstance(saved, DTensor) else saved).cpu()

    def load_states(self, read: Callable[[str, str], Tensor]) -> None:
        """Inverse of `saved_states`. Raises ValueError when they belong to another model."""
        for shard in self._shards:
            for kind in SAVED:
                saved = read(shard.name, kind)
                if saved.shape != shard.parameter.shape:
                    raise ValueError("the optimizer state in the checkpoint belongs to a model of another size")
                shard.state(kind).copy_(shard.part(saved))


class _Shard:
    """This rank's part of one trained weight, with its optimizer states."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self.mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        self.weights = self._local(parameter.detach())
        """[n] fp32, its elements here."""
        self.states = {state: torch.zeros_like(self.weights) for state in states_of(SUMS)}

    @property
    def gradient(self) -> Tensor:
        """[n]: of this rank's elements; zeros where no loss depended on them."""
        grad = self.parameter.grad
        return torch.zeros_like(self.weights) if grad is None else self._local(grad)

    def copies(self, world: World) -> int:
        """How many ranks have these same elements."""
        return world.size if self.mesh is None else world.size // self.mesh.size(self.mesh.ndim - 1)

    def state(self, kind: str) -> Tensor:
        """[n]: this rank's elements of one of SAVED."""
        return self.weights if kind == "master" else self.states[kind]

    def saved(self, kind: str) -> Tensor:
        """The same memory in the weight's shape, as a DTensor where ranks share it."""
        parameter, state = self.parameter, self.state(kind)
        if not isinstance(parameter, DTensor):
            return state.view(parameter.shape)
        return DTensor.from_local(
            state.view(parameter.to_local().shape), parameter.device_mesh, parameter.placements, run_check=False,
            shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip

    def part(self, whole: Tensor) -> Tensor:
        """This rank's elements of the whole weight: [n]."""
        if self.mesh is None:
            return whole.reshape(-1)
        dimension = self.mesh.ndim - 1  # a mesh's last one shards, as torch.chunk cuts
        rows = math.ceil(len(whole) / self.mesh.size(dimension))
        first = rows * self.mesh.get_local_rank(dimension)
        return whole[first : first + rows].reshape(-1)

    def _local(self, tensor: Tensor) -> Tensor:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def prepare(
    model: Any, world: World, mesh: DeviceMesh, tiers: Mapping[str, Ram | Disk], *, dtype: torch.dtype, recompute: bool,
    gathers_once: bool | None, adamw: dict[str, Any],
) -> ShardedStream:  # fmt: skip
    """The model's weights as FSDP2's shards, block by block: at no time is more than one block whole on a rank.

    Raises UserError for trained experts where torch cannot, ResourceError where the shards pass the tier's budget.
    """
    groups, chosen = groups_of(model), {group for part in model.parts() for group in part.choices}
    trains_experts = any(weight.trained for group, members in groups if group in chosen for weight in members)
    if trains_experts and not hasattr(FSDPModule, ZEROS):  # ranks would reduce other weights, and wait for ever
        raise UserError(
            f"FSDP2 of torch {torch.__version__} cannot train experts, of which each rank's tokens choose others; take "
            "torch 2.13, --strategy gemini, or adapters on other layers."
        )
    weights = [weight for _, members in groups for weight in members]
    homes = plan.shard_homes(weights, mesh.size(mesh.ndim - 1))
    tiers["device"].take(homes["weights"] + homes["optimizer"], f"the shards of {type(model).__name__}")
    host = tiers["host"]
    staged = plan.stages(homes, host.used, host.budget)
    host.take(homes["staged"] if staged else 0, f"checkpoints of {type(model).__name__}")
    if world.first and not staged:
        warnings.warn(plan.UNSTAGED.format(type(model).__name__, show_bytes(homes["staged"])), stacklevel=2)
    root = Root(model)
    modules = _sharded(root, groups, mesh, dtype)
    trained = [weight for weight in weights if weight.trained]
    model.train(bool(trained))
    parameters = dict(model.named_parameters())
    sink = ShardedSink(parameters, trained, world, AdamW(**adamw), staged) if trained else None
    return ShardedStream(model, root, modules, world, sink, recompute, dtype, gathers_once)


def _sharded(root: Root, groups: Groups, mesh: DeviceMesh, dtype: torch.dtype) -> dict[str, FSDPModule]:
    """Makes every block a module of FSDP2's, then the root; returns the module that gathers each group."""
    model: Any = root.model
    names = {group: [weight.name for weight in members] for group, members in groups}
    owner_of, chunks = owners(model), layout(groups, world=1)
    modules: dict[str, FSDPModule] = {}
    used = {name for members in names.values() for name in members}
    whole = {weight.requires_grad_(False) for name, weight in model.named_parameters() if name not in used}
    """Parameters that FSDP2 leaves alone: the language model's head in a model of scores, and `_filled`'s."""

    def shard(module: nn.Module, members: Sequence[str]) -> None:
        for chunk in chunks:
            if chunk.group in members:
                whole.update(_filled(model, owner_of, chunk, dtype, mesh.device_type))
        fully_shard(
            module, mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, SUMS, cast_forward_inputs=False),
            ignored_params=whole,
        )  # fmt: skip
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # a loss is divided by what all ranks count already: a sum is wanted
        module.set_force_sum_reduction_for_comms(True)
        if hasattr(module, ZEROS):
            getattr(module, ZEROS)(True)
        modules.update(dict.fromkeys(members, module))

    with model.filling():
        for part in model.parts()[1:-1]:
            path = _common_path([name for group in part.groups for name in names[group]])
            shard(model.get_submodule(path), part.groups)
        shard(root, [group for group in names if group not in modules])
    # By itself FSDP2 gathers what its list of forwards has before a block: passes without gradients too, of which ranks
    # have different numbers, so that they would gather different blocks and wait for ever.
    blocks: list[Any] = [module for module in dict.fromkeys(modules.values()) if module is not root]
    for before, block in itertools.pairwise([root, *blocks]):
        block.set_modules_to_backward_prefetch([before])
    return modules


def _filled(
    model: Any, owner_of: dict[str, tuple[nn.Module, str]], chunk: Chunk, dtype: torch.dtype, device: str
) -> Iterator[nn.Parameter]:
    """Makes the chunk's weights, trained ones in fp32. Yields those that stay whole: one group of FSDP2's has one
    dtype."""
    flat = torch.zeros(chunk.numel, dtype=getattr(torch, chunk.dtype))
    first_values(model, owner_of, chunk, flat)
    stays = flat.dtype != dtype
    for weight, offset in zip(chunk.weights, chunk.offsets, strict=True):
        value = flat[offset : offset + weight.numel].view(weight.shape)
        value = value.to(device if stays else None, SUMS if weight.trained else None)
        parameter = nn.Parameter(value, requires_grad=weight.trained)
        setattr(*owner_of[weight.name], parameter)
        if stays:
            yield parameter


def _common_path(names: Sequence[str]) -> str:
    """The path of the innermost module that holds all of these parameters."""
    paths = [name.split(".")[:-1] for name in names]
    steps = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in steps)


def mesh_of(name: str, world: World) -> DeviceMesh:
    """The ranks; its last dimension has those that share one copy of a model: under hsdp those of a machine."""
    shards = world.size if name == "fsdp" else world.local_size
    if world.size % shards:
        raise UserError(f"--strategy hsdp: {world.size} ranks are not {shards} on every machine; take --strategy fsdp.")
    if shards == world.size:
        return init_device_mesh(world.device.type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (world.size // shards, shards), mesh_dim_names=("replicate", "shard"))


def _recomputed() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """What `checkpoint` wraps the first run and the second one in."""
    return contextlib.nullcontext(), recomputing()


def _no_arenas() -> Any:
    raise AssertionError("nothing passes through slots here")
