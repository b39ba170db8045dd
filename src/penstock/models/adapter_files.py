"""Adapters in peft's format: adapter_config.json, adapter_model.safetensors, and what only we know in penstock.json."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.models import safetensors_writer
from penstock.models.decoder import Decoder
from penstock.models.lora import Adapter, adapters_of
from penstock.models.lora_targets import ALL_LINEAR, LoraSpec, lora_targets_of
from penstock.models.safetensors_writer import Entry

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "penstock.json"
SCORE = "base_model.model.score.weight"
REFUSED = {
    "use_dora": False, "use_qalora": False, "lora_bias": False, "bias": "none", "rank_pattern": None,
    "alpha_pattern": None, "layers_to_transform": None, "layer_replication": None, "trainable_token_indices": None,
    "target_parameters": None,
}  # fmt: skip
"""Keys of adapter_config.json that change what is computed, and the one value of each that is read here."""


def is_adapter_directory(directory: Path) -> bool:
    """Whether peft, or we, wrote an adapter there."""
    return (directory / CONFIG).exists()


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's directory. Equal ones hold the same weights."""

    directory: Path

    def check(self, decoder: Decoder) -> None:
        """Raises UserError for adapters that were trained on another base, or that do not fit this one."""
        assert decoder.adapted is not None
        said, here = read_extras(self.directory)[1].get("base_digest"), decoder.adapted.digest
        if said and here and said != here:
            raise UserError(
                f"{self.directory}: this adapter was trained on another base than {decoder.adapted.base} "
                f"(digest {said[:12]}, not {here[:12]}); give the base it was trained on."
            )
        with _open(self.directory) as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        needed = {name: shape for adapter in adapters_of(decoder) for name, shape in _shapes(adapter)}
        if missing := sorted(needed.keys() - there.keys()):
            raise UserError(
                f"{self.directory / WEIGHTS}: {len(missing)} adapter weights are missing: {', '.join(missing[:3])}."
            )
        tables = {f"base_model.model.{place.theirs}" for place in lora_targets_of(decoder.config) if place.table}
        copies = {f"{table}{end}" for table in tables for end in (".weight", ".base_layer.weight")}  # of the base's own
        if unknown := sorted(there.keys() - needed.keys() - copies - {SCORE}):
            raise UserError(
                f"{self.directory / WEIGHTS}: {len(unknown)} weights belong nowhere: {', '.join(unknown[:3])}."
            )
        for name, shape in needed.items():
            if there[name] != shape:
                raise UserError(
                    f"{self.directory / WEIGHTS}: {name} has shape {there[name]} and this base needs {shape}; "
                    "the adapter belongs to another base."
                )

    def fill(self, decoder: Decoder, weights: dict[str, Tensor]) -> None:
        """Reads these adapter weights of the decoder, by our names."""
        with _open(self.directory) as file:
            for name, weight in weights.items():
                module, _, which = name.rpartition(".")
                adapter = decoder.get_submodule(module)
                assert isinstance(adapter, Adapter)
                tensor = file.get_tensor(_shapes(adapter)[which == "b"][0])
                weight.copy_(_rows(adapter, tensor, back=False) if which == "b" else tensor)


def dtype_of(directory: Path) -> torch.dtype:
    """What an adapter's weights are."""
    with _open(directory) as file:
        name = next(name for name in file.keys() if name != SCORE)  # noqa: SIM118
        return file.get_tensor(name).dtype


def base_of(source: str) -> str:
    """The base that an adapter's directory names; anything else is its own."""
    return read_spec(Path(source))[1] or source if is_adapter_directory(Path(source)) else source


def read_spec(directory: Path) -> tuple[LoraSpec, str]:
    """What adapter_config.json says, and the base it names. Raises UserError for what we do not compute."""
    path = directory / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}.") from error
    if found.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {found.get('peft_type')!r} is not read here, only LORA.")
    for key, value in REFUSED.items():
        if (
            key in found
            and found[key] != value
            and not (found[key] in (None, {}, False) and value in (None, {}, False))
        ):
            raise UserError(f"{path}: {key} = {found[key]!r} is not read here; merge that adapter with peft first.")
    if set(found.get("modules_to_save") or ()) - {"score"}:
        raise UserError(f"{path}: modules_to_save {found['modules_to_save']} is not read here, only score.")
    targets = found.get("target_modules") or ALL_LINEAR
    spec = LoraSpec(
        int(found["r"]), float(found["lora_alpha"]), targets if isinstance(targets, str) else tuple(sorted(targets)),
        bool(found.get("use_rslora", False)),
    )  # fmt: skip
    return spec, str(found.get("base_model_name_or_path") or "")


