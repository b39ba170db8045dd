"""Mistral (Jiang et al. 2023): Llama with a sliding window."""

import dataclasses
from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import llama
from penstock.models.families.settings import require, windows_of

TOP, BLOCK, PREFIX, HEAD = llama.TOP, llama.BLOCK, llama.PREFIX, llama.HEAD
CAUSAL_LM, CLASSIFIER = "MistralForCausalLM", "MistralForSequenceClassification"

DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072}
"""What MistralConfig takes where the file says nothing, unlike LlamaConfig."""


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """MistralConfig -> DecoderConfig."""
    hf = DEFAULTS | hf
    config = llama.config_from_hf({**hf, "attention_bias": False, "mlp_bias": False})
    kinds = ["full_attention" if hf["sliding_window"] is None else "sliding_attention"] * config.num_layers
    require(hf, layer_types=hf.get("layer_types") and kinds)
    return dataclasses.replace(config, windows=windows_of(hf, hf["sliding_window"], kinds, config.num_layers))


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> MistralConfig."""
    return {**llama.hf_config(config), "sliding_window": max(config.windows, default=0) or None}
