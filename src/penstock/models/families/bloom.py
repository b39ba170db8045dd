"""BLOOM (Le Scao et al. 2022): ALiBi positions, a norm behind the embedding, q k v interleaved by head."""

from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families.settings import Fields, by_name, read, require, write
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
FIELDS: Fields = {
    "family": ("model_type", "bloom"),
    "vocab_size": "vocab_size",
    "d_model": ("hidden_size", 64),
    "num_layers": ("n_layer", 2),
    "num_heads": ("n_head", 8),
    "max_length": ("seq_length", 2048),  # ALiBi has no longest row; this is what the published models were trained on
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tied": ("tie_word_embeddings", True),
}
ALIASES = {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """BloomConfig -> DecoderConfig."""
    require(hf, apply_residual_connection_post_layernorm=False)
    if hf.get("pretraining_tp", 1) != 1:
        require(hf, slow_but_exact=False)  # transformers then leaves biases out
    fields = read(by_name(hf, ALIASES), FIELDS)
    return DecoderConfig(**fields, d_ff=4 * fields["d_model"], position="alibi", embed_norm=True)


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> BloomConfig."""
    return {**write(config, FIELDS), "hidden_dropout": 0.0, "attention_dropout": 0.0}
