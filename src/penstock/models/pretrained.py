"""Models loaded and saved: Hugging Face directories (or hub ids), safetensors in one file or in shards.

Reading goes straight into a decoder's parameters, one tensor at a time; writing splits large models into shards with
the usual index. Of a source's generation_config only the ids that end an answer are applied (PPO.md 4).
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.models import adapter_files, safetensors_writer
from penstock.models.chat_template import ChatTemplate
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families import multimodal, weights_of
from penstock.models.families.weights import Weight
from penstock.models.foreign.decoder import decoder_of
from penstock.models.foreign.family import family_in, family_of
from penstock.models.formats import checkpoint_tensors
from penstock.models.formats.gguf_file import local_directory
from penstock.models.formats.weights import open_weights
from penstock.models.lora_targets import LoraSpec
from penstock.models.surgery import add_adapters
from penstock.models.tokenizer_files import pad_of, read_ends, write_ends
from penstock.models.weight_files import (
    INDEX,
    NAMES_OF_DTYPES,
    SINGLE,
    Weights,
    check_links,
    check_unpacked,
    read_json,
)

TABLES = ("embed.tokens", "embed.weight")
"""The token table, of our decoder and of one with transformers' layers."""
SCORE_HEADS = ("score", "classifier", "v_head", "v_head.summary", "value_head")
"""What others call the linear head of a reward model: transformers, old checkpoints, DeepSpeed-Chat, TRL, OpenRLHF."""
IGNORED = (
    ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq",
    "decoder.version",
)  # fmt: skip
"""Endings of the names of buffers in old checkpoints."""
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json", "chat_template*",
    "additional_chat_templates/*.jinja", "generation_config.json",
)  # fmt: skip
MAPPED = 1 << 28
"""See Checkpoint.opened."""


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
    adapter: str | Path | None = None,
) -> tuple[Decoder, dict[str, Tensor]]:
    """A decoder from a directory or hub id, and the checkpoint's extra weights, which are no decoder's: `score.weight`
    [1, D] of a reward model, whatever it is called there, and `score.bias` [1] if it has one; else none.

    `adapter`, in peft's format, is added to it. If `source` is an adapter, the base that it names is loaded.
    Raises UserError for an unknown family, missing files, and missing, unexpected or mis-shaped weights, by name.
    """
    directory = _local(source, allow_pickle)
    if adapter is not None or adapter_files.is_adapter_directory(directory):
        return _load_adapted(source, adapter, dtype=dtype, device=device, allow_pickle=allow_pickle)
    return _load_whole(directory, dtype=dtype, device=device, allow_pickle=allow_pickle)


def _load_whole(
    directory: Path, changes: Path | None = None, *, dtype: Any, device: Any, allow_pickle: bool
) -> tuple[Decoder, dict[str, Tensor]]:
    """`load` without an adapter; `changes`: the directory of one whose copies of weights replace the base's."""
    hf = read_config(directory)
    check_unpacked(hf, directory)
    family = family_in(hf, str(directory / "config.json"))
    try:
        part_of = multimodal.kind_of(read_json(directory / "config.json"))
        config = dataclasses.replace(family.config_from_hf(hf), hf=hf, eos_ids=read_ends(directory), part_of=part_of)
    except KeyError as error:
        raise UserError(f"{directory / 'config.json'}: needs {error} and does not have it.") from error
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{directory / 'config.json'}: {error}.") from error
    checkpoint = Checkpoint(directory, config, family, allow_pickle, changes)
    decoder = decoder_of(checkpoint.config, dtype=dtype, device="meta")
    extras = checkpoint.check(decoder)
    decoder.source = checkpoint
    device = torch.device(device) if device is not None else torch.get_default_device()
    if device.type != "meta":
        decoder.to_empty(device=device)
        checkpoint.fill(dict(decoder.named_parameters()))
    return decoder, extras


