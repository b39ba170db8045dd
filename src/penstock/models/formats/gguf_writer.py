"""A decoder written as a GGUF file, or its adapters as llama.cpp's LoRA: what llama.cpp, Ollama and LM Studio run.

Tensors are made and written one at a time, so that a decoder on `meta` is read from its checkpoint as it is written.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
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
from penstock.models.families.multimodal import text_name
from penstock.models.families.weights import Weight
from penstock.models.formats.architectures import (
    FREQUENCIES,
    LONGROPE,
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
ALWAYS_FP32 = re.compile(r"position_embd.*|blk\.\d+\.ffn_gate_inp\.weight|.*\.bias")
"""What llama.cpp computes in fp32: tables and biases that it adds, routers."""


def write_model(
    decoder: Decoder, path: Path, kind: GGUFType, *, name: str, tokenizer: Any, ends: tuple[int, ...]
) -> list[str]:
    """Writes the whole model; `tokenizer` may be None. Returns lines for the user.

    Raises UserError for what llama.cpp has no place for, and for weights that do not fit into f16.
    """
    config = decoder.config
    try:
        architecture, settings = architecture_of(config.family), settings_of(config)
        tables = _tables(config)
        shapes = {stored: tuple(tensor.shape) for stored, tensor in _meta_tensors(decoder)}
        meta = {f"{architecture.name}.{key}": value for key, value in settings.items()}
        notes = check_written(config, {"general.architecture": architecture.name} | meta, shapes, tables)
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
    tensors |= {stored: ("F32", table.shape) for stored, table in tables.items()}
    last = ((stored, torch.from_numpy(table)) for stored, table in tables.items())
    _write(path, architecture.name, meta, tensors, itertools.chain(_tensors(decoder), last))
    return notes


def write_adapter(decoder: Decoder, path: Path, *, name: str) -> list[str]:
    """Writes the adapters alone, in f32. Returns lines for the user. Raises UserError for what llama.cpp cannot add."""
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
    present = {name for name, _ in _meta_tensors(decoder)}
    alpha = float(adapters[0].alpha)
    halves: dict[str, list[Tensor]] = {}
    for adapter in adapters:
        for tensor, (a, b) in _halves(adapter, config).items():
            if tensor not in present:
                raise UserError(f"--lora-only: {tensor} is the token table's, which has no adapter; leave it out.")
            # llama.cpp multiplies by alpha / rank, with one alpha for all
            halves.setdefault(f"{tensor}.lora_a", []).append(a)
            halves.setdefault(f"{tensor}.lora_b", []).append(b * (adapter.scale * adapter.rank / alpha))
    values = {name: torch.stack(parts) if "_exps." in name else parts[0] for name, parts in halves.items()}
    meta = {"general.type": "adapter", "general.name": name, "adapter.type": "lora", "adapter.lora.alpha": alpha}
    tensors = {name: ("F32", tuple(value.shape)) for name, value in values.items()}
    _write(path, architecture.name, meta, tensors, iter(values.items()))
    return []


def _halves(adapter: Adapter, config: DecoderConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of an adapter in fp32, by the tensor that they are added to, with B's rows in the order of the file.

    An expert's gate and up have one adapter here, and two there, with the same A.
    """
    a, b = adapter.a.detach().float().cpu(), adapter.b.detach().float().cpu()
    stored, target = stored_names(config), adapter.target
    theirs = FAMILIES[config.family].HEAD if target.ours == "" else f"{target.theirs}.weight"
    theirs = text_name(theirs) or theirs if config.part_of else theirs
    if target.ours == "embed":
        return {stored[theirs].names[0]: (a.t(), b)}  # llama.cpp takes rows of A by token
    whole = b
    if target.weight.layout == "stacked" and target.expert is None:
        whole = torch.zeros(sum(target.weight.heights(config)), b.shape[1])
        whole[target.start : target.start + target.height] = b
    rows = to_gguf(target.weight, whole, architecture_of(config.family), config, stored)
    wanted = rows if target.expert is not None else stored[theirs].names
    return {tensor: (a, rows[tensor]) for tensor in wanted}


def _tables(config: DecoderConfig) -> dict[str, np.ndarray]:
    """The tensors that hold rope scaling, [rotary_dim / 2] fp32."""
    scaling = dict(config.rope_scaling)
    kind = scaling.pop("rope_type", None)
    if kind == "longrope":
        return {name: np.array(scaling[key], dtype=np.float32) for key, name in LONGROPE.items()}
    return {FREQUENCIES: llama3_divisors(config.rope_theta, config.rotary_dim, **scaling)} if kind == "llama3" else {}


def _kind(name: str, shape: tuple[int, ...], kind: GGUFType) -> str:
    if kind == "f32" or len(shape) == 1 or ALWAYS_FP32.fullmatch(name):
        return "F32"
    return "Q8_0" if kind == "q8_0" and shape[-1] % Q8_BLOCK == 0 else "F16"


def _lines(decoder: Decoder) -> Iterator[Weight]:
    parameters = dict(decoder.named_parameters())
    return (
        weight for weight in weights_of(FAMILIES[decoder.config.family], decoder.config) if weight.ours in parameters
    )


def _meta_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Names and shapes of what `_tensors` makes."""
    weights = _lines(decoder)
    return _stored(decoder, ((w, torch.empty_like(decoder.get_parameter(w.ours), device="meta")) for w in weights))


def _tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, in fp32 on the CPU; weights on `meta` are read from their checkpoint."""

    def read() -> Iterator[tuple[Weight, Tensor]]:
        for weight in _lines(decoder):
            ours = decoder.get_parameter(weight.ours).detach()
            if ours.is_meta:
                ours = torch.empty_like(ours, device="cpu")
                recipe.fill(decoder, {weight.ours: ours})
            yield weight, ours.float().cpu()

    with recipe.filling(decoder):
        yield from _stored(decoder, read())


def _stored(decoder: Decoder, weights: Iterable[tuple[Weight, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file. A block's experts, which stand behind each other, are one tensor."""
    config = decoder.config
    architecture, stored = architecture_of(config.family), stored_names(config)
    experts: dict[str, list[Tensor]] = {}
    for weight, ours in weights:
        tensors = to_gguf(weight, ours, architecture, config, stored)
        if ".experts." not in weight.ours:
            yield from tensors.items()
            continue
        for name, tensor in tensors.items():
            experts.setdefault(name, []).append(tensor)
            if len(experts[name]) == config.num_experts:
                yield name, torch.stack(experts.pop(name))


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
