"""Adapters in peft's format: adapter_config.json, adapter_model.safetensors; penstock.json holds facts that peft has no
place for: the hash of the base's weights, a score's scale."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from penstock.errors import UserError
from penstock.models import safetensors_writer
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families import weights_of
from penstock.models.families.multimodal import whole_name
from penstock.models.families.weights import Weight
from penstock.models.foreign.family import family_of
from penstock.models.lora import Adapter, adapters_of
from penstock.models.lora_targets import EXPERT_PARAMETERS, LoraSpec, lora_targets_of
from penstock.models.safetensors_writer import Entry
from penstock.models.weight_files import read_json

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "penstock.json"
SCORE = "base_model.model.score.weight"
PREFIX = "base_model.model."
READ = {
    "peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "target_modules", "exclude_modules",
    "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save", "bias",
    "init_lora_weights", "target_parameters",
}  # fmt: skip
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core",
    "runtime_config", "qalora_group_size", "eva_config", "loftq_config", "merge_weights", "unsloth_fixed",
}  # fmt: skip
"""Keys of adapter_config.json that change no logit: notes, dropout, first values that leave the base as it is, and how
the file was made. Every key that is in neither set must be off."""
FIRST_VALUES = (None, True, False, "gaussian", "orthogonal", "eva")
"""Of init_lora_weights, those that leave the base's weights alone. peft applies the others again whenever it loads."""
MERGE_FIRST = (
    "merge it with peft first: peft.AutoPeftModelForCausalLM.from_pretrained({!r}).merge_and_unload()"
    ".save_pretrained('merged')"
)


def is_adapter_directory(directory: Path) -> bool:
    """Whether it holds an adapter, of peft's or ours."""
    return (directory / CONFIG).exists()


@dataclass(frozen=True)
class AdapterFile:
    """Adapters in a directory. Equal ones hold the same weights."""

    directory: Path

    def check(self, decoder: Decoder) -> None:
        """Raises UserError for adapters that were trained on another base, or that do not fit this one."""
        assert decoder.adapted is not None
        trained_on, digest = read_extras(self.directory)[1].get("base_digest"), decoder.adapted.digest
        if trained_on and digest and trained_on != digest:
            raise UserError(
                f"{self.directory}: this adapter was trained on another base than {decoder.adapted.base} "
                f"(digest {trained_on[:12]}, not {digest[:12]}); give the base it was trained on."
            )
        path = self.directory / WEIGHTS
        with _open(self.directory) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        needed = {name: shape for adapter in adapters_of(decoder) for name, shape in _shapes(adapter).values()}
        if missing := sorted(needed.keys() - shapes.keys()):
            raise UserError(f"{path}: {len(missing)} adapter weights are missing: {', '.join(missing[:3])}.")
        plain = set(plain_weights(self.directory, decoder.config).values())
        if unknown := sorted(shapes.keys() - needed.keys() - plain - {SCORE}):
            raise UserError(f"{path}: {len(unknown)} weights belong nowhere: {', '.join(unknown[:3])}.")
        if SCORE in shapes:
            needed[SCORE] = (1, decoder.head_weight.shape[1])  # one score
        for name, shape in needed.items():
            if shapes[name] != shape:
                raise UserError(
                    f"{path}: {name} has shape {shapes[name]} and this base needs {shape}; the adapter belongs to "
                    "another base."
                )

    def holds_more(self, config: DecoderConfig) -> bool:
        """Whether there is more in the file than low-rank additions: whole weights, biases or a score head."""
        return bool(plain_weights(self.directory, config) or read_extras(self.directory)[0])

    def fill(self, decoder: nn.Module, weights: dict[str, Tensor]) -> None:
        """Reads these adapter weights of the decoder, by our names."""
        with _open(self.directory) as file:
            for name, weight in weights.items():
                module, _, half = name.rpartition(".")
                adapter = decoder.get_submodule(module)
                assert isinstance(adapter, Adapter)
                tensor = file.get_tensor(_shapes(adapter)[half][0])
                if adapter.target.expert is not None:
                    tensor = _of_expert(adapter, tensor, half)
                weight.copy_(_our_rows(adapter, tensor) if half == "b" else tensor)


def dtype_of(directory: Path) -> torch.dtype:
    """The dtype of an adapter's weights."""
    with _open(directory) as file:
        name = next(name for name in file.keys() if name != SCORE)  # noqa: SIM118
        return file.get_tensor(name).dtype


