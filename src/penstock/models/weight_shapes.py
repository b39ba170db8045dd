"""The weights of a decoder by name, with their shapes, and the groups that move together. Pure: no torch here.

The plan reads this instead of a model.
"""

import math
from typing import Literal

from penstock.memory.chunks import Weight
from penstock.models.config import DecoderConfig, Foreign

BaseDtype = Literal["int8", "fp8", "nf4"]
Named = list[tuple[str, tuple[int, ...]]]
"""Weights' names and shapes."""
BY_ROW: dict[str, str] = {"int8": "int8", "fp8": "float8_e4m3fn"}
"""Kinds with a scale per output, and their dtypes."""
PACKED_BLOCK = 64
"""Inputs that share a scale in nf4."""


def groups_of(config: DecoderConfig, dtype: str, *, trained: bool, scalar: bool) -> list[tuple[str, list[Weight]]]:
    """(group, weights) in operational order: as `roles.Role.groups` of a real model.

    `scalar`: a critic or reward model, with a score head (fp32) in the language-model head's place.
    """
    if config.foreign:
        return _of_foreign(config, config.foreign, dtype, trained, scalar)
    groups = [
        (group, [Weight(f"decoder.{name}", shape, dtype, trained) for name, shape in members])
        for group, members in _shapes(config, scalar)
        if members
    ]
    if scalar:
        groups.append(("score", [Weight("score", (1, config.embed_dim or config.d_model), "float32", trained)]))
    return groups


def _shapes(c: DecoderConfig, scalar: bool) -> list[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    """(group, (name, shape)) of a decoder of ours."""
    width, heads, kv = c.embed_dim or c.d_model, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    normed = (heads, kv) if c.qk_norm_wide else (c.head_dim, c.head_dim)

    def norm(name: str, size: int, kind: str | None = None) -> Named:
        bias = [(f"{name}.bias", (size,))] if (kind or c.norm) == "layer" else []
        return [(f"{name}.weight", (size,)), *bias]

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> Named:
        return [(f"{name}.weight", (outputs, inputs)), *([(f"{name}.bias", (outputs,))] if bias else [])]

    embed: Named = []
    if c.position == "learned":
        embed.append(("embed.positions", (c.max_length + c.position_offset, c.d_model)))
    if c.embed_dim:
        embed += linear("embed.project", width, c.d_model, False)
    if c.embed_norm:
        embed += norm("embed.norm", c.d_model)
    first = c.pre_norm or not c.out_norms
    attention = [
        *([("sinks", (c.num_heads,))] if c.sinks else []),
        *(norm("norm1", c.d_model) if first else []),
        *linear("qkv", c.d_model, heads + 2 * kv, c.qkv_bias),
        *(norm("q_norm", normed[0], "rms") + norm("k_norm", normed[1], "rms") if c.qk_norm else []),
        *linear("out", heads, c.d_model, c.out_bias),
        *(norm("out_norm", c.d_model) if c.out_norms else []),
        *(norm("norm2", c.d_model) if first else []),
    ]

    def mlp(width: int) -> Named:
        up, down = (c.d_model, width * (2 if c.gated else 1)), (width, c.d_model)
        return [*linear("up", *up, c.mlp_bias), *linear("down", *down, c.mlp_bias)]

    router, expert = linear("router", c.d_model, c.num_experts, c.router_bias), mlp(c.expert_ff)
    last = norm("norm", c.d_model) if c.final_norm else []
    if c.embed_dim:
        last += linear("unproject", c.d_model, c.embed_dim, False)
    shapes: list[tuple[str, Named]] = [("tokens", [("embed.tokens", (c.vocab_size, width))]), ("embed", embed)]
    for i in range(c.num_layers):
        own, *experts = groups_of_block(c, i)
        behind = norm("down_norm", c.d_model) if c.out_norms else []
        block = [*attention, *(router if experts else mlp(c.d_ff)), *behind]
        shapes.append((own, [(f"{own}.{name}", shape) for name, shape in block]))
        shapes += [(group, [(f"{group}.{name}", shape) for name, shape in expert]) for group in experts]
    shapes.append(("last", last))
    if not (c.tied or scalar):
        shapes.append(("head", [("head", (c.vocab_size, width))]))
    return shapes


def _of_foreign(
    config: DecoderConfig, foreign: Foreign, dtype: str, trained: bool, scalar: bool
) -> list[tuple[str, list[Weight]]]:
    """`groups_of` where the layers are transformers' own."""
    groups = [
        (group, [
            Weight(f"decoder.{w.name}", w.shape, "float32" if w.wide else dtype, trained and w.learns) for w in members
        ])
        for group, members in foreign.groups
        if not (scalar and group == "head")
    ]  # fmt: skip
    return [*groups, ("score", [Weight("score", (1, config.d_model), "float32", trained)])] if scalar else groups


def visits_of(config: DecoderConfig, *, scalar: bool) -> list[tuple[str, ...]]:
    """Groups that are needed at once, in order: as `memory.stream.Stream.visits` of a real model."""
    reads = ("score",) if scalar else ("tokens",) if config.tied else ("head",)
    if config.foreign:
        biased = config.tied and not scalar and any(group == "head" for group, _ in config.foreign.groups)
        return [*config.foreign.visits[:-1], (*config.foreign.visits[-1], *reads, *(["head"] if biased else []))]
    blocks = [groups_of_block(config, i) for i in range(config.num_layers)]
    return [("tokens", "embed"), *blocks, ("last", *reads)]


def choices_of(config: DecoderConfig) -> tuple[tuple[str, ...], ...]:
    """Of each of `visits_of`, the groups that tokens choose of."""
    if config.foreign:
        return ()
    return ((), *(groups_of_block(config, i)[1:] for i in range(config.num_layers)), ())


def groups_of_block(config: DecoderConfig, i: int) -> tuple[str, ...]:
    """The groups of one block's weights: its own, and one for each of its experts."""
    experts = config.num_experts if i not in config.dense_layers else 0
    return (f"blocks.{i}", *(f"blocks.{i}.experts.{expert}" for expert in range(experts)))


def group_in_block(name: str) -> str:
    """The group of a block's weight. Example: blocks.3.experts.7.up.weight is of blocks.3.experts.7."""
    words = name.split(".")
    return ".".join(words[: 4 if words[2] == "experts" else 2])


def count_of(config: DecoderConfig, *, scalar: bool, active: bool = False) -> int:
    """Parameters of a model. `active`: only those that one token is computed with."""
    groups = groups_of(config, "float32", trained=True, scalar=scalar)
    counts = {group: sum(weight.numel for weight in weights) for group, weights in groups}
    if active:  # of a block's experts, which are alike, the first ones
        idle = tuple(f".experts.{expert}" for expert in range(config.experts_per_token, config.num_experts))
        return sum(n for group, n in counts.items() if not group.endswith(idle))
    return sum(counts.values())


def packed_shapes(kind: BaseDtype, height: int, width: int) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of a packed weight [height, width], and of its scales: models.packed."""
    if kind in BY_ROW:
        return [((height, width), BY_ROW[kind]), ((height,), "float32")]
    return [((height, width // 2), "uint8"), ((height, width // math.gcd(width, PACKED_BLOCK)), "float32")]
