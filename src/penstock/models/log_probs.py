"""Log-probabilities of chosen or of the likeliest tokens, straight from hidden states: logits exist a tile at a time.

Logits of a whole batch, [N, V], are the largest tensor of a language model's step: 0.8 GB for 4,096 tokens of GPT-2.
Here a tile is computed, read and freed, and computed again in backward (Wijmans et al. 2024, Cut Your Losses; Hsu et
al. 2024, Liger Kernel), where its memory becomes the gradient. torch's own linear_cross_entropy gives a loss and no
log-probabilities before 2.13, and is ten times slower on a CPU there.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.models.linear import add_product, arithmetic_of, backward_to_x, linear, rounding_to, slow_in_bf16
from penstock.models.tiling import head_tile

NEVER = -1e30
"""A logit that adds nothing to any sum, and that can be subtracted from itself."""


def logprobs(
    products: Sequence[tuple[Tensor, Tensor]],
    targets: Tensor,
    temperature: float = 1.0,
    *,
    entropy: bool = True,
    others: bool = False,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, [N] fp32 or, for k targets per state, [N, k]; the entropy of each distribution,
    [N] fp32.

    The logits are the sum of x w^T over the products (x [N, I], w [V, I]): states and head, an adapter's two halves.
    Softmax in fp32 whatever the weights' dtype; the temperature divides the logits here, so rollout, reference and
    training all speak of the distribution that was sampled (PPO.md 3). With a `softcap` `bend` comes first. The entropy
    carries no gradient; with `entropy=False` it is None and costs nothing. With `others`, for k different targets per
    state, a last column has the log-probability of all other tokens together, [N, k + 1]: summed over
    them, never as 1 minus the rest.
    """
    assert not (entropy and others), "the entropy is that of the whole distribution"
    flat = [tensor for pair in products for tensor in pair]
    several = targets.dim() == 2
    chosen, spread = _Chosen.apply(
        targets if several else targets[:, None], (temperature, softcap), entropy, others, *flat
    )
    return chosen if several else chosen[:, 0], spread if entropy else None


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, targets: Tensor, bends: tuple[float, float], entropy: bool, others: bool, *flat: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        count = len(targets)
        chosen = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
        top, rest = (torch.empty(count, dtype=torch.float32, device=targets.device) for _ in range(2))
        spread = torch.empty_like(top) if entropy else None
        for rows, tiles in _tiles(count, pairs[0][1]):
            # The sum of e^(logit - highest) as the highest grows (Milakov and Gimelshein 2018, Online normalizer
            # calculation for softmax); `mass` is the sum of e^x x beside it.
            highest = torch.full_like(top[rows], torch.finfo(torch.float32).min)
            sums, mass = torch.zeros_like(highest), torch.zeros_like(highest)
            for columns in tiles:
                logits = _logits(pairs, rows, columns, *bends)
                inside, column = _within(targets[rows], columns)
                chosen[rows] = torch.where(inside, logits.gather(1, column), chosen[rows])
                if others:
                    logits.scatter_add_(1, column, inside.float() * NEVER)
                higher = torch.maximum(highest, logits.amax(dim=-1))
                fall = (highest - higher).clamp_(min=-200.0)  # e^-200 is 0 in fp32, and infinities are not added
                logits.sub_(higher[:, None])
                every = logits.exp() if entropy else logits.exp_()
                if entropy:
                    mass.addcmul_(fall, sums).mul_(fall.exp()).add_(logits.mul_(every).sum(dim=-1))
                sums.mul_(fall.exp()).add_(every.sum(dim=-1))
                highest = higher
                del logits, every
            top[rows], rest[rows] = highest, sums.log()
            if spread is not None:
                spread[rows] = (rest[rows] - mass / sums).clamp_(min=0)
        if others:
            chosen = _with_others(chosen, top, rest)
        else:  # the highest apart from the rest, so that large logits keep their differences
            chosen.sub_(top[:, None]).sub_(rest[:, None])
        ctx.weights, ctx.bends = flat[1::2], bends  # the parameters themselves: their .grad is the place
        ctx.others = others
        ctx.save_for_backward(targets, top, rest, chosen if others else None, *flat[::2])
        if spread is not None:
            ctx.mark_non_differentiable(spread)
        ctx.set_materialize_grads(False)
        return chosen, spread

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        targets, top, rest, chosen, *xs = ctx.saved_tensors
        pairs = list(zip(xs, ctx.weights, strict=True))
        wanted = ctx.needs_input_grad[4:]
        backs = [torch.zeros_like(x, dtype=torch.float32) if wanted[2 * i] else None for i, x in enumerate(xs)]
        fresh: list[Tensor | None] = [None] * len(pairs)
        places: list[Tensor | None] = [None] * len(pairs)
        for i, weight in enumerate(ctx.weights):
            if wanted[2 * i + 1]:
                places[i] = weight.grad if weight.is_leaf else None
                if places[i] is None:
                    places[i] = fresh[i] = torch.zeros_like(weight)
        temperature, softcap = ctx.bends
        grad = grad / temperature
        falling = grad.sum(dim=-1)
        if ctx.others:
            # d log p(others) / d logits = p / p(others) - p, of the others; top and rest are theirs alone
            fallen = chosen.exp().mul_(falling[:, None])
            falling, grad = fallen[:, -1] - grad[:, -1], (grad - fallen)[:, :-1]
        falling = falling * rest.neg().exp_()
        for rows, tiles in _tiles(len(targets), ctx.weights[0]):
            for columns in tiles:
                # d log p(target) / d logits = onehot(target) - p, in as few passes over the tile as can be
                logits = _logits(pairs, rows, columns, temperature, softcap)
                level = (logits * (temperature / softcap)).square_() if softcap else None  # tanh^2
                inside, column = _within(targets[rows], columns)
                if ctx.others:
                    logits.scatter_add_(1, column, inside.float() * NEVER)
                slope = logits.sub_(top[rows, None]).exp_().mul_(-falling[rows, None])
                slope.scatter_add_(1, column, torch.where(inside, grad[rows], 0.0))
                if level is not None:  # d (softcap tanh(x / softcap)) / dx = 1 - tanh^2
                    slope.addcmul_(slope, level, value=-1.0)
                for (x, weight), back, place in zip(pairs, backs, places, strict=True):
                    widen = weight.dtype == torch.bfloat16 and slow_in_bf16(x.device.type)
                    narrowed = slope if widen else slope.to(weight.dtype)
                    if back is not None:
                        back[rows] += backward_to_x(narrowed, weight[columns], widen)
                    if place is not None:
                        add_product(place[columns], narrowed, x[rows].to(narrowed.dtype), widen)
                del logits, slope, narrowed, level
        x_grads = [None if back is None else back.to(x.dtype) for x, back in zip(xs, backs, strict=True)]
        return None, None, None, None, *[grad for pair in zip(x_grads, fresh, strict=True) for grad in pair]


