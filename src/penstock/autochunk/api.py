"""AutoChunk: a module with the same results in less activation memory, by computing regions of its graph in slices.

    block = penstock.autochunk(block, (x,), budget="200MB")
    print(block.report)

After Zhao et al., "AutoChunk: Automated Activation Chunk for Memory-Efficient Long Sequence Inference" (ICLR 2024); it
also works in training. `trace` reads the module as a graph, `slice_rules` says which ops can be sliced, `liveness`
counts bytes, `search` chooses a plan and `execute` runs it. This file joins them and reports. It keeps no weights: each
call looks them up in the module.

[Note: a plan is checked by a run]
The byte counts of `liveness` are estimates. So a plan runs on fake tensors under a Meter, two slices of each region,
before it is used; if its peak is above the budget, `search` gets a lower target. `penstock plan` uses the same planner.

[Note: the least budget]
Some results must be whole: in forward attention's keys, values and output; in training keys, values, their gradients,
the input's gradient, and what attention's own backward returns before it is added.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from penstock.autochunk.execute import SlicedGraph, in_brief
from penstock.autochunk.liveness import LEAVES, Graph, Plan
from penstock.autochunk.meter import Meter
from penstock.autochunk.recompute import recomputing
from penstock.autochunk.search import choose, coarsened
from penstock.autochunk.slice_rules import Blocked, Cut, Node, needs
from penstock.autochunk.trace import Captured, Leaf, Ops, attribute, capture, measured, writes
from penstock.errors import ResourceError, UserError
from penstock.units import parse_bytes, show_bytes

TRIES = 4
"""Number of plans for lower and lower targets, as long as the run of a plan is above the budget."""
BARS = " .:-=+*#%@"


def autochunk(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    budget: str | int | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    places: bool = True,
) -> "Chunked":
    """A module with the same results, whose activations stay within `budget` ("200MB", or bytes; None: no limit).

    Plans for these arguments now, and again when a call has other shapes. With gradients enabled, the budget holds for
    forward and backward together. `places`: a weight's gradient is added to its `.grad`, if it has one, without
    autograd (use False if hooks need it). Raises ResourceError, with the least budget that works, if no plan is within
    the budget; UserError if the module cannot be exported.
    """
    nbytes = parse_bytes(budget, "budget") if isinstance(budget, str) else budget
    if nbytes is None:
        return Chunked(module, None)
    slicer = Slicer(nbytes, places=places)
    slicer.plan_for(module, args, kwargs or {})
    return Chunked(module, slicer)


@dataclasses.dataclass(frozen=True)
class Report:
    """The plan for one set of shapes. `str(report)` is for people."""

    budget: int
    training: bool
    before: int
    """Peak bytes of the module itself, without arguments and weights."""
    after: int
    """Peak bytes with the plan."""
    regions: tuple[str, ...]
    whole: tuple[str, ...]
    """Ops that cannot be sliced along any dimension, and why."""
    curve_before: tuple[tuple[str, int], ...]
    curve_after: tuple[tuple[str, int], ...]
    """(label of the step, estimate of the most bytes alive during it)."""

    def __str__(self) -> str:
        way = "forward and backward" if self.training else "forward"
        lines = [
            f"autochunk, {way}, budget {show_bytes(self.budget)}:"
            f" {show_bytes(self.before)} -> {show_bytes(self.after)}",
            *(f"  {region}" for region in self.regions or ("left as it is",)),
            *(f"  left whole: {reason}" for reason in self.whole),
        ]
        top = max((nbytes for _, nbytes in self.curve_before), default=1)
        for name, curve in (("before", self.curve_before), ("after", self.curve_after)):
            if curve:
                label, peak = max(curve, key=lambda point: point[1])
                bars = "".join(BARS[min(round((len(BARS) - 1) * n / top), len(BARS) - 1)] for _, n in curve)
                lines.append(f"  {name:6} |{bars}| fullest at {label}: {show_bytes(peak)}")
        return "\n".join(lines)


class Slicer:
    """Plans for modules of the same structure, by the shapes of their arguments. It holds no weights."""

    def __init__(self, budget: int, *, ops: Ops | None = None, places: bool = True, recomputing: bool = False) -> None:
        """`ops`: aten op -> the function that computes it instead. `recomputing`: gradients are asked for only inside
        `recomputing()`."""
        self.budget, self.ops, self.places, self.recomputing = budget, ops or {}, places, recomputing
        self.reports: dict[Any, Report] = {}
        self.latest: Any = None
        """The key of the report that was used last."""
        self._programs: dict[Any, SlicedGraph | None] = {}

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        program = self.plan_for(module, args, kwargs)
        if program is None:
            return module(*args, **kwargs)
        flat = pytree.tree_leaves((args, kwargs))
        return program.run([self._value(leaf, module, flat) for leaf in program.captured.leaves.values()])

    def _value(self, leaf: Leaf, module: nn.Module, flat: Sequence[Any]) -> Any:
        if leaf.kind == "argument":
            return flat[leaf.at]
        return leaf.at if leaf.kind == "constant" else part_of(attribute(module, leaf.at), leaf, self.places)

    def plan_for(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SlicedGraph | None:
        """The program for arguments like these; None: the module itself is within the budget."""
        flat = pytree.tree_leaves((args, kwargs))
        weights = list(module.parameters())
        training = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (*flat, *weights))
        values = (_signature(x, training) for x in (*flat, *weights))
        key = (*values, *(name for name, _ in module.named_parameters()))
        if key not in self._programs:
            with _disable_current_modes():  # a Meter or fake mode of the caller does not see the planning
                fakes = _Fakes(module, args, kwargs, training, self.recomputing)
                self._programs[key] = self._plan(module, fakes, key)
        self.latest = key
        return self._programs[key]

    def _plan(self, module: nn.Module, fakes: "_Fakes", key: Any) -> SlicedGraph | None:
        captured = fakes.capture(module)
        before = fakes.peak(lambda: fakes.call(module))
        with fakes.mode:
            leaves = [fakes.leaf(leaf, places=False) for leaf in captured.leaves.values()]
            graph, results = measured(captured, leaves, self.ops, fakes.training)

        def tried(plan: Plan) -> "_Trial":
            program = SlicedGraph(captured, graph, plan, results, self.ops, self.places)
            return _Trial(plan, program, fakes.peak(lambda: fakes.run(program, self.places)))

        plain = choose(graph, None, fakes.training, fakes.recomputing)
        trial, whole = _Trial(plain, None, before), left_whole(graph)
        if written := writes(captured):
            whole = [f"everything ({', '.join(written)} write in place)"]
        elif before > self.budget:
            trial = self._fit(graph, tried, fakes.training, fakes.recomputing)
        self.reports[key] = Report(
            self.budget, fakes.training, before, trial.peak, tuple(_described(graph, trial.plan)), tuple(whole),
            plain.curve, trial.plan.curve,
        )  # fmt: skip
        if trial.peak > self.budget:  # see [Note: the least budget]
            raise ResourceError(
                f"autochunk: {type(module).__name__} under a budget of {show_bytes(self.budget)}: the least found for "
                f"these shapes is {show_bytes(trial.peak)} (as it is: {show_bytes(before)}); give that much, or "
                "shorter rows." + "".join(f" Left whole: {reason}." for reason in whole[:3])
            )
        return trial.program

    def _fit(self, graph: Graph, tried: Callable[[Plan], "_Trial"], training: bool, recomputing: bool) -> "_Trial":
        """The cheapest plan found whose run is within the budget, else the plan with the least bytes.
        See [Note: a plan is checked by a run]."""
        target = self.budget
        for _ in range(TRIES):
            plan = choose(graph, target, training, recomputing)
            if plan.peak > target:
                break
            trial = tried(plan)
            if trial.peak <= self.budget:
                return trial
            target = max(min(target - 1, target - trial.peak + self.budget, target * self.budget // trial.peak), 1)
        least = tried(choose(graph, 1, training, recomputing))
        room = self.budget - least.peak  # the finest slices may be finer than the budget asks
        for _ in range(TRIES):
            if room > 0:
                trial = tried(coarsened(graph, least.plan, least.plan.peak + room, training, recomputing))
                if trial.peak <= self.budget:
                    return trial
                room //= 2
        return least


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A plan, its program (None: the module itself) and the peak bytes of its run on fake tensors."""

    plan: Plan
    program: SlicedGraph | None
    peak: int


