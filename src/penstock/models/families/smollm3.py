"""SmolLM3 (Hugging Face 2025): Llama, every fourth layer without rotary positions (Yang et al. 2025, RoPE to NoPE)."""

import dataclasses
from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import llama
from penstock.models.families.settings import whole, windows_of

CAUSAL_LM, CLASSIFIER = "SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification"
TOP, BLOCK, PREFIX, HEAD = llama.TOP, llama.BLOCK, llama.PREFIX, llama.HEAD
DEFAULTS = {
    "num_key_value_heads": 4, "max_position_embeddings": 32_768, "rope_theta": 2_000_000.0, "tie_word_embeddings": True,
}  # fmt: skip
"""What SmolLM3Config takes where the file says nothing, unlike LlamaConfig."""


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """SmolLM3Config -> DecoderConfig."""
    hf = DEFAULTS | hf
    config = llama.config_from_hf(hf)
    count = config.num_layers
    rotate = hf.get("no_rope_layers")
    if rotate is None:
        every = whole(hf, "no_rope_layer_interval", 4)
        rotate = [int((i + 1) % every != 0) for i in range(count)]
    if len(rotate) < count or not set(rotate) <= {0, 1}:
        raise ValueError(f"no_rope_layers: {rotate} is not supported; give each layer 1 (rotary) or 0 (none)")
    window = hf.get("sliding_window")
    slides = bool(hf.get("use_sliding_window")) and window is not None
    kinds = ["full_attention" if turns or not slides else "sliding_attention" for turns in rotate[:count]]
    windows = windows_of(hf, window, kinds, count)
    rotary = tuple(map(bool, rotate[:count]))
    windows = windows if any(windows) else ()
    return dataclasses.replace(config, windows=windows, rotary_layers=() if all(rotary) else rotary)


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> SmolLM3Config."""
    window = max(config.windows, default=0)
    return {
        **llama.hf_config(config),
        "no_rope_layers": [int(rotates) for _, rotates in config.kinds],
        "layer_types": ["sliding_attention" if sees else "full_attention" for sees, _ in config.kinds],
        "use_sliding_window": bool(window),
        "sliding_window": window or None,
    }
