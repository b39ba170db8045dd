"""What follows from where tokens stand: rotary tables, ALiBi, windows. Computed once per call, handed to every block.

Shapes: B rows, T tokens, H query heads, E head_dim, S cache slots.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penstock.models.config import DecoderConfig


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a call stand and what each of them may see."""

    rotary: tuple[Tensor, Tensor] | None
    """cos, sin: [B or 1, 1, T, rotary_dim]."""
    bias: Tensor | None
    """Added to the attention scores, [B or 1, H or 1, T, S]; None: plain causal."""
    slots: Tensor | None
    """Decoding: the cache slot each row writes, [B] int64, the last one it sees. None: whole rows from slot 0."""
    seen: int = 0
    """Decoding: cache slots that any row sees."""
    window: int = 0
    slopes: Tensor | None = None
    """Without a bias, which `kernels.cpu_ops` and `kernels.capped_attention` do not need: the attention window, and
    ALiBi's slopes."""


pytree.register_dataclass(Positions)  # so that a block can be exported with them


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions in the half-split layout (Su et al. 2021, as Hugging Face stores weights): x [B, H, T, E]."""
    cos, sin = rotary
    part, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = part.chunk(2, dim=-1)
    turned = part * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned


def attention_bias(
    config: DecoderConfig, window: int, where: Tensor, seen: int, dtype: torch.dtype, decoding: bool
) -> Tensor | None:
    """What attention adds to its scores, [B or 1, H or 1, T, S]: queries at `where` [B or 1, T], keys 0 .. seen-1.

    None where plain causal says it all: whole rows without ALiBi whose window, if any, they do not exceed.
    """
    narrow = 0 < window < seen
    if not (decoding or narrow or config.position == "alibi"):
        return None
    distance = where[:, None, :, None] - torch.arange(seen, device=where.device)  # [B or 1, 1, T, S]
    hidden = (distance < 0) | (distance >= window) if narrow else distance < 0
    bias = torch.zeros((), device=where.device)
    if config.position == "alibi":
        bias = -alibi_slopes(config.num_heads, where.device)[:, None, None] * distance
    return bias.masked_fill(hidden, -torch.inf).to(dtype)


def rotary_tables(
    config: DecoderConfig, where: Tensor, dtype: torch.dtype, local_theta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """cos and sin, [B or 1, 1, T, rotary_dim], for positions `where` [B or 1, T]; with a `local_theta` those of layers
    that have their own."""
    angles = where[:, None, :, None].float() * rope_frequencies(config, where.device, local_theta)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_frequencies(config: DecoderConfig, device: torch.device, local_theta: float = 0.0) -> Tensor:
    """Inverse frequencies, [rotary_dim / 2] fp32, with linear or llama3 scaling (Llama 3.1's long-context recipe)."""
    exponent = torch.arange(0, config.rotary_dim, 2, device=device).float() / config.rotary_dim
    frequencies = 1.0 / (local_theta or config.rope_theta) ** exponent
    scaling = {} if local_theta else dict(config.rope_scaling)
    if scaling.get("rope_type") == "linear":
        return frequencies / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        old = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * math.pi / frequencies
        smooth = (old / wavelength - low) / (high - low)
        between = (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies
        scaled = torch.where(wavelength > old / low, frequencies / scaling["factor"], frequencies)
        return torch.where((wavelength <= old / low) & (wavelength >= old / high), between, scaled)
    return frequencies


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """One slope per head, [H] fp32 (Press et al. 2022; for head counts that are no power of two, as BLOOM does)."""
    power = 2 ** math.floor(math.log2(heads))
    steps = torch.arange(1, power + 1, device=device).double() / power
    more = (2 * torch.arange(heads - power, device=device) + 1).double() / power
    return torch.cat((-8 * steps, -4 * more)).exp2().float()