def _load_adapted(source: str | Path, adapter: str | Path | None, **options: Any) -> tuple[Decoder, dict[str, Tensor]]:
    directory = _local(source if adapter is None else adapter)
    spec, base = adapter_files.read_spec(directory)
    base = base if adapter is None else str(source)
    if not base:
        raise UserError(f"{directory / adapter_files.CONFIG}: names no base model; give that, and this as --adapter.")
    whole = _local(base, options["allow_pickle"])
    if adapter_files.is_adapter_directory(whole):
        raise UserError(f"{base}: is an adapter itself, and a model takes one; penstock export --merge it first.")
    decoder, extras = _load_whole(whole, directory, **options)
    adapt(decoder, spec, base=base, directory=directory)
    adapter_extras, facts = adapter_files.read_extras(directory)
    decoder.config.hf.update({f"penstock_{key}": value for key, value in facts.items() if key != "base_digest"})
    decoder.config = dataclasses.replace(decoder.config, eos_ids=ends_named(directory, base))
    return decoder, extras | adapter_extras


def ends_named(source: str | Path, base: str | None = None) -> tuple[int, ...]:
    """The ids that end an answer by the configs beside a model, an adapter's own before its base's."""
    directory = _local(source)
    if adapter_files.is_adapter_directory(directory):
        base = base or adapter_files.base_of(str(directory))
        return tuple(dict.fromkeys([*read_ends(directory), *read_ends(_local(base))]))
    return read_ends(directory)


def adapt(decoder: Decoder, spec: LoraSpec, *, base: str, seed: int = 0, directory: Path | None = None) -> None:
    """Adds adapters to a decoder that `load` read from `base`: fresh ones, or those in `directory`."""
    digest = "" if decoder.source is None else decoder.source.digest()
    base = str(Path(base).resolve()) if Path(base).exists() else base
    saved = None if directory is None else adapter_files.AdapterFile(directory.resolve())
    add_adapters(decoder, spec, base=base, digest=digest, seed=seed, saved=saved)
    assert decoder.adapted is not None
    decoder.adapted.copies = tuple(decoder.source.replaced) if isinstance(decoder.source, Checkpoint) else ()
    if decoder.adapted.copies:
        warnings.warn(
            f"{directory}: {len(decoder.adapted.copies)} weights of the adapter's own replace the base's "
            f"({_first(sorted(decoder.adapted.copies))}); they are used and saved, and stay frozen.",
            stacklevel=2,
        )


