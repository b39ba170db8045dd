"""Files of weights, open: safetensors in one file or in shards, or pickles on request. Knows names and tensors."""

import dataclasses
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from penstock.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NAMES_OF_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Those that hold a weight as it is. Others hold a code, which its scales make a weight of."""


DEQUANTISE = {
    "fp8": "AutoModelForCausalLM.from_pretrained({!r}, quantization_config=FineGrainedFP8Config(dequantize=True))",
    "mxfp4": "AutoModelForCausalLM.from_pretrained({!r}, quantization_config=Mxfp4Config(dequantize=True))",
    "compressed-tensors": "AutoModelForCausalLM.from_pretrained({!r}, "
    "quantization_config=CompressedTensorsConfig(dequantize=True))",
}
"""How transformers gives a packed model its full weights, by quant_method."""
READ = ("bitsandbytes", "gguf")
"""Those that are read: packed ones (formats.bitsandbytes); full ones, which transformers had read from a GGUF file."""


def check_unpacked(hf: dict[str, Any], directory: Path) -> None:
    """Raises UserError, with the way to full weights, for a config.json that says that they are packed."""
    method = packed_by(hf)
    if method is None or method in READ:
        return
    if method == "mxfp4" and hf.get("model_type") == "gpt_oss":  # models.moe.mxfp4 reads them
        return
    call = DEQUANTISE.get(method)
    way = "take the model that it was made from"
    if call is not None:
        way += f", or write its full weights with transformers: {call.format(str(directory))}.save_pretrained('full')"
    raise UserError(
        f"{directory / 'config.json'}: quantization_config says that the weights are packed ({method}), and packed "
        f"files are not read here; {way}. To train on a packed base: --lora 16 --base-dtype nf4 (or int8) packs the "
        "full weights while it reads them. If the weights are full already, delete the key."
    )


def check_links(directory: Path) -> None:
    """Raises UserError for a link that leads out of a model's directory: what it names would be copied with the model.
    In a snapshot of the hub's cache, files are links to that model's blobs."""
    root = directory.resolve()
    home = root.parent.parent if root.parent.name == "snapshots" else root
    for path in sorted(directory.iterdir()):
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise UserError(
                f"{path}: is a link out of the model's directory, to {path.resolve()}; put a copy in its place, or "
                "give the directory that it leads to."
            )


def packed_by(hf: dict[str, Any]) -> str | None:
    """What packed the weights, by a config.json."""
    settings = hf.get("quantization_config") or hf.get("compression_config")
    if not settings:
        return None
    if isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return str(settings.get("quant_method") if isinstance(settings, dict) else settings)


@dataclasses.dataclass
class Weights:
    """An open checkpoint."""

    names: set[str]
    get: Callable[[str], Tensor]
    shape: Callable[[str], Sequence[int]]
    """Does not read the weight."""
    dtype: Callable[[str], str]
    """As safetensors writes it: F32, BF16, F8_E4M3, ..."""
    first: Callable[[str], Tensor]
    """The first row."""
    row: Callable[[str, int], Tensor] | None = None
    """A row, [1, ...], read alone. None: files of this kind are read whole."""
    left_out: int = 0
    """Weights of parts that are no text model; see families.multimodal."""
    packed: str = ""
    """What to say of weights that were packed; see formats.bitsandbytes."""

    def part(self, name: str, i: int) -> Tensor:
        """Row i of a weight, [1, ...]."""
        return self.get(name)[i : i + 1] if self.row is None else self.row(name, i)


def open_weights(directory: Path, allow_pickle: bool) -> Weights:
    """The weights of a model directory. Raises UserError for files that are missing, damaged or contradict an index."""
    if (directory / SINGLE).exists():
        handle = _safetensors(directory / SINGLE)
        return _weights_of_handles(dict.fromkeys(handle.keys(), handle))
    if (directory / INDEX).exists():
        weight_map = _weight_map(directory / INDEX)
        handles = {file: _safetensors(directory / file) for file in sorted(set(weight_map.values()))}
        names = {file: set(handle.keys()) for file, handle in handles.items()}
        for name, file in weight_map.items():
            if name not in names[file]:
                raise UserError(f"{directory / file}: the index names weight {name!r} in it and it is not there.")
        if unknown := sorted(set().union(*names.values()) - weight_map.keys()):
            raise UserError(
                f"{directory / INDEX}: does not name {len(unknown)} weights that its files hold: "
                f"{', '.join(unknown[:3])}; files and index belong to different models, fetch them again."
            )
        return _weights_of_handles({name: handles[file] for name, file in weight_map.items()})
    if not any((directory / name).exists() for name in (PICKLE, PICKLE_INDEX)):
        raise UserError(f"{directory}: has no {SINGLE} and no {INDEX}; is the download complete?")
    if not allow_pickle:
        raise UserError(
            f"{directory}: has only pickled weights (.bin); convert them to safetensors, or pass --allow-pickle "
            "to read them with torch.load(weights_only=True)."
        )
    files = [PICKLE] if (directory / PICKLE).exists() else sorted(set(_weight_map(directory / PICKLE_INDEX).values()))
    weights: dict[str, Tensor] = {}
    for path in (directory / file for file in files):
        try:
            weights |= torch.load(path, weights_only=True, map_location="cpu")
        except FileNotFoundError as error:
            raise UserError(
                f"{path}: the index names this file and it is missing; is the download complete?"
            ) from error
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise UserError(f"{path}: damaged, or holds more than weights; fetch it again.") from error
    return Weights(
        set(weights),
        weights.__getitem__,
        lambda name: weights[name].shape,
        lambda name: NAMES_OF_DTYPES.get(weights[name].dtype, str(weights[name].dtype)),
        lambda name: weights[name][:1],
    )


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path}: has no weight_map; fetch it again.")
    return weight_map


def _weights_of_handles(handles: dict[str, Any]) -> Weights:
    """Of open safetensors files, by weight."""
    return Weights(
        set(handles),
        lambda name: handles[name].get_tensor(name),
        lambda name: handles[name].get_slice(name).get_shape(),
        lambda name: handles[name].get_slice(name).get_dtype(),
        lambda name: (
            handles[name].get_slice(name)[:1]
            if handles[name].get_slice(name).get_shape()
            else handles[name].get_tensor(name)[None]
        ),
        lambda name, i: handles[name].get_slice(name)[i : i + 1],
    )


def _safetensors(path: Path) -> Any:  # safetensors has no public type for an open file
    try:
        return safetensors.safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise _missing(path) from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: damaged or cut short ({error}); fetch it again.") from error


def _missing(path: Path) -> UserError:
    return UserError(f"{path}: the index names this file and it is missing; is the download complete?")


DEEPEST = 50
"""Levels of lists and objects in a JSON file: those of models have fewer than ten."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for anything else, and for one so deep that whoever walks it would fail."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object.")
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        level = [part for value in level for part in _parts(value)]
    if level:
        raise UserError(f"{path}: lists and objects stand in each other more than {DEEPEST} deep; is it damaged?")
    return content


def _parts(value: Any) -> list[Any]:
    return [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
