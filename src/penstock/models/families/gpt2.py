"""GPT-2 (Radford et al. 2019): learned positions, pre-norm, GELU, everything biased, head tied."""

from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families.settings import activation, activation_name, require
from penstock.models.families.weights import Weight, pair

CAUSAL_LM, CLASSIFIER = "GPT2LMHeadModel", "GPT2ForSequenceClassification"
PREFIX, HEAD = "transformer.", "lm_head.weight"
TOP = (
    Weight("embed.tokens", ("wte.weight",)),
    Weight("embed.positions", ("wpe.weight",)),
    *pair("norm", "ln_f"),
)
BLOCK = (
    *pair("norm1", "h.{}.ln_1"),
    *pair("qkv", "h.{}.attn.c_attn", layout="transposed"),
    *pair("out", "h.{}.attn.c_proj", layout="transposed"),
    *pair("norm2", "h.{}.ln_2"),
    *pair("up", "h.{}.mlp.c_fc", layout="transposed"),
    *pair("down", "h.{}.mlp.c_proj", layout="transposed"),
)


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """GPT2Config -> DecoderConfig."""
    require(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    width, heads = hf.get("n_embd", 768), hf.get("n_head", 12)
    return DecoderConfig(
        family="gpt2",
        vocab_size=hf.get("vocab_size", 50257),
        d_model=width,
        num_layers=hf.get("n_layer", 12),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        d_ff=hf.get("n_inner") or 4 * width,
        max_length=hf.get("n_positions", 1024),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        activation=activation(hf, "activation_function", "gelu_new"),
        tied=hf.get("tie_word_embeddings", True),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> GPT2Config."""
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": activation_name(config.activation),
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": config.tied,
    }
