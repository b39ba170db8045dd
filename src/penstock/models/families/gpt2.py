"""GPT-2 (Radford et al. 2019): learned positions, pre-norm, GELU, everything biased, head tied."""

from typing import Any

from penstock.models.decoder import DecoderConfig
from penstock.models.families.weights import Weight, pair

CAUSAL_LM, CLASSIFIER, PREFIX, HEAD = (
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    "transformer.",
    "lm_head.weight",
)
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
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """GPT2Config -> DecoderConfig."""
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
        activation=ACTIVATIONS[hf.get("activation_function", "gelu_new")],
        tied=hf.get("tie_word_embeddings", True),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> GPT2Config."""
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": theirs[config.activation],
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": config.tied,
    }


SIZES = {
    # name: layers, width, heads. s to xl: Radford et al. 2019; the larger ones in the proportions of Brown et al. 2020.
    "s": (12, 768, 12),
    "m": (24, 1024, 16),
    "l": (36, 1280, 20),
    "xl": (48, 1600, 25),
    "2b": (40, 2048, 16),
    "3b": (36, 2560, 32),
    "4b": (64, 2304, 16),
    "6b": (32, 4096, 32),
    "8b": (36, 4096, 32),
    "10b": (48, 4096, 32),
    "13b": (40, 5120, 40),
    "20b": (44, 6144, 64),
    "30b": (48, 7168, 56),
    "66b": (64, 9216, 72),
    "175b": (96, 12288, 96),
}


def size(name: str) -> DecoderConfig:
    """A GPT-2 of a named size, 1024 positions, vocabulary 50257. Raises ValueError for a name not in SIZES."""
    if name not in SIZES:
        raise ValueError(f"no GPT-2 size {name!r}; there are {', '.join(SIZES)}")
    layers, width, heads = SIZES[name]
    config = {"n_layer": layers, "n_embd": width, "n_head": heads, "eos_token_id": 50256, "bos_token_id": 50256}
    return config_from_hf(config)
