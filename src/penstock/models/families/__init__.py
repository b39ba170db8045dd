"""The families of decoders: one small file each, and this table. A new family is one file and one line here."""

import dataclasses
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from penstock.errors import UserError
from penstock.models.config import DecoderConfig
from penstock.models.families import (
    bloom,
    gemma,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo,
    opt,
    phi3,
    qwen,
    qwen_moe,
    smollm3,
)
from penstock.models.families.weights import Weight

FAMILIES: dict[str, ModuleType] = {
    "gpt2": gpt2,
    "opt": opt,
    "bloom": bloom,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": mistral,
    "ministral": mistral,
    "ministral3": mistral,
    "phi3": phi3,
    "olmo2": olmo,
    "olmo3": olmo,
    "qwen2": qwen,
    "qwen3": qwen,
    "gemma2": gemma,
    "gemma3_text": gemma,
    "granite": granite,
    "smollm3": smollm3,
    "qwen3_moe": qwen_moe,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
}


def family_of(model_type: Any, where: str) -> ModuleType:
    """The family's module. Raises UserError that lists the known ones."""
    if model_type not in FAMILIES:
        raise UserError(f"{where}: model_type {model_type!r} is no known family; known are {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]


def weights_of(family: Any, config: DecoderConfig) -> Iterator[Weight]:
    """Every line of the family's tables under its full name, with the layer number filled in."""
    if config.foreign:
        yield from family.weights
        return
    for weight in family.TOP:
        yield dataclasses.replace(weight, theirs=tuple(family.PREFIX + name for name in weight.theirs))
    for layer in range(config.num_layers):
        for weight in family.BLOCK:
            theirs = tuple(family.PREFIX + name.format(layer) for name in weight.theirs)
            yield dataclasses.replace(weight, ours=f"blocks.{layer}.{weight.ours}", theirs=theirs)
        for weight in getattr(family, "EXPERT", ()):
            for expert in range(config.num_experts):
                theirs = tuple(family.PREFIX + name.format(layer, expert) for name in weight.theirs)
                ours, part = f"blocks.{layer}.experts.{expert}.{weight.ours}", None
                if weight.layout in ("expert", "alternating"):
                    part = expert
                yield dataclasses.replace(weight, ours=ours, theirs=theirs, expert=part)
    yield Weight("head", (family.HEAD,))
