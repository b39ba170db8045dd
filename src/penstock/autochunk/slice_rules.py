"""Along which dimensions one op can be computed in slices: from a cut of its result to the cuts of what it reads.

The table goes by aten op and looks at shapes alone; `autochunk` runs every plan on fake tensors before it is used.
An op that is not in the table, or that mixes what the cut would part (a softmax over the dimension, a reduction, a
random draw), is `Blocked`: it is computed whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

aten = torch.ops.aten


@dataclass(frozen=True)
class Ref:
    """Stands for a node's result in another's arguments."""

    index: int


@dataclass(frozen=True)
class Cut:
    """A dimension of a tensor that holds `outer * extent * inner` elements, of which the middle is cut into slices.

    Example: rows [B, T, D] seen as [B * T, D] and cut along T: Cut(0, T, outer=B).
    """

    dim: int
    extent: int
    outer: int = 1
    inner: int = 1
    prefix: bool = False
    """Not the slice alone but all up to its end: the keys that causal queries see."""

    def size(self, length: int) -> int:
        """Elements along the dimension for a slice of this length."""
        return self.outer * length * self.inner

    def at(self, dim: int) -> "Cut":
        """The same of another dimension."""
        return replace(self, dim=dim)


@dataclass(frozen=True)
class Node:
    """One op of the graph. `args` are in the order of `names`, defaults included, with a Ref for each tensor."""

    index: int
    name: str
    op: Any
    """An aten op, `operator.getitem`, or "input" or "weight"."""
    names: tuple[str, ...]
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    """Of the result; of a list of results, that of the first."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of the tensors that are read, in the order of `reads`."""
    several: bool = False
    """Whether the result is a list of tensors."""
    reads: tuple[int, ...] = field(init=False, compare=False)
    """Indices of the nodes in its arguments, in order, as often as they appear."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", tuple(ref.index for ref in refs(self.args)))

    def arg(self, name: str) -> Any:
        """By its name in the op's schema."""
        return self.args[self.names.index(name)]

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Of the tensor argument of that name, if it is given."""
        at = self.names.index(name)
        if not isinstance(self.args[at], Ref):
            return None
        return self.shapes[len(refs(self.args[:at]))]

    @property
    def what(self) -> str:
        """The op's name for people."""
        return str(getattr(self.op, "_opname", None) or getattr(self.op, "__name__", self.op))


def refs(value: Any) -> list[Ref]:
    """All of them, in order."""
    if isinstance(value, Ref):
        return [value]
    return [ref for one in value for ref in refs(one)] if isinstance(value, tuple | list) else []


class Blocked(Exception):
    """Why an op cannot be computed in slices along a dimension."""


Needs = dict[str, Cut | None]
"""Argument -> the cut of it that a slice of the result needs; None, or no entry: the whole."""


def needs(node: Node, cut: Cut) -> Needs:
    """What a slice of the node's result reads. Raises Blocked."""
    rule = RULES.get(node.op)
    if rule is not None:
        return rule(node, cut)
    if torch.Tag.pointwise in getattr(node.op, "tags", ()) and not node.op._schema.is_mutable:
        return pointwise(node, cut)
    raise Blocked(f"no rule for {node.what}")


