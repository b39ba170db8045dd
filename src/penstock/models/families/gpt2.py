"""GPT-2 (Radford et al. 2019): learned positions, pre-norm, GELU, everything biased, head tied."""

from typing import Any

from penstock.models.decoder import DecoderConfig
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


SIZES = {
    # name: layers, width, heads, positions. s to xl: Radford et al. 2019; the others as in Colossal-AI's coati
    # benchmarks, so that figures compare.
    "s": (12, 768, 12, 1024),
    "m": (24, 1024, 16, 1024),
    "l": (36, 1280, 20, 1024),
    "xl": (48, 1600, 25, 1024),
    "2b": (40, 2048, 16, 1024),
    "4b": (64, 2304, 16, 1024),
    "6b": (30, 4096, 16, 1024),
    "8b": (40, 4096, 16, 1024),
    "10b": (50, 4096, 16, 1024),
    "12b": (60, 4096, 16, 1024),
    "15b": (78, 4096, 16, 1024),
    "18b": (90, 4096, 16, 1024),
    "20b": (25, 8192, 16, 1024),
    "24b": (30, 8192, 16, 1024),
    "28b": (35, 8192, 16, 1024),
    "32b": (40, 8192, 16, 1024),
    "36b": (45, 8192, 16, 1024),
    "40b": (50, 8192, 16, 1024),
    "175b": (96, 12288, 96, 2048),
}


def size(name: str) -> DecoderConfig:
    """A GPT-2 of a named size, vocabulary 50257. Raises ValueError for a name not in SIZES."""
    if name not in SIZES:
        raise ValueError(f"no GPT-2 size {name!r}; there are {', '.join(SIZES)}")
    layers, width, heads, positions = SIZES[name]
    return config_from_hf({"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": positions})