class Chunked(nn.Module):
    """A module that computes in slices; see `autochunk`."""

    def __init__(self, module: nn.Module, slicer: Slicer | None) -> None:
        super().__init__()
        self.module, self.slicer = module, slicer

    @property
    def report(self) -> Report | None:
        """For the shapes that were used last; None without a budget."""
        return None if self.slicer is None else self.slicer.reports[self.slicer.latest]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        if self.slicer is None:
            return self.module(*args, **kwargs)
        return self.slicer.run(self.module, *args, **kwargs)


def _signature(x: Any, training: bool) -> Any:
    if not isinstance(x, Tensor):
        return x
    return tuple(x.shape), x.dtype, x.device, x.requires_grad and training


def part_of(weight: Tensor, leaf: Leaf, places: bool) -> Tensor:
    """The part of a weight that a leaf reads. If the weight has a `.grad`, the part's `.grad` is a view of it."""
    if leaf.part is None:
        return weight
    if not (places and torch.is_grad_enabled() and weight.requires_grad and weight.grad is not None):
        return weight.narrow(*leaf.part)
    part = weight.detach().narrow(*leaf.part).requires_grad_()
    part.grad = weight.grad.narrow(*leaf.part)
    return part


class _Fakes:
    """Fake arguments and weights, without memory, to count the bytes of a run."""

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, recomputing: bool
    ) -> None:
        self.module, self.training, self.recomputing = module, training, training and recomputing
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.mode.allow_non_fake_inputs = True
        with self.mode:
            self.args, self.kwargs = pytree.tree_map_only(Tensor, self._like, (args, kwargs))
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            self.weights = {
                name: nn.Parameter(self._like(x), x.requires_grad and training)
                if isinstance(x, nn.Parameter)
                else self._like(x)
                for name, x in tensors.items()
            }
        self.constants: dict[int, Tensor] = {}
        self.flat = pytree.tree_leaves((self.args, self.kwargs))

    def _like(self, x: Tensor) -> Tensor:
        fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return fake.requires_grad_(x.requires_grad and self.training)

    def leaf(self, leaf: Leaf, places: bool) -> Any:
        """The fake value of a captured graph's leaf."""
        if leaf.kind == "argument":
            return self.flat[leaf.at]
        if leaf.kind == "weight":
            if leaf.at not in self.weights:  # the second name of a shared weight
                self.weights[leaf.at] = self._like(attribute(self.module, leaf.at))
            return part_of(self.weights[leaf.at], leaf, places)
        if isinstance(leaf.at, Tensor) and id(leaf.at) not in self.constants:
            self.constants[id(leaf.at)] = self._like(leaf.at)
        return self.constants.get(id(leaf.at), leaf.at)

    def capture(self, module: nn.Module) -> Captured:
        """The module's graph, traced with fake weights."""
        with _reparametrize_module(module, self.weights):
            try:
                return capture(module, self.args, self.kwargs)
            except Exception as error:  # whatever torch.export raises: the module is a user's
                first = str(error).strip().splitlines()[0]
                raise UserError(
                    f"autochunk: {type(module).__name__} cannot be exported by torch.export: {type(error).__name__}: "
                    f"{first} Slice a part of it that can be, such as one layer."
                ) from error

    def call(self, module: nn.Module) -> Any:
        """Runs the module."""
        return functional_call(module, self.weights, self.args, self.kwargs)

    def run(self, program: SlicedGraph, places: bool) -> Any:
        """Runs the program."""
        return program.run([self.leaf(leaf, places) for leaf in program.captured.leaves.values()])

    def peak(self, run: Callable[[], Any]) -> int:
        """Most bytes of forward, and of backward in training, without arguments, weights and weights' gradients."""
        with self.mode, torch.set_grad_enabled(self.training):
            for x in (*self.weights.values(), *self.flat):
                if isinstance(x, Tensor) and x.requires_grad:
                    x.grad = None
            for weight in self.weights.values():
                if weight.requires_grad:
                    weight.grad = torch.empty_like(weight)
            with in_brief(), Meter() as meter, recomputing() if self.recomputing else contextlib.nullcontext():
                results = [x for x in pytree.tree_leaves(run()) if isinstance(x, Tensor)]
                learning = [x for x in results if x.requires_grad]
                if learning:
                    del results
                    with meter.on("given"):
                        slopes = [torch.empty_like(x) for x in learning]
                    torch.autograd.backward(learning, slopes)
            return meter.peak


