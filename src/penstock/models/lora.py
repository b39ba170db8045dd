"""LoRA: a frozen model learns through low-rank additions to its products (Hu et al. 2021), in peft's format.

    y = W x + scale * B (A x),   A [r, I], B [O, r], scale = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)

One of our products may hold several of Hugging Face's (q, k and v, one below the other): each of them has an adapter
of its own on its rows of the output, as peft has. This file holds the adapter and its arithmetic; `recipe` writes its
first values, `surgery` adds it to a decoder.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.models.config import DecoderConfig
from penstock.models.linear import linear
from penstock.models.lora_targets import LoraSpec, LoraTarget


class Adapter(nn.Module):
    """One low-rank addition, to rows start .. start + height of a product's output.

    On a token table `a` is [r, V] and `b` [D, r], as peft's lora_embedding_A and _B.
    """

    def __init__(self, target: LoraTarget, spec: LoraSpec, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.target, self.config = target, config
        self.rank, self.alpha, self.scale = spec.rank_of(target), spec.alpha_of(target), spec.scale_of(target)
        self.wrapped = False
        """Of an expert: whether its down projection has an adapter too, which decides peft's name of this one."""
        self.a = nn.Parameter(torch.empty(self.rank, target.width, dtype=dtype))
        self.b = nn.Parameter(torch.empty(target.height, self.rank, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> the addition to its rows, [..., height].

        Scaled behind both products, as peft does: the other way round its logits and ours differ by more than one
        rounding, but where a factor rounds nothing, and there it meets the rank's few numbers.
        """
        low = linear(x, self.a)
        if math.frexp(self.scale)[0] == 0.5:  # a power of two
            return linear(low.mul_(self.scale), self.b)
        return linear(low, self.b).mul_(self.scale)

    def rows(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> the addition to their rows of the table, [..., D]."""
        rows = F.embedding(tokens, self.a.t().float()).to(self.a.dtype)  # gradients of equal tokens add up in fp32
        return linear(rows * self.scale, self.b)

    def delta(self) -> Tensor:
        """The addition to its rows of a weight, [height, I] fp32 (of a token table: [V, D])."""
        product = (self.b.float() @ self.a.float()) * self.scale
        return product.t() if self.target.ours == "embed" else product


class SavedAdapters(Protocol):
    """Adapters in a file (models.adapter_files.AdapterFile). Equal ones hold the same weights."""

    def fill(self, decoder: nn.Module, weights: dict[str, Tensor]) -> None:
        """Reads these adapter weights of the decoder, by our names."""


@dataclass
class Adapted:
    """Describes the adapters of a decoder (`decoder.adapted`)."""

    spec: LoraSpec
    base: str
    """The base model's directory or hub id."""
    saved: SavedAdapters | None
    """The file that the adapters are read from. None: they start fresh."""
    seed: int
    merged: dict[str, tuple[Tensor, nn.ModuleList]] | None = None
    """While merged: weights and adapters from before, by our module's name; empty where they were not kept."""
    digest: str = ""
    """The hash of the base's weights; empty where they were drawn."""
    copies: tuple[str, ...] = ()
    """The base's names of whole weights that came with the adapter, and that its file holds in the base's place."""

    @property
    def source(self) -> Hashable:
        """The origin of the first values: equal sources, equal bytes."""
        return ("adapter", self.saved or self.seed)

    def __deepcopy__(self, memo: dict) -> "Adapted":
        return replace(self)  # tensors in it never change


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora." in f".{name}"


def adapters_of(decoder: nn.Module) -> list[Adapter]:
    """In the order of the program."""
    return [module for module in decoder.modules() if isinstance(module, Adapter)]
