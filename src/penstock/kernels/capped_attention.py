"""Attention whose scores are bent by tanh before the softmax (Gemma 2), a tile of queries at a time, gradients too.

torch's fused attention has no such scores, and the plain formula keeps four tensors of [B, H, T, T]. Here a tile of
scores is made, read and freed, and made again in backward, as in flash attention (Dao et al. 2022); keys that a tile
cannot see, behind it or outside the window, are not read.

Shapes: B rows, T queries, S keys, H query heads, G key/value heads, E head_dim, n queries of a tile, m keys it sees.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float, softcap: float, window: int, tile: int
) -> Tensor:
    """softmax(softcap * tanh(scale / softcap * q k^T) + bias) v: q [B, H, T, E], k and v [B, G, S, E] -> [B, H, T, E].

    Without a bias queries are causal, the last T of S, and see the nearest `window` keys if that is not 0; `tile` of
    them at a time. Softmax in fp32.
    """
    if bias is None and not torch.compiler.is_exporting():
        return _Attention.apply(q, k, v, scale, softcap, window, tile)
    if bias is None:
        bias = torch.zeros((), device=q.device).masked_fill(
            _hidden(0, q.shape[2], 0, q.shape[2], window, q), -torch.inf
        )
    else:
        bias = bias.unsqueeze(2)  # [B or 1, 1, 1, T, S]
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, G, H / G, T, E]
    scores = torch.tanh((grouped @ k.unsqueeze(2).transpose(-1, -2)).float() * (scale / softcap)) * softcap + bias
    return (scores.softmax(-1).to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, window: int, tile: int
    ) -> Tensor:
        mixed, sums = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3]).float()
        for queries, keys, hidden in _tiles(q, k, window, tile):
            bent = _bent(q[:, :, queries], k[:, :, keys], scale / softcap)
            scores = bent.mul_(softcap).masked_fill_(hidden, -torch.inf)
            sums[:, :, queries] = scores.logsumexp(-1)
            shares = scores.sub_(sums[:, :, queries, None]).exp_().to(v.dtype)
            mixed[:, :, queries] = _per_group(shares, v[:, :, keys])
        ctx.save_for_backward(q, k, v, mixed, sums)
        ctx.numbers = scale, softcap, window, tile
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mixed, sums = ctx.saved_tensors
        scale, softcap, window, tile = ctx.numbers
        of_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        of_k, of_v = (torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (k, v))
        for queries, keys, hidden in _tiles(q, k, window, tile):
            bent = _bent(q[:, :, queries], k[:, :, keys], scale / softcap)
            shares = (bent * softcap).masked_fill_(hidden, -torch.inf).sub_(sums[:, :, queries, None]).exp_()
            part = grad[:, :, queries]
            # d shares = shares (grad v^T - grad . mixed); d tanh = 1 - tanh^2
            back = _per_group(part, v[:, :, keys].transpose(2, 3)).float()
            back.sub_((part.float() * mixed[:, :, queries]).sum(-1, keepdim=True)).mul_(shares)
            back.sub_(bent.square_().mul_(back)).mul_(scale)
            of_v[:, :, keys] += _over_group(shares.to(v.dtype), part, v.shape[1])
            back = back.to(k.dtype)
            of_q[:, :, queries] = _per_group(back, k[:, :, keys])
            of_k[:, :, keys] += _over_group(back, q[:, :, queries], k.shape[1])
        return of_q, of_k.to(k.dtype), of_v.to(v.dtype), None, None, None, None


def _tiles(q: Tensor, k: Tensor, window: int, height: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, the keys from the first to the last that they see, and which of these each does not see, [n, m]."""
    length, before = q.shape[2], k.shape[2] - q.shape[2]
    for start in range(0, length, height):
        stop = min(start + height, length)
        own, last = before + start, before + stop
        first = max(own + 1 - window, 0) if window else 0
        yield slice(start, stop), slice(first, last), _hidden(own, last, first, last, window, q)


def _hidden(start: int, stop: int, first: int, last: int, window: int, q: Tensor) -> Tensor:
    """Whether query start .. stop-1 does not see key first .. last-1: [n, m] bool."""
    distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, last, device=q.device)
    return (distance < 0) | (distance >= window) if window else distance < 0


def _bent(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """tanh(scale q k^T): [B, H, n, m] fp32."""
    return _per_group(q, k.transpose(2, 3)).float().mul_(scale).tanh_()


def _per_group(x: Tensor, y: Tensor) -> Tensor:
    """x [B, H, n, a], y [B, G, a, c] -> [B, H, n, c]: each head with its group's."""
    rows, heads, n, inner = x.shape
    return (x.reshape(rows, y.shape[1], -1, inner) @ y).view(rows, heads, n, -1)


def _over_group(x: Tensor, y: Tensor, groups: int) -> Tensor:
    """x [B, H, n, a], y [B, H, n, c] -> x^T y summed over each group's heads, [B, G, a, c]."""
    stacked = (z.reshape(len(z), groups, -1, z.shape[3]) for z in (x, y))
    left, right = stacked
    return left.transpose(2, 3) @ right
