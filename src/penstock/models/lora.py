"""LoRA: a frozen model learns through low-rank additions to its products (Hu et al. 2021), in peft's format.

    y = W x + scale * B (A x),   A [r, I], B [O, r], scale = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)

One of our products may hold several of Hugging Face's (q, k and v, one below the other): each of them has an adapter
of its own on its rows of the output, as peft would make it. A starts uniform like a linear layer's weight, B at 0.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.errors import UserError
from penstock.models.config import DecoderConfig
from penstock.models.linear import linear
from penstock.models.lora_targets import LoraSpec, LoraTarget, lora_targets_of

if TYPE_CHECKING:
    from penstock.models.decoder import Decoder


class Adapter(nn.Module):
    """One low-rank addition, to rows start .. start + height of a product's output.

    Beside a token table `a` is [r, V] and `b` [D, r], as peft's lora_embedding_A and _B.
    """

    def __init__(self, place: LoraTarget, spec: LoraSpec, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.place, self.config, self.scale = place, config, spec.scale
        self.a = nn.Parameter(torch.empty(spec.rank, place.width, dtype=dtype))
        self.b = nn.Parameter(torch.empty(place.height, spec.rank, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> what to add to its rows, times `scale`: [..., height]."""
        return linear(linear(x, self.a), self.b)

    def rows(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> what to add to their rows of the table, [..., D]."""
        return linear(F.embedding(tokens, self.a.t()) * self.scale, self.b)

    def delta(self) -> Tensor:
        """What merging adds to its rows of a weight, [height, I] fp32 (of a token table: [V, D])."""
        product = (self.b.float() @ self.a.float()) * self.scale
        return product.t() if self.place.ours == "embed" else product


class Saved(Protocol):
    """Adapters in a file (models.adapter_files.AdapterFile). Equal ones hold the same weights."""

    def check(self, decoder: "Decoder") -> None:
        """Raises UserError when these adapters do not belong to a decoder with places for them."""

    def fill(self, decoder: "Decoder", weights: dict[str, Tensor]) -> None:
        """Reads these adapter weights of the decoder, by our names."""


@dataclass
class Adapted:
    """What a decoder that carries adapters knows of them (`decoder.adapted`)."""

    spec: LoraSpec
    base: str
    """The base model's directory or hub id."""
    saved: Saved | None
    """Where the adapters are read; None: they start fresh."""
    seed: int
    merged: dict[str, tuple[Tensor, nn.ModuleList]] | None = None
    """While merged: weights and adapters as they were, by our module's name; nothing where they were let go of."""
    digest: str = ""
    """Of the base, as its checkpoint counts it; empty where it was drawn."""

    @property
    def source(self) -> Hashable:
        """Where first values come from: equal sources, equal bytes."""
        return ("adapter", self.saved or self.seed)

    def __deepcopy__(self, memo: dict) -> "Adapted":
        return replace(self)  # tensors in it never change


# --- on a decoder -----------------------------------------------------------------------------------------------------


def add(
    decoder: "Decoder", spec: LoraSpec, *, base: str = "", digest: str = "", seed: int = 0, saved: Saved | None = None
) -> None:
    """Puts fresh adapters on a decoder, or those that were `saved`, and freezes all else.

    Raises UserError for a rank that cannot be, for targets that match nothing and for a decoder that has adapters.
    """
    if decoder.adapted is not None:
        raise UserError("this model carries an adapter already, and takes one; penstock export --merge makes it one.")
    places = lora_targets_of(decoder.config)
    wanted = [place for place in places if spec.wants(place)]
    if not wanted:
        known = ", ".join(sorted({place.theirs.rsplit(".", 1)[-1] for place in places}))
        shown = spec.targets if isinstance(spec.targets, str) else " ".join(spec.targets)
        raise UserError(f"--lora-targets {shown}: matches no weight of this model; there are {known}, all-linear.")
    for place in wanted:
        if not 1 <= spec.rank <= min(place.height, place.width):
            raise UserError(
                f"--lora {spec.rank}: {place.theirs} is {place.height} x {place.width}; give a rank from 1 to "
                f"{min(place.height, place.width)}."
            )
    decoder.requires_grad_(False)
    home = decoder.embed.tokens.device
    with torch.device("meta"):
        for place in wanted:
            holder: Any = decoder.get_submodule(place.ours)
            if holder.lora is None:
                holder.lora = nn.ModuleList()
            holder.lora.append(Adapter(place, spec, decoder.config, decoder.dtype))
    decoder.adapted = Adapted(spec, base, saved, seed, digest=digest)
    if saved is not None:
        saved.check(decoder)
    if home.type != "meta":
        for adapter in adapters_of(decoder):
            adapter.to_empty(device=home)
        fill(decoder, {name: p for name, p in decoder.named_parameters() if is_adapter(name)})


def remove(decoder: "Decoder") -> None:
    """Takes the adapters off again."""
    for holder in decoder.modules():
        if getattr(holder, "lora", None) is not None:
            holder.lora = None  # type: ignore[assignment]
    decoder.adapted = None


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora." in f".{name}"


def adapters_of(decoder: "Decoder") -> list[Adapter]:
    """All of them, in the order of the program."""
    return [module for module in decoder.modules() if isinstance(module, Adapter)]


@torch.no_grad()
def fill(decoder: "Decoder", weights: dict[str, Tensor]) -> None:
    """Writes these adapter weights' first values, by our names: what was saved, or a fresh start keyed by the seed."""
    adapted = decoder.adapted
    assert adapted is not None
    if adapted.saved is not None:
        adapted.saved.fill(decoder, weights)
        return
    for name, weight in weights.items():
        if name.endswith(".b"):
            weight.zero_()
        else:
            generator = torch.Generator(weight.device).manual_seed(adapted.seed ^ crc32(name.encode()))
            bound = 1 / math.sqrt(weight.shape[1])
            weight.uniform_(-bound, bound, generator=generator)


# --- merging ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(decoder: "Decoder", *, keep: bool = True) -> None:
    """Adds the adapters into the weights, which then cost nothing more than the base's. For resident decoders.

    `keep` holds on to the weights and adapters as they were, so that `unmerge` gives them back bit by bit. A tied head
    or token table that is adapted becomes a weight of its own.
    """
    adapted = decoder.adapted
    if adapted is None or adapted.merged is not None:
        return
    if decoder.base_dtype is not None:
        raise ValueError(f"an adapter does not merge into {decoder.base_dtype} weights: load the base in full")
    if decoder.head is None and (decoder.lora is not None or decoder.embed.lora is not None):
        decoder.head = nn.Parameter(decoder.embed.tokens.detach().clone(), requires_grad=False)
        decoder.config = replace(decoder.config, tied=False)
    adapted.merged = {}
    for name, holder in [(name, one) for name, one in decoder.named_modules() if getattr(one, "lora", None)]:
        weight = getattr(holder, _weight_of(holder))
        if keep:
            adapted.merged[name] = weight.detach().clone(), holder.lora
        for adapter in holder.lora:
            delta = adapter.delta()
            rows = slice(adapter.place.start, adapter.place.start + len(delta))
            weight[rows] = (weight[rows].float() + delta).to(weight.dtype)
        holder.lora = None


@torch.no_grad()
def unmerge(decoder: "Decoder") -> None:
    """Undoes `merge(keep=True)`. Raises ValueError where the weights were not kept."""
    adapted = decoder.adapted
    if adapted is None or adapted.merged is None:
        return
    if not adapted.merged:
        raise ValueError("the weights from before the merge were not kept: load the base again")
    for name, (weight, adapters) in adapted.merged.items():
        holder: Any = decoder.get_submodule(name)
        getattr(holder, _weight_of(holder)).copy_(weight)
        holder.lora = adapters
    adapted.merged = None


def _weight_of(holder: Any) -> str:
    return next(name for name in ("weight", "tokens", "head") if isinstance(getattr(holder, name, None), nn.Parameter))
