"""A decoder written as a GGUF file, or its adapters as llama.cpp's LoRA: what llama.cpp, Ollama and LM Studio run.

Tensors are made and written one at a time, so that a decoder on `meta` is read from its checkpoint as it is written.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.models import recipe
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families import FAMILIES, weights_of
from penstock.models.families.weights import Weight
from penstock.models.formats.architectures import (
    FREQUENCIES,
    architecture_of,
    check_written,
    llama3_divisors,
    settings_of,
)
from penstock.models.formats.gguf_file import package, stored_names, to_gguf
from penstock.models.formats.gguf_tokenizer import metadata_of
from penstock.models.lora import Adapter, adapters_of

GGUFType = Literal["f32", "f16", "q8_0"]
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
Q8_BLOCK = 32
"""Inputs that share a scale in q8_0."""
ALWAYS_FP32 = ("position_embd",)
"""Tables that llama.cpp adds to states in fp32."""


def write_model(
    decoder: Decoder, path: Path, kind: GGUFType, *, name: str, tokenizer: Any, ends: tuple[int, ...]
) -> list[str]:
    """Writes the whole model; `tokenizer` may be None. Returns lines for the user.

    Raises UserError for what llama.cpp has no place for, and for weights that do not fit into f16.
    """
    config = decoder.config
    try:
        architecture, settings = architecture_of(config.family), settings_of(config)
        frequencies = _frequencies(config)
        shapes = {stored: tuple(tensor.shape) for stored, tensor in _meta_tensors(decoder)}
        meta = {f"{architecture.name}.{key}": value for key, value in settings.items()}
        notes = check_written(config, {"general.architecture": architecture.name} | meta, shapes, frequencies)
    except ValueError as error:
        raise UserError(f"--format gguf: {error}.") from error
    meta |= {"general.type": "model", "general.name": name, "general.quantization_version": 2}
    meta["general.file_type"] = FILE_TYPES[kind]
    if tokenizer is None:
        meta["tokenizer.ggml.model"] = "none"
    else:
        of_tokenizer, more = metadata_of(tokenizer, config.vocab_size, ends)
        meta, notes = meta | of_tokenizer, notes + more
    kinds = {stored: _kind(stored, shape, kind) for stored, shape in shapes.items()}
    if narrow := sum(1 for stored in kinds if kind == "q8_0" and kinds[stored] == "F16"):
        notes.append(f"{narrow} tensors are f16: their rows are no multiple of {Q8_BLOCK}")
    tensors = {stored: (kinds[stored], shape) for stored, shape in shapes.items()}
    values = _tensors(decoder)
    if frequencies is not None:
        tensors[FREQUENCIES] = "F32", frequencies.shape
        values = _with_last(values, FREQUENCIES, torch.from_numpy(frequencies))
    _write(path, architecture.name, meta, tensors, values)
    return notes


def write_adapter(decoder: Decoder, path: Path, *, name: str) -> list[str]:
    """Writes the adapters alone, in f16. Returns lines for the user. Raises UserError for what llama.cpp cannot add."""
    config, adapters = decoder.config, adapters_of(decoder)
    assert decoder.adapted is not None
    if decoder.adapted.copies:
        raise UserError(
            "--lora-only: whole weights came with this adapter, which llama.cpp does not add; leave it out."
        )
    try:
        architecture = architecture_of(config.family)
    except ValueError as error:
        raise UserError(f"--format gguf: {error}.") from error
    stored, present = stored_names(config), {name for name, _ in _meta_tensors(decoder)}
    alpha = float(adapters[0].alpha)
    values: dict[str, Tensor] = {}
    for adapter in adapters:
        theirs = f"{adapter.target.theirs}.weight"
        if adapter.target.ours == "":
            theirs = FAMILIES[config.family].HEAD
        tensor = stored[theirs][0]
        if tensor not in present:
            raise UserError(f"--lora-only: {theirs} is tied to the token table, which has no adapter; leave it out.")
        a, b = _halves(adapter, theirs, config)
        # llama.cpp multiplies by alpha / rank, with one alpha for all
        values[f"{tensor}.lora_a"], values[f"{tensor}.lora_b"] = a, b * (adapter.scale * adapter.rank / alpha)
    meta = {"general.type": "adapter", "general.name": name, "adapter.type": "lora", "adapter.lora.alpha": alpha}
    tensors = {name: ("F32", tuple(value.shape)) for name, value in values.items()}
    _write(path, architecture.name, meta, tensors, iter(values.items()))
    return []


def _halves(adapter: Adapter, theirs: str, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """A and B of an adapter in fp32, with B's rows in the order of the file."""
    a, b = adapter.a.detach().float().cpu(), adapter.b.detach().float().cpu()
    if adapter.target.ours == "embed":
        return a.t(), b  # llama.cpp takes rows of A by token
    weight = adapter.target.weight
    if weight.layout != "stacked":
        return a, b
    whole = torch.zeros(sum(weight.heights(config)), b.shape[1])
    whole[adapter.target.start : adapter.target.start + adapter.target.height] = b
    return a, to_gguf(weight, whole, architecture_of(config.family), config)[theirs]