def base_of(source: str) -> str:
    """The base that an adapter's directory names; any other source is returned as it is."""
    return read_spec(Path(source))[1] or source if is_adapter_directory(Path(source)) else source


def read_spec(directory: Path) -> tuple[LoraSpec, str]:
    """The settings in adapter_config.json, and the base that it names. Raises UserError for unsupported settings."""
    path = directory / CONFIG
    if not path.exists():
        raise UserError(f"{directory}: is no adapter, it has no {CONFIG}; a whole model is given as the model itself.")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {config.get('peft_type')!r} is not read here, only LORA.")
    _check_keys(path, config)
    targets = config.get("target_modules") or ()
    names = {
        "targets": targets, "excluded": config.get("exclude_modules") or (),
        "parameters": config.get("target_parameters") or (),
    }  # fmt: skip
    names = {name: value if isinstance(value, str) else tuple(sorted(value)) for name, value in names.items()}
    if isinstance(names["excluded"], tuple):
        names["excluded"] += tuple(config.get("modules_to_save") or ())
    layers = config.get("layers_to_transform")
    try:
        spec = LoraSpec(
            int(config.get("r", 8)),
            float(config.get("lora_alpha", 8)),
            rslora=bool(config.get("use_rslora")),
            ranks=tuple((config.get("rank_pattern") or {}).items()),
            alphas=tuple((config.get("alpha_pattern") or {}).items()),
            layers=() if layers is None else (layers,) if isinstance(layers, int) else tuple(layers),
            **names,
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {error}.") from error
    return spec, str(config.get("base_model_name_or_path") or "")


def _check_keys(path: Path, config: dict[str, Any]) -> None:
    """Raises UserError for the first key that changes what the adapter computes in a way that we do not follow."""
    others = {key: value for key, value in config.items() if key not in READ | WITHOUT_EFFECT and value}
    if config.get("init_lora_weights") not in FIRST_VALUES:
        others["init_lora_weights"] = config["init_lora_weights"]
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        others["bias"] = config["bias"]
    if config.get("revision") not in (None, "main"):
        raise UserError(
            f"{path}: revision = {config['revision']!r} of the base is not fetched here; fetch it, give that directory "
            "as the model and this one as --adapter, without the key."
        )
    if not (config.get("target_modules") or config.get("target_parameters")):
        raise UserError(f"{path}: target_modules is empty, so it is unknown what is adapted; export the adapter again.")
    if unread := [name for name in config.get("target_parameters") or () if "experts" not in name]:
        others["target_parameters"] = unread
    for key, value in others.items():
        raise UserError(f"{path}: {key} = {value!r} is not read here; {MERGE_FIRST.format(str(path.parent))}.")


def plain_weights(directory: Path, config: DecoderConfig) -> dict[str, str]:
    """Weights of the base that the file has a copy of: their names in the base, and in the file. peft writes the
    modules of modules_to_save, trained biases, and token tables and heads that have adapters. Raises UserError for
    products of blocks, which are no adapter's."""
    with _open(directory) as file:
        keys = set(file.keys())
    copies: dict[str, str] = {}
    for weight in weights_of(family_of(config), config):
        for name in weight.theirs:
            module, kind = _module(config, name)
            key = next((k for k in (f"{PREFIX}{module}{part}.{kind}" for part in ("", ".base_layer")) if k in keys), "")
            if key and kind == "weight" and weight.ours.startswith("blocks.") and "norm" not in weight.ours:
                raise UserError(
                    f"{directory / WEIGHTS}: has a whole weight in an adapter's place, {key}; of modules_to_save only "
                    f"embeddings, heads and norms are read; {MERGE_FIRST.format(str(directory))}."
                )
            if key:
                copies[name] = key
    return copies


def open_weights(directory: Path) -> Any:
    """The file of weights, open."""
    return _open(directory)


def read_extras(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The score head, if there is one, under its name in a model directory; and the facts in penstock.json."""
    with _open(directory) as file:
        names = set(file.keys())
        extras = {"score.weight": file.get_tensor(SCORE)} if SCORE in names else {}
    path = directory / OURS
    return extras, read_json(path) if path.exists() else {}


def save(
    decoder: Decoder, directory: Path, *, score: Tensor | None = None, facts: dict[str, Any] | None = None
) -> None:
    """Writes what `peft.PeftModel.from_pretrained` loads; `score` [1, D] as peft keeps a classifier's head. `facts` go
    to penstock.json. Where ranks share the weights all of them call it, through `pretrained.save`."""
    adapted = decoder.adapted
    assert adapted is not None
    directory.mkdir(parents=True, exist_ok=True)
    adapters = adapters_of(decoder)
    alpha = adapted.spec.alpha if adapted.spec.alpha is not None else 2 * adapted.spec.rank
    copies = [key.rpartition(".")[::2] for _, _, key in _copies(decoder, score)]
    whole = sorted(module for module, kind in copies if kind == "weight" and not module.endswith(".base_layer"))
    biased = any(kind == "bias" and module not in whole for module, kind in copies)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if score is None else "SEQ_CLS",
        "base_model_name_or_path": adapted.base,
        "r": adapted.spec.rank,
        "lora_alpha": alpha,
        "rank_pattern": {a.target.theirs: a.rank for a in adapters if a.rank != adapted.spec.rank},
        "alpha_pattern": {a.target.theirs: a.alpha for a in adapters if a.alpha != alpha},
        "lora_dropout": 0.0,
        "bias": "all" if biased else "none",
        "use_rslora": adapted.spec.rslora,
        "target_modules": _targets(decoder),
        "target_parameters": _parameters(decoder),
        "modules_to_save": [*whole, *([] if score is None else ["score"])] or None,
        "fan_in_fan_out": any(adapter.target.weight.layout == "transposed" for adapter in adapters),
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    facts = {"base_digest": adapted.digest, **(facts or {})}
    (directory / OURS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    safetensors_writer.write(directory / WEIGHTS, entries(decoder, score), tensors(decoder, score), {"format": "pt"})


def entries(decoder: Decoder, score: Tensor | None) -> Iterator[Entry]:
    """The names, dtypes and shapes in the file."""
    if score is not None:
        yield Entry(SCORE, score.dtype, tuple(score.shape))
    for weight, name, key in _copies(decoder, score):
        ours = torch.empty_like(decoder.get_parameter(weight.ours), device="meta", dtype=decoder.feed.dtype)
        tensor = weight.write(ours, decoder.config)[name]
        yield Entry(PREFIX + key, tensor.dtype, tuple(tensor.shape))
    written: set[str] = set()
    for adapter in adapters_of(decoder):
        for name, shape in _shapes(adapter).values():
            if name not in written:  # all experts' adapters of a parameter are one tensor
                yield Entry(name, decoder.feed.dtype or adapter.a.dtype, shape)
            written.add(name)


def tensors(decoder: Decoder, score: Tensor | None) -> Iterator[Tensor]:
    """The tensors of `entries`, on the CPU."""
    if score is not None:
        yield score.detach().cpu()
    group_of = {name: group for group, names in decoder.groups() for name in names}
    for weight, name, _ in _copies(decoder, score):
        with decoder.feed.visit(group_of[weight.ours]):
            ours = decoder.get_parameter(weight.ours).detach()
            copy = weight.write(ours, decoder.config)[name].clone(memory_format=torch.contiguous_format).cpu()
        yield copy
    alike: dict[str, list[tuple[str, Adapter]]] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, Adapter):
            alike.setdefault(_shapes(module)["a"][0], []).append((name, module))
    for adapters in alike.values():
        pairs = []
        for name, adapter in adapters:
            with decoder.feed.visit(group_of[f"{name}.a"]):
                pairs.append((adapter.a.detach().clone().cpu(), _their_rows(adapter, adapter.b.detach()).clone().cpu()))
        yield torch.cat([a for a, _ in pairs])
        yield torch.stack([b for _, b in pairs], dim=-1).flatten(1)  # each rank of all experts, then the next rank


def _copies(decoder: Decoder, score: Tensor | None) -> Iterator[tuple[Weight, str, str]]:
    """The base's weights that the file holds too, with the base's name of each and peft's, without its prefix."""
    assert decoder.adapted is not None
    family = family_of(decoder.config)
    adapted = {adapter.target.theirs for adapter in adapters_of(decoder)}
    for weight in weights_of(family, decoder.config) if decoder.adapted.copies else ():
        for name in weight.theirs:
            if name in decoder.adapted.copies and not (weight.ours == "head" and score is not None):
                module, kind = _module(decoder.config, name)
                yield weight, name, f"{module}{'.base_layer' * (module in adapted)}.{kind}"


def _module(config: DecoderConfig, name: str) -> tuple[str, str]:
    """transformers' module of a weight, and what it is of it: GPT-NeoX's head has another name in files."""
    family, (module, _, kind) = family_of(config), name.rpartition(".")
    module = getattr(family, "HEAD_MODULE", module) if name == family.HEAD else module
    return whole_name(config.part_of, module), kind


def _targets(decoder: Decoder) -> list[str] | str:
    """The names of the adapted modules for peft: their endings if those match no other module, else a regular
    expression. Parts that see or hear have modules of the same endings."""
    adapted = {adapter.target.theirs for adapter in adapters_of(decoder) if adapter.target.expert is None}
    ends = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    matched = {target.theirs for target in lora_targets_of(decoder.config) if target.theirs.rsplit(".", 1)[-1] in ends}
    if matched != adapted or (decoder.config.part_of and "lm_head" in ends):
        return "|".join(re.escape(name) for name in sorted(adapted))
    inside = re.escape(whole_name(decoder.config.part_of, "model."))
    return rf"{inside}(.*\.)?({'|'.join(ends)})" if decoder.config.part_of else ends


def _parameters(decoder: Decoder) -> list[str] | None:
    """peft's names of the adapted parameters of experts."""
    names = {adapter.target.theirs for adapter in adapters_of(decoder) if adapter.target.expert is not None}
    return sorted(names) or None


def _of_expert(adapter: Adapter, tensor: Tensor, half: str) -> Tensor:
    """One expert's half of an adapter of all of them: A's experts lie one below the other, B's ranks side by side."""
    expert, count = adapter.target.expert, adapter.config.num_experts
    if half == "a":
        return tensor.view(count, adapter.rank, -1)[expert]
    return tensor.view(len(tensor), adapter.rank, count)[:, :, expert]


def _shapes(adapter: Adapter) -> dict[str, tuple[str, tuple[int, ...]]]:
    """By our half, a or b: peft's name and the shape."""
    if adapter.target.expert is not None:
        return _shapes_of_experts(adapter)
    name = "lora_embedding_{}" if adapter.target.ours == "embed" else "lora_{}.weight"
    full = f"base_model.model.{adapter.target.theirs}.{name}"
    return {"a": (full.format("A"), tuple(adapter.a.shape)), "b": (full.format("B"), tuple(adapter.b.shape))}


def _shapes_of_experts(adapter: Adapter) -> dict[str, tuple[str, tuple[int, ...]]]:
    """peft wraps the module of the experts once per adapted parameter, and the second wraps the first: of two, the
    first one's adapter is its base_layer's."""
    module, _, parameter = adapter.target.theirs.rpartition(".")
    (rank, width), (height, _), count = adapter.a.shape, adapter.b.shape, adapter.config.num_experts
    inner = ".base_layer" * (parameter == EXPERT_PARAMETERS["up"] and adapter.wrapped)
    full = f"base_model.model.{module}{inner}.lora_{{}}.weight"
    return {"a": (full.format("A"), (rank * count, width)), "b": (full.format("B"), (height, rank * count))}


def _our_rows(adapter: Adapter, b: Tensor) -> Tensor:
    """B's rows in our order: BLOOM and GPT-NeoX interleave q, k and v by head, gpt-oss an expert's gate and up."""
    weight = adapter.target.weight
    if weight.layout == "alternating":
        return b.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    return weight.read([b], adapter.config) if weight.layout == "interleaved" else b


def _their_rows(adapter: Adapter, b: Tensor) -> Tensor:
    weight = adapter.target.weight
    if weight.layout == "alternating":
        return b.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
    return next(iter(weight.write(b, adapter.config).values())) if weight.layout == "interleaved" else b


def _open(directory: Path) -> Any:
    try:
        return safetensors.safe_open(directory / WEIGHTS, framework="pt")
    except (FileNotFoundError, safetensors.SafetensorError) as error:
        way = "fetch or export the adapter again"
        if (directory / "adapter_model.bin").exists():
            way = "adapter_model.bin is a pickle, which is not read: load it with peft and save it again"
        raise UserError(f"{directory / WEIGHTS}: cannot be read ({error}); {way}.") from error