def through_view(cut: Cut, out: Sequence[int], back: Sequence[int]) -> Cut:
    """The same elements in a tensor of shape `back` that is viewed as `out`. Raises Blocked where it has no dimension
    of its own there."""
    stride = cut.inner * prod(out[cut.dim + 1 :])
    for dim, size in enumerate(back):
        below = prod(back[dim + 1 :])
        if below <= stride and stride * cut.extent <= below * size and stride % below == 0:
            inner = stride // below
            if size % (cut.extent * inner) == 0:
                return replace(cut, dim=dim, outer=size // (cut.extent * inner), inner=inner)
    raise Blocked("a view crosses the dimension")


def pointwise(node: Node, cut: Cut) -> Needs:
    """Every tensor argument, broadcast."""
    return {
        name: broadcast(cut, node.shape, node.shape_of(name))
        for name, value in zip(node.names, node.args, strict=True)
        if isinstance(value, Ref)
    }


def broadcast(cut: Cut, out: Sequence[int], shape: Sequence[int] | None) -> Cut | None:
    """The cut of an argument that is broadcast to the result: none where it is the same for every slice."""
    if shape is None:
        return None
    dim = cut.dim - len(out) + len(shape)
    if dim < 0 or shape[dim] == 1 != out[cut.dim]:
        return None
    return cut.at(dim)


def view(node: Node, cut: Cut) -> Needs:
    """view, reshape, flatten, unflatten."""
    return {"self": through_view(cut, node.shape, _self(node))}


def same(node: Node, cut: Cut) -> Needs:
    """Ops of one tensor that leave each element where it is."""
    return {node.names[0]: cut}


def dropout(node: Node, cut: Cut) -> Needs:
    """Nothing at all, unless it draws."""
    if node.arg("train") and node.arg("p") > 0:
        raise Blocked("draws random numbers, which would differ in slices")
    return {"input": cut}


def along(*dims: str) -> Callable[[Node, Cut], Needs]:
    """Ops that mix elements along the dimensions named by these arguments, and keep their shape."""

    def rule(node: Node, cut: Cut) -> Needs:
        rank = len(node.shape)
        mixed = {one % rank for name in dims for one in _list(node.arg(name))}
        if cut.dim in mixed:
            raise Blocked(f"{node.what} is over the dimension")
        return {node.names[0]: cut}

    return rule


def norm(node: Node, cut: Cut) -> Needs:
    """layer_norm, rms_norm: over the last dimensions."""
    if cut.dim >= len(node.shape) - len(node.arg("normalized_shape")):
        raise Blocked(f"{node.what} is over the dimension")
    return {"input": cut}


def reduction(node: Node, cut: Cut) -> Needs:
    """mean, sum, amax, ... over some dimensions."""
    rank = len(_self(node))
    gone = sorted({one % rank for one in _list(node.arg("dim"))}) or list(range(rank))
    if node.arg("keepdim"):
        if cut.dim in gone:
            raise Blocked(f"{node.what} is over the dimension")
        return {"self": cut}
    kept = [dim for dim in range(rank) if dim not in gone]
    return {"self": cut.at(kept[cut.dim])}


def transpose(node: Node, cut: Cut) -> Needs:
    """Two dimensions change places."""
    rank = len(node.shape)
    one, other = node.arg("dim0") % rank, node.arg("dim1") % rank
    return {"self": cut.at({one: other, other: one}.get(cut.dim, cut.dim))}


def flip(node: Node, cut: Cut) -> Needs:
    """t of a matrix."""
    return {"self": cut.at(1 - cut.dim if len(node.shape) == 2 else cut.dim)}


def permute(node: Node, cut: Cut) -> Needs:
    """Dimensions in another order."""
    return {"self": cut.at(node.arg("dims")[cut.dim] % len(node.shape))}


def unsqueeze(node: Node, cut: Cut) -> Needs:
    """A dimension of 1 comes in."""
    new = node.arg("dim") % len(node.shape)
    if cut.dim == new:
        raise Blocked("the dimension is new")
    return {"self": cut.at(cut.dim - (cut.dim > new))}


def squeeze(node: Node, cut: Cut) -> Needs:
    """Dimensions of 1 go."""
    return {"self": through_view(cut, node.shape, _self(node))}


def expand(node: Node, cut: Cut) -> Needs:
    """Dimensions of 1 are repeated."""
    return {"self": broadcast(cut, node.shape, _self(node))}


def select(node: Node, cut: Cut) -> Needs:
    """One dimension goes."""
    gone = node.arg("dim") % len(_self(node))
    return {"self": cut.at(cut.dim + (cut.dim >= gone))}


def part(node: Node, cut: Cut) -> Needs:
    """A range of one dimension."""
    dim, size = node.arg("dim") % len(node.shape), _self(node)
    whole = (
        not node.arg("start") and (node.arg("end") is None or node.arg("end") >= size[dim]) and node.arg("step") == 1
    )
    if cut.dim == dim and not whole:
        raise Blocked("a range of the dimension is taken")
    return {"self": cut}


def parts(node: Node, cut: Cut) -> Needs:
    """split, chunk: the cut is that of each piece."""
    if cut.dim == node.arg("dim") % len(_self(node)):
        raise Blocked(f"{node.what} is of the dimension")
    return {"self": cut}


def unbind(node: Node, cut: Cut) -> Needs:
    """Like split, and the dimension goes."""
    return select(node, cut)


def getitem(node: Node, cut: Cut) -> Needs:
    """One of a list of results."""
    return {"self": cut}


def cat(node: Node, cut: Cut) -> Needs:
    """Pieces one behind the other."""
    if cut.dim == node.arg("dim") % len(node.shape):
        raise Blocked("cat is of the dimension")
    return {"tensors": cut}


def stack(node: Node, cut: Cut) -> Needs:
    """Pieces along a new dimension."""
    new = node.arg("dim") % len(node.shape)
    if cut.dim == new:
        raise Blocked("stack is of the dimension")
    return {"tensors": cut.at(cut.dim - (cut.dim > new))}


def linear(node: Node, cut: Cut) -> Needs:
    """Rows of x, or rows of the weight."""
    if cut.dim == len(node.shape) - 1:
        return {"weight": cut.at(0), "bias": cut.at(0)}
    return {"input": cut}


def product(left: str, right: str, added: str | None = None) -> Callable[[Node, Cut], Needs]:
    """matmul, mm, bmm, addmm, baddbmm: rows of the one, columns of the other, or whole matrices of a batch."""

    def rule(node: Node, cut: Cut) -> Needs:
        a, b = node.shape_of(left), node.shape_of(right)
        if a is None or b is None or len(a) < 2 or len(b) < 2:
            raise Blocked("a product with a vector")
        from_end = len(node.shape) - cut.dim
        more = {} if added is None else {added: broadcast(cut, node.shape, node.shape_of(added))}
        if from_end == 1:
            return {right: cut.at(len(b) - 1), **more}
        if from_end == 2:
            return {left: cut.at(len(a) - 2), **more}
        return {left: broadcast(cut, node.shape, a), right: broadcast(cut, node.shape, b), **more}

    return rule


def attention(node: Node, cut: Cut) -> Needs:
    """Queries, heads or rows. A slice of causal queries reads the keys up to its end."""
    q, k, mask = node.shape_of("query"), node.shape_of("key"), node.shape_of("attn_mask")
    assert q is not None
    assert k is not None
    rank = len(q)
    if node.arg("dropout_p") > 0:
        raise Blocked("draws random numbers, which would differ in slices")
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
    """Rows of a table."""
    if cut.dim == len(node.shape) - 1:
        raise Blocked("the table's own dimension")
    return {"indices": cut}


def _self(node: Node) -> tuple[int, ...]:
    return node.shapes[0]


def _list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, tuple | list) else [value]


