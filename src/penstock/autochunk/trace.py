"""Reads a module as a graph of single ops and measures the memory of each, by `torch.export` and fake tensors.

Nothing is computed, and a captured graph keeps no weights: its leaves say where a value comes from, and each call looks
the value up.

[Note: products are split]
A product whose result is split at once (fused queries, keys and values) becomes one product for each piece, each with
its own rows of the weight. So queries can be computed slice by slice although keys and values must be whole.
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
"""aten op -> the function that computes it instead."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The source of a value that no op computes."""

    kind: str
    """argument, weight or constant."""
    at: Any
    """Index in the flattened arguments, name in the module, or the constant itself."""
    part: tuple[int, int, int] | None = None
    """(dimension, start, length) of the part of a weight that is read; None: the whole."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """A module's graph for arguments of certain shapes."""

    nodes: tuple[Node, ...]
    leaves: dict[int, Leaf]
    outputs: tuple[Any, ...]
    """Flattened: Refs and constants."""
    spec: Any
    """The nesting of the outputs."""


def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """The module's graph, by `torch.export`."""
    exported = torch.export.export(module, args, kwargs, strict=False)
    _split_products(exported.graph)
    exported.graph.eliminate_dead_code()
    leaf_of = _leaves(exported)
    nodes: list[Node] = []
    leaves: dict[int, Leaf] = {}
    index_of: dict[Any, int] = {}
    outputs: tuple[Any, ...] = ()

    def translated(value: Any) -> Any:
        return pytree.tree_map_only(torch.fx.Node, lambda fx_node: Ref(index_of[fx_node]), value)

    for fx_node in exported.graph.nodes:
        if fx_node.op == "output":
            outputs = tuple(translated(value) for value in fx_node.args[0])
        elif fx_node.target is aten.lift_fresh_copy.default:
            index_of[fx_node] = index_of[fx_node.args[0]]  # a copy of a constant that no op writes to
        elif fx_node.target is not aten._assert_tensor_metadata.default:
            index, leaf = len(nodes), leaf_of.get(fx_node)
            if leaf is None:
                op, (names, arguments) = fx_node.target, _arguments_of(fx_node, translated)
            else:
                leaves[index] = leaf
                op, names, arguments = "weight" if leaf.kind == "weight" else "input", (), ()
            result = fx_node.meta.get("val")
            is_list = isinstance(result, tuple | list)
            first = result[0] if is_list else result
            shape = tuple(first.shape) if isinstance(first, Tensor) else ()
            shapes = tuple(nodes[ref.index].shape for ref in refs(arguments))
            nodes.append(Node(index, fx_node.name, op, names, arguments, shape, shapes, is_list))
            index_of[fx_node] = index
    return Captured(tuple(nodes), leaves, outputs, exported.call_spec.out_spec)


def _leaves(exported: Any) -> dict[torch.fx.Node, Leaf]:
    """The nodes of the exported graph that no op computes."""
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    leaves: dict[torch.fx.Node, Leaf] = {}
    arguments = 0
    for fx_node in exported.graph.nodes:
        if fx_node.op == "placeholder":
            spec = specs[fx_node.name]
            if spec.kind is InputKind.USER_INPUT:
                leaves[fx_node] = Leaf("argument", arguments)
                arguments += 1
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                leaves[fx_node] = Leaf("constant", exported.constants[spec.target])
            else:
                leaves[fx_node] = Leaf("weight", spec.target)
        elif fx_node.op == "get_attr":
            leaves[fx_node] = Leaf("constant", attribute(exported.graph_module, fx_node.target))
        elif "part" in fx_node.meta:
            leaves[fx_node] = Leaf("weight", leaves[fx_node.args[0]].at, fx_node.meta["part"])
    return leaves


def attribute(module: Any, path: str) -> Any:
    """`module.a.b` for "a.b"."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _arguments_of(fx_node: torch.fx.Node, translated: Callable[[Any], Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    if isinstance(fx_node.target, torch._ops.OpOverload):
        return _in_order(fx_node.target, translated(fx_node.args), translated(fx_node.kwargs))
    if fx_node.kwargs:
        raise UserError(
            f"autochunk: {fx_node.target} has keyword arguments and no schema; it cannot be run step by step."
        )
    return ("self", *(f"arg{i}" for i in range(1, len(fx_node.args)))), translated(tuple(fx_node.args))


def _in_order(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names and values of all arguments of the op's schema, with defaults."""
    schema = op._schema.arguments
    names = tuple(argument.name for argument in schema)
    values = dict(zip(names, args, strict=False)) | kwargs
    return names, tuple(values.get(argument.name, argument.default_value) for argument in schema)


