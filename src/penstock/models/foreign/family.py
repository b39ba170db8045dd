"""A config of transformers as a family: what families/*.py say of ours, learned from the model that it builds.

Names in files are transformers' own, after its conversions (experts that files hold one by one are one weight in its
model): `transformers.conversion_mapping` says how, in both directions.
"""

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.models.config import DecoderConfig, Foreign, ForeignWeight
from penstock.models.families import FAMILIES
from penstock.models.families.weights import Weight
from penstock.models.foreign.anatomy import Anatomy, take_apart
from penstock.models.foreign.build import as_text, skeleton
from penstock.models.foreign.decoder import ForeignDecoder
from penstock.models.linear import Linear

Path = Literal["native", "foreign", "refused"]
UNBOUNDED = 1 << 20
"""Tokens of context of a model that names no limit: state-space layers have none."""


class Family:
    """What penstock knows of one config.json of transformers. Make it with `of`, which keeps the last ones."""

    def __init__(self, text: str) -> None:
        """Raises ValueError for a model that is no chain of layers, or whose files cannot be read."""
        hf = json.loads(text)
        self.model = skeleton(hf, torch.float32)
        config = _config(hf, take_apart(self.model), text)
        self.decoder = ForeignDecoder(config, dtype=torch.float32, device="meta")
        self.config = dataclasses.replace(config, foreign=_described(text, self.decoder))
        self._reading = self._conversions()
        self.PREFIX = f"{self.model.base_model_prefix}."
        self.CAUSAL_LM, self.CLASSIFIER = type(self.model).__name__, _classifier(hf["model_type"])
        weights = dict(self.decoder.named_parameters()) | {"head": self.decoder.head_weight}
        self.weights = [self._weight(name, weight) for name, weight in weights.items()]
        self.HEAD = self.weights[list(weights).index("head")].theirs[0]
        used = {self.decoder.theirs[name] for name in weights}
        tied = [name for name, _ in self.model.named_parameters(remove_duplicate=False) if name not in used]
        computed = [name for name, _ in self.model.named_buffers()]
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        self.UNUSED = (*(f"^{re.escape(name)}$" for name in (*tied, *computed)), *ignored)
        """Patterns of names in files that the model does without."""

    @staticmethod
    def of(hf: dict[str, Any]) -> "Family":
        """The family of a config.json. Raises ValueError, which says why, for one that cannot be used."""
        return _family(as_text(hf))

    def config_from_hf(self, hf: dict[str, Any]) -> DecoderConfig:
        """config.json -> DecoderConfig."""
        return self.config

    def hf_config(self, config: DecoderConfig) -> dict[str, Any]:
        """DecoderConfig -> config.json."""
        assert config.foreign is not None
        return json.loads(config.foreign.text) | {"tie_word_embeddings": config.tied}

    # --- names and tensors in files -----------------------------------------------------------------------------------

    def _conversions(self) -> list[Any]:
        """transformers' conversions from files to the model; those that are for older files alone do not write."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter

        writing = get_model_conversion_mapping(self.model, add_legacy=False)
        self.model._weight_conversions = [each for each in writing if not isinstance(each, PrefixChange)]
        for each in writing:
            if isinstance(each, WeightConverter) and len(each.target_patterns) > 1:
                raise ValueError(f"its files hold {each.target_patterns} in one tensor, which is not read")
        return get_model_conversion_mapping(self.model, add_legacy=True)

    def to_files(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that a weight of transformers' model is in its files."""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, {name: weight})

    def from_files(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        """The weight of transformers' model that these tensors are."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        renamings = [each for each in self._reading if isinstance(each, WeightRenaming)]
        converters = [each for each in self._reading if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        mapping: Any = None
        for key in sorted(tensors, key=dot_natural_key):
            renamed, pattern = rename_source_key(key, renamings, converters)
            mapping = mapping or copy.deepcopy(by_pattern[str(pattern)])
            mapping.add_tensor(renamed, key, pattern, tensors[key])
        made = mapping.convert(name, model=self.model, config=self.model.config)[name]
        return made[0] if isinstance(made, list) else made

    def _weight(self, ours: str, weight: Tensor) -> Weight:
        theirs = self.decoder.theirs[ours]
        made = self.to_files(theirs, torch.empty_like(weight, device="meta"))
        if [each.shape for each in made.values()] == [weight.shape]:
            return Weight(ours, tuple(made))
        return Converted(ours, tuple(made), family=self)

    def stored(self, names: Set[str]) -> dict[str, str]:
        """Names in older files of weights, by the names that they have today."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [each for each in self._reading if isinstance(each, WeightRenaming)]
        converters = [each for each in self._reading if isinstance(each, WeightConverter)]
        today = {self.decoder.theirs[weight.ours]: weight.theirs[0] for weight in self.weights}
        shapes = dict.fromkeys(today, "")
        older = {}
        for name in names:
            renamed, pattern = rename_source_key(name, renamings, converters, self.PREFIX[:-1], shapes)
            if pattern is None and renamed in today and today[renamed] not in names:
                older[today[renamed]] = name
        return older


@functools.lru_cache(maxsize=8)
def _family(text: str) -> Family:
    return Family(text)


@dataclass(frozen=True)
class Converted(Weight):
    """A weight that files hold in another form."""

    family: Any = field(default=None, compare=False, repr=False)

    def read(self, parts: list[Tensor], config: DecoderConfig) -> Tensor:
        """The weight from the tensors of the files."""
        return self.family.from_files(self.family.decoder.theirs[self.ours], dict(zip(self.theirs, parts, strict=True)))

    def write(self, ours: Tensor, config: DecoderConfig) -> dict[str, Tensor]:
        """The tensors of the files from the weight."""
        return self.family.to_files(self.family.decoder.theirs[self.ours], ours)


def family_in(hf: dict[str, Any], where: str) -> Any:
    """The family of a config.json: a module of models.families, or a Family. Raises UserError, which says why, where
    neither can be had."""
    if hf.get("model_type") in FAMILIES:
        return FAMILIES[hf["model_type"]]
    try:
        return Family.of(hf)
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from error


def path_of(hf: dict[str, Any]) -> tuple[Path, str]:
    """The path that a config.json takes, and why: `native` is our decoder, `foreign` transformers' own layers."""
    model_type = hf.get("model_type")
    if model_type in FAMILIES:
        return "native", "a family of penstock's own decoder"
    try:
        Family.of(hf)
    except ValueError as error:
        return "refused", str(error)
    return "foreign", (
        f"penstock has no decoder for {model_type}, so transformers' own layers are its blocks: it trains under every "
        "strategy, and answers through transformers' cache, slower"
    )


def family_of(config: DecoderConfig) -> Any:
    """The family of a decoder that exists."""
    return _family(config.foreign.text) if config.foreign else FAMILIES[config.family]


def _described(text: str, decoder: ForeignDecoder) -> Foreign:
    """What is known of the decoder without building it."""
    narrow = dict(ForeignDecoder(decoder.config, dtype=torch.bfloat16, device="meta").named_parameters())
    weights = {
        name: ForeignWeight(name, tuple(weight.shape), weight.requires_grad, narrow[name].dtype == torch.float32)
        for name, weight in decoder.named_parameters()
    }
    products = tuple(
        (name, decoder.theirs[f"{name}.weight"].removesuffix(".weight"))
        for name, module in decoder.named_modules()
        if isinstance(module, Linear) and name.startswith("blocks.") and not f"{name}.".startswith(decoder.shared)
    )
    groups = tuple((group, tuple(weights[name] for name in names)) for group, names in decoder.groups())
    return Foreign(text, groups, tuple(part.groups for part in decoder.parts()), products)


def _config(hf: dict[str, Any], anatomy: Anatomy, text: str) -> DecoderConfig:
    """What penstock asks of a decoder's shape. Attention's numbers are as the config has them, for the plan's FLOPs."""
    theirs = anatomy.model.config.get_text_config(decoder=True)

    def number(*names: str, default: int) -> int:
        values = (getattr(theirs, name, None) for name in names)
        return next((value for value in values if isinstance(value, int) and value > 0), default)

    weight: Tensor = anatomy.head.weight  # type: ignore[assignment]
    vocab_size, width = weight.shape
    heads = number("num_attention_heads", "num_heads", "n_head", default=1)
    factor = anatomy.state_scale * anatomy.logit_scale
    logits: dict[str, Any] = {"logit_divisor": 1 / factor} if factor != 1 else {}
    logits |= {"logit_softcap": anatomy.logit_cap} if anatomy.logit_cap else {}
    return DecoderConfig(
        family=hf["model_type"],
        vocab_size=vocab_size,
        d_model=width,
        num_layers=len(anatomy.layers),
        num_heads=heads,
        num_kv_heads=min(number("num_key_value_heads", "num_kv_heads", default=heads), heads),
        head_dim=number("head_dim", default=max(width // heads, 1)),
        d_ff=number("intermediate_size", "ffn_dim", "n_inner", default=4 * width),
        max_length=number("max_position_embeddings", "n_positions", "max_seq_len", "context_length", default=UNBOUNDED),
        position="rotary",
        tied=anatomy.head.weight is anatomy.embed.weight,
        foreign=Foreign(text, (), (), ()),
        **logits,
    )


def _classifier(model_type: str) -> str:
    """transformers' class with a score head; where it has none, the name that it would have."""
    from transformers.models.auto import modeling_auto as auto

    names = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return names.get(model_type, causal.replace("ForCausalLM", "ForSequenceClassification"))
