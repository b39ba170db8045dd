"""OPT (Zhang et al. 2022): learned positions offset by 2, ReLU; the 350m is post-norm with a narrower embedding."""

from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families.settings import activation, activation_name, require
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


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """OPTConfig -> DecoderConfig."""
    require(hf, layer_norm_elementwise_affine=True)
    width, heads, biased = hf["hidden_size"], hf["num_attention_heads"], hf.get("enable_bias", True)
    pre_norm = hf.get("do_layer_norm_before", True)
    embed = hf.get("word_embed_proj_dim") or width
    return DecoderConfig(
        family="opt",
        vocab_size=hf["vocab_size"],
        d_model=width,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        d_ff=hf["ffn_dim"],
        max_length=hf.get("max_position_embeddings", 2048),
        activation=activation(hf, "activation_function", "relu"),
        pre_norm=pre_norm,
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=biased,
        tied=hf.get("tie_word_embeddings", True),
        embed_dim=embed if embed != width else 0,
        position_offset=2,
        final_norm=pre_norm and not hf.get("_remove_final_layer_norm", False),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> OPTConfig."""
    return {
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "ffn_dim": config.d_ff,
        "max_position_embeddings": config.max_length,
        "activation_function": activation_name(config.activation),
        "do_layer_norm_before": config.pre_norm,
        "_remove_final_layer_norm": config.pre_norm and not config.final_norm,
        "word_embed_proj_dim": config.embed_dim or config.d_model,
        "enable_bias": config.qkv_bias,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied,
    }
