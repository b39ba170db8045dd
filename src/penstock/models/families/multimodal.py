"""Checkpoints of models that also see or hear: the text model in them, by its own config and names. Pure.

The parts that see and hear are left out; what is trained and saved is the text model.
"""

import dataclasses
import re
import warnings
from typing import Any

from penstock.errors import UserError

KINDS = (
    "gemma3", "mistral3", "llava", "llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm", "qwen2_vl",
    "qwen2_5_vl", "qwen3_vl", "qwen2_audio", "voxtral", "granite_speech",
)  # fmt: skip
"""Those whose text model is a causal language model of its own; not PaliGemma's, whose prompts see both ways."""
TEXT_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
FLAT = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2"}
"""Those whose older files have the text model's keys at the top."""
DEFAULTS = {
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""What LLaVA's files leave to the text model's config class."""
TEXT_NAME = re.compile(
    r"language_model\.(?P<a>lm_head\..*|model\..*)|model\.(language|text)_model\.(?P<b>.*)|"
    r"(?P<c>lm_head\..*|model\.(embed_tokens|layers|norm)\..*)"
)


INSIDE = {"idefics3": "model.text_model.", "smolvlm": "model.text_model."}
"""Where transformers has the text model in a whole one; in the others it is model.language_model."""


def kind_of(hf: dict[str, Any]) -> str:
    """The model_type of a model with other parts than text; else empty."""
    kind = hf.get("model_type")
    return str(kind) if kind in KINDS else ""


def whole_name(kind: str, name: str) -> str:
    """What the whole model calls a module or weight of its text model, of which `name` is the name alone."""
    if not kind or not name.startswith("model."):  # the head stands outside
        return name
    return INSIDE.get(kind, "model.language_model.") + name.removeprefix("model.")


def text_config(hf: dict[str, Any]) -> dict[str, Any]:
    """The config.json that the text model would have alone; of a model without other parts, `hf` itself."""
    kind = hf.get("model_type")
    if kind not in KINDS:
        return hf
    text = hf.get("text_config")
    if not isinstance(text, dict):
        if kind not in FLAT:
            raise UserError(f"config.json: model_type {kind} needs text_config and does not have it.")
        text = {key: value for key, value in hf.items() if not key.startswith("vision_")} | {"model_type": FLAT[kind]}
    name = TEXT_TYPES.get(text.get("model_type", ""), text.get("model_type", ""))
    shared = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id")
    text = DEFAULTS.get(name, {}) | text | {key: hf[key] for key in shared if key in hf} | {"model_type": name}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(text.get(key), dict) and "mrope_section" in text[key]:
            text[key] = _one_dimensional(text[key])
    return text


def _one_dimensional(rope: dict[str, Any]) -> dict[str, Any] | None:
    """Rotary settings without the sections that images need: a text's three positions are equal (Wang et al. 2024)."""
    plain = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    for key in ("type", "rope_type"):
        if plain.get(key) == "mrope":
            plain[key] = "default"
    return plain


def text_name(name: str) -> str | None:
    """What the text model alone would call this weight; None: it belongs to another part."""
    match = TEXT_NAME.fullmatch(name)
    if match is None:
        return None
    return match["a"] or match["c"] or f"model.{match['b']}"


def text_weights(weights: Any, hf: dict[str, Any]) -> Any:
    """Of these (weight_files.Weights) the text model's, by its own names; all of a model without other parts."""
    if hf.get("model_type") not in KINDS:
        return weights
    stored = {text: name for name in sorted(weights.names) if (text := text_name(name)) is not None}
    return dataclasses.replace(
        weights,
        names=set(stored),
        get=lambda name: weights.get(stored[name]),
        shape=lambda name: weights.shape(stored[name]),
        dtype=lambda name: weights.dtype(stored[name]),
        first=lambda name: weights.first(stored[name]),
        left_out=len(weights.names) - len(stored),
    )


def count_left_out(directory: Any, weights: Any, family: str) -> None:
    """One line for those that are not the text model's, if there are any."""
    if weights.left_out:
        warnings.warn(
            f"{directory}: {weights.left_out} weights of the parts that see or hear are left out; the text model "
            f"({family}) is used, and saved as one.",
            stacklevel=3,
        )
