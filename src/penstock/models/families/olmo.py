"""OLMo 2 and 3 (OLMo team 2024, 2025): norms behind attention and MLP, queries and keys normed over all heads."""

import dataclasses
from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import llama
from penstock.models.families.rope import parameters_by_kind, rope_by_kind, window_rope
from penstock.models.families.settings import windows_of
from penstock.models.families.weights import pair

PREFIX, HEAD, TOP = llama.PREFIX, llama.HEAD, llama.TOP
CAUSAL_LM = {"olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM"}
CLASSIFIER = {"olmo2": "Olmo2ForSequenceClassification", "olmo3": "Olmo3ForSequenceClassification"}
BLOCK = (
    *(weight for weight in llama.BLOCK if not weight.ours.startswith("norm")),
    *pair("out_norm", "layers.{}.post_attention_layernorm"),
    *pair("down_norm", "layers.{}.post_feedforward_layernorm"),
)
THETA = 500_000.0
"""OLMo 3's, where the file has none."""


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Olmo2Config or Olmo3Config -> DecoderConfig."""
    third = hf.get("model_type") == "olmo3"
    narrow: dict[str, Any] = {}
    hf = {"rms_norm_eps": 1e-5} | hf | {"mlp_bias": False}
    if third:  # rope_theta is of full attention alone
        hf, narrow = rope_by_kind(hf, (hf.get("rope_theta", THETA), THETA))
    config = dataclasses.replace(
        llama.config_from_hf(hf), pre_norm=False, out_norms=True, qk_norm=True, qk_norm_wide=True
    )
    if not third:
        return config
    kinds = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(config.num_layers)]
    windows = windows_of(hf, hf.get("sliding_window", 4096), kinds, config.num_layers)
    config = dataclasses.replace(config, windows=windows if any(windows) else ())
    return dataclasses.replace(config, window_rope=window_rope(narrow, config))


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> Olmo2Config or Olmo3Config."""
    theirs = llama.hf_config(config)
    theirs.pop("mlp_bias")  # there is none
    if config.family == "olmo2":
        return theirs
    kinds = ["sliding_attention" if window else "full_attention" for window, _ in config.kinds]
    window = max(config.windows, default=0) or None
    return {**theirs, "rope_parameters": parameters_by_kind(config), "layer_types": kinds, "sliding_window": window}
