"""Where adapters stand in a decoder, and what they weigh: names and shapes. Pure: no torch in here."""

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass

from penstock.memory.chunks import Weight as Sized
from penstock.models import shapes
from penstock.models.config import DecoderConfig
from penstock.models.families import family_of, weights_of
from penstock.models.families.weights import Weight

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Spec:
    """What is adapted, and how. Example: Spec(16, targets=("q_proj", "v_proj"))."""

    rank: int = 16
    alpha: float | None = None
    """None: twice the rank."""
    targets: tuple[str, ...] | str = ALL_LINEAR
    """Endings of Hugging Face's module names (c_attn, q_proj, lm_head, ...), or one regular expression over a whole
    name, as peft reads them. all-linear: every product but the head's."""
    rslora: bool = False

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def wants(self, place: "Place") -> bool:
        """Whether it adapts that place."""
        if self.targets == ALL_LINEAR:
            return not place.table
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, place.theirs) is not None
        return any(f".{place.theirs}".endswith(f".{target}") for target in self.targets)


@dataclass(frozen=True)
class Place:
    """One Hugging Face module that an adapter can stand beside."""

    ours: str
    """Our module that holds it; empty: the decoder itself, for its head."""
    theirs: str
    start: int
    height: int
    """Its rows of our product's output."""
    width: int
    table: bool
    """The token table or the head."""
    weight: Weight


def places_of(config: DecoderConfig) -> list[Place]:
    """Every place an adapter can have, in the order of the program."""
    family, found = family_of(config.family, config.family), []
    shape_of = {
        weight.name.removeprefix("decoder."): weight.shape
        for _, weights in shapes.groups_of(config, "float32", trained=False, scalar=False)
        for weight in weights
    }
    table = shape_of["embed.tokens"]
    for weight in weights_of(family, config):
        ours, _, kind = weight.ours.rpartition(".")
        names = [name.removesuffix(".weight") for name in weight.theirs]
        if weight.ours == "embed.tokens":
            found.append(Place("embed", names[0], 0, table[1], table[0], True, weight))
        elif weight.ours == "head":
            name = getattr(family, "HEAD_MODULE", names[0])
            found.append(Place("", name, 0, table[0], table[1], True, weight))
        elif kind == "weight" and len(shape := shape_of.get(weight.ours, ())) == 2:
            heights = weight.heights(config) if weight.layout == "stacked" else [shape[0]]
            for i, name in enumerate(names):
                found.append(Place(ours, name, sum(heights[:i]), heights[i], shape[1], False, weight))
    return found


def groups_of(
    config: DecoderConfig, dtype: str, spec: Spec, *, trained: bool, scalar: bool, base: Hashable = "base"
) -> list[tuple[str, list[Sized]]]:
    """`shapes.groups_of` of a decoder that carries adapters: they alone (and a score head) are trained.

    `base` says what the frozen weights are: models of the same base share them.
    """
    found: dict[str, list[Sized]] = {}
    for group, weights in shapes.groups_of(config, dtype, trained=False, scalar=scalar):
        for one in weights:
            own = one.name == "score"
            kind = Sized(one.name, one.shape, one.dtype, trained and own, None if own else base)
            found.setdefault(group, []).append(kind)
    count: dict[str, int] = {}
    for place in places_of(config):
        if spec.wants(place) and not (scalar and place.ours == ""):
            i = count[place.ours] = count.get(place.ours, -1) + 1
            group = (
                ".".join(place.ours.split(".")[:2])
                if place.ours.startswith("blocks.")
                else ("last" if place.ours == "unproject" else "embed" if place.ours else "head")
            )
            name = f"decoder.{place.ours}.lora.{i}".replace("..", ".")
            found.setdefault(group, []).extend(
                [
                    Sized(f"{name}.a", (spec.rank, place.width), dtype, trained),
                    Sized(f"{name}.b", (place.height, spec.rank), dtype, trained),
                ]
            )
    return list(found.items())
