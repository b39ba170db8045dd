"""Log-probabilities of chosen tokens straight from hidden states: logits exist a tile at a time.

Logits of a whole batch, [N, V], are the largest tensor of a language model's step: 0.8 GB for 4,096 tokens of GPT-2.
Here a tile is computed, read and freed, and computed again in backward (Wijmans et al. 2024, Cut Your Losses; Hsu et
al. 2024, Liger Kernel), where its memory becomes the gradient. torch's own linear_cross_entropy gives a loss and no
log-probabilities before 2.13, and is ten times slower on a CPU there.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.models.linear import add_product, backward_to_x, linear, rounding_to, slow_in_bf16
from penstock.models.tiling import head_tile


def logprobs(
    products: Sequence[tuple[Tensor, Tensor]], targets: Tensor, temperature: float = 1.0, *, entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target [N] and the entropy of each distribution, [N] fp32 both.

    The logits are the sum of x w^T over the products (x [N, I], w [V, I]): states and head, an adapter's two halves.
    Softmax in fp32 whatever the weights' dtype; the temperature divides the logits here, so rollout, reference and
    training all speak of the distribution that was sampled (PPO.md 3). The entropy carries no gradient; with
    `entropy=False` it is None and costs nothing.
    """
    flat = [tensor for pair in products for tensor in pair]
    chosen, spread = _Chosen.apply(targets, temperature, entropy, *flat)
    return chosen, spread if entropy else None


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, targets: Tensor, temperature: float, entropy: bool, *flat: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        count = len(targets)
        chosen = torch.empty(count, dtype=torch.float32, device=targets.device)
        top, rest = torch.empty_like(chosen), torch.empty_like(chosen)
        spread = torch.empty_like(chosen) if entropy else None
        for rows, tiles in _tiles(count, len(pairs[0][1])):
            # The sum of e^(logit - highest) as the highest grows (Milakov and Gimelshein 2018, Online normalizer
            # calculation for softmax); `mass` is the sum of e^x x beside it.
            highest = torch.full_like(top[rows], torch.finfo(torch.float32).min)
            sums, mass = torch.zeros_like(highest), torch.zeros_like(highest)
            for columns in tiles:
                logits = _logits(pairs, rows, columns, temperature)
                inside, column = _within(targets[rows], columns)
                chosen[rows] = torch.where(inside, logits.gather(1, column)[:, 0], chosen[rows])
                higher = torch.maximum(highest, logits.amax(dim=-1))
                fall = (highest - higher).clamp_(min=-200.0)  # e^-200 is 0 in fp32, and infinities are not added
                every = logits.sub_(higher[:, None]).exp_()
                if entropy:
                    mass.addcmul_(fall, sums).mul_(fall.exp()).sub_(torch.special.entr(every).sum(dim=-1))
                sums.mul_(fall.exp()).add_(every.sum(dim=-1))
                highest = higher
                del logits, every
            top[rows], rest[rows] = highest, sums.log()
            if spread is not None:
                spread[rows] = (rest[rows] - mass / sums).clamp_(min=0)
        chosen.sub_(top).sub_(rest)  # the highest apart from the rest, so that large logits keep their differences
        ctx.weights, ctx.temperature = flat[1::2], temperature  # the parameters themselves: their .grad is the place
        ctx.save_for_backward(targets, top, rest, *flat[::2])
        if spread is not None:
            ctx.mark_non_differentiable(spread)
        ctx.set_materialize_grads(False)
        return chosen, spread

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        targets, top, rest, *xs = ctx.saved_tensors
        pairs = list(zip(xs, ctx.weights, strict=True))
        wanted = ctx.needs_input_grad[3:]
        backs = [torch.zeros_like(x, dtype=torch.float32) if wanted[2 * i] else None for i, x in enumerate(xs)]
        fresh: list[Tensor | None] = [None] * len(pairs)
        places: list[Tensor | None] = [None] * len(pairs)
        for i, weight in enumerate(ctx.weights):
            if wanted[2 * i + 1]:
                places[i] = weight.grad
                if weight.grad is None:
                    places[i] = fresh[i] = torch.zeros_like(weight)
        grad = grad / ctx.temperature
        falling = grad * rest.neg().exp_()
        for rows, tiles in _tiles(len(targets), len(ctx.weights[0])):
            for columns in tiles:
                # d log p(target) / d logits = onehot(target) - p, in as few passes over the tile as can be
                logits = _logits(pairs, rows, columns, ctx.temperature)
                slope = logits.sub_(top[rows, None]).exp_().mul_(-falling[rows, None])
                inside, column = _within(targets[rows], columns)
                slope.scatter_add_(1, column, torch.where(inside, grad[rows], 0.0)[:, None])
                for (x, weight), back, place in zip(pairs, backs, places, strict=True):
                    widen = weight.dtype == torch.bfloat16 and slow_in_bf16(x.device.type)
                    narrowed = slope if widen else slope.to(weight.dtype)
                    if back is not None:
                        back[rows] += backward_to_x(narrowed, weight[columns], widen)
                    if place is not None:
                        add_product(place[columns], narrowed, x[rows].to(narrowed.dtype), widen)
                del logits, slope, narrowed
        x_grads = [None if back is None else back.to(x.dtype) for x, back in zip(xs, backs, strict=True)]
        return None, None, None, *[grad for pair in zip(x_grads, fresh, strict=True) for grad in pair]


def _tiles(count: int, vocabulary: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows, and for each the columns of the logits that exist at once."""
    height, width = head_tile(count, vocabulary)
    columns = [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
    return ((slice(start, min(start + height, count)), columns) for start in range(0, count, height))


def _within(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether each target is among these columns [n], and its column in the tile, [n, 1] (any column if it is not)."""
    column = targets - columns.start
    width = columns.stop - columns.start
    return (column >= 0) & (column < width), column.clamp(0, width - 1)[:, None]


def _logits(pairs: Sequence[tuple[Tensor, Tensor]], rows: slice, columns: slice, temperature: float) -> Tensor:
    """[rows, columns] fp32, in memory of its own."""
    with torch.no_grad(), rounding_to(pairs[0][1].dtype):
        logits = linear(pairs[0][0][rows], pairs[0][1][columns])
        for x, weight in pairs[1:]:
            logits += linear(x[rows], weight[columns])
        return logits.float().div_(temperature) if temperature != 1.0 else logits.float()
