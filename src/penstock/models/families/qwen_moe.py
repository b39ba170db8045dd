"""Qwen3-MoE (Yang et al. 2025): Qwen3 with experts in the place of the MLP, in all blocks or in some of them."""

import dataclasses
from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import llama
from penstock.models.families.settings import by_name, experts, require, whole, windows_of, write_experts
from penstock.models.families.weights import Weight, pair

TOP, PREFIX, HEAD = llama.TOP, llama.PREFIX, llama.HEAD
CAUSAL_LM, CLASSIFIER = "Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification"
BLOCK = (*llama.BLOCK, Weight("router.weight", ("layers.{}.mlp.gate.weight",)))
EXPERT = (
    *pair("up", "layers.{}.mlp.experts.{}.gate_proj", "layers.{}.mlp.experts.{}.up_proj", layout="stacked"),
    *pair("down", "layers.{}.mlp.experts.{}.down_proj"),
)
EXPERT_MODULE = "layers.{}.mlp.experts"
DEFAULTS = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 151_936, "max_position_embeddings": 32_768, "sliding_window": 4096,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001, "decoder_sparse_step": 1,
}  # fmt: skip
"""What Qwen3MoeConfig takes where the file says nothing."""


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Qwen3MoeConfig -> DecoderConfig."""
    hf = DEFAULTS | by_name(hf, {"num_local_experts": "num_experts"})
    config = llama.config_from_hf({**hf, "mlp_bias": False})
    step, plain = whole(hf, "decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    dense = tuple(i for i in range(config.num_layers) if i in plain or (i + 1) % step)
    window = hf["sliding_window"] if hf.get("use_sliding_window") else 0
    kinds = ["sliding_attention" if window else "full_attention"] * config.num_layers
    require(hf, layer_types=hf.get("layer_types") and kinds)
    windows = windows_of(hf, window, kinds, config.num_layers) if window else ()
    return dataclasses.replace(
        config, **experts(hf, "num_experts", "moe_intermediate_size"), qk_norm=True, dense_layers=dense,
        norm_topk=bool(hf["norm_topk_prob"]), windows=windows,
    )  # fmt: skip


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> Qwen3MoeConfig."""
    window = max(config.windows, default=0)
    return {
        **llama.hf_config(config),
        **write_experts(config, "moe_intermediate_size"),
        "norm_topk_prob": config.norm_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
        "use_sliding_window": bool(window),
        "sliding_window": window or None,
    }
