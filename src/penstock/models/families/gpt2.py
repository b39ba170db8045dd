"""GPT-2 (Radford et al. 2019): learned positions, pre-norm, GELU, everything biased, head tied."""

from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families.settings import Fields, by_name, read, require, write
from penstock.models.families.weights import Weight, pair

CAUSAL_LM, CLASSIFIER = "GPT2LMHeadModel", "GPT2ForSequenceClassification"
PREFIX, HEAD = "transformer.", "lm_head.weight"
TOP = (Weight("embed.tokens", ("wte.weight",)), Weight("embed.positions", ("wpe.weight",)), *pair("norm", "ln_f"))
BLOCK = (
    *pair("norm1", "h.{}.ln_1"),
    *pair("qkv", "h.{}.attn.c_attn", layout="transposed"),
    *pair("out", "h.{}.attn.c_proj", layout="transposed"),
    *pair("norm2", "h.{}.ln_2"),
    *pair("up", "h.{}.mlp.c_fc", layout="transposed"),
    *pair("down", "h.{}.mlp.c_proj", layout="transposed"),
)
FIELDS: Fields = {
    "family": ("model_type", "gpt2"),
    "vocab_size": ("vocab_size", 50257),
    "d_model": ("n_embd", 768),
    "num_layers": ("n_layer", 12),
    "num_heads": ("n_head", 12),
    "max_length": ("n_positions", 1024),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "activation": ("activation_function", "gelu_new"),
    "tied": ("tie_word_embeddings", True),
}

ALIASES = {
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}  # fmt: skip


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """GPT2Config -> DecoderConfig."""
    require(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    fields = read(by_name(hf, ALIASES), FIELDS)
    return DecoderConfig(**fields, d_ff=hf.get("n_inner") or 4 * fields["d_model"])


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> GPT2Config."""
    return {**write(config, FIELDS), "n_inner": config.d_ff, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