def _frequencies(config: DecoderConfig) -> np.ndarray | None:
    scaling = dict(config.rope_scaling)
    if scaling.pop("rope_type", None) != "llama3":
        return None
    return llama3_divisors(config.rope_theta, config.rotary_dim, **scaling)


def _kind(name: str, shape: tuple[int, ...], kind: GGUFType) -> str:
    if kind == "f32" or len(shape) == 1 or name.startswith(ALWAYS_FP32):
        return "F32"
    return "Q8_0" if kind == "q8_0" and shape[-1] % Q8_BLOCK == 0 else "F16"


def _lines(decoder: Decoder) -> Iterator[Weight]:
    parameters = dict(decoder.named_parameters())
    return (
        weight for weight in weights_of(FAMILIES[decoder.config.family], decoder.config) if weight.ours in parameters
    )


def _meta_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Names and shapes of what `_tensors` makes."""
    for weight in _lines(decoder):
        yield from _stored(decoder, weight, torch.empty_like(decoder.get_parameter(weight.ours), device="meta"))


def _tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, in fp32 on the CPU; weights on `meta` are read from their checkpoint."""
    with recipe.filling(decoder):
        for weight in _lines(decoder):
            ours = decoder.get_parameter(weight.ours).detach()
            if ours.is_meta:
                ours = torch.empty_like(ours, device="cpu")
                recipe.fill(decoder, {weight.ours: ours})
            yield from _stored(decoder, weight, ours.float().cpu())


def _stored(decoder: Decoder, weight: Weight, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
    names = stored_names(decoder.config)
    for theirs, tensor in to_gguf(weight, ours, architecture_of(decoder.config.family), decoder.config).items():
        if theirs not in names:
            raise ValueError(f"llama.cpp has no tensor for {theirs}")
        yield names[theirs][0], tensor


def _with_last(values: Iterator[tuple[str, Tensor]], name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield from values
    yield name, tensor


def _write(
    path: Path,
    architecture: str,
    meta: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    values: Iterator[tuple[str, Tensor]],
) -> None:
    """Writes metadata, the list of tensors (kind, shape), then each of them as it comes, in the same order."""
    gguf = package()
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in meta.items():
        add = next(add for kind, add in ADD.items() if isinstance(value, kind))
        getattr(writer, add)(key, value)
    for name, (kind, shape) in tensors.items():
        block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        size = int(np.prod(shape)) // block * nbytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, gguf.GGMLQuantizationType[kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in values:
            kind = tensors[name][0]
            array = np.ascontiguousarray(tensor.numpy())
            with np.errstate(over="ignore"):
                data = gguf.quantize(array, gguf.GGMLQuantizationType[kind])
            if not np.isfinite(data if kind == "F16" else array).all():
                raise UserError(f"{name}: has weights that are no numbers, or too large for f16; nothing is written.")
            writer.write_tensor_data(data)
    finally:
        writer.close()


ADD = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
"""How a value is added, the first kind that it is."""
