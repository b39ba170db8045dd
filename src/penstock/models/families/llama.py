"""Llama (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, grouped queries, no biases."""

from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families.rope import rope, rope_parameters, rotary
from penstock.models.families.settings import Fields, read, write
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
FIELDS: Fields = {
    "num_heads": "num_attention_heads",
    "family": "model_type",
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "d_ff": "intermediate_size",
    "max_length": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "activation": ("hidden_act", "silu"),
    "qkv_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "tied": ("tie_word_embeddings", False),
}


def config_from_hf(hf: dict[str, Any], table: Fields = FIELDS) -> DecoderConfig:
    """LlamaConfig and its descendants (Mistral, Qwen), whose fields are in `table` -> DecoderConfig."""
    theta, share, scaling = rope(hf)
    if share not in (None, 1):
        raise ValueError(f"partial_rotary_factor: {share!r} is not supported; only 1 is")
    fields = read(hf, table)
    fields |= {"qkv_bias": bool(fields["qkv_bias"]), "mlp_bias": bool(fields["mlp_bias"])}  # null in some files
    fields |= rotary(fields, fields["head_dim"], theta, scaling)
    return DecoderConfig(**fields, norm="rms", gated=True, out_bias=fields["qkv_bias"])


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> LlamaConfig."""
    return {**write(config, FIELDS), "rope_parameters": rope_parameters(config)}
