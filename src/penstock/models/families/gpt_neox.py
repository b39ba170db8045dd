"""GPT-NeoX and Pythia (Black et al. 2022): partly rotary heads, attention and MLP in parallel, untied head."""

from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families.settings import activation, activation_name, rope
from penstock.models.families.weights import Weight, pair

CAUSAL_LM, CLASSIFIER = "GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"
PREFIX, HEAD = "gpt_neox.", "embed_out.weight"
HEAD_MODULE = "lm_head"  # what transformers 5 calls the module whose weight it saves as embed_out
TOP = (Weight("embed.tokens", ("embed_in.weight",)), *pair("norm", "final_layer_norm"))
BLOCK = (
    *pair("norm1", "layers.{}.input_layernorm"),
    *pair("qkv", "layers.{}.attention.query_key_value", layout="interleaved"),
    *pair("out", "layers.{}.attention.dense"),
    *pair("norm2", "layers.{}.post_attention_layernorm"),
    *pair("up", "layers.{}.mlp.dense_h_to_4h"),
    *pair("down", "layers.{}.mlp.dense_4h_to_h"),
)


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """GPTNeoXConfig -> DecoderConfig."""
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    _, rotary = rope(hf, ("default",))
    part = rotary.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))
    biased = hf.get("attention_bias", True)
    return DecoderConfig(
        family="gpt_neox",
        vocab_size=hf["vocab_size"],
        d_model=width,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        d_ff=hf["intermediate_size"],
        max_length=hf.get("max_position_embeddings", 2048),
        position="rotary",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        activation=activation(hf, "hidden_act", "gelu"),
        parallel_residual=hf.get("use_parallel_residual", True),
        qkv_bias=biased,
        out_bias=biased,
        tied=hf.get("tie_word_embeddings", False),
        rotary_dim=int(width // heads * part),
        rope_theta=float(rotary.get("rope_theta", hf.get("rotary_emb_base", 10_000))),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> GPTNeoXConfig."""
    part = config.rotary_dim / config.head_dim
    return {
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config.activation),
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied,
        "rotary_pct": part,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": part,
        },
    }
