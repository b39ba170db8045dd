"""Mistral (Jiang et al. 2023): Llama with a sliding window. Ministral has it by layer; Ministral 3 scales queries."""

import dataclasses
from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import llama
from penstock.models.families.settings import require, windows_of

TOP, BLOCK, PREFIX, HEAD = llama.TOP, llama.BLOCK, llama.PREFIX, llama.HEAD
NAMES = {"mistral": "Mistral", "ministral": "Ministral", "ministral3": "Ministral3"}
CAUSAL_LM = {family: f"{name}ForCausalLM" for family, name in NAMES.items()}
CLASSIFIER = {family: f"{name}ForSequenceClassification" for family, name in NAMES.items()}

MISTRAL = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072}
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": MISTRAL,
    "ministral": MISTRAL,
    "ministral3": {
        "num_key_value_heads": 8, "sliding_window": None, "max_position_embeddings": 262_144, "head_dim": 128,
        "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
"""What each config class takes where the file says nothing, unlike LlamaConfig."""
MINISTRAL3_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
"""What Ministral3Config takes where the file has no rope_parameters."""


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """MistralConfig, MinistralConfig or Ministral3Config -> DecoderConfig."""
    family = hf.get("model_type", "mistral")
    hf = DEFAULTS.get(family, MISTRAL) | hf | {"attention_bias": False, "mlp_bias": False}
    beta = None
    if family == "ministral3":
        settings = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or MINISTRAL3_ROPE)
        beta = settings.pop("llama_4_scaling_beta", None)
        settings.pop("max_position_embeddings", None)  # a note: transformers does not read it
        hf["rope_scaling"] = settings
    config = llama.config_from_hf(hf)
    if beta is not None:
        config = dataclasses.replace(config, rope_scaling=_with_beta(config, beta))
    kinds = ["full_attention" if hf["sliding_window"] is None else "sliding_attention"] * config.num_layers
    if family != "ministral":
        require(hf, layer_types=hf.get("layer_types") and kinds)
    windows = windows_of(hf, hf["sliding_window"], kinds, config.num_layers)
    return dataclasses.replace(config, windows=windows if family in ("mistral", "mixtral") or any(windows) else ())


def _with_beta(config: DecoderConfig, beta: Any) -> tuple[tuple[str, Any], ...]:
    scaling = dict(config.rope_scaling)
    if not isinstance(beta, int | float) or "original_max_position_embeddings" not in scaling:
        raise ValueError(f"llama_4_scaling_beta: {beta!r} is not supported but as a number beside yarn")
    return tuple(sorted((scaling | {"llama_4_scaling_beta": beta}).items()))


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> MistralConfig, MinistralConfig or Ministral3Config."""
    theirs = {**llama.hf_config(config), "sliding_window": max(config.windows, default=0) or None}
    if config.family == "ministral":
        windows = config.windows or (0,) * config.num_layers
        theirs["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    return theirs
