"""MXFP4, in which gpt-oss is published: numbers of four bits, of which 32 share a power of two (OCP Microscaling 1.0).

Read only: a weight comes out of its file in full, one expert at a time, and is saved in the model's own dtype.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.models.weight_files import Weights

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Sign, two bits of exponent and one of mantissa."""
BIAS = 127
"""Of the exponents in the scales."""
BLOCKS, SCALES = "_blocks", "_scales"


def unpacked(weights: Weights) -> Weights:
    """The same checkpoint as if it held full weights: NAME_blocks [E, O, G, 16] and NAME_scales [E, O, G], both uint8,
    are NAME [E, 32 * G, O]."""
    packed = {name.removesuffix(BLOCKS) for name in weights.names if name.endswith(BLOCKS)}
    packed = {name for name in packed if name + SCALES in weights.names}
    halves = {name + ending for name in packed for ending in (BLOCKS, SCALES)}

    def shape(name: str) -> Sequence[int]:
        if name not in packed:
            return weights.shape(name)
        experts, outputs, groups, nbytes = weights.shape(name + BLOCKS)
        return (experts, groups * nbytes * 2, outputs)

    def part(name: str, expert: int) -> Tensor:
        if name not in packed:
            return weights.part(name, expert)
        return dequantise(weights.part(name + BLOCKS, expert), weights.part(name + SCALES, expert))

    return dataclasses.replace(
        weights,
        names=weights.names - halves | packed,
        get=lambda n: dequantise(weights.get(n + BLOCKS), weights.get(n + SCALES)) if n in packed else weights.get(n),
        shape=shape,
        dtype=lambda name: "BF16" if name in packed else weights.dtype(name),
        first=lambda name: part(name, 0) if name in packed else weights.first(name),
        row=part,
    )


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, O, G, 16] and [E, O, G] uint8 -> [E, 32 * G, O] fp32, exact in bf16. A byte's low half is first."""
    levels = torch.tensor(LEVELS, device=blocks.device)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).int()  # [E, O, G, 16, 2]
    numbers = torch.ldexp(levels[codes], (scales.int() - BIAS)[..., None, None])
    return numbers.flatten(2).transpose(1, 2)
