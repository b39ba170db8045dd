"""Weights in and out: Hugging Face directories (or hub ids), safetensors, sharded or not, tensor by tensor.

Reading goes straight into a decoder's parameters, one tensor at a time; writing splits large models into shards with
the usual index. A source's generation_config is never applied (PPO.md 4).
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.errors import UserError
from penstock.models.decoder import Decoder, DecoderConfig
from penstock.models.families import family_of
from penstock.models.families.weights import Weight

INDEX, SINGLE, CLASSIFIER_HEAD = "model.safetensors.index.json", "model.safetensors", "score.weight"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
IGNORED = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
"""Buffers that old checkpoints carry and no weight."""


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
) -> tuple[Decoder, dict[str, Tensor]]:
    """A decoder from a directory or hub id, and the checkpoint's weights that are not the decoder's.

    Those extras are what a head needs: `score.weight` [1, D] of a *ForSequenceClassification checkpoint, else nothing.
    Raises UserError for an unknown family, missing files, and missing, unexpected or mis-shaped weights, by name.
    """
    directory = _local(source)
    hf = read_config(directory)
    family = family_of(hf.get("model_type"), str(directory / "config.json"))
    try:
        config = _with_hf(family.config_from_hf(hf), hf)
    except KeyError as error:
        raise UserError(f"{directory / 'config.json'}: needs {error} and does not have it.") from error
    decoder = Decoder(config, dtype=dtype, device="meta")
    home = device if device is not None else torch.get_default_device()
    decoder.to_empty(device=home)
    names, get = _open(directory, allow_pickle)

    def find(name: str) -> Tensor:
        # The base model alone saves no prefix; a classifier's or LM's checkpoint has it.
        for candidate in (family.PREFIX + name, name, _without_first(family.PREFIX) + name):
            if candidate in names:
                used.add(candidate)
                return get(candidate)
        raise UserError(f"{directory}: weight {family.PREFIX + name!r} is missing; is the checkpoint complete?")

    used: set[str] = set()
    with torch.no_grad():
        parameters = dict(decoder.named_parameters())
        for weight in _weights(family, config):
            if weight.ours in parameters:
                _fill(parameters.pop(weight.ours), weight.read(find, config), weight, directory)
        if "head" in parameters:
            if family.HEAD in names:
                used.add(family.HEAD)
                head = Weight("head", (family.HEAD,))
                _fill(parameters.pop("head"), get(family.HEAD), head, directory)
            elif CLASSIFIER_HEAD in names:  # a reward model needs no language-model head: tie it to nothing
                parameters.pop("head").zero_()
    if parameters:
        raise UserError(f"{directory}: weights are missing for {', '.join(sorted(parameters))}.")
    rest = {name for name in names - used if not name.endswith(IGNORED)} - {family.HEAD}
    extras = {name: get(name) for name in rest if name == CLASSIFIER_HEAD}
    if unexpected := sorted(rest - set(extras)):
        shown = ", ".join(unexpected[:5])
        raise UserError(f"{directory}: {len(unexpected)} weights belong to no {config.family} model, as {shown}.")
    return decoder, extras


def save(
    decoder: Decoder,
    directory: str | Path,
    *,
    score: Tensor | None = None,
    extra_config: dict[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes what `transformers.AutoModelForCausalLM` loads; with `score` [1, D], what
    `AutoModelForSequenceClassification` loads (one label, head `score`). `extra_config` is added to config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = decoder.config
    family = family_of(config.family, str(directory))
    hf = {**config.hf, **family.hf_config(config), **(extra_config or {})}
    architecture = family.CAUSAL_LM if score is None else family.CLASSIFIER
    hf["architectures"] = [architecture[config.family] if isinstance(architecture, dict) else architecture]
    hf["dtype"] = str(decoder.head_weight.dtype).removeprefix("torch.")
    if score is not None:
        hf |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    (directory / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")

    shards: list[dict[str, Tensor]] = [{}]
    held = total = 0
    for name, tensor in _theirs(decoder, family, score):
        size = tensor.numel() * tensor.element_size()
        if held and held + size > max_shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held, total = held + size, total + size
    if len(shards) == 1:
        save_file(shards[0], directory / SINGLE, metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises UserError when it is missing or no JSON."""
    path = directory / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{directory}: has no config.json, so it is no model; give a Hugging Face directory."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}.") from error


