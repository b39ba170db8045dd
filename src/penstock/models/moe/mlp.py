"""The MLP of a block, and that of one expert."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.kernels import cpu_ops
from penstock.models.config import DecoderConfig
from penstock.models.linear import Linear

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": cpu_ops.gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


class Mlp(nn.Module):
    """One expert."""

    def __init__(self, config: DecoderConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.up, self.down = mlp_weights(config, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N, D]."""
        return mlp(x, self.up, self.down, self.config)


def mlp_weights(config: DecoderConfig, width: int) -> tuple[Linear, Linear]:
    """up and down of an MLP; where it is gated, up holds the gate first."""
    up = Linear(config.d_model, width * (2 if config.gated else 1), bias=config.mlp_bias)
    return up, Linear(width, config.d_model, bias=config.mlp_bias)


def mlp(x: Tensor, up: Linear, down: Linear, config: DecoderConfig) -> Tensor:
    """down(activation(up(x))), gated or not."""
    act = ACTIVATION_FUNCTIONS[config.activation]
    if config.clamp is not None:
        return down(clamped_glu(up(x), *config.clamp))
    if config.gated:
        both = up(x)
        if config.activation in cpu_ops.GATES and cpu_ops.ready(both.device, both.dtype):
            return down(cpu_ops.gated(both, config.activation))
        gate, raised = both.chunk(2, dim=-1)
        return down(act(gate) * raised)
    return down(act(up(x)))


def clamped_glu(x: Tensor, alpha: float, limit: float) -> Tensor:
    """[..., 2F], gate first -> [..., F]: (up + 1) * gate * sigmoid(alpha * gate), both within `limit` (gpt-oss)."""
    gate, raised = x.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return (raised.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(alpha * gate))
