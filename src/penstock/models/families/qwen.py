"""Qwen2 and Qwen3 (Yang et al. 2024, 2025): Llama with biased (2) or normed (3) queries and keys, windows by layer."""

import dataclasses
from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import llama
from penstock.models.families.settings import windows_of

TOP, BLOCK, PREFIX, HEAD = llama.TOP, llama.BLOCK, llama.PREFIX, llama.HEAD
CAUSAL_LM = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CLASSIFIER = {"qwen2": "Qwen2ForSequenceClassification", "qwen3": "Qwen3ForSequenceClassification"}

DEFAULTS = {
    "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32_768,
}  # fmt: skip
"""What Qwen2Config and Qwen3Config take where the file says nothing, unlike LlamaConfig."""


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Qwen2Config or Qwen3Config -> DecoderConfig."""
    hf = DEFAULTS | ({"head_dim": 128} if hf.get("model_type") == "qwen3" else {}) | hf
    config = llama.config_from_hf(hf)
    window = hf["sliding_window"] if hf.get("use_sliding_window") else None
    first = config.num_layers if window is None else hf["max_window_layers"]  # the layers before it see everything
    kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(config.num_layers)]
    windows = windows_of(hf, window, kinds, config.num_layers)
    config = dataclasses.replace(config, windows=windows if any(windows) else ())
    if config.family == "qwen3":
        return dataclasses.replace(config, qk_norm=True)
    return dataclasses.replace(config, qkv_bias=True, out_bias=False)


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> Qwen2Config or Qwen3Config."""
    window = max(config.windows, default=0)
    kinds = ["sliding_attention" if w else "full_attention" for w in config.windows or (0,) * config.num_layers]
    theirs = llama.hf_config(config)
    if config.family == "qwen2":
        theirs.pop("attention_bias")  # q, k, v always have one, the output never
    return {**theirs, "use_sliding_window": bool(window), "sliding_window": window or None, "layer_types": kinds}
