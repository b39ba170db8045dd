"""A module as a graph of single ops, and what each of them holds: `torch.export` and fake tensors, nothing computed.

A captured graph keeps no weights: its leaves say where a value comes from, and a call looks it up.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from penstock.autochunk.liveness import LEAVES, Bytes, Graph
from penstock.autochunk.meter import Meter
from penstock.autochunk.slice_rules import RULES, SIZED, Blocked, Cut, Node, Ref, needs, refs
from penstock.errors import UserError

aten = torch.ops.aten
Ops = dict[Any, Callable[..., Any]]
"""aten op -> what computes it instead."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where a value comes from that no op makes."""

    kind: str
    """argument, weight or constant."""
    at: Any
    """Its place among the flattened arguments; its name in the module; the constant itself."""
    part: tuple[int, int, int] | None = None
    """Of a weight: (dimension, start, length) of what is read of it."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """A module's graph, for arguments of certain shapes."""

    nodes: tuple[Node, ...]
    leaves: dict[int, Leaf]
    outputs: tuple[Any, ...]
    """Flattened: a Ref, or a constant."""
    spec: Any
    """How they were nested."""


def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """By `torch.export`: nothing is computed."""
    exported = torch.export.export(module, args, kwargs, strict=False)
    _take_apart(exported.graph)
    exported.graph.eliminate_dead_code()
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    nodes: list[Node] = []
    leaves: dict[int, Leaf] = {}
    index_of: dict[Any, int] = {}
    shapes: list[tuple[int, ...]] = []
    outputs: tuple[Any, ...] = ()
    arguments = 0

    def translated(value: Any) -> Any:
        return pytree.tree_map_only(torch.fx.Node, lambda one: Ref(index_of[one]), value)

    for one in exported.graph.nodes:
        index = len(nodes)
        if one.op == "output":
            outputs = tuple(translated(value) for value in one.args[0])
            continue
        if one.op == "call_function" and one.target is aten._assert_tensor_metadata.default:
            continue
        if one.op == "call_function" and one.target is aten.lift_fresh_copy.default:
            index_of[one] = index_of[one.args[0]]  # a constant that nobody writes to
            continue
        value = one.meta.get("val")
        several = isinstance(value, tuple | list)
        first = value[0] if isinstance(value, tuple | list) else value
        shape = tuple(first.shape) if isinstance(first, Tensor) else ()
        kind: Any = one.target
        names: tuple[str, ...] = ()
        given: tuple[Any, ...] = ()
        if one.op == "placeholder":
            spec = kinds[one.name]
            if spec.kind is InputKind.USER_INPUT:
                kind, leaves[index] = "input", Leaf("argument", arguments)
                arguments += 1
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                kind, leaves[index] = "input", Leaf("constant", exported.constants[spec.target])
            else:
                kind, leaves[index] = "weight", Leaf("weight", spec.target)
        elif one.op == "get_attr":
            kind, leaves[index] = "input", Leaf("constant", _attribute(exported.graph_module, one.target))
        elif one.meta.get("part"):
            of = leaves[index_of[one.args[0]]]
            kind, leaves[index] = "weight", Leaf("weight", of.at, one.meta["part"])
        elif isinstance(kind, torch._ops.OpOverload):
            names, given = _in_order(kind, translated(one.args), translated(one.kwargs))
        else:
            names, given = tuple(f"arg{i}" for i in range(len(one.args))), translated(tuple(one.args))
            if one.kwargs:
                raise UserError(
                    f"autochunk: {kind} has keyword arguments and no schema; it cannot be run step by step."
                )
            if given and names:
                names = ("self", *names[1:])
        seen = tuple(shapes[ref.index] for ref in refs(given))
        nodes.append(Node(index, one.name, kind, names, given, shape, seen, several))
        shapes.append(shape)
        index_of[one] = index
    return Captured(tuple(nodes), leaves, outputs, exported.call_spec.out_spec)


