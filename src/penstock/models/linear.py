"""Matrix products of bf16 weights on processors without bf16 instructions: stored in bf16, multiplied in fp32.

Most laptop CPUs (AVX2) have none, and PyTorch's fall-back there is 10 to 60 times slower than fp32. Casting each
weight where it is used costs a few per cent; weights, gradients and what is kept for backward stay in bf16.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 16


@functools.cache
def slow_in_bf16(device_type: str) -> bool:
    """Whether bf16 matrix products have no instructions of their own there."""
    if device_type != "cpu":
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O], as torch's own, fast on every processor."""
    # A token or a few at a time (decoding): casting the weight would cost more than the slow product.
    many = torch.is_grad_enabled() or x.shape[:-1].numel() > FEW
    if many and x.dtype == torch.bfloat16 and slow_in_bf16(x.device.type):
        return _Widened.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, grouped: bool) -> Tensor:
    """softmax(q k^T / sqrt(E) + bias) v: q [B, H, T, E], k and v [B, G, S, E]; causal when there is no bias."""
    dtype = q.dtype
    if dtype == torch.bfloat16 and slow_in_bf16(q.device.type):
        q, k, v, bias = q.float(), k.float(), v.float(), None if bias is None else bias.float()
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=grouped)
    return mixed.to(dtype)


class Linear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return linear(x, self.weight, self.bias)


class _Widened(torch.autograd.Function):
    """F.linear in fp32 on bf16 tensors; nothing wide outlives a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight, wanted_bias = ctx.needs_input_grad
        wide = grad.float()
        rows = wide.flatten(0, -2)
        return (
            (wide @ weight.float()).to(x.dtype) if wanted_x else None,
            (rows.T @ x.flatten(0, -2).float()).to(weight.dtype) if wanted_weight else None,
            rows.sum(0).to(weight.dtype) if wanted_bias else None,
        )
