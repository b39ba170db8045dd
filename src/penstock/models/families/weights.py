"""One line per weight: our name, Hugging Face's names, and how one becomes the other. Read in both directions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from penstock.models.config import DecoderConfig

if TYPE_CHECKING:  # a plan reads families without torch
    from torch import Tensor

Layout = Literal["same", "transposed", "stacked", "interleaved", "expert", "alternating"]


@dataclass(frozen=True)
class Weight:
    """Example: Weight("qkv.weight", ("attn.q.weight", "attn.k.weight", "attn.v.weight"), "stacked")."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = "same"
    """same: one tensor as it is; transposed: [in, out] (GPT-2's Conv1D); stacked: several, one below the other;
    interleaved: q, k, v of head 0, then of head 1, ... (BLOOM, GPT-NeoX); expert: one expert's part of a tensor of all,
    each [in, out]; alternating: the same, whose outputs are gate 0, up 0, gate 1, ... (gpt-oss)."""
    expert: int | None = None
    """The number of that expert."""

    def read(self, parts: "list[Tensor]", config: DecoderConfig) -> "Tensor":
        """Our tensor from theirs, in the order of their names."""
        if self.layout == "stacked":
            from torch import cat

            return cat(parts)
        if self.layout == "transposed":
            return parts[0].t() if parts[0].dim() == 2 else parts[0]
        if self.layout == "interleaved":
            split = parts[0].unflatten(0, (config.num_heads, 3, config.head_dim))
            return split.transpose(0, 1).flatten(0, 2)
        if self.expert is not None:
            ours = parts[0][0].t() if parts[0].dim() == 3 else parts[0][0]
            return ours.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1) if self.layout == "alternating" else ours
        return parts[0]

    def write(self, ours: "Tensor", config: DecoderConfig) -> "dict[str, Tensor]":
        """Their tensors from ours, in the order of their names."""
        if self.layout == "stacked":
            return dict(zip(self.theirs, ours.split(self.heights(config)), strict=True))
        if self.layout == "transposed":
            ours = ours.t() if ours.dim() == 2 else ours
        elif self.layout == "interleaved":
            ours = ours.unflatten(0, (3, config.num_heads, config.head_dim)).transpose(0, 1).flatten(0, 2)
        elif self.expert is not None:
            ours = ours.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) if self.layout == "alternating" else ours
            ours = ours.t()[None] if ours.dim() == 2 else ours[None]
        return {self.theirs[0]: ours}

    def stored_shape(self, shape: tuple[int, ...], config: DecoderConfig) -> tuple[int, ...]:
        """The shape in the file of a tensor that has this one here."""
        return shape if self.expert is None else (config.num_experts, *shape[1:])

    def heights(self, config: DecoderConfig) -> list[int]:
        """Rows of each of their tensors in ours, of a stacked one."""
        if len(self.theirs) == 2:  # gate, up
            return 2 * [config.expert_ff if ".experts." in self.ours else config.d_ff]
        key_value = config.num_kv_heads * config.head_dim
        return [config.num_heads * config.head_dim, key_value, key_value]


def pair(ours: str, *theirs: str, layout: Layout = "same") -> tuple[Weight, Weight]:
    """A linear layer or norm: its weight and its bias. A line whose tensor the config does without is never read."""
    return (
        Weight(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), layout),
        Weight(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), layout),
    )