class Checkpoint:
    """The weights of a model directory, under our names. A decoder on `meta` has this as its source."""

    def __init__(
        self,
        directory: Path,
        config: DecoderConfig,
        family: Any,
        allow_pickle: bool,
        changes: Path | None = None,
    ) -> None:
        self.directory, self.family, self.allow_pickle, self.changes = directory, family, allow_pickle, changes
        self.headless = False
        """A reward model: it has no language-model head and uses none, so that one is zeros."""
        self.replaced: dict[str, str] = {}
        """Weights that an adapter's file in `changes` has instead: their names here, and there."""
        self.config = config
        self._keeps, self._mapped = False, 0
        self._kept: Weights | None = None
        """Open files."""
        weights = open_weights(directory, allow_pickle)
        multimodal.count_left_out(directory, weights, config.family)
        self.older: dict[str, str] = family.stored(weights.names) if config.foreign else {}
        """Names in files from before transformers renamed weights, by the new ones."""
        self.packed = bool(weights.packed)
        if self.packed:
            warnings.warn(f"{directory}: {weights.packed}.", stacklevel=2)
        if changes is not None:
            self.replaced = self._replaced(weights, changes)
        tables = {family.HEAD, self._table()}
        if config.tied and (tables & self.replaced.keys() or self._own_head(weights)):
            self.config = dataclasses.replace(config, tied=False)

    @functools.cached_property
    def _lines(self) -> dict[str, Weight]:
        """The family's table by our names: a model of experts is read in thousands of calls."""
        return {weight.ours: weight for weight in weights_of(self.family, self.config)}

    def _table(self) -> str:
        """The token table's full name."""
        return next(w.theirs[0] for w in weights_of(self.family, self.config) if w.ours in TABLES)

    def _own_head(self, weights: Weights) -> bool:
        """Whether the files hold a head of its own although config.json says that it is the token table."""
        head, table = self.family.HEAD, self._stored(self._table(), weights.names)
        if head not in weights.names or table is None or torch.equal(weights.get(head), weights.get(table)):
            return False
        warnings.warn(
            f"{self.directory}: config.json ties the head to the token table, and {head} differs from {table}: the "
            "head of its own is used, as transformers does, and written with tie_word_embeddings: false.",
            stacklevel=2,
        )
        return True

    def _replaced(self, weights: Weights, changes: Path) -> dict[str, str]:
        """The adapter's copies that differ from the weights here."""
        file = adapter_files.open_weights(changes)
        replaced = {}
        for name, key in adapter_files.plain_weights(changes, self.config).items():
            stored = self._stored(name, weights.names)
            shape, stored_shape = file.get_slice(key).get_shape(), list(weights.shape(stored)) if stored else None
            if stored_shape not in (None, list(shape)):
                raise UserError(
                    f"{changes}: {key} has shape {tuple(shape)} and the base's has {tuple(stored_shape or ())}: this "
                    "adapter was trained on a base with other tokens; "
                    f"{adapter_files.MERGE_FIRST.format(str(changes))}."
                )
            if stored is None or not torch.equal(weights.get(stored), file.get_tensor(key).to(weights.get(stored))):
                replaced[name] = key
        return replaced

    def _open(self) -> Weights:
        """The weights, those of `changes` in place of ours; a head that is no longer the token table is its copy."""
        weights = open_weights(self.directory, self.allow_pickle)
        if not self.replaced or self.changes is None:
            return weights
        file, replaced = adapter_files.open_weights(self.changes), self.replaced
        head, table = self.family.HEAD, self._stored(self._table(), weights.names) or ""
        copied = {head: table} if not self.config.tied and head not in weights.names | replaced.keys() else {}
        return Weights(
            weights.names | replaced.keys() | copied.keys(),
            lambda n: file.get_tensor(replaced[n]) if n in replaced else weights.get(copied.get(n, n)),
            lambda n: file.get_slice(replaced[n]).get_shape() if n in replaced else weights.shape(copied.get(n, n)),
            lambda n: file.get_slice(replaced[n]).get_dtype() if n in replaced else weights.dtype(copied.get(n, n)),
            lambda n: file.get_slice(replaced[n])[:1] if n in replaced else weights.first(copied.get(n, n)),
        )

    def _stored(self, name: str, names: Set[str]) -> str | None:
        """What the files call a weight. A base model saved alone lacks the first word of the prefix: OPT's is then
        "decoder.", GPT-2's empty."""
        bare = name.removeprefix(self.family.PREFIX)
        shorter = self.family.PREFIX.split(".", 1)[1] + bare
        return next(
            (candidate for candidate in (name, shorter, bare, self.older.get(name)) if candidate in names), None
        )

    def __deepcopy__(self, memo: dict) -> "Checkpoint":
        return self  # a copy of a recipe names the same files

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        changes = self.changes.resolve() if self.changes is not None and self.replaced else None
        return self.directory.resolve(), self.headless, changes

    def check(self, decoder: Decoder) -> dict[str, Tensor]:
        """Compares names and shapes with the decoder's, and reads no weights. Returns the extras, see `load`."""
        weights = self._open()
        parameters: dict[str, Tensor] = dict(decoder.named_parameters())
        heads = {f"{head}.{part}": f"score.{part}" for head in SCORE_HEADS for part in ("weight", "bias")}
        has_score = not heads.keys().isdisjoint(weights.names)
        if has_score and self.family.HEAD not in weights.names and "head" in parameters:
            self.headless = True
            parameters.pop("head")
        used = self._fill(parameters, weights, reads=False)
        if coded := sorted(name for name in used if weights.dtype(name) not in NAMES_OF_DTYPES.values()):
            raise UserError(
                f"{self.directory}: {len(coded)} weights are stored as {weights.dtype(coded[0])}, codes of packed "
                f"weights without their scales: {_first(coded)}; take the model that it was made from."
            )
        unused = weights.names - used - ({self.family.HEAD} if self.config.tied else set())
        patterns = self.family.UNUSED if self.config.foreign else ()
        if buffers := sorted(n for n in unused if n.endswith(IGNORED) or any(re.search(p, n) for p in patterns)):
            warnings.warn(
                f"{self.directory}: {len(buffers)} entries are not used, masks and tables that are computed here, or "
                f"layers that are not run: {_first(buffers)}.",
                stacklevel=2,
            )
        unused -= set(buffers)
        if unexpected := sorted(unused - heads.keys()):
            is_head = any(name.split(".")[0] in SCORE_HEADS for name in unexpected)
            known = f" Of score heads, single linear ones are read: {', '.join(SCORE_HEADS)}." if is_head else ""
            raise UserError(
                f"{self.directory}: {len(unexpected)} weights belong to no {self.config.family} model of this "
                f"config.json: {_first(unexpected)}.{known}"
            )
        extras: dict[str, Tensor] = {}
        for name in sorted(unused):
            tensor, width = weights.get(name), decoder.head_weight.shape[1]
            shape = (1, width) if name.endswith("weight") else (1,)
            if tensor.shape != shape or heads[name] in extras:
                raise UserError(
                    f"{self.directory}: {name} has shape {tuple(tensor.shape)}; a reward model gives one score and has "
                    f"one head, so it must be {shape} and the only one."
                )
            extras[heads[name]] = tensor
        if extras and "score.weight" not in extras:
            raise UserError(f"{self.directory}: {', '.join(sorted(unused))} stands without the head's weight.")
        return extras

    def digest(self) -> str:
        """A hash of every weight's name, shape and first row in bf16, all of which training changes."""
        weights, digest = open_weights(self.directory, self.allow_pickle), hashlib.sha256()
        for name in sorted(weights.names):
            with torch.device("cpu"):  # a slice lands on the default device
                shape, row = weights.shape(name), weights.first(name)
            digest.update(f"{name} {list(shape)}".encode() + row.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, files stay open from one `fill` to the next, until MAPPED bytes were read: what was read of a mapped
        file counts as this process's memory."""
        self._keeps = True
        try:
            yield
        finally:
            self._kept, self._keeps = None, False

    def fill(self, parameters: dict[str, Tensor]) -> None:
        """Reads these parameters, by our names, one at a time."""
        weights = self._kept or self._open()
        self._mapped = (0 if self._kept is None else self._mapped) + sum(ours.nbytes for ours in parameters.values())
        self._kept = weights if self._keeps and self._mapped < MAPPED else None
        if self.headless and "head" in parameters:
            parameters = dict(parameters)
            parameters.pop("head").detach().zero_()
        self._fill(parameters, weights)

    @torch.no_grad()
    def _fill(self, parameters: dict[str, Tensor], weights: Weights, reads: bool = True) -> set[str]:
        """Makes every parameter from their weights. Returns the names that were used."""
        used, missing, damaged = set(), [], list[str]()

        def find(weight: Weight, name: str, shape: torch.Size) -> Tensor:
            stored = self._stored(name, weights.names)
            if stored is None:
                missing.append(name)
                return torch.zeros(shape, device="meta")
            used.add(stored)
            actual, expected = tuple(weights.shape(stored)), weight.stored_shape(tuple(shape), self.config)
            if actual != expected:
                raise UserError(
                    f"{self.directory}: weight {stored!r} has shape {actual} and config.json says {expected}; config "
                    "and weights belong to different models."
                )
            if not reads:
                return torch.empty(shape, device="meta")
            tensor = weights.get(stored) if weight.expert is None else weights.part(stored, weight.expert)
            if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
                damaged.append(stored)
            return tensor

        for our_name, ours in parameters.items():
            if (weight := self._lines.get(our_name)) is not None:
                parts = weight.write(torch.empty(ours.shape, device="meta"), self.config)
                theirs = [find(weight, name, part.shape) for name, part in parts.items()]
                if not missing:
                    ours.copy_(weight.read(theirs, self.config))
        if missing:
            raise UserError(
                f"{self.directory}: {len(missing)} weights are missing: {_first(missing)}; is the download complete?"
            )
        if damaged:
            raise UserError(
                f"{self.directory}: {len(damaged)} weights hold NaN or infinite numbers: {_first(damaged)}; fetch it "
                "again, or take an earlier checkpoint."
            )
        return used


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def save(
    decoder: Decoder,
    directory: str | Path | None,
    *,
    score: Tensor | None = None,
    extra_config: dict[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes what `transformers.AutoModelForCausalLM` loads; with `score` [1, D], what
    `AutoModelForSequenceClassification` loads (one label, head `score`). `extra_config` is added to config.json.

    If the decoder has adapters, they alone are written, and peft loads them. Where ranks share the weights all of them
    call it, and those that do not write pass None.
    """
    family = family_of(decoder.config)
    adapted = decoder.adapted is not None and decoder.adapted.merged is None
    if directory is None:
        if decoder.feed.collective:
            for _ in (
                adapter_files.tensors(decoder, score) if adapted else checkpoint_tensors.tensors(decoder, family, score)
            ):
                pass
        return
    directory = Path(directory)
    if adapted:
        facts = {key.removeprefix("penstock_"): value for key, value in (extra_config or {}).items()}
        adapter_files.save(decoder, directory, score=score, facts=facts)
        return
    directory.mkdir(parents=True, exist_ok=True)
    hf = _config_json(decoder, family, score, extra_config or {})
    (directory / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
    shards = safetensors_writer.shards(checkpoint_tensors.entries(decoder, family, score), max_shard_bytes)
    weight_map: dict[str, str] = {}
    tensors = checkpoint_tensors.tensors(decoder, family, score)
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        safetensors_writer.write(directory / file, shard, itertools.islice(tensors, len(shard)), {"format": "pt"})
        weight_map |= dict.fromkeys((entry.name for entry in shard), file)
    written = set(weight_map.values())
    if len(shards) > 1:
        total = sum(entry.nbytes for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        written.add(INDEX)
    for path in directory.glob("model*.safetensors*"):  # files of an earlier model in other shards
        if path.name not in written:
            path.unlink()


def _config_json(decoder: Decoder, family: Any, score: Tensor | None, extra: dict[str, Any]) -> dict[str, Any]:
    config = decoder.config
    hf = {**config.hf, **family.hf_config(config), **extra}
    architecture = family.CAUSAL_LM if score is None else family.CLASSIFIER
    hf["architectures"] = [architecture[config.family] if isinstance(architecture, dict) else architecture]
    hf["dtype"] = str(decoder.dtype).removeprefix("torch.")
    hf.pop("torch_dtype", None)  # the older name of dtype
    hf.pop("quantization_config", None)  # of the files that it was read from
    if score is None:
        return hf
    pad = pad_of({"vocab_size": config.vocab_size, **hf}, config.eos_ids)
    return hf | {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}, "pad_token_id": pad}


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory, or of the text model in it. Raises UserError when there is none."""
    if not (directory / "config.json").exists():
        raise UserError(f"{directory}: has no config.json, so it is no model; give a Hugging Face directory.")
    return multimodal.text_config(read_json(directory / "config.json"))


def copy_tokenizer(
    source: str | Path, directory: Path, *, eos_ids: Sequence[int] = (), template: ChatTemplate | None = None
) -> None:
    """Copies tokenizer, chat template and generation files, if there are any, into a saved model's directory.

    `eos_ids`, which its answers end with, are written where other programs look for them.
    """
    origin = _local(source)
    if not any(origin.glob("tokenizer*")):
        origin = _local(adapter_files.base_of(str(origin)))  # an adapter without a tokenizer uses its base's
    for pattern in TOKENIZER_FILES:
        for path in origin.glob(pattern):
            if path.is_file():
                copy = directory / path.relative_to(origin)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
    if template is not None and template.amended is not None:
        (directory / "chat_template.jinja").write_text(template.amended, encoding="utf-8")
    write_ends(directory, eos_ids, template.tokenizer if template else None)


def _local(source: str | Path, allow_pickle: bool = False) -> Path:
    """The directory itself, a GGUF file's in the cache, or a hub id's snapshot."""
    path = local_directory(source)
    if path.is_dir():
        check_links(path)
        return path
    text = str(source)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"{source}: no such model directory.")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    if allow_pickle:
        patterns.append("*.bin")
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:
        raise UserError(
            f"{source}: neither a directory here nor a hub model that can be fetched ({type(error).__name__}); "
            "check the spelling, the network, or give a local directory."
        ) from error
