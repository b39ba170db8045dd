"""Llama (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, grouped queries, no biases."""

from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families.settings import activation, activation_name, rope
from penstock.models.families.weights import Weight, pair

CAUSAL_LM, CLASSIFIER, PREFIX, HEAD = "LlamaForCausalLM", "LlamaForSequenceClassification", "model.", "lm_head.weight"
TOP = (Weight("embed.tokens", ("embed_tokens.weight",)), *pair("norm", "norm"))
ATTENTION = "layers.{}.self_attn."
BLOCK = (
    *pair("norm1", "layers.{}.input_layernorm"),
    *pair("qkv", ATTENTION + "q_proj", ATTENTION + "k_proj", ATTENTION + "v_proj", layout="stacked"),
    *pair("q_norm", ATTENTION + "q_norm"),
    *pair("k_norm", ATTENTION + "k_norm"),
    *pair("out", ATTENTION + "o_proj"),
    *pair("norm2", "layers.{}.post_attention_layernorm"),
    *pair("up", "layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj", layout="stacked"),
    *pair("down", "layers.{}.mlp.down_proj"),
)


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """LlamaConfig and its descendants (Mistral, Qwen) -> DecoderConfig."""
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    kind, scaling = rope(hf, ("default", "linear", "llama3"))
    theta = scaling.pop("rope_theta", hf.get("rope_theta", 10_000.0))
    biased = bool(hf.get("attention_bias", False))
    return DecoderConfig(
        family=hf["model_type"],
        vocab_size=hf["vocab_size"],
        d_model=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        d_ff=hf["intermediate_size"],
        max_length=hf.get("max_position_embeddings", 2048),
        position="rotary",
        norm="rms",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=activation(hf, "hidden_act", "silu"),
        gated=True,
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        tied=hf.get("tie_word_embeddings", False),
        rotary_dim=head_dim,
        rope_theta=float(theta),
        rope_scaling=() if kind == "default" else tuple(sorted({**scaling, "rope_type": kind}.items())),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> LlamaConfig."""
    return {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config.activation),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {"rope_type": "default", **dict(config.rope_scaling), "rope_theta": config.rope_theta},
    }
