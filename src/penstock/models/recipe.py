"""First values of a decoder's weights: from a checkpoint, or drawn from a seed.

A decoder on `meta` is a recipe. The memory engine gives its weights homes, asks here which recipe a weight comes from,
and has them filled. Knows no placement: it writes into the tensors that it is given.

[Note: equal recipes, equal bytes] Frozen weights of equal recipes and names are stored once, for all models that use
them: actor, reference, critic and reward model with adapters, or full models that freeze the same first blocks.
"""

import math
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from zlib import crc32

import torch
from torch import Tensor

from penstock.models import packed
from penstock.models.decoder import Decoder
from penstock.models.linear import Linear
from penstock.models.lora import Adapted, is_adapter


def recipe_of(decoder: Decoder, name: str) -> Hashable:
    """Where a weight on `meta` comes from; see [Note: equal recipes, equal bytes]. None: the weight exists already."""
    if not decoder.get_parameter(name).is_meta:
        return None
    if decoder.adapted is not None and is_adapter(name):
        return decoder.adapted.source
    return ("drawn", decoder.seed) if decoder.source is None else ("read", decoder.source)


def filling(decoder: Decoder) -> AbstractContextManager[None]:
    """Around several calls of `fill`: files are opened once for all."""
    return nullcontext() if decoder.source is None else decoder.source.opened()


def fill(decoder: Decoder, weights: dict[str, Tensor]) -> None:
    """Writes the first values of these weights, by name, in place."""
    adapters = {name: weight for name, weight in weights.items() if is_adapter(name)}
    if adapters:
        assert decoder.adapted is not None
        _fill_adapters(decoder, decoder.adapted, adapters)
        weights = {name: weight for name, weight in weights.items() if name not in adapters}
    _fill_base(decoder, weights if decoder.base_dtype is None else _fill_packed(decoder, weights))


def _fill_base(decoder: Decoder, weights: dict[str, Tensor]) -> None:
    if decoder.source is not None:
        decoder.source.fill(weights)
        return
    for name, weight in weights.items():
        decoder.draw(name, weight, _generator(decoder.seed, name, weight))


def _fill_packed(decoder: Decoder, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Writes packed weights and their scales, both of the same full weight. Returns the weights that are not packed."""
    assert decoder.base_dtype is not None
    unpacked: dict[str, Tensor] = {}
    latest = ""
    pair: dict[str, Tensor] = {}  # of one weight at a time
    for name, weight in weights.items():
        module, _, attribute = name.rpartition(".")
        holder = decoder.get_submodule(module)
        if not isinstance(holder, Linear) or holder.scales is None or attribute == "bias":
            unpacked[name] = weight
            continue
        if module != latest:
            pair.clear()
            # fp32 where it was packed already: see [Note: packed again, bit by bit]
            dtype = torch.float32 if decoder.source is not None and decoder.source.packed else decoder.dtype
            full = torch.empty(holder.out_features, holder.in_features, dtype=dtype)
            _fill_base(decoder, {f"{module}.weight": full})
            latest, pair = module, dict(zip(("weight", "scales"), packed.pack(full, decoder.base_dtype), strict=True))
        weight.copy_(pair[attribute])
    return unpacked


@torch.no_grad()
def _fill_adapters(decoder: Decoder, adapted: Adapted, weights: dict[str, Tensor]) -> None:
    """Reads saved adapters. Fresh ones: A starts uniform like a linear layer's weight, B at 0."""
    if adapted.saved is not None:
        adapted.saved.fill(decoder, weights)
        return
    for name, weight in weights.items():
        if name.endswith(".b"):
            weight.zero_()
        else:
            bound = 1 / math.sqrt(weight.shape[1])
            weight.uniform_(-bound, bound, generator=_generator(adapted.seed, name, weight))


def _generator(seed: int, name: str, weight: Tensor) -> torch.Generator:
    """Keyed by seed and name, so that a weight is the same in any order and on any rank."""
    return torch.Generator(weight.device).manual_seed(seed ^ crc32(name.encode()))
