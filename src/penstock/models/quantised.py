"""int8 weights for inference: each output of a product has one scale, activations and caches stay what they were.

Half the bytes of bf16 for decoding, which is bound by reading weights. Each row is rounded to 255 levels of its largest
weight (row-wise absmax, Dettmers et al. 2022, LLM.int8). For answering only: nothing is trained on it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from penstock.models.decoder import Decoder


@torch.no_grad()
def quantise(decoder: "Decoder") -> None:
    """Replaces the weights of all products and the token table by int8 ones, one by one, in place."""
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            module.weight, module.scales = _int8(module.weight)
    decoder.embed.tokens, decoder.embed.scales = _int8(decoder.embed.tokens)
    decoder.head_scales = decoder.embed.scales
    if decoder.head is not None:
        decoder.head, decoder.head_scales = _int8(decoder.head)


def _int8(weight: Tensor) -> tuple[nn.Parameter, Tensor]:
    """[O, I] -> int8 [O, I] and scales [O] in the weight's dtype: what they give back is within half a scale."""
    scales = (weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127).to(weight.dtype)
    rounded = torch.round(weight.float() / scales.float()[:, None]).clamp(-127, 127)
    return nn.Parameter(rounded.to(torch.int8), requires_grad=False), scales


def rows(table: Tensor, scales: Tensor, tokens: Tensor) -> Tensor:
    """The token table's rows, [..., D] in the scales' dtype."""
    return table[tokens].to(scales.dtype) * scales[tokens][..., None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor, widen: bool) -> Tensor:
    """x [..., I] -> [..., O] for many rows: the weight is given back its values for the call, in fp32 if `widen`."""
    kind = torch.float32 if widen else x.dtype
    full = weight.to(kind) * scales.to(kind)[:, None]
    return F.linear(x.to(kind), full, None if bias is None else bias.to(kind)).to(x.dtype)