VIEWS = {aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
PRODUCTS = {aten.linear.default: (0, 1, 2, 0), aten.addmm.default: (1, 2, 0, 1)}
"""Product -> which argument is x, weight and bias, and the weight's dimension of outputs."""


def _take_apart(graph: torch.fx.Graph) -> None:
    """A product that is split right away becomes a product for each piece, by its rows of the weight. So queries can
    be made where they are needed, slice by slice, when keys and values must be whole."""
    for split in [one for one in graph.nodes if one.target in SPLITS]:
        chain, made = [], split.args[0]
        while made.target in VIEWS and len(made.users) == 1:
            chain.append(made)
            made = made.args[0]
        if made.target not in PRODUCTS or len(made.users) != 1 or made.kwargs:
            continue
        where_x, where_weight, where_bias, side = PRODUCTS[made.target]
        weight = made.args[where_weight]
        bias = made.args[where_bias] if len(made.args) > where_bias else None
        if weight.op != "placeholder" or (
            bias is not None and (bias.op != "placeholder" or bias.meta["val"].dim() != 1)
        ):
            continue
        dim = (split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)) % split.args[0].meta["val"].dim()
        cuts = [Cut(dim, split.args[0].meta["val"].shape[dim])]
        try:
            for one in chain:
                cuts.append(needs(_single(one), cuts[-1])["self"])  # type: ignore[arg-type]
        except Blocked:
            continue
        if cuts[-1].outer != 1 or cuts[-1].dim != made.meta["val"].dim() - 1:
            continue
        start = 0
        starts = []
        for piece in split.meta["val"]:
            starts.append(start)
            start += piece.shape[dim]
        for piece in list(split.users):
            first, size = starts[piece.args[1]], split.meta["val"][piece.args[1]].shape[dim]
            with graph.inserting_before(piece):
                parts = []
                for whole, at in ((weight, side), (bias, 0)):
                    if whole is not None:
                        start, length = first * cuts[-1].inner, size * cuts[-1].inner
                        part = _inserted(graph, aten.slice.Tensor, (whole, at, start, start + length))
                        part.meta["part"] = (at, start, length)
                        parts.append(part)
                arguments = [made.args[where_x], *parts] if where_x == 0 else [parts[1], made.args[where_x], parts[0]]
                last = _inserted(graph, made.target, tuple(arguments))
                for one, cut in zip(reversed(chain), reversed(cuts[:-1]), strict=True):
                    op, rest = one.target, tuple(one.args[1:])
                    if op in SIZED:
                        shape = list(one.meta["val"].shape)
                        shape[cut.dim] = cut.size(size)
                        op, rest = SIZED[op], (shape,)
                    last = _inserted(graph, op, (last, *rest))
            piece.replace_all_uses_with(last)
    graph.lint()


def _inserted(graph: torch.fx.Graph, op: Any, args: tuple[Any, ...]) -> torch.fx.Node:
    made = graph.call_function(op, args)
    fakes = pytree.tree_map_only(torch.fx.Node, lambda one: one.meta["val"], args)
    made.meta["val"] = op(*fakes)
    return made


def _single(one: Any) -> Node:
    """A view, alone."""
    names, given = _in_order(one.target, [Ref(0), *one.args[1:]], one.kwargs)
    return Node(0, one.name, one.target, names, given, tuple(one.meta["val"].shape), (one.args[0].meta["val"].shape,))


