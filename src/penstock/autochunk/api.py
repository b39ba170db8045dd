"""AutoChunk: a module with the same results in less activation memory, by computing regions of its graph in slices.

    block = penstock.autochunk(block, (x,), budget="200MB")
    print(block.report)

After Zhao et al., "AutoChunk: Automated Activation Chunk for Memory-Efficient Long Sequence Inference" (ICLR 2024), and
for training too. `graph.py` reads the module, `flow.py` knows how slices pass an op, `regions.py` chooses, `slices.py`
runs; this file puts them together, holds every plan against a run on fake tensors, and reports. Weights stay the
module's own: they are looked up at every call.
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
from penstock.autochunk.trace import Captured, Leaf, Ops, capture, measured, writes
from penstock.errors import ResourceError, UserError
from penstock.units import parse_bytes, show_bytes

TRIES = 4
"""How often a plan whose run on fake tensors passes the budget is made again for less."""
BARS = " .:-=+*#%@"


def autochunk(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    budget: str | int | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    places: bool = True,
) -> "Chunked":
    """The module with the same results, whose activations stay within `budget` ("200MB", bytes; None: no end).

    Planned for these arguments now, and again whenever a call brings other shapes. With gradients enabled the budget
    holds for forward and backward together. `places`: a weight's gradient is added to its `.grad` where it has one,
    without passing through autograd (False where hooks wait for it). Raises ResourceError where no plan found is within
    the budget, with the least that works; UserError for a module that cannot be exported.
    """
    nbytes = parse_bytes(budget, "budget") if isinstance(budget, str) else budget
    if nbytes is None:
        return Chunked(module, None)
    slicer = Slicer(nbytes, places=places)
    slicer.plan_for(module, args, kwargs or {})
    return Chunked(module, slicer)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found for one set of shapes. `str(report)` is for people."""

    budget: int
    training: bool
    before: int
    """Peak bytes of the module as it is, beside what it is given."""
    after: int
    """The same with the plan."""
    regions: tuple[str, ...]
    whole: tuple[str, ...]
    """Ops that can be sliced along no dimension, and why."""
    curve_before: tuple[tuple[str, int], ...]
    curve_after: tuple[tuple[str, int], ...]
    """(what runs, estimated bytes alive at its fullest instant)."""

    def __str__(self) -> str:
        way = "forward and backward" if self.training else "forward"
        lines = [
            f"autochunk, {way}, budget {show_bytes(self.budget)}:"
            f" {show_bytes(self.before)} -> {show_bytes(self.after)}",
            *(f"  {one}" for one in self.regions or ("left as it is",)),
            *(f"  left whole: {one}" for one in self.whole),
        ]
        top = max(nbytes for _, nbytes in self.curve_before) if self.curve_before else 1
        for name, curve in (("before", self.curve_before), ("after", self.curve_after)):
            if curve:
                at, most = max(curve, key=lambda one: one[1])
                bars = "".join(BARS[min(round((len(BARS) - 1) * n / top), len(BARS) - 1)] for _, n in curve)
                lines.append(f"  {name:6} |{bars}| fullest at {at}: {show_bytes(most)}")
        return "\n".join(lines)