def read_extras(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The score head, if there is one, under its name in a model directory; and what penstock.json says."""
    with _open(directory) as file:
        names = set(file.keys())
        extras = {"score.weight": file.get_tensor(SCORE)} if SCORE in names else {}
    said = json.loads((directory / OURS).read_text(encoding="utf-8")) if (directory / OURS).exists() else {}
    return extras, said


def save(decoder: Decoder, directory: Path, *, score: Tensor | None = None, said: dict[str, Any] | None = None) -> None:
    """Writes what `peft.PeftModel.from_pretrained` loads; `score` [1, D] as peft keeps a classifier's head. `said` goes
    to penstock.json. Where ranks share the weights all of them call it through `pretrained.save`."""
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
        "fan_in_fan_out": any(adapter.place.weight.layout == "transposed" for adapter in adapters_of(decoder)),
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    said = {"base_digest": adapted.digest, **(said or {})}
    (directory / OURS).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    safetensors_writer.write(directory / WEIGHTS, entries(decoder, score), tensors(decoder, score), {"format": "pt"})


def entries(decoder: Decoder, score: Tensor | None) -> Iterator[Entry]:
    """What the file holds."""
    if score is not None:
        yield Entry(SCORE, score.dtype, tuple(score.shape))
    for adapter in adapters_of(decoder):
        for name, shape in _shapes(adapter):
            yield Entry(name, adapter.a.dtype, shape)


def tensors(decoder: Decoder, score: Tensor | None) -> Iterator[Tensor]:
    """The tensors of `entries`, on the CPU."""
    if score is not None:
        yield score.detach().cpu()
    group_of = {name: group for group, names in decoder.groups() for name in names}
    names = [name for name, module in decoder.named_modules() if isinstance(module, Adapter)]
    for name in names:
        with decoder.feed.visit(group_of[f"{name}.a"]):
            adapter = decoder.get_submodule(name)
            assert isinstance(adapter, Adapter)
            pair = adapter.a.detach().clone().cpu(), _rows(adapter, adapter.b.detach(), back=True).clone().cpu()
        yield from pair


def _targets(decoder: Decoder) -> list[str] | str:
    """The adapted modules as peft can find them: by ending where that is exact, else by a regular expression."""
    mine = {adapter.place.theirs for adapter in adapters_of(decoder)}
    ends = sorted({name.rsplit(".", 1)[-1] for name in mine})
    found = {place.theirs for place in lora_targets_of(decoder.config) if place.theirs.rsplit(".", 1)[-1] in ends}
    return ends if found == mine else "|".join(re.escape(name) for name in sorted(mine))


def _shapes(adapter: Adapter) -> list[tuple[str, tuple[int, ...]]]:
    full = f"base_model.model.{adapter.place.theirs}"
    shapes = tuple(adapter.a.shape), tuple(adapter.b.shape)
    if adapter.place.ours == "embed":
        return [(f"{full}.lora_embedding_A", shapes[0]), (f"{full}.lora_embedding_B", shapes[1])]
    return [(f"{full}.lora_A.weight", shapes[0]), (f"{full}.lora_B.weight", shapes[1])]


def _rows(adapter: Adapter, b: Tensor, *, back: bool) -> Tensor:
    """B's rows in our order (BLOOM and GPT-NeoX interleave q, k and v by head), or `back` in theirs."""
    config, weight = adapter.config, adapter.place.weight
    if weight.layout != "interleaved":
        return b
    return next(iter(weight.write(b, config).values())) if back else weight.read([b], config)


def _open(directory: Path) -> Any:
    try:
        return safetensors.safe_open(directory / WEIGHTS, framework="pt")
    except (FileNotFoundError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{directory / WEIGHTS}: cannot be read ({error}); fetch or export the adapter again."
        ) from error