def writes(captured: Captured) -> list[str]:
    """Ops that write where they read: their order is more than what they read of each other."""
    ops = [node for node in captured.nodes if isinstance(node.op, torch._ops.OpOverload)]
    return [node.name for node in ops if node.op._schema.is_mutable]


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _in_order(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """All arguments of the op's schema, defaults too."""
    names, values = [], []
    for at, one in enumerate(op._schema.arguments):
        names.append(one.name)
        values.append(args[at] if at < len(args) else kwargs.get(one.name, one.default_value))
    return tuple(names), tuple(values)


def call(node: Node, values: Sequence[Any], ops: Ops) -> Any:
    """Computes the op with these arguments, in the order of `node.args`."""
    op = ops.get(node.op, node.op)
    if not isinstance(node.op, torch._ops.OpOverload):
        return op(*values)
    named = [one.kwarg_only for one in node.op._schema.arguments]
    positional = [value for value, only in zip(values, named, strict=True) if not only]
    only = {name: value for name, value, keyword in zip(node.names, values, named, strict=True) if keyword}
    return op(*positional, **only)


def filled(value: Any, find: Callable[[Any], Any]) -> Any:
    """Arguments with a tensor for each Ref."""
    if isinstance(value, Ref):
        return find(value)
    if isinstance(value, tuple | list):
        return [filled(one, find) for one in value]
    return value


# --- bytes ------------------------------------------------------------------------------------------------------------


def measured(captured: Captured, leaves: Sequence[Any], ops: Ops, training: bool) -> tuple[Graph, list[Any]]:
    """What each op holds, by running it on fake tensors, and their results. `leaves`: fake values of the leaves."""
    values: list[Any] = []
    holds: list[Bytes] = []
    homes: dict[int, int] = {}  # storage -> the op that made it
    alive: list[Any] = []  # so that no storage gets the name of an earlier one
    given = dict(zip(captured.leaves, leaves, strict=True))
    for node in captured.nodes:
        if node.index in given:
            value = given[node.index]
            grad = value.nbytes if isinstance(value, Tensor) and value.requires_grad and training else 0
            holds.append(Bytes(grad=0 if node.op == "weight" else grad))
            for storage in _storages(value):
                homes.setdefault(storage._cdata, node.index)
                alive.append(storage)
            values.append(value)
            continue
        holds.append(_measure(node, values, homes, alive, ops, training))
    cheap = frozenset(
        node.index for node in captured.nodes
        if (node.op not in LEAVES and node.op in CHEAP) or torch.Tag.pointwise in getattr(node.op, "tags", ())
    )  # fmt: skip
    outputs = tuple(ref.index for ref in refs(captured.outputs))
    sizes = tuple(sum(one.nbytes for one in _tensors(value)) for value in values)
    return Graph(captured.nodes, tuple(holds), outputs, cheap, sizes), values


CHEAP = frozenset(RULES) - {
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.baddbmm.default, aten.scaled_dot_product_attention.default,
}  # fmt: skip


def _measure(node: Node, values: list[Any], homes: dict[int, int], alive: list[Any], ops: Ops, training: bool) -> Bytes:
    saved: list[Tensor] = []

    def cut_off(ref: Ref) -> Any:
        value = values[ref.index]
        return pytree.tree_map_only(Tensor, lambda one: one.detach().requires_grad_(one.requires_grad), value)

    def pack(one: Tensor) -> Tensor:
        saved.append(one)
        return one

    arguments = filled(node.args, cut_off)
    with Meter() as meter, torch.set_grad_enabled(training):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
            result = call(node, arguments, ops)
        scratch = meter.peak
    storages = {one._cdata: one for one in _storages(result)}
    own = {key: one.nbytes() for key, one in storages.items() if key not in homes}
    alias = tuple(dict.fromkeys(homes[key] for key in storages if key in homes))
    for key in own:
        homes[key] = node.index
    kept, saves = 0, []
    known = set()
    for one in saved if training else ():
        storage = one.untyped_storage()
        if storage._cdata in homes:
            saves.append(homes[storage._cdata])
        elif storage._cdata not in known:
            known.add(storage._cdata)
            kept += storage.nbytes()
    results = _tensors(result)
    learning = [one for one in results if one.requires_grad]
    back = 0
    if learning and sum(own.values()):
        wanted = [one for one in _tensors(arguments) if one.requires_grad]
        with Meter() as meter:
            slopes = torch.autograd.grad(
                learning, wanted, [torch.empty_like(one) for one in learning], allow_unused=True
            )
            back = max(
                meter.peak - sum(one.nbytes for one in learning) - sum(one.nbytes for one in _tensors(slopes)), 0
            )
            del slopes
    values.append(pytree.tree_map_only(Tensor, lambda one: one.detach().requires_grad_(one.requires_grad), result))
    alive += [result, saved, *storages.values()]
    mine = sum(own.values())
    return Bytes(
        mine, alias, max(scratch - mine - kept, 0), tuple(dict.fromkeys(saves)), kept,
        sum(one.nbytes for one in learning), back,
    )  # fmt: skip


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in pytree.tree_leaves(value) if isinstance(one, Tensor)]


def _storages(value: Any) -> list[Any]:
    return [one.untyped_storage() for one in _tensors(value)]
