"""GGUF files read: as the small directory that every reader of models takes, and their weights, full, by Hugging Face's
names.

config.json and the tokenizer are written once per file, into the cache; weights are read from the file itself,
dequantised one at a time by the gguf package. See `architectures` for settings, `gguf_tokenizer` for the tokenizer.
"""

import functools
import hashlib
import json
import re
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.kernels.machine import cache_directory
from penstock.models.config import DecoderConfig
from penstock.models.families import FAMILIES, weights_of
from penstock.models.families.weights import Weight
from penstock.models.formats.architectures import (
    FREQUENCIES,
    TABLES,
    Architecture,
    architecture_named,
    architecture_of,
    config_json,
)
from penstock.models.formats.gguf_tokenizer import save_tokenizer
from penstock.models.weight_files import Weights

SPECIAL = {"bos": "bos", "pad": "padding"}
OURS = ("transposed", "interleaved")
"""Layouts of weights that a GGUF file holds as we have them, not as Hugging Face does."""
NUMBER = re.compile(r"\.experts\.(\d+)\.")
"""Of an expert, in the names of files that hold each of them alone."""
SUFFIX, STAMP = ".gguf", "gguf.json"
WHOLE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that are read as they are. All others become fp32."""


class GGUFFile:
    """An open file: its metadata, and its tensors by name."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is no GGUF, that is cut short, or of types that are not known."""
        package()
        try:
            self.meta, self.tensors = _parsed(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
        except (ValueError, KeyError, IndexError, OverflowError, TypeError, RecursionError, struct.error) as error:
            text = " ".join(str(error).split())
            raise UserError(f"{path}: is no GGUF file, or is damaged ({text}); fetch it again.") from error
        self.path = path

    def shape(self, name: str) -> tuple[int, ...]:
        """As torch writes it: the last dimension is the one that lies together."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def dtype(self, name: str) -> str:
        """As safetensors writes it."""
        kind = self.tensors[name].tensor_type.name
        return kind if kind in WHOLE else "F32"

    def tensor(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Some rows of it, dequantised where it is quantised."""
        stored = self.tensors[name]
        kind, data = stored.tensor_type.name, np.ascontiguousarray(stored.data[rows])
        if kind in WHOLE:
            values = torch.from_numpy(data.view(np.uint8).reshape(-1).copy()).view(WHOLE[kind])
        else:
            values = torch.from_numpy(package().dequantize(data, stored.tensor_type))
        return values.view(-1, *self.shape(name)[1:])


def _parsed(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and gguf's tensors: its reader takes 10 us for each of 100,000 tokens, and never stops in some damaged
    files."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _build_fields(self, offs: int, count: int) -> int:
            self.meta: dict[str, Any] = {}
            data = self.data.data  # a memoryview
            for _ in range(int(count)):
                key, offs = _value(data, offs, STRING)
                (kind,), offs = _numbers(data, offs, "I", 1)
                self.meta[key], offs = _value(data, offs, kind)
            self.alignment = self.meta.get("general.alignment", self.alignment)
            return offs

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            array = super()._get(offset, dtype, count, override_order)
            if len(array) < count:
                raise ValueError(f"it ends at byte {len(self.data)}, before its contents do")
            return array

    reader = Reader(path)
    return reader.meta, {tensor.name: tensor for tensor in reader.tensors}


NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
"""Kinds of values in the metadata; of numbers, as struct names them."""


def _numbers(data: memoryview, start: int, kind: str, count: int) -> tuple[list[Any], int]:
    end = start + count * struct.calcsize(f"<{kind}")
    if end > len(data):
        raise ValueError(f"it ends at byte {len(data)}, before its contents do")
    return list(struct.unpack_from(f"<{count}{kind}", data, start)), end


def _value(data: memoryview, start: int, kind: int) -> tuple[Any, int]:
    """A value of the metadata, and where the next thing starts."""
    if kind in NUMBERS:
        (number,), end = _numbers(data, start, NUMBERS[kind], 1)
        return number, end
    if kind == STRING:
        (size,), start = _numbers(data, start, "Q", 1)
        if size > len(data) - start:
            raise ValueError(f"it ends at byte {len(data)}, before its contents do")
        return str(data[start : start + size], "utf-8"), start + size
    if kind != ARRAY:
        raise ValueError(f"a value of kind {kind}")
    (inner,), start = _numbers(data, start, "I", 1)
    (count,), start = _numbers(data, start, "Q", 1)
    if inner in NUMBERS:
        return _numbers(data, start, NUMBERS[inner], count)
    values = []
    for _ in range(count):
        value, start = _value(data, start, inner)
        values.append(value)
    return values, start


def package() -> Any:
    """The gguf package. Raises UserError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: pip install 'penstock[gguf]'.") from error
    return gguf


def local_directory(source: str | Path) -> Path:
    """A GGUF file as a model directory, in the cache; any other address as it is."""
    path = Path(source)
    return _unpacked(path) if path.suffix == SUFFIX and path.is_file() else path


def _unpacked(path: Path) -> Path:
    stat = path.stat()
    stamp = {"file": str(path.resolve()), "bytes": stat.st_size, "changed": stat.st_mtime_ns, "reader": _version()}
    key = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:12]
    directory = cache_directory() / "gguf" / f"{path.name}-{key}"
    if (directory / STAMP).exists():
        return directory
    file = open_file(path)
    try:
        for made in (cache_directory(), directory.parent):  # compiled code lies beside: kernels.compile
            made.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
            fresh = Path(temporary) / "model"
            fresh.mkdir()
            _save_config(file, fresh)
            save_tokenizer(file.meta, fresh, str(path))
            (fresh / STAMP).write_text(json.dumps(stamp), encoding="utf-8")
            if not directory.exists():  # whole or not at all: ranks may do this side by side
                fresh.rename(directory)
    except OSError as error:
        if not (directory / STAMP).exists():
            raise UserError(f"{directory}: cannot be written ({error.strerror}); set XDG_CACHE_HOME.") from error
    return directory


@functools.cache
def _version() -> str:
    """Changes with this code, so that no directory of an older one is used."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@functools.lru_cache(maxsize=4)
def _open(path: Path, changed: int) -> GGUFFile:
    return GGUFFile(path)


def open_file(path: Path) -> GGUFFile:
    """The file, whose metadata is parsed once."""
    return _open(path, path.stat().st_mtime_ns)


def _save_config(file: GGUFFile, directory: Path) -> None:
    shapes = {name: file.shape(name) for name in file.tensors}
    try:
        if "token_embd.weight" not in shapes:
            raise ValueError("token_embd.weight is missing; is it the first part of a model, or an adapter?")
        hf = config_json(file.meta, shapes, {name: file.tensor(name).numpy() for name in TABLES if name in shapes})
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{file.path}: {error}.") from error
    except KeyError as error:
        raise UserError(f"{file.path}: needs the setting {error} and does not have it.") from error
    hf |= {f"{name}_token_id": file.meta.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    ends = [file.meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    hf["eos_token_id"] = list(dict.fromkeys(token for token in ends if token is not None)) or None
    (directory / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def open_weights(directory: Path) -> Weights:
    """The weights of a directory that `local_directory` made."""
    path = Path(json.loads((directory / STAMP).read_text(encoding="utf-8"))["file"])
    if not path.exists():
        raise UserError(f"{path}: this GGUF file is gone.")
    file = open_file(path)
    hf = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    architecture, config = architecture_named(file.meta), FAMILIES[hf["model_type"]].config_from_hf(hf)
    stored = stored_names(config)
    named = {theirs: each for theirs, each in stored.items() if each.is_in(file, config)}
    used = {name for each in named.values() for name in each.names}
    used |= set(TABLES) if architecture.name == "phi3" else {FREQUENCIES}
    named |= {name: Stored((name,), Weight("", (name,))) for name in file.tensors if name not in used}

    def theirs_of(name: str, tensor: Tensor) -> Tensor:
        return to_theirs(name, tensor, named[name].weight, architecture, config)

    def row(name: str, i: int) -> Tensor:
        if named[name].weight.expert is None:
            return get(name)[i : i + 1]
        ours = torch.cat([file.tensor(part, slice(i, i + 1))[0] for part in named[name].names])
        return named[name].weight.write(ours, config)[name]

    def get(name: str) -> Tensor:
        if named[name].weight.expert is not None:
            return torch.cat([row(name, i) for i in range(file.shape(named[name].names[0])[0])])
        expert, tensor = named[name].row, named[name].names[0]
        whole = file.tensor(tensor) if expert is None else file.tensor(tensor, slice(expert, expert + 1))[0]
        return theirs_of(name, whole)

    def shape(name: str) -> tuple[int, ...]:
        count, *sizes = file.shape(named[name].names[0])
        if named[name].weight.expert is not None:
            ours = torch.empty(sizes[0] * len(named[name].names), *sizes[1:], device="meta")
            return (count, *named[name].weight.write(ours, config)[name].shape[1:])
        stored = torch.empty([count, *sizes] if named[name].row is None else sizes, device="meta")
        try:
            return tuple(theirs_of(name, stored).shape)
        except RuntimeError:  # it does not split into heads
            return tuple(stored.shape)

    def first(name: str) -> Tensor:
        is_own = named[name].row is None and named[name].weight.layout not in (*OURS, "expert", "alternating")
        return file.tensor(named[name].names[0], slice(1)) if is_own else row(name, 0)

    return Weights(set(named), get, shape, lambda name: file.dtype(named[name].names[0]), first, row)


@dataclass(frozen=True)
class Stored:
    """Where a GGUF file holds a weight of Hugging Face's. Example: Stored(("blk.0.ffn_up_exps.weight",), weight, 3)."""

    names: tuple[str, ...]
    """The tensors: two where Hugging Face has gate and up of all experts in one."""
    weight: Weight
    row: int | None = None
    """Of the tensor, where that holds all experts and Hugging Face's weight is one expert's."""

    def is_in(self, file: GGUFFile, config: DecoderConfig) -> bool:
        """Whether the file has it, for as many experts as the config says."""
        if not all(name in file.tensors for name in self.names):
            return False
        return self.row is None or file.shape(self.names[0])[0] == config.num_experts


@functools.lru_cache(maxsize=4)
def stored_names(config: DecoderConfig) -> dict[str, Stored]:
    """By Hugging Face's name of a weight: where a GGUF file holds it, and our line about it."""
    gguf, family = package(), FAMILIES[config.family]
    names_of_kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(names_of_kinds[architecture_of(config.family).name], config.num_layers)
    stored = {}
    for weight in weights_of(family, config):
        for theirs in weight.theirs:
            number = NUMBER.search(theirs)
            module, kind = _module(theirs, weight)
            parts = [module.replace("gate_up", part) for part in ("gate", "up")]
            modules = parts if weight.layout == "alternating" else [module]
            tensors = [names.get_name(stem) or names.get_name(stem.removeprefix(family.PREFIX)) for stem in modules]
            if None not in tensors:
                full = tuple(f"{tensor}.{kind}" for tensor in tensors)
                stored[theirs] = Stored(full, weight, int(number[1]) if number else None)
    return stored


def _module(theirs: str, weight: Weight) -> tuple[str, str]:
    """Hugging Face's name of a weight as gguf's table has it: the module of all experts, and weight or bias."""
    name = NUMBER.sub(".experts.", theirs)
    if weight.expert is not None and name.endswith("_bias"):
        return name.removesuffix("_bias"), "bias"
    stem, _, kind = name.rpartition(".")
    return (stem, kind) if kind in ("weight", "bias") else (name, "weight")


def to_theirs(name: str, tensor: Tensor, weight: Weight, architecture: Architecture, config: DecoderConfig) -> Tensor:
    """A tensor of a GGUF file as Hugging Face stores it."""
    if weight.layout in OURS:  # it is stored as we have it
        return weight.write(tensor, config)[name]
    if architecture.norm_shift and "norm" in weight.ours:
        return tensor - architecture.norm_shift
    if heads := _turning(name, weight, architecture, config):
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return tensor


def to_gguf(
    weight: Weight, ours: Tensor, architecture: Architecture, config: DecoderConfig, stored: Mapping[str, Stored]
) -> dict[str, Tensor]:
    """Our tensor as a GGUF file stores it, by its names there; of experts, one row of those. Raises ValueError for a
    weight that llama.cpp has no tensor for."""
    if unknown := [name for name in weight.theirs if name not in stored]:
        raise ValueError(f"llama.cpp has no tensor for {unknown[0]}")
    if weight.layout in OURS or weight.expert is not None:
        names = stored[weight.theirs[0]].names
        return dict(zip(names, ours.chunk(len(names)), strict=True))
    if architecture.norm_shift and "norm" in weight.ours:
        return {stored[weight.theirs[0]].names[0]: ours + architecture.norm_shift}
    tensors = weight.write(ours, config)
    for name, tensor in tensors.items():
        if heads := _turning(name, weight, architecture, config):
            tensors[name] = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return {stored[name].names[0]: tensor for name, tensor in tensors.items()}


def _turning(name: str, weight: Weight, architecture: Architecture, config: DecoderConfig) -> int:
    """The heads of queries or keys whose rows stand in another order there; 0: in the same."""
    if not (architecture.turned and weight.layout == "stacked" and len(weight.theirs) == 3):
        return 0
    return (config.num_heads, config.num_kv_heads, 0)[weight.theirs.index(name)]