VIEWS = {aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
PRODUCTS = {aten.linear.default: (0, 1, 2, 0), aten.addmm.default: (1, 2, 0, 1)}
"""Product -> the positions of x, weight and bias in its arguments, and the weight's dimension of outputs."""


def _split_products(graph: torch.fx.Graph) -> None:
    """See [Note: products are split]."""
    for split in [fx_node for fx_node in graph.nodes if fx_node.target in SPLITS]:
        views, product = [], split.args[0]
        while product.target in VIEWS and len(product.users) == 1:
            views.append(product)
            product = product.args[0]
        if product.target not in PRODUCTS or len(product.users) != 1 or product.kwargs:
            continue
        _, weight_at, bias_at, _ = PRODUCTS[product.target]
        weight, bias = product.args[weight_at], product.args[bias_at] if len(product.args) > bias_at else None
        if weight.op != "placeholder":
            continue
        if bias is not None and (bias.op != "placeholder" or bias.meta["val"].dim() != 1):
            continue
        whole = split.args[0].meta["val"]
        dim = (split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)) % whole.dim()
        cuts = [Cut(dim, whole.shape[dim])]  # of the split tensor, of each view's argument, and so of the product
        try:
            for fx_view in views:
                cuts.append(needs(_single(fx_view), cuts[-1])["self"])  # type: ignore[arg-type]
        except Blocked:
            continue
        if cuts[-1].outer == 1 and cuts[-1].dim == product.meta["val"].dim() - 1:
            _split_product(graph, split, product, views, cuts)
    graph.lint()


def _split_product(
    graph: torch.fx.Graph, split: torch.fx.Node, product: Any, views: list[torch.fx.Node], cuts: list[Cut]
) -> None:
    """Replaces each piece of the split by a product with a part of the weight, followed by the same views."""
    _, weight_at, bias_at, side = PRODUCTS[product.target]
    bias = product.args[bias_at] if len(product.args) > bias_at else None
    sizes = [piece.shape[cuts[0].dim] for piece in split.meta["val"]]
    for piece in list(split.users):
        number: Any = piece.args[1]
        size = sizes[number]
        start, length = sum(sizes[:number]) * cuts[-1].inner, size * cuts[-1].inner
        with graph.inserting_before(piece):
            arguments = list(product.args)
            for position, dim in ((weight_at, side), (bias_at, 0)):
                if position == weight_at or bias is not None:
                    part = _inserted(graph, aten.slice.Tensor, (product.args[position], dim, start, start + length))
                    part.meta["part"] = (dim, start, length)
                    arguments[position] = part
            result = _inserted(graph, product.target, tuple(arguments))
            for fx_view, cut in zip(reversed(views), reversed(cuts[:-1]), strict=True):
                op, options = fx_view.target, tuple(fx_view.args[1:])
                if op in SIZED:
                    shape = list(fx_view.meta["val"].shape)
                    shape[cut.dim] = cut.size(size)
                    op, options = SIZED[op], (shape,)
                result = _inserted(graph, op, (result, *options))
        piece.replace_all_uses_with(result)


def _inserted(graph: torch.fx.Graph, op: Any, args: tuple[Any, ...]) -> torch.fx.Node:
    fx_node = graph.call_function(op, args)
    fx_node.meta["val"] = op(*pytree.tree_map_only(torch.fx.Node, lambda argument: argument.meta["val"], args))
    return fx_node


def _single(fx_view: Any) -> Node:
    """A view as a graph of its own."""
    names, arguments = _in_order(fx_view.target, [Ref(0), *fx_view.args[1:]], fx_view.kwargs)
    shape, argument_shape = tuple(fx_view.meta["val"].shape), fx_view.args[0].meta["val"].shape
    return Node(0, fx_view.name, fx_view.target, names, arguments, shape, (argument_shape,))


def writes(captured: Captured) -> list[str]:
    """Names of ops that write to their arguments. With such ops, the order is not determined by the reads alone."""
    ops = [node for node in captured.nodes if isinstance(node.op, torch._ops.OpOverload)]
    return [node.name for node in ops if node.op._schema.is_mutable]


