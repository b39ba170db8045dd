"""The weights of a decoder by name, with their shapes, and the groups that move together. Pure: no torch here.

The plan reads this instead of a model.
"""

import math
from typing import Literal

from penstock.memory.chunks import Weight
from penstock.models.config import DecoderConfig

BaseDtype = Literal["int8", "nf4"]
PACKED_BLOCK = 64
"""Inputs that share a scale in nf4."""


def groups_of(config: DecoderConfig, dtype: str, *, trained: bool, scalar: bool) -> list[tuple[str, list[Weight]]]:
    """(group, weights) in operational order: as `roles.Role.groups` of a real model.

    `scalar`: a critic or reward model, with a score head (fp32) in the language-model head's place.
    """
    c = config
    width, heads, kv = c.embed_dim or c.d_model, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def norm(name: str, size: int, kind: str | None = None) -> list[tuple[str, tuple[int, ...]]]:
        bias = [(f"{name}.bias", (size,))] if (kind or c.norm) == "layer" else []
        return [(f"{name}.weight", (size,)), *bias]

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"{name}.weight", (outputs, inputs)), *([(f"{name}.bias", (outputs,))] if bias else [])]

    embed: list[tuple[str, tuple[int, ...]]] = []
    if c.position == "learned":
        embed.append(("embed.positions", (c.max_length + c.position_offset, c.d_model)))
    if c.embed_dim:
        embed += linear("embed.project", width, c.d_model, False)
    if c.embed_norm:
        embed += norm("embed.norm", c.d_model)
    first, behind = c.pre_norm or not c.out_norms, c.out_norms
    block = [
        *(norm("norm1", c.d_model) if first else []),
        *linear("qkv", c.d_model, heads + 2 * kv, c.qkv_bias),
        *(norm("q_norm", c.head_dim, "rms") + norm("k_norm", c.head_dim, "rms") if c.qk_norm else []),
        *linear("out", heads, c.d_model, c.out_bias),
        *(norm("out_norm", c.d_model) if behind else []),
        *(norm("norm2", c.d_model) if first else []),
        *linear("up", c.d_model, c.d_ff * (2 if c.gated else 1), c.mlp_bias),
        *linear("down", c.d_ff, c.d_model, c.mlp_bias),
        *(norm("down_norm", c.d_model) if behind else []),
    ]
    last = norm("norm", c.d_model) if c.final_norm else []
    if c.embed_dim:
        last += linear("unproject", c.d_model, c.embed_dim, False)
    shapes: list[tuple[str, list[tuple[str, tuple[int, ...]]]]] = []
    shapes += [("tokens", [("embed.tokens", (c.vocab_size, width))]), ("embed", embed)]
    shapes += [(f"blocks.{i}", [(f"blocks.{i}.{name}", shape) for name, shape in block]) for i in range(c.num_layers)]
    shapes.append(("last", last))
    if not (c.tied or scalar):
        shapes.append(("head", [("head", (c.vocab_size, width))]))
    groups = [
        (group, [Weight(f"decoder.{name}", shape, dtype, trained) for name, shape in members])
        for group, members in shapes
        if members
    ]
    if scalar:
        groups.append(("score", [Weight("score", (1, width), "float32", trained)]))
    return groups


def visits_of(config: DecoderConfig, *, scalar: bool) -> list[tuple[str, ...]]:
    """Groups that are needed at once, in order: as `memory.stream.Stream.visits` of a real model."""
    reads = "score" if scalar else "tokens" if config.tied else "head"
    blocks = [(f"blocks.{i}",) for i in range(config.num_layers)]
    return [("tokens", "embed"), *blocks, ("last", reads)]


def count_of(config: DecoderConfig, *, scalar: bool) -> int:
    """Parameters of a model."""
    groups = groups_of(config, "float32", trained=True, scalar=scalar)
    return sum(weight.numel for _, weights in groups for weight in weights)


def packed_shapes(kind: BaseDtype, height: int, width: int) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of a packed weight [height, width], and of its scales: models.packed."""
    if kind == "int8":
        return [((height, width), "int8"), ((height,), "float32")]
    return [((height, width // 2), "uint8"), ((height, width // math.gcd(width, PACKED_BLOCK)), "float32")]
