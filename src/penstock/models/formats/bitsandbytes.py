"""Weights that bitsandbytes packed (what unsloth publishes), read as full ones: 4 bits with one or two kinds of scales,
and int8 with a scale per output.

A 4-bit weight is quant_map[code] * absmax, absmax of each block of consecutive inputs; with double quantisation absmax
is stored in 8 bits, nested_quant_map[code] * nested_absmax + nested_offset (Dettmers et al. 2023, section 3).

[Note: packed again, bit by bit] In every block the largest weight has the code of 1 or -1. So a block that is made full
in fp32 and packed by `models.packed` has the same scale and the same codes again: blocks of 64 inputs of nf4, rows of
int8. No code but this file knows that a base was packed.
"""

import dataclasses
import json
import math
from typing import Any

import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.models import packed
from penstock.models.weight_files import Weights
from penstock.models.weight_shapes import PACKED_BLOCK

STATE, SCALES, FORMAT = ".quant_state.bitsandbytes__", "SCB", "weight_format"


def unpacked(weights: Weights) -> Weights:
    """The same weights, full, in fp32. Raises UserError for those that lack a part."""
    states = {name.partition(STATE)[0]: name for name in sorted(weights.names) if STATE in name}
    rows = {name.removesuffix(SCALES) + "weight": name for name in weights.names if name.endswith(f".{SCALES}")}
    if not states and not rows:
        return weights
    parts = {name for name in weights.names if name.rsplit(".", 1)[-1] in (SCALES, FORMAT)}
    parts |= {name for weight in states for name in weights.names if name.startswith(f"{weight}.")}
    facts = {weight: _state(weights, weight, name) for weight, name in states.items()}

    def get(name: str) -> Tensor:
        if name in facts:
            return _from_4_bits(weights, name, facts[name])
        if name in rows:
            return weights.get(name).float() * (weights.get(rows[name]).float() / 127)[:, None]
        return weights.get(name)

    def first(name: str) -> Tensor:
        scales = f"{name}.absmax" if name in facts else rows.get(name)
        return weights.first(name) if scales is None else weights.get(scales).flatten()[:64]

    kinds = {state["quant_type"] for state in facts.values()} | ({"int8"} if rows else set())
    full = dataclasses.replace(
        weights,
        names=weights.names - parts,
        get=get,
        shape=lambda name: facts[name]["shape"] if name in facts else weights.shape(name),
        dtype=lambda name: "F32" if name in facts or name in rows else weights.dtype(name),
        first=first,
        row=None,
    )
    kept = "int8" if kinds == {"int8"} else "nf4"
    line = f"{len(facts) + len(rows)} weights are packed by bitsandbytes ({', '.join(sorted(kinds))})"
    odd = [name for name, state in facts.items() if not _kept(state)]
    if odd:
        error = _error_of_packing(get(odd[0]))
        line += f"; --base-dtype nf4 packs {len(odd)} of them again, {error:.1%} off (rms)"
    else:
        line += (
            f"; --lora 16 --base-dtype {kept} keeps them as they are, bit by bit; else they are read as full weights"
        )
    return dataclasses.replace(full, packed=line)


def _state(weights: Weights, weight: str, name: str) -> dict[str, Any]:
    """What bitsandbytes says of a weight. Raises UserError when a part is not there."""
    state = json.loads(bytes(weights.get(name).tolist()))
    nested = "nested_blocksize" in state
    needed = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    if missing := [f"{weight}.{part}" for part in needed if f"{weight}.{part}" not in weights.names]:
        raise UserError(f"{', '.join(missing)}: missing, which {weight} is unpacked with; is the download complete?")
    return state


def _kept(state: dict[str, Any]) -> bool:
    """Whether our nf4 has the same blocks."""
    same = state["quant_type"] == "nf4" and state["blocksize"] == PACKED_BLOCK
    return same and state["shape"][-1] % PACKED_BLOCK == 0


def _from_4_bits(weights: Weights, name: str, state: dict[str, Any]) -> Tensor:
    scales = weights.get(f"{name}.absmax")
    if "nested_blocksize" in state:
        levels = weights.get(f"{name}.nested_quant_map").float()[scales.long()]
        outer = weights.get(f"{name}.nested_absmax").float().repeat_interleave(state["nested_blocksize"])
        scales = levels * outer[: len(levels)] + state["nested_offset"]
    codes = weights.get(name).flatten().view(torch.uint8)
    pairs = torch.stack((codes >> 4, codes & 15), dim=-1).flatten()[: math.prod(state["shape"])]
    values = weights.get(f"{name}.quant_map").float()[pairs.long()]
    blocks = scales.float().repeat_interleave(state["blocksize"])
    return (values * blocks[: len(values)]).view(state["shape"])


def _error_of_packing(weight: Tensor) -> float:
    """What our nf4 makes of it: the root of the mean square, in shares of the weight's."""
    again = packed.dense(*packed.pack(weight, "nf4"), slice(None), torch.float32)
    return float((again - weight).norm() / weight.norm())
