"""Weights in fewer bits: int8 or fp8 with a scale per output, or nf4 with one per 64 inputs. They are never trained.

For answering, `surgery.quantise` makes every product, the token table and the head int8: half the bytes of bf16 for
decoding, which is bound by reading weights. Under adapters, `surgery.quantise_base` packs the products of all blocks
alone: the frozen base of a QLoRA run (Dettmers et al. 2023) takes 1.03 or 0.56 bytes a weight. Rows are rounded to 255
levels of their largest weight (Dettmers et al. 2022, LLM.int8), or blocks to the 16 quantiles of a normal distribution
(QLoRA, appendix E). In fp8 (e4m3: Micikevicius et al. 2022) a row's numbers have 4 significant bits each, at the same
bytes: int8 is nearer to the full weights (docs/memory.md has figures).

[Note: products in fp8] Ada, Hopper and the Blackwell of data centres (8.9, 9.x, 10.x; torch 2.13 has no kernel with a
scale per row for 12.x) multiply fp8 as it lies, so that an answer's token reads one byte a weight; int8 is unpacked
there for every token. Both factors must be fp8: states are rounded too, each token's to its own scale, as vLLM does.
Whoever learns, other GPUs and odd widths unpack.

[Note: packed bases are weights of other dtypes] Packed products are chunks of bytes, and chunks of fp32 scales. They
are packed while they are read, stream as any chunk does, and are unpacked a tile of rows at a time inside the product,
in forward and again in backward. No other code knows of them.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.kernels import compile as compiler
from penstock.models.tiling import PACK_TILE, PRODUCT_TILE
from penstock.models.weight_shapes import BY_ROW, BaseDtype, packed_shapes

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def by_row(weight: Tensor, dtype: BaseDtype) -> tuple[Tensor, Tensor]:
    """[O, I] -> int8 or fp8 [O, I] and scales [O] in the weight's dtype: each row's largest weight is the dtype's."""
    kind: torch.dtype = getattr(torch, BY_ROW[dtype])
    largest = (torch.finfo if kind.is_floating_point else torch.iinfo)(kind).max
    scales = (weight.float().abs().amax(dim=1).clamp(min=1e-12) / largest).to(weight.dtype)
    shares = weight.float() / scales.float()[:, None]
    if not kind.is_floating_point:
        shares.round_()
    return shares.clamp_(-largest, largest).to(kind), scales


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
    if dtype in BY_ROW:
        return by_row(weight, dtype)
    levels = torch.tensor(NF4, device=weight.device)
    blocks = weight.view(len(weight), shape[1], -1)  # [O, blocks, block]
    scales = blocks.abs().amax(dim=2)
    shares = blocks / torch.where(scales > 0, scales, 1.0)[:, :, None]
    codes = torch.bucketize(shares, (levels[:-1] + levels[1:]) / 2).to(torch.uint8).view(len(weight), -1, 2)
    return codes[:, :, 0] * 16 + codes[:, :, 1], scales


def multiplied_in_fp8(x: Tensor, weight: Tensor) -> bool:
    """Whether the device has a kernel for `fp8_product`. See [Note: products in fp8]."""
    if weight.dtype != torch.float8_e4m3fn or x.dtype != torch.bfloat16 or x.device.type != "cuda":
        return False
    if any(size % 16 for size in weight.shape) or torch.version.hip is not None:
        return False
    major, minor = torch.cuda.get_device_capability(x.device)
    return (major, minor) == (8, 9) or major in (9, 10)


def fp8_product(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    """x [..., I] bf16, an fp8 weight [O, I] with scales [O], bias [O] bf16 -> [..., O] bf16, summed in fp32.

    The states that are rounded at once are no more than the weights that would be unpacked at once: the plan holds.
    """
    states, y = x.reshape(-1, x.shape[-1]), x.new_empty(*x.shape[:-1], len(weight))
    height, largest = max(min(PRODUCT_TILE, weight.numel()) // weight.shape[1], 1), torch.finfo(weight.dtype).max
    for rows, out in zip(states.split(height), y.view(-1, len(weight)).split(height), strict=True):
        sizes = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True).clamp_(min=1e-12).div_(largest)
        numbers = (rows / sizes).to(weight.dtype)
        torch._scaled_mm(numbers, weight.t(), sizes.float(), scales[None], bias, out_dtype=x.dtype, out=out)
    return y


def dense(weight: Tensor, scales: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of a packed weight, unpacked: [rows, I] in `dtype`."""
    if weight.dtype != torch.uint8:
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
