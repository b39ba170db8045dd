"""Running a graph with regions: outside them op by op, inside them a loop over slices that writes into whole results.

In training a region is one step of autograd: it keeps what it reads, and its backward computes each slice again. So it
may be cut as finely forward as backward, and weights' gradients are added up slice by slice.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penstock.autochunk.liveness import Graph, Plan, Region
from penstock.autochunk.recompute import is_recomputing
from penstock.autochunk.slice_rules import RULES, SIZED, Cut, Node, Ref, attention
from penstock.autochunk.trace import Captured, Ops, call, filled

aten = torch.ops.aten
Key = tuple[int, Cut | None]
"""What a region reads: the result of an op, or a slice of it."""


def take(x: Tensor, cut: Cut, start: int, length: int) -> Tensor:
    """A slice of a tensor, as a view where one is possible."""
    if cut.prefix:
        return x.narrow(cut.dim, 0, start + length)
    if cut.outer == cut.inner == 1:
        return x.narrow(cut.dim, start, length)
    return _middle(x, cut, cut.extent).narrow(cut.dim + 1, start, length).flatten(cut.dim, cut.dim + 2)


def put(out: Tensor, cut: Cut, start: int, x: Tensor) -> None:
    """Writes a slice into its place."""
    length = x.shape[cut.dim] // (cut.outer * cut.inner)
    if cut.outer == cut.inner == 1:
        out.narrow(cut.dim, start, length).copy_(x)
    else:
        _middle(out, cut, cut.extent).narrow(cut.dim + 1, start, length).copy_(_middle(x, cut, length))


def _middle(x: Tensor, cut: Cut, extent: int) -> Tensor:
    return x.unflatten(cut.dim, (cut.outer, extent, cut.inner))


class RegionRunner:
    """A region ready to run."""

    def __init__(self, graph: Graph, region: Region, ops: Ops, like: Sequence[Tensor], places: bool) -> None:
        """`like`: per output, a fake tensor with its shape, strides and dtype. `places`: a weight's gradient is added
        to its `.grad`, if it has one, rather than returned."""
        self.region, self.ops, self.places = region, ops, places
        self.indices = list(dict.fromkeys(index for index, _ in region.inputs))
        """Ops and leaves whose results it reads, each once."""
        self.weights = [graph.nodes[index].op == "weight" for index in self.indices]
        self.like = [(tuple(one.shape), one.stride(), one.dtype, one.device) for one in like]
        self.steps = [self._step(graph, index) for index in region.ops]
        last: dict[int, int] = {}
        for at, (node, keys, _) in enumerate(self.steps):
            last |= {source: at for source, _ in keys if source in region.cuts}
            last.setdefault(node.index, at)
        self.ends: list[list[int]] = [[] for _ in self.steps]
        for index, at in last.items():
            if index not in region.outputs:
                self.ends[at].append(index)
        self.final = False
        """Whether its results leave the module and nobody inside reads them."""

    def _step(self, graph: Graph, index: int) -> tuple[Node, list[Key], Cut]:
        node = graph.nodes[index]
        return node, graph.reads(index, self.region.cuts[index]), self.region.cuts[index]

    def run(self, inputs: dict[Key, Any], start: int, length: int) -> list[Any]:
        """One slice: its outputs."""
        made: dict[int, Any] = {}
        for at, (node, keys, cut) in enumerate(self.steps):
            found = iter(keys)

            def find(_: Ref, found: Any = found) -> Any:
                key = next(found)
                return made[key[0]] if self.region.cuts.get(key[0], self) == key[1] else inputs[key]

            arguments = list(filled(node.args, find))
            made[node.index] = _compute(node, arguments, cut, start, length, self.ops)
            del arguments
            for index in self.ends[at]:
                del made[index]
        return [made[index] for index in self.region.outputs]

    def spans(self) -> list[tuple[int, int]]:
        """(start, length) of every slice, or of those that differ in what they hold."""
        extent, length = self.region.extent, self.region.length
        every = [(start, min(length, extent - start)) for start in range(0, extent, length)]
        return [every[0], *every[1:][extent // length - 2 :][:1]] if _IN_BRIEF.get() else every

    def forward(self, values: Sequence[Any]) -> list[Tensor]:
        """All slices, into outputs made once; without gradients."""
        outputs = [torch.empty_strided(shape, stride, dtype=dtype, device=device)
                   for shape, stride, dtype, device in self.like]  # fmt: skip
        by_index = dict(zip(self.indices, values, strict=True))
        for start, length in self.spans():
            inputs = {
                (index, cut): by_index[index] if cut is None else take(by_index[index], cut, start, length)
                for index, cut in self.region.inputs
            }
            for index, out, part in zip(self.region.outputs, outputs, self.run(inputs, start, length), strict=True):
                put(out, self.region.cuts[index], start, part)
            del part
        return outputs

    def backward(self, values: Sequence[Any], slopes: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Any]:
        """Gradients of `values`, where wanted: each slice is computed again and its gradients are added up."""
        by_index = dict(zip(self.indices, values, strict=True))
        wants = {index for index, want in zip(self.indices, wanted, strict=True) if want}
        in_place = set()
        for index, weight in zip(self.indices, self.weights, strict=True):
            value = by_index[index]
            if self.places and weight and index in wants and value.is_leaf and value.grad is not None:
                in_place.add(index)
        sums: dict[Key, Tensor] = {}
        for index, cut in self.region.inputs:
            if index in in_place:
                sums[index, cut] = by_index[index].grad
            elif index in wants and cut is not None:
                make = torch.zeros_like if cut.prefix else torch.empty_like
                sums[index, cut] = make(by_index[index], memory_format=torch.preserve_format)
        for start, length in self.spans():
            inputs: dict[Key, Any] = {}
            for index, cut in self.region.inputs:
                value = by_index[index]
                if isinstance(value, Tensor):
                    value = value.detach()
                    part = value if cut is None else take(value, cut, start, length)
                    value = part.detach().requires_grad_(index in wants)
                    place = sums.get((index, cut))
                    if place is not None and (cut is None or cut.prefix or index in in_place):
                        value.grad = place if cut is None else take(place, cut, start, length)
                inputs[index, cut] = value
            with torch.enable_grad():
                results = self.run(inputs, start, length)
            pairs = [
                (result, take(slope, self.region.cuts[index], start, length))
                for index, result, slope in zip(self.region.outputs, results, slopes, strict=True)
                if slope is not None and result.requires_grad
            ]
            del results
            if pairs:
                torch.autograd.backward([one for one, _ in pairs], [slope for _, slope in pairs])
            del pairs
            for (index, cut), value in inputs.items():
                if index not in wants:
                    continue
                if cut is None:
                    if value.grad is not None:
                        sums[index, cut] = value.grad
                elif not cut.prefix and index not in in_place:
                    put(sums[index, cut], cut, start, torch.zeros_like(value) if value.grad is None else value.grad)
            del inputs, value
        found: list[Any] = []
        for index in self.indices:
            mine = [sums[key] for key in self.region.inputs if key[0] == index and key in sums]
            found.append(
                None if index in in_place or not mine else mine[0] if len(mine) == 1 else sum(mine[1:], mine[0])
            )
        return found


def _compute(node: Node, arguments: list[Any], cut: Cut, start: int, length: int, ops: Ops) -> Any:
    """One op of a slice: what it was told of the whole result's shape, or of what queries see, is put right."""
    if node.op in SIZED:
        shape = list(node.shape)
        shape[cut.dim] = cut.size(length)
        if node.op is aten.expand.default:
            return arguments[0].expand(shape)
        return arguments[0].reshape(shape)  # a slice of several rows is no view
    if RULES.get(node.op) is attention and cut.dim == len(node.shape) - 2 and node.arg("is_causal"):
        q, k = arguments[0], arguments[1]
        seen = torch.ones(length, start + length, dtype=torch.bool, device=q.device).tril(start)
        at = node.names.index("attn_mask")
        arguments[at], arguments[node.names.index("is_causal")] = seen, False
        assert k.shape[-2] == start + length
    return call(node, arguments, ops)


