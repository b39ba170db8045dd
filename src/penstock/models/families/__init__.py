"""The families of decoders: one small file each, and this table. A new family is one file and one line here."""

from types import ModuleType
from typing import Any

from penstock.errors import UserError
from penstock.models.families import bloom, gpt2, gpt_neox, llama, mistral, opt, qwen

FAMILIES: dict[str, ModuleType] = {
    "gpt2": gpt2,
    "opt": opt,
    "bloom": bloom,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen,
    "qwen3": qwen,
}


def family_of(model_type: Any, where: str) -> ModuleType:
    """The family's module. Raises UserError that lists the known ones."""
    if model_type not in FAMILIES:
        raise UserError(f"{where}: model_type {model_type!r} is no known family; known are {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]