def call(node: Node, values: Sequence[Any], ops: Ops) -> Any:
    """Computes the op with these arguments, in the order of `node.args`."""
    op = ops.get(node.op, node.op)
    if not isinstance(node.op, torch._ops.OpOverload):
        return op(*values)
    arguments = list(zip(node.op._schema.arguments, values, strict=True))
    keywords = {argument.name: value for argument, value in arguments if argument.kwarg_only}
    return op(*(value for argument, value in arguments if not argument.kwarg_only), **keywords)


def filled(value: Any, find: Callable[[Ref], Any]) -> Any:
    """Arguments with `find(ref)` for each Ref."""
    if isinstance(value, Ref):
        return find(value)
    if isinstance(value, tuple | list):
        return [filled(item, find) for item in value]
    return value


# --- bytes ------------------------------------------------------------------------------------------------------------


def measured(captured: Captured, leaves: Sequence[Any], ops: Ops, training: bool) -> tuple[Graph, list[Any]]:
    """The graph with the memory of each op, by a run on fake tensors, and the results. `leaves`: fake values."""
    run = _Measuring(ops, training)
    leaf_values = dict(zip(captured.leaves, leaves, strict=True))
    for node in captured.nodes:
        run.holds.append(run.leaf(node, leaf_values[node.index]) if node.index in leaf_values else run.op(node))
    cheap = [
        node.index
        for node in captured.nodes
        if (node.op not in LEAVES and node.op in CHEAP) or torch.Tag.pointwise in getattr(node.op, "tags", ())
    ]
    outputs = tuple(ref.index for ref in refs(captured.outputs))
    sizes = tuple(_nbytes(_tensors(value)) for value in run.values)
    return Graph(captured.nodes, tuple(run.holds), outputs, frozenset(cheap), sizes), run.values


CHEAP = RULES.keys() - {
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.baddbmm.default, aten.scaled_dot_product_attention.default,
}  # fmt: skip


class _Measuring:
    """A run of the graph on fake tensors, op by op."""

    def __init__(self, ops: Ops, training: bool) -> None:
        self.ops, self.training = ops, training
        self.values: list[Any] = []
        self.holds: list[Bytes] = []
        self.maker: dict[int, int] = {}
        """Storage -> the op that allocated it."""
        self.alive: list[Any] = []
        """Keeps all storages, so that no storage has the address of an earlier one."""

    def leaf(self, node: Node, value: Any) -> Bytes:
        for storage in _storages(value):
            self.maker.setdefault(storage._cdata, node.index)
            self.alive.append(storage)
        self.values.append(value)
        learns = isinstance(value, Tensor) and value.requires_grad and self.training and node.op != "weight"
        return Bytes(grad=value.nbytes if learns else 0)

    def op(self, node: Node) -> Bytes:
        saved: list[Tensor] = []

        def pack(x: Tensor) -> Tensor:
            saved.append(x)
            return x

        arguments = filled(node.args, lambda ref: _detached(self.values[ref.index]))
        with Meter() as meter, torch.set_grad_enabled(self.training):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                result = call(node, arguments, self.ops)
            peak = meter.peak
        storages = {storage._cdata: storage for storage in _storages(result)}
        own = sum(storage.nbytes() for key, storage in storages.items() if key not in self.maker)
        alias = tuple(dict.fromkeys(self.maker[key] for key in storages if key in self.maker))
        for key in storages:
            self.maker.setdefault(key, node.index)
        other = {}  # storages that autograd saves beside results of ops
        saves: dict[int, None] = {}  # an ordered set
        for storage in _storages(saved) if self.training else ():
            if storage._cdata in self.maker:
                saves[self.maker[storage._cdata]] = None
            else:
                other[storage._cdata] = storage.nbytes()
        kept = sum(other.values())
        learning = [x for x in _tensors(result) if x.requires_grad]
        back = _backward_bytes(learning, [x for x in _tensors(arguments) if x.requires_grad]) if learning and own else 0
        self.values.append(_detached(result))
        self.alive += [result, saved, *storages.values()]
        return Bytes(own, alias, max(peak - own - kept, 0), tuple(saves), kept, _nbytes(learning), back)


def _backward_bytes(results: list[Tensor], arguments: list[Tensor]) -> int:
    """Memory that an op's backward needs beside the gradients of its results and arguments."""
    with Meter() as meter:
        result_grads = [torch.empty_like(x) for x in results]
        grads = torch.autograd.grad(results, arguments, result_grads, allow_unused=True)
        return max(meter.peak - _nbytes(results) - _nbytes(_tensors(grads)), 0)


def _detached(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), value)


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]


def _storages(value: Any) -> list[Any]:
    return [x.untyped_storage() for x in _tensors(value)]


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)
