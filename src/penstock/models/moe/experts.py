"""A mixture of experts: which experts a token's router chooses, and their answers, summed (Shazeer et al. 2017).

Tokens are sorted by expert, and each expert that was chosen multiplies its tokens at once. The router computes in fp32
whatever the weights' dtype. Nothing here knows where weights live.

Shapes: N tokens, D width, E experts, k experts per token.

[Note: one rule for ties] Of experts with equal logits those with the lower numbers are chosen: `argsort(stable=True)`,
in generation, scoring and training alike. torch.topk promises no order, and takes another one for other shapes.

[Note: the order of sums] A token's k answers are summed in the order of its experts' ranks, by one product per token.
So neither the other tokens of a batch nor threads change its bits; additions into a shared tensor would.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.kernels import compile as compiler
from penstock.models.moe.balance import Balance

Visit = Callable[[Sequence[int]], AbstractContextManager[None]]
"""Inside it, the weights of these experts are on the device."""


@dataclass(frozen=True)
class Routing:
    """What a block with experts is given beside its weights."""

    visit: Visit
    balance: Balance | None = None
    """In training: what its router chooses is counted there."""
    valid: Tensor | None = None
    """[N] bool: tokens that are no padding, where there is a balance."""


def everyone(experts: Sequence[int]) -> AbstractContextManager[None]:
    """A visit where all experts are on the device already."""
    return contextlib.nullcontext()


ALONE = Routing(everyone)


def mixture(
    x: Tensor, logits: Tensor, experts: Sequence[Callable[[Tensor], Tensor]], k: int, norm: bool, routing: Routing
) -> Tensor:
    """x [N, D] and the router's logits [N, E] fp32 -> [N, D]. Each expert maps [n, D] to [n, D].

    norm: the k shares add up to 1.
    """
    balance, valid = routing.balance, routing.valid
    if balance is not None and valid is not None:
        logits = balance.watch(logits, valid)
    shares, chosen = choose(logits, k, norm)
    if balance is not None and valid is not None:
        balance.count(logits, chosen, valid)
    order, counts = _by_expert(chosen, len(experts))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    pieces = _Sorted.apply(x, order, back, k).split(counts)
    called = [expert for expert, count in enumerate(counts) if count]
    with routing.visit(called):
        answers = torch.cat([experts[expert](pieces[expert]) for expert in called])
    del pieces
    answers = _Unsorted.apply(answers, order, back).view(len(x), k, -1)
    return (shares.to(x.dtype)[:, None] @ answers)[:, 0]


def choose(logits: Tensor, k: int, norm: bool) -> tuple[Tensor, Tensor]:
    """Shares and numbers of each token's experts, [N, k] fp32 and int64. See [Note: one rule for ties]."""
    chosen = logits.argsort(dim=-1, descending=True, stable=True)[:, :k].clone()  # [N, E] need not stay
    if norm:  # a softmax over all, divided by the chosen ones' sum, is the softmax of the chosen ones
        return logits.gather(1, chosen).softmax(dim=-1), chosen
    return logits.softmax(dim=-1).gather(1, chosen), chosen


def _by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """The N * k pairs of token and expert in the experts' order, and how many each expert has."""
    pairs = chosen.flatten()
    order = pairs.argsort(stable=True)
    if not compiler.real():  # a dry run: loads as even as they can be
        return order, [(len(pairs) + expert) // num_experts for expert in reversed(range(num_experts))]
    return order, pairs.bincount(minlength=num_experts).tolist()  # sync: the host must know whom to call


class _Sorted(torch.autograd.Function):
    """[N, D] -> [N * k, D]: each token once for each of its experts, in the experts' order.

    Its gradient adds up k rows per token, in their order. That of torch's indexing adds to shared rows, in any order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return grad[back].unflatten(0, (-1, ctx.k)).sum(dim=1), None, None, None


class _Unsorted(torch.autograd.Function):
    """[N * k, D] in the experts' order -> in the tokens' order."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y[back]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order], None, None