def copy_tokenizer(source: str | Path, directory: Path) -> None:
    """Copies tokenizer and chat template files, byte by byte, beside a saved model; nothing when there are none."""
    origin = _local(source)
    for pattern in (
        "tokenizer*",
        "special_tokens_map.json",
        "vocab.*",
        "merges.txt",
        "added_tokens.json",
        "chat_template*",
    ):
        for path in origin.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)


def _local(source: str | Path) -> Path:
    """The directory itself, or a hub id's snapshot."""
    path = Path(source)
    if path.is_dir():
        return path
    text = str(source)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"{source}: no such model directory.")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:
        raise UserError(
            f"{source}: neither a directory here nor a hub model that can be fetched ({type(error).__name__}); "
            "check the spelling, the network, or give a local directory."
        ) from error


def _open(directory: Path, allow_pickle: bool) -> tuple[set[str], Callable[[str], Tensor]]:
    """Names of all weights, and a function that reads one."""
    if (directory / INDEX).exists():
        where = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {file: directory / file for file in set(where.values())}
    elif (directory / SINGLE).exists():
        files, where = {SINGLE: directory / SINGLE}, None
    elif any((directory / name).exists() for name in PICKLES):
        if not allow_pickle:
            raise UserError(
                f"{directory}: has only pickled weights (.bin); convert them to safetensors, or pass --allow-pickle "
                "to read them with torch.load(weights_only=True)."
            )
        return _open_pickles(directory)
    else:
        raise UserError(f"{directory}: has no {SINGLE} and no {INDEX}; is the download complete?")
    handles = {}
    for name, path in files.items():
        try:
            handles[name] = safetensors.safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise UserError(
                f"{path}: the index names this file and it is missing; is the download complete?"
            ) from error
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: damaged or cut short ({error}); fetch it again.") from error
    if where is None:
        where = dict.fromkeys(handles[SINGLE].keys(), SINGLE)
    return set(where), lambda name: handles[where[name]].get_tensor(name)


def _open_pickles(directory: Path) -> tuple[set[str], Callable[[str], Tensor]]:
    weights: dict[str, Tensor] = {}
    for path in sorted(directory.glob("pytorch_model*.bin")):
        weights |= torch.load(path, weights_only=True, map_location="cpu")
    return set(weights), weights.__getitem__


def _weights(family: ModuleType, config: DecoderConfig) -> Iterator[Weight]:
    """Every line of the family's tables, with the layer number filled in."""
    yield from family.TOP
    for layer in range(config.num_layers):
        for weight in family.BLOCK:
            theirs = tuple(name.format(layer) for name in weight.theirs)
            yield dataclasses.replace(weight, ours=f"blocks.{layer}.{weight.ours}", theirs=theirs)


def _theirs(decoder: Decoder, family: ModuleType, score: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(decoder.named_parameters())
    for weight in _weights(family, decoder.config):
        if weight.ours in parameters:
            ours = parameters[weight.ours].detach()
            for name, tensor in weight.write(ours, decoder.config).items():
                yield family.PREFIX + name, tensor.contiguous().cpu()
    if score is not None:
        yield CLASSIFIER_HEAD, score.contiguous().cpu()
    elif "head" in parameters:
        yield family.HEAD, parameters["head"].detach().contiguous().cpu()


def _fill(ours: Tensor, theirs: Tensor, weight: Weight, directory: Path) -> None:
    if ours.shape != theirs.shape:
        raise UserError(
            f"{directory}: weight {weight.theirs[0]!r} has shape {tuple(theirs.shape)} and config.json says "
            f"{tuple(ours.shape)}; config and weights belong to different models."
        )
    ours.copy_(theirs)


def _with_hf(config: DecoderConfig, hf: dict[str, Any]) -> DecoderConfig:
    eos = hf.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return dataclasses.replace(config, hf=hf, eos_ids=eos_ids)


def _without_first(prefix: str) -> str:
    """OPT's base model says `decoder.`, its language model `model.decoder.`."""
    return prefix.split(".", 1)[1]
