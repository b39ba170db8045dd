"""The modules of a decoder that adapters can be added to, and the adapters' shapes. Pure: no torch here."""

import dataclasses
import functools
import math
import re
from collections.abc import Hashable
from dataclasses import dataclass

from penstock.memory.chunks import Weight as Sized
from penstock.models import weight_shapes
from penstock.models.config import DecoderConfig, Foreign
from penstock.models.families import family_of, weights_of
from penstock.models.families.multimodal import whole_name
from penstock.models.families.weights import Weight
from penstock.models.weight_shapes import BaseDtype

ALL_LINEAR = "all-linear"
EXPERT_PARAMETERS = {"up": "gate_up_proj", "down": "down_proj"}
"""transformers' names of the weights of all experts of a block."""


@dataclass(frozen=True)
class LoraSpec:
    """Which products have adapters, and of which rank. Example: LoraSpec(16, targets=("q_proj", "v_proj"))."""

    rank: int = 16
    alpha: float | None = None
    """None: twice the rank."""
    targets: tuple[str, ...] | str = ALL_LINEAR
    """Endings of Hugging Face's module names (c_attn, q_proj, lm_head, ...), or one regular expression over a whole
    name, as peft reads them. all-linear: every product but the head's."""
    rslora: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    """By the end of a module's name or a regular expression over it: ranks and alphas other than the first two."""
    excluded: tuple[str, ...] | str = ()
    """Modules without an adapter although `targets` names them, written as those are."""
    layers: tuple[int, ...] = ()
    """The blocks that have adapters. Empty: all."""
    parameters: tuple[str, ...] = ()
    """peft's target_parameters: endings of the names of experts' weights, on which `excluded` and `layers` do not act.
    """

    def rank_of(self, target: "LoraTarget") -> int:
        """The rank of this target's adapter."""
        return int(_by_pattern(self.ranks, target.theirs, self.rank))

    def alpha_of(self, target: "LoraTarget") -> float:
        """What this target's low-rank product is multiplied by, before it is divided by (the root of) the rank."""
        return _by_pattern(self.alphas, target.theirs, 2 * self.rank if self.alpha is None else self.alpha)

    def scale_of(self, target: "LoraTarget") -> float:
        """The factor of this target's low-rank product."""
        rank = self.rank_of(target)
        return self.alpha_of(target) / (math.sqrt(rank) if self.rslora else rank)

    def wants(self, target: "LoraTarget") -> bool:
        """Whether this target has an adapter: by peft's rules."""
        if self.parameters and target.expert is not None:
            return _named(self.parameters, target.theirs)
        if _named(self.excluded, target.theirs):
            return False
        if self.layers:
            number = re.search(r"\.(\d+)\.", target.theirs)
            if number is None or int(number[1]) not in self.layers:
                return False
        return not target.table if self.targets == ALL_LINEAR else _named(self.targets, target.theirs)


def _named(names: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{ending}") for ending in names)


def _by_pattern(patterns: tuple[tuple[str, float], ...], module: str, default: float) -> float:
    return next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)), default)


@dataclass(frozen=True)
class LoraTarget:
    """One Hugging Face module that an adapter can be added to."""

    ours: str
    """Our module that holds it; empty: the decoder itself, for its head."""
    theirs: str
    """Its name there: in the whole model, if this is the text model of one that also sees or hears."""
    start: int
    height: int
    """Its rows of our product's output."""
    width: int
    table: bool
    """The token table or the head."""
    weight: Weight
    expert: int | None = None
    """The expert whose part of `theirs` it is: peft adapts the weights of all experts of a block as one parameter."""


@functools.lru_cache(4)
def lora_targets_of(config: DecoderConfig) -> tuple[LoraTarget, ...]:
    """All of a decoder's, in the order of the program."""
    targets = _of_foreign(config.foreign) if config.foreign else _of_ours(config)
    return tuple(dataclasses.replace(target, theirs=whole_name(config.part_of, target.theirs)) for target in targets)


