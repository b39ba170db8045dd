"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama with fused projections, partly rotary heads, longrope and a window."""

from typing import Any

from penstock.models.config import DecoderConfig
from penstock.models.families import llama
from penstock.models.families.rope import rope, rope_parameters, rotary
from penstock.models.families.settings import Fields, read, windows_of, write
from penstock.models.families.weights import Weight, pair

CAUSAL_LM, CLASSIFIER, PREFIX, HEAD = "Phi3ForCausalLM", "Phi3ForSequenceClassification", "model.", "lm_head.weight"
TOP = (Weight("embed.tokens", ("embed_tokens.weight",)), *pair("norm", "norm"))
BLOCK = (
    *pair("norm1", "layers.{}.input_layernorm"),
    *pair("qkv", "layers.{}.self_attn.qkv_proj"),
    *pair("out", "layers.{}.self_attn.o_proj"),
    *pair("norm2", "layers.{}.post_attention_layernorm"),
    *pair("up", "layers.{}.mlp.gate_up_proj"),
    *pair("down", "layers.{}.mlp.down_proj"),
)
FIELDS: Fields = {
    **{ours: key for ours, key in llama.FIELDS.items() if ours not in ("qkv_bias", "mlp_bias")},
    "norm_eps": ("rms_norm_eps", 1e-5),
}
TYPES = {"su": "longrope", "yarn": "longrope"}
"""Older names of rope scaling, theirs: ours."""


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Phi3Config -> DecoderConfig."""
    hf = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096} | hf
    settings = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    name = settings.pop("rope_type", settings.pop("type", "default"))
    settings["rope_type"] = TYPES.get(name, name)
    theta, share, scaling = rope({**hf, "rope_scaling": settings}, ("default", "longrope"))
    fields = read(hf, FIELDS)
    fields |= rotary(fields, int(fields["head_dim"] * (1 if share is None else share)), theta, scaling)
    window = hf.get("sliding_window")
    kind = "full_attention" if window is None else "sliding_attention"
    windows = windows_of({}, window, [kind] * fields["num_layers"], fields["num_layers"])
    fields |= {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
    return DecoderConfig(**fields, norm="rms", gated=True, windows=windows if any(windows) else ())


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> Phi3Config."""
    theirs = {**write(config, FIELDS), "sliding_window": max(config.windows, default=0) or None}
    numbers = theirs["rope_parameters"] = rope_parameters(config)
    if "original_max_position_embeddings" in numbers:  # theirs wins over the one among rope_parameters
        theirs["original_max_position_embeddings"] = numbers["original_max_position_embeddings"]
    return {**theirs, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}
