"""Where adapters stand in a decoder, and what they weigh: names and shapes. Pure: no torch in here."""

import dataclasses
import math
import re
from collections.abc import Hashable
from dataclasses import dataclass

from penstock.memory.chunks import ITEMSIZE
from penstock.memory.chunks import Weight as Sized
from penstock.models import weight_shapes
from penstock.models.config import DecoderConfig
from penstock.models.families import family_of, weights_of
from penstock.models.families.weights import Weight
from penstock.models.weight_shapes import BaseDtype
from penstock.planner.activations import Batch, Work

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraSpec:
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

    def wants(self, place: "LoraTarget") -> bool:
        """Whether it adapts that place."""
        if self.targets == ALL_LINEAR:
            return not place.table
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, place.theirs) is not None
        return any(f".{place.theirs}".endswith(f".{target}") for target in self.targets)


@dataclass(frozen=True)
class LoraTarget:
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


def lora_targets_of(config: DecoderConfig) -> list[LoraTarget]:
    """Every place an adapter can have, in the order of the program."""
    family, found = family_of(config.family, config.family), []
    shape_of = {
        weight.name.removeprefix("decoder."): weight.shape
        for _, weights in weight_shapes.groups_of(config, "float32", trained=False, scalar=False)
        for weight in weights
    }
    table = shape_of["embed.tokens"]
    for weight in weights_of(family, config):
        ours, _, kind = weight.ours.rpartition(".")
        names = [name.removesuffix(".weight") for name in weight.theirs]
        if weight.ours == "embed.tokens":
            found.append(LoraTarget("embed", names[0], 0, table[1], table[0], True, weight))
        elif weight.ours == "head":
            name = getattr(family, "HEAD_MODULE", names[0])
            found.append(LoraTarget("", name, 0, table[0], table[1], True, weight))
        elif kind == "weight" and len(shape := shape_of.get(weight.ours, ())) == 2:
            heights = weight.heights(config) if weight.layout == "stacked" else [shape[0]]
            for i, name in enumerate(names):
                found.append(LoraTarget(ours, name, sum(heights[:i]), heights[i], shape[1], False, weight))
    return found


def groups_of(
    config: DecoderConfig, dtype: str, spec: LoraSpec | None, *, trained: bool, scalar: bool, base: Hashable = "base",
    packed: BaseDtype | None = None,
) -> list[tuple[str, list[Sized]]]:  # fmt: skip
    """`shapes.groups_of` of a decoder that carries adapters, which alone (and a score head) are trained; without a
    spec, of a frozen one.

    `base` says what the frozen weights are: models of the same base share them; `packed`, what the blocks' products
    are kept in.
    """
    found: dict[str, list[Sized]] = {}
    for group, weights in weight_shapes.groups_of(config, dtype, trained=False, scalar=scalar):
        for one in weights:
            own = one.name == "score"
            kind = Sized(one.name, one.shape, one.dtype, trained and own, None if own else base)
            product = packed and group.startswith("blocks.") and len(one.shape) == 2
            sizes = weight_shapes.packed_shapes(packed, *one.shape) if packed and product else [(one.shape, one.dtype)]
            for (shape, kept), name in zip(sizes, (one.name, one.name.replace(".weight", ".scales")), strict=False):
                found.setdefault(group, []).append(dataclasses.replace(kind, name=name, shape=shape, dtype=kept))
    count: dict[str, int] = {}
    for place in _wanted(config, spec, scalar):
        i = count[place.ours] = count.get(place.ours, -1) + 1
        name = f"decoder.{place.ours}.lora.{i}".replace("..", ".")
        shapes_of = {"a": (spec.rank, place.width), "b": (place.height, spec.rank)} if spec else {}
        found.setdefault(_group_of(place), []).extend(
            Sized(f"{name}.{which}", shape, dtype, trained) for which, shape in shapes_of.items()
        )
    return list(found.items())


def work_of(
    config: DecoderConfig, dtype: str, spec: LoraSpec | None, batch: Batch, *, scalar: bool, entropy: bool = True,
    packed: BaseDtype | None = None, arithmetic: weight_shapes.Arithmetic = "narrow",
) -> Work:  # fmt: skip
    """`shapes.work_of` of a decoder that carries adapters: what models.lora and linear.add_to hold beside the rest."""
    s = ITEMSIZE[dtype]
    work = weight_shapes.work_of(config, dtype, batch, scalar=scalar, entropy=entropy, arithmetic=arithmetic)
    if spec is None and packed is None:
        return work
    rank = spec.rank if spec else 0
    tokens = batch.rows * batch.length
    by_product: dict[str, list[LoraTarget]] = {}
    for place in _wanted(config, spec, scalar):
        by_product.setdefault(place.ours, []).append(place)
    extra: dict[str, tuple[int, int, int]] = {}
    for places in by_product.values():
        narrow = tokens * rank * s  # A x, scaled: saved for B's gradient
        high = tokens * sum(place.height for place in places) * s
        low = tokens * places[0].width * s  # the gradient that comes back through A; before it, B's, scaled
        saved, forward, backward = extra.get(_group_of(places[0]), (0, 0, 0))
        extra[_group_of(places[0])] = (
            saved + narrow * len(places),
            max(forward, high * (1 if len(places) == 1 else 2) + 2 * narrow),
            max(backward, max(high, low) + 2 * narrow),
        )
    parts, frozen = [], tokens * _unkept(config)
    tile = min(config.d_model * config.d_ff * (2 if config.gated else 1), weight_shapes.PRODUCT_TILE) * s
    unpacked = (3 if packed == "nf4" else 2) * tile if packed else 0
    for part in work.parts:
        saved, forward, backward = extra.get(part.groups[-1], (0, 0, 0))
        saved -= frozen if part.groups[-1] != "embed" else 0
        fullest = part.forward if part.groups[-1] == "embed" else part.backward  # a frozen table has no gradient
        parts.append(
            dataclasses.replace(
                part,
                saved=part.saved + saved,
                forward=part.forward + forward + unpacked,
                backward=fullest + saved + backward + unpacked,
            )
        )
    head = batch.read * rank * s if _adapts_head(config, spec, scalar) else 0
    return dataclasses.replace(
        work, parts=tuple(parts), forward_head=work.forward_head + head, backward_head=work.backward_head + 2 * head
    )


def _wanted(config: DecoderConfig, spec: LoraSpec | None, scalar: bool) -> list[LoraTarget]:
    """The places that have an adapter; a critic or reward model has no head for one."""
    places = lora_targets_of(config) if spec else []
    return [place for place in places if spec and spec.wants(place) and not (scalar and place.ours == "")]


def _unkept(config: DecoderConfig) -> int:
    """Bytes per token that a block's norms would keep for gradients of their own weights."""
    c = config
    rms = 2 * c.d_model if c.norm == "rms" else 0
    return weight_shapes.FP32 * (rms + (c.head_dim * (c.num_heads + c.num_kv_heads) if c.qk_norm else 0))


def _adapts_head(config: DecoderConfig, spec: LoraSpec | None, scalar: bool) -> bool:
    return any(place.ours == "" for place in _wanted(config, spec, scalar))


def _group_of(place: LoraTarget) -> str:
    """The group of weights that its adapter belongs to."""
    if place.ours.startswith("blocks."):
        return ".".join(place.ours.split(".")[:2])
    return "last" if place.ours == "unproject" else "embed" if place.ours else "head"