class RegionFunction(torch.autograd.Function):
    """A region as one step of autograd: it keeps what it reads and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, sliced: RegionRunner, recomputing: bool, *values: Any) -> tuple[Tensor, ...]:
        ctx.sliced = sliced
        tensors = [None if weight else value for weight, value in zip(sliced.weights, values, strict=True)]
        ctx.weights = [value if weight else None for weight, value in zip(sliced.weights, values, strict=True)]
        ctx.save_for_backward(*tensors)  # weights themselves: their .grad is the place, as in models.linear
        ctx.set_materialize_grads(False)
        if recomputing and sliced.final:
            outputs = [torch.empty((), dtype=dtype, device=device).expand(shape)
                       for shape, _, dtype, device in sliced.like]  # fmt: skip
        else:
            outputs = sliced.forward(values)
        ctx.mark_non_differentiable(*(one for one in outputs if not one.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Any, ...]:
        values = [
            weight if weight is not None else tensor
            for weight, tensor in zip(ctx.weights, ctx.saved_tensors, strict=True)
        ]
        return None, None, *ctx.sliced.backward(values, slopes, ctx.needs_input_grad[2:])


_IN_BRIEF = contextvars.ContextVar("in_brief", default=False)


@contextlib.contextmanager
def in_brief() -> Iterator[None]:
    """Inside, regions run their first slice and the last whole one, for their bytes: then sums exist, and causal
    queries see all keys."""
    token = _IN_BRIEF.set(True)
    try:
        yield
    finally:
        _IN_BRIEF.reset(token)


class SlicedGraph:
    """A captured graph with a plan: what a call runs."""

    def __init__(
        self, captured: Captured, graph: Graph, plan: Plan, like: Sequence[Any], ops: Ops, places: bool
    ) -> None:
        """`like`: per node, a fake result."""
        self.captured, self.graph, self.plan, self.ops = captured, graph, plan, ops
        self.steps: list[int | RegionRunner] = [
            step if isinstance(step, int) else RegionRunner(graph, step, ops, [like[i] for i in step.outputs], places)
            for step in plan.steps
        ]
        last: dict[int, int] = {}
        for at, step in enumerate(self.steps):
            reads = graph.nodes[step].reads if isinstance(step, int) else step.indices
            made = [step] if isinstance(step, int) else step.region.outputs
            last |= dict.fromkeys([*made, *reads], at)
        outputs = set(graph.outputs)
        self.ends: list[list[int]] = [[] for _ in self.steps]
        for index, at in last.items():
            if index not in outputs and index not in captured.leaves:
                self.ends[at].append(index)
        for at, step in enumerate(self.steps):
            if isinstance(step, RegionRunner):
                step.final = all(last[index] == at and index in outputs for index in step.region.outputs)

    def run(self, leaves: Sequence[Any]) -> Any:
        """`leaves` in the order of `captured.leaves`; returns what the module returns."""
        values: dict[int, Any] = dict(zip(self.captured.leaves, leaves, strict=True))
        for at, step in enumerate(self.steps):
            if isinstance(step, int):
                node = self.graph.nodes[step]
                arguments = filled(node.args, lambda ref: values[ref.index])
                values[step] = call(node, arguments, self.ops)
                del arguments
            else:
                given = [values[index] for index in step.indices]
                learning = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
                results = RegionFunction.apply(step, is_recomputing(), *given) if learning else step.forward(given)
                values.update(zip(step.region.outputs, results, strict=True))
                del given, results
            for index in self.ends[at]:
                del values[index]
        return pytree.tree_unflatten(filled(self.captured.outputs, lambda ref: values[ref.index]), self.captured.spec)
