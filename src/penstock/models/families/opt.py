"""OPT (Zhang et al. 2022): learned positions offset by 2, ReLU; the 350m is post-norm with a narrower embedding."""

from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families.settings import Fields, read, require, write
from penstock.models.families.weights import Weight, pair

CAUSAL_LM, CLASSIFIER = "OPTForCausalLM", "OPTForSequenceClassification"
PREFIX, HEAD = "model.decoder.", "lm_head.weight"
TOP = (
    Weight("embed.tokens", ("embed_tokens.weight",)),
    Weight("embed.positions", ("embed_positions.weight",)),
    Weight("embed.project.weight", ("project_in.weight",)),
    Weight("unproject.weight", ("project_out.weight",)),
    *pair("norm", "final_layer_norm"),
)
ATTENTION = "layers.{}.self_attn."
BLOCK = (
    *pair("norm1", "layers.{}.self_attn_layer_norm"),
    *pair("qkv", ATTENTION + "q_proj", ATTENTION + "k_proj", ATTENTION + "v_proj", layout="stacked"),
    *pair("out", ATTENTION + "out_proj"),
    *pair("norm2", "layers.{}.final_layer_norm"),
    *pair("up", "layers.{}.fc1"),
    *pair("down", "layers.{}.fc2"),
)
FIELDS: Fields = {
    "family": ("model_type", "opt"),
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_ff": "ffn_dim",
    "max_length": ("max_position_embeddings", 2048),
    "activation": ("activation_function", "relu"),
    "pre_norm": ("do_layer_norm_before", True),
    "qkv_bias": ("enable_bias", True),
    "tied": ("tie_word_embeddings", True),
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """OPTConfig -> DecoderConfig."""
    require(hf, layer_norm_elementwise_affine=True)
    fields = read(hf, FIELDS)
    fields |= {"out_bias": fields["qkv_bias"], "mlp_bias": fields["qkv_bias"], "position_offset": 2}
    embed = hf.get("word_embed_proj_dim") or fields["d_model"]
    final_norm = fields["pre_norm"] and not hf.get("_remove_final_layer_norm", False)
    return DecoderConfig(**fields, embed_dim=embed if embed != fields["d_model"] else 0, final_norm=final_norm)


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> OPTConfig."""
    return {
        **write(config, FIELDS),
        "_remove_final_layer_norm": config.pre_norm and not config.final_norm,
        "word_embed_proj_dim": config.embed_dim or config.d_model,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