def _of_ours(config: DecoderConfig) -> list[LoraTarget]:
    family, targets = family_of(config.family, config.family), list[LoraTarget]()
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
            targets.append(LoraTarget("embed", names[0], 0, table[1], table[0], True, weight))
        elif weight.ours == "head":
            name = getattr(family, "HEAD_MODULE", names[0])
            targets.append(LoraTarget("", name, 0, table[0], table[1], True, weight))
        elif kind != "weight" or len(shape := shape_of.get(weight.ours, ())) != 2 or ours.endswith(".router"):
            continue
        elif ".experts." in ours:
            _, layer, _, expert, product = ours.split(".")
            theirs = f"{family.PREFIX}{family.EXPERT_MODULE.format(layer)}.{EXPERT_PARAMETERS[product]}"
            targets.append(LoraTarget(ours, theirs, 0, shape[0], shape[1], False, weight, int(expert)))
        elif not (config.num_experts and ours.endswith((".up", ".down"))):  # peft takes their names for the experts'
            heights = weight.heights(config) if weight.layout == "stacked" else [shape[0]]
            for i, name in enumerate(names):
                targets.append(LoraTarget(ours, name, sum(heights[:i]), heights[i], shape[1], False, weight))
    return targets


def _of_foreign(foreign: Foreign) -> list[LoraTarget]:
    """The linear layers of transformers' own layers."""
    shape_of = {weight.name: weight.shape for _, weights in foreign.groups for weight in weights}
    targets = []
    for ours, theirs in foreign.products:
        height, width = shape_of[f"{ours}.weight"]
        targets.append(
            LoraTarget(ours, theirs, 0, height, width, False, Weight(f"{ours}.weight", (f"{theirs}.weight",)))
        )
    return targets


def groups_of(
    config: DecoderConfig, dtype: str, spec: LoraSpec | None, *, trained: bool, scalar: bool, base: Hashable = "base",
    packed: BaseDtype | None = None,
) -> list[tuple[str, list[Sized]]]:  # fmt: skip
    """`weight_shapes.groups_of` of a decoder with adapters, which alone (and a score head) are trained; without a spec,
    of a frozen decoder.

    base: identifies the frozen weights, which models of the same base share. packed: the dtype of the blocks' products.
    """
    groups: dict[str, list[Sized]] = {}
    kept = _kept_whole(config)
    for group, weights in weight_shapes.groups_of(config, dtype, trained=False, scalar=scalar):
        for weight in weights:
            score = weight.name == "score"
            weight = dataclasses.replace(weight, trained=trained and score, recipe=None if score else base)
            packable = ".router." not in weight.name and weight.name not in kept
            if packed and group.startswith("blocks.") and len(weight.shape) == 2 and packable:
                names = (weight.name, weight.name.replace(".weight", ".scales"))
                halves = zip(names, weight_shapes.packed_shapes(packed, *weight.shape), strict=True)
                parts = [
                    dataclasses.replace(weight, name=name, shape=shape, dtype=kept) for name, (shape, kept) in halves
                ]
            else:
                parts = [weight]
            groups.setdefault(group, []).extend(parts)
    adapters: dict[str, int] = {}
    for target in adapted_targets(config, spec, scalar):
        assert spec is not None
        i = adapters[target.ours] = adapters.get(target.ours, -1) + 1
        name = f"decoder.{target.ours}.lora.{i}".replace("..", ".")
        members = groups.setdefault(group_of(target), [])
        members.append(Sized(f"{name}.a", (spec.rank_of(target), target.width), dtype, trained))
        members.append(Sized(f"{name}.b", (target.height, spec.rank_of(target)), dtype, trained))
    return list(groups.items())


def _kept_whole(config: DecoderConfig) -> set[str]:
    """The tables of transformers' own layers that are no product: they are not packed."""
    if config.foreign is None:
        return set()
    products = {f"{ours}.weight" for ours, _ in config.foreign.products}
    return {f"decoder.{w.name}" for _, weights in config.foreign.groups for w in weights if w.name not in products}


def adapted_targets(config: DecoderConfig, spec: LoraSpec | None, scalar: bool) -> list[LoraTarget]:
    """The targets that have an adapter; a critic or reward model has no language-model head."""
    if spec is None:
        return []
    targets = lora_targets_of(config)
    return [target for target in targets if spec.wants(target) and not (scalar and target.ours == "")]


def group_of(target: LoraTarget) -> str:
    """The group of weights that its adapter belongs to."""
    if target.ours.startswith("blocks."):
        return weight_shapes.group_in_block(target.ours)
    return "last" if target.ours == "unproject" else "embed" if target.ours else "head"
