"""Granite 3 and 4 dense (Granite Team 2024): Llama with multipliers of embeddings, residuals, scores and logits."""

import dataclasses
from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import llama
from penstock.models.families.settings import number

CAUSAL_LM = "GraniteForCausalLM"
CLASSIFIER = "GraniteForSequenceClassification"  # vLLM's; transformers has none for Granite
TOP, BLOCK, PREFIX, HEAD = llama.TOP, llama.BLOCK, llama.PREFIX, llama.HEAD
MULTIPLIERS = {
    "embed_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
    "attention_scale": "attention_multiplier", "logit_divisor": "logits_scaling",
}  # fmt: skip
"""Ours: theirs. All are 1 where the file says nothing."""


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """GraniteConfig -> DecoderConfig."""
    multipliers = {ours: number({key: 1.0} | hf, key) for ours, key in MULTIPLIERS.items()}
    return dataclasses.replace(llama.config_from_hf(hf), **multipliers)  # type: ignore[arg-type]


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> GraniteConfig."""
    return llama.hf_config(config) | {key: getattr(config, ours) for ours, key in MULTIPLIERS.items()}