@torch.no_grad()
def top_logprobs(
    products: Sequence[tuple[Tensor, Tensor]],
    k: int,
    temperature: float = 1.0,
    *,
    vocabulary: int | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens after each state, [N, k] int64, likeliest first, and their log-probabilities with that of
    all other tokens together in the last column, [N, k + 1] fp32. Carries no gradient.

    Arguments as in `logprobs`. vocabulary: only tokens below it are chosen; others count as the rest. Default: all.
    """
    count, width, device = len(products[0][0]), len(products[0][1]), products[0][0].device
    limit = min(vocabulary or width, width)
    assert 0 < k <= limit, "no more tokens than there are"
    ids = torch.zeros(count, k, dtype=torch.int64, device=device)
    best = torch.full((count, k), NEVER, dtype=torch.float32, device=device)
    top, rest = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(2))
    for rows, tiles in _tiles(count, products[0][1]):
        highest = torch.full_like(top[rows], torch.finfo(torch.float32).min)
        sums = torch.zeros_like(highest)
        for columns in tiles:
            logits = _logits(products, rows, columns, temperature, softcap)
            candidates = logits[:, : max(limit - columns.start, 0)]
            values, column = candidates.topk(min(k, candidates.shape[1]), dim=1)
            candidates.scatter_(1, column, NEVER)
            values = torch.cat([best[rows], values], dim=1)
            best[rows], kept = values.topk(k, dim=1)
            ids[rows] = torch.cat([ids[rows], column + columns.start], dim=1).gather(1, kept)
            values.scatter_(1, kept, NEVER)
            for left in (logits, values):  # what is not, or no longer, among the likeliest
                higher = torch.maximum(highest, left.amax(dim=-1))
                sums.mul_((highest - higher).clamp_(min=-200.0).exp_()).add_(left.sub_(higher[:, None]).exp_().sum(-1))
                highest = higher
            del logits, candidates, left
        top[rows], rest[rows] = highest, sums.log()
    return ids, _with_others(best, top, rest)


def _with_others(chosen: Tensor, top: Tensor, rest: Tensor) -> Tensor:
    """Log-probabilities [N, k + 1] from chosen logits [N, k] and the others' highest, and log of their sum behind it,
    [N]. The highest of all goes first, so that large logits keep their differences."""
    highest = torch.maximum(chosen.amax(dim=-1), top)
    every = torch.cat([chosen - highest[:, None], (top - highest + rest)[:, None]], dim=1)
    return every.sub_(every.logsumexp(dim=-1, keepdim=True))


def _tiles(count: int, head: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Rows, and for each the columns of the logits that exist at once: of `count` states and a head [V, I]."""
    vocabulary = len(head)
    height, width = head_tile(count, vocabulary, arithmetic_of(head.device.type))
    columns = [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
    return ((slice(start, min(start + height, count)), columns) for start in range(0, count, height))


def _within(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether each target is among these columns, and its column in the tile (any column if it is not): [n, k] both."""
    column = targets - columns.start
    width = columns.stop - columns.start
    return (column >= 0) & (column < width), column.clamp(0, width - 1)


def bend(logits: Tensor, divisor: float, softcap: float) -> Tensor:
    """softcap * tanh(logits / divisor / softcap), in place where nobody asks for gradients; softcap 0: only divided."""
    fresh = not (torch.is_grad_enabled() and logits.requires_grad)
    if divisor != 1.0:
        logits = logits.div_(divisor) if fresh else logits / divisor
    if softcap:
        logits = logits.div_(softcap).tanh_().mul_(softcap) if fresh else torch.tanh(logits / softcap) * softcap
    return logits


def _logits(
    pairs: Sequence[tuple[Tensor, Tensor]], rows: slice, columns: slice, temperature: float, softcap: float
) -> Tensor:
    """[rows, columns] fp32, in memory of its own."""
    with torch.no_grad(), rounding_to(pairs[0][1].dtype):
        logits = linear(pairs[0][0][rows], pairs[0][1][columns])
        for x, weight in pairs[1:]:
            logits += linear(x[rows], weight[columns])
        logits = bend(logits.float(), 1.0, softcap)
        return logits.div_(temperature) if temperature != 1.0 else logits