def _getitem() -> Any:
    import operator

    return operator.getitem


RULES: dict[Any, Callable[[Node, Cut], Needs]] = {
    **dict.fromkeys(
        [aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
         aten.unflatten.int], view,
    ),
    **dict.fromkeys(
        [aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.to.dtype,
         aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.lift_fresh_copy.default], same,
    ),
    aten.dropout.default: dropout,
    **dict.fromkeys(
        [aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default,
         aten.cumsum.default, aten.cumprod.default], along("dim"),
    ),
    **dict.fromkeys([aten.layer_norm.default, aten.rms_norm.default], norm),
    **dict.fromkeys(
        [aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
         aten.logsumexp.default, aten.argmax.default], reduction,
    ),
    aten.transpose.int: transpose, aten.t.default: flip, aten.permute.default: permute,
    aten.unsqueeze.default: unsqueeze,
    **dict.fromkeys([aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims], squeeze),
    aten.expand.default: expand, aten.select.int: select, aten.slice.Tensor: part,
    **dict.fromkeys(
        [aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes], parts
    ),
    aten.unbind.int: unbind, _getitem(): getitem,
    aten.cat.default: cat, aten.stack.default: stack,
    aten.linear.default: linear,
    **dict.fromkeys([aten.matmul.default], product("self", "other")),
    **dict.fromkeys([aten.mm.default, aten.bmm.default], product("self", "mat2")),
    aten.addmm.default: product("mat1", "mat2", "self"),
    aten.baddbmm.default: product("batch1", "batch2", "self"),
    aten.scaled_dot_product_attention.default: attention,
    aten.embedding.default: embedding,
}  # fmt: skip

SIZED = {
    **{op: op for op in (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)},
    aten.unflatten.int: aten.reshape.default,
}
"""Ops that are told the shape of their result, and what makes another shape: called with a tensor and the shape."""
