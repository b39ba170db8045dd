"""`penstock export`: a run's model as a directory that transformers can load, or as a GGUF file."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from penstock.commands.config import ExportConfig
from penstock.errors import UserError
from penstock.memory.strategy import DTYPES
from penstock.models import pretrained
from penstock.models.adapter_files import dtype_of, is_adapter_directory
from penstock.models.chat_template import ChatTemplate, ends_of
from penstock.models.formats import gguf_writer
from penstock.models.surgery import merge_adapters
from penstock.models.tokenizer_files import load_tokenizer
from penstock.run.directory import RunDirectory, refused, resolve_model
from penstock.run.model_card import HUB_NAME, card
from penstock.run.versions import Versions, served_model

CARD = "README.md"
"""As the hub and transformers name it."""


def export(config: ExportConfig) -> None:
    """Writes the model or the adapter of the best, or else the newest verified, checkpoint, with a card; with --push it
    uploads both."""
    if Versions.exist(config.run):
        config = dataclasses.replace(config, run=served_model(config.run)[1])
    RunDirectory.peek(config.run)
    if config.private and not config.push:
        raise UserError("--private: nothing is uploaded; give --push USER/NAME too, or leave it out.")
    source = checked(config)
    push = Push(config) if config.push else None
    files = export_gguf(config, source) if config.format == "gguf" else export_directory(config, source)
    print(f"wrote {config.out}")
    if push:
        print(f"uploaded {push.upload(files)}")


def checked(config: ExportConfig) -> Path:
    """The model in its checkpoint. Raises UserError where flags do not fit together, and where something is already."""
    out = Path(config.out)
    if config.format == "gguf":
        if out.suffix != ".gguf":
            raise UserError(
                f"--out {out}: a GGUF file's name ends in .gguf; give one, as in model-{config.type or 'f16'}.gguf."
            )
        for file in (out, out.with_suffix(".md")):
            if file.exists():
                raise UserError(f"--out {out}: {file} exists; choose another name.")
        if config.dtype:
            raise UserError("--dtype: of GGUF weights it is --type f32, f16 or q8_0; leave it out.")
    else:
        for flag, value in {"--type": config.type, "--lora-only": config.lora_only}.items():
            if value:
                raise UserError(f"{flag}: shapes a GGUF file; add --format gguf.")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: exists and is not empty; choose another directory.")
    source = Path(resolve_model(config.run, config.which))
    if source.name != config.which:
        raise UserError(f"{config.run}: this run has no {config.which}; only ppo runs have a critic.")
    adapter = is_adapter_directory(source)
    if config.lora_only and (not adapter or config.type or config.merge):
        reason = "goes without --type and --merge" if adapter else f"{config.run} trained all weights, no adapter"
        raise UserError(f"--lora-only: {reason}.")
    if config.merge and not adapter and config.format != "gguf":
        raise UserError(f"--merge: {config.run} trained all weights and has no adapter; leave --merge out.")
    return source


def export_directory(config: ExportConfig, source: Path) -> dict[str, Path]:
    """Copies the files of the checkpoint's model; with --dtype the weights are rounded or widened, with --merge the
    base is written with the adapter merged into it. Returns what was written, by name."""
    out, adapter = Path(config.out), is_adapter_directory(source)
    unfinished = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        if not config.merge:
            for file in (path for path in source.rglob("*") if path.is_file()):
                (unfinished / file.relative_to(source)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, unfinished / file.relative_to(source))
        if config.merge or config.dtype is not None:
            dtype = DTYPES[config.dtype] if config.dtype else dtype_of(source)
            decoder, extras = pretrained.load(source, dtype=dtype, device="cpu")
            if config.merge:
                merge_adapters(decoder, keep=False)
            extra_config = {key: value for key, value in decoder.config.hf.items() if key.startswith("penstock_")}
            if "score.bias" in extras:
                raise UserError(f"{config.run}: its score head has a bias, which is not written; keep its own files.")
            pretrained.save(decoder, unfinished, score=extras.get("score.weight"), extra_config=extra_config)
        tokenizer = load_tokenizer(str(source))
        template = None if tokenizer is None else ChatTemplate(tokenizer)
        ends = ends_of(template, pretrained.ends_named(source))
        pretrained.copy_tokenizer(source, unfinished, eos_ids=ends.ids, template=template)
        if ends.note:
            print(f"{out}: {ends.note}")
        _write_card(config, source, unfinished / CARD, adapter=adapter and not config.merge)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        raise refused(f"--out {out}", error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return {file.relative_to(out).as_posix(): file for file in sorted(out.rglob("*")) if file.is_file()}


def _write_card(config: ExportConfig, source: Path, file: Path, *, adapter: bool) -> None:
    """`source`: the model in its checkpoint."""
    name = Path(config.push or config.out).name
    text = card(Path(config.run), source.parent, name=name, adapter=adapter, licence=config.license)
    file.write_text(text, encoding="utf-8")


def export_gguf(config: ExportConfig, source: Path) -> dict[str, Path]:
    """Writes the whole model, adapters merged, or the adapter alone, as one GGUF file, and its card beside it. Returns
    both, by the names that they have on the hub."""
    out = Path(config.out)
    device = "cpu" if is_adapter_directory(source) else "meta"
    decoder, extras = pretrained.load(source, dtype=torch.float32, device=device)
    if extras:
        raise UserError(f"{config.run}: llama.cpp has no score heads; export the reward model as safetensors.")
    tokenizer = load_tokenizer(str(source))
    ends = ends_of(None if tokenizer is None else ChatTemplate(tokenizer), pretrained.ends_named(source)).ids
    names = {CARD: out.with_suffix(".md"), out.name: out}
    unfinished, text = (name.with_name(f"{name.name}.tmp-{os.getpid()}") for name in (out, names[CARD]))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if config.lora_only:
            notes = gguf_writer.write_adapter(decoder, unfinished, name=out.stem)
        else:
            merge_adapters(decoder, keep=False)
            kind = config.type or "f16"
            notes = gguf_writer.write_model(decoder, unfinished, kind, name=out.stem, tokenizer=tokenizer, ends=ends)
        _write_card(config, source, text, adapter=config.lora_only)
        unfinished.rename(out)
        text.rename(names[CARD])
    except OSError as error:
        raise refused(f"--out {out}", error) from error
    finally:
        for file in (unfinished, text):
            file.unlink(missing_ok=True)
    for note in notes:
        print(f"{out}: {note}")
    return names


class Push:
    """An upload to the hub, which is asked first: a long export should not end at a missing token."""

    def __init__(self, config: ExportConfig) -> None:
        from huggingface_hub import HfApi  # slow to import

        self._api, self._name = HfApi(), str(config.push)
        if not HUB_NAME.fullmatch(self._name):
            raise UserError(f"--push {self._name}: a model on the hub is named USER/NAME.")
        with self._naming("nothing was written"):
            self._api.create_repo(self._name, private=config.private, exist_ok=True)

    def upload(self, files: Mapping[str, Path]) -> str:
        """Uploads the files in one commit, and returns where they are."""
        from huggingface_hub import CommitOperationAdd

        names = [CommitOperationAdd(name, file) for name, file in files.items()]
        with self._naming(
            f"the files are there; try again with: hf upload {self._name} {next(iter(files.values())).parent}"
        ):
            return str(self._api.create_commit(self._name, names, commit_message="Exported by penstock").commit_url)

    @contextlib.contextmanager
    def _naming(self, state: str) -> Iterator[None]:
        """Turns what goes wrong on the way to the hub into a UserError that says what is there."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            unknown = getattr(getattr(error, "response", None), "status_code", 0) in (401, 403)
            hint = "log in with `hf auth login`, or set HF_TOKEN to one that may write; " if unknown else ""
            raise UserError(f"--push {self._name}: {reason} {hint}{state}.") from error
