"""The settings of a decoder as plain data. Pure: no torch here, so that a plan needs none."""

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@dataclass(frozen=True)
class Foreign:
    """A model whose layers are transformers' own (models.foreign), as the plan and adapters see it."""

    text: str
    """Its config.json."""
    groups: tuple[tuple[str, tuple["ForeignWeight", ...]], ...] = field(compare=False, repr=False)
    """(group, weights) that move together, in operational order."""
    visits: tuple[tuple[str, ...], ...] = field(compare=False, repr=False)
    """Groups that are needed at once, in order, without the head's."""
    products: tuple[tuple[str, str], ...] = field(compare=False, repr=False)
    """Linear layers that adapters fit: our name of the module and theirs."""


@dataclass(frozen=True)
class ForeignWeight:
    """Example: ForeignWeight("blocks.0.mixer.A_log", (16,), learns=True, wide=True)."""

    name: str
    shape: tuple[int, ...]
    learns: bool
    """False: it is a buffer there."""
    wide: bool
    """Whether it is fp32 in a bf16 model too."""


MOST = 10_000
"""Layers, or experts: a model is built piece by piece, and a damaged number must not take hours to refuse."""
LARGEST = 10**9
"""Of any size: the bytes of a weight must be a number that torch can hold."""


@dataclass(frozen=True)
class DecoderConfig:
    """What distinguishes one decoder from another. Families translate Hugging Face configs to and from this."""

    family: str
    """Hugging Face `model_type`: a key of families.FAMILIES."""
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Fewer than num_heads: grouped-query attention."""
    head_dim: int
    d_ff: int
    max_length: int
    """Tokens of context the model was built for, and that a row may have."""
    position: Literal["learned", "rotary", "alibi"] = "learned"
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    """One of ACTIVATIONS."""
    gated: bool = False
    """SwiGLU and friends: activation(gate) * up."""
    pre_norm: bool = True
    """Norm before attention and MLP; False (OPT-350m) after the residual sum."""
    out_norms: bool = False
    """Norms behind attention and MLP too, before they are added (Gemma 2); with pre_norm False, only those."""
    norm_offset: float = 0.0
    """Gemma: RMSNorm multiplies by its weight plus 1."""
    embed_scale: float = 1.0
    """What token embeddings are multiplied by, rounded to their dtype first."""
    residual_scale: float = 1.0
    """What attention and MLP are multiplied by before they are added (Granite)."""
    attention_scale: float = 0.0
    """What attention scores are multiplied by. 0: 1 / sqrt(head_dim)."""
    attention_softcap: float = 0.0
    """Scores become softcap * tanh(scores / softcap) (Gemma 2). 0: they stay."""
    logit_divisor: float = 1.0
    """What logits are divided by (Granite)."""
    logit_softcap: float = 0.0
    """As attention_softcap, of the logits, behind the division."""
    parallel_residual: bool = False
    """GPT-NeoX: attention and MLP read the same input and are added together."""
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    tied: bool = True
    """The head is the token embedding."""
    qk_norm: bool = False
    """RMSNorm on each query and key head (Qwen3)."""
    qk_norm_wide: bool = False
    """OLMo 2: over all heads at once."""
    rotary_dim: int = 0
    """Leading dimensions of each head that rotate."""
    rope_theta: float = 10_000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    """Items of Hugging Face's rope_scaling: see positions.py."""
    window_rope: tuple[tuple[str, Any], ...] = ()
    """Where layers with a window turn by other angles (Gemma 3, OLMo 3): rope_theta and rope_scaling of these."""
    declared_length: int = 0
    """What config.json says instead of max_length, where longer rows would mean something else (positions.py)."""
    rotary_layers: tuple[bool, ...] = ()
    """Per layer, whether queries and keys rotate (SmolLM3). Empty: in every layer."""
    windows: tuple[int, ...] = ()
    """Per layer, how many latest tokens attention sees; 0 is all. Empty: all, in every layer."""
    embed_norm: bool = False
    """BLOOM: a norm right behind the embedding."""
    embed_dim: int = 0
    """OPT-350m: width of the embedding when it is not d_model, with projections in and out."""
    position_offset: int = 0
    """OPT keeps two unused rows at the start of its position table."""
    final_norm: bool = True
    num_experts: int = 0
    """Experts of each block (Shazeer et al. 2017), of which a router chooses a few for each token; 0: one MLP."""
    experts_per_token: int = 0
    expert_ff: int = 0
    """d_ff of each expert."""
    dense_layers: tuple[int, ...] = ()
    """Of a model with experts: the blocks that have one MLP."""
    norm_topk: bool = True
    """The shares of a token's experts add up to 1; False: each is the router's probability among all experts."""
    router_bias: bool = False
    router_aux_loss_coef: float = 0.0
    """Weight of the loss that balances the experts' loads in training."""
    sinks: bool = False
    """gpt-oss: a learned logit per head takes part in attention's softmax and reads nothing."""
    clamp: tuple[float, float] | None = None
    """gpt-oss: (alpha, limit) of its gated activation, in the place of `activation`."""
    part_of: str = ""
    """model_type of the checkpoint whose text model it is (families.multimodal): adapters are named for the whole."""
    eos_ids: tuple[int, ...] = ()
    foreign: Foreign | None = None
    """Of a model whose layers are transformers' own. None: they are ours."""
    hf: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)
    """The config.json this came from: keys we do not use survive a round trip."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "head_dim", "d_ff", "max_length"):
            if getattr(self, name) > LARGEST:
                raise ValueError(f"{name}: {getattr(self, name)} is not supported; at most {LARGEST:,} is")

    @functools.cached_property
    def kinds(self) -> tuple[tuple[int, bool], ...]:
        """Per layer its window, and whether it rotates: layers of a kind share what depends on positions."""
        count = max(len(self.windows), len(self.rotary_layers), self.num_layers)
        rotary = self.rotary_layers or (self.position == "rotary",) * count
        return tuple(zip(self.windows or (0,) * count, rotary, strict=True))

    def scales_queries(self, length: int) -> bool:
        """Whether queries of rows of this length grow with their position (Ministral 3)."""
        numbers = dict(self.rope_scaling)
        return "llama_4_scaling_beta" in numbers and length > numbers["original_max_position_embeddings"]
