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
from penstock.models.decoder import Decoder
from penstock.models.lora import Adapter, adapters_of
from penstock.models.lora_targets import ALL_LINEAR, LoraSpec, lora_targets_of
from penstock.models.safetensors_writer import Entry

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "penstock.json"
SCORE = "base_model.model.score.weight"
OFF: tuple[Any, ...] = (None, {}, False)
SUPPORTED = {
    "use_dora": False, "use_qalora": False, "lora_bias": False, "bias": "none", "rank_pattern": None,
    "alpha_pattern": None, "layers_to_transform": None, "layer_replication": None, "trainable_token_indices": None,
    "target_parameters": None,
}  # fmt: skip
"""Keys of adapter_config.json that change the computation, and the only value of each that is supported."""


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
        tables = {f"base_model.model.{target.theirs}" for target in lora_targets_of(decoder.config) if target.table}
        copies = {f"{table}{end}" for table in tables for end in (".weight", ".base_layer.weight")}  # of the base's
        if unknown := sorted(shapes.keys() - needed.keys() - copies - {SCORE}):
            raise UserError(f"{path}: {len(unknown)} weights belong nowhere: {', '.join(unknown[:3])}.")
        for name, shape in needed.items():
            if shapes[name] != shape:
                raise UserError(
                    f"{path}: {name} has shape {shapes[name]} and this base needs {shape}; the adapter belongs to "
                    "another base."
                )

    def fill(self, decoder: nn.Module, weights: dict[str, Tensor]) -> None:
        """Reads these adapter weights of the decoder, by our names."""
        with _open(self.directory) as file:
            for name, weight in weights.items():
                module, _, half = name.rpartition(".")
                adapter = decoder.get_submodule(module)
                assert isinstance(adapter, Adapter)
                tensor = file.get_tensor(_shapes(adapter)[half][0])
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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}.") from error
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {config.get('peft_type')!r} is not read here, only LORA.")
    for key, supported in SUPPORTED.items():
        value = config.get(key, supported)
        if value != supported and not (value in OFF and supported in OFF):
            raise UserError(f"{path}: {key} = {value!r} is not read here; merge that adapter with peft first.")
    if set(config.get("modules_to_save") or ()) - {"score"}:
        raise UserError(f"{path}: modules_to_save {config['modules_to_save']} is not read here, only score.")
    targets = config.get("target_modules") or ALL_LINEAR
    targets = targets if isinstance(targets, str) else tuple(sorted(targets))
    spec = LoraSpec(int(config["r"]), float(config["lora_alpha"]), targets, bool(config.get("use_rslora", False)))
    return spec, str(config.get("base_model_name_or_path") or "")


def read_extras(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The score head, if there is one, under its name in a model directory; and the facts in penstock.json."""
    with _open(directory) as file:
        names = set(file.keys())
        extras = {"score.weight": file.get_tensor(SCORE)} if SCORE in names else {}
    path = directory / OURS
    return extras, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(
    decoder: Decoder, directory: Path, *, score: Tensor | None = None, facts: dict[str, Any] | None = None
) -> None:
    """Writes what `peft.PeftModel.from_pretrained` loads; `score` [1, D] as peft keeps a classifier's head. `facts` go
    to penstock.json. Where ranks share the weights all of them call it, through `pretrained.save`."""
    adapted = decoder.adapted
    assert adapted is not None
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if score is None else "SEQ_CLS",
        "base_model_name_or_path": adapted.base,
        "r": adapted.spec.rank,
        "lora_alpha": adapted.spec.alpha if adapted.spec.alpha is not None else 2 * adapted.spec.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": adapted.spec.rslora,
        "target_modules": _targets(decoder),
        "modules_to_save": None if score is None else ["score"],
        "fan_in_fan_out": any(adapter.target.weight.layout == "transposed" for adapter in adapters_of(decoder)),
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
    for adapter in adapters_of(decoder):
        for name, shape in _shapes(adapter).values():
            yield Entry(name, adapter.a.dtype, shape)


def tensors(decoder: Decoder, score: Tensor | None) -> Iterator[Tensor]:
    """The tensors of `entries`, on the CPU."""
    if score is not None:
        yield score.detach().cpu()
    group_of = {name: group for group, names in decoder.groups() for name in names}
    adapters = [(name, module) for name, module in decoder.named_modules() if isinstance(module, Adapter)]
    for name, adapter in adapters:
        with decoder.feed.visit(group_of[f"{name}.a"]):
            pair = adapter.a.detach().clone().cpu(), _their_rows(adapter, adapter.b.detach()).clone().cpu()
        yield from pair


def _targets(decoder: Decoder) -> list[str] | str:
    """The names of the adapted modules for peft: their endings if those match no other module, else a regular
    expression."""
    adapted = {adapter.target.theirs for adapter in adapters_of(decoder)}
    ends = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    matched = {target.theirs for target in lora_targets_of(decoder.config) if target.theirs.rsplit(".", 1)[-1] in ends}
    return ends if matched == adapted else "|".join(re.escape(name) for name in sorted(adapted))


def _shapes(adapter: Adapter) -> dict[str, tuple[str, tuple[int, ...]]]:
    """By our half, a or b: peft's name and the shape."""
    name = "lora_embedding_{}" if adapter.target.ours == "embed" else "lora_{}.weight"
    full = f"base_model.model.{adapter.target.theirs}.{name}"
    return {"a": (full.format("A"), tuple(adapter.a.shape)), "b": (full.format("B"), tuple(adapter.b.shape))}


def _our_rows(adapter: Adapter, b: Tensor) -> Tensor:
    """B's rows in our order: BLOOM and GPT-NeoX interleave q, k and v by head."""
    weight = adapter.target.weight
    return weight.read([b], adapter.config) if weight.layout == "interleaved" else b


def _their_rows(adapter: Adapter, b: Tensor) -> Tensor:
    weight = adapter.target.weight
    return next(iter(weight.write(b, adapter.config).values())) if weight.layout == "interleaved" else b


def _open(directory: Path) -> Any:
    try:
        return safetensors.safe_open(directory / WEIGHTS, framework="pt")
    except (FileNotFoundError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{directory / WEIGHTS}: cannot be read ({error}); fetch or export the adapter again."
        ) from error
