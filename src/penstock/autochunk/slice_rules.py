"""The slices of its arguments that an op needs to compute a slice of its result: one rule for each aten op.

A rule looks at shapes only; `autochunk` checks every plan by a run on fake tensors. An op without a rule, or an op that
mixes elements along the sliced dimension (softmax, reduction, random draw), raises `Blocked` and is computed whole.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

aten = torch.ops.aten


@dataclass(frozen=True)
class Ref:
    """Stands for the result of the node `index` in the arguments of another node."""

    index: int


@dataclass(frozen=True)
class Cut:
    """A dimension of `outer * extent * inner` elements whose middle factor, `extent`, is divided into slices.

    Example: [B, T, D] viewed as [B * T, D] and sliced along T is Cut(0, T, outer=B).
    """

    dim: int
    extent: int
    outer: int = 1
    inner: int = 1
    prefix: bool = False
    """The slice and everything before it: the keys that causal queries read."""

    def size(self, length: int) -> int:
        """Elements along the dimension for a slice of this length."""
        return self.outer * length * self.inner

    def at(self, dim: int) -> "Cut":
        """The same cut of another dimension."""
        return replace(self, dim=dim)


@dataclass(frozen=True)
class Node:
    """One op of the graph. `args` has the order of `names`, includes defaults, and has a Ref for each tensor."""

    index: int
    name: str
    op: Any
    """An aten op, `operator.getitem`, or "input" or "weight"."""
    names: tuple[str, ...]
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    """Of the result; of the first one if the result is a list."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of the tensors that the op reads, in the order of `reads`."""
    is_list: bool = False
    """Whether the result is a list of tensors."""
    reads: tuple[int, ...] = field(init=False, compare=False)
    """Indices of the nodes in its arguments, in order, with repetitions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", tuple(ref.index for ref in refs(self.args)))

    def arg(self, name: str) -> Any:
        """The argument with this name in the op's schema."""
        return self.args[self.names.index(name)]

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of the tensor argument `name`; None if the argument is no tensor."""
        at = self.names.index(name)
        if not isinstance(self.args[at], Ref):
            return None
        return self.shapes[len(refs(self.args[:at]))]

    @property
    def op_name(self) -> str:
        """For reports: "softmax"."""
        return str(getattr(self.op, "_opname", None) or getattr(self.op, "__name__", self.op))


def refs(value: Any) -> list[Ref]:
    """All Refs in (nested) arguments, in order."""
    if isinstance(value, Ref):
        return [value]
    return [ref for item in value for ref in refs(item)] if isinstance(value, tuple | list) else []


class Blocked(Exception):
    """The reason why an op cannot be computed in slices along a dimension."""


Needs = dict[str, Cut | None]
"""Name of an argument -> the cut of it that a slice of the result needs. None or no entry: the whole argument."""


def needs(node: Node, cut: Cut) -> Needs:
    """The cuts of its arguments that a slice of the node's result needs. Raises Blocked."""
    rule = RULES.get(node.op)
    if rule is not None:
        return rule(node, cut)
    if torch.Tag.pointwise in getattr(node.op, "tags", ()) and not node.op._schema.is_mutable:
        return pointwise(node, cut)
    raise Blocked(f"no rule for {node.op_name}")