def _described(graph: Graph, plan: Plan) -> list[str]:
    lines = []
    for region in plan.regions:
        end = graph.nodes[region.outputs[-1]]
        nodes = [graph.nodes[i] for i in region.ops]
        op_names = dict.fromkeys(node.op_name for node in nodes if graph.holds[node.index].own)
        lines.append(
            f"{region.slices} slices of {region.length} along dimension {region.cuts[end.index].dim} of {end.name} "
            f"{list(end.shape)}: {nodes[0].name} to {nodes[-1].name}, {len(nodes)} ops ({', '.join(op_names)})"
        )
    return lines


def left_whole(graph: Graph) -> list[str]:
    """Ops that cannot be sliced along any dimension of their results, the largest first, with the reason."""
    lines = []
    for node in graph.nodes:
        nbytes = graph.sizes[node.index]
        if node.op not in LEAVES and nbytes and (reason := _why_whole(node)):
            lines.append((nbytes, f"{node.name} ({reason}; {show_bytes(nbytes)})"))
    return [text for _, text in sorted(lines, reverse=True)]


def _why_whole(node: Node) -> str:
    """The reason why the op cannot be sliced along any dimension; empty if it can."""
    reasons = []
    for dim, extent in enumerate(node.shape):
        if extent > 1:
            try:
                needs(node, Cut(dim, extent))
                return ""
            except Blocked as error:
                reasons.append(str(error))
    return "; ".join(dict.fromkeys(reasons))
