"""Runs a graph with regions: single ops one by one, and a region as a loop over slices that writes into its outputs.

In training a region is one step of autograd: it keeps its inputs, and its backward computes each slice again. So the
backward has the same slices as the forward, and gradients of weights are added up slice by slice.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penstock.autochunk.liveness import Graph, Plan, Read, Region
from penstock.autochunk.recompute import is_recomputing
from penstock.autochunk.search import read_by
from penstock.autochunk.slice_rules import RULES, SIZED, Cut, Node, Ref, attention
from penstock.autochunk.trace import Captured, Ops, call, filled

aten = torch.ops.aten


def take(x: Tensor, cut: Cut, start: int, length: int) -> Tensor:
    """A slice of a tensor, as a view if possible."""
    if cut.prefix:
        return x.narrow(cut.dim, 0, start + length)
    if cut.outer == cut.inner == 1:
        return x.narrow(cut.dim, start, length)
    return _middle(x, cut, cut.extent).narrow(cut.dim + 1, start, length).flatten(cut.dim, cut.dim + 2)


def put(out: Tensor, cut: Cut, start: int, x: Tensor) -> None:
    """Writes the slice `x` into `out`."""
    length = x.shape[cut.dim] // (cut.outer * cut.inner)
    if cut.outer == cut.inner == 1:
        out.narrow(cut.dim, start, length).copy_(x)
    else:
        _middle(out, cut, cut.extent).narrow(cut.dim + 1, start, length).copy_(_middle(x, cut, length))


def _middle(x: Tensor, cut: Cut, extent: int) -> Tensor:
    return x.unflatten(cut.dim, (cut.outer, extent, cut.inner))


class RegionRunner:
    """A region that is ready to run."""

    def __init__(self, graph: Graph, region: Region, ops: Ops, like: Sequence[Tensor], places: bool) -> None:
        """`like`: for each output, a fake tensor of its shape, strides and dtype. `places`: a weight's gradient is
        added to its `.grad`, if it has one, rather than returned."""
        self.region, self.ops, self.places = region, ops, places
        self.indices = list(dict.fromkeys(index for index, _ in region.inputs))
        """Ops and leaves whose results it reads."""
        self.is_weight = [graph.nodes[index].op == "weight" for index in self.indices]
        self.like = [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in like]
        self.steps = [(graph.nodes[i], graph.reads(i, region.cuts[i]), region.cuts[i]) for i in region.ops]
        last: dict[int, int] = {}
        for at, (node, reads, _) in enumerate(self.steps):
            last |= {source: at for source, _ in reads if source in region.cuts}
            last.setdefault(node.index, at)
        self.ends: list[list[int]] = [[] for _ in self.steps]
        for index, at in last.items():
            if index not in region.outputs:
                self.ends[at].append(index)
        self.final = False
        """Whether all its results leave the module and no later step reads them."""

    def run(self, inputs: dict[Read, Any], start: int, length: int) -> list[Any]:
        """Computes one slice of each output."""
        cuts = self.region.cuts
        results: dict[int, Any] = {}

        def argument(reads: Iterator[Read], _: Ref) -> Any:
            index, cut = read = next(reads)
            return results[index] if index in cuts and cuts[index] == cut else inputs[read]

        for (node, reads, cut), ends in zip(self.steps, self.ends, strict=True):
            arguments = list(filled(node.args, functools.partial(argument, iter(reads))))
            results[node.index] = compute(node, arguments, cut, start, length, self.ops)
            del arguments
            for index in ends:
                del results[index]
        return [results[index] for index in self.region.outputs]

    def spans(self) -> list[tuple[int, int]]:
        """(start, length) of every slice. Inside `in_brief()`: of the first slice and the last one of full length."""
        extent, length = self.region.extent, self.region.length
        spans = [(start, min(length, extent - start)) for start in range(0, extent, length)]
        if not _IN_BRIEF.get():
            return spans
        last_full = extent // length - 1
        return [spans[0], *spans[1:][last_full - 1 :][:1]]

    def forward(self, values: Sequence[Any]) -> list[Tensor]:
        """Computes all slices, without gradients, into outputs that are allocated once."""
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

    def backward(self, values: Sequence[Any], slopes: Sequence[Tensor | None], learns: Sequence[bool]) -> list[Any]:
        """Gradients of the `values` that learn: computes each slice again and adds up the gradients of the slices.
        `slopes`: gradients of the outputs."""
        by_index = dict(zip(self.indices, values, strict=True))
        learning = {index for index, learn in zip(self.indices, learns, strict=True) if learn}
        in_place = set()
        for index, is_weight in zip(self.indices, self.is_weight, strict=True):
            value = by_index[index]
            if self.places and is_weight and index in learning and value.is_leaf and value.grad is not None:
                in_place.add(index)
        sums: dict[Read, Tensor] = {}
        for index, cut in self.region.inputs:
            if index in in_place:
                sums[index, cut] = by_index[index].grad
            elif index in learning and cut is not None:
                make = torch.zeros_like if cut.prefix else torch.empty_like
                sums[index, cut] = make(by_index[index], memory_format=torch.preserve_format)
        for start, length in self.spans():
            inputs = self._inputs_that_learn(by_index, learning, in_place, sums, (start, length))
            self._backward_of_slice(inputs, slopes, start, length)
            for (index, cut), value in inputs.items():
                if index not in learning:
                    continue
                if cut is None:
                    if value.grad is not None:
                        sums[index, cut] = value.grad
                elif not cut.prefix and index not in in_place:
                    put(sums[index, cut], cut, start, torch.zeros_like(value) if value.grad is None else value.grad)
            del inputs, value
        gradients: list[Any] = []
        for index in self.indices:
            parts = [sums[read] for read in self.region.inputs if read[0] == index and read in sums]
            gradients.append(sum(parts[1:], parts[0]) if parts and index not in in_place else None)
        return gradients

    def _inputs_that_learn(
        self,
        by_index: dict[int, Any],
        learning: set[int],
        in_place: set[int],
        sums: dict[Read, Tensor],
        span: tuple[int, int],
    ) -> dict[Read, Any]:
        """The inputs of a slice as leaves of autograd; `.grad` is (a part of) the sum where gradients are summed."""
        inputs: dict[Read, Any] = {}
        for index, cut in self.region.inputs:
            value = by_index[index]
            if isinstance(value, Tensor):
                value = value.detach()
                part = value if cut is None else take(value, cut, *span)
                value = part.detach().requires_grad_(index in learning)
                total = sums.get((index, cut))
                if total is not None and (cut is None or cut.prefix or index in in_place):
                    value.grad_dtype = total.dtype  # a weight's sum is fp32
                    value.grad = total if cut is None else take(total, cut, *span)
            inputs[index, cut] = value
        return inputs

    def _backward_of_slice(
        self, inputs: dict[Read, Any], slopes: Sequence[Tensor | None], start: int, length: int
    ) -> None:
        with torch.enable_grad():
            results = self.run(inputs, start, length)
        pairs = [
            (result, take(slope, self.region.cuts[index], start, length))
            for index, result, slope in zip(self.region.outputs, results, slopes, strict=True)
            if slope is not None and result.requires_grad
        ]
        del results
        if pairs:
            torch.autograd.backward([result for result, _ in pairs], [slope for _, slope in pairs])


def compute(node: Node, arguments: list[Any], cut: Cut, start: int, length: int, ops: Ops) -> Any:
    """One op for one slice. Arguments that name the shape of the whole result, or a causal mask, are adapted to it."""
    if node.op in SIZED:
        shape = list(node.shape)
        shape[cut.dim] = cut.size(length)
        if node.op is aten.expand.default:
            return arguments[0].expand(shape)
        return arguments[0].reshape(shape)  # a slice of several rows is no view
    if RULES.get(node.op) is attention and cut.dim == len(node.shape) - 2 and node.arg("is_causal"):
        q, k = arguments[0], arguments[1]
        mask = torch.ones(length, start + length, dtype=torch.bool, device=q.device).tril(start)
        arguments[node.names.index("attn_mask")], arguments[node.names.index("is_causal")] = mask, False
        assert k.shape[-2] == start + length
    return call(node, arguments, ops)


class RegionFunction(torch.autograd.Function):
    """A region as one step of autograd: it keeps its inputs and computes everything else again."""

    @staticmethod
    def forward(ctx: Any, runner: RegionRunner, recomputing: bool, *values: Any) -> tuple[Tensor, ...]:
        ctx.runner = runner
        tensors = [None if is_weight else value for is_weight, value in zip(runner.is_weight, values, strict=True)]
        # The weights themselves, because gradients are added to their .grad, as in models.linear.
        ctx.weights = [value if is_weight else None for is_weight, value in zip(runner.is_weight, values, strict=True)]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        if recomputing and runner.final:
            outputs = [torch.empty((), dtype=dtype, device=device).expand(shape)
                       for shape, _, dtype, device in runner.like]  # fmt: skip
        else:
            outputs = runner.forward(values)
        ctx.mark_non_differentiable(*(x for x in outputs if not x.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Any, ...]:
        pairs = zip(ctx.weights, ctx.saved_tensors, strict=True)
        values = [tensor if weight is None else weight for weight, tensor in pairs]
        return None, None, *ctx.runner.backward(values, slopes, ctx.needs_input_grad[2:])


_IN_BRIEF = contextvars.ContextVar("in_brief", default=False)


@contextlib.contextmanager
def in_brief() -> Iterator[None]:
    """Inside, regions run only their first slice and the last one of full length, to count bytes: at the latter, sums
    exist and causal queries read all keys."""
    token = _IN_BRIEF.set(True)
    try:
        yield
    finally:
        _IN_BRIEF.reset(token)


class SlicedGraph:
    """A captured graph that runs by a plan."""

    def __init__(
        self, captured: Captured, graph: Graph, plan: Plan, like: Sequence[Any], ops: Ops, places: bool
    ) -> None:
        """`like`: a fake result for each node."""
        self.captured, self.graph, self.plan, self.ops = captured, graph, plan, ops
        self.steps: list[int | RegionRunner] = [
            step if isinstance(step, int) else RegionRunner(graph, step, ops, [like[i] for i in step.outputs], places)
            for step in plan.steps
        ]
        last: dict[int, int] = {}
        for at, step in enumerate(plan.steps):
            results = [step] if isinstance(step, int) else step.outputs
            last |= dict.fromkeys([*results, *read_by(graph, step)], at)
        outputs = set(graph.outputs)
        self.ends: list[list[int]] = [[] for _ in self.steps]
        for index, at in last.items():
            if index not in outputs and index not in captured.leaves:
                self.ends[at].append(index)
        for at, runner in enumerate(self.steps):
            if isinstance(runner, RegionRunner):
                runner.final = all(last[index] == at and index in outputs for index in runner.region.outputs)

    def run(self, leaves: Sequence[Any]) -> Any:
        """Returns what the module returns. `leaves`: in the order of `captured.leaves`."""
        values: dict[int, Any] = dict(zip(self.captured.leaves, leaves, strict=True))
        for at, step in enumerate(self.steps):
            if isinstance(step, int):
                node = self.graph.nodes[step]
                arguments = filled(node.args, lambda ref: values[ref.index])
                values[step] = call(node, arguments, self.ops)
            else:
                arguments = [values[index] for index in step.indices]
                learning = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
                results = (
                    RegionFunction.apply(step, is_recomputing(), *arguments) if learning else step.forward(arguments)
                )
                values.update(zip(step.region.outputs, results, strict=True))
                del results
            del arguments
            for index in self.ends[at]:
                del values[index]
        return pytree.tree_unflatten(filled(self.captured.outputs, lambda ref: values[ref.index]), self.captured.spec)
