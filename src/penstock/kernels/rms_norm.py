"""RMSNorm (Zhang and Sennrich 2019) for training: autograd keeps its argument alone; on a CPU each way is one pass.

torch's is a dozen operations there, which keep two fp32 copies of bf16 states and take six times as long. On a GPU it
is one kernel, which is used here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.kernels import compile as compiler
from penstock.kernels import cpu_ops


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (weight + offset) over the last dimension, in x's dtype, as F.rms_norm; what autograd keeps is x."""
    if torch.compiler.is_exporting():
        return _rms_normed(x, weight, eps, offset)
    return _RmsNorm.apply(x, weight, eps, offset)


def _rms_normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    if not offset:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    # in fp32: a bf16 sum with 1 would round the weight by 0.4 %
    return F.rms_norm(x.float(), x.shape[-1:], weight.float() + offset, eps).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.eps, ctx.offset = weight, eps, offset
        if cpu_ops.computes(x.device, x.dtype, weight.dtype):
            return cpu_ops.rms_norm(x.flatten(0, -2), weight, eps, offset).view(x.shape)
        return _rms_normed(x, weight, eps, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,), learns = ctx.saved_tensors, ctx.needs_input_grad[1]
        if cpu_ops.computes(x.device, x.dtype, ctx.weight.dtype):
            return *cpu_ops.rms_norm_back(x, ctx.weight, grad, ctx.eps, ctx.offset, learns), None, None
        if x.device.type != "cuda" or not compiler.real():
            return *_rms_norm_back(x, ctx.weight, grad, ctx.eps, ctx.offset, learns), None, None
        with torch.enable_grad():  # by torch's own kernel
            x, weight = x.detach().requires_grad_(), ctx.weight.detach().requires_grad_(learns)
            normed = _rms_normed(x, weight, ctx.eps, ctx.offset)
        back = torch.autograd.grad(normed, (x, weight) if learns else (x,), grad)
        return back[0], back[1] if learns else None, None, None


def _rms_norm_back(
    x: Tensor, weight: Tensor, grad: Tensor, eps: float, offset: float, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """As cpu_ops.rms_norm_back, where there is no compiler."""
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    slopes = (wide * scale).mul_(grad).sum(tuple(range(x.dim() - 1))) if learns else None
    back = grad * (weight.float() + offset)
    along = (back * wide).mean(-1, keepdim=True).mul_(scale**3)
    return back.mul_(scale).sub_(wide * along).to(x.dtype), slopes
