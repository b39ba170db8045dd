"""Mixtral (Jiang et al. 2024): Mistral with eight experts in each block, of which a token takes two."""

import dataclasses
from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import llama, mistral
from penstock.models.families.settings import by_name, experts, require, write_experts
from penstock.models.families.weights import Weight, pair

TOP, PREFIX, HEAD = llama.TOP, llama.PREFIX, llama.HEAD
CAUSAL_LM, CLASSIFIER = "MixtralForCausalLM", "MixtralForSequenceClassification"
BLOCK = (*llama.BLOCK, Weight("router.weight", ("layers.{}.block_sparse_moe.gate.weight",)))
FILE = "layers.{}.block_sparse_moe.experts.{}."
EXPERT = (*pair("up", FILE + "w1", FILE + "w3", layout="stacked"), *pair("down", FILE + "w2"))
EXPERT_MODULE = "layers.{}.mlp.experts"  # what transformers 5 calls them; the files keep the first names
DEFAULTS = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "sliding_window": None,
    "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001,
}  # fmt: skip
"""What MixtralConfig takes where the file says nothing, unlike MistralConfig."""


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """MixtralConfig -> DecoderConfig."""
    require(hf, router_jitter_noise=0.0)
    hf = DEFAULTS | by_name(hf, {"num_experts": "num_local_experts"})
    config = mistral.config_from_hf(hf)
    return dataclasses.replace(config, **experts(hf, "num_local_experts", "intermediate_size"))


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> MixtralConfig."""
    theirs = {**mistral.hf_config(config), **write_experts(config, "intermediate_size")}
    return {**theirs, "num_local_experts": theirs.pop("num_experts")}
