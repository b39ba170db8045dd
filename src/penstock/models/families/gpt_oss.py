"""gpt-oss (OpenAI 2025): experts with biases and a clamped gate, every other block in a window, attention sinks."""

import dataclasses
from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import llama
from penstock.models.families.settings import by_name, experts, number, require, windows_of, write_experts
from penstock.models.families.weights import Weight, pair

TOP, PREFIX, HEAD = llama.TOP, llama.PREFIX, llama.HEAD
CAUSAL_LM, CLASSIFIER = "GptOssForCausalLM", "GptOssForSequenceClassification"
BLOCK = (
    *llama.BLOCK,
    Weight("sinks", ("layers.{}.self_attn.sinks",)),
    *pair("router", "layers.{}.mlp.router"),
)
EXPERT_MODULE = "layers.{}.mlp.experts"
EXPERT = (
    Weight("up.weight", (EXPERT_MODULE + ".gate_up_proj",), "alternating"),
    Weight("up.bias", (EXPERT_MODULE + ".gate_up_proj_bias",), "alternating"),
    Weight("down.weight", (EXPERT_MODULE + ".down_proj",), "expert"),
    Weight("down.bias", (EXPERT_MODULE + ".down_proj_bias",), "expert"),
)
DEFAULTS = {
    "num_hidden_layers": 36, "num_local_experts": 128, "vocab_size": 201_088, "hidden_size": 2880,
    "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
    "sliding_window": 128, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "router_aux_loss_coef": 0.001, "attention_bias": True,
    "rope_theta": 150_000.0,
}  # fmt: skip
ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""What GptOssConfig takes where the file says nothing."""


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """GptOssConfig -> DecoderConfig."""
    hf = DEFAULTS | by_name(hf, {"num_experts": "num_local_experts"})
    if not (hf.get("rope_scaling") or hf.get("rope_parameters")):
        hf["rope_parameters"] = ROPE
    config = llama.config_from_hf({**hf, "mlp_bias": True})
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(config.num_layers)]
    require(hf, hidden_act="silu")
    return dataclasses.replace(
        config, **experts(hf, "num_local_experts", "intermediate_size"), router_bias=True, sinks=True,
        clamp=(number(hf, "swiglu_alpha"), number(hf, "swiglu_limit")),
        windows=windows_of(hf, hf["sliding_window"], kinds, config.num_layers),
    )  # fmt: skip


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> GptOssConfig."""
    theirs = {**llama.hf_config(config), **write_experts(config, "intermediate_size")}
    alpha, limit = config.clamp or (0.0, 0.0)
    return {
        **theirs,
        "num_local_experts": theirs.pop("num_experts"),
        "swiglu_alpha": alpha,
        "swiglu_limit": limit,
        "sliding_window": max(config.windows) or None,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in config.windows],
    }
