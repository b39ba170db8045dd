"""Gemma 2 and 3 (Riviere et al. 2024, Kamath et al. 2025): four norms, GeGLU, scaled embeddings, windows by layer.

Gemma 2 bends scores and logits by tanh; Gemma 3 norms queries and keys, and its layers with a window have a rope of
their own.
"""

import dataclasses
from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import llama
from penstock.models.families.rope import parameters_by_kind, rope_by_kind, window_rope
from penstock.models.families.settings import number, require, whole, windows_of
from penstock.models.families.weights import pair

CAUSAL_LM = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
CLASSIFIER = {"gemma2": "Gemma2ForSequenceClassification", "gemma3_text": "Gemma3TextForSequenceClassification"}
TOP, PREFIX, HEAD = llama.TOP, llama.PREFIX, llama.HEAD
BLOCK = (
    *(weight for weight in llama.BLOCK if not weight.ours.startswith("norm2")),
    *pair("out_norm", "layers.{}.post_attention_layernorm"),
    *pair("norm2", "layers.{}.pre_feedforward_layernorm"),
    *pair("down_norm", "layers.{}.post_feedforward_layernorm"),
)
DEFAULTS = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "max_position_embeddings": 131_072, "vocab_size": 262_208,
}  # fmt: skip
"""What the config classes take where the file says nothing: of Gemma3TextConfig, and what differs in Gemma2Config."""
DEFAULTS2 = {
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192,
    "vocab_size": 256_000,
}  # fmt: skip


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Gemma2Config or Gemma3TextConfig -> DecoderConfig."""
    third = hf["model_type"] == "gemma3_text"
    hf = DEFAULTS | ({} if third else DEFAULTS2) | hf
    require(hf, use_bidirectional_attention=hf.get("use_bidirectional_attention") and False)
    narrow: dict[str, Any] = {}
    if third:
        require(hf, attn_logit_softcapping=None)  # which its attention never reads
        hf, narrow = rope_by_kind(hf, (hf.get("rope_theta", 1_000_000.0), hf.get("rope_local_base_freq", 10_000.0)))
    config = llama.config_from_hf({**hf, "mlp_bias": False}, llama.FIELDS | {"activation": "hidden_activation"})
    every = whole(hf, "sliding_window_pattern", 6) if third else 2
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(config.num_layers)]
    windows = windows_of(hf, hf["sliding_window"], kinds, config.num_layers)
    config = dataclasses.replace(config, windows=windows if any(windows) else ())
    return dataclasses.replace(
        config, window_rope=window_rope(narrow, config) if third else (), qk_norm=third, out_norms=True,
        norm_offset=1.0, embed_scale=config.d_model**0.5, attention_scale=number(hf, "query_pre_attn_scalar") ** -0.5,
        attention_softcap=number(hf, "attn_logit_softcapping", none=0.0),
        logit_softcap=number(hf, "final_logit_softcapping", none=0.0),
    )  # fmt: skip


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> Gemma2Config or Gemma3TextConfig."""
    theirs = llama.hf_config(config)
    theirs.pop("mlp_bias")  # there is none
    act = theirs.pop("hidden_act")
    if config.family == "gemma3_text":
        theirs["rope_parameters"] = parameters_by_kind(config)
    kinds = ["sliding_attention" if window else "full_attention" for window, _ in config.kinds]
    return {
        **theirs,
        "hidden_activation": "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else act,
        "layer_types": kinds,
        "sliding_window": max(config.windows, default=0) or None,
        "query_pre_attn_scalar": round((config.attention_scale or config.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
    }
