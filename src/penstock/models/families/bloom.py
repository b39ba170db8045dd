"""BLOOM (Le Scao et al. 2022): ALiBi positions, a norm behind the embedding, q k v interleaved by head."""

from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families.settings import require
from penstock.models.families.weights import Weight, pair

CAUSAL_LM, CLASSIFIER = "BloomForCausalLM", "BloomForSequenceClassification"
PREFIX, HEAD = "transformer.", "lm_head.weight"
TOP = (
    Weight("embed.tokens", ("word_embeddings.weight",)),
    *pair("embed.norm", "word_embeddings_layernorm"),
    *pair("norm", "ln_f"),
)
BLOCK = (
    *pair("norm1", "h.{}.input_layernorm"),
    *pair("qkv", "h.{}.self_attention.query_key_value", layout="interleaved"),
    *pair("out", "h.{}.self_attention.dense"),
    *pair("norm2", "h.{}.post_attention_layernorm"),
    *pair("up", "h.{}.mlp.dense_h_to_4h"),
    *pair("down", "h.{}.mlp.dense_4h_to_h"),
)


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """BloomConfig -> DecoderConfig. ALiBi has no longest row; 2048 is what the published models were trained on."""
    require(hf, apply_residual_connection_post_layernorm=False)
    width, heads = hf.get("hidden_size", hf.get("n_embed", 64)), hf.get("n_head", hf.get("num_attention_heads", 8))
    return DecoderConfig(
        family="bloom",
        vocab_size=hf["vocab_size"],
        d_model=width,
        num_layers=hf.get("n_layer", hf.get("num_hidden_layers", 2)),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        d_ff=4 * width,
        max_length=hf.get("seq_length", 2048),
        position="alibi",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tied=hf.get("tie_word_embeddings", True),
        embed_norm=True,
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> BloomConfig."""
    return {
        "model_type": "bloom",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "seq_length": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied,
    }