class Slicer:
    """Plans for modules of one kind, kept by the shapes of what they are called with; it holds no weights."""

    def __init__(self, budget: int, *, ops: Ops | None = None, places: bool = True, again: bool = False) -> None:
        """`ops`: aten op -> what computes it instead. `again`: gradients are asked for under `recomputing()` alone."""
        self.budget, self.ops, self.places, self.again = budget, ops or {}, places, again
        self.reports: dict[Any, Report] = {}
        self.latest: Any = None
        """The key of the report that was planned or called for last."""
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
        return leaf.at if leaf.kind == "constant" else part_of(_named(module, leaf.at), leaf, self.places)

    def plan_for(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SlicedGraph | None:
        """What runs for arguments like these; None: the module itself."""
        flat = pytree.tree_leaves((args, kwargs))
        weights = list(module.parameters())
        training = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (*flat, *weights))
        key = (*(_kind(x, training) for x in (*flat, *weights)), *(name for name, _ in module.named_parameters()))
        if key not in self._programs:
            with _disable_current_modes():  # whoever counts or pretends around us need not see the planning
                self._programs[key] = self._plan(module, args, kwargs, training, key)
        self.latest = key
        return self._programs[key]

    def _plan(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, key: Any
    ) -> SlicedGraph | None:
        fakes = _Fakes(module, args, kwargs, training)
        again = training and self.again
        captured = fakes.capture(module)
        writing = writes(captured)
        before = fakes.peak(lambda: fakes.call(module), again)
        with fakes.mode:
            leaves = [fakes.leaf(leaf, places=False) for leaf in captured.leaves.values()]
            graph, results = measured(captured, leaves, self.ops, training)
        plain = choose(graph, None, training, again)
        program, after, plan = None, before, plain
        target = self.budget

        def tried(plan: Plan) -> tuple[SlicedGraph, int]:
            program = SlicedGraph(captured, graph, plan, results, self.ops, self.places)
            return program, fakes.peak(lambda: fakes.run(program, self.places), again)

        for attempt in range(TRIES + 1):
            if after <= self.budget or writing:
                break
            plan = choose(graph, target if attempt < TRIES else 1, training, again)
            if plan.peak > target:  # none is known to fit: the lowest of all
                attempt, plan = TRIES, choose(graph, 1, training, again)
            program, after = tried(plan)
            if attempt == TRIES:  # in the finest of slices: it may be lower than it must be
                room = self.budget - after
                while room > 0 and attempt > 0:
                    coarser = coarsened(graph, plan, plan.peak + room, training, again)
                    found, peak = tried(coarser)
                    if peak <= self.budget:
                        program, after, plan = found, peak, coarser
                        break
                    room, attempt = room // 2, attempt - 1
                break
            target = max(min(target - 1, target - after + self.budget, target * self.budget // after), 1)
        whole = left_whole(graph)
        if writing:
            whole = [f"everything ({', '.join(writing)} write in place)"]
        self.reports[key] = Report(
            self.budget, training, before, after, tuple(_described(graph, plan)), tuple(whole), plain.curve, plan.curve
        )
        if after > self.budget:
            raise ResourceError(
                f"autochunk: {type(module).__name__} under a budget of {show_bytes(self.budget)}: the least found for "
                f"these shapes is {show_bytes(after)} (as it is: {show_bytes(before)}); give that much, or shorter "
                f"rows." + "".join(f" Left whole: {one}." for one in whole[:3])
            )
        return program


class Chunked(nn.Module):
    """A module that computes in slices; see `autochunk`."""

    def __init__(self, module: nn.Module, slicer: Slicer | None) -> None:
        super().__init__()
        self.module, self.slicer = module, slicer

    @property
    def report(self) -> Report | None:
        """Of the shapes that were planned or called for last; None without a budget."""
        return None if self.slicer is None else self.slicer.reports[self.slicer.latest]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        if self.slicer is None:
            return self.module(*args, **kwargs)
        return self.slicer.run(self.module, *args, **kwargs)


def _kind(x: Any, training: bool) -> Any:
    if not isinstance(x, Tensor):
        return x
    return tuple(x.shape), x.dtype, x.device, x.requires_grad and training


def part_of(weight: Tensor, leaf: Leaf, places: bool) -> Tensor:
    """What a leaf reads of a weight; where the weight's gradient has its place, the part's place is in it."""
    if leaf.part is None:
        return weight
    if not (places and torch.is_grad_enabled() and weight.requires_grad and weight.grad is not None):
        return weight.narrow(*leaf.part)
    part = weight.detach().narrow(*leaf.part).requires_grad_()
    part.grad = weight.grad.narrow(*leaf.part)
    return part


def _named(module: nn.Module, name: str) -> Any:
    value: Any = module
    for one in name.split("."):
        value = getattr(value, one)
    return value


class _Fakes:
    """Arguments and weights without memory, to count what runs hold."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> None:
        self.mode, self.training, self.module = FakeTensorMode(shape_env=ShapeEnv()), training, module
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
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return made.requires_grad_(x.requires_grad and self.training)

    def leaf(self, leaf: Leaf, places: bool) -> Any:
        """The fake value of a captured graph's leaf."""
        if leaf.kind == "argument":
            return self.flat[leaf.at]
        if leaf.kind == "weight":
            if leaf.at not in self.weights:  # the second name of a shared one
                self.weights[leaf.at] = self._like(_named(self.module, leaf.at))
            return part_of(self.weights[leaf.at], leaf, places)
        if isinstance(leaf.at, Tensor) and id(leaf.at) not in self.constants:
            self.constants[id(leaf.at)] = self._like(leaf.at)
        return self.constants.get(id(leaf.at), leaf.at)

    def capture(self, module: nn.Module) -> Captured:
        """The module's graph; its weights are not touched."""
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
        """The module itself."""
        return functional_call(module, self.weights, self.args, self.kwargs)

    def run(self, program: SlicedGraph, places: bool) -> Any:
        """The program."""
        return program.run([self.leaf(leaf, places) for leaf in program.captured.leaves.values()])

    def peak(self, run: Callable[[], Any], again: bool) -> int:
        """Most bytes that forward, and backward when training, hold beside arguments, weights and their gradients."""
        with self.mode, torch.set_grad_enabled(self.training):
            for one in (*self.weights.values(), *self.flat):
                if isinstance(one, Tensor) and one.requires_grad:
                    one.grad = None
            for weight in self.weights.values():
                if weight.requires_grad:
                    weight.grad = torch.empty_like(weight)
            with in_brief(), Meter() as meter, recomputing() if again else contextlib.nullcontext():
                results = [one for one in pytree.tree_leaves(run()) if isinstance(one, Tensor)]
                learning = [one for one in results if one.requires_grad]
                if learning:
                    del results
                    with meter.on("given"):
                        slopes = [torch.empty_like(one) for one in learning]
                    torch.autograd.backward(learning, slopes)
            return meter.peak


def _described(graph: Graph, plan: Plan) -> list[str]:
    lines = []
    for region in plan.regions:
        end = region.outputs[-1]
        cut = region.cuts[end]
        names = [graph.nodes[i] for i in region.ops]
        told = dict.fromkeys(node.what for node in names if graph.holds[node.index].own)
        lines.append(
            f"{region.slices} slices of {region.length} along dimension {cut.dim} of {graph.nodes[end].name} "
            f"{list(graph.nodes[end].shape)}: {names[0].name} to {names[-1].name}, {len(names)} ops "
            f"({', '.join(told)})"
        )
    return lines


def left_whole(graph: Graph) -> list[str]:
    """Ops that can be sliced along no dimension of their results, the largest first, with the reason."""
    found = []
    for node in graph.nodes:
        if node.op in LEAVES or not graph.sizes[node.index]:
            continue
        why = _why_whole(node)
        if why:
            found.append((graph.sizes[node.index], f"{node.name} ({why}; {show_bytes(graph.sizes[node.index])})"))
    return [text for _, text in sorted(found, reverse=True)]


def _why_whole(node: Node) -> str:
    """Why it can be sliced along no dimension; nothing where it can."""
    reasons = []
    for dim, extent in enumerate(node.shape):
        if extent > 1:
            try:
                needs(node, Cut(dim, extent))
                return ""
            except Blocked as error:
                reasons.append(str(error))
    return "; ".join(dict.fromkeys(reasons))
