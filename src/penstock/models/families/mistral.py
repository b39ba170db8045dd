"""Mistral (Jiang et al. 2023): Llama with a sliding window."""

import dataclasses
from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import llama

TOP, BLOCK, PREFIX, HEAD = llama.TOP, llama.BLOCK, llama.PREFIX, llama.HEAD
CAUSAL_LM, CLASSIFIER = "MistralForCausalLM", "MistralForSequenceClassification"


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """MistralConfig -> DecoderConfig."""
    hf = {"num_key_value_heads": 8, "sliding_window": 4096, **hf}  # what MistralConfig takes when they are not named
    config = llama.config_from_hf({**hf, "attention_bias": False, "mlp_bias": False})
    return dataclasses.replace(config, windows=(hf["sliding_window"] or 0,) * config.num_layers)


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> MistralConfig."""
    window = config.windows[0] if config.windows else 0
    return {**llama.hf_config(config), "sliding_window": window or None}
