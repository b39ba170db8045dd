"""The settings of a decoder as plain data. Pure: no torch here, so that a plan needs none."""

from dataclasses import dataclass, field
from typing import Any, Literal

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@dataclass(frozen=True)
class DecoderConfig:
    """What distinguishes one decoder from another. Families translate Hugging Face configs to and from this."""

    family: str
    """Hugging Face `model_type`: gpt2, opt, bloom, gpt_neox, llama, mistral, qwen2, qwen3."""
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Fewer than num_heads: grouped-query attention."""
    head_dim: int
    d_ff: int
    max_length: int
    """Tokens of context the model was built for."""
    position: Literal["learned", "rotary", "alibi"] = "learned"
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    """One of ACTIVATIONS."""
    gated: bool = False
    """SwiGLU and friends: activation(gate) * up."""
    pre_norm: bool = True
    """Norm before attention and MLP; False (OPT-350m) after the residual sum."""
    parallel_residual: bool = False
    """GPT-NeoX: attention and MLP read the same input and are added together."""
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    tied: bool = True
    """The head is the token embedding."""
    qk_norm: bool = False
    """RMSNorm on each query and key head (Qwen3)."""
    rotary_dim: int = 0
    """Leading dimensions of each head that rotate."""
    rope_theta: float = 10_000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    """Items of Hugging Face's rope_scaling: types linear and llama3."""
    windows: tuple[int, ...] = ()
    """Per layer, how many latest tokens attention sees; 0 is all. Empty: all, in every layer."""
    embed_norm: bool = False
    """BLOOM: a norm right behind the embedding."""
    embed_dim: int = 0
    """OPT-350m: width of the embedding when it is not d_model, with projections in and out."""
    position_offset: int = 0
    """OPT keeps two unused rows at the start of its position table."""
    final_norm: bool = True
    eos_ids: tuple[int, ...] = ()
    hf: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)
    """The config.json this came from: keys we do not use survive a round trip."""