def through_view(cut: Cut, out: Sequence[int], back: Sequence[int]) -> Cut:
    """The same elements in a tensor of shape `back` that is viewed as `out`. Raises Blocked if no single dimension of
    `back` contains them."""
    stride = cut.inner * prod(out[cut.dim + 1 :])
    for dim, size in enumerate(back):
        below = prod(back[dim + 1 :])
        if below <= stride and stride * cut.extent <= below * size and stride % below == 0:
            inner = stride // below
            if size % (cut.extent * inner) == 0:
                return replace(cut, dim=dim, outer=size // (cut.extent * inner), inner=inner)
    raise Blocked("a view crosses the dimension")


def pointwise(node: Node, cut: Cut) -> Needs:
    """Every tensor argument, with broadcasting."""
    return {
        name: broadcast(cut, node.shape, node.shape_of(name))
        for name, value in zip(node.names, node.args, strict=True)
        if isinstance(value, Ref)
    }


def broadcast(cut: Cut, out: Sequence[int], shape: Sequence[int] | None) -> Cut | None:
    """The cut of an argument that is broadcast to the shape `out`: None if all slices read the same elements."""
    if shape is None:
        return None
    dim = cut.dim - len(out) + len(shape)
    if dim < 0 or shape[dim] == 1 != out[cut.dim]:
        return None
    return cut.at(dim)


def view(node: Node, cut: Cut) -> Needs:
    """view, reshape, flatten, unflatten, squeeze."""
    return {"self": through_view(cut, node.shape, _self(node))}


def unchanged(node: Node, cut: Cut) -> Needs:
    """Ops of one tensor that keep the position of each element."""
    return {node.names[0]: cut}


RANDOM = "draws random numbers, which would differ in slices"


def dropout(node: Node, cut: Cut) -> Needs:
    """Allowed only if it draws no random numbers."""
    if node.arg("train") and node.arg("p") > 0:
        raise Blocked(RANDOM)
    return {"input": cut}


def along(*dims: str) -> Callable[[Node, Cut], Needs]:
    """Ops that keep the shape and mix elements along the dimensions that these arguments name."""

    def rule(node: Node, cut: Cut) -> Needs:
        mixed = {dim % len(node.shape) for name in dims for dim in _dimensions(node.arg(name))}
        if cut.dim in mixed:
            raise Blocked(f"{node.op_name} is over the dimension")
        return {node.names[0]: cut}

    return rule


def norm(node: Node, cut: Cut) -> Needs:
    """layer_norm, rms_norm: over the last dimensions."""
    if cut.dim >= len(node.shape) - len(node.arg("normalized_shape")):
        raise Blocked(f"{node.op_name} is over the dimension")
    return {"input": cut}


def reduction(node: Node, cut: Cut) -> Needs:
    """mean, sum, amax, ... over some dimensions."""
    rank = len(_self(node))
    reduced = {dim % rank for dim in _dimensions(node.arg("dim"))} or set(range(rank))
    if node.arg("keepdim"):
        if cut.dim in reduced:
            raise Blocked(f"{node.op_name} is over the dimension")
        return {"self": cut}
    kept = [dim for dim in range(rank) if dim not in reduced]
    return {"self": cut.at(kept[cut.dim])}


def transpose(node: Node, cut: Cut) -> Needs:
    """Two dimensions change places."""
    first, second = node.arg("dim0") % len(node.shape), node.arg("dim1") % len(node.shape)
    return {"self": cut.at({first: second, second: first}.get(cut.dim, cut.dim))}


def matrix_transpose(node: Node, cut: Cut) -> Needs:
    """t: of a matrix, or of a vector, which stays as it is."""
    return {"self": cut.at(1 - cut.dim if len(node.shape) == 2 else cut.dim)}


def permute(node: Node, cut: Cut) -> Needs:
    """Dimensions in another order."""
    return {"self": cut.at(node.arg("dims")[cut.dim] % len(node.shape))}


def unsqueeze(node: Node, cut: Cut) -> Needs:
    """A dimension of size 1 is added."""
    new = node.arg("dim") % len(node.shape)
    if cut.dim == new:
        raise Blocked("the dimension is new")
    return {"self": cut.at(cut.dim - (cut.dim > new))}


def expand(node: Node, cut: Cut) -> Needs:
    """Dimensions of size 1 are repeated."""
    return {"self": broadcast(cut, node.shape, _self(node))}


def select(node: Node, cut: Cut) -> Needs:
    """select, unbind: one dimension is removed."""
    removed = node.arg("dim") % len(_self(node))
    return {"self": cut.at(cut.dim + (cut.dim >= removed))}


def range_of(node: Node, cut: Cut) -> Needs:
    """slice: a range of one dimension."""
    dim, end = node.arg("dim") % len(node.shape), node.arg("end")
    whole = not node.arg("start") and (end is None or end >= _self(node)[dim]) and node.arg("step") == 1
    if cut.dim == dim and not whole:
        raise Blocked("a range of the dimension is taken")
    return {"self": cut}


def split(node: Node, cut: Cut) -> Needs:
    """split, chunk: the cut is that of each piece."""
    if cut.dim == node.arg("dim") % len(_self(node)):
        raise Blocked(f"{node.op_name} is of the dimension")
    return {"self": cut}


def cat(node: Node, cut: Cut) -> Needs:
    """Pieces are joined along a dimension."""
    if cut.dim == node.arg("dim") % len(node.shape):
        raise Blocked("cat is of the dimension")
    return {"tensors": cut}


def stack(node: Node, cut: Cut) -> Needs:
    """Pieces are joined along a new dimension."""
    new = node.arg("dim") % len(node.shape)
    if cut.dim == new:
        raise Blocked("stack is of the dimension")
    return {"tensors": cut.at(cut.dim - (cut.dim > new))}


def linear(node: Node, cut: Cut) -> Needs:
    """Slices of the input, or slices of the weight's rows: outputs."""
    if cut.dim == len(node.shape) - 1:
        return {"weight": cut.at(0), "bias": cut.at(0)}
    return {"input": cut}


def product(left: str, right: str, added: str | None = None) -> Callable[[Node, Cut], Needs]:
    """matmul, mm, bmm, addmm, baddbmm: rows of `left`, columns of `right`, or whole matrices of a batch."""

    def rule(node: Node, cut: Cut) -> Needs:
        a, b = node.shape_of(left), node.shape_of(right)
        if a is None or b is None or len(a) < 2 or len(b) < 2:
            raise Blocked("a product with a vector")
        from_end = len(node.shape) - cut.dim
        summand = {} if added is None else {added: broadcast(cut, node.shape, node.shape_of(added))}
        if from_end == 1:
            return {right: cut.at(len(b) - 1), **summand}
        if from_end == 2:
            return {left: cut.at(len(a) - 2), **summand}
        return {left: broadcast(cut, node.shape, a), right: broadcast(cut, node.shape, b), **summand}

    return rule


def attention(node: Node, cut: Cut) -> Needs:
    """Slices of queries, heads or rows. A slice of causal queries reads the keys up to its end."""
    q, k, mask = node.shape_of("query"), node.shape_of("key"), node.shape_of("attn_mask")
    assert q is not None
    assert k is not None
    rank = len(q)
    if node.arg("dropout_p") > 0:
        raise Blocked(RANDOM)
    scores = (*node.shape[:-1], k[-2])
    if cut.dim == rank - 1:
        raise Blocked("attention is over the dimension")
    if cut.dim == rank - 2:
        if cut.outer * cut.inner != 1:
            raise Blocked("queries are cut in two dimensions at once")
        keys = replace(cut, prefix=True) if node.arg("is_causal") and q[-2] == k[-2] else None
        if node.arg("is_causal") and keys is None:
            raise Blocked("causal, with other keys than queries")
        return {"query": cut, "key": keys, "value": keys, "attn_mask": broadcast(cut, scores, mask)}
    if k[cut.dim] != q[cut.dim]:
        raise Blocked("queries share heads")
    return {"query": cut, "key": cut, "value": cut, "attn_mask": broadcast(cut, scores, mask)}


def embedding(node: Node, cut: Cut) -> Needs:
    """Rows of a table, chosen by indices."""
    if cut.dim == len(node.shape) - 1:
        raise Blocked("the table's own dimension")
    return {"indices": cut}


def _self(node: Node) -> tuple[int, ...]:
    return node.shapes[0]


def _dimensions(value: Any) -> Sequence[int]:
    """An argument that is None, a dimension, or a list of dimensions."""
    if value is None:
        return ()
    return value if isinstance(value, tuple | list) else (value,)


_RULES: list[tuple[Callable[[Node, Cut], Needs], list[Any]]] = [
    (view, [aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
            aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims]),
    (unchanged, [aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.to.dtype,
                 aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.lift_fresh_copy.default,
                 operator.getitem]),
    (along("dim"), [aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default,
                    aten.cumsum.default, aten.cumprod.default]),
    (reduction, [aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
                 aten.logsumexp.default, aten.argmax.default]),
    (norm, [aten.layer_norm.default, aten.rms_norm.default]),
    (dropout, [aten.dropout.default]),
    (transpose, [aten.transpose.int]),
    (matrix_transpose, [aten.t.default]),
    (permute, [aten.permute.default]),
    (unsqueeze, [aten.unsqueeze.default]),
    (expand, [aten.expand.default]),
    (select, [aten.select.int, aten.unbind.int]),
    (range_of, [aten.slice.Tensor]),
    (split, [aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes]),
    (cat, [aten.cat.default]),
    (stack, [aten.stack.default]),
    (linear, [aten.linear.default]),
    (product("self", "other"), [aten.matmul.default]),
    (product("self", "mat2"), [aten.mm.default, aten.bmm.default]),
    (product("mat1", "mat2", "self"), [aten.addmm.default]),
    (product("batch1", "batch2", "self"), [aten.baddbmm.default]),
    (attention, [aten.scaled_dot_product_attention.default]),
    (embedding, [aten.embedding.default]),
]  # fmt: skip
RULES = {op: rule for rule, ops in _RULES for op in ops}

SIZED = {
    **{op: op for op in (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)},
    aten.unflatten.int: aten.reshape.default,
}
"""Op with the shape of its result as an argument -> the op that makes another shape, called with (tensor, shape)."""
