"""Mistral (Jiang et al. 2023): Llama with a sliding window."""

import dataclasses
from typing import Any

from penstock.models.decoder import DecoderConfig
from penstock.models.families import llama
from penstock.models.families.llama import BLOCK as BLOCK
from penstock.models.families.llama import HEAD as HEAD
from penstock.models.families.llama import PREFIX as PREFIX
from penstock.models.families.llama import TOP as TOP

CAUSAL_LM, CLASSIFIER = "MistralForCausalLM", "MistralForSequenceClassification"


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """MistralConfig -> DecoderConfig."""
    config = llama.config_from_hf({**hf, "attention_bias": False, "mlp_bias": False})
    return dataclasses.replace(config, windows=(hf.get("sliding_window") or 0,) * config.num_layers)


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> MistralConfig."""
    window = config.windows[0] if config.windows else 0
    return {**llama.hf_config(config), "sliding_window": window or None}
