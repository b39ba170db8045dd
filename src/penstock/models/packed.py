"""Weights in fewer bits: int8 with a scale per output, or nf4 with a scale per 64 inputs. They are never trained.

For answering, `surgery.quantise` makes every product, the token table and the head int8: half the bytes of bf16 for
decoding, which is bound by reading weights. Under adapters, `surgery.quantise_base` packs the products of all blocks
alone: the frozen base of a QLoRA run (Dettmers et al. 2023) takes 1.03 or 0.56 bytes a weight. Rows are rounded to 255
levels of their largest weight (Dettmers et al. 2022, LLM.int8), or blocks to the 16 quantiles of a normal distribution
(QLoRA, appendix E).

[Note: packed bases are weights of other dtypes] Packed products are chunks of bytes, and chunks of fp32 scales. They
are packed while they are read, stream as any chunk does, and are unpacked a tile of rows at a time inside the product,
in forward and again in backward. No other code knows of them.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.kernels import compile as compiler
from penstock.models.tiling import PACK_TILE
from penstock.models.weight_shapes import BaseDtype, packed_shapes

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def as_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[O, I] -> int8 [O, I] and scales [O] in the weight's dtype: their product is off by half a scale at most."""
    scales = (weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127).to(weight.dtype)
    rounded = torch.round(weight.float() / scales.float()[:, None]).clamp(-127, 127)
    return rounded.to(torch.int8), scales


def rows(table: Tensor, scales: Tensor, tokens: Tensor) -> Tensor:
    """The token table's rows, [..., D] in the scales' dtype."""
    return table[tokens].to(scales.dtype) * scales[tokens][..., None]


def pack(weight: Tensor, dtype: BaseDtype) -> tuple[Tensor, Tensor]:
    """[O, I] -> packed weight and fp32 scales, in the shapes of `packed_shapes`. On `meta` only shapes."""
    shapes = packed_shapes(dtype, *weight.shape)
    packed, scales = (torch.empty(shape, dtype=getattr(torch, name), device=weight.device) for shape, name in shapes)
    height = max(PACK_TILE // weight.shape[1], 1)
    for start in range(0, 0 if weight.is_meta else len(weight), height):
        rows = slice(start, start + height)
        packed[rows], scales[rows] = _packed(weight[rows].float(), dtype, shapes[1][0])
    return packed, scales


def _packed(weight: Tensor, dtype: BaseDtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Of some rows, fp32. `shape`: of all scales."""
    if dtype == "int8":
        return as_int8(weight)
    levels = torch.tensor(NF4, device=weight.device)
    blocks = weight.view(len(weight), shape[1], -1)  # [O, blocks, block]
    scales = blocks.abs().amax(dim=2)
    shares = blocks / torch.where(scales > 0, scales, 1.0)[:, :, None]
    codes = torch.bucketize(shares, (levels[:-1] + levels[1:]) / 2).to(torch.uint8).view(len(weight), -1, 2)
    return codes[:, :, 0] * 16 + codes[:, :, 1], scales


def dense(weight: Tensor, scales: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of a packed weight, unpacked: [rows, I] in `dtype`."""
    if weight.dtype == torch.int8:
        return weight[rows].to(dtype) * scales[rows].to(dtype)[:, None]
    codes = weight[rows]
    pairs_of = _pairs if compiler.real() else _pairs.__wrapped__  # a dry run's tensors must not stay in the cache
    numbers = F.embedding(codes.int(), pairs_of(weight.device, dtype))  # [rows, I / 2, 2]
    blocks = numbers.view(len(codes), scales.shape[1], -1)
    return blocks.mul_(scales[rows].to(dtype)[:, :, None]).view(len(codes), -1)


@functools.cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 2]: the two numbers that a byte of nf4 encodes, high half first."""
    levels = torch.tensor(NF4, device=device, dtype=dtype)
    return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=-1)
