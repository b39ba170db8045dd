"""AdamW's moments in 8 bits each: a code per element and an fp32 scale per block of 256 (Dettmers et al. 2022, 8-bit
Optimizers via Block-wise Quantization).

A code names a share of its block's largest magnitude. Codes lie densest near 1 and reach down seven decades, because
moments of one block differ by orders of magnitude. The second moment's are the squares of eight decades of roots: the
root is what an update divides by. What has been decoded encodes to the same values again.
"""

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share a scale."""
SIGN = 128
"""A first moment's code has 7 bits of magnitude; the eighth is the sign."""
ONE = 0x3F80
"""The bits of 1.0 in bf16: a share's code is looked up by the share's own bits."""


def _levels(bits: int) -> Tensor:
    """[2**bits] fp64 from 0 to 1: decade i from below has 2**i levels, the middles of as many equal parts."""
    decades = [torch.zeros(1, dtype=torch.float64)]
    for i in range(bits):
        ends = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float64)
        decades.append((ends[:-1] + ends[1:]) / 2 * 10.0 ** (i - bits + 1))
    decades[-1][-1] = 1.0
    return torch.cat(decades)


def _codes(bits: int, rooted: bool) -> Tensor:
    """[ONE + 1] uint8: the nearest code of every bf16 share from 0 to 1, by the share's bits; `rooted`: of its root."""
    shares = torch.arange(ONE + 1, dtype=torch.int16).view(torch.bfloat16).double()
    levels = _levels(bits)
    return torch.bucketize(shares.sqrt() if rooted else shares, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


with torch.device("cpu"):
    FIRST, SECOND = _levels(7).float(), _levels(8).square().float()
    """The share of the largest magnitude that each code stands for: [128] of a first moment without its sign, [256] of
    a second one. Code 0 stands for 0, the last one for 1."""
    CODES_FIRST, CODES_SECOND = _codes(7, rooted=False), _codes(8, rooted=True)


def encode(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """moment [n] fp32, n a multiple of BLOCK -> codes [n] uint8, scales [n / BLOCK] fp32."""
    blocks = moment.view(-1, BLOCK)
    sizes = blocks.abs() if signed else blocks
    scales = sizes.amax(dim=1)
    share = (sizes / torch.where(scales > 0, scales, 1.0)[:, None]).to(torch.bfloat16)
    codes = (CODES_FIRST if signed else CODES_SECOND).to(moment.device)[share.view(torch.int16).int()]
    if signed:
        codes += (blocks < 0).to(torch.uint8) * SIGN
    return codes.view(-1), scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The inverse of `encode`, up to rounding: [n] fp32."""
    table = torch.cat([FIRST, -FIRST]) if signed else SECOND
    return (table.to(codes.device)[codes.int()].view(-1, BLOCK) * scales[:, None]).view(-1)
