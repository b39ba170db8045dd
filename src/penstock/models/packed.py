"""Weights in fewer bits: int8 with a scale per output, or nf4 with a scale per 64 inputs. They are never trained.

For answering, `quantise` turns every product, the token table and the head into int8: half the bytes of bf16 for
decoding, which is bound by reading weights. Under adapters, `quantise_base` leaves table and head alone and packs the
products of all blocks: the frozen base of a QLoRA run (Dettmers et al. 2023) takes 1.03 or 0.56 bytes a weight. Rows
are rounded to 255 levels of their largest weight (Dettmers et al. 2022, LLM.int8), or blocks to the 16 quantiles of a
normal distribution (QLoRA, appendix E).
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.errors import UserError
from penstock.kernels import compile as compiler
from penstock.models.weight_shapes import BaseDtype, packed_shapes

if TYPE_CHECKING:
    from penstock.models.decoder import Decoder

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
WORKS_ON = ("cpu", "cuda", "meta")


# --- for answering ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantise(decoder: "Decoder") -> None:
    """Replaces the weights of all products and the token table by int8 ones, one by one, in place."""
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            module.weight, module.scales = _parameters(*_int8(module.weight))
    decoder.embed.tokens, decoder.embed.scales = _parameters(*_int8(decoder.embed.tokens))
    decoder.head_scales = decoder.embed.scales
    if decoder.head is not None:
        decoder.head, decoder.head_scales = _parameters(*_int8(decoder.head))


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[O, I] -> int8 [O, I] and scales [O] in the weight's dtype: what they give back is within half a scale."""
    scales = (weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127).to(weight.dtype)
    rounded = torch.round(weight.float() / scales.float()[:, None]).clamp(-127, 127)
    return rounded.to(torch.int8), scales


def _parameters(weight: Tensor, scales: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(weight, requires_grad=False), nn.Parameter(scales, requires_grad=False)


def rows(table: Tensor, scales: Tensor, tokens: Tensor) -> Tensor:
    """The token table's rows, [..., D] in the scales' dtype."""
    return table[tokens].to(scales.dtype) * scales[tokens][..., None]


# --- under adapters ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantise_base(decoder: "Decoder", kind: BaseDtype) -> None:
    """Packs the products of all blocks. On `meta` it changes the recipe, and nothing is read.

    Raises UserError for devices that have no such arithmetic, and for widths that do not pack.
    """
    device = decoder.embed.tokens.device.type
    if device not in WORKS_ON:
        raise UserError(f"--base-dtype {kind}: not on {device}; it works on cpu and cuda. Leave it out.")
    for name, module in decoder.blocks.named_modules():
        if isinstance(module, nn.Linear):
            if kind == "nf4" and module.weight.shape[1] % 2:
                raise UserError(f"--base-dtype nf4: {name} has {module.weight.shape[1]} inputs, which must be even.")
            module.weight, module.scales = _parameters(*pack(module.weight, kind))
    decoder.base_dtype = kind


def pack(weight: Tensor, kind: BaseDtype) -> tuple[Tensor, Tensor]:
    """[O, I] -> what `packed_shapes` says, scales in fp32. On `meta` only shapes."""
    shapes = packed_shapes(kind, *weight.shape)
    if weight.is_meta:
        made = [torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for shape, dtype in shapes]
        return made[0], made[1]
    if kind == "int8":
        return _int8(weight.float())
    levels = torch.tensor(NF4, device=weight.device)
    blocks = weight.float().view(len(weight), shapes[1][0][1], -1)  # [O, blocks, block]
    scales = blocks.abs().amax(dim=2)
    shares = blocks / torch.where(scales > 0, scales, 1.0)[:, :, None]
    codes = torch.bucketize(shares, (levels[:-1] + levels[1:]) / 2).to(torch.uint8).view(len(weight), -1, 2)
    return codes[:, :, 0] * 16 + codes[:, :, 1], scales


def dense(weight: Tensor, scales: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of a packed weight as numbers, [rows, I] in `dtype`."""
    if weight.dtype == torch.int8:
        return weight[rows].to(dtype) * scales[rows].to(dtype)[:, None]
    some = weight[rows]
    pairs = _pairs if compiler.real() else _pairs.__wrapped__  # a dry run's tensors are not to be kept
    numbers = F.embedding(some.int(), pairs(weight.device, dtype))  # [rows, I / 2, 2]
    blocks = numbers.view(len(some), scales.shape[1], -1)
    return blocks.mul_(scales[rows].to(dtype)[:, :, None]).view(len(some), -1)


@functools.cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 2]: the two numbers that a byte of nf4 stands for, high half first."""
    levels = torch.tensor(NF4, device=device, dtype=dtype)
    return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=-1)
